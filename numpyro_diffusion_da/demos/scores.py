"""What every twin experiment makes of its scores: means and standard errors over truths, and a table of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from rich.table import Table


def check_spin_up(spin_up: int, cycles: int) -> None:
    """That something is left to score.

    Raises:
        ValueError: nothing is.
    """
    if not 0 <= spin_up < cycles:
        raise ValueError(f"cycles={cycles}, spin_up={spin_up}: give more cycles than are left out.")


def mean_and_standard_error(values: Float[np.ndarray, " truth"]) -> tuple[float, float]:
    """Mean over truths and its standard error (NaN for a single truth)."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def summarized(
    scores: Mapping[str, Mapping[str, Float[np.ndarray, " truth"]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard error by filter and score, in plain numbers."""
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
) -> Table:
    """One row a filter, mean ± standard error.

    Args:
        title: of the table.
        summary: as of `summarized`.
        columns: the headings of the scores shown, by score.
        main: the filter in bold.
        decimals: of the scores.
        plain: scores without a standard error, and their decimals.
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
            cells.append(cell)
        table.add_row(name, *cells, style="bold" if name == main else None)
    return table
