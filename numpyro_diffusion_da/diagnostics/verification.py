"""Scores of an ensemble against the truth or against observations.

All functions take either numpy arrays, with axes by position, or `xarray.DataArray`s, with axes by name. They return
the same kind. M is the number of members. Averages are weighted means over `axis`; scores that are a root average the
squares first and take the root last.

Points whose truth is NaN are left out, such as a missing observation or the sea surface temperature on land. A NaN
member at a point with a truth makes the score NaN, so that a failed forecast does not go unnoticed.

To score against observations, use members that contain the observation error, such as `posterior_predictive` of a
filter. These members have seen the observations that they are scored against; `innovations` compares observations with
forecasts made before. `spectra` describes fields along a ring. docs/verification.md explains each number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numpyro_diffusion_da.arguments import real_values, require_number
from numpyro_diffusion_da.diagnostics.labeling import Axis, EnsembleCase, is_labeled


def rmse(ensemble: Any, truth: Any, *, member: int | str = 0, axis: Axis = None, weights: Any = None) -> Any:
    """Root mean squared error of the ensemble mean, in the unit of the state.

    Args:
        ensemble: members; the axes of the truth and one axis of members.
        truth: values that the members are scored against, NaN where missing.
        member: axis of the members: its position in `ensemble` for numpy, its name for xarray.
        axis: axes of the truth to average over; all of them by default.
        weights: non-negative weights of the mean, for example `area_weights`. A numpy array is broadcast against the
            truth.

    Returns:
        RMSE, with the axes of the truth that are not averaged over.

    Raises:
        ValueError: shapes or axes do not fit.
        TypeError: numpy arrays and xarray arrays are mixed.
    """
    case = EnsembleCase(ensemble, truth, member, weights)
    return case.answer(case.mean(case.squared_error(), axis) ** 0.5)


def spread(ensemble: Any, *, member: int | str = 0, axis: Axis = None, weights: Any = None) -> Any:
    """Spread of the ensemble, comparable with the RMSE of its mean: sqrt((M + 1) / M x mean variance).

    The variance is the unbiased estimate. The factor (M + 1) / M accounts for the error of the mean of M members:
    spread / RMSE is 1 for a calibrated ensemble of any size (Fortin et al. 2014, J. Hydrometeorol. 15, 1708).

    Args:
        ensemble: members, at least two. Points where all members are NaN are left out.
        member: axis of the members: its position in `ensemble` for numpy, its name for xarray.
        axis: axes to average over, counted without the axis of the members; all of them by default.
        weights: non-negative weights of the mean, as in `rmse`.

    Returns:
        Spread in the unit of the state, with the axes that are not averaged over.

    Raises:
        ValueError: there are fewer than two members, or shapes or axes do not fit.
        TypeError: numpy arrays and xarray arrays are mixed.
    """
    case = EnsembleCase(ensemble, None, member, weights, alone=True)
    return case.answer(case.mean(case.variance(), axis) ** 0.5)


def spread_skill(ensemble: Any, truth: Any, *, member: int | str = 0, axis: Axis = None, weights: Any = None) -> Any:
    """Ratio of spread to RMSE over the same points: 1 if calibrated, below 1 if overconfident.

    Args:
        ensemble: members, at least two; the axes of the truth and one axis of members.
        truth: values that the members are scored against, NaN where missing.
        member: axis of the members: its position in `ensemble` for numpy, its name for xarray.
        axis: axes of the truth to average over; all of them by default.
        weights: non-negative weights of both means, as in `rmse`.

    Returns:
        Ratio, with the axes of the truth that are not averaged over.

    Raises:
        ValueError: there are fewer than two members, or shapes or axes do not fit.
        TypeError: numpy arrays and xarray arrays are mixed.
    """
    case = EnsembleCase(ensemble, truth, member, weights)
    return case.answer((case.mean(case.variance(), axis) / case.mean(case.squared_error(), axis)) ** 0.5)


def crps(ensemble: Any, truth: Any, *, member: int | str = 0, axis: Axis = None, weights: Any = None) -> Any:
    r"""Mean continuous ranked probability score (CRPS), in the unit of the state; lower is better.

    At each point this is the fair estimate, which does not favor larger ensembles:

    $$
    \frac{1}{M} \sum_i |x_i - y| - \frac{1}{2 M (M - 1)} \sum_{i,j} |x_i - x_j|.
    $$

    Args:
        ensemble: members x_i, at least two; the axes of the truth and one axis of members.
        truth: values y that the members are scored against, NaN where missing.
        member: axis of the members: its position in `ensemble` for numpy, its name for xarray.
        axis: axes of the truth to average over; all of them by default, none with ``()``.
        weights: non-negative weights of the mean, as in `rmse`.

    Returns:
        CRPS, with the axes of the truth that are not averaged over.

    Raises:
        ValueError: there are fewer than two members, or shapes or axes do not fit.
        TypeError: numpy arrays and xarray arrays are mixed.
    """
    import scoringrules

    case = EnsembleCase(ensemble, truth, member, weights)
    case.require_two_members()
    members = case.members.transpose(..., "member")
    # "pwm" computes the fair estimate by sorting (Zamo & Naveau 2018): M log M operations instead of M^2 pairs.
    score = scoringrules.crps_ensemble(case.truth.values, members.values, estimator="pwm", backend="numpy")
    return case.answer(case.mean(case.truth.copy(data=score), axis))


def energy_score(
    ensemble: Any, truth: Any, *, vector: Axis, member: int | str = 0, axis: Axis = None, weights: Any = None
) -> Any:
    r"""Mean energy score of vectors, in the unit of the state times the root of the weights; lower is better.

    For each vector this is the fair estimate

    $$
    \frac{1}{M} \sum_i \|x_i - y\| - \frac{1}{2 M (M - 1)} \sum_{i,j} \|x_i - x_j\|
    $$

    (Gneiting & Raftery 2007, J. Am. Stat. Assoc. 102, 359, section 4.3, with the second mean over pairs of different
    members). In one dimension it is the CRPS. The score is proper for the joint distribution, but insensitive to
    dependence between elements: a wrong correlation costs little if mean and spread are right (Pinson & Tastu 2013).

    Args:
        ensemble: members x_i, at least two; the axes of the truth and one axis of members.
        truth: values y that the members are scored against. Elements that are NaN are left out of their vector.
        vector: axes of the truth that together form one vector; usually not the axis of time.
        member: axis of the members: its position in `ensemble` for numpy, its name for xarray.
        axis: which of the other axes to average over, with equal weights; all of them by default. Vectors without a
            single element are left out.
        weights: non-negative weights of the norm, ||x||^2 = sum_j w_j x_j^2; for example `area_weights`, or one over
            the variance of each variable if vectors combine several.

    Returns:
        Energy score, with the axes that are neither in `vector` nor averaged over.

    Raises:
        ValueError: there are fewer than two members, `vector` is empty or shares an axis with `axis`, or shapes or axes
            do not fit.
        TypeError: numpy arrays and xarray arrays are mixed.
    """
    case = EnsembleCase(ensemble, truth, member, weights)
    case.require_two_members()
    within = case.axes(vector)
    if not within:
        raise ValueError("energy_score needs one axis or more in vector; for scores of single elements, take crps.")
    others = [str(name) for name in case.truth.dims if name not in within]
    averaged = others if axis is None else case.axes(axis)
    if both := sorted(set(within) & set(averaged)):
        raise ValueError(f"energy_score cannot average over {both}, which make up the vector; leave them out of axis.")
    scale = np.sqrt(case.weights)
    error = ((case.members - case.truth) * scale).where(case.valid, 0.0).transpose(*others, "member", *within)
    there = case.valid.any(within).transpose(*others)
    vectors = error.values.reshape(there.size, case.members.sizes["member"], -1)
    score = there.copy(data=_fair_energy(vectors).reshape(there.shape))
    total = score.where(there, 0.0).sum(averaged, skipna=False)
    count = there.sum(averaged)
    return case.answer(total / count.where(count > 0))


def _fair_energy(error: np.ndarray) -> np.ndarray:
    """Fair energy score of each case from members minus truth: (case, member, element) -> (case,)."""
    import scoringrules

    m = error.shape[1]
    scores = []
    for one in error:
        # M vectors span at most M dimensions. Coordinates in that space keep all distances, and the pairs fit in memory
        # however long the vectors are. A NaN spreads to all coordinates, as it should.
        one = np.transpose(np.linalg.qr(one.T, mode="r")) if one.shape[1] > m else one
        scores.append(scoringrules.es_ensemble(np.zeros(one.shape[1]), one, estimator="fair", backend="numpy"))
    return np.array(scores)


def rank_histogram(ensemble: Any, truth: Any, *, member: int | str = 0) -> np.ndarray:
    """Count how often the truth has each rank among the members, over all points; flat for a calibrated ensemble.

    A U shape means too little spread, a hump too much spread, and a slope a bias. Ties, as in a variable bounded at
    zero, are divided equally among the ranks that they could have.

    Args:
        ensemble: members; the axes of the truth and one axis of members.
        truth: values that the members are scored against, NaN where missing.
        member: axis of the members: its position in `ensemble` for numpy, its name for xarray.

    Returns:
        Number of points with 0, 1, ..., M members below the truth, shape (M + 1,). The counts sum to the number of
        points that are not missing.

    Raises:
        ValueError: a member is NaN where the truth is not, or shapes or axes do not fit.
        TypeError: numpy arrays and xarray arrays are mixed.
    """
    case = EnsembleCase(ensemble, truth, member, None)
    m = case.members.sizes["member"]
    valid = case.valid.values.reshape(-1)
    members = case.members.transpose("member", ...).values.reshape(m, -1)[:, valid]
    values = case.truth.values.reshape(-1)[valid]
    if np.isnan(members).any():
        raise ValueError(
            "rank_histogram got NaN members where the truth is given, but NaN has no rank; set the truth to NaN there."
        )
    below = np.sum(members < values, axis=0)
    ties = np.sum(members == values, axis=0)
    share = 1.0 / (ties + 1)
    # Each point adds its share to the ranks below, ..., below + ties. Count steps up and down, then sum them.
    steps = np.bincount(below, share, m + 2) - np.bincount(below + ties + 1, share, m + 2)
    return np.cumsum(steps)[: m + 1]


class Flatness(NamedTuple):
    """Test of a rank histogram for flatness, returned by `flatness`.

    Attributes:
        chi_square: Pearson's chi-square statistic against equal counts.
        p_value: probability of a larger `chi_square` if flat, with M degrees of freedom.
        bias: linear component, standard normal if flat. If positive, counts increase with rank and the members are too
            low; if negative, they are too high.
        bias_p_value: probability of a `bias` of larger absolute value if flat.
        dispersion: U-shaped component, standard normal if flat. If positive, the histogram is a U and the spread too
            small; if negative, it is a hump and the spread too large.
        dispersion_p_value: probability of a `dispersion` of larger absolute value if flat.
        rest: chi_square - bias^2 - dispersion^2, the deviation that neither component explains.
        rest_p_value: probability of a larger `rest` if flat, with M - 2 degrees of freedom; NaN for M = 2.
    """

    chi_square: float
    p_value: float
    bias: float
    bias_p_value: float
    dispersion: float
    dispersion_p_value: float
    rest: float
    rest_p_value: float


def flatness(counts: Any, *, effective: float | None = None) -> Flatness:
    r"""Test whether a rank histogram is flat, and attribute deviations to bias or to wrong spread.

    With K = M + 1 ranks, n points, n_i of them at rank i, and e = n / K,

    $$
    \chi^2 = \sum_i x_i^2, \qquad x_i = (n_i - e) / \sqrt{e}.
    $$

    The components $(\sum_i u_i x_i)^2$ along orthonormal contrasts u have one degree of freedom each (Jolliffe & Primo
    2008, Mon. Weather Rev. 136, 2133). Two contrasts are used. The first is linear in the rank and responds to a bias.
    The second is quadratic in the rank, orthogonal to the first and to a constant, and responds to a wrong spread. If a
    deviation is large, each also shows a little of the other.

    The p-values assume independent points. Ranks at neighboring points and times are correlated, so the p-values of a
    whole field are far too small. Use points that are far apart in space and time, for example
    ``rank_histogram(x[..., ::20, ::10], y[..., ::20, ::10])``, or set `effective`. If ties were divided among ranks,
    counts vary less and the test rejects too rarely.

    Args:
        counts: counts from `rank_histogram`, shape (M + 1,), M at least 2.
        effective: number of independent points that the counts represent; the counts are scaled to this sum. None if
            all points are independent.

    Returns:
        Chi-square and its components, each with a p-value.

    Raises:
        ValueError: there are fewer than three ranks, counts are negative or all 0, or `effective` is not above 0 and at
            most the number of points.
    """
    import scipy.stats

    n = real_values(counts, "the array of counts")
    if n.ndim != 1 or n.size < 3 or not np.all(n >= 0) or not n.sum() > 0:
        raise ValueError(
            f"flatness takes counts of three ranks or more, not negative and not all 0; got counts of shape {n.shape}."
        )
    if effective is not None:
        advice = "give the number of independent points, or None for all."
        effective = require_number(effective, "flatness", "effective", advice)
        # The tolerance allows for rounding of counts whose ties were divided.
        if not 0 < effective <= n.sum() * (1 + 1e-9):
            raise ValueError(f"effective={effective}; give a number above 0 and up to the {n.sum():g} points counted.")
        n = n * (effective / n.sum())
    expected = n.mean()
    x = (n - expected) / np.sqrt(expected)
    ranks = np.arange(n.size) - (n.size - 1) / 2
    # Because the ranks are centered, odd and even contrasts are orthogonal.
    linear, quadratic = ranks, ranks**2 - np.mean(ranks**2)
    bias, dispersion = (float(u @ x / np.linalg.norm(u)) for u in (linear, quadratic))
    chi_square = float(x @ x)
    rest = max(chi_square - bias**2 - dispersion**2, 0.0)
    return Flatness(
        chi_square,
        float(scipy.stats.chi2.sf(chi_square, n.size - 1)),
        bias,
        float(2 * scipy.stats.norm.sf(abs(bias))),
        dispersion,
        float(2 * scipy.stats.norm.sf(abs(dispersion))),
        rest,
        float(scipy.stats.chi2.sf(rest, n.size - 3)) if n.size > 3 else float("nan"),
    )


def area_weights(latitude: Any) -> Any:
    """Area of latitude-longitude grid cells by latitude, scaled to mean 1.

    The area of a cell is sin(top edge) - sin(bottom edge), with edges halfway between cell centers. The first and last
    cell are symmetric about their center, or end at the pole if the next center would lie beyond it.

    Use these weights for scores on any latitude-longitude grid. On a regular grid they are proportional to the common
    cos(latitude) except at the poles, where a row has the area of a cap and the cosine is 0. The Gaussian grid of
    `priors.SphericalEmulator` has exact quadrature weights of its own.

    Args:
        latitude: latitudes of the cell centers, in degrees north, ascending or descending, shape (n,).

    Returns:
        Weights of shape (n,), of the same kind as `latitude`.

    Raises:
        ValueError: latitudes are not one axis with at least one value, not monotonic, or not within -90 to 90 degrees.
    """
    values = real_values(latitude, "the array of latitudes")
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"area_weights takes latitudes along one axis, one or more; got shape {values.shape}.")
    if not np.all(np.abs(values) <= 90.0):
        raise ValueError("area_weights takes latitudes in degrees from -90 to 90; some are outside or NaN.")
    weights = np.ones(1)
    if values.size > 1:
        steps = np.diff(values)
        if not (np.all(steps > 0) or np.all(steps < 0)):
            raise ValueError("area_weights takes latitudes that only increase or only decrease; these do neither.")
        ends = [_outer_edge(values[0], -steps[0]), _outer_edge(values[-1], steps[-1])]
        edges = np.concatenate([ends[:1], values[:-1] + steps / 2, ends[1:]])
        weights = np.abs(np.diff(np.sin(np.deg2rad(edges))))
        weights = weights / weights.mean()
    return latitude.copy(data=weights) if is_labeled(latitude) else weights


def _outer_edge(center: float, step: float) -> float:
    """Latitude where the first or last cell ends; `step` is the spacing inside, with the sign of outwards."""
    if abs(center + step) > 90.0:
        return float(np.copysign(90.0, step))
    return center + step / 2
