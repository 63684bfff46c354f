"""The settings of a filter in plain values, for the attributes of a result."""

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
    """A module with all its settings, defaults included: its repr leaves those out, and defaults may change."""
    if not isinstance(value, eqx.Module):
        return repr(value)
    settings = ", ".join(f"{f.name}={in_full(getattr(value, f.name))}" for f in dataclasses.fields(value) if f.init)
    return f"{type(value).__name__}({settings})"


def sampler_setting(sampler: Sampler | Step | None, program: StateSpaceModel) -> str:
    """The sampler in full, the transition's own where none is given; "closed form" for a Gaussian transition."""
    transition = program.structure.diffusion
    if transition is None:
        return "closed form"
    return in_full(transition.sampler if sampler is None else sampler)


def taper_setting(taper: Taper | None) -> str:
    """The taper with checksums of its positions, or "none"."""
    return "none" if taper is None else repr(taper)


def inflation_setting(inflations: Sequence[Inflation]) -> str:
    """The sequence of inflations in full, or "none"."""
    return ", ".join(in_full(inflation) for inflation in inflations) or "none"


def resampling_setting(resampling: Resampling | None) -> str:
    """The name of the resampling function; systematic by default."""
    return "systematic" if resampling is None else getattr(resampling, "__name__", repr(resampling))
