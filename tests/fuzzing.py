"""Fuzzed input by Hypothesis: bounded, and the same examples on every run.

`NDDA_FUZZ=20` draws twenty times as many, other ones each time, to look for faults.
"""

import os

from hypothesis import HealthCheck, Phase, settings

MORE = int(os.environ.get("NDDA_FUZZ", "0"))


def fuzz(examples: int) -> settings:
    """Settings of Hypothesis for a number of examples."""
    return settings(
        max_examples=examples * max(MORE, 1),
        derandomize=not MORE,
        deadline=None,
        database=None,
        # Many examples run a filter: shrinking one that fails took five minutes.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
