"""Ensemble Kalman filter of a NumPyro program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import require, require_flag, require_program
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.diffusion.steps import Step
from numpyro_diffusion_da.filters.background import Drawn, Screen, background_of_draws, probe_level, screened
from numpyro_diffusion_da.filters.base import FilterAlgorithm, Proposal, line_of, with_past
from numpyro_diffusion_da.filters.checks import check_taper, set_lag, set_sampler
from numpyro_diffusion_da.filters.conditioning import held_conditioning, with_conditioning
from numpyro_diffusion_da.filters.placement import carried_along, place_taper
from numpyro_diffusion_da.filters.settings import in_full, inflation_setting, sampler_settings, taper_setting
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc import enkf
from numpyro_diffusion_da.smc.base import Info, Kernel, State, map_particles, particle_keys, total_particles
from numpyro_diffusion_da.smc.ensemble_update import EnsembleUpdate, PerturbedObservations, TransitionSpread
from numpyro_diffusion_da.smc.inflation import Inflation, check_inflation, inflated_particles
from numpyro_diffusion_da.smc.localization import PlacedTaper, Taper
from numpyro_diffusion_da.smc.sharding import first, own
from numpyro_diffusion_da.transition.base import DrawRecord
from numpyro_diffusion_da.transition.departure import transition_spread
from numpyro_diffusion_da.transition.weights import WeightRecord


@dataclasses.dataclass(frozen=True, eq=False)
class EnKF(FilterAlgorithm):
    """Ensemble Kalman filter of a program (`smc.enkf`): a linear update with covariances of the ensemble.

    It has no weights, and therefore no estimate of the evidence. The update moves the state, and every other array of
    real numbers in the carry that the next carry or an observation depends on: parameters, earlier states.

    Args:
        model: NumPyro program with one `scan`, any transition that can be sampled (also a `Delta`), and Gaussian
            observations. NaN marks a missing value.
        inflation: sequence of `Inflation`. `ForecastMultiplicative(1.05)` widens the forecast before the update.
            `RTPS`, `RTPP`, `Multiplicative` and `Jitter` widen the analysis, in the order of the sequence.
        sampler: sampler of a diffusion's forecast, or a bare step such as `ndda.diffusion.DDIM()`; None for the
            transition's own.
        update: update of the ensemble, `ndda.smc.PerturbedObservations()` or `ndda.smc.SquareRoot()`.
        taper: localization, `Taper(radius, distance, observations)`; None for none.
        transition_covariance: whether the covariance of the transition is computed by products with it, and not sampled
            (`smc.ensemble_update`). The covariance of the forecast is then that of the means E[x' | c] over the
            members, with the taper, and the mean covariance of the transition. This costs two forward passes per
            member, and products that the members share: one or a few each with 64 members (`smc.probing`). It needs a
            transition that is a diffusion or Gaussian.
        lag: number L of earlier states of each member that the update moves along: the ensemble Kalman smoother
            (Evensen & van Leeuwen 2000). `smoothed(L)` and `to_datatree(lag=L)` then have the states given the
            observations up to L steps later. Each member holds L more states. 0 keeps none. The filter itself does not
            depend on it.

    Raises:
        TypeError: an argument is of the wrong kind; the message names it.
        ValueError: the update cannot use the taper's correlation function, `lag` is negative, or
            `transition_covariance` is combined with an update that samples none.
    """

    can_be_sharded: ClassVar[bool] = True
    needs_gaussian: ClassVar[bool] = False
    needs_gaussian_errors: ClassVar[bool] = True
    moves_carry: ClassVar[bool] = True

    model: Callable[..., Any]
    inflation: Sequence[Inflation] = ()
    sampler: Sampler | Step | None = None
    update: EnsembleUpdate = dataclasses.field(default_factory=PerturbedObservations)
    taper: Taper | None = None
    transition_covariance: bool = False
    lag: int = 0

    def __post_init__(self) -> None:
        require_program(self.model, "EnKF")
        check_inflation(self.inflation, "EnKF", paired=True)
        set_sampler(self)
        require(self.update, EnsembleUpdate, "EnKF", "update", "ndda.smc.SquareRoot()")
        check_taper(self.taper, "EnKF")
        flag = require_flag(self.transition_covariance, "EnKF", "transition_covariance")
        object.__setattr__(self, "transition_covariance", flag)
        set_lag(self)
        if self.taper is not None:
            self.update.check_correlation(self.taper.correlation)
        if self.transition_covariance and not isinstance(self.update, PerturbedObservations):
            raise ValueError(
                f"EnKF got transition_covariance=True and update={self.update}; this covariance is defined for "
                "update=ndda.smc.PerturbedObservations(), which is the default."
            )

    def has_evidence(self) -> bool:
        """Whether the filter estimates the evidence; False, because it has no weights."""
        return False

    def kernel(self, program: StateSpaceModel, batch_size: int | None = None, screen: Screen | None = None) -> Kernel:
        """Build the EnKF kernel of the program; `FilterAlgorithm.kernel` explains arguments and return value.

        The background is the forecast ensemble, as the update takes it.

        Raises:
            ValueError: the positions of the taper do not fit the program, or an array of its carry has no places.
        """
        taper: PlacedTaper | Callable[[TimeInputs], PlacedTaper] | None = None
        if self.taper is not None:
            taper = place_taper(self.taper, program)
            if self.taper.moving:
                taper = functools.partial(place_taper, self.taper, program)
        if self.transition_covariance:
            program.check(needs_dynamics=True, gaussian_errors=True)
        widening = [inflation for inflation in self.inflation if inflation.acts_on_forecast]
        carried = carried_along(program.structure, localized=self.taper is not None)

        def kernel(rng_key: PRNGKeyArray, state: State, inputs: TimeInputs) -> tuple[State, Info]:
            # The forecast, with the keys that the kernel would draw it with.
            n = total_particles(state.particles)
            keys = particle_keys(jax.random.split(rng_key, 3)[0], n)
            centering = program.centering(keys, first(state.particles), inputs, self.sampler)
            # Two uses of the conditioning: the forecast and the covariance of the transition.
            conditioning = None
            if self.transition_covariance:
                conditioning = held_conditioning(program, state.particles, inputs, batch_size)
            draw = map_particles(
                lambda key, carry, given: program.draw(key, carry, inputs, self.sampler, centering, given), batch_size
            )
            x, record = draw(own(keys), state.particles, conditioning)
            forecast = inflated_particles(widening, jax.random.key(0), x, None)
            sites = background_of_draws(program, forecast, state.particles, inputs, n, batch_size)
            used, said = screened(screen, program, sites, state.particles, inputs)
            particles = Drawn(state.particles, x, record, conditioning, state.past)
            # The carry is the first part of `Drawn`, so its arrays have the same indices in both. The past is the last.
            along = (len(jax.tree.leaves(particles)) - 1,) if self.lag else ()
            step = enkf.build_kernel(
                _forecast_of,
                _residual_in(used),
                _advance_in(used),
                self.update,
                taper,
                self.inflation,
                batch_size,
                (*carried, *along),
                _spread_in(used, self.sampler) if self.transition_covariance else None,
            )
            new, info = step(rng_key, State(particles, state.log_evidence), inputs)
            return with_past(new, info), info._replace(**said)

        return kernel

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Settings of the filter as plain values, for the attributes of a result."""
        return {
            "algorithm": "EnKF",
            "update": in_full(self.update),
            "inflation": inflation_setting(self.inflation),
            "taper": taper_setting(self.taper),
            "transition_covariance": str(self.transition_covariance),
            "lag": self.lag,
            **sampler_settings(self.sampler, program),
        }


def _forecast_of(rng_key: PRNGKeyArray, particle: Drawn, inputs: TimeInputs) -> tuple[Array, DrawRecord]:
    """Forecast that a particle holds, and its record."""
    return particle.x, particle.record


def _residual_in(program: StateSpaceModel) -> Callable[[Array, Drawn, TimeInputs], Array]:
    """Build the function (x, particle, inputs) -> whitened residual of a state."""

    def residual(x: Array, particle: Drawn, inputs: TimeInputs) -> Array:
        return program.gaussian_likelihood(particle.carry, inputs).residual(x)

    return residual


def _spread_in(
    program: StateSpaceModel, sampler: Sampler | Step | None
) -> Callable[[Array, Drawn, TimeInputs], tuple[TransitionSpread, WeightRecord]]:
    """Build the function (vectors, particle, inputs) -> (spread of the transition, record)."""
    level = probe_level(program)

    def spread(vectors: Array, particle: Drawn, inputs: TimeInputs) -> tuple[TransitionSpread, WeightRecord]:
        dynamics = program.transition(particle.carry, inputs, sampler, particle.conditioning)
        likelihood = program.gaussian_likelihood(particle.carry, inputs)
        found, record = transition_spread(dynamics, likelihood, vectors, level)
        return found, with_conditioning(record, program)

    return spread


def _advance_in(
    program: StateSpaceModel,
) -> Callable[[PRNGKeyArray, Array, Drawn, TimeInputs, DrawRecord], tuple[PyTree, Proposal]]:
    """Build the function (rng_key, x, particle, inputs, record) -> (next carry, record) of an analyzed state."""

    def advance(
        rng_key: PRNGKeyArray, x: Array, particle: Drawn, inputs: TimeInputs, draw: DrawRecord
    ) -> tuple[PyTree, Proposal]:
        sites = program.record(rng_key, x, particle.carry, inputs)
        return program.advance(x, particle.carry, inputs), Proposal(draw, sites, line_of(particle.past, x))

    return advance
