"""State-space model of the mini weather with its true dynamics, for filters that only sample the dynamics.

A state contains the fields of the true model on all of its layers (`Atmosphere.fields`). An ensemble Kalman filter with
this model therefore has more information than a filter with the emulator, whose state has three levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from atmosphere import Atmosphere
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.contrib.control_flow import scan

from numpyro_diffusion_da.fields import Layout
from numpyro_diffusion_da.observation import ObservingNetwork


class Archive(dist.Distribution):
    """Distribution that draws one of given states with equal probability.

    Args:
        states: the states, with a leading axis.
    """

    support = dist.constraints.independent(dist.constraints.real, 3)

    def __init__(self, states: Float[Array, "archived latitude longitude channel"]) -> None:
        self.states = states
        super().__init__(batch_shape=(), event_shape=states.shape[1:])

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw states, shape (*sample_shape, latitude, longitude, channel)."""
        return self.states[jax.random.randint(key, sample_shape, 0, len(self.states))]


class TrueTransition(dist.Distribution):
    """Distribution of the state 12 hours later, with the random increments of the true system.

    Args:
        atmosphere: the true system.
        fields: previous state, as fields on the grid.
        like: a state of the model, from `stored_states`.
    """

    support = dist.constraints.independent(dist.constraints.real, 3)

    def __init__(self, atmosphere: Atmosphere, fields: Float[Array, "latitude longitude channel"], like: Any) -> None:
        self.atmosphere, self.fields, self.like = atmosphere, fields, like
        super().__init__(batch_shape=(), event_shape=fields.shape)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw one state.

        Raises:
            NotImplementedError: `sample_shape` is not empty.
        """
        if sample_shape:
            raise NotImplementedError(
                f"TrueTransition got sample_shape={sample_shape}, but draws one state at a time; use jax.vmap over "
                "keys."
            )
        before = self.atmosphere.state(self.fields, self.like)
        return self.atmosphere.fields(self.atmosphere.transition(key, before))


def stored_states(folder: Path, split: str, atmosphere: Atmosphere) -> tuple[np.ndarray, Any]:
    """Read the states of the true model that generate.py stored at the end of every shard.

    Args:
        folder: folder that generate.py wrote.
        split: name of the split.
        atmosphere: the true system.

    Returns:
        (fields, shape (run, shard, latitude, longitude, channel); one state of the model, for its structure).
    """
    pattern = atmosphere.start(jax.random.key(0))
    structure = jax.tree.structure(pattern)
    fields = jax.jit(lambda state: jax.lax.map(atmosphere.fields, state))
    found = []
    for path in sorted(folder.glob(f"{split}_*.npz")):
        with np.load(path) as shard:
            leaves = [jnp.asarray(shard[f"state_{i}"]) for i in range(structure.num_leaves)]
        found.append(np.asarray(fields(jax.tree.unflatten(structure, leaves))))
    return np.stack(found, axis=1), pattern


def on_layout(
    atmosphere: Atmosphere, fields: Float[Array, "latitude longitude channel"], layout: Layout
) -> Float[Array, "latitude longitude channel"]:
    """Convert a state on all layers to the emulator's state, with temperature and winds on their pressure levels."""
    levels = tuple(sorted({level for variable in layout.variables for level in variable.levels}))
    pressure, *profiles = jnp.split(atmosphere.on_levels(fields, levels), 1 + len(levels) * np.arange(3), axis=-1)
    with_levels = [variable.levels for variable in layout.variables if variable.levels]
    chosen = [p[..., [levels.index(k) for k in own]] for p, own in zip(profiles, with_levels, strict=True)]
    return jnp.concatenate([pressure, *chosen], axis=-1)


def true_program(
    atmosphere: Atmosphere,
    like: Any,
    archive: Float[np.ndarray, "archived latitude longitude channel"],
    networks: Mapping[str, ObservingNetwork],
    layout: Layout,
    start_error: float,
) -> Callable[[Array, dict[str, Array]], None]:
    """Build a NumPyro program like that of `WeatherExperiment.program`, whose state is on all layers.

    Args:
        atmosphere: the true system.
        like: a state of the model, from `stored_states`.
        archive: states of other runs, whose anomalies are the perturbations of the first ensemble.
        networks: observing networks by the name of their site. They observe the levels of `layout`.
        layout: layout of the emulator's state.
        start_error: factor of an anomaly in the first ensemble.

    Returns:
        Program (first guess, observations by site), where the first guess is a state on all layers.
    """
    anomalies = jnp.asarray(archive - archive.mean(0))

    def weather_truth(first_guess: Array, y: dict[str, Array]) -> None:
        x0 = numpyro.sample("x0", Archive(anomalies))

        def step(x: Array, y_t: dict[str, Array]) -> tuple[Array, None]:
            x = numpyro.sample("x", TrueTransition(atmosphere, x, like))
            seen = on_layout(atmosphere, x, layout)
            for name, network in networks.items():
                error = dist.Normal(network.observe(seen, layout), network.error())
                numpyro.sample(name, error.to_event(2), obs=y_t[name])
            return x, None

        scan(step, first_guess + start_error * x0, y)

    return weather_truth


def positions(layout: Layout, channels: int) -> Float[np.ndarray, "value 2"]:
    """(latitude, longitude) in degrees of every value of a state with a given number of channels."""
    coords = layout.coords()
    latitude, longitude = (np.asarray(coords[name]) for name in ("latitude", "longitude"))
    grid = np.stack(np.meshgrid(latitude, longitude, indexing="ij"), axis=-1)
    return np.repeat(grid[:, :, None], channels, axis=2).reshape(-1, 2)
