"""Departures of observations from what was expected of them."""

from __future__ import annotations

from typing import Any

import numpy as np


def departure(value: Any, expected: Any, unit: Any = None) -> np.ndarray:
    """Observation minus expectation; for a direction in degrees the shorter way round, above -180 and up to 180.

    Args:
        value: observed values.
        expected: their background or analysis.
        unit: unit of each value, or of all. Values in "degree" (or "degrees") are directions.
    """
    difference = np.asarray(value, float) - np.asarray(expected, float)
    direction = np.isin(np.asarray(unit, object).astype(str), ("degree", "degrees"))
    with np.errstate(invalid="ignore"):
        return np.where(direction, 180.0 - np.mod(180.0 - difference, 360.0), difference)
