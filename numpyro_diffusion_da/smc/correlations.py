"""Correlation functions for localization: how the weight of an observation falls with distance."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import equinox as eqx
import numpy as np
from jaxtyping import Float


class Correlation(eqx.Module):
    """Correlation as a function of the distance over the half-width of a taper, with compact support.

    Another function is a subclass that implements `__call__`. Its settings are fields that hold plain values, because
    they become part of the repr of a `Taper`, which is stored with results.
    """

    is_positive_definite: ClassVar[bool] = False
    """Whether its values between any points are a covariance matrix; updates that taper covariances require this."""

    @abc.abstractmethod
    def __call__(self, ratio: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
        """Correlation at given distances.

        Args:
            ratio: distance over the half-width, not negative.

        Returns:
            Values of the shape of `ratio`, from 0 to 1: 1 at 0, and exactly 0 from 2 on.
        """

    def __repr__(self) -> str:
        """Text with all settings. The repr of other modules leaves out settings that have their default value."""
        settings = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self))
        return f"{type(self).__name__}({settings})"


class GaspariCohn(Correlation):
    """Compactly supported correlation of Gaspari & Cohn (1999), eq. 4.10, close to a Gaussian."""

    is_positive_definite: ClassVar[bool] = True

    def __call__(self, ratio: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
        """Correlation at distances over the half-width: 1 at 0, 5/24 at 1, 0 from 2 on."""
        return gaspari_cohn(ratio)


class Boxcar(Correlation):
    """Cutoff: every observation nearer than twice the half-width has its full weight, and no other has any.

    This is the cutoff radius of Houtekamer & Mitchell (1998, Mon. Weather Rev. 126, 796). It is not a positive definite
    function. `SquareRoot` and localized resampling, which select observations by distance, take it.
    `PerturbedObservations`, which multiplies covariances by the taper, refuses it.
    """

    def __call__(self, ratio: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
        """Correlation at distances over the half-width: 1 below 2, 0 from 2 on."""
        return np.where(np.asarray(ratio) < 2.0, 1.0, 0.0)


def gaspari_cohn(ratio: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
    """Compactly supported correlation of Gaspari & Cohn (1999), eq. 4.10, close to a Gaussian of width 0.55 c.

    Args:
        ratio: distance over the half-width c, not negative.

    Returns:
        Values of the shape of `ratio`: 1 at 0, 5/24 at 1, 0 from 2 on. The function is twice differentiable.
    """
    z = np.minimum(np.asarray(ratio, np.float64), 2.0)
    near = 1.0 + z**2 * (-5.0 / 3.0 + z * (5.0 / 8.0 + z * (0.5 - 0.25 * z)))
    far_z = np.maximum(z, 1.0)
    far = 4.0 - 5.0 * z + z**2 * (5.0 / 3.0 + z * (5.0 / 8.0 + z * (-0.5 + z / 12.0))) - 2.0 / (3.0 * far_z)
    return np.where(z <= 1.0, near, np.maximum(far, 0.0))
