"""Placing of a table on the grid and the times of a model: units, windows, reasons, quality control, arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.arguments import require, shown
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.observation.tables.arrays import arrays_of
from numpyro_diffusion_da.observation.tables.bias import check_bias
from numpyro_diffusion_da.observation.tables.checks import Context, Duplicates, QualityCheck, Superobbing
from numpyro_diffusion_da.observation.tables.flags import Flag
from numpyro_diffusion_da.observation.tables.groups import check_correlation, grouped
from numpyro_diffusion_da.observation.tables.names import Names
from numpyro_diffusion_da.observation.tables.options import Options
from numpyro_diffusion_da.observation.tables.placed import PlacedObservations
from numpyro_diffusion_da.observation.tables.quantities import DerivedQuantity
from numpyro_diffusion_da.observation.tables.rows import (
    by_known_names,
    check_errors,
    converted,
    errors_in_vain,
    errors_of,
    refuse_errors,
    resolved,
    set_flag,
)
from numpyro_diffusion_da.observation.tables.weights import Placer, apply, set_apart
from numpyro_diffusion_da.observation.tables.windows import cycles, step_times, windows
from numpyro_diffusion_da.spelling import spelled

if TYPE_CHECKING:
    import pandas

    from numpyro_diffusion_da.observation.tables.table import ObservationTable


def place(table: ObservationTable, layout: Layout, times: Any, options: Options) -> PlacedObservations:
    """Place a table on a model's grid and times.

    Args:
        table: the table.
        layout: layout of the state.
        times: times of the steps.
        options: further arguments of `ObservationTable.on`.
    """
    require(layout, Layout, "ObservationTable.on", "layout", "prior.layout")
    if not layout.variables:
        raise ValueError(
            "the layout has no variables; name those of its channels: Layout(..., variables=(Variable(...), ...))."
        )
    at = step_times(times)
    before, after = windows(options.window, at)
    checks = (Duplicates(),) if options.quality is None else options.quality
    quantities = options.quantities
    for name, given, kind in (("quality", checks, QualityCheck), ("quantities", quantities, DerivedQuantity)):
        if isinstance(given, (kind, str)) or not isinstance(given, Sequence):
            raise TypeError(f"ObservationTable.on got {name}={shown(given)}; give a list, {name}=[...].")
        for one in given:
            require(one, kind, "ObservationTable.on", name, "[Duplicates()]" if name == "quality" else "[my_quantity]")
    check_errors(options.errors)
    check_bias(options.bias)
    check_correlation(options.correlation)
    names = Names(layout, quantities)
    placer = Placer(layout, names)
    rows, targets, notes = resolved(table, names)
    rows["cycle"] = cycles(rows["time"].to_numpy(), at, before, after)
    set_flag(rows, rows["cycle"].to_numpy() < 0, Flag.OFF_WINDOW)
    notes += converted(table, rows, targets)
    if options.bias is not None:
        rows["bias_removed"] = options.bias.of(rows, at)
        rows["value"] = rows["value"] - rows["bias_removed"]
    set_apart(rows, targets, placer)
    rows["error_used"] = errors_of(rows, by_known_names(options.errors, names))
    correlated = options.correlation is not None
    context = Context(layout, at, lambda some, field: apply(some, targets, placer, field), targets, correlated)
    for check in checks:
        rows = _checked(rows, check, context)
    refuse_errors(rows)
    notes += errors_in_vain(rows, options.errors, names)
    notes += [sentence for check in checks for sentence in check.remarks(rows)]
    apart = int(grouped(rows).sum())
    if apart and correlated and any(isinstance(check, Superobbing) for check in checks):
        owner = spelled("Superobbing", python="Superobbing")
        notes.append(f"{owner} averages no rows of groups, because their errors are correlated.")
    if apart and not correlated:
        notes.append(
            f"{apart} rows have a group; their errors count as independent, because no correlation is given "
            f"({spelled('correlation', 0.5)} gives one)."
        )
    return arrays_of(rows, targets, placer, at, (*table.notes, *notes), options)


def _checked(rows: pandas.DataFrame, check: QualityCheck, context: Context) -> pandas.DataFrame:
    """Rows after a check, which sees the rows that are still used, and may add rows."""
    import pandas

    used = np.flatnonzero(rows["flag"].to_numpy() == Flag.USED)
    if not used.size:
        return rows
    outcome = check.apply(rows.iloc[used], context)
    flags = rows["flag"].to_numpy(object, copy=True)
    flags[used] = [str(Flag(flag)) for flag in outcome.flags]
    rows = rows.assign(flag=flags)
    if outcome.added is None or outcome.added.empty:
        return rows
    first = int(rows.index.max()) + 1
    added = outcome.added.set_axis(np.arange(first, first + len(outcome.added)), axis=0)
    if outcome.joined is not None:
        superob = np.full(len(rows), -1) if "superob" not in rows else rows["superob"].to_numpy(int, copy=True)
        superob[used] = np.where(outcome.joined < 0, superob[used], first + outcome.joined)
        rows, added = rows.assign(superob=superob), added.assign(superob=-1)
    return pandas.concat([rows, added]).rename_axis("id")
