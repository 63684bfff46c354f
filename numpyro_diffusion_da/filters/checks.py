"""Checks of the arguments that several filters take."""

from __future__ import annotations

from typing import Any

from numpyro_diffusion_da.arguments import require, require_count, shown
from numpyro_diffusion_da.diffusion.sampler import as_sampler
from numpyro_diffusion_da.smc.base import check_resample_below, check_target_ess
from numpyro_diffusion_da.smc.localization import Taper


def set_sampler(algorithm: Any) -> None:
    """Convert a filter's argument `sampler` to a `Sampler` if it is a bare step; None stays None.

    Args:
        algorithm: filter, in its constructor.

    Raises:
        TypeError: the argument is neither a sampler nor a step.
    """
    if algorithm.sampler is not None:
        # Filters are frozen dataclasses, which forbid ordinary assignment.
        object.__setattr__(algorithm, "sampler", as_sampler(algorithm.sampler, type(algorithm).__name__))


def set_target_ess(algorithm: Any) -> None:
    """Check a filter's argument `target_ess`, and convert it to a Python number.

    Args:
        algorithm: filter, in its constructor.

    Raises:
        TypeError: the argument is not a number.
        ValueError: it is outside [0, 1).
    """
    object.__setattr__(algorithm, "target_ess", check_target_ess(algorithm.target_ess, type(algorithm).__name__))


def set_resample_below(algorithm: Any) -> None:
    """Check a filter's argument `resample_below`, and convert it to a Python number; `target_ess` must be set before.

    Args:
        algorithm: filter, in its constructor.

    Raises:
        TypeError: the argument is not a number.
        ValueError: it is outside [0, 1], or below 1 with tempering.
    """
    below = check_resample_below(algorithm.resample_below, algorithm.target_ess, type(algorithm).__name__)
    object.__setattr__(algorithm, "resample_below", below)


def set_lag(algorithm: Any) -> None:
    """Check the argument `lag` of a filter, and store it as a number.

    Args:
        algorithm: filter, in its constructor.

    Raises:
        TypeError: the argument is not a whole number.
        ValueError: it is negative.
    """
    require_count(algorithm.lag, type(algorithm).__name__, "lag", least=0)
    object.__setattr__(algorithm, "lag", int(algorithm.lag))


def check_resampling(resampling: Any, owner: str) -> None:
    """Check that the argument `resampling` is a function or None.

    Args:
        resampling: the argument.
        owner: name of the filter that got the argument.

    Raises:
        TypeError: `resampling` cannot be called.
    """
    if resampling is not None and not callable(resampling):
        raise TypeError(
            f"{owner} got resampling={shown(resampling)}; expected a function: write "
            "resampling=blackjax.smc.resampling.stratified, or leave it out for systematic resampling."
        )


def check_taper(taper: Any, owner: str) -> None:
    """Check that the argument `taper` is a `Taper` or None.

    Args:
        taper: the argument.
        owner: name of the filter that got the argument.

    Raises:
        TypeError: `taper` is something else.
    """
    if taper is not None:
        example = 'ndda.Taper(5.0, ndda.Ring(40), {"y": np.arange(0, 40, 4)})'
        require(taper, Taper, owner, "taper", example)
