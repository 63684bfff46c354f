"""Infer an unknown observation error with PMMH, on Lorenz-96 (d = 40) with the trained emulator.

The program is that of the README with one more line: the observation error is a site with a prior, and so a parameter.
Observations come from the program itself, with error 1. Particle-marginal Metropolis-Hastings (PMMH) runs a bootstrap
filter for every proposal. The evidence of that filter is unbiased, but its weights are those of whole particles, so the
problem is small on purpose: two of forty sites observed, eight steps, an initial state known to within 0.3.

What to expect: with four observed sites PMMH fails. The log-evidence then has a standard deviation of 9 at 256
particles, and the chain does not move. The summary shows this number; do not trust draws where it is above 3.

    python examples/unknown_observation_error.py
    python examples/unknown_observation_error.py --every 10        # four observed sites: PMMH fails
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import typer
from numpyro.contrib.control_flow import scan
from rich.console import Console

import numpyro_diffusion_da as ndda

ERROR, START_ERROR = 1.0, 0.3
prior = ndda.load_prior("lorenz96")


def model(y: jax.Array, start: jax.Array) -> None:
    """State-space model from the analysis `start`: every n-th site is observed, with an unknown error."""
    error = numpyro.sample("error", dist.LogNormal(0.0, 1.0))
    x0 = numpyro.sample("x0", dist.Normal(start, START_ERROR).to_event(1))
    every = start.shape[0] // y.shape[1]

    def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
        x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
        numpyro.sample("y", dist.Normal(x[::every], error).to_event(1), obs=y_t)
        return x, None

    scan(step, x0, y)


def main(
    steps: Annotated[int, typer.Option(help="Steps of 0.1 time units.", min=1)] = 8,
    every: Annotated[int, typer.Option(help="Observe every n-th of 40 sites.", min=1)] = 20,
    particles: Annotated[int, typer.Option(help="Particles of each filter.", min=1)] = 256,
    warmup: Annotated[int, typer.Option(help="Iterations before the draws.", min=0)] = 100,
    samples: Annotated[int, typer.Option(help="Draws of each chain.", min=4)] = 200,
    chains: Annotated[int, typer.Option(help="Chains.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Seed of truth, observations and chains.")] = 0,
) -> None:
    """Infer the observation error, and warn where the draws cannot be trusted."""
    start_key, truth_key, error_key, run_key = jax.random.split(jax.random.key(seed), 4)
    start = prior.climatology().sample(start_key)
    nothing = jnp.full((steps, 40 // every), jnp.nan)
    known = numpyro.handlers.condition(model, {"error": ERROR})
    truth = numpyro.infer.Predictive(known, num_samples=1)(truth_key, nothing, start)["x"][0]
    y = truth[:, ::every] + ERROR * jax.random.normal(error_key, nothing.shape)

    inference = ndda.PMMH(
        ndda.Bootstrap(model),
        num_particles=particles,
        num_warmup=warmup,
        num_samples=samples,
        num_chains=chains,
        batch_size=particles,  # one chain at a time: faster than all together on a CPU
    )
    inference.run(run_key, y, start)
    inference.print_summary()
    console = Console()
    console.print(f"true error {ERROR:g}; {y.size} observations; bootstrap filter, {particles} particles")
    noise = inference.result.attributes["log_evidence_std"]
    if noise > 3.0:
        console.print(f"log-evidence sd {noise:.1f}: the weights collapse, so these draws do not follow the posterior")


if __name__ == "__main__":
    typer.run(main)
