"""Fields along a ring (a circle of latitude, a periodic model): how their variance is spread over wavenumbers.

Both take numpy arrays, with axes by position, or `xarray.DataArray`, with axes by name, and answer in kind. The points
of the ring are equally spaced and the last is followed by the first. A NaN on a ring makes its answer NaN.

The mean of an ensemble is smoother than its members, so that a spectrum is taken of each member and averaged then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.diagnostics.labeling import Axis, answer, axis_names, is_labeled, named

if TYPE_CHECKING:
    import xarray


def power_spectrum(field: Any, *, axis: int | str = -1, average: Axis = (), weights: Any = None) -> Any:
    """Variance along a ring by wavenumber, in the squared unit of the field.

    With x_j = sum_k c_k exp(2 pi i j k / n), wavenumber k has the power |c_k|^2 + |c_-k|^2 = 2 |c_k|^2, and |c_k|^2
    alone for k = n / 2. The sum over k is the variance along the ring about its own mean (Parseval's theorem).

    On a circle of latitude k counts waves around it, whose length shrinks towards the pole as cos(latitude).

    Args:
        field: shape (..., n, ...), n at least 2.
        axis: the ring.
        average: other axes of the field, over which the power is averaged: members, times, latitudes.
        weights: of that mean, not negative, for instance `verification.area_weights`. For numpy they broadcast against
            the field without the ring's axis.

    Returns:
        Power at the wavenumbers 1, 2, ..., n // 2, in the place of the ring's axis; for xarray its dimension is
        `wavenumber`.

    Raises:
        ValueError: axes or weights that do not fit, or a ring of fewer than 2 points.
        TypeError: numpy arrays mixed with xarray's.
    """
    ring = _Ring(field, axis, average, weights)
    n = ring.field.sizes[ring.axis]
    power = 2 * np.abs(np.fft.rfft(ring.field.values, axis=-1)[..., 1:]) ** 2 / n**2
    if n % 2 == 0:
        power[..., -1] /= 2
    spectrum = ring.field.isel({ring.axis: 0}, drop=True).expand_dims(wavenumber=np.arange(1, n // 2 + 1), axis=-1)
    return ring.answer(ring.mean(spectrum.copy(data=power)), "wavenumber")


def roughness(field: Any, *, axis: int | str = -1, average: Axis = (), weights: Any = None) -> Any:
    """Mean square of first differences along a ring over twice its variance: near 0 smooth, near 1 white noise.

    (1/n) sum_j (x_{j+1} - x_j)^2 / (2 Var x), Var x the variance along the ring about its own mean. It is one minus the
    autocorrelation of neighbors, and the mean of 1 - cos(2 pi k / n) over the power spectrum: a wave of k periods has
    exactly that, independent values n / (n - 1) in the mean of numerator and denominator, an alternation of signs 2.
    Seams, as where one part of a field comes from another member than the next, raise it.

    Args:
        field: as in `power_spectrum`.
        axis: the ring.
        average: other axes of the field; numerator and denominator are averaged over them, each for itself.
        weights: as in `power_spectrum`.

    Returns:
        Roughness, without the ring's axis; NaN where nothing varies.

    Raises:
        ValueError: see `power_spectrum`.
        TypeError: see `power_spectrum`.
    """
    ring = _Ring(field, axis, average, weights)
    x = ring.field
    steps = x.copy(data=np.roll(x.values, -1, axis=-1) - x.values)
    variance = ring.mean(x.var(ring.axis, skipna=False))
    return ring.answer(ring.mean((steps**2).mean(ring.axis, skipna=False)) / (2 * variance.where(variance > 0)))


class _Ring:
    """A field with the ring's axis last, and the mean over others."""

    def __init__(self, field: Any, axis: int | str, average: Axis, weights: Any) -> None:
        import xarray

        self.labeled = is_labeled(field)
        if weights is not None and is_labeled(weights) != self.labeled:
            raise TypeError("field and weights: give both as numpy arrays or both as xarray.DataArray.")
        field = named(field)
        self.dims = [str(name) for name in field.dims]
        (self.axis,) = axis_names(axis, self.dims, self.labeled, "the field")
        others = [name for name in self.dims if name != self.axis]
        self.averaged = others if average is None else axis_names(average, self.dims, self.labeled, "the field")
        if self.axis in self.averaged:
            raise ValueError(f"average has the axis of the ring, {axis!r}; name other axes, or none.")
        if field.sizes[self.axis] < 2:
            raise ValueError(f"a ring has 2 points or more; along {axis!r} there is {field.sizes[self.axis]}.")
        self.field = field.transpose(..., self.axis)
        at_a_point = self.field.isel({self.axis: 0}, drop=True)
        if weights is None:
            self.weights = xarray.ones_like(at_a_point)
        elif not self.labeled:
            self.weights = at_a_point.copy(data=np.broadcast_to(np.asarray(weights, float), at_a_point.shape))
        elif extra := set(weights.dims) - set(others):
            raise ValueError(f"weights have {sorted(extra)}, which are not among the field's other axes {others}.")
        else:
            self.weights = weights.astype(float)
            xarray.align(self.field, self.weights, join="exact")  # by default xarray would keep the points in common

    def mean(self, values: xarray.DataArray) -> xarray.DataArray:
        """Weighted mean over the axes to average over, a NaN included."""
        weights = self.weights.broadcast_like(values)
        return (values * weights).sum(self.averaged, skipna=False) / weights.sum(self.averaged)

    def answer(self, values: xarray.DataArray, instead: str | None = None) -> Any:
        """In the kind of the field, with the axis `instead` where the ring's was."""
        dims = [instead if name == self.axis else name for name in self.dims]
        return answer(values.transpose(*[name for name in dims if name in values.dims]), self.labeled)
