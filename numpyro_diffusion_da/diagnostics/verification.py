"""Scores of an ensemble against the truth or observations.

All take numpy arrays, with axes by position, or `xarray.DataArray`, with axes by name, and answer in kind. M is the
number of members. Averages are weighted means over `axis`, of squares first with the root last.

A point whose truth is NaN is left out (a missing observation, land in a sea surface temperature); a NaN member where
there is a truth makes the score NaN, so that a failed forecast is seen.

Against observations, give members with the observation error added: `posterior_predictive` of a filter, whose members
have seen those observations. What it forecast before it saw them is the matter of `innovations`; what a field looks
like along a ring, of `spectra`. docs/verification.md says what each number means.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numpyro_diffusion_da.diagnostics.labeling import Axis, EnsembleCase, is_labeled


def rmse(ensemble: Any, truth: Any, *, member: int | str = 0, axis: Axis = None, weights: Any = None) -> Any:
    """Root mean squared error of the ensemble mean, in the unit of the state.

    Args:
        ensemble: members; one axis more than the truth.
        truth: what they are scored against.
        member: the members' axis: position in `ensemble` for numpy, name for xarray.
        axis: axes of the truth that are averaged over; all by default.
        weights: of the mean, not negative, for instance `area_weights`. For numpy it broadcasts against the truth.

    Raises:
        ValueError: shapes or axes that do not fit.
        TypeError: numpy arrays mixed with xarray's.
    """
    case = EnsembleCase(ensemble, truth, member, weights)
    return case.answer(case.mean(case.squared_error(), axis) ** 0.5)


def spread(ensemble: Any, *, member: int | str = 0, axis: Axis = None, weights: Any = None) -> Any:
    """Spread of the ensemble, comparable with the RMSE of its mean: sqrt((M + 1) / M mean variance).

    The variance is the unbiased one. The factor makes up for the error of the mean of M members, so that spread / RMSE
    is 1 for a calibrated ensemble of any size (Fortin et al. 2014, J. Hydrometeorol. 15, 1708).

    Args:
        ensemble: members, at least 2. Points where all are NaN are left out.
        member: see `rmse`.
        axis: see `rmse`.
        weights: see `rmse`.

    Raises:
        ValueError: see `rmse`, and fewer than two members.
        TypeError: see `rmse`.
    """
    case = EnsembleCase(ensemble, None, member, weights)
    return case.answer(case.mean(case.variance(), axis) ** 0.5)


def spread_skill(ensemble: Any, truth: Any, *, member: int | str = 0, axis: Axis = None, weights: Any = None) -> Any:
    """Spread / RMSE over the same points: 1 calibrated, below 1 overconfident.

    Arguments and errors as `rmse`; at least two members.
    """
    case = EnsembleCase(ensemble, truth, member, weights)
    return case.answer((case.mean(case.variance(), axis) / case.mean(case.squared_error(), axis)) ** 0.5)


def crps(ensemble: Any, truth: Any, *, member: int | str = 0, axis: Axis = None, weights: Any = None) -> Any:
    """Mean continuous ranked probability score, in the unit of the state; lower is better.

    The fair estimate mean |x_i - y| - sum_ij |x_i - x_j| / (2 M (M - 1)), which does not favor larger ensembles.

    Arguments and errors as `rmse`; at least two members. ``axis=()`` gives the score of every point.
    """
    import scoringrules

    case = EnsembleCase(ensemble, truth, member, weights)
    case.require_two_members()
    members = case.members.transpose(..., "member")
    # "pwm" is the fair estimate (Zamo & Naveau 2018) by sorting: M log M operations, where "fair" makes all M^2 pairs.
    score = scoringrules.crps_ensemble(case.truth.values, members.values, estimator="pwm", backend="numpy")
    return case.answer(case.mean(case.truth.copy(data=score), axis))


def energy_score(
    ensemble: Any, truth: Any, *, vector: Axis, member: int | str = 0, axis: Axis = None, weights: Any = None
) -> Any:
    """Mean energy score of whole vectors, in the unit of the state (times the root of the weights); lower is better.

    The fair estimate mean ||x_i - y|| - sum_ij ||x_i - x_j|| / (2 M (M - 1)) (Gneiting & Raftery 2007, J. Am. Stat.
    Assoc. 102, 359, section 4.3, with the second mean over different members). In one dimension it is the CRPS. It is
    proper for the joint distribution, but weak at telling dependence between elements: a wrong correlation costs little
    where mean and spread are right (Pinson & Tastu 2013).

    Args:
        ensemble: see `rmse`; at least two members.
        truth: see `rmse`. An element that is missing is left out of its vector.
        vector: axes of the truth that together are one vector: time and cycles usually not among them.
        member: see `rmse`.
        axis: which of the other axes are averaged over, plainly; all of them by default. Vectors of which nothing is
            there are left out.
        weights: of the norm, ||x||^2 = sum_j w_j x_j^2, not negative; for instance `area_weights`, or 1 over the
            variance of each variable where several are put together.

    Raises:
        ValueError: see `rmse`; fewer than two members, no axis for the vector, one that is also averaged over.
        TypeError: see `rmse`.
    """
    case = EnsembleCase(ensemble, truth, member, weights)
    case.require_two_members()
    within = case.axes(vector)
    if not within:
        raise ValueError("energy_score needs one axis or more in vector; for the score of single elements take crps.")
    others = [str(name) for name in case.truth.dims if name not in within]
    averaged = others if axis is None else case.axes(axis)
    if both := sorted(set(within) & set(averaged)):
        raise ValueError(f"energy_score cannot average over {both}, which it is told make up the vector.")
    scale = np.sqrt(case.weights)
    error = ((case.members - case.truth) * scale).where(case.valid, 0.0).transpose(*others, "member", *within)
    there = case.valid.any(within).transpose(*others)
    vectors = error.values.reshape(there.size, case.members.sizes["member"], -1)
    score = there.copy(data=_fair_energy(vectors).reshape(there.shape))
    total = score.where(there, 0.0).sum(averaged, skipna=False)
    count = there.sum(averaged)
    return case.answer(total / count.where(count > 0))


def _fair_energy(error: np.ndarray) -> np.ndarray:
    """Fair energy scores of members minus truth, (case, member, element) -> (case,)."""
    import scoringrules

    m = error.shape[1]
    scores = []
    for one in error:
        # M vectors span M dimensions at most: their coordinates there have the same distances, and the pairs fit in
        # memory however long the vectors are. (LAPACK carries a NaN to all of them, as it should be.)
        one = np.transpose(np.linalg.qr(one.T, mode="r")) if one.shape[1] > m else one
        scores.append(scoringrules.es_ensemble(np.zeros(one.shape[1]), one, estimator="fair", backend="numpy"))
    return np.array(scores)


def rank_histogram(ensemble: Any, truth: Any, *, member: int | str = 0) -> np.ndarray:
    """How often the truth has each rank among the members, over all points: flat for a calibrated ensemble.

    U-shaped: too little spread; a hump: too much; a slope: bias. Ties (a variable bounded at zero) are counted in equal
    parts on the ranks that they could have.

    Args:
        ensemble: see `rmse`.
        truth: see `rmse`.
        member: see `rmse`.

    Returns:
        counts, shape (M + 1,): the number of points with 0, 1, ..., M members below the truth. They sum to the number
        of points that are not missing.

    Raises:
        ValueError: see `rmse`, and a NaN member where there is a truth.
        TypeError: see `rmse`.
    """
    case = EnsembleCase(ensemble, truth, member, None)
    m = case.members.sizes["member"]
    valid = case.valid.values.reshape(-1)
    members = case.members.transpose("member", ...).values.reshape(m, -1)[:, valid]
    values = case.truth.values.reshape(-1)[valid]
    if np.isnan(members).any():
        raise ValueError("rank_histogram has NaN members where the truth is given; a NaN has no rank.")
    below = np.sum(members < values, axis=0)
    ties = np.sum(members == values, axis=0)
    share = 1.0 / (ties + 1)
    # Each point adds its share to the ranks below, ..., below + ties: as steps up and down, summed afterwards.
    steps = np.bincount(below, share, m + 2) - np.bincount(below + ties + 1, share, m + 2)
    return np.cumsum(steps)[: m + 1]


class Flatness(NamedTuple):
    """How far a rank histogram is from flat, see `flatness`.

    Attributes:
        chi_square: Pearson's statistic against equal counts.
        p_value: probability of a larger one, from chi-square with M degrees of freedom.
        bias: linear component, standard normal if the histogram is flat. Positive: counts rise with the rank, so the
            members lie too low; negative: too high.
        bias_p_value: probability of one that is larger in size.
        dispersion: U-shaped component, standard normal if flat. Positive: a U, too little spread; negative: a hump, too
            much.
        dispersion_p_value: probability of one that is larger in size.
        rest: chi_square - bias^2 - dispersion^2, what neither explains.
        rest_p_value: probability of a larger one, from chi-square with M - 2 degrees of freedom; NaN for M = 2.
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
    """Test whether a rank histogram is flat, and for what reason it is not.

    With K = M + 1 ranks, n points, n_i of them at rank i and e = n / K, chi-square = sum_i x_i^2 with
    x_i = (n_i - e) / sqrt(e). Its components along orthonormal contrasts, (sum_i u_i x_i)^2, each have one degree of
    freedom (Jolliffe & Primo 2008, Mon. Weather Rev. 136, 2133): here u linear in the rank, which a bias brings forth,
    and u quadratic in it and orthogonal to that and to a constant, which a wrong spread brings forth. Each also shows a
    little of the other, where the deviation is large.

    The p-values are those of independent points. Ranks at neighboring points and times are correlated, so those of a
    field are far too small: take the histogram of points that are far apart in space and time, as in
    ``rank_histogram(x[..., ::20, ::10], y[..., ::20, ::10])``, or say how many independent points there are. With ties
    shared out, counts vary less, and the test rejects too seldom.

    Args:
        counts: from `rank_histogram`, shape (M + 1,), at least 3.
        effective: number of independent points that the counts stand for; the counts are scaled to sum to it. None: all
            of them.

    Raises:
        ValueError: fewer than three ranks, negative or no counts, or `effective` not positive or above their number.
    """
    import scipy.stats

    n = np.asarray(counts, float)
    if n.ndim != 1 or n.size < 3 or not np.all(n >= 0) or not n.sum() > 0:
        raise ValueError(
            f"flatness takes the counts of three ranks or more, not negative and not all 0; got the shape {n.shape}."
        )
    if effective is not None:
        # A share of a point is left for the rounding of counts that were shared out.
        if not 0 < effective <= n.sum() * (1 + 1e-9):
            raise ValueError(f"effective={effective}; give a number above 0, up to the {n.sum():g} points counted.")
        n = n * (effective / n.sum())
    expected = n.mean()
    x = (n - expected) / np.sqrt(expected)
    ranks = np.arange(n.size) - (n.size - 1) / 2
    # The ranks are centered, so that odd and even contrasts are orthogonal.
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
    """Area of grid cells, from the sines of their edges, with mean 1.

    sin(top) - sin(bottom), the edges being halfway between cell centers. The first and last cell reach as far beyond
    their center as the half cell inside; to the pole, where the next center would lie beyond it.

    Args:
        latitude: cell centers, in degrees north, ascending or descending, shape (n,).

    Returns:
        Weights, shape (n,), of the same kind as `latitude`.

    Raises:
        ValueError: not one axis of at least one value, not monotonic, or outside -90 to 90.
    """
    values = np.asarray(latitude, float)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"area_weights takes the latitudes along one axis; got the shape {values.shape}.")
    if not np.all(np.abs(values) <= 90.0):
        raise ValueError("area_weights takes latitudes in degrees from -90 to 90; some lie outside or are NaN.")
    weights = np.ones(1)
    if values.size > 1:
        steps = np.diff(values)
        if not (np.all(steps > 0) or np.all(steps < 0)):
            raise ValueError("area_weights takes latitudes that only rise or only fall; these do not.")
        ends = [_outer_edge(values[0], -steps[0]), _outer_edge(values[-1], steps[-1])]
        edges = np.concatenate([ends[:1], values[:-1] + steps / 2, ends[1:]])
        weights = np.abs(np.diff(np.sin(np.deg2rad(edges))))
        weights = weights / weights.mean()
    return latitude.copy(data=weights) if is_labeled(latitude) else weights


def _outer_edge(center: float, step: float) -> float:
    if abs(center + step) > 90.0:
        return float(np.copysign(90.0, step))
    return center + step / 2
