"""Is an ensemble Kalman filter as fast as DAPPER's, and as accurate? Lorenz-96 with 40 sites, all observed.

The setting is that of Sakov & Oke (2008) as DAPPER has it: time step 0.05 between observations with error variance 1,
no model noise. Both filters get the same observations and the same update, inflate the analysis by the same factor, and
draw their members from the same distribution. A localized filter is DAPPER's LETKF and the square root with a taper of
the same width here; DAPPER updates two neighboring sites at a time.

"first" is a first run, with tracing and compiling; "s" is the median of later ones, in turns in one process. A run of
this library checks the program, and its result holds all members at all times. DAPPER computes scores of the ensemble
at each time and keeps these; "errors only" is DAPPER with all scores but the error switched off. RMSE is that of the
analysis mean, averaged over the times after the burn-in and over all runs. DAPPER computes in double precision, and so
does this library with `--double`.

    python examples/benchmarks/throughput_enkf.py --out throughput_enkf.json

Needs DAPPER: pip install dapper
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from jaxtyping import Array
from numpyro.contrib.control_flow import scan
from published_settings import SETTINGS
from report import json_file, print_table, write_json
from rich.console import Console
from timing import in_turns, require_peer

import numpyro_diffusion_da as ndda

SETTING = SETTINGS["Lorenz96/sakov2008"]
UPDATES: dict[str, ndda.smc.EnsembleUpdate] = {
    "perturbed": ndda.smc.PerturbedObservations(),
    "square root": ndda.smc.SquareRoot(),
}
RADIUS = 4.0
"""Width of the localization in DAPPER's sense, in sites: its taper is exp(-1/2) there."""


class Case(NamedTuple):
    """Filter to run.

    Attributes:
        update: "perturbed" or "square root".
        members: number of members.
        localized: whether it has a taper.
        inflation: factor on the anomalies of the analysis.
    """

    update: str
    members: int
    localized: bool
    inflation: float


INFLATIONS = {
    "perturbed": {20: 1.25, 100: 1.02, 1000: 1.0},
    "square root": {20: 1.1, 100: 1.02, 1000: 1.0},
}
"""Inflation by update and number of members; 1.02 for other numbers.

That of 20 perturbed members was chosen with this library alone, on the truth that is scored.
"""


def program(y: Array) -> None:
    """State-space model without model noise."""

    def step(x: Array, y_t: Array) -> tuple[Array, None]:
        x = numpyro.sample("x", dist.Delta(SETTING.flow(x), event_dim=1))
        numpyro.sample("y", dist.Normal(x, math.sqrt(SETTING.error_variance)).to_event(1), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", SETTING.initial()), y)


def cases(members: list[int], updates: list[str]) -> Iterator[Case]:
    """Cases of the table: each update, and the square root localized where there are fewer members than sites."""
    for update in updates:
        for n in members:
            yield Case(update, n, False, INFLATIONS[update].get(n, 1.02))
    if "square root" in updates:
        yield from (Case("square root", n, True, 1.02) for n in members if n < len(SETTING.start))


def of_this_library(case: Case, states: np.ndarray, y: np.ndarray, burn_in: int) -> Callable[[int], float]:
    """Whole run of `Filter` for a seed, which returns its RMSE."""
    taper = None
    if case.localized:
        # At DAPPER's radius the taper of Gaspari & Cohn is exp(-1/2), to second order in the distance.
        sites = np.arange(states.shape[1])
        taper = ndda.Taper(RADIUS * math.sqrt(10.0 / 3.0), ndda.Ring(len(sites)), {"y": sites}, state=sites)
    algorithm = ndda.EnKF(
        program,
        inflation=(ndda.Multiplicative(case.inflation),),
        update=UPDATES[case.update],
        taper=taper,
    )
    run = ndda.Filter(algorithm, num_particles=case.members, progress_bar=False, keep_observed=False)

    def filtered(seed: int) -> float:
        run.run(jax.random.key(seed), y)
        return rmse(run.result.posterior["x"][0].mean(0), states, burn_in)

    return filtered


def of_dapper(case: Case, states: np.ndarray, y: np.ndarray, burn_in: int, errors_only: bool) -> Callable[[int], float]:
    """Whole run of a filter of DAPPER for a seed, which returns its RMSE."""
    import dapper
    from dapper.da_methods import LETKF, EnKF
    from dapper.mods.Lorenz96.sakov2008 import HMM
    from dapper.tools import progressbar

    progressbar.disable_progbar = True
    model = HMM.copy()
    model.tseq.BurnIn = 0.0
    model.tseq.K = len(y)
    if case.localized:
        method = LETKF(N=case.members, loc_rad=RADIUS, infl=case.inflation)
    else:
        kind = {"perturbed": "PertObs", "square root": "Sqrt"}[case.update]
        method = EnKF(kind, N=case.members, infl=case.inflation)
    # DAPPER's truth starts at time 0, which has no observation; the error there is not used.
    truth = np.concatenate([states[:1], states])

    def filtered(seed: int) -> float:
        dapper.set_seed(seed + 1)
        dapper.rc.comps["error_only"] = errors_only
        method.assimilate(model, truth, y)
        return float(np.mean(method.stats.err.rms.a[burn_in:]))

    return filtered


def rmse(mean: np.ndarray, states: np.ndarray, burn_in: int) -> float:
    """Root mean square error over sites of a mean, averaged over the times after the burn-in."""
    return float(np.mean(np.sqrt(np.mean((mean - states)[burn_in:] ** 2, axis=-1))))


def row_of(case: Case, cycles: int, burn_in: int, repeats: int) -> dict[str, Any]:
    """Row of the table."""
    states, y = (np.asarray(x, float) for x in SETTING.truth(jax.random.key(1), cycles))
    runs = {
        "ours": of_this_library(case, states, y, burn_in),
        "DAPPER": of_dapper(case, states, y, burn_in, errors_only=False),
        "DAPPER, errors only": of_dapper(case, states, y, burn_in, errors_only=True),
    }
    found = in_turns(runs, repeats)
    ours, theirs, least = found.values()
    return {
        "update": case.update + (", localized" if case.localized else ""),
        "N": case.members,
        "inflation": case.inflation,
        "first, s": ours.first,
        "this library, s": ours.median,
        "DAPPER, s": theirs.median,
        "errors only, s": least.median,
        "over DAPPER": ours.median / theirs.median,
        "over errors only": ours.median / least.median,
        "RMSE": float(np.mean(ours.results)),
        "DAPPER's RMSE": float(np.mean(theirs.results + least.results)),
    }


def main(
    members: Annotated[list[int] | None, typer.Option(min=2, help="Members; may be repeated [20, 100, 1000].")] = None,
    updates: Annotated[list[str] | None, typer.Option(help="Update to run; may be repeated; all by default.")] = None,
    cycles: Annotated[int, typer.Option(min=2, help="Observation times.")] = 300,
    burn_in: Annotated[int, typer.Option(min=0, help="Times at the start that are not scored.")] = 100,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each filter after the first, in turns.")] = 3,
    double: Annotated[bool, typer.Option(help="Compute in double precision, as DAPPER does.")] = False,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print seconds of whole runs and errors of their means, beside DAPPER."""
    require_peer("dapper", "dapper")
    if unknown := sorted(set(updates or ()) - set(UPDATES)):
        raise typer.BadParameter(f"no update called {', '.join(unknown)}; give one of {', '.join(UPDATES)}.")
    if burn_in >= cycles:
        raise typer.BadParameter(f"the burn-in leaves none of {cycles} times to score; give more cycles.")
    with jax.enable_x64(double):
        rows = [
            row_of(case, cycles, burn_in, repeats)
            for case in cases(members or [20, 100, 1000], updates or list(UPDATES))
        ]
    title = f"{cycles} observation times, medians of {repeats} runs, {'double' if double else 'single'} precision here"
    print_table(Console(), title, rows, group="update")
    write_json(out, {"cycles": cycles, "burn_in": burn_in, "repeats": repeats, "double": double}, rows=rows)


if __name__ == "__main__":
    typer.run(main)
