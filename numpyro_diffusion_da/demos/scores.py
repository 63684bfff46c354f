"""Means and standard errors of scores over truths, and the table that the demos print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from rich.table import Table


def check_spin_up(spin_up: int, cycles: int) -> None:
    """Check that cycles are left to score after the spin-up.

    Raises:
        ValueError: `spin_up` is negative, or not below `cycles`.
    """
    if not 0 <= spin_up < cycles:
        raise ValueError(f"cycles={cycles}, spin_up={spin_up}: give more cycles than spin_up, so that some are scored.")


def mean_and_standard_error(values: Float[np.ndarray, " truth"]) -> tuple[float, float]:
    """Mean over truths and its standard error, which is NaN for a single truth."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def summarized(
    scores: Mapping[str, Mapping[str, Float[np.ndarray, " truth"]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard error over truths of each score of each filter, as Python floats.

    Args:
        scores: filter -> score -> values, shape (truth,).

    Returns:
        Filter -> score -> "mean" and "standard_error".
    """
    names = ("mean", "standard_error")
    return {
        name: {key: dict(zip(names, mean_and_standard_error(v), strict=True)) for key, v in of_filter.items()}
        for name, of_filter in scores.items()
    }


def table_of_scores(
    title: str,
    summary: Mapping[str, Mapping[str, Mapping[str, float]]],
    columns: Mapping[str, str],
    main: str,
    *,
    decimals: int,
    plain: Mapping[str, int],
    plus: Mapping[str, str],
) -> Table:
    """Table of scores with one row per filter, mean ± standard error.

    Args:
        title: title of the table.
        summary: filter -> score -> "mean" and "standard_error", as `summarized` returns.
        columns: score -> heading, for the scores to show.
        main: filter whose row is bold.
        decimals: number of decimals of scores with a standard error.
        plain: score -> number of decimals, for scores to show without a standard error.
        plus: score -> another score, which is shown behind it and a plus sign, with as few digits as it needs. It is
            left out if it is zero.
    """
    from rich.table import Table

    table = Table(title=title, header_style="bold", box=None, padding=(0, 1, 0, 0))
    table.add_column("filter", no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, scores in summary.items():
        cells = []
        for key in columns:
            cell = f"{scores[key]['mean']:.{plain.get(key, decimals)}f}"
            if key not in plain and not np.isnan(scores[key]["standard_error"]):
                cell += f"±{scores[key]['standard_error']:.{decimals}f}".replace("±0.", "±.")
            if key in plus and scores[plus[key]]["mean"]:
                cell += f"+{scores[plus[key]]['mean']:.2g}"
            cells.append(cell)
        table.add_row(name, *cells, style="bold" if name == main else None)
    return table
