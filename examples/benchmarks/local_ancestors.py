"""What do localized resampling and moved ancestors gain? Lorenz-96 with linear and nonlinear observations.

The system is stochastic Lorenz-96 (F = 8, step 0.1, noise variance 0.5) on a ring of sites. The cases are:

- linear: every second site, error variance 0.1;
- modulus: |x| of every site, error variance 0.1;
- square: x^2 / 8 of every site, error variance 0.1;
- arctan: 3 arctan(x / 2) of every second site, error variance 0.05.

The filters are local FA-APF with moved ancestors ("moved", one setting for all cases) and without ("local", with Moment
and with Dirac weights), the published FA-APF, which resamples whole particles, and controls: the free ensemble, a
bootstrap filter, guided particles with equal weights, and localized ensemble Kalman filters, which sample the
covariance V of the transition ("EnKF") or compute it ("EnKF with V"). All have the same transition, either the true one
or that of the emulator. No setting was chosen on the truths reported; `--tune` prints scores of a grid of settings on
other truths. Seams between blocks increase the roughness of particles. The table has this roughness relative to that of
the truth, after the transition ("roughness") and for the states glued together from several ancestors before it
("glued").

    python examples/benchmarks/local_ancestors.py --case linear --case modulus --out local.json
    python examples/benchmarks/local_ancestors.py --emulator --truths 3
"""

from __future__ import annotations

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
from report import json_file, mean_and_error, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_system as lorenz96

TUNING_SEED = 1


class Case(NamedTuple):
    """Observation of the state: function h, error variance, and spacing of the observed sites."""

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
    """Settings of a localized filter.

    Attributes:
        radius: half-width of the taper in sites.
        amount: target ESS of the particle filter, or factor on the forecast of the Kalman filter.
        factor: factor of the inflation of the particle filter (`Multiplicative`); not used by the Kalman filter.
        wide: half-width of the taper by which observations move ancestors, in sites; None where none move.
    """

    radius: float
    amount: float
    factor: float = 1.0
    wide: float | None = None


# Lowest CRPS of `GRID` on two truths of `TUNING_SEED` with d = 40 and the true transition (four truths for arctan with
# Moment weights). Only arctan used the whole grid; other cases had no target ESS of 0.05, radius of 4, or inflation.
# "moved" has the default target ESS, no inflation, and the radius of selection alone.
TUNED: dict[str, dict[str, Setting]] = {
    "moved": dict.fromkeys(CASES, Setting(5.0, 0.5, 1.0, 5.0)),
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
    "EnKF with V": {
        "linear": Setting(9.0, 1.0), "modulus": Setting(6.0, 1.0), "square": Setting(9.0, 1.0),
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
    "EnKF with V": [Setting(r, i) for r in (4.0, 6.0, 9.0) for i in (1.0, 1.02)] + [Setting(9.0, 1.05)],
    "moved": [Setting(5.0, e, 1.0, w) for e in (0.2, 0.5) for w in (5.0, 6.0, 9.0)],
}
CONTROLS = ("free ensemble", "bootstrap", "equal weights", "global, Dirac")
# Draws of the emulator: fewer passes than with the default, and less error on rings (docs/method.md, ring-64).
SAMPLER = ndda.Sampler(ndda.DPMSolverPP2M(), ndda.KarrasSchedule(13, rho=20.0, lowest=0.04))
GUIDANCE = ndda.diffusion.Piecewise(tuple(ndda.MMPS(ndda.diffusion.KrylovSolve(k)) for k in (1, 2, 1)), (40.0, 0.2))


def program(case: Case, sites: int, emulator: bool) -> Callable[[jax.Array], None]:
    """State-space model of a case, with the true transition or that of the emulator."""
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
    """Draw states and observations, after 50 steps of spin-up."""
    start_key, run_key, error_key = jax.random.split(key, 3)
    climate = ndda.load_prior("lorenz96", num_sites=sites).climatology()
    states = lorenz96.trajectory(run_key, climate.sample(start_key), 50 + cycles)[50:]
    seen = case.h(states[:, :: case.every])
    return np.asarray(states), np.asarray(seen + case.error_variance**0.5 * jax.random.normal(error_key, seen.shape))


def make(
    name: str, setting: Setting | None, model: Any, case: Case, sites: int, emulator: bool
) -> ndda.filters.FilterAlgorithm:
    """Filter of the given name."""
    taper = None
    if setting is not None:
        at = np.arange(0, sites, case.every)
        taper = ndda.Taper(setting.radius, ndda.Ring(sites), {"y": at}, state=np.arange(sites))
    # Errors of the emulator are nearly independent between sites, so one product with random signs gives variances.
    moment = ndda.Moment(noise_level=10.0, probes=1) if emulator else ndda.Moment()
    if name in ("EnKF", "EnKF with V"):
        inflations = (ndda.ForecastMultiplicative(setting.amount),)
        return ndda.EnKF(model, taper=taper, inflation=inflations, transition_covariance=name == "EnKF with V")
    if name in ("free ensemble", "bootstrap"):
        return ndda.Bootstrap(model)
    if name == "equal weights":
        return ndda.FAAPF(model, weight=ndda.Equal(), guidance=GUIDANCE)
    if name == "global, Dirac":
        return ndda.FAAPF(model, weight=ndda.Dirac(), guidance=GUIDANCE)
    weight = ndda.Dirac() if name == "local, Dirac" else moment
    inflation = () if setting.factor == 1.0 else (ndda.Multiplicative(setting.factor),)
    move = None if setting.wide is None else ndda.KalmanMove(radius=setting.wide)
    return ndda.FAAPF(
        model, weight=weight, taper=taper, target_ess=setting.amount, guidance=GUIDANCE, inflation=inflation,
        move=False if move is None else move,
    )  # fmt: skip


def glued(result: ndda.FilterResult, spin_up: int) -> np.ndarray:
    """States that the draws were conditioned on, with their seams, shape (particles, time - 1, sites)."""
    x = result.posterior["x"][0, :, spin_up:-1]
    if not result.is_local:
        return x
    # Each site is a block, and blocks have the order of the sites.
    return np.take_along_axis(x, result.sample_stats["ancestors"][0, :, spin_up + 1 :], axis=0)


def row_of(
    name: str, setting: Setting | None, case: str, sites: int, emulator: bool, *,
    seed: int, truths: int, particles: int, cycles: int, spin_up: int, figure: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Row of the table: means over truths with standard errors. A figure is of the last truth with moved ancestors."""
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
                "lambda": float(np.mean(run.result.sample_stats.get("selection_share", np.nan))),
                "passes": run.result.mean_passes().network,
                "cond.": run.result.mean_passes().conditioning,
            }
        )
    if figure is not None and "selection_share" in run.result.sample_stats:
        title = f"{case} observations, {particles} particles"
        ndda.diagnostics.non_gaussianity_figure(run.result, title).savefig(figure, dpi=110)
    row: dict[str, Any] = {"case": case, "d": sites, "filter": name, "lost": lost}
    row |= dict.fromkeys(Setting._fields) if setting is None else setting._asdict()
    for key in ("RMSE", "spread/skill", "CRPS", "roughness", "glued", "tempering", "lambda", "passes", "cond."):
        row |= mean_and_error(key, [score[key] for score in scores])
    return row


COLUMNS = {
    "case": "", "d": "", "filter": "", "radius": "g", "ESS or factor": "g", "factor": "g", "wide": "g", "RMSE": ".3f",
    "spread/skill": ".3f", "CRPS": ".4f", "roughness": ".3f", "glued": ".3f", "lambda": ".2f", "passes": ".0f",
    "cond.": ".1f", "lost": "",
}  # fmt: skip


def main(
    case: Annotated[list[str] | None, typer.Option(help="Case to run; may be repeated; all by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Filter to run; may be repeated; all by default.")] = None,
    emulator: Annotated[bool, typer.Option(help="Use the transition of the emulator instead of the true one.")] = False,
    sites: Annotated[int, typer.Option(min=21, help="Number of sites.")] = 40,
    truths: Annotated[int, typer.Option(min=1, help="Number of truths.")] = 10,
    particles: Annotated[int, typer.Option(min=2, help="Particles of each filter.")] = 256,
    cycles: Annotated[int, typer.Option(min=2, help="Filter steps on each truth.")] = 120,
    spin_up: Annotated[int, typer.Option(min=0, help="Filter steps at the start that are not scored.")] = 30,
    tune: Annotated[bool, typer.Option(help="Run the grid of settings on the tuning truths instead.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the truths reported.")] = 0,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="PNG file for a figure of where the last ensemble that moves is not Gaussian.")
    ] = None,
) -> None:
    """Print scores of filters with and without localized resampling, and of a localized ensemble Kalman filter."""
    console = Console(width=150)
    names = [*TUNED, *CONTROLS]
    for given, known, what in ((case, list(CASES), "case"), (only, names, "filter")):
        if unknown := sorted(set(given or ()) - set(known)):
            raise typer.BadParameter(f"no {what} called {', '.join(unknown)}; give one of {', '.join(known)}.")
    if not spin_up < cycles:
        raise typer.BadParameter(f"a spin-up of {spin_up} of {cycles} cycles leaves none to score; give fewer.")
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
        given = TUNING_SEED if tune else seed
        rows.append(row_of(name, setting, kind, sites, emulator, seed=given, figure=figure, **sizes))
        # Write after every row, so that an interrupted run keeps what it has.
        write_json(out, {**sizes, "emulator": emulator, "sites": sites, "tune": tune, "seed": seed}, rows=rows)
    transition = "transition of the emulator" if emulator else "true transition"
    title = f"Lorenz-96, {transition}, N = {particles}, {truths} truths of {cycles} cycles; mean ± standard error"
    shown = [{**row, "ESS or factor": row["amount"]} for row in rows]
    print_table(console, title, shown, COLUMNS, group="case", without_error=["passes", "cond."])


if __name__ == "__main__":
    typer.run(main)
