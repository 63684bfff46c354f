"""Power spectrum and roughness of fields along a ring, such as a circle of latitude or a periodic model.

Both functions take either numpy arrays, with axes by position, or `xarray.DataArray`s, with axes by name. They return
the same kind. The points of a ring are equally spaced, and the first point follows the last. A NaN on a ring makes the
answer for that ring NaN.

The mean of an ensemble is smoother than its members. Compute the spectrum of each member and average the spectra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.diagnostics.labeling import (
    Axis,
    answer,
    axis_names,
    broadcast,
    check_weights,
    is_labeled,
    named,
    one_axis,
    real,
    require_same_labels,
)

if TYPE_CHECKING:
    import xarray


def power_spectrum(field: Any, *, axis: int | str = -1, average: Axis = (), weights: Any = None) -> Any:
    r"""Variance along a ring by wavenumber, in the squared unit of the field.

    For a ring of n points, $x_j = \sum_k c_k \exp(2 \pi i j k / n)$, wavenumber k has the power
    $|c_k|^2 + |c_{-k}|^2 = 2 |c_k|^2$, or $|c_k|^2$ if $k = n / 2$. The sum over all k is the variance along the ring
    about the mean of the ring (Parseval's theorem).

    On a circle of latitude, k is the number of waves around the circle. Their length decreases towards the pole as
    cos(latitude).

    Args:
        field: shape (..., n, ...), n at least 2.
        axis: axis of the ring.
        average: other axes of the field to average the power over, such as members, times and latitudes.
        weights: non-negative weights of that mean, for example `area_weights`. A numpy array is broadcast against the
            field without the axis of the ring.

    Returns:
        Power at the wavenumbers 1, 2, ..., n // 2, in the place of the axis of the ring; for xarray this dimension is
        named `wavenumber`.

    Raises:
        ValueError: axes or weights do not fit the field, or the ring has fewer than 2 points.
        TypeError: numpy arrays and xarray arrays are mixed.
    """
    ring = _Ring(field, axis, average, weights)
    n = ring.field.sizes[ring.axis]
    power = 2 * np.abs(np.fft.rfft(ring.field.values, axis=-1)[..., 1:]) ** 2 / n**2
    if n % 2 == 0:
        power[..., -1] /= 2
    spectrum = ring.field.isel({ring.axis: 0}, drop=True).expand_dims(wavenumber=np.arange(1, n // 2 + 1), axis=-1)
    return ring.answer(ring.mean(spectrum.copy(data=power)), "wavenumber")


def roughness(field: Any, *, axis: int | str = -1, average: Axis = (), weights: Any = None) -> Any:
    r"""Mean squared first difference along a ring, divided by twice the variance: near 0 if smooth, 1 if white noise.

    The roughness of a ring x of n points is

    $$
    \frac{1}{n} \sum_j \frac{(x_{j+1} - x_j)^2}{2 \operatorname{Var} x},
    $$

    where Var x is the variance along the ring about the mean of the ring. This is one minus the autocorrelation of
    neighboring points, and also the mean of $1 - \cos(2 \pi k / n)$ over the power spectrum. A wave of k periods has
    exactly this value. Independent values have n / (n - 1), with the means of numerator and denominator taken
    separately. Alternating signs have 2. Seams increase the roughness, such as those between parts of a field that
    come from different members.

    Args:
        field: shape (..., n, ...), n at least 2.
        axis: axis of the ring.
        average: other axes of the field to average over; numerator and denominator are averaged separately.
        weights: non-negative weights of that mean, as in `power_spectrum`.

    Returns:
        Roughness, without the axis of the ring; NaN where the field does not vary.

    Raises:
        ValueError: axes or weights do not fit the field, or the ring has fewer than 2 points.
        TypeError: numpy arrays and xarray arrays are mixed.
    """
    ring = _Ring(field, axis, average, weights)
    x = ring.field
    steps = x.copy(data=np.roll(x.values, -1, axis=-1) - x.values)
    variance = ring.mean(x.var(ring.axis, skipna=False))
    return ring.answer(ring.mean((steps**2).mean(ring.axis, skipna=False)) / (2 * variance.where(variance > 0)))


def _check_circle(longitude: np.ndarray, name: str) -> None:
    """Check that longitudes are equally spaced and go around once.

    Raises:
        ValueError: they do not, as on the grid of a region, or with 360 degrees beside 0.
    """
    steps = np.diff(np.unwrap(np.append(longitude, longitude[0]), period=360.0))
    even = np.all(np.abs(np.abs(steps) - 360.0 / longitude.size) <= 1e-3)
    # Of two points, unwrapping goes there and back.
    if not even or not (abs(abs(steps.sum()) - 360.0) < 1e-2 or longitude.size == 2):
        raise ValueError(
            f"'{name}' goes from {longitude[0]:g} to {longitude[-1]:g} degrees in {longitude.size} points, but a ring "
            "has equally spaced points that go around once; leave out a repeated meridian, or give the field of a full "
            "circle."
        )


class _Ring:
    """Field with the axis of its ring last, and weighted means over its other axes."""

    def __init__(self, field: Any, axis: int | str, average: Axis, weights: Any) -> None:
        import xarray

        self.labeled = is_labeled(field)
        if weights is not None and is_labeled(weights) != self.labeled:
            raise TypeError("field and weights: give both as numpy arrays or both as xarray.DataArray.")
        field = named(field, "the field")
        self.dims = [str(name) for name in field.dims]
        self.axis = one_axis(axis, "axis", self.dims, self.labeled, "the field")
        others = [name for name in self.dims if name != self.axis]
        self.averaged = others if average is None else axis_names(average, self.dims, self.labeled, "the field")
        if self.axis in self.averaged:
            raise ValueError(f"average contains {axis!r}, the axis of the ring; give other axes of the field, or none.")
        if field.sizes[self.axis] < 2:
            raise ValueError(f"a ring has 2 points or more; axis {axis!r} has {field.sizes[self.axis]}.")
        if self.axis in ("longitude", "lon") and self.axis in field.coords:
            _check_circle(np.asarray(field.coords[self.axis].values, float), self.axis)
        self.field = field.transpose(..., self.axis)
        at_a_point = self.field.isel({self.axis: 0}, drop=True)
        if weights is None:
            self.weights = xarray.ones_like(at_a_point)
        elif not self.labeled:
            self.weights = at_a_point.copy(data=broadcast(weights, at_a_point.shape, "the array of weights"))
        elif extra := set(weights.dims) - set(others):
            raise ValueError(f"weights have axes {sorted(extra)}, which are not among the field's other axes {others}.")
        else:
            self.weights = real(weights, "the array of weights")
            require_same_labels(field=self.field, weights=self.weights)
        check_weights(self.weights.values)

    def mean(self, values: xarray.DataArray) -> xarray.DataArray:
        """Weighted mean of `values` over the axes to average over; NaN if any of them is NaN."""
        weights = self.weights.broadcast_like(values)
        return (values * weights).sum(self.averaged, skipna=False) / weights.sum(self.averaged)

    def answer(self, values: xarray.DataArray, instead: str | None = None) -> Any:
        """Convert `values` to the kind of the field; the axis `instead`, if any, takes the place of the ring's axis."""
        dims = [instead if name == self.axis else name for name in self.dims]
        return answer(values.transpose(*[name for name in dims if name in values.dims]), self.labeled)
