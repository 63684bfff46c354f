"""How close are filters to the Kalman filter in a linear-Gaussian state-space model?

The model is x' = A x + N(0, Q), where A is 0.95 times a random rotation and Q_ij = qs^2 exp(-|i - j| / 3). Every second
component is observed with error rs. With `--ring`, components are places on a ring, A moves values to the next place
(times 0.95), and |i - j| is the distance along the ring. Distant places then stay nearly independent, as localization
assumes; a random rotation mixes all components. The table has means over seeds with standard errors (each seed has its
own rotation, truth and observations):

- RMSE / Kalman's: RMSE of the particle mean, divided by the RMSE of the Kalman filter's mean;
- mean error: RMS over steps and components of (particle mean - Kalman mean) / Kalman standard deviation;
- variance ratio: mean over steps and components of particle variance / Kalman variance;
- log evidence: log-evidence of the filter minus that of the Kalman filter, over all steps. With tempering it is not an
  estimate of the evidence. Equal weights, localized resampling, moves and ensemble Kalman filters give none.

The first steps are left out of all scores except the log evidence: filters start from the stationary distribution,
which is much wider than their later ensembles, so that these steps would dominate.

    python examples/benchmarks/linear_gaussian.py --out linear_gaussian.json              # transitions in closed form
    python examples/benchmarks/linear_gaussian.py --diffusion --dims 20                   # transitions by diffusion
    python examples/benchmarks/linear_gaussian.py --ring --dims 400 --seeds 2             # distant places independent
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
import scipy.linalg
import typer
from numpyro.contrib.control_flow import scan
from report import json_file, mean_and_error, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda


class Setting(NamedTuple):
    """Setting of the model: dimension, standard deviation of the transition, error of the observations, ring or not."""

    d: int
    qs: float
    rs: float
    ring: bool = False

    @property
    def covariance(self) -> np.ndarray:
        """Covariance Q of the transition."""
        i = np.arange(self.d)
        apart = np.abs(i[:, None] - i[None])
        return self.qs**2 * np.exp(-(np.minimum(apart, self.d - apart) if self.ring else apart) / 3)

    def transition(self, rng: np.random.Generator) -> np.ndarray:
        """Matrix A of the transition."""
        if self.ring:
            return 0.95 * np.roll(np.eye(self.d), 1, axis=0)
        return 0.95 * np.linalg.qr(rng.normal(size=(self.d, self.d)))[0]

    def taper(self, radius: float) -> ndda.Taper:
        """Taper with a half-width of `radius` components."""
        return ndda.Taper(radius, ndda.Ring(self.d), {"y": np.arange(0, self.d, 2)}, state=np.arange(self.d))


SIZES = ((4, 0.5, 0.5), (20, 0.5, 0.5), (20, 0.5, 0.2), (100, 0.5, 0.5), (400, 0.5, 0.5))
# Filters without localization.
FILTERS: dict[str, Callable[[Any], ndda.filters.FilterAlgorithm]] = {
    "bootstrap": ndda.Bootstrap,
    "exact weights": lambda model: ndda.FAAPF(model, weight=ndda.Moment(), target_ess=0.0),
    "Dirac": lambda model: ndda.FAAPF(model, weight=ndda.Dirac(), target_ess=0.0),
    "Dirac + tempering": lambda model: ndda.FAAPF(model, weight=ndda.Dirac()),
    "exact weights + tempering": lambda model: ndda.FAAPF(model, weight=ndda.Moment()),
    "exact weights + observation tempering": lambda model: ndda.FAAPF(
        model, weight=ndda.Moment(), tempering=ndda.smc.LikelihoodTempering()
    ),
    "equal weights": lambda model: ndda.FAAPF(model, weight=ndda.Equal()),
    "moved ancestors": lambda model: ndda.FAAPF(model, weight=ndda.Moment(), move=True),
    "ensemble Kalman": ndda.EnKF,
    "ensemble Kalman with V": lambda model: ndda.EnKF(model, transition_covariance=True),
    "ensemble Kalman, square root": lambda model: ndda.EnKF(model, update=ndda.smc.SquareRoot()),
}
# Radii were chosen among 1.5, 3 and 6 on two seeds (1000, 1001) with d = 100 on the ring. With moved ancestors,
# observations select within the radius of the particle filter, and move within that of the Kalman filter.
LOCALISED: dict[str, Callable[[Any, Setting], ndda.filters.FilterAlgorithm]] = {
    "localized, exact weights": lambda model, s: ndda.FAAPF(
        model, weight=ndda.Moment(), taper=s.taper(3.0), move=False
    ),
    "localized, moved ancestors": lambda model, s: ndda.FAAPF(
        model, weight=ndda.Moment(), taper=s.taper(3.0), move=ndda.KalmanMove(radius=6.0)
    ),
    "localized ensemble Kalman": lambda model, s: ndda.EnKF(model, taper=s.taper(6.0)),
    "localized ensemble Kalman with V": lambda model, s: ndda.EnKF(
        model, taper=s.taper(6.0), transition_covariance=True
    ),
}
WITHOUT_EVIDENCE = ("equal weights", "moved ancestors", *[name for name in FILTERS if "Kalman" in name], *LOCALISED)


class Twin(NamedTuple):
    """One experiment: arguments of the program, results of the Kalman filter, and the truth."""

    y: np.ndarray
    transition: np.ndarray
    initial_factor: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    log_evidence: float
    truth: np.ndarray


def experiment(setting: Setting, seed: int, steps: int) -> Twin:
    """Simulate a truth from the stationary distribution and its observations, and run the Kalman filter."""
    rng = np.random.default_rng(seed)
    d, q, r = setting.d, setting.covariance, setting.rs**2
    a = setting.transition(rng)
    h = np.eye(d)[::2]
    initial_factor = np.linalg.cholesky(scipy.linalg.solve_discrete_lyapunov(a, q))
    root = np.linalg.cholesky(q)
    x = initial_factor @ rng.normal(size=d)
    mean, covariance, log_evidence = np.zeros(d), initial_factor @ initial_factor.T, 0.0
    ys, means, variances, states = [], [], [], []
    for _ in range(steps):
        x = a @ x + root @ rng.normal(size=d)
        y = h @ x + setting.rs * rng.normal(size=len(h))
        mean, covariance = a @ mean, a @ covariance @ a.T + q
        predicted = h @ covariance @ h.T + r * np.eye(len(h))
        innovation = y - h @ mean
        gain = np.linalg.solve(predicted, h @ covariance).T
        log_evidence -= 0.5 * (innovation @ np.linalg.solve(predicted, innovation))
        log_evidence -= 0.5 * np.linalg.slogdet(2 * np.pi * predicted)[1]
        mean, covariance = mean + gain @ innovation, covariance - gain @ h @ covariance
        states.append(x)
        ys.append(y)
        means.append(mean)
        variances.append(np.diagonal(covariance))
    found = (np.array(v) for v in (means, variances))
    return Twin(np.array(ys), a, initial_factor, *found, float(log_evidence), np.array(states))


def program(setting: Setting, diffusion: bool) -> Callable[..., None]:
    """State-space model with a transition in closed form or by diffusion; the matrix A is an argument."""
    if diffusion:
        # The prior has only Q, and the program applies A, so that a new rotation does not compile again.
        prior = ndda.GaussianPrior(np.eye(setting.d), setting.covariance)

        def transition(mean: jax.Array) -> dist.Distribution:
            return ndda.DiffusionTransition(prior, mean)
    else:
        factor = jnp.asarray(np.linalg.cholesky(setting.covariance))

        def transition(mean: jax.Array) -> dist.Distribution:
            return dist.MultivariateNormal(mean, scale_tril=factor)

    def model(y: jax.Array, a: jax.Array, initial_factor: jax.Array) -> None:
        x0 = numpyro.sample("x0", dist.MultivariateNormal(jnp.zeros(setting.d), scale_tril=initial_factor))

        def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            x = numpyro.sample("x", transition(a @ x))
            numpyro.sample("y", dist.Normal(x[::2], setting.rs).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    return model


def run(
    setting: Setting,
    name: str,
    *,
    diffusion: bool,
    seeds: int,
    steps: int,
    spin_up: int,
    particles: int,
    first_seed: int = 0,
) -> dict[str, Any]:
    """Row of the table for one filter, means over seeds."""
    model = program(setting, diffusion)
    algorithm = FILTERS[name](model) if name in FILTERS else LOCALISED[name](model, setting)
    filter_ = ndda.Filter(algorithm, num_particles=particles, progress_bar=False)
    scores = []
    for seed in range(first_seed, first_seed + seeds):
        twin = experiment(setting, seed, steps)
        filter_.run(jax.random.key(seed), *map(jnp.asarray, twin[:3]))
        result = filter_.result
        x, stats = result.posterior["x"][0], result.sample_stats
        passes = result.mean_passes().network
        mean_error = np.sqrt(np.mean(((x.mean(0) - twin.mean) ** 2 / twin.variance)[spin_up:]))
        variance_ratio = np.mean((x.var(0, ddof=1) / twin.variance)[spin_up:])
        evidence = stats["log_evidence_increment"].sum() - twin.log_evidence
        squares = [np.mean((mean - twin.truth)[spin_up:] ** 2) for mean in (x.mean(0), twin.mean)]
        ratio = np.sqrt(squares[0] / squares[1])
        scores.append([ratio, mean_error, variance_ratio, evidence, stats["tempering"].mean(), passes])
    table = np.array(scores)
    mean = table.mean(0)
    row: dict[str, Any] = {**setting._asdict(), "filter": name}
    for i, column in enumerate(("RMSE / Kalman's", "mean error", "variance ratio", "log evidence")):
        known = column != "log evidence" or name not in WITHOUT_EVIDENCE
        row |= mean_and_error(column, table[:, i] if known else [])
    row["tempering"], row["passes"] = float(mean[4]), float(mean[5])
    return row


COLUMNS = {
    "d, qs, rs": "", "filter": "", "RMSE / Kalman's": ".3f", "mean error": ".2f", "variance ratio": ".2f",
    "log evidence": ".1f", "tempering": ".2f", "passes": ".0f",
}  # fmt: skip


def main(
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
    dims: Annotated[
        list[int] | None,
        typer.Option(help="Dimension of the state; may be repeated; by default 4, 20 and 100, not 400."),
    ] = None,
    filters: Annotated[list[str] | None, typer.Option(help="Filter to run; may be repeated; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds for each setting.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Steps of each experiment.", min=1)] = 40,
    spin_up: Annotated[
        int | None, typer.Option(help="Steps at the start that are not scored; by default a quarter.", min=0)
    ] = None,
    particles: Annotated[int, typer.Option(help="Particles of each filter.", min=2)] = 256,
    diffusion: Annotated[bool, typer.Option(help="Transition by diffusion instead of in closed form.")] = False,
    ring: Annotated[bool, typer.Option(help="Shift along a ring instead of a random rotation.")] = False,
    first_seed: Annotated[int, typer.Option(help="First seed.", min=0)] = 0,
) -> None:
    """Print mean error, variance and evidence of filters, compared with the Kalman filter."""
    settings = [Setting(*size, ring) for size in SIZES if size[0] in (dims or (4, 20, 100))]
    known = (*FILTERS, *LOCALISED)
    names = list(filters or known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise typer.BadParameter(f"no filter called {', '.join(unknown)}; give one of {', '.join(known)}.")
    spin_up = steps // 4 if spin_up is None else spin_up
    if spin_up >= steps:
        raise typer.BadParameter(f"a spin-up of {spin_up} steps leaves none of {steps} to score; give fewer.")
    if not settings:
        raise typer.BadParameter(f"no setting of dimension {dims}; give one of {sorted({size[0] for size in SIZES})}.")
    console = Console(width=120)
    arguments = {"diffusion": diffusion, "seeds": seeds, "steps": steps, "spin_up": spin_up, "particles": particles}
    arguments["first_seed"] = first_seed
    work = [(setting, name) for setting in settings for name in names]
    rows = [
        run(setting, name, **arguments) for setting, name in track(work, "filtering", console=console, transient=True)
    ]
    kind = "diffusion" if diffusion else "closed form"
    title = f"{kind}, N = {particles}, {steps} steps, {seeds} seeds; mean ± standard error over seeds"
    shown = [{**row, "d, qs, rs": f"{row['d']}, {row['qs']:g}, {row['rs']:g}"} for row in rows]
    print_table(console, title, shown, COLUMNS, group="d, qs, rs")
    write_json(out, arguments, rows=rows)


if __name__ == "__main__":
    typer.run(main)
