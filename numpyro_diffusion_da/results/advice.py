"""Advice that a run gives in its warnings."""

from __future__ import annotations

from numpyro_diffusion_da.results.result import FilterResult

TOO_MANY = 1.0 / 3.0
"""Share of the checked observations above which it is rather the filter that is wrong."""


def rejected_share(result: FilterResult) -> float:
    """Of the observations that were there to be checked; 0 where nothing was."""
    observed = sum(int(result.observed_mask[name].sum()) * len(values) for name, values in result.rejected.items())
    return sum(int(values.sum()) for values in result.rejected.values()) / max(observed, 1)


def rejection_advice(result: FilterResult) -> str | None:
    """What to do where a check rejected more than `TOO_MANY`; None where it did not."""
    share = rejected_share(result)
    if share <= TOO_MANY:
        return None
    return (
        f"the gross-error check rejected {share:.0%} of the observations: the ensemble has lost the truth, or the "
        "observation errors are given too small, and a filter that rejects what could correct it does not "
        "recover; raise the threshold, or the spread (inflation), or look at the errors (innovations)."
    )
