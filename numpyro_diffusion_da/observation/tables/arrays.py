"""Padded arrays for a scan, from rows of a table that have their flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.arguments import require, shown
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.fields.units import Conversion, conversion
from numpyro_diffusion_da.observation.tables.flags import Flag
from numpyro_diffusion_da.observation.tables.groups import groups_of
from numpyro_diffusion_da.observation.tables.names import LINEAR, Target
from numpyro_diffusion_da.observation.tables.operator import ObservationOperator
from numpyro_diffusion_da.observation.tables.options import Options
from numpyro_diffusion_da.observation.tables.placed import PlacedObservations
from numpyro_diffusion_da.observation.tables.quantities import PRESSURE, DerivedQuantity
from numpyro_diffusion_da.observation.tables.weights import Placer

if TYPE_CHECKING:
    import pandas


SMALLEST = 8
"""Smallest number of rows of a part of the operator, with padding."""


def padded_size(count: int) -> int:
    """Number of rows with padding: 8, 12, 16, 24, 32, 48, ..., so that few sizes are compiled.

    Args:
        count: number of rows.
    """
    size = SMALLEST
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def arrays_of(
    rows: pandas.DataFrame,
    targets: dict[str, Target],
    placer: Placer,
    times: np.ndarray,
    notes: tuple[str, ...],
    options: Options,
) -> PlacedObservations:
    """Padded arrays for a scan, from rows that have their flags.

    Args:
        rows: all rows.
        targets: what each name is.
        placer: weights of rows.
        times: times of the steps.
        notes: what was changed so far.
        options: arguments of `ObservationTable.on`.
    """
    kept = rows["flag"].isin([Flag.USED, Flag.WITHHELD]).to_numpy()
    part = np.array([targets[name].part if name in targets else "" for name in rows["name"]], object)
    least = _check_sizes(options.sizes, placer)
    parts = sorted({*part[kept], *least} or {LINEAR})
    instruments, of_row = _instruments(rows, kept, options.instrument)
    blocks: dict[str, dict[str, np.ndarray]] = {}
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in ("y", "error", "place", "pressure", "id", "instrument")}
    found_sizes = {}
    for name in parts:
        at = np.flatnonzero(kept & (part == name))
        cycle = rows["cycle"].to_numpy()[at]
        order = np.argsort(cycle, kind="stable")
        at, cycle = at[order], cycle[order]
        counts = np.bincount(cycle, minlength=len(times)) if at.size else np.zeros(len(times), int)
        size = max(padded_size(int(counts.max(initial=0))), least.get(name, (0, 0))[0])
        slot = np.arange(at.size) - np.repeat(np.cumsum(counts) - counts, counts)
        some = rows.iloc[at]
        blocks[name] = _part(name, some, targets, placer, (len(times), size), cycle, slot, least.get(name, (0, 0))[1])
        found_sizes[name] = (size, blocks[name]["index"].shape[-1])

        def spread(values: Any, empty: float, dtype: Any, cycle: Any = cycle, slot: Any = slot, n: int = size) -> Any:
            values = np.asarray(values)
            full = np.full((len(times), n, *values.shape[1:]), empty, dtype)
            full[cycle, slot] = values
            return full

        withheld = some["flag"].to_numpy() == Flag.WITHHELD
        arrays["y"].append(spread(np.where(withheld, np.nan, some["value"].to_numpy(float)), np.nan, np.float32))
        arrays["error"].append(spread(some["error_used"].to_numpy(float), 1.0, np.float32))
        arrays["place"].append(spread(some[["lat", "lon"]].to_numpy(float), np.nan, np.float32))
        arrays["pressure"].append(spread(some["pres"].to_numpy(float), np.nan, np.float32))
        arrays["id"].append(spread(some.index.to_numpy(), -1, np.int32))
        arrays["instrument"].append(spread(of_row[at], 0, np.int32))
    xs: dict[str, Any] = {name: np.concatenate(values, axis=1) for name, values in arrays.items()}
    if options.instrument is None:
        del xs["instrument"]
    if options.correlation is not None:
        xs["groups"] = groups_of(rows, options.correlation, xs, padded_size)
    conversions = {
        name: (quantity, _input_conversions(quantity, placer.layout))
        for name, quantity in placer.names.quantities.items()
    }
    return PlacedObservations(
        layout=placer.layout,
        times=times,
        rows=rows.rename_axis("id"),
        xs={**xs, "parts": blocks},
        operator=ObservationOperator(placer.layout, conversions),
        sizes=found_sizes,
        instruments=instruments,
        notes=notes,
    )


def _check_sizes(sizes: Mapping[str, tuple[int, int]] | None, placer: Placer) -> dict[str, tuple[int, int]]:
    """Least size of each part, after a check."""
    require(sizes, (Mapping, type(None)), "ObservationTable.on", "sizes", "placed.sizes")
    found = dict(sizes or {})
    for name, pair in found.items():
        if name != LINEAR and name not in placer.names.quantities:
            raise ValueError(
                f"ObservationTable.on got a size of {shown(name)}; the parts are "
                f"{', '.join([LINEAR, *placer.names.quantities])}."
            )
        whole = isinstance(pair, Sequence) and all(isinstance(n, (int, np.integer)) and n > 0 for n in pair)
        if not whole or len(pair) != 2:
            raise ValueError(f"ObservationTable.on got sizes[{name!r}]={shown(pair)}; give the sizes of another table.")
    return found


def _instruments(
    rows: pandas.DataFrame, kept: np.ndarray, instrument: str | Sequence[str] | None
) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """(names of the instruments, instrument of each row)."""
    if instrument is None:
        return [], np.zeros(len(rows), int)
    columns = [instrument] if isinstance(instrument, str) else list(instrument)
    for name in columns:
        if name not in rows:
            raise ValueError(
                f"ObservationTable.on got instrument={shown(instrument)}, but the table has no column {name!r}; it has "
                f"{', '.join(map(str, rows.columns[:12]))}."
            )
    keys = list(
        zip(
            *(rows[name].map(lambda value: "" if value != value or value is None else str(value)) for name in columns),
            strict=True,
        )
    )
    names = sorted({key for key, keep in zip(keys, kept, strict=True) if keep})
    number = {key: i for i, key in enumerate(names)}
    return names, np.array([number.get(key, 0) for key in keys], int)


def _input_conversions(quantity: DerivedQuantity, layout: Layout) -> tuple[Conversion, ...]:
    """Conversion of each input of a quantity from the layout's unit.

    Raises:
        ValueError: the layout's unit does not become the one that the quantity needs.
    """
    found = []
    for at in quantity.inputs:
        name = at if isinstance(at, str) else at[0]
        needed = quantity.input_units.get(name)
        if name == PRESSURE or needed is None:
            found.append(Conversion(1.0, 0.0))
            continue
        has = layout.variable(name).units
        how = conversion(has, needed)
        if how is None:
            raise ValueError(
                f"'{quantity.name}' needs '{name}' in '{needed}', but the layout has it in '{has}'; correct the layout."
            )
        found.append(how)
    return tuple(found)


def _part(
    name: str,
    rows: pandas.DataFrame,
    targets: dict[str, Target],
    placer: Placer,
    shape: tuple[int, int],
    cycle: np.ndarray,
    slot: np.ndarray,
    least: int,
) -> dict[str, np.ndarray]:
    """Arrays of one part of the operator, (time, row, ...)."""
    here = [target for target in targets.values() if target.part == name]
    quantity = placer.names.quantities.get(name)
    if quantity is not None and not here:
        here = [Target(name, quantity.units, True, None, quantity)]
    weights = []
    for target in here:
        at = np.flatnonzero(rows["name"].to_numpy() == target.name)
        weights.append((at, placer.weights(target, rows.iloc[at])[0] if at.size else []))
    inputs = 1 if quantity is None else len(placer.inputs(here[0]))
    # Four points of the grid, on two levels.
    usual = 8 if any(variable.levels for variable in placer.layout.variables) else 4
    width = max((w.points.shape[1] for _, each in weights for w in each), default=usual)
    width = max(usual, least, padded_size(width) if width > usual else 0)
    index, weight = (np.zeros((len(rows), inputs, width), kind) for kind in (np.int32, np.float32))
    for at, each in weights:
        for j, found in enumerate(each):
            index[at, j, : found.points.shape[1]] = found.points
            weight[at, j, : found.points.shape[1]] = found.weight
    full_index = np.zeros((*shape, inputs, width), np.int32)
    full_weight = np.zeros((*shape, inputs, width), np.float32)
    if quantity is not None:
        # Padding observes a value that exists, because a function of zeros may have no derivative.
        channels = [placer.layout.channels(variable.name).start for variable, _ in placer.inputs(here[0])]
        full_index[..., 0] = np.asarray(channels, np.int32)
        full_weight[..., 0] = 1.0
    full_index[cycle, slot], full_weight[cycle, slot] = index, weight
    found_part = {"index": full_index, "weight": full_weight}
    if quantity is not None and PRESSURE in quantity.inputs:
        found_part["pressure"] = np.full(shape, 5e4, np.float32)
        found_part["pressure"][cycle, slot] = rows["pres"].to_numpy(float)
    if quantity is not None and quantity.period is not None:
        found_part["near"] = np.zeros(shape, np.float32)
        found_part["near"][cycle, slot] = rows["value"].to_numpy(float)
    return found_part
