"""Smoothing from the genealogy of a particle filter: states given later observations too, at no further cost.

Every particle has one ancestor at each earlier time; together these form its line. The lines of the particles of time e
are an equally weighted sample of p(x_{1:e} | y_{1:e}) (Kitagawa 1996), because resampling selected the ancestors by all
observations up to e. Hence

- the lines of the last particles are draws of whole trajectories, p(x_{1:T} | y_{1:T}) (`trajectories`);
- at time k, the ancestors of the particles of time min(k + lag, T) are draws of p(x_k | y_{1:k+lag}) (`fixed_lag`).

The drawback is degeneracy. Lines coalesce backwards in time: the further back, the fewer distinct particles the N draws
consist of (`distinct_lines`), in the end a single one. A fixed lag replaces this degeneracy by a bias, because it
ignores observations more than `lag` steps later. The bias is small if the state has forgotten its past by then (Olsson,
Cappe, Douc & Moulines 2008).

Let a_k(i) be the index of the parent of particle i of step k among the particles of step k - 1. The line of particle i
of time e is b_e = i, b_{k-1} = a_k(b_k). Smoothed results are `FilterResult`s, which `convert` names like any other.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from numpyro_diffusion_da.arguments import require, require_count
from numpyro_diffusion_da.results.result import FilterResult

WITHOUT_ANCESTORS = ("EnKF",)
"""Algorithms that move particles without resampling, so that ancestors do not depend on later observations."""

BEFORE_SELECTION = ("log_weights",)
"""Statistics whose draws are particles before resampling; smoothing leaves them unchanged."""


def trajectories(result: FilterResult) -> FilterResult:
    """Draws of whole trajectories, an equally weighted sample of p(x_{1:T} | y_{1:T}).

    Draw i is the line of ancestors of particle i of the last step. ``posterior[site][chain, i]`` is then one path
    through time; deterministic sites, forecasts, log-likelihoods and predictive draws are those of the particles on the
    path. Early parts of lines coincide: look at ``sample_stats["distinct_lines"]`` before you rely on early times, or
    use `fixed_lag`.

    Args:
        result: `Filter.result` of a particle filter.

    Returns:
        Smoothed result of the same shapes; `fixed_lag` lists what changes.

    Raises:
        ValueError: the result has no genealogy: it comes from an ensemble Kalman filter, from localized resampling, or
            from a filter that moves ancestors, or is already smoothed.
    """
    return along(result, _lines(result, None), {"smoothing": "genealogy"})


def fixed_lag(result: FilterResult, lag: int) -> FilterResult:
    """Draws of p(x_k | y_{1:k+lag}) at each time k: the ancestors of the particles of time min(k + lag, T).

    Only in the last lag + 1 steps do draws of the same index belong to one path, because there all lines start at T.

    All values of a particle move with it: latent and deterministic sites, one-step forecast, predictive draw,
    log-likelihood, and `solver_residual`. Copies of a particle share one predictive draw. In `sample_stats`,
    `filter_draw` replaces `ancestors` and gives the index of each draw among the particles of the filter;
    `distinct_lines` counts the distinct ones. All other statistics describe the filter and do not change. Arrays are
    copied.

    Args:
        result: `Filter.result` of a particle filter.
        lag: number of later steps whose observations are used; 0 gives the particles of the filter, and T - 1 or more
            those of `trajectories`.

    Returns:
        Smoothed result of the same shapes.

    Raises:
        ValueError: `lag` is negative, or the result has no genealogy: it comes from an ensemble Kalman filter or from
            localized resampling, or is already smoothed.
    """
    return along(result, _lines(result, lag), {"smoothing": "fixed lag", "smoothing_lag": int(lag)})


def distinct_ancestors_at(result: FilterResult, lag: int | None = None) -> np.ndarray:
    """Number of distinct particles of each time that are ancestors of the particles `lag` steps later.

    Args:
        result: `Filter.result` of a particle filter.
        lag: number of later steps; None for the ancestors of the last particles.

    Returns:
        Counts between 1 and the number of particles, shape (chain, time).

    Raises:
        ValueError: `lag` is negative, or the result has no genealogy: it comes from an ensemble Kalman filter or from
            localized resampling, or is already smoothed.
    """
    return _distinct(_lines(result, lag))


def _lines(result: FilterResult, lag: int | None) -> np.ndarray:
    """Index of each smoothed draw among the particles of the filter, shape (chain, draw, time).

    Args:
        result: result of a filter run.
        lag: number of later steps; None for the lines of the last particles.

    Raises:
        ValueError: `lag` is negative, or the result has no genealogy.
    """
    require(result, FilterResult, "smoothing", "result", "filter.result")
    if lag is not None:
        require_count(lag, "smoothing", "lag", least=0)
    algorithm = result.attributes.get("algorithm")
    if algorithm in WITHOUT_ANCESTORS:
        raise ValueError(
            f"{algorithm} selects no particles, so its ancestors do not depend on later observations; "
            "smooth a result of FAAPF or Bootstrap, or use Filter.backward_simulation."
        )
    if "ancestors" not in result.sample_stats:
        done = "is already smoothed" if "smoothing" in result.attributes else "has no ancestors"
        raise ValueError(f"this result {done}; give the result of the filter, Filter.result.")
    ancestors = result.sample_stats["ancestors"]
    if result.is_local:
        raise ValueError(
            "with localized resampling a particle has a parent for each block of the state, and so no line of "
            "ancestors; smooth a result without a taper, or use Filter.backward_simulation."
        )
    if "resampled" in result.sample_stats:
        raise ValueError(
            "the particles of this result carried their weights from step to step, and its draws are not their "
            "ancestors; smooth a result with resample_below=1, or use Filter.backward_simulation."
        )
    if "selection_share" in result.sample_stats:
        raise ValueError(
            "the ancestors of this result were moved after they were selected, and so a particle continues no earlier "
            "one; smooth a result of FAAPF(model, move=False), or use Filter.backward_simulation."
        )
    chains, draws, steps = ancestors.shape
    reach = steps - 1 if lag is None else min(int(lag), steps - 1)
    lines = np.empty_like(ancestors)
    own = np.broadcast_to(np.arange(draws, dtype=ancestors.dtype), (chains, draws))
    for end in range(reach, steps):
        line = own
        for k in range(end, end - reach - 1, -1):
            # The line back from the last step serves all times on it; any other line only the time where it ends.
            if end == steps - 1 or k == end - reach:
                lines[:, :, k] = line
            line = np.take_along_axis(ancestors[:, :, k], line, axis=1)
    return lines


def _distinct(lines: np.ndarray) -> np.ndarray:
    """Number of distinct values along the draws: (chain, draw, time) -> (chain, time)."""
    return 1 + np.count_nonzero(np.diff(np.sort(lines, axis=1), axis=1), axis=1)


def along(result: FilterResult, lines: np.ndarray, attributes: dict[str, str | int]) -> FilterResult:
    """Replace the particles of a result by those on `lines`; arrays are copied.

    Args:
        result: result of a filter run.
        lines: index of each new draw among the particles of the filter, shape (chain, draw, time).
        attributes: attributes to add to those of the result.
    """
    chains, _, steps = lines.shape
    at = (np.arange(chains)[:, None, None], lines, np.arange(steps))

    def moved(sites: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: values[at] for name, values in sites.items()}

    stats = {name: values for name, values in result.sample_stats.items() if name != "ancestors"}
    of_draws = {n: v for n, v in stats.items() if v.ndim >= lines.ndim and n not in BEFORE_SELECTION}
    return dataclasses.replace(
        result,
        posterior=moved(result.posterior),
        posterior_predictive=moved(result.posterior_predictive),
        log_likelihood=moved(result.log_likelihood),
        forecast=None if result.forecast is None else result.forecast[at],
        sample_stats={**stats, **moved(of_draws), "filter_draw": lines, "distinct_lines": _distinct(lines)},
        attributes={**result.attributes, **attributes},
    )
