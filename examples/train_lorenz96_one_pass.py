"""Train the one-pass emulator of Lorenz-96 that ships as `ndda.load_prior("lorenz96_one_pass")`, and measure its skill.

    pip install "numpyro-diffusion-da[train]"
    python examples/train_lorenz96_one_pass.py --out my_emulator

It is the twin of the diffusion that `train_lorenz96.py` makes: the same runs of the true system, the same measurements
in its card. The network makes the next state from the previous one and from noise. It starts from the mean network of
that diffusion, with random weights for the noise, and all its weights are trained by the fair CRPS of a few members
against single draws of the true system, as functional generative networks are.

The CRPS of each site says nothing of the dependence between sites. A network with one number of noise for each site
that was trained by it alone (`--no-dependence --steps 6000`) had the right spread at every site (0.999), and errors
that were correlated between neighbors: its covariance of a step was wrong by 65 %. So the CRPS is also taken of sums
and differences of sites up to four apart, as others take it of spectral coefficients (FourCastNet 3, Bonev et al. 2025,
arXiv 2507.12144).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from train_lorenz96 import (
    SITES,
    SPIN_UP,
    Transition,
    finite,
    long_run,
    one_step,
    optimize,
    rollout,
    summary,
    system,
    training_batch,
    versions,
)

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.commands import output_folder
from numpyro_diffusion_da.demos import lorenz96_system as lorenz96
from numpyro_diffusion_da.priors import (
    RingNoiseNetwork,
    RingOnePassEmulator,
    read_ring_one_pass,
    save_ring_one_pass,
)

NAME = "lorenz96_one_pass"


def fair_crps(members: jax.Array, y: jax.Array) -> jax.Array:
    """Compute the fair CRPS of each value (Ferro 2014, Q. J. R. Meteorol. Soc. 140, 1917, eq. 8).

    Args:
        members: members, leading axis M.
        y: verification, of the shape of a member.
    """
    m = len(members)
    apart = jnp.sum(jnp.abs(members[:, None] - members[None]), axis=(0, 1))
    return jnp.mean(jnp.abs(members - y[None]), axis=0) - apart / (2 * m * (m - 1))


def patterns(x: jax.Array) -> jax.Array:
    """Sites, and sums and differences of sites up to four apart, each of the variance of a site if all are independent.

    Args:
        x: states, shape (..., sites).

    Returns:
        Shape (..., 9, sites).
    """
    others = [jnp.roll(x, d, axis=-1) for d in range(1, 5)]
    return jnp.stack([x, *((x + y) / 2**0.5 for y in others), *((x - y) / 2**0.5 for y in others)], axis=-2)


def train(
    seed: int, steps: int, members: int, rings: int, run_steps: int, batch: int, rate: float, dependence: bool
) -> RingOnePassEmulator:
    """Train the network by the fair CRPS of `members` members, of sites or of all `patterns`."""
    data_key, start_key, run_key = jax.random.split(jax.random.key(seed), 3)
    bank = long_run(data_key, lorenz96.draw, rings, run_steps).reshape(-1, SITES)
    diffusion = ndda.load_prior("lorenz96")
    emulator = RingOnePassEmulator(
        network=RingNoiseNetwork.init(start_key, diffusion.mean_network),
        state_mean=diffusion.state_mean,
        state_scale=diffusion.state_scale,
        increment_scale=diffusion.increment_scale,
        climatology_mean=diffusion.climatology_mean,
        climatology_covariance=diffusion.climatology_covariance,
        layout=diffusion.layout,
    )
    climatology = emulator.climatology()

    def loss(network: RingNoiseNetwork, rng_key: jax.Array) -> jax.Array:
        batch_key, draw_key, noise_key = jax.random.split(rng_key, 3)
        x = training_batch(batch_key, bank, climatology, batch)
        trained = eqx.tree_at(lambda e: e.network, emulator, network)
        noise = jax.random.normal(noise_key, (members, *x.shape))
        drawn = jax.vmap(jax.vmap(trained.generate), (0, None))(noise, x)
        seen = patterns if dependence else (lambda x: x)
        return jnp.mean(fair_crps(seen(drawn), seen(lorenz96.draw(draw_key, x))))

    network = optimize("network", loss, emulator.network, run_key, steps, rate, 1e-5)
    return eqx.tree_at(lambda e: e.network, emulator, network)


def emulator_draw(emulator: RingOnePassEmulator) -> Transition:
    """Make the transition of the emulator."""

    def draw(rng_key: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vmap(emulator.generate)(jax.random.normal(rng_key, x.shape), x)

    return draw


def mean_of(emulator: RingOnePassEmulator, rng_key: jax.Array, pairs: int = 64) -> Transition:
    """Make the function from states to the means of the next ones, over pairs of opposite noise."""

    @jax.jit
    def mean(x: jax.Array) -> jax.Array:
        noise = jax.random.normal(rng_key, (pairs, *x.shape))
        generate = jax.vmap(jax.vmap(emulator.generate), (0, None))
        return 0.5 * (generate(noise, x) + generate(-noise, x)).mean(0)

    return mean


def covariance_errors(emulator: RingOnePassEmulator, rng_key: jax.Array, states: int) -> dict[str, float]:
    """Measure how far f(c, 0) and J J^T are from the mean and the covariance of the emulator, and from the truth's.

    Filters use f(c, 0) as the forecast mean and J J^T, with J = df/de at e = 0, as the covariance.

    Args:
        emulator: the emulator.
        rng_key: random key.
        states: number of states.
    """
    run_key, noise_key = jax.random.split(rng_key)
    x = long_run(run_key, lorenz96.draw, states, 1)[0]
    j = np.asarray(jax.jit(jax.vmap(jax.jacfwd(emulator.generate)))(jnp.zeros_like(x), x), float)
    covariance = j @ np.swapaxes(j, 1, 2)
    exact = lorenz96.NOISE_VARIANCE * np.eye(SITES)
    center = jax.vmap(emulator.generate)(jnp.zeros_like(x), x)
    off = np.asarray(center - mean_of(emulator, noise_key)(x))
    error = np.linalg.norm(covariance - exact[None], axis=(1, 2)) / np.linalg.norm(exact)
    return {
        "center_minus_mean_relative_to_noise": float(np.sqrt(np.mean(off**2) / lorenz96.NOISE_VARIANCE)),
        "covariance_error_mean": float(error.mean()),
        "covariance_error_worst": float(error.max()),
    }


def main(
    out: Annotated[Path, typer.Option(help=f"folder for {NAME}.npz and {NAME}.json", callback=output_folder)] = Path(
        "lorenz96_one_pass_emulator"
    ),
    seed: Annotated[int, typer.Option(help="seed of data, initial weights and training")] = 0,
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 4000,
    members: Annotated[int, typer.Option(help="members of the CRPS in training", min=2)] = 4,
    rings: Annotated[int, typer.Option(help="independent runs of the true system for training")] = 1024,
    run_steps: Annotated[int, typer.Option(help="steps of each run after the spin-up")] = 128,
    batch: Annotated[int, typer.Option(help="states in each optimizer step")] = 128,
    rate: Annotated[float, typer.Option(help="largest learning rate")] = 2e-3,
    dependence: Annotated[bool, typer.Option(help="train by sums and differences of sites too")] = True,
    check_states: Annotated[int, typer.Option(help="states of the one-step scores")] = 1024,
    check_members: Annotated[int, typer.Option(help="members of the one-step scores")] = 32,
    climate_rings: Annotated[int, typer.Option(help="rings of the long rollout")] = 32,
    climate_steps: Annotated[int, typer.Option(help="steps of the long rollout")] = 2000,
) -> None:
    """Train the one-pass emulator of Lorenz-96, measure it, and write its arrays and its card."""
    emulator = train(seed, steps, members, rings, run_steps, batch, rate, dependence)
    console = Console()
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), 4)
    console.print("measuring one-step scores, covariances and climate")
    card = {
        "name": NAME,
        "system": system(),
        "training": {
            "data": f"{rings} runs of the true system from {lorenz96.FORCING} + N(0, I), {run_steps} steps of each "
            f"after a spin-up of {SPIN_UP}; a batch is half states of the runs, a quarter those with white noise of "
            "standard deviation 0 to 2.5, a quarter draws of the Gaussian climatology",
            "states": rings * run_steps,
            "start": "the mean network of lorenz96, random weights of the noise",
            "loss": f"fair CRPS of {members} members against draws of the next state: of sites"
            + (", and of sums and differences of sites up to four apart" if dependence else ""),
            "seed": seed,
            "optimizer_steps": steps,
            "batch": batch,
            "largest_learning_rate": rate,
            "script": f"examples/train_{NAME}.py",
        },
        "architecture": {"parameters": sum(x.size for x in jax.tree.leaves(emulator.network))},
        "one_step": one_step(
            mean_of(emulator, keys[0]),
            {"emulator": emulator_draw(emulator)},
            emulator.climatology(),
            keys[1],
            check_states,
            check_members,
        ),
        "linearization": covariance_errors(emulator, keys[2], 64),
        "climate": rollout(emulator_draw(emulator), keys[3], climate_rings, climate_steps),
        "versions": versions(),
    }
    save_ring_one_pass(emulator, finite(card), out, NAME)
    console.print(summary(card))
    console.print(card["linearization"])
    console.print(f"{out / NAME}.npz, sha256 {read_ring_one_pass(out, NAME, SITES).checksum}")


if __name__ == "__main__":
    typer.run(main)
