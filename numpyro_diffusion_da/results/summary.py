"""Summary tables of a run, as `Filter.print_summary`, `PMMH.print_summary` and `SMC2.print_summary` print them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.arguments import require, require_count
from numpyro_diffusion_da.results import smoothing
from numpyro_diffusion_da.results.advice import (
    TEMPERED,
    far_value_advice,
    lost_advice,
    rejected_share,
    tempering_advice,
    wide_advice,
)
from numpyro_diffusion_da.results.background import departure_ratios
from numpyro_diffusion_da.results.result import FilterResult, ParameterResult

if TYPE_CHECKING:
    from rich.console import Group


LAG = 5
"""Number of steps after which distinct lines are counted, in addition to those of the last step."""

ACCURATE = 0.03
"""Error of the sampler's variances above which a summary says what to do."""

UNSOLVED = 0.5
"""Relative residual of the linear solve of a guidance above which the summary warns."""

NOISY = 3.0
"""Standard deviation of the estimated log p(y) above which a chain on it hardly moves."""


def summary_table(result: FilterResult, max_rows: int = 8) -> Group:
    """Summary of a filter run as two `rich` tables.

    The first table describes the filter: how well it predicted the observations, the health of the weights, the
    log-evidence and whether it is unbiased, and the cost. The second table describes the state at the last time, with
    the R-hat of whole chains (see `convert.to_arviz`). If the state has more than `max_rows` values, those with the
    largest R-hat are shown; with one chain, which has no R-hat, the first ones.

    Args:
        result: result of a run, `Filter.result`.
        max_rows: largest number of rows of the second table.

    Returns:
        Both tables with their titles, for `rich.console.Console.print`.
    """
    from rich.console import Group

    require(result, FilterResult, "summary_table", "result", "filter.result")
    require_count(max_rows, "summary_table", "max_rows")
    settings = result.attributes
    title = f"{settings.get('algorithm', 'a filter')} on '{settings.get('model', 'a model')}'"
    if not result.posterior:
        return Group(title, _filter_table(result), "The run kept reductions of its particles only.")
    size = int(_defined(result, result.posterior[result.latent_name].shape[3:]).sum())
    chains = result.posterior[result.latent_name].shape[0]
    which = f"the {max_rows} of {size} values with the largest r_hat" if chains > 1 else f"{max_rows} of {size} values"
    some = f": {which}" if size > max_rows else ""
    state = f"{result.latent_name} at the last time{some}"
    return Group(title, _filter_table(result), state, _state_table(result, max_rows))


def _filter_table(result: FilterResult) -> Any:
    """Table of the filter: size, observations, weights, evidence, solver and cost."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    stats = result.sample_stats
    chains, draws, steps = result.sizes
    table = Table(box=SIMPLE, show_header=False)
    table.add_row("particles x chains x steps", f"{draws} x {chains} x {steps}")
    observed = sum(int(mask.sum()) for mask in result.observed_mask.values())
    table.add_row("observations", f"{observed} of {sum(mask.size for mask in result.observed_mask.values())}")
    if result.rejected:
        share = rejected_share(result)
        table.add_row("rejected as gross errors", f"{share:.2%} of the checked observations" if share else "none")
    ratios = departure_ratios(result)
    for site, ratio in ratios.items():
        if np.isfinite(ratio.value):
            error = f" +- {ratio.standard_error:.2g}" if np.isfinite(ratio.standard_error) else ""
            table.add_row(
                escape(f"(O - B)^2 / (P + R) of {site}"), f"{ratio.value:.3g}{error} (1 if the filter is right)"
            )
    for advice in (far_value_advice(result), lost_advice(ratios), wide_advice(ratios)):
        if advice is not None:
            table.add_row("", f"[yellow]{escape(advice)}[/yellow]")
    if result.is_local:
        table.add_row("resampling", f"localized, in {stats['ess'].shape[-1]} blocks")
        if "log_weights" not in stats and "smoothing" not in result.attributes:
            table.add_row("", "weights and ancestors of the blocks are too many to be kept")
    if _selects(result):
        where = "steps and blocks" if result.is_local else "steps"
        low = np.mean(stats["tempering"] < TEMPERED)
        step = int(np.unravel_index(np.argmin(stats["ess"]), stats["ess"].shape)[1])
        table.add_row("ESS before tempering", f"{_middle_and_least(stats['ess'], '.1f')} (step {step})")
        table.add_row(
            "tempering alpha",
            f"{_middle_and_least(stats['tempering'], '.2f')}, below {TEMPERED} in {low:.0%} of {where}",
        )
        if (advice := tempering_advice(result)) is not None:
            table.add_row("", f"[yellow]{escape(advice)}[/yellow]")
        if "selection_share" in stats:
            selection, moved = np.mean(stats["selection_share"]), np.mean(stats["moved_share"])
            table.add_row("non-Gaussianity D", f"{np.mean(stats['non_gaussianity']):.2f} (1 or less if Gaussian)")
            table.add_row("likelihood used by moves", f"{moved:.0%} (selection's share lambda {selection:.2f})")
        if "resampled" in stats:
            table.add_row("steps with resampling", f"{np.mean(stats['resampled']):.0%}")
        table.add_row("distinct ancestors", _middle_and_least(stats["distinct_ancestors"], ".0f"))
        if _has_genealogy(result):
            lagged, whole = (np.median(smoothing.distinct_ancestors_at(result, lag)[:, 0]) for lag in (LAG, None))
            lines = f"{lagged:.0f} after {LAG} steps, " if steps > LAG + 1 else ""
            table.add_row("distinct lines at the first step", f"{lines}{whole:.0f} after {steps - 1} steps")
        if result.is_local:
            table.add_row("log-evidence", "not available with localized resampling")
        else:
            total = stats["log_evidence_increment"].sum(1, dtype=float)
            spread = f" (sd {total.std(ddof=1):.2f} over chains)" if chains > 1 else ""
            table.add_row("log-evidence", f"{total.mean():.2f}{spread}")
            if reasons := evidence_bias_reasons(result):
                table.add_row("", f"[yellow]not an unbiased estimate: {'; '.join(reasons)}[/yellow]")
    else:
        used = "equal: no selection, no log-evidence" if observed else "equal, because nothing was observed"
        table.add_row("weights", used)
    worst = np.max(stats["solver_residual"])
    table.add_row("largest solver residual", "no linear solves" if worst == 0 else f"{worst:.1e}")
    if worst > UNSOLVED and result.attributes.get("algorithm") == "EnKF":
        table.add_row("", "The linear solve of the update is far from converged: use fewer or less accurate")
        table.add_row("", "observations, a smaller taper, or update=ndda.smc.SquareRoot().")
    elif worst > UNSOLVED:
        table.add_row("", "The solve of the guidance is far from converged: draws may miss accurate observations")
        table.add_row("", "by several errors. Compare with guidance=ndda.MMPS(), which makes more products if needed.")
        table.add_row("", "If it stays: the Jacobian of the emulator is no covariance, so guidance is weakened there.")
    if (off := result.attributes.get("sampler_variance_error")) is not None:
        table.add_row("sampler's variance error", f"at most {float(off):.1%} for a Gaussian mode")
        if (modes := result.attributes.get("unresolved_modes")) is not None:
            table.add_row("", f"[yellow]The prior has modes with standard deviations {escape(str(modes))}[/yellow]")
            table.add_row("", "[yellow](unit of the latent): give the prior a wider noise_range.[/yellow]")
        elif float(off) > ACCURATE:
            table.add_row("", "ndda.Sampler(), the default, has at most 3%, ndda.Sampler.cheap() up to 26%.")
    passes = {name: values.mean(dtype=float) for name, values in result.network_passes.items() if np.any(values)}
    each = ", ".join(f"{mean:.4g} {name}" for name, mean in passes.items())
    table.add_row("network passes", f"{each} per particle and step" if passes else "none")
    return table


def _has_genealogy(result: FilterResult) -> bool:
    """Whether particles have single ancestors: not with an EnKF or localized resampling, or in a smoothed result."""
    stats = result.sample_stats
    known = "ancestors" in stats and not result.is_local and not {"selection_share", "resampled"} & set(stats)
    return known and result.attributes.get("algorithm") not in smoothing.WITHOUT_ANCESTORS


def _selects(result: FilterResult) -> bool:
    """Whether the weights of any step are unequal."""
    stats = result.sample_stats
    if "log_weights" not in stats:  # those of many blocks, which are not kept
        return bool(np.any(stats["log_weight_std"] > 0.0))
    log_weights = stats["log_weights"]
    return bool(np.any(log_weights != log_weights[:, :1]))


def _middle_and_least(values: np.ndarray, fmt: str) -> str:
    """Median and minimum of `values` in words."""
    return f"median {np.median(values):{fmt}}, minimum {np.min(values):{fmt}}"


def evidence_bias_reasons(result: FilterResult) -> list[str]:
    """Reasons why the log-evidence of a run is not from an unbiased estimate of p(y); empty if none is known.

    A particle filter estimates p(y) without bias if its weights are exact and not tempered.

    Args:
        result: result of a run, `Filter.result`.

    Returns:
        One phrase per reason.
    """
    tempered = np.mean(result.sample_stats["tempering"] < 1.0)
    reasons = [f"weights tempered in {tempered:.0%} of steps"] if tempered > 0 else []
    reasons += [reason for reason in str(result.attributes.get("evidence_bias_reasons", "")).split("; ") if reason]
    return reasons


def chain_r_hat(values: np.ndarray) -> np.ndarray:
    """R-hat of whole chains, (chain, draw, ...) -> (...); NaN for a single chain.

    This is Gelman & Rubin's ratio without splitting chains and without ranks. It equals
    `arviz.rhat(method="identity")`, but works on arrays of any size.
    """
    chains, draws = values.shape[:2]
    if chains < 2 or draws < 2:
        return np.full(values.shape[2:], np.nan)
    within = values.var(1, ddof=1, dtype=float).mean(0)
    between = values.mean(1, dtype=float).var(0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt((draws - 1) / draws + between / within)


def _state_table(result: FilterResult, max_rows: int) -> Any:
    """Table of the state at the last time, one value per row; the values of largest R-hat if there are too many."""
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
    """Mask of the state where its fields are defined, in the shape of the state."""
    defined = np.ones(shape, bool)
    layout = result.layout
    if layout is not None and layout.shape == shape:
        for variable in layout.variables:
            if variable.undefined is not None:
                defined[variable.undefined.mask(), layout.channels(variable.name)] = False
    return defined


def _place(result: FilterResult, index: tuple[int, ...]) -> tuple[str, str]:
    """Label and unit of one value of the state, such as "temperature[level=850, latitude=45.0]" and "K"."""
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
    """Summary of a run of `PMMH` or `SMC2` as two `rich` tables.

    The first table describes the inference: acceptance, quality of the evidence, and cost. The second table describes
    the parameters.

    Args:
        result: `PMMH.result` or `SMC2.result`.

    Returns:
        Both tables with their titles, for `rich.console.Console.print`.
    """
    from rich.console import Group

    require(result, ParameterResult, "parameter_summary_table", "result", "pmmh.result")
    found = result.attributes
    title = f"{found['inference']} with {found['algorithm']} on '{found['model']}'"
    return Group(title, _inference_table(result), _parameter_table(result))


def _inference_table(result: ParameterResult) -> Any:
    """Table of the inference: size, acceptance, evidence and cost."""
    from rich.box import SIMPLE
    from rich.table import Table

    found, stats = result.attributes, result.sample_stats
    table = Table(box=SIMPLE, show_header=False)
    chains, draws = next(iter(result.posterior.values())).shape[:2]
    table.add_row("draws x chains", f"{draws} x {chains}")
    table.add_row("particles per filter", str(found["num_particles"]))
    table.add_row("acceptance rate", f"{np.nanmean(stats['acceptance_rate']):.2f}")
    if "ess" in stats:
        table.add_row("ESS of the parameters", _middle_and_least(stats["ess"], ".0f"))
        total = stats["log_evidence_increment"].sum(1, dtype=float)
        spread = f" (sd {total.std(ddof=1):.2f} over chains)" if chains > 1 else ""
        table.add_row("log-evidence", f"{total.mean():.2f}{spread}")
    noise = float(found["log_evidence_std"])
    table.add_row("sd of the filter's log-evidence", f"{noise:.2f} at the posterior mean (1 to 1.7 is best)")
    if noise > NOISY:
        table.add_row("", "[yellow]the chain gets stuck at overestimates of the evidence; take more particles[/yellow]")
    if found["evidence_bias_reasons"]:
        table.add_row("", f"[yellow]evidence is biased: {found['evidence_bias_reasons']}[/yellow]")
    passes = {name: found[f"network_passes_{name}"] for name in ("forward", "jvp", "vjp", "conditioning")}
    each = ", ".join(f"{count:.4g} {name}" for name, count in passes.items() if count)
    table.add_row("network passes", f"{each} per run of the filter" if each else "none")
    return table


def _parameter_table(result: ParameterResult) -> Any:
    """Table of the parameters: moments, quantiles, ESS and R-hat, one value per row."""
    from numpyro.diagnostics import summary as diagnose
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE)
    columns = {"mean": "mean", "sd": "std", "median": "median", "5%": "5.0%", "95%": "95.0%", "ess": "n_eff"}
    for column in ("", *columns, "r_hat"):
        table.add_column(column, justify="left" if column == "" else "right")
    with np.errstate(divide="ignore", invalid="ignore"):  # a chain that never moved has zero variance
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
