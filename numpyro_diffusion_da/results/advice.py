"""Advice that a filter run gives in its warnings and in its summary."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from numpyro_diffusion_da.results.background import Ratio, first_far_value
from numpyro_diffusion_da.results.result import FilterResult
from numpyro_diffusion_da.spelling import spelled

TOO_MANY = 1.0 / 3.0
"""Rejected share of the checked observations above which the filter is more likely wrong than the observations."""

TEMPERED = 0.1
"""Tempering exponent alpha below which resampling makes little use of the observations."""

LOST = 1.25
"""Squared departures divided by their expectation above which a filter is overconfident, apart from sampling error."""

LOST_WORDS = "observations are farther from the forecast than the filter expects"
"""Beginning of the advice of a filter that is overconfident."""

WIDE = 0.5
"""Squared departures divided by their expectation below which a filter is far too wide, apart from sampling error."""


def rejected_share(result: FilterResult) -> float:
    """Rejected share of the checked observations, over all sites and chains; 0 if none was checked."""
    observed = sum(int(result.observed_mask[name].sum()) * len(values) for name, values in result.rejected.items())
    return sum(int(values.sum()) for values in result.rejected.values()) / max(observed, 1)


def rejection_advice(result: FilterResult) -> str | None:
    """Advice if a gross-error check rejected more than the share `TOO_MANY`; None otherwise."""
    share = rejected_share(result)
    if share <= TOO_MANY:
        return None
    return (
        f"the gross-error check rejected {share:.0%} of the observations. Either the ensemble has lost the truth, or "
        "the given observation errors are too small. A filter that rejects the observations that could correct it does "
        f"not recover; raise {spelled('threshold', python='the threshold')}, increase the spread by "
        f"{spelled('inflation', python='inflation')}, or check the observation errors with "
        f"{spelled('error_variances', python='ndda.diagnostics.error_variances')}."
    )


def tempering_advice(result: FilterResult) -> str | None:
    """Advice if the median tempering exponent alpha of the weights is below `TEMPERED`; None otherwise."""
    alpha = float(np.median(result.sample_stats["tempering"]))
    if alpha >= TEMPERED:
        return None
    algorithm, weight = (str(result.attributes.get(name, "")) for name in ("algorithm", "weight"))
    if result.is_local:
        instead = [f"give each block fewer observations by a smaller {spelled('taper', python='radius of the taper')}"]
    elif algorithm == "FAAPF":
        how = spelled("taper", python="FAAPF(model, taper=ndda.Taper(...))")
        instead = [f"select ancestors by nearby observations, with {how}"]
    else:
        instead = [f"use {spelled('FAAPF', python='ndda.FAAPF(model)')}, which weights particles before it moves them"]
    if weight == "Dirac()" and (how := spelled("weight", python="weight=ndda.Moment()")):
        instead += [f"include the spread of the transition in the weights, {how}"]
    return (
        f"weights are tempered to alpha = {alpha:.2g} (median), below {TEMPERED}: untempered weights would keep only a "
        "few particles, and tempered weights use less of the observations; "
        f"{'; '.join(instead)}; or take more particles."
    )


def is_lost(ratio: Ratio) -> bool:
    """Whether departures are larger than a filter expects, by more than sampling error."""
    return bool(ratio.value - ratio.margin > LOST)


def is_wide(ratio: Ratio) -> bool:
    """Whether departures are far smaller than a filter expects, by more than sampling error."""
    return bool(ratio.value + ratio.margin < WIDE)


def lost_advice(ratios: Mapping[str, Ratio]) -> str | None:
    """Advice if observations are farther from the forecast than the filter expects; None otherwise.

    Args:
        ratios: result of `departure_ratios`.
    """

    def of_site(name: str) -> str:
        return spelled(f"site {name}", python=f"at site '{name}'")

    lost = [f"{r.value:.3g} +- {r.standard_error:.2g} {of_site(n)}" for n, r in ratios.items() if is_lost(r)]
    if not lost:
        return None
    return (
        f"{LOST_WORDS}: (O - B)^2 / (P + R) is {', '.join(lost)}, and should be 1. The ensemble has lost the truth, or "
        "its spread or the given observation errors are too small; increase the spread by "
        f"{spelled('inflation', python='inflation (ndda.inference.tune_spread finds the amount)')}, localize with "
        f"{spelled('taper', python='taper=ndda.Taper(...)')}, take more particles, or check the "
        f"observation errors with {spelled('error_variances', python='ndda.diagnostics.error_variances')}."
    )


def wide_advice(ratios: Mapping[str, Ratio]) -> str | None:
    """Advice if observations are far closer to the forecast than the filter expects; None otherwise.

    Args:
        ratios: result of `departure_ratios`.
    """
    wide = [spelled(f"site {site}", python=f"of {site}") for site, ratio in ratios.items() if is_wide(ratio)]
    if not wide:
        return None
    return (
        f"observations {' and '.join(wide)} are far closer to the forecast than the filter expects; use less "
        f"{spelled('inflation', python='inflation')}, or check whether the observation errors or the noise of the "
        "transition are too large."
    )


def far_value_advice(result: FilterResult) -> str | None:
    """Advice if a single observation is impossible for the filter; None otherwise."""
    far = first_far_value(result)
    if far is None:
        return None
    return far.words(with_step=True)
