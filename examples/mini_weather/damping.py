"""Calibration of factors that make free runs of a trained forecast keep the variance of the climate.

There is one factor for each harmonic and channel. A least-squares forecast is accurate for states of the truth. A free
run leaves these states, and then gains or loses a little energy at every step. Let a harmonic have the variance V in
the climate, and let errors of variance Q be added in each step. The harmonic keeps the variance V if the forecast has
the variance V - Q. If free runs have the variance V' instead, the forecast is scaled by
sqrt((1 - Q / V) / (1 - Q / V')). This is repeated until free runs have the right variance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

FACTORS = (0.9, 1.1)
"""(smallest, largest) factor of a harmonic."""


def variance(y: np.ndarray) -> np.ndarray:
    """Variance of each harmonic and channel, shape (m, l, channels), from coefficients (samples, 2, m, l, channels)."""
    return np.mean(np.sum(np.asarray(y, np.float64) ** 2, axis=1), axis=0)


def calibrated(
    forecast: Callable[[np.ndarray, np.ndarray], np.ndarray],
    starts: np.ndarray,
    errors: np.ndarray,
    climate: np.ndarray,
    *,
    path: Path,
    rounds: int,
    days: int,
    seed: int,
) -> np.ndarray:
    """Calibrate the factors by repeated free runs.

    Args:
        forecast: function (factors, states) -> conditional means, for coefficients (members, 2, m, l, channels).
        starts: first states of the free runs.
        errors: errors of one step, from which each step of a free run draws at random.
        climate: variance of the truth, as `variance` computes it.
        path: file of the factors so far. If it exists, the calibration resumes from it.
        rounds: number of free runs. Each uses the factors of the run before.
        days: length of a free run in days of two steps; the first third is not used.
        seed: seed of the draws.

    Returns:
        Mean factors over the last sixth of the rounds, shape (m, l, channels); 1 where the climate has no variance.
    """
    exists = climate > 0
    found = list(np.load(path)) if path.exists() else []
    factors = found[-1] if found else np.ones(climate.shape)

    def over_climate(variances: np.ndarray) -> np.ndarray:
        """Ratio of variances to those of the climate; 1 where the climate has no variance."""
        return np.divide(variances, climate, out=np.ones_like(climate), where=exists)

    new = np.minimum(over_climate(variance(errors)), 0.99)
    for number in range(len(found), rounds):
        generator = np.random.default_rng((seed, number))
        y, counted = starts, []
        for step in range(2 * days):
            y = forecast(factors, y) + errors[generator.integers(len(errors), size=len(y))]
            if step >= 2 * days // 3:
                counted.append(variance(y))
        energy = np.mean(counted, axis=0)
        ratio = over_climate(energy)
        change = (1.0 - new) / (1.0 - np.minimum(new / np.maximum(ratio, 1e-3), 0.99))
        # The change is the square of the one that is right for a single harmonic, because harmonics exchange energy.
        factors = np.where(exists, np.clip(factors * change, *FACTORS), 1.0)
        found.append(factors)
        np.save(path, np.stack(found))
        # Print ratios of energy sums. A mean of ratios over harmonics would mostly show the smallest scales.
        waves = np.round(energy.sum((1, 2)) / climate.sum((1, 2)), 2).tolist()
        channels = np.round(energy.sum((0, 1)) / climate.sum((0, 1)), 2).tolist()
        print(
            f"free runs {number + 1}: variance relative to the climate by wavenumber {waves}, by channel {channels}; "
            f"factors from {factors[exists].min():.3f} to {factors[exists].max():.3f}",
            flush=True,
        )
    return np.mean(found[5 * len(found) // 6 :], axis=0)
