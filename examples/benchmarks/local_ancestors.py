"""What do localized ancestors give? Lorenz-96, observed linearly and otherwise, with its true and a learned transition.

Stochastic Lorenz-96 (F = 8, step 0.1, noise variance 0.5) on a ring of sites. Cases:

- linear: every second site, error variance 0.1;
- modulus: |x| of every site, error variance 0.1;
- square: x^2 / 8 of every site, error variance 0.1;
- arctan: 3 arctan(x / 2) of every second site, error variance 0.05.

Filters: localized FA-APF with Moment and with Dirac weights; the published FA-APF, whose weights are global; controls:
the free ensemble, a bootstrap filter, guided particles with equal weights, and a localized ensemble Kalman filter. All
have the same transition, the true one or the emulator's. No setting was chosen on the truths reported; `--tune` prints
the scores of the grid on others. Seams show in the roughness of particles over that of the truth: after the transition
("roughness"), and of the states glued together before it ("glued").

    python examples/benchmarks/local_ancestors.py --case linear --case modulus --out local.json
    python examples/benchmarks/local_ancestors.py --emulator --truths 3
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from numpyro.contrib.control_flow import scan
from rich.console import Console
from rich.progress import track
from rich.table import Table

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_system as lorenz96

TUNING_SEED = 1


class Case(NamedTuple):
    """How the state is observed: h, the variance of the error, every n-th site."""

    h: Callable[[jax.Array], jax.Array]
    error_variance: float
    every: int


CASES = {
    "linear": Case(lambda x: x, 0.1, 2),
    "modulus": Case(jnp.abs, 0.1, 1),
    "square": Case(lambda x: x**2 / 8.0, 0.1, 1),
    "arctan": Case(lambda x: 3.0 * jnp.arctan(x / 2.0), 0.05, 2),
}


class Setting(NamedTuple):
    """Half-width of the taper in sites, with the particle filter's target ESS or the Kalman filter's factor on the forecast.

    `factor` is that of the particle filter's inflation, `Multiplicative`; the Kalman filter's is on the forecast.
    """

    radius: float
    amount: float
    factor: float = 1.0


# The lowest CRPS on two truths of `TUNING_SEED` (arctan with Moment weights: four), d = 40, true transition, of `GRID`;
# only for arctan with all of it, elsewhere without target ESS 0.05, radius 4 and the inflations of spread.
TUNED: dict[str, dict[str, Setting]] = {
    "local, Moment": {
        "linear": Setting(5.0, 0.1), "modulus": Setting(5.0, 0.1), "square": Setting(5.0, 0.1),
        "arctan": Setting(5.0, 0.1, 1.05),
    },
    "local, Dirac": {
        "linear": Setting(5.0, 0.2), "modulus": Setting(5.0, 0.2), "square": Setting(5.0, 0.2),
        "arctan": Setting(5.0, 0.2),
    },
    "EnKF": {
        "linear": Setting(9.0, 1.02), "modulus": Setting(6.0, 1.0), "square": Setting(9.0, 1.02),
        "arctan": Setting(6.0, 1.02),
    },
}  # fmt: skip
GRID = {
    "local, Moment": [
        *[Setting(3.0, 0.1), Setting(4.0, 0.1), Setting(5.0, 0.05), Setting(5.0, 0.1), Setting(5.0, 0.2)],
        *[Setting(8.0, 0.1), Setting(4.0, 0.1, 1.02), Setting(5.0, 0.1, 1.02), Setting(5.0, 0.1, 1.05)],
    ],
    "local, Dirac": [Setting(5.0, 0.1), Setting(5.0, 0.2), Setting(8.0, 0.1), Setting(8.0, 0.2)],
    "EnKF": [Setting(r, i) for r in (4.0, 6.0, 9.0) for i in (1.0, 1.02)] + [Setting(4.0, 1.1), Setting(9.0, 1.1)],
}
CONTROLS = ("free ensemble", "bootstrap", "equal weights", "global, Dirac")
# Of the emulator's draws: fewer passes than the default, and a smaller error on rings (docs/method.md, ring-64).
SAMPLER = ndda.Sampler(schedule=ndda.KarrasSchedule(13, rho=20.0, lowest=0.04))
GUIDANCE = ndda.diffusion.Piecewise(tuple(ndda.MMPS(ndda.diffusion.KrylovSolve(k)) for k in (1, 2, 1)), (40.0, 0.2))


def program(case: Case, sites: int, emulator: bool) -> Callable[[jax.Array], None]:
    """The state-space model."""
    prior = ndda.load_prior("lorenz96", num_sites=sites)
    climate = prior.climatology()

    def model(y: jax.Array) -> None:
        def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            moved = dist.Normal(lorenz96.flow(x), lorenz96.NOISE_VARIANCE**0.5).to_event(1)
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x, sampler=SAMPLER) if emulator else moved)
            seen = case.h(x[:: case.every])
            numpyro.sample("y", dist.Normal(seen, case.error_variance**0.5).to_event(1), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x0", climate), y)

    return model


def simulate(key: jax.Array, case: Case, sites: int, cycles: int) -> tuple[np.ndarray, np.ndarray]:
    """(states, observations) after 50 steps of spin-up."""
    start_key, run_key, error_key = jax.random.split(key, 3)
    climate = ndda.load_prior("lorenz96", num_sites=sites).climatology()
    states = lorenz96.trajectory(run_key, climate.sample(start_key), 50 + cycles)[50:]
    seen = case.h(states[:, :: case.every])
    return np.asarray(states), np.asarray(seen + case.error_variance**0.5 * jax.random.normal(error_key, seen.shape))


def make(
    name: str, setting: Setting | None, model: Any, case: Case, sites: int, emulator: bool
) -> ndda.filters.FilterAlgorithm:
    """The filter of that name."""
    taper = None
    if setting is not None:
        at = np.arange(0, sites, case.every)
        taper = ndda.Taper(setting.radius, ndda.Ring(sites), {"y": at}, state=np.arange(sites))
    # The emulator's errors are nearly independent from site to site: one product with random signs has its variances.
    moment = ndda.Moment(noise_level=10.0, probes=1) if emulator else ndda.Moment()
    if name == "EnKF":
        return ndda.EnKF(model, taper=taper, inflation=(ndda.ForecastMultiplicative(setting.amount),))
    if name in ("free ensemble", "bootstrap"):
        return ndda.Bootstrap(model)
    if name == "equal weights":
        return ndda.FAAPF(model, weight=ndda.Equal(), guidance=GUIDANCE)
    if name == "global, Dirac":
        return ndda.FAAPF(model, weight=ndda.Dirac(), guidance=GUIDANCE)
    weight = moment if name == "local, Moment" else ndda.Dirac()
    inflation = () if setting.factor == 1.0 else (ndda.Multiplicative(setting.factor),)
    return ndda.FAAPF(
        model, weight=weight, taper=taper, target_ess=setting.amount, guidance=GUIDANCE, inflation=inflation
    )


def glued(result: ndda.FilterResult, spin_up: int) -> np.ndarray:
    """The states that the draws were conditioned on, with their seams, shape (particles, time - 1, sites)."""
    x = result.posterior["x"][0, :, spin_up:-1]
    if not result.is_local:
        return x
    # Each site is a block, in the order of the sites.
    return np.take_along_axis(x, result.sample_stats["ancestors"][0, :, spin_up + 1 :], axis=0)


def row_of(
    name: str, setting: Setting | None, case: str, sites: int, emulator: bool, *,
    seed: int, truths: int, particles: int, cycles: int, spin_up: int,
) -> dict[str, Any]:  # fmt: skip
    """Means over truths with their standard errors."""
    model = program(CASES[case], sites, emulator)
    run = ndda.Filter(
        make(name, setting, model, CASES[case], sites, emulator),
        num_particles=particles, progress_bar=False, keep_observed=False,
    )  # fmt: skip
    scores, lost = [], 0
    for number in range(truths):
        truth_key, filter_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        states, y = simulate(truth_key, CASES[case], sites, cycles)
        try:
            run.run(filter_key, np.full_like(y, np.nan) if name == "free ensemble" else y)
        except FloatingPointError:
            lost += 1
            continue
        x, truth = run.result.posterior["x"][0, :, spin_up:], states[spin_up:]
        smooth = float(np.mean(ndda.diagnostics.roughness(truth, axis=-1)))
        scores.append(
            {
                "RMSE": ndda.diagnostics.rmse(x, truth),
                "spread/skill": ndda.diagnostics.spread_skill(x, truth),
                "CRPS": ndda.diagnostics.crps(x, truth),
                "roughness": float(np.mean(ndda.diagnostics.roughness(x, axis=-1))) / smooth,
                "glued": float(np.mean(ndda.diagnostics.roughness(glued(run.result, spin_up), axis=-1))) / smooth,
                "tempering": float(np.median(run.result.sample_stats["tempering"])),
                "passes": float(sum(v.mean() for v in run.result.network_passes.values())),
            }
        )
    row: dict[str, Any] = {"case": case, "d": sites, "filter": name, "lost": lost}
    row |= {"radius": None, "amount": None, "factor": None} if setting is None else setting._asdict()
    for key in ("RMSE", "spread/skill", "CRPS", "roughness", "glued", "tempering", "passes"):
        values = np.array([score[key] for score in scores])
        row[key] = float(values.mean()) if len(values) else None
        row[f"{key} SE"] = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return row


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for name in (
        "case",
        "d",
        "filter",
        "radius",
        "ESS/infl.",
        "factor",
        "RMSE",
        "spread/skill",
        "CRPS",
        "roughness",
        "glued",
        "passes",
        "lost",
    ):
        table.add_column(name, no_wrap=True)
    for row in rows:

        def cell(key: str, digits: int, row: dict[str, Any] = row) -> str:
            value, se = row[key], row[f"{key} SE"]
            if value is None:
                return "-"
            return f"{value:.{digits}f}" + (f" ± {se:.{digits}f}" if se is not None else "")

        amounts = ["-" if row[key] is None else f"{row[key]:g}" for key in ("radius", "amount", "factor")]
        scores = [cell("RMSE", 3), cell("spread/skill", 3), cell("CRPS", 4)]
        scores += [cell("roughness", 3), cell("glued", 3)]
        table.add_row(
            row["case"], str(row["d"]), row["filter"], *amounts, *scores, f"{row['passes'] or 0:.0f}", str(row["lost"])
        )
    console.print(table)


def main(
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be repeated.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this filter; may be repeated.")] = None,
    emulator: Annotated[bool, typer.Option(help="The learned transition, not the true one.")] = False,
    sites: Annotated[int, typer.Option(min=21, help="Sites of the ring.")] = 40,
    truths: Annotated[int, typer.Option(min=1, help="Truths.")] = 10,
    particles: Annotated[int, typer.Option(min=2, help="Particles of each filter.")] = 256,
    cycles: Annotated[int, typer.Option(min=2, help="Cycles of each truth.")] = 120,
    spin_up: Annotated[int, typer.Option(min=0, help="Cycles that are not scored.")] = 30,
    tune: Annotated[bool, typer.Option(help="The grid of settings, on other truths, instead of the table.")] = False,
    seed: Annotated[int, typer.Option(help="Of the truths reported.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the table to this JSON file.")] = None,
) -> None:
    """Localized ancestors against global ones and a localized ensemble Kalman filter."""
    console = Console(width=150)
    names = [*TUNED, *CONTROLS]
    for given, known, what in ((case, list(CASES), "case"), (only, names, "filter")):
        if unknown := sorted(set(given or ()) - set(known)):
            raise typer.BadParameter(f"no {what} called {', '.join(unknown)}; there are {', '.join(known)}.")
    if not spin_up < cycles:
        raise typer.BadParameter(f"spin-up of {spin_up} of {cycles} cycles leaves none to score.")
    work: list[tuple[str, str, Setting | None]] = []
    for kind in case or CASES:
        for name in names:
            if only and name not in only:
                continue
            settings: list[Setting | None] = [TUNED[name][kind]] if name in TUNED else [None]
            if tune:
                settings = [*GRID.get(name, [])]
            work += [(kind, name, setting) for setting in settings]
    sizes = {"truths": truths, "particles": particles, "cycles": cycles, "spin_up": spin_up}
    rows = []
    for kind, name, setting in track(work, "filtering", console=console, transient=True):
        rows.append(row_of(name, setting, kind, sites, emulator, seed=TUNING_SEED if tune else seed, **sizes))
        if out is not None:
            settings_of_run = {**sizes, "emulator": emulator, "sites": sites, "tune": tune, "seed": seed}
            found = {"version": ndda.__version__, "settings": settings_of_run, "rows": rows}
            out.write_text(json.dumps(found, indent=1) + "\n")
    transition = "the emulator's transition" if emulator else "the true transition"
    show(console, f"Lorenz-96, {transition}, N = {particles}, {truths} truths of {cycles} cycles", rows)


if __name__ == "__main__":
    typer.run(main)
