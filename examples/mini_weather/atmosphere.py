"""The true system of the mini weather: a stochastic Held-Suarez atmosphere at T21, by the spectral model `dinosaur`.

The dry atmosphere of Held & Suarez 1994 (Bull. Amer. Meteor. Soc. 75, 1825) on the Gaussian grid of 64 x 32 points and
6 equidistant sigma layers, with fourth-order diffusion of the smallest scales, and random increments of vorticity and
temperature after every step, as forecasting models have them for what they do not resolve: a coarse deterministic model
knows its next 12 hours almost exactly, and weather does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import dinosaur
import jax
import jax.numpy as jnp
import numpy as np

LAYERS = 6
STEP_MINUTES = 90
HOURS = 12
"""Of one transition."""
DIFFUSION_ORDER = 2
DIFFUSION_HOURS = 6.0
"""E-folding time of the smallest scale under diffusion by the Laplacian to the power of the order."""
WIND_INCREMENT = (0.42, 0.25)
"""Standard deviation in m/s of a component of wind, of all random increments of 12 hours together: in the uppermost
layer and in the lowest; linear between them."""
TEMPERATURE_INCREMENT = (0.14, 0.25)
"""K, likewise."""
INCREMENT_DEGREE = 12
"""The kinetic energy (and the variance of temperature) of the increments falls off as exp(-(degree / this)^2)."""
INCREMENT_LAYERS = 2.0
"""Their correlation falls off by 1/e over so many layers."""
DESCRIPTION = {
    "dinosaur": dinosaur.__version__,
    "sigma_layers": LAYERS,
    "step_minutes": STEP_MINUTES,
    "random_increments": {
        "wind_m_s": WIND_INCREMENT,
        "temperature_K": TEMPERATURE_INCREMENT,
        "degree": INCREMENT_DEGREE,
        "layers": INCREMENT_LAYERS,
    },
    "diffusion": f"order {2 * DIFFUSION_ORDER}, {DIFFUSION_HOURS} h at the smallest scale",
}


class Atmosphere:
    """The model: `start` a state, `transition` by 12 hours, and its fields on the grid.

    A state is dinosaur's, spectral and without dimension. Its fields have the shape (latitude, longitude, channels):
    surface pressure in hPa, then for every layer, from the top, temperature in K, then likewise u and v in m/s.
    """

    def __init__(self) -> None:
        units = dinosaur.scales.units
        coords = dinosaur.coordinate_systems.CoordinateSystem(
            dinosaur.spherical_harmonic.Grid.T21(), dinosaur.sigma_coordinates.SigmaCoordinates.equidistant(LAYERS)
        )
        specs = dinosaur.primitive_equations.PrimitiveEquationsSpecs.from_si()
        self.grid = coords.horizontal
        self._at_rest, features = dinosaur.primitive_equations_states.isothermal_rest_atmosphere(
            coords=coords, physics_specs=specs, p0=1e5 * units.pascal, p1=5e3 * units.pascal
        )
        reference = features[dinosaur.xarray_utils.REF_TEMP_KEY]
        self._reference = reference[:, None, None]
        flat = dinosaur.primitive_equations.truncated_modal_orography(features[dinosaur.xarray_utils.OROGRAPHY], coords)
        self._forcing = dinosaur.held_suarez.HeldSuarezForcing(coords, specs, reference)
        equation = dinosaur.time_integration.compose_equations(
            [
                dinosaur.primitive_equations.PrimitiveEquations(reference, flat, coords, specs),
                self._forcing,
            ]
        )
        dt = specs.nondimensionalize(STEP_MINUTES * units.minute)
        diffusion = dinosaur.time_integration.horizontal_diffusion_step_filter(
            self.grid, dt, specs.nondimensionalize(DIFFUSION_HOURS * units.hour), DIFFUSION_ORDER
        )
        self._step = dinosaur.time_integration.step_with_filters(
            dinosaur.time_integration.imex_rk_sil3(equation, dt), [diffusion]
        )
        self._centers = coords.vertical.centers
        self._vorticity, self._temperature, self._layers = _increments(self.grid, specs)

        def factor(unit: Any) -> float:
            return float(specs.dimensionalize(1.0, unit).magnitude)

        self._units = factor(units.pascal) / 100.0, factor(units.degK), factor(units.meter / units.second)

    def start(self, rng_key: jax.Array) -> Any:
        """At rest in radiative equilibrium, with a random disturbance of pressure."""
        state = self._at_rest(rng_key)
        pressure = jnp.exp(self.grid.to_nodal(state.log_surface_pressure))
        temperature = self._forcing.equilibrium_temperature(pressure) - self._reference
        return dataclasses.replace(state, temperature_variation=self.grid.to_modal(temperature))

    def transition(self, rng_key: jax.Array, state: Any, time: jax.Array | int = 0) -> Any:
        """The state `HOURS` later; `time` counts the transitions of one key."""
        steps = HOURS * 60 // STEP_MINUTES

        def one(i: jax.Array, state: Any) -> Any:
            return self._add_increments(jax.random.fold_in(rng_key, time * steps + i), self._step(state))

        return jax.lax.fori_loop(0, steps, one, state)

    def fields(self, state: Any) -> jax.Array:
        """On the grid."""
        hpa, kelvin, speed = self._units
        pressure = hpa * jnp.exp(self.grid.to_nodal(state.log_surface_pressure))
        temperature = kelvin * (self.grid.to_nodal(state.temperature_variation) + self._reference)
        u, v = dinosaur.spherical_harmonic.vor_div_to_uv_nodal(self.grid, state.vorticity, state.divergence, clip=False)
        return jnp.transpose(jnp.concatenate([pressure, temperature, speed * u, speed * v]), (2, 1, 0))

    def state(self, fields: jax.Array, like: Any) -> Any:
        """The inverse of `fields`; what a state has besides is taken from `like`."""
        hpa, kelvin, speed = self._units
        values = jnp.transpose(fields, (2, 1, 0))
        pressure, temperature, u, v = jnp.split(values, [1, 1 + LAYERS, 1 + 2 * LAYERS])
        vorticity, divergence = dinosaur.spherical_harmonic.uv_nodal_to_vor_div_modal(self.grid, u / speed, v / speed)
        return dataclasses.replace(
            like,
            vorticity=vorticity,
            divergence=divergence,
            temperature_variation=self.grid.to_modal(temperature / kelvin - self._reference),
            log_surface_pressure=self.grid.to_modal(jnp.log(pressure / hpa)),
        )

    def on_levels(self, fields: jax.Array, levels: Sequence[int]) -> jax.Array:
        """Fields on pressure levels in hPa, with levels in the place of layers.

        Linear in the logarithm of pressure between the layers; beyond the outermost ones continued along the same line.
        """
        values = jnp.transpose(fields, (2, 1, 0))
        pressure, *profiles = jnp.split(values, [1, 1 + LAYERS, 1 + 2 * LAYERS])
        centers = jnp.log(jnp.asarray(self._centers))
        target = jnp.log(jnp.asarray(levels)[:, None, None] / pressure)
        upper = jnp.clip(jnp.searchsorted(centers, target) - 1, 0, LAYERS - 2)
        weight = (target - centers[upper]) / (centers[upper + 1] - centers[upper])
        columns = [pressure]
        for profile in profiles:
            above = jnp.take_along_axis(profile, upper, axis=0)
            below = jnp.take_along_axis(profile, upper + 1, axis=0)
            columns.append(above + weight * (below - above))
        return jnp.transpose(jnp.concatenate(columns), (2, 1, 0))

    def _add_increments(self, rng_key: jax.Array, state: Any) -> Any:
        noise = jax.random.normal(rng_key, (2, LAYERS, *self.grid.modal_shape))
        noise = jnp.einsum("kj,vj...->vk...", jnp.asarray(self._layers, noise.dtype), noise)
        return dataclasses.replace(
            state,
            vorticity=state.vorticity + jnp.asarray(self._vorticity, noise.dtype) * noise[0],
            temperature_variation=state.temperature_variation + jnp.asarray(self._temperature, noise.dtype) * noise[1],
        )


def _increments(grid: Any, specs: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one model step: standard deviations of vorticity and temperature, root of the correlation of layers.

    White in time, isotropic, without divergence.
    """
    units = dinosaur.scales.units
    degree = np.asarray(grid.modal_axes[1], np.float64)
    spectrum = np.where(degree > 0, np.exp(-((degree / INCREMENT_DEGREE) ** 2)), 0.0)
    # A real harmonic of unit coefficient has the mean square 1 / (4 pi); a degree has 2 l + 1 of them.
    variance = 4.0 * np.pi * spectrum / spectrum.sum() / (2 * degree + 1)
    per_step = (STEP_MINUTES / (60.0 * HOURS)) ** 0.5
    wind = specs.nondimensionalize(np.linspace(*WIND_INCREMENT, LAYERS) * units.meter / units.second)[:, None, None]
    kelvin = specs.nondimensionalize(np.linspace(*TEMPERATURE_INCREMENT, LAYERS) * units.degK)[:, None, None]
    # |k x grad psi|^2 has the mean l (l + 1) psi^2, of both components, and vorticity is l (l + 1) psi.
    vorticity = per_step * wind * np.sqrt(2.0 * variance * degree * (degree + 1)) * grid.mask / grid.radius
    distance = np.abs(np.subtract.outer(np.arange(LAYERS), np.arange(LAYERS)))
    layers = np.linalg.cholesky(np.exp(-distance / INCREMENT_LAYERS))
    return vorticity, per_step * kelvin * np.sqrt(variance) * grid.mask, layers
