"""Smoothing along the lines of particles: states given later observations too.

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

A filter that moves its ancestors, selects them block by block, or only moves members (the ensemble Kalman filter) has
no such lines. With a lag of L it keeps the last L states of each particle, and selects and moves them with it: an
ensemble Kalman smoother (Evensen & van Leeuwen 2000, Mon. Weather Rev. 128, 1852). `FilterResult.lagged` has these
states, and both functions use them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from numpyro_diffusion_da.arguments import require, require_count
from numpyro_diffusion_da.results.result import PER_PARTICLE, FilterResult

WITHOUT_ANCESTORS = ("EnKF",)
"""Algorithms that move particles without resampling, so that ancestors do not depend on later observations."""
BEFORE_SELECTION = ("log_weights",)
"""Statistics whose draws are particles before resampling; smoothing leaves them unchanged."""


def trajectories(result: FilterResult) -> FilterResult:
    """Draws of whole trajectories, an equally weighted sample of p(x_{1:T} | y_{1:T}).

    Draw i is the line of ancestors of particle i of the last step. ``posterior[site][chain, i]`` is then one path
    through time; deterministic sites, forecasts, log-likelihoods and predictive draws are those of the particles on the
    path. Early parts of lines coincide: look at ``sample_stats["distinct_lines"]`` before you rely on early times, or
    use `fixed_lag`. Without a genealogy, the draws are the states of a filter with a lag of T - 1 or more, as in
    `fixed_lag`.

    Args:
        result: `Filter.result` of a particle filter.

    Returns:
        Smoothed result of the same shapes; `fixed_lag` lists what changes.

    Raises:
        ValueError: the result has no genealogy (it comes from an ensemble Kalman filter, from localized resampling, or
            from a filter that moves ancestors), and its filter had no lag of T - 1 or more; or it is already smoothed.
    """
    if _without_genealogy(result, None) is not None and _has_lagged(result, None):
        return _lagged(result, {"smoothing": "ensemble smoother"})
    return along(result, _lines(result, None), {"smoothing": "genealogy"})


def fixed_lag(result: FilterResult, lag: int) -> FilterResult:
    """Draws of p(x_k | y_{1:k+lag}) at each time k: the ancestors of the particles of time min(k + lag, T).

    Only in the last lag + 1 steps do draws of the same index belong to one path, because there all lines start at T.

    All values of a particle move with it: latent and deterministic sites, one-step forecast, predictive draw,
    log-likelihood, and `solver_residual`. Copies of a particle share one predictive draw. In `sample_stats`,
    `filter_draw` replaces `ancestors` and gives the index of each draw among the particles of the filter;
    `distinct_lines` counts the distinct ones. All other statistics describe the filter and do not change. Arrays are
    copied.

    Without a genealogy, the states are those that a filter with this lag has selected and moved with its particles,
    `FilterResult.lagged`. Then only the state is smoothed. Deterministic sites, forecasts, predictive draws and
    log-likelihoods are left out, and a function of the state is computed from its draws.

    Args:
        result: `Filter.result` of a particle filter.
        lag: number of later steps whose observations are used; 0 gives the particles of the filter, and T - 1 or more
            those of `trajectories`.

    Returns:
        Smoothed result of the same shapes.

    Raises:
        ValueError: `lag` is negative; the result has no genealogy (it comes from an ensemble Kalman filter, from
            localized resampling, or from a filter that moves ancestors), and its filter had another lag; or it is
            already smoothed.
    """
    attributes: dict[str, str | int] = {"smoothing": "fixed lag", "smoothing_lag": int(lag)}
    if _without_genealogy(result, lag) is not None and _has_lagged(result, lag):
        return _lagged(result, attributes)
    return along(result, _lines(result, lag), attributes)


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


def _without_genealogy(result: FilterResult, lag: int | None) -> str | None:
    """Reason why particles have no single lines of ancestors, and what to do; None if they have.

    With a lag of 0, each particle is its own line.

    Args:
        result: result of a filter run.
        lag: number of later steps; None for the lines of the last particles.

    Raises:
        ValueError: `lag` is negative, or the result is not that of a filter.
    """
    require(result, FilterResult, "smoothing", "result", "filter.result")
    if lag is not None:
        require_count(lag, "smoothing", "lag", least=0)
    # A filter with many blocks keeps no ancestors; what it has smoothed itself is there all the same.
    if "ancestors" not in result.sample_stats and ("smoothing" in result.attributes or not result.is_local):
        done = "is already smoothed" if "smoothing" in result.attributes else "has no ancestors"
        raise ValueError(f"this result {done}; give the result of the filter, Filter.result.")
    if lag == 0:
        return None
    algorithm, stats = result.attributes.get("algorithm", "FAAPF"), result.sample_stats
    if algorithm in WITHOUT_ANCESTORS:
        why = f"{algorithm} selects no particles, so its ancestors do not depend on later observations"
        other = "smooth a result of FAAPF or Bootstrap"
    elif result.is_local:
        why = "with localized resampling a particle has a parent for each block of the state, and so no one line"
        other = "smooth a result without a taper"
    elif "resampled" in stats:
        return (
            "the particles of this result carried their weights from step to step, and its draws are not their "
            "ancestors; smooth a result with resample_below=1, or use Filter.backward_simulation."
        )
    elif "selection_share" in stats:
        why = "the ancestors of this result were moved after they were selected, so a particle continues no earlier one"
        other = "smooth a result of FAAPF(model, move=False)"
    else:
        return None
    if result.lagged is not None:
        kept = result.attributes["lag"]
        return f"{why}; its filter kept the states of lag={kept} only: ask for these, or run it with another lag."
    asked = result.sizes[2] - 1 if lag is None else int(lag)
    return f"{why}; run {algorithm}(model, ..., lag={asked}), {other}, or use Filter.backward_simulation."


def _has_lagged(result: FilterResult, lag: int | None) -> bool:
    """Whether the filter has smoothed with this lag; None for all observations.

    Lags up to the last time, and all longer ones, are the same.
    """
    if result.lagged is None:
        return False
    whole = result.lagged.shape[2] - 1
    return min(int(result.attributes["lag"]), whole) == (whole if lag is None else min(int(lag), whole))


def _lagged(result: FilterResult, attributes: dict[str, str | int]) -> FilterResult:
    """Result with the states that the filter has smoothed itself, which are its only site.

    Args:
        result: result of a filter with a lag.
        attributes: attributes to add to those of the result.
    """
    assert result.lagged is not None
    return dataclasses.replace(
        result,
        posterior={result.latent_name: result.lagged},
        posterior_predictive={},
        log_likelihood={},
        forecast=None,
        lagged=None,
        sample_stats={name: values for name, values in result.sample_stats.items() if name != "ancestors"},
        attributes={**result.attributes, **attributes},
    )


def _lines(result: FilterResult, lag: int | None) -> np.ndarray:
    """Index of each smoothed draw among the particles of the filter, shape (chain, draw, time).

    Args:
        result: result of a filter run.
        lag: number of later steps; None for the lines of the last particles.

    Raises:
        ValueError: `lag` is negative, or the result has no genealogy.
    """
    if (reason := _without_genealogy(result, lag)) is not None:
        raise ValueError(reason)
    ancestors = result.sample_stats["ancestors"]
    chains, draws, steps = ancestors.shape[:3]
    own = np.broadcast_to(np.arange(draws, dtype=ancestors.dtype), (chains, draws))
    if lag == 0:
        return np.repeat(own[..., None], steps, axis=2)
    reach = steps - 1 if lag is None else min(int(lag), steps - 1)
    lines = np.empty_like(ancestors)
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
    of_draws = {n: v for n, v in stats.items() if n in PER_PARTICLE and n not in BEFORE_SELECTION}
    return dataclasses.replace(
        result,
        posterior=moved(result.posterior),
        posterior_predictive=moved(result.posterior_predictive),
        log_likelihood=moved(result.log_likelihood),
        forecast=None if result.forecast is None else result.forecast[at],
        lagged=None,
        sample_stats={**stats, **moved(of_draws), "filter_draw": lines, "distinct_lines": _distinct(lines)},
        attributes={**result.attributes, **attributes},
    )
