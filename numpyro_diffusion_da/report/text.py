"""Numbers and lists as a report writes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def number(value: float, digits: int = 3) -> str:
    """A number in so many significant digits, without an exponent where it can be; a dash if there is none."""
    if value is None or not np.isfinite(value):
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    places = digits - 1 - int(np.floor(np.log10(abs(value))))
    if places > 6:
        return f"{value:.{digits - 1}e}"
    return f"{round(value, places):.{max(places, 0)}f}"


def plus_minus(value: float, error: float) -> str:
    """A number with its standard error, in as many digits as the error allows."""
    if not np.isfinite(error) or error <= 0 or not np.isfinite(value):
        return number(value)
    digits = int(np.clip(1 - np.floor(np.log10(error)), 0, 8))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def share(value: float) -> str:
    """A share in percent; a dash if there is none."""
    if not np.isfinite(value):
        return "\N{EN DASH}"
    return "0 %" if value == 0 else ("< 0.1 %" if 0 < value < 0.001 else f"{100 * value:.3g} %")


def probability(value: float) -> str:
    """A p-value, in powers of ten if it is small; a dash if there is none."""
    if not np.isfinite(value):
        return "\N{EN DASH}"
    if value >= 0.001:
        return f"{value:.2g}"
    return "below 1e-12" if value < 1e-12 else f"{value:.0e}"


def listed(texts: Sequence[str], most: int = 3) -> str:
    """Texts with commas and "and", the first of them and how many there are more."""
    shown, more = list(texts[:most]), len(texts) - most
    if more > 0:
        shown.append(f"{more} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
