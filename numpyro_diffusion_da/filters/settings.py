"""Settings of a filter as plain values, for the attributes of a result."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import numpy as np

from numpyro_diffusion_da.diffusion.sampler import DEFAULT_VARIANCE_ERROR, Sampler, as_sampler
from numpyro_diffusion_da.diffusion.steps import Step
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc.base import (
    Resampling,
)
from numpyro_diffusion_da.smc.inflation import Inflation
from numpyro_diffusion_da.smc.localization import Taper


def in_full(value: Any) -> str:
    """Text of a value with all its settings, for example "MMPS(solver=...)".

    The repr of a module leaves out defaults, and defaults may change between versions.
    """
    if not isinstance(value, eqx.Module):
        return repr(value)
    settings = ", ".join(f"{f.name}={in_full(getattr(value, f.name))}" for f in dataclasses.fields(value) if f.init)
    return f"{type(value).__name__}({settings})"


def sampler_settings(sampler: Sampler | Step | None, program: StateSpaceModel) -> dict[str, str | float]:
    """Return the attributes of a result that describe the sampler of a filter.

    Args:
        sampler: sampler of the filter; None for the transition's own.
        program: state-space model of the filter.

    Returns:
        `sampler`, its text; and `sampler_variance_error`, the largest relative error of the variance of a Gaussian mode
        (`Sampler.variance_error`), if the sampler is deterministic.
    """
    found: dict[str, str | float] = {"sampler": sampler_setting(sampler, program)}
    transition = program.structure.diffusion
    if transition is not None:
        used = transition.sampler if sampler is None else as_sampler(sampler, "sampler")
        noise_range = tuple(transition.prior.noise_range)
        try:
            error = _variance_error(used, noise_range)
        except TypeError:  # a sampler with a step or a schedule that holds arrays has no hash
            error = _variance_error.__wrapped__(used, noise_range)
        if error is not None:
            found["sampler_variance_error"] = error
    return found


@functools.lru_cache(maxsize=64)
def _variance_error(sampler: Sampler, noise_range: tuple[float, float]) -> float | None:
    """Return the largest relative error of the variance of a mode, rounded up to a thousandth."""
    if repr(sampler) == repr(Sampler()):
        return DEFAULT_VARIANCE_ERROR  # for any range of noise levels, so that a run with the default computes nothing
    error = sampler.variance_error(noise_range)
    return None if error is None else float(np.ceil(1e3 * error[0]) / 1e3)


def sampler_setting(sampler: Sampler | Step | None, program: StateSpaceModel) -> str:
    """Text of the sampler that a filter uses.

    Args:
        sampler: sampler of the filter; None for the transition's own.
        program: state-space model of the program.

    Returns:
        The sampler with all its settings, or "closed form" if the transition is not a diffusion.
    """
    transition = program.structure.diffusion
    if transition is None:
        return "closed form"
    return in_full(transition.sampler if sampler is None else sampler)


def taper_setting(taper: Taper | None) -> str:
    """Text of a taper, with checksums of its positions; "none" without a taper."""
    return "none" if taper is None else repr(taper)


def inflation_setting(inflations: Sequence[Inflation]) -> str:
    """Text of a sequence of inflations, with all their settings; "none" for an empty one."""
    return ", ".join(in_full(inflation) for inflation in inflations) or "none"


def resampling_setting(resampling: Resampling | None) -> str:
    """Name of the resampling function; "systematic" for None."""
    return "systematic" if resampling is None else getattr(resampling, "__name__", repr(resampling))
