"""Train the emulator of the mini weather on the data of generate.py.

    pip install "numpyro-diffusion-da[train]"
    python examples/mini_weather/train.py --data weather_data --out weather_emulator

The stages are, in this order:

1. Fit the linear forecast by least squares.
2. Train a network that corrects the linear forecast, by area-weighted least squares.
3. Calibrate the factors that make free runs of this forecast keep the climate (damping.py).
4. Estimate the covariance of the residuals. Its scale is that of the validation run.
5. With --correction, train a network that corrects the denoiser, by denoising score matching. It lowers the loss by
   0.03 %, and a pass costs three times as much. The emulator that ships does not have it.

Networks are exponential moving averages over the steps of the optimizer. Every --save-every steps and after every free
run, the intermediate result is written to --out. If the script is called again, it resumes from there.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import damping
import data
import equinox as eqx
import jax
import jax.numpy as jnp
import linear
import numpy as np
import optax
import typer

from numpyro_diffusion_da.priors import (
    SphericalEmulator,
    SphericalMeanNetwork,
    SphericalResidualNetwork,
    ZonalOperator,
    save_spherical_emulator,
)

NAME = "held_suarez"
NOISE_RANGE = (0.02, 80.0)
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2)


def by_variable(error: np.ndarray, change: np.ndarray, winds: int) -> np.ndarray:
    """Relative errors of variables, from sums of squares by channel. The two channels of a wind are added first.

    Args:
        error: squared errors by channel.
        change: squared changes by channel, which are the errors of persistence.
        winds: number of winds.
    """
    scalars = len(error) - 2 * winds

    def add(x: np.ndarray) -> np.ndarray:
        """Sum of the two channels of each wind, after the scalars."""
        return np.concatenate([x[:scalars], x[scalars : scalars + winds] + x[scalars + winds :]])

    return np.sqrt(add(error) / add(change))


def squares(difference: np.ndarray) -> np.ndarray:
    """Sum of squared coefficients of each channel, averaged over samples."""
    return np.mean(np.sum(np.asarray(difference, np.float64) ** 2, axis=(1, 2, 3)), axis=0)


def rms_of_channels(total: np.ndarray, scalars: int) -> np.ndarray:
    """Root mean squares of channels from the result of `squares`.

    Both channels of a wind get the same value, so that scaling commutes with rotation of the wind.
    """
    wind = 0.5 * total[scalars:].reshape(2, -1).sum(0)
    return np.sqrt(np.concatenate([total[:scalars], wind, wind]))


class Optimization:
    """Training by AdamW with warm-up and cosine decay, averaged weights, and a file from which it can resume.

    Args:
        path: file of the state of the optimization.
        steps: number of optimizer steps.
        rate: largest learning rate.
        seed: seed of batches and random numbers of the loss.
    """

    def __init__(self, path: Path, steps: int, rate: float, seed: int) -> None:
        self.path, self.steps, self.seed, self.done = path, steps, seed, 0
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(steps // 20, 1), max(steps, 2))
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4))

    def run(
        self,
        model: Any,
        loss: Callable[[Any, jax.Array, Any], jax.Array],
        batch: Callable[[np.random.Generator], Any],
        save_every: int,
        check: Callable[[Any], str],
        minutes: float,
    ) -> Any:
        """Train a model and return its averaged weights.

        Args:
            model: initial model.
            loss: function (model, rng_key, batch) -> loss.
            batch: function that draws a batch with a random generator.
            save_every: number of steps between saves and progress messages.
            check: function that describes the skill of a model in a progress message.
            minutes: time limit in minutes. A later call resumes.
        """
        if not self.steps:
            return model
        state = self.optimizer.init(model)
        average, spent = model, 0.0
        if self.path.exists():
            leaves, self.done, spent = pickle.loads(self.path.read_bytes())
            structure = jax.tree.structure((model, state, average))
            model, state, average = jax.tree.unflatten(structure, [jnp.asarray(x) for x in leaves])

        @jax.jit
        def update(model: Any, state: Any, average: Any, step: jax.Array, given: Any) -> tuple[Any, ...]:
            key = jax.random.fold_in(jax.random.key(self.seed), step)
            value, gradient = jax.value_and_grad(loss)(model, key, given)
            change, state = self.optimizer.update(gradient, state, model)
            model = optax.apply_updates(model, change)
            decay = jnp.minimum(0.999, (1.0 + step) / (10.0 + step))
            average = jax.tree.map(lambda a, x: decay * a + (1.0 - decay) * x, average, model)
            return model, state, average, value

        began, values = time.time(), []
        for step in range(self.done, self.steps):
            given = batch(np.random.default_rng((self.seed, step)))
            model, state, average, value = update(model, state, average, jnp.asarray(step), given)
            values.append(value)
            self.done = step + 1
            late = time.time() - began > 60.0 * minutes
            if self.done % save_every == 0 or self.done == self.steps or late:
                elapsed = spent + time.time() - began
                leaves = [np.asarray(x) for x in jax.tree.leaves((model, state, average))]
                self.path.write_bytes(pickle.dumps((leaves, self.done, elapsed)))
                mean = float(np.mean(values))
                print(f"{self.done} steps, {elapsed / 60:.1f} min: loss {mean:.4f}; {check(average)}", flush=True)
                values = []
            if late:
                print(f"stopped after {minutes} minutes; call the script again to resume", flush=True)
                break
        return average


def main(
    data_folder: Annotated[Path, typer.Option("--data", help="folder that generate.py wrote")] = Path("weather_data"),
    out: Annotated[Path, typer.Option(help="folder for the emulator and for intermediate results")] = Path(
        "weather_emulator"
    ),
    seed: Annotated[int, typer.Option(help="seed of initial weights and batches")] = 0,
    stages: Annotated[int, typer.Option(help="number of corrections of the linear forecast, 0 for none")] = 2,
    hidden: Annotated[int, typer.Option(help="number of products of each kind at a grid point")] = 32,
    input_noise: Annotated[
        float, typer.Option(help="size of errors added to the inputs of the mean network, relative to errors of a step")
    ] = 0.5,
    rounds: Annotated[int, typer.Option(help="number of free runs for the calibration of the damping", min=1)] = 18,
    members: Annotated[int, typer.Option(help="number of members of each free run")] = 32,
    days: Annotated[int, typer.Option(help="length of each free run in days")] = 120,
    correction: Annotated[int, typer.Option(help="hidden units of the denoiser's correction, 0 for none")] = 0,
    steps: Annotated[int, typer.Option(help="optimizer steps of the mean network")] = 5000,
    residual_steps: Annotated[int, typer.Option(help="optimizer steps of the denoiser's correction")] = 3000,
    batch: Annotated[int, typer.Option(help="number of states in each optimizer step")] = 8,
    rate: Annotated[float, typer.Option(help="largest learning rate")] = 2e-3,
    rank: Annotated[int, typer.Option(help="number of eigenvectors of a covariance for each wavenumber")] = 198,
    shrinkage: Annotated[float, typer.Option(help="weight of the diagonal in covariances")] = 0.002,
    shards: Annotated[int | None, typer.Option(help="number of shards of the training runs; all by default")] = None,
    save_every: Annotated[int, typer.Option(help="optimizer steps between saves")] = 500,
    minutes: Annotated[float, typer.Option(help="time limit for each network in this call")] = 1e9,
) -> None:
    """Train the emulator and write its files."""
    out.mkdir(parents=True, exist_ok=True)
    known = data.statistics(data_folder, shards)
    h = known.noise.harmonics
    train = data.trajectories(data_folder, "train", known, shards)
    check = data.trajectories(data_folder, "validation", known, shards)

    def pairs(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape = h.coefficients_shape
        return x[:, :-1].reshape(-1, *shape), x[:, 1:].reshape(-1, *shape)

    before, after = pairs(train)
    check_before, check_after = pairs(check)
    change = squares(check_after - check_before)
    print(f"{len(before)} pairs of states for training, {len(check_before)} for validation", flush=True)

    propagate = jax.jit(lambda operator, y: jax.lax.map(operator.on_coefficients, y))

    def linear_error(operator: ZonalOperator) -> np.ndarray:
        left = squares(np.asarray(propagate(operator, check_before)) - check_after)
        return by_variable(left, change, h.num_winds)

    fits = linear.linear_forecasts(before, after, h, RIDGES)
    errors = [linear_error(fit) for fit in fits]
    best = int(np.argmin([np.mean(e) for e in errors]))
    propagator = fits[best]
    linear_left = after - np.asarray(propagate(propagator, before))
    print(f"error of linear forecast / persistence, ridge {RIDGES[best]:g}: {np.round(errors[best], 3)}", flush=True)

    start = SphericalMeanNetwork.init(jax.random.key(seed), h, propagator, stages, hidden)
    # The loss weights both channels of a wind alike.
    both = change.copy()
    both[h.num_scalars :] = np.tile(change[h.num_scalars :].reshape(2, -1).sum(0), 2)
    weight = jnp.asarray(1.0 / both, jnp.float32)
    reflection = jnp.asarray(h.reflection, jnp.float32)[None]

    # The propagator is already optimal, and the damping is calibrated afterwards. Only the other weights are trained.
    def fixed_parts(network: SphericalMeanNetwork) -> tuple[Any, Any]:
        return network.propagator, network.damping

    def whole(rest: SphericalMeanNetwork) -> SphericalMeanNetwork:
        return eqx.tree_at(fixed_parts, rest, fixed_parts(start), is_leaf=lambda x: x is None)

    def mean_batch(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        index, other = generator.integers(len(before), size=(2, batch))
        # Add errors of other times to the inputs, so that the network learns to return from the states of free runs.
        return before[index] + input_noise * linear_left[other], after[index], generator.random(batch) < 0.5

    def mean_loss(network: SphericalMeanNetwork, rng_key: jax.Array, given: Any) -> jax.Array:
        def one(y: jax.Array, target: jax.Array, mirrored: jax.Array) -> jax.Array:
            sign = jnp.where(mirrored, reflection, 1.0)
            forecast, _ = whole(network)(sign * y, h)
            return jnp.sum(jnp.sum((forecast - sign * target) ** 2, axis=(0, 1, 2)) * weight)

        return jnp.mean(jax.vmap(one)(*given)) / (h.num_scalars + h.num_winds)

    forecasts = jax.jit(lambda network, y: jax.lax.map(lambda y: network(y, h)[0], y))

    def run_mean(network: SphericalMeanNetwork, y: np.ndarray) -> np.ndarray:
        return np.asarray(forecasts(network, y))

    sample = np.linspace(0, len(check_before) - 1, min(96, len(check_before))).astype(int)

    def mean_check(network: SphericalMeanNetwork) -> str:
        left = squares(run_mean(whole(network), check_before[sample]) - check_after[sample])
        ratio = by_variable(left, squares(check_after[sample] - check_before[sample]), h.num_winds)
        return f"validation error / persistence {np.sqrt(np.mean(ratio**2)):.3f} {np.round(ratio, 3)}"

    fitting = Optimization(out / "mean.pickle", steps if stages else 0, rate, seed)
    rest = eqx.tree_at(fixed_parts, start, (None, None))
    network = whole(fitting.run(rest, mean_loss, mean_batch, save_every, mean_check, minutes))
    mean, check_mean = (run_mean(network, x) for x in (before, check_before))
    if stages:
        left, check_left = after - mean, check_after - check_mean
        own, found = (rms_of_channels(squares(x), h.num_scalars) for x in (left, check_left))
        undamped = jax.jit(lambda g, y: jax.lax.map(lambda y: network(y, h)[0] * g[None], y))
        factors = damping.calibrated(
            lambda g, y: np.asarray(undamped(g.astype(np.float32), y)),
            before[np.linspace(0, len(before) - 1, members).astype(int)],
            left * (found / own).astype(np.float32),
            damping.variance(before),
            # The file name contains the number of training steps, because the factors depend on the network.
            path=out / f"damping_{fitting.done}.npy",
            rounds=rounds,
            days=days,
            seed=seed,
        ).astype(np.float32)
        network = eqx.tree_at(lambda n: n.damping, network, jnp.asarray(factors))
        mean, check_mean = factors * mean, factors * check_mean
    check_left = check_after - check_mean
    error = by_variable(squares(check_left), change, h.num_winds)
    print(f"error of mean network / persistence: {np.round(error, 3)}", flush=True)

    left = after - mean
    latent = rms_of_channels(squares(check_left), h.num_scalars).astype(np.float32)
    amplitude = known.noise.amplitude()[None, None, None]
    own = rms_of_channels(squares(left), h.num_scalars)
    zeta = (left / own / amplitude).astype(np.float32)
    climate = before / amplitude
    emulator = SphericalEmulator(
        mean_network=network,
        gaussian=linear.gaussian(zeta, h, rank, shrinkage),
        residual_network=SphericalResidualNetwork.init(jax.random.key(seed + 1), h, correction),
        state_mean=jnp.asarray(known.state_mean),
        state_scale=jnp.asarray(known.state_scale),
        latent_scale=jnp.asarray(latent) * jnp.asarray(known.state_scale),
        climate=linear.gaussian(climate, h, rank, shrinkage),
        noise=known.noise,
        layout=known.layout,
        noise_range=NOISE_RANGE,
    )

    power = jnp.asarray(known.noise.amplitude() ** 2, jnp.float32)[None, None]

    def residual_batch(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        index = generator.integers(len(before), size=batch)
        low, high = np.log(NOISE_RANGE[0]), np.log(NOISE_RANGE[1])
        # The levels of a batch are spread evenly over the range, with a common random shift.
        level = np.exp(low + (high - low) * ((np.arange(batch) + generator.random()) / batch))
        return before[index], zeta[index], level.astype(np.float32), generator.random(batch) < 0.5

    def denoising_losses(network: SphericalResidualNetwork, rng_key: jax.Array, given: Any) -> jax.Array:
        trained = eqx.tree_at(lambda e: e.residual_network, emulator, network)

        def one(key: jax.Array, y: jax.Array, z: jax.Array, level: jax.Array, mirrored: jax.Array) -> jax.Array:
            sign = jnp.where(mirrored, reflection, 1.0)
            _, features = trained.mean_network(sign * y, h)
            noisy = sign * z + level * jax.random.normal(key, z.shape)
            noisy = noisy * jnp.asarray(h.mask, z.dtype)
            found = trained.denoise_coefficients(noisy, level, network.terms(features))
            return (1.0 + 1.0 / level**2) * jnp.sum(power * (found - sign * z) ** 2) / h.num_channels

        return jax.vmap(one)(jax.random.split(rng_key, len(given[0])), *given)

    def residual_loss(network: SphericalResidualNetwork, rng_key: jax.Array, given: Any) -> jax.Array:
        return jnp.mean(denoising_losses(network, rng_key, given))

    check_zeta = (check_left / latent / amplitude).astype(np.float32)
    levels = np.geomspace(*NOISE_RANGE, len(sample)).astype(np.float32)
    fixed = (check_before[sample], check_zeta[sample], levels, np.zeros(len(sample), bool))
    score = jax.jit(denoising_losses)

    def residual_check(network: SphericalResidualNetwork) -> str:
        now = np.asarray(score(network, jax.random.key(9), fixed))
        start = np.asarray(score(emulator.residual_network, jax.random.key(9), fixed))
        return f"validation loss {now.mean():.4f}, with the Gaussian denoiser alone {start.mean():.4f}"

    fitting = Optimization(out / "residual.pickle", residual_steps if correction else 0, rate, seed + 1)
    found = fitting.run(emulator.residual_network, residual_loss, residual_batch, save_every, residual_check, minutes)
    emulator = eqx.tree_at(lambda e: e.residual_network, emulator, found)

    card = {
        "name": NAME,
        "system": json.loads((data_folder / "data.json").read_text())["model"],
        "training": {
            "pairs": len(before),
            "seed": seed,
            "optimizer_steps": {
                "mean_network": steps if stages else 0,
                "residual_network": residual_steps if correction else 0,
            },
            "batch": batch,
            "stages": stages,
            "hidden": hidden,
            "input_noise": input_noise,
            "correction": correction,
            "ridge": RIDGES[best],
            "shrinkage": shrinkage,
            "script": "examples/mini_weather/train.py",
        },
        "one_step_mean_error_relative_to_persistence": [float(v) for v in error],
        "linear_forecast_error_relative_to_persistence": [float(v) for v in errors[best]],
    }
    save_spherical_emulator(emulator, card, out, NAME)
    print(f"{out / NAME}.npz: {(out / f'{NAME}.npz').stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    typer.run(main)
