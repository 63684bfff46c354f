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
        `sampler`, its text; `sampler_variance_error`, the largest relative error of the variance of a Gaussian mode
        (`Sampler.variance_error`), if the sampler is deterministic; and `unresolved_modes`, in words, if the covariance
        of the prior is known and has modes outside the range for which that error is usually stated. The error then
        covers them.
    """
    found: dict[str, str | float] = {"sampler": sampler_setting(sampler, program)}
    transition = program.structure.diffusion
    if transition is None:
        return found
    used = transition.sampler if sampler is None else as_sampler(sampler, "sampler")
    lowest, highest = transition.prior.noise_range
    noise_range = (lowest, highest)
    known = transition.prior.spreads()
    spreads = _beyond(known, used.resolved(noise_range))
    try:
        error = _variance_error(used, noise_range, spreads)
    except TypeError:  # a sampler with a step or a schedule that holds arrays has no hash
        error = _variance_error.__wrapped__(used, noise_range, spreads)
    if error is None:
        return found
    found["sampler_variance_error"] = error
    if known is not None and spreads is not None:
        resolved = "{:.2g} to {:.2g}".format(*used.resolved(noise_range))
        found["unresolved_modes"] = f"{known[0]:.2g} to {known[1]:.2g}, resolved {resolved}"
    return found


def _beyond(spreads: tuple[float, float] | None, resolved: tuple[float, float]) -> tuple[float, float] | None:
    """Return the range that covers both, if known standard deviations of modes leave the resolved ones; else None."""
    if spreads is None or (spreads[0] > 0.99 * resolved[0] and spreads[1] < 1.01 * resolved[1]):
        return None
    return min(spreads[0], resolved[0]), max(spreads[1], resolved[1])


@functools.lru_cache(maxsize=64)
def _variance_error(
    sampler: Sampler, noise_range: tuple[float, float], spreads: tuple[float, float] | None
) -> float | None:
    """Return the largest relative error of the variance of a mode, rounded up to a thousandth."""
    if spreads is None and noise_range[1] >= 100 * noise_range[0] and repr(sampler) == repr(Sampler()):
        return DEFAULT_VARIANCE_ERROR  # so that a run with the default computes nothing
    error = sampler.variance_error(noise_range, spreads)
    return None if error is None else float(np.ceil(1e3 * error[0]) / 1e3)


def sampler_setting(sampler: Sampler | Step | None, program: StateSpaceModel) -> str:
    """Text of the sampler that a filter uses.

    Args:
        sampler: sampler of the filter; None for the transition's own.
        program: state-space model of the program.

    Returns:
        The sampler with all its settings; "one pass" with the number of linearizations of a guided draw, if the
        transition is an emulator of one pass; "closed form" if it is no emulator.
    """
    transition, one_pass = program.structure.diffusion, program.structure.one_pass
    if one_pass is not None:
        return f"one pass, linearized {one_pass.iterations} times"
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
