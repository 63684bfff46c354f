"""Means over independent runs, compared with the truth at a stated probability of a false alarm."""

from __future__ import annotations

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

FALSE_ALARM = 1e-5
"""Probability that one `assert_mean` fails although the truth is the expectation of the estimates."""
FEWEST_RUNS = 12
"""With fewer runs Student's t allows so much that hardly an error would be found."""


def standard_errors(runs: int, comparisons: int = 1) -> float:
    """How many of its standard errors a mean over `runs` may be off, where these are estimated from the runs too.

    A quantile of Student's t. Of several comparisons each has an equal share of the probability (Bonferroni).
    """
    if runs < FEWEST_RUNS:
        raise ValueError(f"{runs} runs; make {FEWEST_RUNS} or more, with fewer particles each")
    return float(scipy.stats.t.isf(FALSE_ALARM / 2 / comparisons, runs - 1))


def allowance(estimates: ArrayLike) -> np.ndarray:
    """How far the means over runs may be from their expectation, for estimates of shape (runs, ...)."""
    estimates = np.asarray(estimates, np.float64)
    runs = len(estimates)
    return standard_errors(runs, estimates[0].size) * estimates.std(0, ddof=1) / np.sqrt(runs)


def excess(estimates: ArrayLike, truth: ArrayLike) -> float:
    """Largest error of a mean over runs, as a multiple of what chance allows: more than 1 is no chance."""
    estimates = np.asarray(estimates, np.float64)
    return float(np.max(np.abs(estimates.mean(0) - truth) / allowance(estimates)))


def assert_mean(
    estimates: ArrayLike, truth: ArrayLike, *, tolerance: ArrayLike = 0.0, noticed: float | None = None
) -> None:
    """Assert that `truth` is the expectation of independent estimates, shape (runs, ...).

    Args:
        estimates: one estimate for each run, on the leading axis.
        truth: what they estimate, broadcast against one of them.
        tolerance: bias that is known to be there, such as that of a self-normalized estimate.
        noticed: a bias that the comparison must be able to notice, in the units of `estimates`. It fails where chance
            alone is allowed more than this on the average over components, because it would then say nothing.
    """
    estimates = np.asarray(estimates, np.float64)
    error, allowed = np.abs(estimates.mean(0) - truth), allowance(estimates)
    if noticed is not None:
        assert np.mean(allowed) < noticed, f"chance may explain {np.mean(allowed):.3g}, not less than {noticed}"
    beyond = error - allowed - tolerance
    worst = np.unravel_index(np.argmax(beyond), beyond.shape)
    assert np.all(beyond <= 0), (
        f"mean over {len(estimates)} runs is off by {error[worst]:.3g} at {[int(i) for i in worst]}, "
        f"where chance explains {allowed[worst]:.3g}"
    )
