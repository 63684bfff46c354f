"""What to look at first after a run: the tables that `Filter.print_summary` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.results import smoothing
from numpyro_diffusion_da.results.advice import rejected_share

if TYPE_CHECKING:
    from rich.console import Group

    from numpyro_diffusion_da.results.result import FilterResult, ParameterResult


LAG = 5  # steps after which lines are counted, beside the whole way
UNSOLVED = 0.5  # relative residual of a guidance's linear solve that is worth a word
TEMPERED = 0.1  # alpha, below which selection hardly looks at the observations
NOISY = 3.0  # standard deviation of log p^(y) above which a chain on it hardly moves


def summary_table(result: FilterResult, max_rows: int = 8) -> Group:
    """What to look at first after a run, for `rich` to print.

    A table on the filter (are the weights healthy, can the log-evidence be used, what did it cost), and one on the
    state at the last time, with the R-hat of whole chains (see `convert.to_arviz`). Of a state of more than `max_rows`
    values those with the largest R-hat are shown.

    Args:
        result: `Filter.result`.
        max_rows: rows of the second table.
    """
    from rich.console import Group

    settings = result.attributes
    title = f"{settings.get('algorithm', 'a filter')} on '{settings.get('model', 'a model')}'"
    size = int(_defined(result, result.posterior[result.latent_name].shape[3:]).sum())
    some = f": the {max_rows} of {size} values with the largest r_hat" if size > max_rows else ""
    state = f"{result.latent_name} at the last time{some}"
    return Group(title, _filter_table(result), state, _state_table(result, max_rows))


def _filter_table(result: FilterResult) -> Any:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    stats = result.sample_stats
    chains, draws, steps = result.posterior[result.latent_name].shape[:3]
    table = Table(box=SIMPLE, show_header=False)
    table.add_row("particles x chains x steps", f"{draws} x {chains} x {steps}")
    observed = sum(int(mask.sum()) for mask in result.observed_mask.values())
    table.add_row("observations", f"{observed} of {sum(mask.size for mask in result.observed_mask.values())}")
    if result.rejected:
        share = rejected_share(result)
        table.add_row("rejected as gross errors", f"{share:.2%} of the checked" if share else "none")
    if result.is_local:
        table.add_row("ancestors", f"local, of {stats['log_weights'].shape[-1]} blocks")
    if _selects(result):
        where = "steps and blocks" if result.is_local else "steps"
        low = np.mean(stats["tempering"] < TEMPERED)
        step = int(np.unravel_index(np.argmin(stats["ess"]), stats["ess"].shape)[1])
        table.add_row("ESS before tempering", f"{_middle_and_least(stats['ess'], '.1f')} (step {step})")
        table.add_row(
            "tempering alpha", f"{_middle_and_least(stats['tempering'], '.2f')}, < {TEMPERED} in {low:.0%} of {where}"
        )
        if (advice := tempering_advice(result)) is not None:
            table.add_row("", f"[yellow]{escape(advice)}[/yellow]")
        table.add_row("distinct ancestors", _middle_and_least(stats["distinct_ancestors"], ".0f"))
        if _has_genealogy(result):
            lagged, whole = (np.median(smoothing.distinct_ancestors_at(result, lag)[:, 0]) for lag in (LAG, None))
            lines = f"{lagged:.0f} of the first step after {LAG} steps, " if steps > LAG + 1 else ""
            table.add_row("distinct lines", f"{lines}{whole:.0f} after {steps - 1}")
        if result.is_local:
            table.add_row("log-evidence", "none of localized ancestors")
        else:
            total = stats["log_evidence_increment"].sum(1, dtype=float)
            spread = f" (sd {total.std(ddof=1):.2f} over chains)" if chains > 1 else ""
            table.add_row("log-evidence", f"{total.mean():.2f}{spread}")
            if reasons := evidence_bias_reasons(result):
                table.add_row("", f"[yellow]not an unbiased estimate: {'; '.join(reasons)}[/yellow]")
    else:
        table.add_row("weights", "equal: no selection, no log-evidence")
    worst = np.max(stats["solver_residual"])
    table.add_row("worst solver residual", "no linear solves" if worst == 0 else f"{worst:.1e}")
    if worst > UNSOLVED:
        table.add_row("", "guidance is not solved for: draws may miss accurate observations by several errors;")
        table.add_row("", "compare with more products, as guidance=MMPS(KrylovSolve(products=4))")
    passes = {name: values.mean(dtype=float) for name, values in result.network_passes.items() if np.any(values)}
    each = ", ".join(f"{mean:.4g} {name}" for name, mean in passes.items())
    table.add_row("network passes", f"{each} per particle and step" if passes else "none")
    return table


def _has_genealogy(result: FilterResult) -> bool:
    """Whether its lines can be followed: not an ensemble Kalman filter's, local ancestors', or a smoothed result's."""
    known = "ancestors" in result.sample_stats and not result.is_local
    return known and result.attributes.get("algorithm") not in smoothing.WITHOUT_ANCESTORS


def _selects(result: FilterResult) -> bool:
    """Whether any step had unequal weights."""
    log_weights = result.sample_stats["log_weights"]
    return bool(np.any(log_weights != log_weights[:, :1]))


def _middle_and_least(values: np.ndarray, fmt: str) -> str:
    return f"median {np.median(values):{fmt}}, least {np.min(values):{fmt}}"


def tempering_advice(result: FilterResult) -> str | None:
    """What to do where half of the weights are tempered to alpha below 0.1, or more; None where they are not."""
    alpha = float(np.median(result.sample_stats["tempering"]))
    if alpha >= TEMPERED:
        return None
    algorithm, weight = (str(result.attributes.get(name, "")) for name in ("algorithm", "weight"))
    if result.is_local:
        instead = ["leave fewer observations to a block, by a smaller radius of the taper"]
    elif algorithm == "FAAPF":
        instead = ["choose ancestors by the observations near each place, FAAPF(model, taper=ndda.Taper(...))"]
    else:
        instead = ["use ndda.FAAPF(model), which weighs before it moves"]
    instead += ["give the weights the transition's spread, weight=ndda.Moment()"] if weight == "Dirac()" else []
    return (
        f"weights are tempered to alpha = {alpha:.2g} (median), below {TEMPERED}: a few particles would hold them all, "
        f"and selection uses less of what is observed; {'; '.join(instead)}; or take more particles."
    )


def evidence_bias_reasons(result: FilterResult) -> list[str]:
    """Why the log-evidence of a run does not come from an unbiased estimate of p(y); empty where no reason is known.

    A particle filter estimates p(y) without bias when its weights are exact and not tempered.
    """
    tempered = np.mean(result.sample_stats["tempering"] < 1.0)
    reasons = [f"weights tempered in {tempered:.0%} of steps"] if tempered > 0 else []
    reasons += [reason for reason in str(result.attributes.get("evidence_bias_reasons", "")).split("; ") if reason]
    return reasons


def chain_r_hat(values: np.ndarray) -> np.ndarray:
    """R-hat of whole chains: shape (chain, draw, ...) -> (...), NaN for one chain.

    Gelman & Rubin's ratio without splitting or ranks, `arviz.rhat(method="identity")`, for arrays of any size.
    """
    chains, draws = values.shape[:2]
    if chains < 2 or draws < 2:
        return np.full(values.shape[2:], np.nan)
    within = values.var(1, ddof=1, dtype=float).mean(0)
    between = values.mean(1, dtype=float).var(0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt((draws - 1) / draws + between / within)


def _state_table(result: FilterResult, max_rows: int) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    name = result.latent_name
    last = result.posterior[name][:, :, -1]
    shape = last.shape[2:]
    r_hat = chain_r_hat(last).reshape(-1)
    last = last.reshape(*last.shape[:2], -1)
    rows = np.flatnonzero(_defined(result, shape))
    if rows.size > max_rows:
        largest = np.argsort(np.where(np.isnan(r_hat[rows]), -np.inf, -r_hat[rows]), kind="stable")
        rows = rows[largest[:max_rows]]
    table = Table(box=SIMPLE)
    for column in ("", "mean", "sd", "r_hat"):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in rows:
        draws = last[:, :, row].astype(float)
        label, units = _place(result, tuple(int(i) for i in np.unravel_index(row, shape)) if shape else ())
        units = "" if units == "1" else f" {units}"
        shown = "-" if np.isnan(r_hat[row]) else f"{r_hat[row]:.2f}"
        table.add_row(Text(label), f"{draws.mean():.4g}{units}", f"{draws.std(ddof=min(1, draws.size - 1)):.3g}", shown)
    return table


def _defined(result: FilterResult, shape: tuple[int, ...]) -> np.ndarray:
    """Where the state has values, shape of the state: fillings of undefined points are no values."""
    defined = np.ones(shape, bool)
    layout = result.layout
    if layout is not None and layout.shape == shape:
        for variable in layout.variables:
            if variable.undefined is not None:
                defined[variable.undefined.mask(), layout.channels(variable.name)] = False
    return defined


def _place(result: FilterResult, index: tuple[int, ...]) -> tuple[str, str]:
    """What one value of the state is, and its unit."""
    name, layout = result.latent_name, result.layout
    units = "1" if layout is None else layout.units
    if not index:
        return name, units
    where = [str(i) for i in index]
    if layout is not None and len(layout.dims) == len(index):
        coordinates = layout.coords()
        values = (coordinates[d][i] if d in coordinates else i for d, i in zip(layout.dims, index, strict=True))
        where = [f"{d}={value}" for d, value in zip(layout.dims, values, strict=True)]
        for variable in layout.variables:
            channels = layout.channels(variable.name)
            if channels.start <= index[-1] < channels.stop:
                name, units = variable.name, variable.units
                levels = [f"level={variable.levels[index[-1] - channels.start]}"] if variable.levels else []
                where = [*levels, *where[:-1]]
    return f"{name}[{', '.join(where)}]", units


def parameter_summary_table(result: ParameterResult) -> Group:
    """What to look at first after a run of `PMMH` or `SMC2`, for `rich` to print.

    A table on the inference (does it move, is the evidence good enough, what did it cost) and one on the parameters.

    Args:
        result: `PMMH.result` or `SMC2.result`.
    """
    from rich.console import Group

    found = result.attributes
    title = f"{found['inference']} with {found['algorithm']} on '{found['model']}'"
    return Group(title, _inference_table(result), _parameter_table(result))


def _inference_table(result: ParameterResult) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    found, stats = result.attributes, result.sample_stats
    table = Table(box=SIMPLE, show_header=False)
    chains, draws = next(iter(result.posterior.values())).shape[:2]
    table.add_row("draws x chains", f"{draws} x {chains}")
    table.add_row("particles of each filter", str(found["num_particles"]))
    table.add_row("acceptance", f"{np.nanmean(stats['acceptance_rate']):.2f}")
    if "ess" in stats:
        table.add_row("ESS of the parameters", _middle_and_least(stats["ess"], ".0f"))
        total = stats["log_evidence_increment"].sum(1, dtype=float)
        spread = f" (sd {total.std(ddof=1):.2f} over chains)" if chains > 1 else ""
        table.add_row("log-evidence", f"{total.mean():.2f}{spread}")
    noise = float(found["log_evidence_std"])
    table.add_row("sd of the filter's log-evidence", f"{noise:.2f} at the posterior mean (1 to 1.7 is best)")
    if noise > NOISY:
        table.add_row("", "[yellow]the chain stands still on lucky estimates; take more particles[/yellow]")
    if found["evidence_bias_reasons"]:
        table.add_row("", f"[yellow]biased: {found['evidence_bias_reasons']}[/yellow]")
    passes = {name: found[f"network_passes_{name}"] for name in ("forward", "jvp", "vjp")}
    each = ", ".join(f"{count:.4g} {name}" for name, count in passes.items() if count)
    table.add_row("network passes", f"{each} per run of the filter" if each else "none")
    return table


def _parameter_table(result: ParameterResult) -> Any:
    from numpyro.diagnostics import summary as diagnose
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE)
    columns = {"mean": "mean", "sd": "std", "median": "median", "5%": "5.0%", "95%": "95.0%", "ess": "n_eff"}
    for column in ("", *columns, "r_hat"):
        table.add_column(column, justify="left" if column == "" else "right")
    with np.errstate(divide="ignore", invalid="ignore"):  # a chain that never moved has no ESS
        diagnosed = diagnose(result.posterior, prob=0.9)
    for name, numbers in diagnosed.items():
        shape = np.shape(numbers["mean"])
        r_hat = chain_r_hat(result.posterior[name])
        for index in np.ndindex(shape):
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            values = [f"{float(np.asarray(numbers[key])[index]):.4g}" for key in columns.values()]
            shown = "-" if np.isnan(r_hat[index]) else f"{r_hat[index]:.2f}"
            table.add_row(Text(label), *values, shown)
    return table
