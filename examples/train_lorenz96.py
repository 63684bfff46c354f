"""Train the emulator of stochastic Lorenz-96 that ships as `ndda.load_prior("lorenz96")`, and measure its skill.

    pip install "numpyro-diffusion-da[train]"
    python examples/train_lorenz96.py --out my_emulator

The script writes the arrays (lorenz96.npz) and the data card (lorenz96.json) to the folder --out. It takes a few
minutes on two CPU cores. There are three stages:

1. Train the mean network by least squares on flow(x), the conditional mean of the next state. The simulator gives this
   mean without sampling noise, so that this stage needs no random draws of the next state.
2. Train the residual network by denoising score matching with the loss of EDM, on random draws of the next state. The
   mean network is fixed.
3. Measure the emulator for the card, on runs that were not used in training and with the default sampler of filters.
   The same scores of the true system are recorded too. They show which part of a score is sampling error.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from numpyro_diffusion_da.commands import output_folder
from numpyro_diffusion_da.demos import lorenz96_system as lorenz96
from numpyro_diffusion_da.diffusion import DPMSolverPP2M, KarrasSchedule, Sampler
from numpyro_diffusion_da.fields import Layout
from numpyro_diffusion_da.priors import (
    RingEmulator,
    RingMeanNetwork,
    RingResidualNetwork,
    read_ring_emulator,
    save_ring_emulator,
)
from numpyro_diffusion_da.transition import DiffusionDynamics

NAME = "lorenz96"
SITES = 40
NOISE_RANGE = (0.02, 40.0)
SPIN_UP = 100
CHECK_LEVELS = (0.05, 0.3, 1.0, 3.0, 10.0, 40.0)

Transition = Callable[[jax.Array, jax.Array], jax.Array]
"""Function (rng_key, states of shape (rings, sites)) -> random draw of the next states."""


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Context with a progress bar. It yields a function to call with the steps since the last call and a note."""
    note = TextColumn("{task.fields[note]}")
    with Progress(TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note) as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda steps, note: bar.update(task, advance=steps, note=note)


def long_run(rng_key: jax.Array, transition: Transition, rings: int, steps: int) -> jax.Array:
    """Run `rings` independent rings for `steps` steps after a spin-up, shape (steps, rings, sites)."""
    start_key, run_key = jax.random.split(rng_key)
    start = lorenz96.FORCING + jax.random.normal(start_key, (rings, SITES))

    @jax.jit
    def run(start: jax.Array) -> jax.Array:
        def step(x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = transition(jax.random.fold_in(run_key, i), x)
            return x, x

        x, _ = jax.lax.scan(lambda x, i: (step(x, i)[0], None), start, jnp.arange(SPIN_UP))
        return jax.lax.scan(step, x, SPIN_UP + jnp.arange(steps))[1]

    return run(start)


def covariance_by_distance(run: jax.Array) -> np.ndarray:
    """Covariance of two sites by their distance around the ring, shape (sites // 2 + 1,)."""
    x = np.asarray(run, dtype=np.float64).reshape(-1, SITES)
    x = x - x.mean()
    return np.array([np.mean(x * np.roll(x, k, axis=1)) for k in range(SITES // 2 + 1)])


def training_batch(rng_key: jax.Array, bank: jax.Array, climatology: Any, batch: int) -> jax.Array:
    """Draw a batch of states for training, shape (batch, sites).

    Half of the states come from the runs. A quarter come from the runs, with white noise added whose standard deviation
    is drawn between 0 and 2.5 for each state. Analysis ensembles are not on the attractor either, and large states,
    which are too rare in the runs to learn from, become common. The last quarter are samples of the Gaussian
    climatology, from which filters start.
    """
    index_key, size_key, noise_key, climatology_key = jax.random.split(rng_key, 4)
    x = bank[jax.random.randint(index_key, (batch,), 0, len(bank))]
    quarter = batch // 4
    size = jax.random.uniform(size_key, (quarter, 1), maxval=2.5)
    perturbed = x[:quarter] + size * jax.random.normal(noise_key, (quarter, SITES))
    return jnp.concatenate([perturbed, climatology.sample(climatology_key, (quarter,)), x[2 * quarter :]])


def optimize(title: str, loss: Any, model: Any, rng_key: jax.Array, steps: int, rate: float, decay: float) -> Any:
    """Minimize `loss(model, rng_key)` by AdamW with warm-up and cosine decay, and return the trained model."""
    warm_up = min(200, steps // 5)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm_up, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=decay))

    @jax.jit
    def update(model: Any, state: Any, step: int) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(model, jax.random.fold_in(rng_key, step))
        change, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, change), state, value

    state = optimizer.init(model)
    with progress(title, steps) as advance:
        for step in range(steps):
            model, state, value = update(model, state, step)
            if (step + 1) % 50 == 0 or step + 1 == steps:
                advance((step % 50) + 1, f"loss {float(value):.2e}")
    return model


def train(
    seed: int, steps: int, channels: int, blocks: int, hidden: int, rings: int, run_steps: int, batch: int
) -> RingEmulator:
    """Train the mean network for `steps` steps and the residual network for half as many (stages 1 and 2)."""
    data_key, mean_key, residual_key, rms_key = jax.random.split(jax.random.key(seed), 4)
    run = long_run(data_key, lorenz96.draw, rings, run_steps)
    bank = run.reshape(-1, SITES)
    emulator = RingEmulator(
        mean_network=RingMeanNetwork.init(jax.random.fold_in(mean_key, 0), channels, blocks),
        residual_network=RingResidualNetwork.init(jax.random.fold_in(residual_key, 0), channels, hidden),
        state_mean=jnp.mean(bank),
        state_scale=jnp.std(bank),
        increment_scale=rms(lorenz96.flow(bank) - bank),
        latent_scale=jnp.ones(()),
        climatology_mean=jnp.mean(bank),
        climatology_covariance=jnp.asarray(covariance_by_distance(run), jnp.float32),
        layout=Layout((SITES,), ("site",)),
        noise_range=NOISE_RANGE,
    )
    climatology = emulator.climatology()

    def mean_loss(network: RingMeanNetwork, rng_key: jax.Array) -> jax.Array:
        x = training_batch(rng_key, bank, climatology, batch)
        increment, _ = jax.vmap(network)((x - emulator.state_mean) / emulator.state_scale)
        return jnp.mean((increment - (lorenz96.flow(x) - x) / emulator.increment_scale) ** 2)

    network = optimize("mean network", mean_loss, emulator.mean_network, mean_key, steps, 5e-3, 1e-5)
    emulator = eqx.tree_at(lambda e: e.mean_network, emulator, network)
    left = lorenz96.draw(rms_key, bank) - jax.jit(jax.vmap(emulator.condition))(bank).mean
    emulator = eqx.tree_at(lambda e: e.latent_scale, emulator, rms(left))

    def residual_loss(network: RingResidualNetwork, rng_key: jax.Array) -> jax.Array:
        batch_key, draw_key, level_key, noise_key = jax.random.split(rng_key, 4)
        x = training_batch(batch_key, bank, climatology, batch)
        trained = eqx.tree_at(lambda e: e.residual_network, emulator, network)
        conditioning = jax.vmap(trained.condition)(x)
        z = (lorenz96.draw(draw_key, x) - conditioning.mean) / emulator.latent_scale
        low, high = np.log(NOISE_RANGE)
        level = jnp.exp(jax.random.uniform(level_key, (batch,), minval=low, maxval=high))
        z_s = z + level[:, None] * jax.random.normal(noise_key, z.shape)
        denoised = jax.vmap(trained.denoise)(z_s, level, conditioning)
        return jnp.mean((1.0 + 1.0 / level[:, None] ** 2) * (denoised - z) ** 2)

    start = emulator.residual_network
    network = optimize("residual network", residual_loss, start, residual_key, steps // 2, 2e-3, 1e-2)
    return eqx.tree_at(lambda e: e.residual_network, emulator, network)


def rms(values: jax.Array) -> jax.Array:
    """Root mean square of all values."""
    return jnp.sqrt(jnp.mean(values**2))


def emulator_draw(emulator: RingEmulator, num_levels: int = 16) -> Transition:
    """Transition of the emulator with the default sampler and a given number of noise levels."""
    sampler = Sampler(DPMSolverPP2M(), KarrasSchedule(num_levels))

    def one(rng_key: jax.Array, x: jax.Array) -> jax.Array:
        return DiffusionDynamics(emulator, emulator.condition(x), sampler).draw(rng_key)[0]

    return lambda rng_key, x: jax.vmap(one)(jax.random.split(rng_key, len(x)), x)


def one_step(
    mean_of: Callable[[jax.Array], jax.Array],
    transitions: dict[str, Transition],
    climatology: Any,
    rng_key: jax.Array,
    states: int,
    members: int,
) -> dict[str, Any]:
    """Score the mean, the spread and the CRPS of the next state, for the emulator and for the true system.

    Both are scored against the same truths. `crps_standard_error` is the standard error of the difference of their
    CRPS.

    Args:
        mean_of: function from states, shape (states, sites), to the conditional means of the next ones.
        transitions: transition of the emulator, under the name "emulator", and others by name, for their spread.
        climatology: Gaussian distribution of states.
        rng_key: random key.
        states: number of states.
        members: number of members for each.
    """
    import scoringrules

    run_key, truth_key, own_key, true_key, climatology_key = jax.random.split(rng_key, 5)
    steps = 16
    x = long_run(run_key, lorenz96.draw, max(states // steps, 1), 10 * steps)[::10].reshape(-1, SITES)
    mean = mean_of(x)
    truth = lorenz96.draw(truth_key, x)
    start = climatology.sample(climatology_key, (len(x),))
    scores, ratios = {}, {}
    keys = dict.fromkeys(transitions, own_key) | {"truth": true_key}
    for label, transition in {**transitions, "truth": lorenz96.draw}.items():
        key = keys[label]
        draws = jax.jit(jax.vmap(transition, (0, None)))(jax.random.split(key, members), x)
        scores[label] = np.asarray(
            scoringrules.crps_ensemble(np.asarray(truth), np.asarray(jnp.moveaxis(draws, 0, -1)), estimator="fair")
        )
        spread = jnp.sqrt((members + 1) / members * jnp.mean(jnp.var(draws, axis=0, ddof=1)))
        ratios[label] = float(spread / rms(draws.mean(0) - truth))
    difference = (scores["emulator"] - scores["truth"]).mean(1)
    persistence = rms(lorenz96.flow(x) - x)
    by_state = jnp.sqrt(jnp.mean((mean - lorenz96.flow(x)) ** 2, axis=1)) / persistence
    return {
        "states": len(x),
        "members": members,
        "persistence_error": float(persistence),
        "mean_error": float(rms(mean - lorenz96.flow(x))),
        "mean_error_relative_to_persistence": float(rms(mean - lorenz96.flow(x)) / persistence),
        "mean_error_of_a_state_relative_to_persistence": {
            f"quantile_{q}": float(jnp.quantile(by_state, q)) for q in (0.5, 0.9, 0.99, 1.0)
        },
        "mean_error_relative_to_noise": float(rms(mean - lorenz96.flow(x)) / lorenz96.NOISE_VARIANCE**0.5),
        "mean_error_from_climatology_relative_to_persistence": float(
            rms(mean_of(start) - lorenz96.flow(start)) / rms(lorenz96.flow(start) - start)
        ),
        "crps_fair": float(scores["emulator"].mean()),
        "crps_fair_true_system": float(scores["truth"].mean()),
        "crps_ratio": float(scores["emulator"].mean() / scores["truth"].mean()),
        "crps_standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else None,
        "spread_error_ratio": ratios.pop("emulator"),
        "spread_error_ratio_true_system": ratios.pop("truth"),
        **{f"spread_error_ratio_{label}": ratio for label, ratio in ratios.items()},
    }


def jacobians(emulator: RingEmulator, rng_key: jax.Array, states: int) -> list[dict[str, float]]:
    """Measure the Jacobian J = dD/dz_s at a few noise levels; every measure is the worst one over `states` states.

    - `asymmetry` is |J - J^T| / |J|.
    - `smallest_over_largest_eigenvalue` is a ratio of eigenvalues of the symmetrized J.
    - `covariance_error` is |s^2 S^2 J - V| / |V|, where V = (1/Q + 1/(s S)^2)^-1 I is the covariance of the next state
      given z_s in the true system, and Q is the noise variance of the true system.
    """
    run_key, draw_key, noise_key = jax.random.split(rng_key, 3)
    x = long_run(run_key, lorenz96.draw, states, 1)[0]
    conditioning = jax.vmap(emulator.condition)(x)
    z = (lorenz96.draw(draw_key, x) - conditioning.mean) / emulator.latent_scale
    e = jax.random.normal(noise_key, z.shape)
    rows = []
    for level in CHECK_LEVELS:
        s = jnp.asarray(level, z.dtype)
        matrices = jax.jit(jax.vmap(jax.jacrev(emulator.denoise), (0, None, 0)))(z + s * e, s, conditioning)
        j = np.asarray(matrices, dtype=np.float64)
        transposed = np.swapaxes(j, 1, 2)
        size = np.linalg.norm(j, axis=(1, 2))
        values = np.linalg.eigvalsh(0.5 * (j + transposed))
        scale = float(emulator.latent_scale)
        exact = 1.0 / (1.0 / lorenz96.NOISE_VARIANCE + 1.0 / (level * scale) ** 2)
        error = (level * scale) ** 2 * j - exact * np.eye(SITES)
        rows.append(
            {
                "noise_level": level,
                "asymmetry": float(np.max(np.linalg.norm(j - transposed, axis=(1, 2)) / size)),
                "smallest_over_largest_eigenvalue": float(np.min(values[:, 0] / values[:, -1])),
                "covariance_error": float(np.max(np.linalg.norm(error, axis=(1, 2)) / (exact * SITES**0.5))),
            }
        )
    return rows


def climate(run: jax.Array) -> dict[str, Any]:
    """Compute climate statistics of a long run of shape (steps, rings, sites)."""
    x = np.asarray(run, dtype=np.float64)
    anomaly = x - x.mean()
    energy = np.mean(np.abs(np.fft.rfft(x, axis=-1)) ** 2, axis=(0, 1)) / SITES**2
    return {
        "mean": float(x.mean()),
        "standard_deviation": float(x.std()),
        "largest_magnitude": float(np.abs(x).max()),
        "skewness": float(np.mean(anomaly**3) / x.std() ** 3),
        "covariance_of_neighbors": float(np.mean(anomaly * np.roll(anomaly, 1, axis=-1))),
        "correlation_of_successive_steps": float(np.mean(anomaly[1:] * anomaly[:-1]) / x.var()),
        "energy_by_wavenumber": [float(v) for v in energy],
    }


def rollout(transition: Transition, rng_key: jax.Array, rings: int, steps: int) -> dict[str, Any]:
    """Compare the climate of the emulator with two independent runs of the true system.

    The difference between the two runs of the true system is sampling error.
    """
    runs = {"emulator": transition, "true_system": lorenz96.draw, "true_system_again": lorenz96.draw}
    keys = jax.random.split(rng_key, len(runs))
    found = {label: climate(long_run(k, t, rings, steps)) for k, (label, t) in zip(keys, runs.items(), strict=True)}
    spectra = {label: np.array(c["energy_by_wavenumber"]) for label, c in found.items()}
    truth = spectra["true_system"]
    deviation = {k: float(np.max(np.abs(v / truth - 1.0))) for k, v in spectra.items() if k != "true_system"}
    return {"rings": rings, "steps": steps, **found, "largest_relative_spectrum_deviation": deviation}


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot hold and a barely trained emulator may produce, by None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main(
    out: Annotated[Path, typer.Option(help="folder for lorenz96.npz and lorenz96.json", callback=output_folder)] = Path(
        "lorenz96_emulator"
    ),
    seed: Annotated[int, typer.Option(help="seed of data, initial weights and training")] = 0,
    steps: Annotated[
        int, typer.Option(help="optimizer steps of the mean network; the residual network takes half as many")
    ] = 8000,
    channels: Annotated[int, typer.Option(help="features of each site in the mean network")] = 16,
    blocks: Annotated[int, typer.Option(help="residual blocks of the mean network")] = 4,
    hidden: Annotated[
        int, typer.Option(help="hidden units of the residual network, which runs at every noise level")
    ] = 16,
    rings: Annotated[int, typer.Option(help="independent runs of the true system for training")] = 1024,
    run_steps: Annotated[int, typer.Option(help="steps of each run after the spin-up")] = 128,
    batch: Annotated[int, typer.Option(help="states in each optimizer step")] = 128,
    check_states: Annotated[int, typer.Option(help="states of the one-step scores")] = 1024,
    check_members: Annotated[int, typer.Option(help="members of the one-step scores")] = 32,
    climate_rings: Annotated[int, typer.Option(help="rings of the long rollout")] = 32,
    climate_steps: Annotated[int, typer.Option(help="steps of the long rollout")] = 2000,
) -> None:
    """Train the Lorenz-96 emulator, measure it, and write its arrays and its card."""
    emulator = train(seed, steps, channels, blocks, hidden, rings, run_steps, batch)
    console = Console()
    # The checks have their own keys, so that they do not depend on the random draws of the training.
    score_key, jacobian_key, climate_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), 3)
    console.print("measuring one-step scores, Jacobians and climate")
    card = {
        "name": NAME,
        "system": system(),
        "training": {
            "data": f"{rings} runs of the true system from {lorenz96.FORCING} + N(0, I), {run_steps} steps of each "
            f"after a spin-up of {SPIN_UP}; a batch is half states of the runs, a quarter those with white noise of "
            "standard deviation 0 to 2.5, a quarter draws of the Gaussian climatology",
            "states": rings * run_steps,
            "mean_target": "flow(x), the conditional mean without its sampling noise",
            "residual_target": "draws of the next state, noised at levels log-uniform over the noise range",
            "seed": seed,
            "optimizer_steps": {"mean_network": steps, "residual_network": steps // 2},
            "batch": batch,
            "script": "examples/train_lorenz96.py",
        },
        "architecture": {
            "channels": channels,
            "blocks": blocks,
            "hidden": hidden,
            "parameters": {
                "mean_network": sum(x.size for x in jax.tree.leaves(emulator.mean_network)),
                "residual_network": sum(x.size for x in jax.tree.leaves(emulator.residual_network)),
            },
        },
        "latent_scale": float(emulator.latent_scale),
        "sampler": "DPM-Solver++(2M), 16 noise levels",
        # The spread with 64 levels shows which part of the error comes from the discretization of the sampler.
        "one_step": one_step(
            jax.jit(lambda x: jax.vmap(emulator.condition)(x).mean),
            {"emulator": emulator_draw(emulator), "64_levels": emulator_draw(emulator, 64)},
            emulator.climatology(),
            score_key,
            check_states,
            check_members,
        ),
        "jacobian": jacobians(emulator, jacobian_key, 16),
        "climate": rollout(emulator_draw(emulator), climate_key, climate_rings, climate_steps),
        "versions": versions(),
    }
    save_ring_emulator(emulator, finite(card), out, NAME)
    console.print(summary(card))
    console.print(f"{out / NAME}.npz, sha256 {read_ring_emulator(out, NAME, SITES).checksum}")


def system() -> dict[str, Any]:
    """Describe the true system, for a card."""
    return {
        "equation": "x' = flow(x) + N(0, noise_variance I); dx_i/dt = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + forcing",
        "sites": SITES,
        "forcing": lorenz96.FORCING,
        "step": lorenz96.STEP,
        "noise_variance": lorenz96.NOISE_VARIANCE,
        "integrator": f"classical fourth-order Runge-Kutta, {lorenz96.SUBSTEPS} steps of "
        f"{lorenz96.STEP / lorenz96.SUBSTEPS} time units",
        "unit": "dimensionless",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that made an emulator, for a card."""
    packages = ("jax", "equinox", "optax", "numpy", "scoringrules")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def summary(card: dict[str, Any]) -> Table:
    """Make a table of the main numbers of a card."""
    summary = Table("one step, 40 sites", "emulator", "true system")
    scores = card["one_step"]
    summary.add_row("conditional-mean error / persistence", f"{scores['mean_error_relative_to_persistence']:.4f}", "0")
    summary.add_row("fair CRPS", f"{scores['crps_fair']:.4f}", f"{scores['crps_fair_true_system']:.4f}")
    ratios = (scores["spread_error_ratio"], scores["spread_error_ratio_true_system"])
    summary.add_row("spread / error", *(f"{v:.3f}" for v in ratios))
    for key in ("mean", "standard_deviation", "covariance_of_neighbors"):
        pair = [card["climate"][label][key] for label in ("emulator", "true_system")]
        summary.add_row(f"climate: {key.replace('_', ' ')}", *(f"{v:.3f}" for v in pair))
    return summary


if __name__ == "__main__":
    typer.run(main)
