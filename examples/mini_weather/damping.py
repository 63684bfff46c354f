"""What keeps free runs of a trained forecast at the climate's variance: one factor for each harmonic and channel.

The forecast of least squares is right on states of the truth. In a run of its own it sees states that are none, and
gains or loses energy by a little at every step. A harmonic whose variance is V, with errors of variance Q added in each
step, keeps V if the forecast has V - Q; where free runs are found with V', the forecast is scaled by
sqrt((1 - Q / V) / (1 - Q / V')), and again, until they agree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

FACTORS = (0.9, 1.1)
"""Smallest and largest factor."""


def variance(y: np.ndarray) -> np.ndarray:
    """Of coefficients (samples, 2, m, l, channels), by harmonic and channel: shape (m, l, channels)."""
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
    """Factors of shape (m, l, channels), 1 where the climate has nothing; the mean of the last sixth of the rounds.

    Args:
        forecast: (factors, states) -> conditional means, of coefficients (members, 2, m, l, channels).
        starts: first states of the free runs.
        errors: of one step, drawn from at random.
        climate: `variance` of the truth.
        path: file of the factors found so far, to go on from.
        rounds: free runs, each with the factors of the one before.
        days: of a free run, of two steps each; the first third is not counted.
        seed: of the draws.
    """
    exists = climate > 0
    found = list(np.load(path)) if path.exists() else []
    factors = found[-1] if found else np.ones(climate.shape)

    def over_climate(variances: np.ndarray) -> np.ndarray:
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
        # Twice the way of a harmonic of its own (whose factor changes by the root): they feed on one another.
        factors = np.where(exists, np.clip(factors * change, *FACTORS), 1.0)
        found.append(factors)
        np.save(path, np.stack(found))
        # By energy: a mean over harmonics would be one over the smallest scales.
        waves = np.round(energy.sum((1, 2)) / climate.sum((1, 2)), 2).tolist()
        channels = np.round(energy.sum((0, 1)) / climate.sum((0, 1)), 2).tolist()
        print(
            f"free runs {number + 1}: variance over the climate's, by wavenumber {waves}, by channel {channels}, "
            f"factors from {factors[exists].min():.3f} to {factors[exists].max():.3f}",
            flush=True,
        )
    return np.mean(found[5 * len(found) // 6 :], axis=0)
