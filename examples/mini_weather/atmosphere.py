"""True system of the mini weather: a stochastic Held-Suarez atmosphere at T21, computed by the model `dinosaur`.

This is the dry atmosphere of Held & Suarez 1994 (Bull. Amer. Meteor. Soc. 75, 1825) on a Gaussian grid of 64 x 32
points and 6 equidistant sigma layers, with fourth-order diffusion of the smallest scales. After every step, vorticity
and temperature get random increments. Forecast models use such increments for unresolved processes. Without them, the
next 12 hours of a coarse deterministic model are almost exactly predictable, unlike weather.
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
"""Length of one transition in hours."""
DIFFUSION_ORDER = 2
DIFFUSION_HOURS = 6.0
"""E-folding time of the smallest scale in hours, under diffusion by the Laplacian to the power `DIFFUSION_ORDER`."""
WIND_INCREMENT = (0.42, 0.25)
"""Standard deviation in m/s of the sum of 12 hours of random increments of a wind component.

The values hold for the uppermost and the lowest layer, with linear interpolation between them.
"""
TEMPERATURE_INCREMENT = (0.14, 0.25)
"""Standard deviation in K of the sum of 12 hours of random increments of temperature, as for `WIND_INCREMENT`."""
INCREMENT_DEGREE = 12
"""Degree d in the spectrum exp(-(degree / d)^2) of the increments' kinetic energy and temperature variance."""
INCREMENT_LAYERS = 2.0
"""Number of layers over which the correlation of the increments falls off to 1/e."""
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
    """Model of the true system, with random initial states, transitions by 12 hours, and fields on the grid.

    States are those of dinosaur, spectral and dimensionless. Fields have the shape (latitude, longitude, channels).
    Their channels are surface pressure in hPa, then temperature in K of every layer from the top, then u and v in m/s
    in the same order.
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
            """Size of the dimensionless unit in a physical unit."""
            return float(specs.dimensionalize(1.0, unit).magnitude)

        self._units = factor(units.pascal) / 100.0, factor(units.degK), factor(units.meter / units.second)

    def start(self, rng_key: jax.Array) -> Any:
        """Draw an initial state: at rest in radiative equilibrium, with a random disturbance of pressure."""
        state = self._at_rest(rng_key)
        pressure = jnp.exp(self.grid.to_nodal(state.log_surface_pressure))
        temperature = self._forcing.equilibrium_temperature(pressure) - self._reference
        return dataclasses.replace(state, temperature_variation=self.grid.to_modal(temperature))

    def transition(self, rng_key: jax.Array, state: Any, time: jax.Array | int = 0) -> Any:
        """Draw the state `HOURS` hours later.

        Args:
            rng_key: key of the random increments.
            state: previous state.
            time: number of the transition, which makes the increments of several transitions with one key different.
        """
        steps = HOURS * 60 // STEP_MINUTES

        def one(i: jax.Array, state: Any) -> Any:
            return self._add_increments(jax.random.fold_in(rng_key, time * steps + i), self._step(state))

        return jax.lax.fori_loop(0, steps, one, state)

    def fields(self, state: Any) -> jax.Array:
        """Compute the fields of a state on the grid, shape (latitude, longitude, channels)."""
        hpa, kelvin, speed = self._units
        pressure = hpa * jnp.exp(self.grid.to_nodal(state.log_surface_pressure))
        temperature = kelvin * (self.grid.to_nodal(state.temperature_variation) + self._reference)
        u, v = dinosaur.spherical_harmonic.vor_div_to_uv_nodal(self.grid, state.vorticity, state.divergence, clip=False)
        return jnp.transpose(jnp.concatenate([pressure, temperature, speed * u, speed * v]), (2, 1, 0))

    def state(self, fields: jax.Array, like: Any) -> Any:
        """Compute the state of given fields, which inverts `fields`.

        Args:
            fields: fields on the grid.
            like: another state, which provides the parts of a state that fields do not determine.
        """
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
        """Interpolate fields from layers to pressure levels, linearly in the logarithm of pressure.

        Beyond the outermost layers the line is extrapolated.

        Args:
            fields: fields on layers.
            levels: pressure levels in hPa.

        Returns:
            Fields with a channel for each level in the place of each layer.
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
        """Add the random increments of one model step to a state."""
        noise = jax.random.normal(rng_key, (2, LAYERS, *self.grid.modal_shape))
        noise = jnp.einsum("kj,vj...->vk...", jnp.asarray(self._layers, noise.dtype), noise)
        return dataclasses.replace(
            state,
            vorticity=state.vorticity + jnp.asarray(self._vorticity, noise.dtype) * noise[0],
            temperature_variation=state.temperature_variation + jnp.asarray(self._temperature, noise.dtype) * noise[1],
        )


def _increments(grid: Any, specs: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters of the random increments of one model step.

    The increments are white in time, isotropic and nondivergent.

    Returns:
        (standard deviations of vorticity coefficients, of temperature coefficients, Cholesky factor of the correlation
        of layers).
    """
    units = dinosaur.scales.units
    degree = np.asarray(grid.modal_axes[1], np.float64)
    spectrum = np.where(degree > 0, np.exp(-((degree / INCREMENT_DEGREE) ** 2)), 0.0)
    # A real harmonic with coefficient 1 has the mean square 1 / (4 pi), and degree l has 2 l + 1 harmonics.
    variance = 4.0 * np.pi * spectrum / spectrum.sum() / (2 * degree + 1)
    per_step = (STEP_MINUTES / (60.0 * HOURS)) ** 0.5
    wind = specs.nondimensionalize(np.linspace(*WIND_INCREMENT, LAYERS) * units.meter / units.second)[:, None, None]
    kelvin = specs.nondimensionalize(np.linspace(*TEMPERATURE_INCREMENT, LAYERS) * units.degK)[:, None, None]
    # |k x grad psi|^2 has the mean l (l + 1) psi^2 for both components together, and vorticity is l (l + 1) psi.
    vorticity = per_step * wind * np.sqrt(2.0 * variance * degree * (degree + 1)) * grid.mask / grid.radius
    distance = np.abs(np.subtract.outer(np.arange(LAYERS), np.arange(LAYERS)))
    layers = np.linalg.cholesky(np.exp(-distance / INCREMENT_LAYERS))
    return vorticity, per_step * kelvin * np.sqrt(variance) * grid.mask, layers
