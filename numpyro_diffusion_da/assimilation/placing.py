"""Observations of a run, placed on the prior's grid and on the times of the analyses."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from numpyro_diffusion_da.assimilation.config import KEYS, QualitySettings, RunConfig, in_keys
from numpyro_diffusion_da.assimilation.emulator import Emulator
from numpyro_diffusion_da.assimilation.files import FACTS, FEEDBACK, check_files
from numpyro_diffusion_da.assimilation.guesses import open_dataset
from numpyro_diffusion_da.fields.datasets import static_field
from numpyro_diffusion_da.observation.tables.bias import InstrumentBias
from numpyro_diffusion_da.observation.tables.checks import (
    Blacklist,
    Bounds,
    Duplicates,
    HeightDifference,
    QualityCheck,
    QualityColumn,
    Superobbing,
    Thinning,
    Withheld,
)
from numpyro_diffusion_da.observation.tables.placed import PlacedObservations
from numpyro_diffusion_da.observation.tables.table import ObservationTable, read_table, read_texts
from numpyro_diffusion_da.observation.tables.tracks import Tracks

GRAVITY = 9.80665
"""Standard acceleration of gravity, m s-2."""


def place_observations(
    config: RunConfig, emulator: Emulator, times: np.ndarray, table: ObservationTable | None = None
) -> PlacedObservations:
    """Read the tables of a configuration, and place them on the prior's grid and on times.

    Args:
        config: the configuration.
        emulator: the prior of the run.
        times: times of the analyses.
        table: the observations, if they are not read from the files of the configuration.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a table cannot be read or placed. The message names the file and the row.
    """
    given = config.observations
    if table is not None and (unused := {"columns", "variables", "units", "missing_codes"} & given.model_fields_set):
        raise ValueError(
            f"observations.{min(unused)} is not used with a table that was read already; give it to read_table."
        )
    if table is None:
        codes = {} if given.missing_codes is None else {"missing_codes": given.missing_codes}
        variables = {name: to or None for name, to in given.variables.items()}
        table = read_table(
            [str(file) for file in given.files], columns=given.columns, variables=variables, units=given.units, **codes
        )
        return _placed(table, config, emulator, times)
    # What it does not have was named in Python.
    with in_keys(dict.fromkeys(name for name in KEYS if name.startswith("read_table."))):
        return _placed(table, config, emulator, times)


def _placed(table: ObservationTable, config: RunConfig, emulator: Emulator, times: np.ndarray) -> PlacedObservations:
    """Observations of a table on the prior's grid and on times."""
    given = config.observations
    return table.on(
        emulator.prior.layout,
        times,
        window=given.window,
        errors=errors_of(config) or None,
        quality=checks_of(config.quality, config, emulator.prior),
        bias=None if given.bias_from is None else bias_of(given.bias_from, given.bias_by),
        correlation=given.correlation or None,
    )


def bias_of(folder: pathlib.Path, by: tuple[str, ...]) -> InstrumentBias:
    """Biases of instruments from the departures of an earlier run.

    Args:
        folder: folder of the run.
        by: columns that tell instruments apart.

    Raises:
        ValueError: the folder holds no finished run, a file of it is damaged, or its rows have no such column.
    """
    import pandas

    if not (folder / FACTS).is_file():
        raise ValueError(f"observations.bias_from '{folder}' holds no finished run; give the folder of one.")
    check_files(folder, (FACTS, FEEDBACK))
    times = json.loads((folder / FACTS).read_text())["times"]
    rows = pandas.read_parquet(folder / FEEDBACK)
    if missing := [name for name in by if name not in rows]:
        raise ValueError(f"observations.bias_by names {missing[0]!r}, but the rows of '{folder}' have no such column.")
    rows["background_variance"] = rows["background_spread"] ** 2
    return InstrumentBias.estimate(rows, times, by)


def errors_of(config: RunConfig) -> dict[Any, float]:
    """Errors of rows without one of their own, as `ObservationTable.on` takes them: "ship/t" becomes ("ship", "t").

    Args:
        config: the configuration.
    """
    return {tuple(name.split("/", 1)) if "/" in name else name: error for name, error in config.errors.items()}


def checks_of(quality: QualitySettings, config: RunConfig, prior: Any) -> list[QualityCheck]:
    """Checks of a configuration, in their order.

    Args:
        quality: table `[quality]` of the configuration.
        config: the configuration.
        prior: the prior, for its climate.

    Raises:
        ValueError: a check needs what the prior or the configuration does not have.
    """
    found: list[QualityCheck] = []
    if quality.accepted:
        found.append(QualityColumn(quality.accepted))
    if quality.blacklist:
        found.append(Blacklist(**{key: tuple(map(str, names)) for key, names in quality.blacklist.items()}))
    if quality.blacklist_file is not None:
        found += blacklists_of(quality.blacklist_file)
    if quality.bounds:
        bounds = bounds_of(prior, quality.bounds_factor)
        found.append(bounds)
        usual = type(quality).model_fields["bounds_factor"].default
        if bounds.mean is None and quality.bounds_factor != usual:
            raise ValueError(
                f"quality.bounds_factor is {quality.bounds_factor:g}, but {type(prior).__name__} has no statistics of "
                "its climate; leave it out."
            )
    if quality.max_speed:
        found.append(Tracks(quality.max_speed, quality.still_hours))
    if quality.height_difference is not None:
        found.append(HeightDifference(_orography(config, prior), quality.height_difference))
    if quality.duplicates:
        found.append(Duplicates())
    if quality.superobbing_km is not None:
        found.append(Superobbing(quality.superobbing_km))
    if quality.thinning_km is not None:
        found.append(Thinning(quality.thinning_km))
    if quality.withheld:
        by_fraction = isinstance(quality.withheld, float)
        found.append(Withheld(quality.withheld) if by_fraction else Withheld(stations=quality.withheld))  # type: ignore[arg-type]
    return found


def blacklists_of(file: pathlib.Path) -> list[Blacklist]:
    """Checks of a list of bad rows, such as `suspects.csv` of a report.

    Args:
        file: CSV or Parquet file with some of the columns `station`, `type` and `variable`. A row sets aside what has
            all of its values; a value that is missing stands for any. Further columns are for the reader.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such list. The message names the row.
    """
    import pandas

    if not file.is_file():
        raise FileNotFoundError(f"there is no file '{file}'; give a list of bad rows as quality.blacklist_file.")
    try:
        table, raw = read_texts(file, ("station", "type", "variable"))
    except ValueError as error:
        raise ValueError(f"quality.blacklist_file: {error}") from None
    columns = list(table.columns)
    if not columns:
        raise ValueError(
            f"quality.blacklist_file '{file}' has the columns {', '.join(map(str, raw.frame.columns))}; give one or "
            "more of station, type and variable."
        )
    if len(empty := np.flatnonzero(table.isna().all(axis=1))):
        row = raw.rows[empty[0]]
        raise ValueError(f"{raw.source}, row {row}: it names no station, type or variable; take it out.")
    others = [name for name in columns if name != "station"]
    groups = table.groupby(others, dropna=False, sort=False) if others else [((), table)]
    found = []
    for key, rows in groups:
        values = dict(zip(others, key if isinstance(key, tuple) else (key,), strict=True))
        names = {f"{name}s": (value,) for name, value in values.items() if isinstance(value, str)}
        stations = rows["station"] if "station" in rows else pandas.Series([None] * len(rows))
        if stations.notna().any():
            found.append(Blacklist(tuple(stations.dropna()), **names))
        if stations.isna().any():
            found.append(Blacklist(**names))
    return found


def bounds_of(prior: Any, factor: float) -> Bounds:
    """Bounds from the climate of a prior, or those of any weather for a prior without statistics of its climate.

    Args:
        prior: the prior.
        factor: largest distance from the mean of the climate, in standard deviations.
    """
    return Bounds.of(prior, factor) if callable(getattr(prior, "climate_statistics", None)) else Bounds()


def _orography(config: RunConfig, prior: Any) -> np.ndarray:
    """Height of the prior's surface in m, from the file of the key `prior.surface`."""
    if config.prior.surface is None:
        raise ValueError(
            "quality.height_difference needs the height of the prior's surface; give prior.surface, a file with "
            "geopotential_at_surface."
        )
    coordinates = prior.layout.coords()
    with open_dataset(config.prior.surface) as dataset:
        geopotential = static_field(
            dataset, "geopotential_at_surface", coordinates["latitude"], coordinates["longitude"]
        )
    return geopotential / GRAVITY
