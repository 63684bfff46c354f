"""How accurate is `log_prob` by the probability-flow ODE, and what does it cost?

The targets have known densities. They are scaled to unit variance on average, as the diffusion sees them, and compared
at 200 draws of each. Noise levels go from 0.02 to 80, in single precision:

- Gaussian: four components, variances 0.31 to 2.0.
- Gaussian, wide: eight components, variances 0.021 to 4.3.
- Gaussian, correlated noise: the first target with correlated noise of the diffusion.
- two modes: four components, two Gaussians of standard deviation 0.22 whose means are 1.8 apart.

    python examples/benchmarks/density.py --out density.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import typer
from report import json_file, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda

RANGE = (2e-2, 80.0)


class TwoModes(ndda.DiffusionPrior):
    """Prior with two modes: equal parts of N(x + center, v I) and N(x - center, v I) for a previous state x.

    Args:
        center: distance of the modes from x, shape (d,).
        variance: variance v of each mode.
    """

    center: jax.Array
    variance: float = eqx.field(static=True)
    noise: ndda.diffusion.Noise
    noise_range: tuple[float, float] = eqx.field(static=True)
    layout: ndda.Layout = eqx.field(static=True)
    conditioning_passes: int = eqx.field(static=True)

    def __init__(self, center: np.ndarray, variance: float) -> None:
        self.center, self.variance = jnp.asarray(center, jnp.float32), variance
        self.noise, self.noise_range, self.conditioning_passes = ndda.diffusion.WhiteNoise(), RANGE, 0
        self.layout = ndda.Layout((len(center),), ("component",))

    def condition(self, state: jax.Array, inputs: Any = None) -> jax.Array:
        """Return the previous state as conditioning."""
        return state

    def denoise(self, z_s: jax.Array, noise_level: jax.Array, conditioning: jax.Array) -> jax.Array:
        """Mean of the modes' posterior means, weighted by the posterior probability of each mode."""
        total = self.variance + noise_level**2
        mode = self.center * jnp.tanh(jnp.vdot(self.center, z_s) / total)
        return mode + (self.variance / total) * (z_s - mode)

    def location(self, conditioning: jax.Array) -> jax.Array:
        """Return the previous state as location."""
        return conditioning

    def scale(self, conditioning: jax.Array) -> jax.Array:
        """Return the scale 1."""
        return jnp.ones(())

    def exact(self, state: jax.Array) -> dist.Distribution:
        """Exact transition distribution from `state`."""
        means = jnp.stack([state + self.center, state - self.center])
        parts = dist.Normal(means, self.variance**0.5).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(jnp.full(2, 0.5)), parts)


class Target(NamedTuple):
    """Prior with the exact distribution of its transition from the zero state."""

    name: str
    prior: ndda.DiffusionPrior
    exact: dist.Distribution


def gaussian(name: str, variances: np.ndarray, correlated: bool = False) -> Target:
    """Gaussian target with the given variances along random directions, scaled to mean variance 1."""
    d = len(variances)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    covariance = (rotation * variances / variances.mean()) @ rotation.T
    apart = np.abs(np.arange(d)[:, None] - np.arange(d))
    noise_covariance = np.exp(-apart / 2) if correlated else None
    prior = ndda.GaussianPrior(0.5 * np.eye(d), covariance, np.ones(d), noise_covariance, RANGE)
    return Target(name, prior, dist.MultivariateNormal(jnp.ones(d), jnp.asarray(covariance, jnp.float32)))


def targets() -> list[Target]:
    """All four targets."""
    mild, wide = np.geomspace(0.3, 2.0, 4), np.geomspace(0.02, 4.0, 8)
    modes = TwoModes(np.full(4, 0.45), 0.05)
    return [
        gaussian("Gaussian", mild),
        gaussian("Gaussian, wide", wide),
        gaussian("Gaussian, correlated noise", mild, correlated=True),
        Target("two modes", modes, modes.exact(jnp.zeros(4))),
    ]


def log_prob(target: Target, density: ndda.diffusion.ProbabilityFlow, x: jax.Array) -> tuple[np.ndarray, Any]:
    """Log-densities of x given the zero state, as double precision, and network passes per density."""
    conditioning = target.prior.condition(jnp.zeros(x.shape[1:]))
    values, passes = jax.jit(jax.vmap(lambda v: density(target.prior, conditioning, v)))(x)
    return np.asarray(values, np.float64), jax.tree.map(lambda count: int(count[0]), passes)


def level_rows(target: Target, levels: list[int], x: jax.Array) -> list[dict[str, Any]]:
    """Rows of the first table: error and cost for each number of levels, with exact traces."""
    truth, rows = np.asarray(target.exact.log_prob(x), np.float64), []
    for n in levels:
        values, passes = log_prob(target, ndda.diffusion.ProbabilityFlow(n), x)
        error = values - truth
        rows.append(
            {
                "target": target.name,
                "levels": n,
                "forward": passes.forward,
                "jvp": passes.jvp,
                "RMS error": float(np.sqrt(np.mean(error**2))),
                "largest error": float(np.abs(error).max()),
            }
        )
    return rows


def probe_rows(target: Target, probes: list[int], keys: int, x: jax.Array) -> list[dict[str, Any]]:
    """Rows of the second table: mean and spread over keys of the error from Hutchinson's traces, at one point."""
    exact, _ = log_prob(target, ndda.diffusion.ProbabilityFlow(), x[:1])
    rows = []
    for number in probes:

        def difference(key: jax.Array, number: int = number) -> jax.Array:
            density = ndda.diffusion.ProbabilityFlow(trace=ndda.diffusion.Hutchinson(key, number))
            return density(target.prior, target.prior.condition(jnp.zeros(x.shape[1:])), x[0])[0]

        values = np.asarray(jax.jit(jax.vmap(difference))(jax.random.split(jax.random.key(1), keys)), np.float64)
        _, passes = log_prob(
            target, ndda.diffusion.ProbabilityFlow(trace=ndda.diffusion.Hutchinson(jax.random.key(0), number)), x[:1]
        )
        spread = float(values.std(ddof=1))
        rows.append(
            {
                "target": target.name,
                "probes": number,
                "forward": passes.forward,
                "jvp": passes.jvp,
                "standard deviation": spread,
                "bias": float(values.mean() - exact[0]),
                "bias SE": spread / np.sqrt(keys),
            }
        )
    return rows


def main(
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the tables to.")] = None,
    levels: Annotated[list[int] | None, typer.Option(help="Number of noise levels; may be repeated.")] = None,
    points: Annotated[int, typer.Option(min=1, help="Draws of each target to compare densities at.")] = 200,
    probes: Annotated[
        list[int] | None, typer.Option(help="Number of probes in the second table; may be repeated.")
    ] = None,
    keys: Annotated[int, typer.Option(min=2, help="Random keys of the second table.")] = 400,
) -> None:
    """Print errors of log-densities by number of levels, and those of Hutchinson's traces by number of probes."""
    console = Console()
    levels = levels or [8, 12, 16, 24, 32, 64]
    probes = probes or [1, 8, 32]
    all_targets = targets()
    by_levels: list[dict[str, Any]] = []
    for target in track(all_targets, "densities", console=console, transient=True):
        by_levels += level_rows(target, levels, target.exact.sample(jax.random.key(0), (points,)))
    wide = all_targets[1]
    by_probes = probe_rows(wide, probes, keys, wide.exact.sample(jax.random.key(0), (1,)))
    print_table(console, f"Exact traces, {points} draws of each target", by_levels, default=".2g")
    num_levels = ndda.diffusion.ProbabilityFlow().num_levels
    print_table(console, f"Hutchinson's traces, {keys} keys, {num_levels} levels", by_probes, default=".2g")
    settings = {"points": points, "keys": keys, "noise range": RANGE}
    write_json(out, settings, levels=by_levels, probes=by_probes)


if __name__ == "__main__":
    typer.run(main)
