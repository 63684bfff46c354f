"""Correlation functions for localization: how the weight of an observation falls with distance."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import equinox as eqx
import numpy as np
from jaxtyping import Float

from numpyro_diffusion_da.smc.distances import Numbers, array_module


class Correlation(eqx.Module):
    """Correlation as a function of the distance over the half-width of a taper, with compact support.

    Another function is a subclass that implements `__call__`. Its settings are fields that hold plain values, because
    they become part of the repr of a `Taper`, which is stored with results. It may be written with numpy alone if no
    places move; for places that move (see `Taper`) it has to take JAX arrays too.
    """

    is_positive_definite: ClassVar[bool] = False
    """Whether its values between any points are a covariance matrix; updates that taper covariances require this."""

    @abc.abstractmethod
    def __call__(self, ratio: Float[Numbers, ...]) -> Float[Numbers, ...]:
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

    def __call__(self, ratio: Float[Numbers, ...]) -> Float[Numbers, ...]:
        """Correlation at distances over the half-width: 1 at 0, 5/24 at 1, 0 from 2 on."""
        return gaspari_cohn(ratio)


class Boxcar(Correlation):
    """Cutoff: every observation nearer than twice the half-width has its full weight, and no other has any.

    This is the cutoff radius of Houtekamer & Mitchell (1998, Mon. Weather Rev. 126, 796). It is not a positive definite
    function. `SquareRoot` and localized resampling, which select observations by distance, take it.
    `PerturbedObservations`, which multiplies covariances by the taper, refuses it.
    """

    def __call__(self, ratio: Float[Numbers, ...]) -> Float[Numbers, ...]:
        """Correlation at distances over the half-width: 1 below 2, 0 from 2 on."""
        xp = array_module(ratio)
        return xp.where(xp.asarray(ratio) < 2.0, 1.0, 0.0)


def gaspari_cohn(ratio: Float[Numbers, ...]) -> Float[Numbers, ...]:
    """Compactly supported correlation of Gaspari & Cohn (1999), eq. 4.10, close to a Gaussian of width 0.55 c.

    Args:
        ratio: distance over the half-width c, not negative.

    Returns:
        Values of the shape of `ratio`: 1 at 0, 5/24 at 1, 0 from 2 on. The function is twice differentiable.
    """
    xp = array_module(ratio)
    z = xp.minimum(xp.asarray(ratio, float), 2.0)
    near = 1.0 + z**2 * (-5.0 / 3.0 + z * (5.0 / 8.0 + z * (0.5 - 0.25 * z)))
    far_z = xp.maximum(z, 1.0)
    if xp is np:
        far = 4.0 - 5.0 * z + z**2 * (5.0 / 3.0 + z * (5.0 / 8.0 + z * (-0.5 + z / 12.0))) - 2.0 / (3.0 * far_z)
    else:
        # The same polynomial in factors, because in single precision its terms cancel to a few 1e-7 near 2.
        far = (2.0 - z) ** 4 * (z**2 + 2.0 * z - 0.5) / (12.0 * far_z)
    return xp.where(z <= 1.0, near, xp.maximum(far, 0.0))
