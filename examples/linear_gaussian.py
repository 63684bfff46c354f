"""Compare filters with the exact answer, on a linear-Gaussian program with a diffusion prior.

The transition N(A x, Q) is written as a diffusion; A is a rotation times 0.95. Every second component is observed. The
program is linear and Gaussian, so the Kalman filter is exact. cuthbert provides one. It takes the matrices that
`ndda.program.LinearGaussian` finds in the program.

What to expect: the mean of FA-APF with exact weights (`Moment`, no tempering) differs from the Kalman filter's by a
tenth of the standard deviation, which is the sampling error of 256 particles. Its variance agrees, and its log-evidence
agrees to about 0.5. The errors of the published weights (`Dirac`, tempered) and of the bootstrap filter are nearly
twice as large. The ensemble Kalman filter is made for this problem: it is a little better than all of them, but it
gives no evidence. examples/benchmarks/linear_gaussian.py has more seeds, larger states and standard errors.

    python examples/linear_gaussian.py --particles 256 --steps 40 --dimension 4
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from numpyro.contrib.control_flow import scan
from rich.console import Console
from rich.table import Table

import numpyro_diffusion_da as ndda

ERROR = 0.5


def make_program(dimension: int):
    """State-space model of `dimension` components; its only argument is the array of observations."""
    separation = np.abs(np.subtract.outer(np.arange(dimension), np.arange(dimension)))
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(dimension, dimension)))[0]
    prior = ndda.GaussianPrior(transition=0.95 * rotation, covariance=0.25 * np.exp(-separation / 3))

    def model(y):
        x0 = numpyro.sample("x0", prior.climatology())

        def step(x, y_t):
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
            numpyro.sample("y", dist.Normal(x[::2], ERROR).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    return model


def kalman(model, y):
    """Mean and standard deviation (time, component), and log-evidence, of the exact filter."""
    import cuthbert
    from cuthbert.gaussian.kalman import build_filter

    exact = ndda.program.LinearGaussian(ndda.program.StateSpaceModel(model, (y,)))
    filter = build_filter(exact.initial_mean, exact.initial_factor, exact.dynamics, exact.observation)
    states = cuthbert.filter(filter, exact.model_inputs, filter.init_prepare())
    return states.mean[1:], jnp.linalg.norm(states.chol_cov[1:], axis=-1), states.log_normalizing_constant[-1]


def main(
    particles: Annotated[int, typer.Option(help="Particles of each filter.", min=2)] = 256,
    steps: Annotated[int, typer.Option(help="Number of observation times.", min=1)] = 40,
    dimension: Annotated[int, typer.Option(help="Components of the state.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of truth, observations and filters.")] = 0,
) -> None:
    """Compare FA-APF, bootstrap and ensemble Kalman filters with the Kalman filter."""
    model = make_program(dimension)
    truth_key, error_key, run_key = jax.random.split(jax.random.key(seed), 3)
    nothing = jnp.full((steps, (dimension + 1) // 2), jnp.nan)
    truth = numpyro.infer.Predictive(model, num_samples=1)(truth_key, nothing)["x"][0]
    y = truth[:, ::2] + ERROR * jax.random.normal(error_key, nothing.shape)
    try:
        mean, deviation, log_evidence = kalman(model, y)
    except ModuleNotFoundError:
        raise SystemExit('this example needs cuthbert: pip install "numpyro-diffusion-da[test]"') from None

    filters = {
        "FA-APF, exact weights": ndda.FAAPF(model, weight=ndda.Moment(), target_ess=0.0),
        "FA-APF, as published": ndda.FAAPF(model),
        "bootstrap": ndda.Bootstrap(model),
        "ensemble Kalman": ndda.EnKF(model),
    }
    table = Table(
        title=f"d = {dimension}, {steps} steps, N = {particles}",
        caption="compared with the Kalman filter: error of the mean in Kalman standard deviations, ratio of variances, "
        "difference of log-evidence",
    )
    for column in ("", "mean", "variance", "evidence", "ESS", "passes"):
        table.add_column(column, justify="right" if column else "left")
    for name, algorithm in filters.items():
        filter = ndda.Filter(algorithm, num_particles=particles)
        filter.run(run_key, y)
        x, stats = filter.result.posterior["x"][0], filter.result.sample_stats
        error = np.sqrt(np.mean(((x.mean(0) - mean) / deviation) ** 2))
        variance = np.mean(x.var(0, ddof=1) / deviation**2)
        evidence = stats["log_evidence_increment"].sum() - log_evidence
        has_evidence = name in ("FA-APF, exact weights", "bootstrap")  # the others do not estimate it
        table.add_row(
            name,
            f"{error:.2f}",
            f"{variance:.2f}",
            f"{evidence:+.1f}" if has_evidence else "-",
            f"{stats['ess'].mean():.0f}",
            f"{filter.result.mean_passes().network:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
