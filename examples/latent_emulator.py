"""Filter a field through an emulator of its latent space: the carry is latent, the decoder is in the observation.

    pip install "numpyro-diffusion-da[train]"
    python examples/latent_emulator.py

The truth is a field of 32 points that a chaotic system of three variables (Lorenz-63, with noise) drives. The script
trains an autoencoder of the field with four latent variables, and a forecast of them one step ahead. The errors of this
forecast on states that were not used in training give its stated error: it becomes a `DeterministicPrior`. The program
carries the latent state, observes the decoded field, and records it as a deterministic site, so that the result holds
fields. Eight points of the field are observed.
"""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import typer
from numpyro.contrib.control_flow import scan
from rich.console import Console
from rich.table import Table

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import FactorNoise
from numpyro_diffusion_da.priors import DeterministicPrior

POINTS, LATENT, OBSERVED = 32, 4, slice(None, None, 4)
ERROR = 0.2
STEP = 0.1
NOISE = 0.3


def trajectory(rng_key: jax.Array, steps: int) -> jax.Array:
    """Fields of the truth, shape (steps, points), after 100 steps of spin-up."""

    def tendency(x: jax.Array) -> jax.Array:
        return jnp.stack([10.0 * (x[1] - x[0]), x[0] * (28.0 - x[2]) - x[1], x[0] * x[1] - 8.0 / 3.0 * x[2]])

    def step(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(10):  # Runge-Kutta steps of a tenth
            h = STEP / 10
            k1 = tendency(x)
            k2 = tendency(x + 0.5 * h * k1)
            k3 = tendency(x + 0.5 * h * k2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + tendency(x + h * k3))
        x = x + NOISE * jax.random.normal(key, (3,))
        return x, x

    _, states = jax.lax.scan(step, jnp.array([1.0, 1.0, 25.0]), jax.random.split(rng_key, 100 + steps))
    a, b, c = ((states[100:] - jnp.array([[0.0, 0.0, 23.5]])) / jnp.array([[8.0, 9.0, 8.6]])).T
    s = jnp.linspace(0.0, 2 * jnp.pi, POINTS, endpoint=False)[None]
    a, b, c = a[:, None], b[:, None], c[:, None]
    return a * jnp.cos(s) + b * jnp.sin(s) * jnp.tanh(c) + c * jnp.cos(2 * s) + 0.3 * a * b * jnp.sin(3 * s)


def mlp(rng_key: jax.Array, sizes: tuple[int, ...]) -> list[tuple[jax.Array, jax.Array]]:
    """Initial weights and biases of a dense network."""
    keys = jax.random.split(rng_key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [(jax.random.normal(key, (n, m)) / m**0.5, jnp.zeros(n)) for key, m, n in pairs]


def apply(layers: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    """Run a dense network on one vector."""
    *hidden, (weights, bias) = layers
    for w, b in hidden:
        x = jnp.tanh(w @ x + b)
    return weights @ x + bias


def fit(loss: Any, parameters: Any, rng_key: jax.Array, data: jax.Array, steps: int) -> Any:
    """Minimize `loss(parameters, batch)` over random batches of the leading axis of `data`, by Adam."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def update(carry: Any, key: jax.Array) -> tuple[Any, None]:
        parameters, state = carry
        gradient = jax.grad(loss)(parameters, data[jax.random.randint(key, (128,), 0, len(data))])
        change, state = optimizer.update(gradient, state)
        return (optax.apply_updates(parameters, change), state), None

    start = (parameters, optimizer.init(parameters))
    return jax.jit(lambda: jax.lax.scan(update, start, jax.random.split(rng_key, steps))[0][0])()


def train(rng_key: jax.Array, steps: int, states: int) -> tuple[Any, DeterministicPrior]:
    """Train the autoencoder and the latent forecast; return the decoder's parameters and the prior."""
    keys = jax.random.split(rng_key, 6)
    fields = trajectory(keys[0], states)
    start = {"encoder": mlp(keys[1], (POINTS, 48, LATENT)), "decoder": mlp(keys[2], (LATENT, 48, POINTS))}

    def reconstruction(p: Any, batch: jax.Array) -> jax.Array:
        latent = jax.vmap(lambda x: apply(p["encoder"], x))(batch)
        decoded = jax.vmap(lambda z: apply(p["decoder"], z))(latent)
        # The latent variables are kept at unit size, so that a forecast of them is well scaled.
        return jnp.mean((decoded - batch) ** 2) + 1e-3 * jnp.mean((jnp.mean(latent**2, 0) - 1.0) ** 2)

    trained = fit(reconstruction, start, keys[3], fields, steps)
    latent = jax.vmap(lambda x: apply(trained["encoder"], x))(fields)
    pairs = jnp.stack([latent[:-1], latent[1:]], axis=1)
    used, kept = pairs[: -states // 4], pairs[-states // 4 :]

    def forecast_error(p: Any, batch: jax.Array) -> jax.Array:
        return jnp.mean((jax.vmap(lambda z: z + apply(p, z))(batch[:, 0]) - batch[:, 1]) ** 2)

    forecast = fit(forecast_error, mlp(keys[4], (LATENT, 64, 64, LATENT)), keys[5], used, steps)
    errors = np.asarray(kept[:, 1] - jax.vmap(lambda z: z + apply(forecast, z))(kept[:, 0]))
    factor = jnp.asarray(np.linalg.cholesky(np.cov(errors.T)), jnp.float32)
    covariance = jnp.asarray(np.cov(np.asarray(latent).T), jnp.float32)
    prior = DeterministicPrior(
        apply,
        parameters=forecast,
        layout=ndda.Layout((LATENT,), ("latent",)),
        scale=1.0,
        noise=FactorNoise(factor),
        residual=True,
        climatology=dist.MultivariateNormal(jnp.mean(latent, 0), covariance),
    )
    return trained["decoder"], prior


def program(prior: DeterministicPrior, decoder: Any) -> Any:
    """State-space model whose state is latent, and whose observations are of the decoded field."""

    def model(y: jax.Array) -> None:
        z = numpyro.sample("z0", prior.climatology())

        def step(z: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            z = numpyro.sample("z", ndda.OnePassTransition(prior, z))
            field = numpyro.deterministic("field", apply(decoder, z))
            numpyro.sample("y", dist.Normal(field[OBSERVED], ERROR).to_event(1), obs=y_t)
            return z, None

        scan(step, z, y)

    return model


def main(
    steps: Annotated[int, typer.Option(help="optimizer steps of each network", min=10)] = 6000,
    states: Annotated[int, typer.Option(help="states of the training run", min=100)] = 8000,
    cycles: Annotated[int, typer.Option(help="filter steps", min=20)] = 200,
    particles: Annotated[int, typer.Option(help="particles of each filter", min=2)] = 128,
    seed: Annotated[int, typer.Option(help="seed")] = 0,
) -> dict[str, dict[str, float]]:
    """Train the networks, filter a truth with three filters, and print the error of the decoded field."""
    train_key, truth_key, error_key, run_key = jax.random.split(jax.random.key(seed), 4)
    decoder, prior = train(train_key, steps, states)
    truth = np.asarray(trajectory(truth_key, cycles))
    y = truth[:, OBSERVED] + ERROR * np.asarray(jax.random.normal(error_key, truth[:, OBSERVED].shape))
    model = program(prior, decoder)
    free = np.full_like(y, np.nan)
    scores = {}
    for name, algorithm, given in (
        ("free ensemble", ndda.Bootstrap(model), free),
        ("EnKF", ndda.EnKF(model), y),
        ("FA-APF, moved", ndda.FAAPF(model, weight=ndda.Moment(), move=True), y),
    ):
        run = ndda.Filter(algorithm, num_particles=particles, progress_bar=False)
        run.run(run_key, given)
        # The deterministic site is in the result beside the latent state.
        fields = run.to_datatree()["posterior/field"].values[0, :, cycles // 5 :]
        kept = truth[cycles // 5 :]
        scores[name] = {
            "RMSE": ndda.diagnostics.rmse(fields, kept),
            "spread/skill": ndda.diagnostics.spread_skill(fields, kept),
        }
    table = Table("filter", "RMSE of the field", "spread/skill", title=f"{POINTS} points, {LATENT} latent variables")
    for name, row in scores.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    Console().print(table)
    return scores


if __name__ == "__main__":
    typer.run(main)
