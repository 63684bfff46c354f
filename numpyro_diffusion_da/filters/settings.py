"""Settings of a filter as plain values, for the attributes of a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx

from numpyro_diffusion_da.diffusion.sampler import Sampler
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
