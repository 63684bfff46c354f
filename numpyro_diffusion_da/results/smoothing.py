"""Smoothing from the genealogy of a particle filter: states given later observations too, at no further cost.

Every particle has one ancestor at each earlier time. Those of the particles of time e are an equally weighted sample
of p(x_{1:e} | y_{1:e}) (Kitagawa 1996): selection by later observations is all that moves them. Hence

- the lines of the last particles are draws of whole trajectories, p(x_{1:T} | y_{1:T}) (`trajectories`);
- at time k, the ancestors of the particles of time min(k + lag, T) are draws of p(x_k | y_{1:k+lag}) (`fixed_lag`).

The price is degeneracy. Going back the lines coalesce: the longer the way, the fewer particles stand for N draws
(`distinct_lines`), and at last one. A fixed lag trades it for a bias: what is observed more than `lag` steps later is
left out, which hurts little where the state has forgotten by then (Olsson, Cappe, Douc & Moulines 2008).

With ancestors a_k(i), for particle i of step k the index of its parent among those of step k - 1, the line of particle
i of time e is b_e = i, b_{k-1} = a_k(b_k). Results stay `FilterResult`s, so that `convert` names them as any other.
"""

from __future__ import annotations

import dataclasses
import operator

import numpy as np

from numpyro_diffusion_da.results.result import FilterResult

WITHOUT_ANCESTORS = ("EnKF",)
"""Filters that move particles and never select them: their lines know nothing of later observations."""

BEFORE_SELECTION = ("log_weights",)
"""Statistics whose draw is the index of the particle before resampling: they stay the filter's."""


def trajectories(result: FilterResult) -> FilterResult:
    """Draws of whole trajectories: an equally weighted sample of p(x_{1:T} | y_{1:T}).

    Draw i is the line of ancestors of particle i of the last step, so ``posterior[site][chain, i]`` is one path through
    time, with deterministic sites, forecasts, log-likelihoods and predictive draws of the particles on it. Lines share
    their beginnings: see ``sample_stats["distinct_lines"]`` before trusting early times, and `fixed_lag`.

    Args:
        result: `Filter.result`, of a filter that selects.

    Returns:
        A result of the same shapes; see `fixed_lag` on what changes.

    Raises:
        ValueError: a result without a genealogy (an ensemble Kalman filter's, or one already smoothed).
    """
    return along(result, _lines(result, None), {"smoothing": "genealogy"})


def fixed_lag(result: FilterResult, lag: int) -> FilterResult:
    """The particles of each time k as ancestors of those of time min(k + lag, T): draws of p(x_k | y_{1:k+lag}).

    Draws of one index at two times belong to one path only in the last lag + 1 steps, whose lines all start at T.

    What is kept of each particle moves with it: latent and deterministic sites, the one-step forecast, the predictive
    draw and the log-likelihood of its observations, `solver_residual`. Copies of a particle have the same predictive
    draw. In `sample_stats`, `filter_draw` says which particle of the filter each draw is, and replaces `ancestors`;
    `distinct_lines` counts them. The rest describes the filter and stays as it was. Arrays are copied.

    Args:
        result: `Filter.result`, of a filter that selects.
        lag: steps of later observations; 0 gives the filter's particles, T - 1 or more those of `trajectories`.

    Raises:
        ValueError: a negative lag, or a result without a genealogy (an ensemble Kalman filter's, or one already
            smoothed).
    """
    return along(result, _lines(result, lag), {"smoothing": "fixed lag", "smoothing_lag": operator.index(lag)})


def distinct_ancestors_at(result: FilterResult, lag: int | None = None) -> np.ndarray:
    """How many different particles of each time are ancestors of those `lag` steps later: the coalescence.

    Args:
        result: `Filter.result`, of a filter that selects.
        lag: see `fixed_lag`; None for the ancestors of the last particles.

    Returns:
        Counts between 1 and the number of particles, shape (chain, time).

    Raises:
        ValueError: see `fixed_lag`.
    """
    return _distinct(_lines(result, lag))


def _lines(result: FilterResult, lag: int | None) -> np.ndarray:
    """The filter's particle that each draw is, shape (chain, draw, time); lag None for the whole way."""
    algorithm = result.attributes.get("algorithm")
    if algorithm in WITHOUT_ANCESTORS:
        raise ValueError(
            f"{algorithm} selects no particles, so its ancestors know nothing of later observations; "
            "smooth a result of FAAPF or Bootstrap, or use Filter.backward_simulation."
        )
    if "ancestors" not in result.sample_stats:
        done = "is already smoothed" if "smoothing" in result.attributes else "has no ancestors"
        raise ValueError(f"this result {done}; give the one of the filter, Filter.result.")
    ancestors = result.sample_stats["ancestors"]
    if result.is_local:
        raise ValueError(
            "particles of localized ancestors have a parent for each block of the state, and so no lines; smooth a "
            "result without a taper, or use Filter.backward_simulation."
        )
    chains, draws, steps = ancestors.shape
    if lag is not None and operator.index(lag) < 0:
        raise ValueError(f"lag={lag}; give a number of steps, 0 or more, or None for all of them.")
    reach = steps - 1 if lag is None else min(operator.index(lag), steps - 1)
    lines = np.empty_like(ancestors)
    own = np.broadcast_to(np.arange(draws, dtype=ancestors.dtype), (chains, draws))
    for end in range(reach, steps):
        line = own
        for k in range(end, end - reach - 1, -1):
            # The way back from the last step serves all times on it, any other only the time where it ends.
            if end == steps - 1 or k == end - reach:
                lines[:, :, k] = line
            line = np.take_along_axis(ancestors[:, :, k], line, axis=1)
    return lines


def _distinct(lines: np.ndarray) -> np.ndarray:
    """Number of different values along the draws: (chain, draw, time) -> (chain, time)."""
    return 1 + np.count_nonzero(np.diff(np.sort(lines, axis=1), axis=1), axis=1)


def along(result: FilterResult, lines: np.ndarray, attributes: dict[str, str | int]) -> FilterResult:
    """The result with the particles on the lines, shape (chain, draw, time), in place of its own. Arrays are copied."""
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
