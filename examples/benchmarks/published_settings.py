"""Do the filters reach the scores that are published for them? Lorenz-63 and Lorenz-96 in DAPPER's settings.

DAPPER (Raanes et al. 2024, github.com/nansencenter/DAPPER) lists, with each of its settings, the time-mean error of the
analysis mean that its own filters reach. This script has five of these settings (Sakov et al. 2012, Sakov & Oke 2008,
Bocquet et al. 2010, de Wiljes et al. 2018, Spantini et al. 2022) as NumPyro programs, with the same equations,
Runge-Kutta step, observations, length, burn-in and score.

The dynamics have no noise. An ensemble Kalman filter uses them without change. DAPPER inflates and rotates the ensemble
after the update; this library inflates it before the update and does not rotate. The script runs both ways. A particle
filter with deterministic dynamics would end with copies of one particle. DAPPER adds jitter with the covariance of the
ensemble to copies. The programs here have model noise instead, N(M(x), s^2 (F F^T + 0.01 I)), where F is the derivative
of the flow M at x, as if each particle got jitter of size s before it moved. The size s was chosen on other truths than
those reported; `--tune` prints the table of that choice. The bootstrap filter also runs with DAPPER's jitter.

"FAAPF" has no tempering. "FAAPF moved" has the defaults of a filter that moves its ancestors. "perturbed V" is an
ensemble Kalman filter that computes the covariance of this model noise and does not sample it.

    python examples/benchmarks/published_settings.py --out published_settings.json
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro.contrib.control_flow import scan
from report import json_file, mean_and_error, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.program import TimeInputs
from numpyro_diffusion_da.smc import Info, Kernel, PlacedTaper, State, init, particle_keys

TUNING_SEED = 1
NO_NOISE = 1e-6
"""Standard deviation of the transition for ensemble Kalman filters, near the last digit in single precision."""

FLOOR = 0.1
"""Ratio of model noise after the flow to that before it, to give the covariance full rank."""


def lorenz63(x: Float[Array, " 3"]) -> Float[Array, " 3"]:
    """Time derivative dx/dt of Lorenz (1963), sigma = 10, rho = 28, beta = 8/3."""
    return jnp.stack([10.0 * (x[1] - x[0]), x[0] * (28.0 - x[2]) - x[1], x[0] * x[1] - 8.0 / 3.0 * x[2]])


def lorenz96(x: Float[Array, " d"]) -> Float[Array, " d"]:
    """Time derivative dx/dt of Lorenz (1996), F = 8."""
    return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + 8.0


class Setting(NamedTuple):
    """One of DAPPER's settings.

    Attributes:
        tendency: time derivative dx/dt.
        time_step: time step of the fourth-order Runge-Kutta scheme.
        steps: number of time steps between observations.
        start: mean of the initial state.
        start_variance: variance of each component of the initial state.
        every: spacing of the observed components.
        error_variance: error variance of the observations.
        cycles: number of observation times; the initial state is not observed.
        burn_in: number of cycles at the start that are not scored.
        noise_steps: number of longer time steps between observations, of the same scheme, for the derivative of the
            flow in the model noise; None for `steps`.
    """

    tendency: Callable[[Array], Array]
    time_step: float
    steps: int
    start: tuple[float, ...]
    start_variance: float
    every: int
    error_variance: float
    cycles: int
    burn_in: int
    noise_steps: int | None = None

    def flow(self, x: Float[Array, " d"], steps: int | None = None) -> Float[Array, " d"]:
        """State at the next observation time; `steps` replaces the number of time steps."""
        steps = self.steps if steps is None else steps
        h, f = self.time_step * self.steps / steps, self.tendency

        def runge_kutta(_: int, x: Array) -> Array:
            k1 = f(x)
            k2 = f(x + 0.5 * h * k1)
            k3 = f(x + 0.5 * h * k2)
            k4 = f(x + h * k3)
            return x + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)

        return jax.lax.fori_loop(0, steps, runge_kutta, x)

    def initial(self) -> dist.Distribution:
        """Distribution of the initial state of the truth and of each particle."""
        return dist.Normal(jnp.array(self.start), math.sqrt(self.start_variance)).to_event(1)

    def transition(self, x: Float[Array, " d"], noise: ArrayLike | None) -> dist.Distribution:
        """Transition with model noise of size `noise` as in the module docstring; negligible noise if it is None."""
        if noise is None:
            return dist.Normal(self.flow(x), NO_NOISE).to_event(1)
        derivative = jax.jacfwd(self.flow)(x, self.noise_steps)
        spread = derivative @ derivative.T + FLOOR**2 * jnp.eye(len(x))
        return dist.MultivariateNormal(self.flow(x), scale_tril=noise * jnp.linalg.cholesky(spread))

    def program(self, noise: ArrayLike | None) -> Callable[[Array], None]:
        """State-space model with model noise of size `noise`, or none."""

        def model(y: Array) -> None:
            x0 = numpyro.sample("x0", self.initial())

            def step(x: Array, y_t: Array) -> tuple[Array, None]:
                x = numpyro.sample("x", self.transition(x, noise))
                error = math.sqrt(self.error_variance)
                numpyro.sample("y", dist.Normal(x[:: self.every], error).to_event(1), obs=y_t)
                return x, None

            scan(step, x0, y)

        return model

    def truth(self, rng_key: PRNGKeyArray, cycles: int) -> tuple[Array, Array]:
        """Draw states and observations, shapes (cycles, d) and (cycles, m)."""
        start_key, error_key = jax.random.split(rng_key)

        def step(x: Array, _: None) -> tuple[Array, Array]:
            x = self.flow(x)
            return x, x

        _, states = jax.lax.scan(step, self.initial().sample(start_key), length=cycles)
        observed = states[:, :: self.every]
        y = observed + math.sqrt(self.error_variance) * jax.random.normal(error_key, observed.shape)
        return states, y


SETTINGS = {
    "Lorenz63/sakov2012": Setting(lorenz63, 0.01, 25, (1.509, -1.531, 25.46), 2.0, 1, 2.0, 1001, 64),
    "Lorenz96/sakov2008": Setting(lorenz96, 0.05, 1, (1.0,) + 39 * (0.0,), 0.001, 1, 1.0, 1001, 400),
    "Lorenz96/bocquet2010": Setting(lorenz96, 0.05, 1, 10 * (0.0,), 0.001, 2, 2.25, 1280, 400),
    "Lorenz63/wiljes2017": Setting(lorenz63, 0.01, 12, (1.509, -1.531, 25.46), 2.0, 3, 8.0, 8534, 33),
    "Lorenz96/spantini2019": Setting(lorenz96, 0.02, 20, (1.0,) + 39 * (0.0,), 0.1, 2, 0.5, 2001, 50, noise_steps=5),
}


class AsDapper(ndda.smc.EnsembleUpdate):
    """Ensemble update followed by DAPPER's inflation and random rotation of the anomalies of the analysis.

    Args:
        update: update to apply first.
        inflation: factor on the anomalies of the analysis.
        rotate: whether to rotate by a random orthogonal matrix, uniform among those that keep the mean (Sakov & Oke
            2008). Rotation keeps mean and covariance, and makes the members nearly Gaussian.
    """

    update: ndda.smc.EnsembleUpdate
    inflation: float = 1.0
    rotate: bool = False

    def __call__(
        self,
        rng_key: PRNGKeyArray,
        anomalies: Float[Array, "n d"],
        residual: Float[Array, "n m"],
        taper: PlacedTaper | None = None,
    ) -> Float[Array, "n d"]:
        """Increments of the members, shape (n, d)."""
        update_key, rotation_key = jax.random.split(rng_key)
        analysis = anomalies + self.update(update_key, anomalies, residual, taper)
        mean = analysis.mean(0, keepdims=True)
        moved = self.inflation * (analysis - mean)
        if self.rotate:
            n = len(anomalies)
            # Gram-Schmidt, started with the constant vector, gives n - 1 vectors orthogonal to it.
            across = np.linalg.qr(np.column_stack([np.ones(n), np.eye(n)[:, 1:]]))[0][:, 1:]
            q, r = jnp.linalg.qr(jax.random.normal(rotation_key, (n - 1, n - 1)))
            turned = q * jnp.sign(jnp.diagonal(r))[None]  # without these signs q is not uniform
            moved = across @ (turned @ (across.T @ moved))
        return mean + moved - anomalies


class Row(NamedTuple):
    """One published score and the corresponding filter of this library.

    Attributes:
        setting: key of `SETTINGS`.
        dapper: DAPPER's name of its filter; "" for a number of members without a published score.
        published: published score; None if there is none.
        filter: "perturbed", "square root", "perturbed V", "Bootstrap", "FAAPF" or "FAAPF moved".
        members: number of members or particles.
        inflation: inflation factor of the ensemble.
        rotate: whether DAPPER rotates the ensemble.
        radius: radius of the localization in sites, in DAPPER's convention; None for none.
        jitter: size of DAPPER's jitter relative to a rule-of-thumb bandwidth (its "reg"); None if DAPPER's filter does
            not jitter copies only.
    """

    setting: str
    dapper: str
    published: float | None
    filter: str
    members: int
    inflation: float = 1.0
    rotate: bool = False
    radius: float | None = None
    jitter: float | None = None


UPDATES: dict[str, ndda.smc.EnsembleUpdate] = {
    "perturbed": ndda.smc.PerturbedObservations(),
    "square root": ndda.smc.SquareRoot(),
}
ALGORITHMS: dict[str, Any] = {
    "Bootstrap": ndda.Bootstrap,
    "FAAPF": functools.partial(ndda.FAAPF, target_ess=0.0),
    "FAAPF moved": functools.partial(ndda.FAAPF, move=True),
    "perturbed V": functools.partial(ndda.EnKF, transition_covariance=True),
}

ROWS = [
    Row("Lorenz63/sakov2012", "EnKF Sqrt", 0.80, "square root", 3, 1.30),
    Row("Lorenz63/sakov2012", "EnKF Sqrt", 0.60, "square root", 10, 1.02, rotate=True),
    Row("Lorenz63/sakov2012", "EnKF PertObs", 0.65, "perturbed", 10, 1.04),
    Row("Lorenz63/sakov2012", "EnKF PertObs", 0.56, "perturbed", 100, 1.01),
    Row("Lorenz63/sakov2012", "PartFilt", 0.38, "Bootstrap", 100, jitter=2.4),
    Row("Lorenz63/sakov2012", "PartFilt", 0.38, "FAAPF", 100),
    Row("Lorenz63/sakov2012", "PartFilt", 0.28, "Bootstrap", 800, jitter=0.9),
    Row("Lorenz63/sakov2012", "PartFilt", 0.28, "FAAPF", 800),
    Row("Lorenz96/sakov2008", "EnKF PertObs", 0.24, "perturbed", 28, 1.08),
    Row("Lorenz96/sakov2008", "EnKF PertObs", 0.22, "perturbed", 40, 1.06),
    Row("Lorenz96/sakov2008", "EnKF Sqrt", 0.20, "square root", 20, 1.04, rotate=True),
    Row("Lorenz96/sakov2008", "EnKF Sqrt", 0.18, "square root", 24, 1.013, rotate=True),
    Row("Lorenz96/sakov2008", "LETKF", 0.22, "square root", 7, 1.04, rotate=True, radius=4.0),
    Row("Lorenz96/bocquet2010", "PartFilt", 1.15, "Bootstrap", 50, jitter=1.7),
    Row("Lorenz96/bocquet2010", "OptPF", 0.75, "FAAPF", 50),
    Row("Lorenz96/bocquet2010", "PartFilt", 0.43, "Bootstrap", 100, jitter=1.3),
    Row("Lorenz96/bocquet2010", "OptPF", 0.44, "FAAPF", 100),
    Row("Lorenz96/bocquet2010", "PartFilt", 0.29, "Bootstrap", 800, jitter=0.8),
    Row("Lorenz63/wiljes2017", "EnKF-N", 2.52, "square root", 30, 1.02, rotate=True),
    Row("Lorenz63/wiljes2017", "EnKF-N", 2.52, "perturbed", 30, 1.05),
    Row("Lorenz63/wiljes2017", "PartFilt", 2.05, "Bootstrap", 35, jitter=1.4),
    Row("Lorenz63/wiljes2017", "PartFilt", 2.05, "FAAPF", 35),
    Row("Lorenz63/wiljes2017", "PartFilt", 2.05, "FAAPF moved", 35),
    Row("Lorenz63/wiljes2017", "", None, "perturbed", 256, 1.02),
    Row("Lorenz63/wiljes2017", "", None, "perturbed V", 256),
    Row("Lorenz63/wiljes2017", "", None, "FAAPF", 256),
    Row("Lorenz63/wiljes2017", "", None, "FAAPF moved", 256),
    Row("Lorenz96/spantini2019", "LETKF", 1.0, "square root", 40, 1.10, radius=4.0),
    Row("Lorenz96/spantini2019", "LETKF", 1.0, "perturbed V", 40, radius=4.0),
    Row("Lorenz96/spantini2019", "LETKF", 1.0, "FAAPF", 40),
    Row("Lorenz96/spantini2019", "LETKF", 1.0, "FAAPF moved", 40, radius=4.0),
    Row("Lorenz96/spantini2019", "LETKF", 0.84, "square root", 100, 1.02, radius=4.0),
]

# Lowest score of `GRID` on four truths of `TUNING_SEED` (two for N = 800, and for wiljes2017 and spantini2019), by
# setting, filter and N. Not considered: s = 0.4 of bocquet2010, and noises below one at which the filter lost the
# truth. In spantini2019 only the noise of "FAAPF moved" was chosen so, on 150 cycles.
TUNED = {
    ("Lorenz63/sakov2012", "Bootstrap", 100): 0.3,
    ("Lorenz63/sakov2012", "FAAPF", 100): 0.1,
    ("Lorenz63/sakov2012", "Bootstrap", 800): 0.1,
    ("Lorenz63/sakov2012", "FAAPF", 800): 0.02,
    ("Lorenz96/bocquet2010", "Bootstrap", 50): 0.3,
    ("Lorenz96/bocquet2010", "FAAPF", 50): 0.3,
    ("Lorenz96/bocquet2010", "Bootstrap", 100): 0.3,
    ("Lorenz96/bocquet2010", "FAAPF", 100): 0.15,
    ("Lorenz96/bocquet2010", "Bootstrap", 800): 0.1,
    ("Lorenz63/wiljes2017", "Bootstrap", 35): 0.3,
    ("Lorenz63/wiljes2017", "FAAPF", 35): 0.3,
    ("Lorenz63/wiljes2017", "FAAPF moved", 35): 0.2,
    ("Lorenz63/wiljes2017", "perturbed V", 256): 0.2,
    ("Lorenz63/wiljes2017", "FAAPF", 256): 0.1,
    ("Lorenz63/wiljes2017", "FAAPF moved", 256): 0.05,
    ("Lorenz96/spantini2019", "perturbed V", 40): 0.2,
    ("Lorenz96/spantini2019", "FAAPF moved", 40): 0.2,
    ("Lorenz96/spantini2019", "FAAPF", 40): 0.3,
}
GRID = {
    ("Lorenz63/sakov2012", 100): (0.05, 0.1, 0.2, 0.3, 0.45),
    ("Lorenz63/sakov2012", 800): (0.02, 0.03, 0.05, 0.1, 0.15),
    ("Lorenz96/bocquet2010", 50): (0.1, 0.15, 0.2, 0.3, 0.4),
    ("Lorenz96/bocquet2010", 100): (0.1, 0.15, 0.2, 0.3, 0.4),
    ("Lorenz96/bocquet2010", 800): (0.05, 0.07, 0.1, 0.15, 0.2),
    ("Lorenz63/wiljes2017", 35): (0.1, 0.2, 0.3),
    ("Lorenz63/wiljes2017", 256): (0.05, 0.1, 0.2),
    ("Lorenz96/spantini2019", 40): (0.1, 0.2, 0.3),
}
# Inflation factors to try where DAPPER has none.
INFLATIONS = {("Lorenz63/wiljes2017", 30): (1.0, 1.02, 1.05), ("Lorenz63/wiljes2017", 256): (1.0, 1.02, 1.05)}


class Run(NamedTuple):
    """Run of a row, either with inflation, rotation and jitter as in DAPPER, or with model noise of size `noise`."""

    row: Row
    as_dapper: bool
    noise: float | None


def runs_of(rows: list[Row], tune: bool) -> Iterator[Run]:
    """Runs of each row in the way of this library and, where possible, of DAPPER; or all runs of the grid."""
    for row in rows:
        ensemble = row.filter in UPDATES
        if tune:
            yield from (Run(row, False, noise) for noise in GRID.get((row.setting, row.members), ()) if not ensemble)
            factors = INFLATIONS.get((row.setting, row.members), ()) if ensemble else ()
            yield from (Run(row._replace(inflation=factor), False, None) for factor in factors)
            continue
        yield Run(row, False, None if ensemble else TUNED[row.setting, row.filter, row.members])
        if ensemble or row.jitter is not None:
            yield Run(row, True, None)


def algorithm_of(row: Row, as_dapper: bool, noise: ArrayLike | None) -> ndda.filters.FilterAlgorithm:
    """Filter of a row with its program."""
    setting = SETTINGS[row.setting]
    program = setting.program(noise)
    taper = None
    if row.radius is not None:
        sites = len(setting.start)
        # At DAPPER's radius the taper of Gaspari & Cohn is exp(-1/2), to second order in the distance.
        half_width = row.radius * math.sqrt(10.0 / 3.0)
        observed = {"y": np.arange(0, sites, setting.every)}
        taper = ndda.Taper(half_width, ndda.Ring(sites), observed, state=np.arange(sites))
    if row.filter in ALGORITHMS:
        return ALGORITHMS[row.filter](program, **({} if taper is None else {"taper": taper}))
    update = UPDATES[row.filter]
    if as_dapper:
        return ndda.EnKF(program, update=AsDapper(update, row.inflation, row.rotate), taper=taper)
    return ndda.EnKF(program, update=update, inflation=(ndda.ForecastMultiplicative(row.inflation),), taper=taper)


def jittered(kernel: Kernel, flow: Callable[[Array], Array], jitter: float) -> Kernel:
    """Kernel of a bootstrap filter followed by DAPPER's jitter, which moves copies apart after resampling.

    Copies get Gaussian noise. Its covariance is that of the weighted particles before resampling, times the square of
    ``jitter N^(-1/(d + 4))``, where N^(-1/(d + 4)) is Scott's bandwidth.
    """

    def with_jitter(rng_key: PRNGKeyArray, state: State, inputs: TimeInputs) -> tuple[State, Info]:
        kernel_key, jitter_key = jax.random.split(rng_key)
        new, info = kernel(kernel_key, state, inputs)
        forecast, (n, d) = jax.vmap(flow)(state.particles), state.particles.shape
        weights = jax.nn.softmax(info.log_weights)
        squares = jnp.sum(weights**2)
        # If one particle has all the weight there is no covariance: use that of all particles with equal weights.
        spread_out = squares < 0.999
        weights, squares = jnp.where(spread_out, weights, 1.0 / n), jnp.where(spread_out, squares, 1.0 / n)
        apart = forecast - weights @ forecast
        values, vectors = jnp.linalg.eigh(apart.T @ (weights[:, None] * apart) / (1.0 - squares))
        root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None]
        noise = jitter * n ** (-1.0 / (d + 4)) * jax.random.normal(jitter_key, (n, d)) @ root.T
        copied = jnp.bincount(info.ancestors, length=n)[info.ancestors] > 1
        return new._replace(particles=new.particles + jnp.where(copied[:, None], noise, 0.0)), info

    return with_jitter


def moments(
    algorithm: ndda.filters.FilterAlgorithm,
    members: int,
    rng_key: PRNGKeyArray,
    y: Float[Array, "t m"],
    around: Callable[[Kernel], Kernel] | None = None,
) -> tuple[Float[Array, "t d"], Float[Array, "t d"]]:
    """Mean and variance of the analysis at each cycle, compiled as a whole.

    The particles are those of `Filter` with the same key, as the tests check. `Filter` calls a compiled step from a
    loop, which takes several milliseconds per cycle; that would be slow for thousands of cycles on several truths.
    """
    program = ndda.program.StateSpaceModel(algorithm.model, (y,), {})
    program.check(algorithm.needs_gaussian, algorithm.needs_gaussian_errors)
    kernel = algorithm.kernel(program)
    kernel = kernel if around is None else around(kernel)
    init_key, run_key = jax.random.split(jax.random.fold_in(rng_key, 0))  # of the first chain

    def step(state: State, inputs: TimeInputs) -> tuple[State, tuple[Array, Array]]:
        state, info = kernel(jax.random.fold_in(run_key, inputs.step), state, inputs)
        x = info.proposal.sites["posterior"]["x"]
        return state, (x.mean(0), x.var(0, ddof=1))

    start = init(jax.vmap(program.initial)(particle_keys(init_key, members)))
    return jax.lax.scan(step, start, program.time_inputs())[1]


@functools.cache
def compiled(row: Row, as_dapper: bool) -> Callable[..., tuple[Array, Array]]:
    """Compiled function (keys, observations, noise) -> `moments` for each truth; all noises share one compilation."""

    def run(rng_key: PRNGKeyArray, y: Array, noise: Array | None) -> tuple[Array, Array]:
        around = None
        if as_dapper and row.jitter is not None:
            around = functools.partial(jittered, flow=SETTINGS[row.setting].flow, jitter=row.jitter)
        return moments(algorithm_of(row, as_dapper, noise), row.members, rng_key, y, around)

    return jax.jit(jax.vmap(run, (0, 0, None)))


@functools.cache
def truths_of(setting: str, cycles: int, seed: int, truths: int) -> tuple[Array, Array]:
    """States and observations with a leading axis of truths, the same for all filters."""
    keys = particle_keys(jax.random.key(seed), truths)
    return jax.vmap(lambda key: SETTINGS[setting].truth(key, cycles))(keys)


def score(run: Run, *, seed: int, truths: int, cycles: int | None, burn_in: int | None) -> dict[str, Any]:
    """Row of the table: means over truths; truths on which the ensemble diverges are lost."""
    row, setting = run.row, SETTINGS[run.row.setting]
    cycles = setting.cycles if cycles is None else cycles
    burn_in = setting.burn_in if burn_in is None else burn_in
    states, y = truths_of(row.setting, cycles, seed, truths)
    keys = particle_keys(jax.random.key(seed + 1), truths)
    mean, variance = compiled(row, run.as_dapper)(keys, y, run.noise)
    # DAPPER's score: root mean square over components at each time, then mean over time.
    error = np.sqrt(np.mean((mean - states)[:, burn_in:] ** 2, axis=-1)).mean(-1)
    spread = np.sqrt(np.mean(variance[:, burn_in:], axis=-1)).mean(-1)
    kept = np.isfinite(error)
    found = {
        **row._asdict(),
        "as DAPPER": run.as_dapper,
        "noise": run.noise,
        "cycles": cycles,
        "burn-in": burn_in,
        "lost": int(truths - kept.sum()),
    }
    for name, values in (("rmse.a", error[kept]), ("spread", spread[kept])):
        found |= mean_and_error(name, values)
        found[f"{name} SD"] = float(values.std(ddof=1)) if len(values) > 1 else None
    return found


COLUMNS = {
    "setting": "", "dapper": "", "members": "", "published": ".2f", "filter": "", "how": "", "rmse.a": ".3f",
    "SD of one run": ".3f", "spread": ".3f", "lost": "",
}  # fmt: skip


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Row of the table with the way of the run in words."""
    how = "as DAPPER" if row["as DAPPER"] else "" if row["noise"] is None else f"s = {row['noise']:g}"
    if row["noise"] is None and row["inflation"] != 1.0:
        how = f"{how} {row['inflation']:g}".strip()
    return {**row, "how": how, "SD of one run": row["rmse.a SD"]}


def main(
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
    settings: Annotated[list[str] | None, typer.Option(help="Setting to run; may be repeated; all by default.")] = None,
    filters: Annotated[list[str] | None, typer.Option(help="Filter to run; may be repeated; all by default.")] = None,
    members: Annotated[list[int] | None, typer.Option(help="Number of members to run; may be repeated.")] = None,
    truths: Annotated[int, typer.Option(help="Number of truths.", min=1)] = 6,
    cycles: Annotated[int | None, typer.Option(help="Cycles; DAPPER's number by default.", min=2)] = None,
    burn_in: Annotated[int | None, typer.Option(help="Cycles not scored; DAPPER's by default.", min=0)] = None,
    seed: Annotated[int, typer.Option(help="Seed of truths and filters.")] = 1000,
    tune: Annotated[bool, typer.Option(help="Run the grid of noises on the tuning truths instead.")] = False,
) -> None:
    """Print scores of filters of this library next to the published scores of DAPPER."""
    for name, chosen, known in (("setting", settings, SETTINGS), ("filter", filters, {**UPDATES, **ALGORITHMS})):
        if unknown := sorted(set(chosen or []) - set(known)):
            raise typer.BadParameter(f"no {name} called {', '.join(unknown)}; give one of {', '.join(known)}.")
    rows = [
        row
        for row in ROWS
        if row.setting in (settings or SETTINGS)
        and row.filter in (filters or {**UPDATES, **ALGORITHMS})
        and row.members in (members or [row.members])
    ]
    if not rows:
        raise typer.BadParameter("no score is published for this combination of options; leave an option out.")
    for name in {row.setting for row in rows}:
        length = SETTINGS[name].cycles if cycles is None else cycles
        if (SETTINGS[name].burn_in if burn_in is None else burn_in) >= length:
            raise typer.BadParameter(
                f"the burn-in leaves none of {length} cycles of {name} to score; give more cycles."
            )
    seed = TUNING_SEED if tune else seed
    console = Console()
    found = [
        score(run, seed=seed, truths=truths, cycles=cycles, burn_in=burn_in)
        for run in track(list(runs_of(rows, tune)), "filtering", console=console, transient=True)
    ]
    title = f"{truths} truths, mean ± standard error over truths"
    print_table(console, title, [shown(row) for row in found], COLUMNS, group="setting", without_error=["spread"])
    options = {"truths": truths, "cycles": cycles, "burn_in": burn_in, "seed": seed, "tune": tune}
    write_json(out, options, rows=found)


if __name__ == "__main__":
    typer.run(main)
