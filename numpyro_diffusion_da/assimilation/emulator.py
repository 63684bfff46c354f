"""The prior of a run: opened from its settings, with its step, its transition and its forcings."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from numpyro_diffusion_da.assimilation.config import MOST_STEPS, PriorSettings, RunConfig, step_of
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior, EmulatorPrior
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.diffusion.schedule import KarrasSchedule
from numpyro_diffusion_da.diffusion.steps import DPMSolverPP2M
from numpyro_diffusion_da.fields.times import hours, utc_times
from numpyro_diffusion_da.priors.gencast.prior import GenCastPrior
from numpyro_diffusion_da.priors.shipped import load_prior
from numpyro_diffusion_da.priors.weathernext2.prior import WeatherNext2Prior
from numpyro_diffusion_da.program.distribution import DiffusionTransition, OnePassTransition

HELD_SUAREZ_STEP = np.timedelta64(12, "h")
HELD_SUAREZ_FACTOR = 1.3
"""Factor on the shipped weather's one-step errors for moved ancestors (docs/mini_weather.md)."""

FAST = Sampler(DPMSolverPP2M(), KarrasSchedule(8, rho=20.0, lowest=0.1))
"""Sampler on 8 noise levels, for observation errors near the one-step spread (docs/mini_weather.md)."""


def open_prior(settings: PriorSettings) -> EmulatorPrior:
    """Open the prior that a configuration names.

    Args:
        settings: table `[prior]` of a configuration.

    Raises:
        ImportError: its package is missing.
        FileNotFoundError: a file is missing.
        ValueError: no prior is named, or a file is not what the prior needs.
    """
    if settings.name is not None:
        return load_prior(settings.name)
    common: dict[str, Any] = {
        "attention": settings.attention,
        "precision": settings.precision,
        "resolution": settings.resolution,
    }
    if settings.gencast is not None:
        assert settings.stats is not None
        assert settings.surface is not None
        return GenCastPrior.from_checkpoint(settings.gencast, stats=settings.stats, surface=settings.surface, **common)
    if settings.weathernext2 is not None:
        assert settings.configuration is not None
        assert settings.surface is not None
        return WeatherNext2Prior.from_checkpoint(
            settings.weathernext2, config=settings.configuration, surface=settings.surface, **common
        )
    raise ValueError('[prior] names none; give name = "held_suarez", gencast or weathernext2.')


@dataclasses.dataclass(frozen=True, eq=False)
class Emulator:
    """Prior of a run with what a run needs of it.

    Attributes:
        prior: the prior, of which forecasts and draws are made.
        step: time of one step.
        sampler: sampler of its draws; None for an emulator of one pass.
    """

    prior: EmulatorPrior
    step: np.timedelta64
    sampler: Sampler | None

    @property
    def frames(self) -> int:
        """Number of last states that the prior is conditioned on: 2 if it has forcings of its steps, else 1."""
        return 2 if callable(getattr(self.prior, "forcings", None)) else 1

    @staticmethod
    def of(config: RunConfig, prior: EmulatorPrior) -> Emulator:
        """Emulator of a configuration.

        Args:
            config: the configuration.
            prior: the prior, from `open_prior` or your own.

        Raises:
            ValueError: the layout has no grid or no variables, the step is not known or another one, or a setting does
                not apply to the prior.
        """
        layout = prior.layout
        if layout.dims != ("latitude", "longitude", "channel") or not layout.variables:
            raise ValueError(
                f"the layout of {type(prior).__name__} has the dimensions {layout.dims} and {len(layout.variables)} "
                "variables; a table of observations needs (latitude, longitude, channel) and named variables."
            )
        own = getattr(prior, "TIME_STEP", None)
        if config.prior.name is not None:
            own = HELD_SUAREZ_STEP
        given = None if config.times.step is None else step_of(config.times.step)
        if own is None and given is None:
            raise ValueError(f'times.step is missing, and {type(prior).__name__} states none; add it, as in "12h".')
        if own is not None and given is not None and own != given:
            raise ValueError(
                f"times.step is {config.times.step!r}, but a step of the prior is {hours(own)}; leave it out."
            )
        if config.filter.guidance is not None and not isinstance(prior, DiffusionPrior):
            raise ValueError(
                f"filter.guidance is {config.filter.guidance!r}, but {type(prior).__name__} draws in one pass; leave "
                "it out."
            )
        step = own if own is not None else given
        assert step is not None
        factor = config.filter.error_factor
        if factor is None and config.prior.name is not None and config.filter.method == "fa_apf":
            factor = HELD_SUAREZ_FACTOR
        if factor is not None and factor != 1.0:
            if not hasattr(prior, "with_errors_times"):
                raise ValueError(
                    f"filter.error_factor is {factor}, but {type(prior).__name__} has no with_errors_times; leave it "
                    "out."
                )
            prior = prior.with_errors_times(factor)
        return Emulator(prior, step.astype("timedelta64[s]"), sampler_of(config, prior))

    def times(self, config: RunConfig) -> np.ndarray:
        """Times of the analyses, datetime64[s].

        Args:
            config: the configuration.

        Raises:
            ValueError: the last one is not a number of steps after the first one.
        """
        start, end = (np.datetime64(text) for text in (config.times.start, config.times.end))
        if (end - start) % self.step != np.timedelta64(0, "s"):
            last = start + (end - start) // self.step * self.step
            raise ValueError(
                f"times.end = {config.times.end} is no whole number of steps of {hours(self.step)} after times.start = "
                f"{config.times.start}; the last step before it is at {last}."
            )
        count = int((end - start) // self.step) + 1
        if count > MOST_STEPS:
            raise ValueError(
                f"times.start = {config.times.start} and times.end = {config.times.end} make {count} steps; give "
                f"{MOST_STEPS} at most."
            )
        return start + np.arange(count) * self.step

    def forcings(self, times: np.ndarray) -> Any:
        """Inputs of the steps that lead to some times, with a leading axis of steps; None for a prior without.

        Args:
            times: the times, one step apart.
        """
        return self.prior.forcings(utc_times(times)) if self.frames > 1 else None  # type: ignore[attr-defined]

    def transition(self, state: Any, inputs: Any) -> DiffusionTransition | OnePassTransition:
        """Distribution of the next state.

        Args:
            state: the last state, or the pair of the last two.
            inputs: inputs of the step, from `forcings`.
        """
        if isinstance(self.prior, DiffusionPrior):
            return DiffusionTransition(self.prior, state, inputs, sampler=self.sampler)
        return OnePassTransition(self.prior, state, inputs)  # type: ignore[arg-type]

    def advance(self, rng_key: jax.Array, members: Any, inputs: Any, batch_size: int | None) -> jax.Array:
        """Draw the next state of each member.

        Args:
            rng_key: random key; that of member i is fold_in(rng_key, i).
            members: last state of each member, or the pair of the last two, with a leading axis of members.
            inputs: inputs of the step.
            batch_size: number of members moved at a time; None for 16.
        """
        return self._advance(rng_key, members, inputs, batch_size or 16)

    @functools.cached_property
    def _advance(self) -> Any:
        def one(key: jax.Array, state: Any, inputs: Any) -> jax.Array:
            return self.transition(state, inputs).sample(key)

        def all_members(rng_key: jax.Array, members: Any, inputs: Any, batch: int) -> jax.Array:
            count = jax.tree.leaves(members)[0].shape[0]
            keys = jax.vmap(lambda i: jax.random.fold_in(rng_key, i))(jax.numpy.arange(count))
            return jax.lax.map(
                lambda each: one(each[0], each[1], inputs), (keys, members), batch_size=min(batch, count)
            )

        return jax.jit(all_members, static_argnums=3)


def sampler_of(config: RunConfig, prior: EmulatorPrior) -> Sampler | None:
    """Sampler that a configuration names, None for an emulator of one pass.

    Args:
        config: the configuration.
        prior: the prior.

    Raises:
        ValueError: an emulator of one pass got a sampler.
    """
    name = config.filter.sampler
    if not isinstance(prior, DiffusionPrior):
        if name is not None:
            raise ValueError(f"filter.sampler is {name!r}, but {type(prior).__name__} draws in one pass; leave it out.")
        return None
    if name is None:
        name = "fast" if config.prior.name is not None else "cheap"
    return {"fast": FAST, "cheap": Sampler.cheap(), "accurate": Sampler()}[name]
