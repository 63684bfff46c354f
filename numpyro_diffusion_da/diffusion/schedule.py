"""Schedules of noise levels, from the largest down, as static numbers.

A schedule consists of Python floats and is evaluated with numpy while tracing. So multistep samplers can compute their
coefficients once, in double precision.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np

from numpyro_diffusion_da.arguments import count, number


def range_of_levels(
    lowest: float | None, highest: float | None, noise_range: tuple[float, float]
) -> tuple[float, float]:
    """Return (lowest, highest) noise level, with the prior's value in place of None.

    Raises:
        ValueError: the range is not 0 < lowest < highest.
    """
    lowest = noise_range[0] if lowest is None else lowest
    highest = noise_range[1] if highest is None else highest
    if not 0 < lowest < highest:
        raise ValueError(
            f"noise levels go from {highest} down to {lowest}: expected 0 < lowest < highest; "
            "change lowest= or highest=, or the prior's noise_range."
        )
    return lowest, highest


def level(owner: str, name: str) -> Callable[[Any], float | None]:
    """Make the converter of a field that holds a noise level or None.

    Args:
        owner: name of the class.
        name: name of the field.
    """
    return number(owner, name, "give a positive noise level, or None for the prior's.", optional=True, above=0)


class Schedule(eqx.Module):
    """Abstract decreasing sequence of noise levels, within the range in which a prior can be trusted."""

    @abc.abstractmethod
    def levels(self, noise_range: tuple[float, float]) -> np.ndarray:
        """Return the noise levels s_0 > s_1 > ... > s_{n-1} > 0, shape (n,).

        Args:
            noise_range: (lowest, highest) noise level at which the prior can be trusted.
        """


class KarrasSchedule(Schedule):
    r"""Schedule of EDM (Karras et al. 2022, eq. 5), in which $s_i^{1/\rho}$ is equally spaced.

    Args:
        num_levels: number of noise levels, at least 2.
        rho: exponent; a larger one puts more levels at low noise. EDM takes 7, and 9 does better with few levels
            (docs/method.md, the ring-64 table).
        lowest: smallest noise level; None takes the prior's.
        highest: largest noise level; None takes the prior's.

    Raises:
        ValueError: there are fewer than two levels, rho is not positive, or the range is not 0 < lowest < highest.
    """

    num_levels: int = eqx.field(static=True, default=16, converter=count("KarrasSchedule", "num_levels", 2))
    rho: float = eqx.field(
        static=True,
        default=9.0,
        converter=number("KarrasSchedule", "rho", "give a positive number (EDM uses 7).", above=0),
    )
    lowest: float | None = eqx.field(static=True, default=None, converter=level("KarrasSchedule", "lowest"))
    highest: float | None = eqx.field(static=True, default=None, converter=level("KarrasSchedule", "highest"))

    def levels(self, noise_range: tuple[float, float]) -> np.ndarray:
        """Return the noise levels, highest first, shape (num_levels,), for a prior with this (lowest, highest) range.

        Raises:
            ValueError: the range is not 0 < lowest < highest, or rho is so small or large that levels coincide.
        """
        lowest, highest = range_of_levels(self.lowest, self.highest, noise_range)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            first, last = (np.float64(level) ** (1 / self.rho) for level in (highest, lowest))
            levels = np.linspace(first, last, self.num_levels) ** self.rho
        if not (np.all(np.diff(levels) < 0) and levels[-1] > 0 and np.allclose(levels[[0, -1]], (highest, lowest))):
            raise ValueError(
                f"KarrasSchedule got rho={self.rho:g}, for which {self.num_levels} levels from {highest:g} down to "
                f"{lowest:g} are not distinct in double precision; give a rho between 1 and 100 (EDM uses 7)."
            )
        return levels


class GeometricSchedule(Schedule):
    """Noise levels in geometric progression, as many as keep the ratio of consecutive levels at most `factor`.

    Such a schedule resolves narrow and wide modes of a distribution alike. Its number of levels grows with the range:
    with the default factor there are 16 from 80 down to 0.02, and 20 from 80 down to 0.002.

    Args:
        factor: largest ratio of consecutive levels, above 1.
        lowest: smallest noise level; None takes the prior's.
        highest: largest noise level; None takes the prior's.

    Raises:
        ValueError: `factor` is not above 1.
    """

    factor: float = eqx.field(
        static=True,
        default=1.75,
        converter=number("GeometricSchedule", "factor", "give a number above 1 (the default is 1.75).", above=1),
    )
    lowest: float | None = eqx.field(static=True, default=None, converter=level("GeometricSchedule", "lowest"))
    highest: float | None = eqx.field(static=True, default=None, converter=level("GeometricSchedule", "highest"))

    def levels(self, noise_range: tuple[float, float]) -> np.ndarray:
        """Return the noise levels, highest first, for a prior with this (lowest, highest) range.

        Raises:
            ValueError: the range is not 0 < lowest < highest.
        """
        lowest, highest = range_of_levels(self.lowest, self.highest, noise_range)
        steps = int(np.ceil(np.log(highest / lowest) / np.log(self.factor) - 1e-9))
        return np.geomspace(highest, lowest, max(steps, 1) + 1)
