"""Scores of a run: against a gridded truth, and against withheld rows."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.assimilation.config import KEYS, in_keys
from numpyro_diffusion_da.assimilation.emulator import open_prior
from numpyro_diffusion_da.assimilation.files import replacing
from numpyro_diffusion_da.assimilation.forecasting import FORECAST, LEAD, emulator_of
from numpyro_diffusion_da.assimilation.guesses import in_python, open_dataset
from numpyro_diffusion_da.assimilation.run import Run
from numpyro_diffusion_da.diagnostics.feedback import nearest_level
from numpyro_diffusion_da.diagnostics.verification import area_weights, crps, rmse, spread
from numpyro_diffusion_da.diffusion.prior import EmulatorPrior
from numpyro_diffusion_da.fields.datasets import SHORT_NAMES, dataset_times, read_states
from numpyro_diffusion_da.fields.departures import departure
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.observation.tables.flags import Flag

if TYPE_CHECKING:
    import pandas

SCORES = "verification.csv"
"""Name in the folder of a run."""


def verify(
    folder: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    prior: EmulatorPrior | None = None,
) -> pandas.DataFrame:
    """Score the analyses of a run, and its forecast if there is one, and write verification.csv into its folder.

    Scores are those of `ndda.diagnostics`, over all times that the truth has: area-weighted for a gridded truth, and
    over rows for withheld observations, whose error is added to the members and to the spread.

    Args:
        folder: folder of a run that has finished.
        against: NetCDF file or Zarr group with the truth, or a reanalysis; None scores withheld rows only. Variables
            that it lacks are not scored.
        prior: the emulator, if the configuration of the run does not name one.

    Returns:
        Table with the columns `what` (analysis, background or forecast), `against` (truth or withheld rows),
        `lead_hours`, `variable`, `level` (hPa), `unit`, `count` (times, or rows), `rmse`, `spread`, `spread_skill`,
        `crps` and `left_out`: withheld rows that are not scored, because the background check rejects them.

    Raises:
        FileNotFoundError: there is no such truth.
        ValueError: the folder holds no finished run; the truth has none of its times, or lacks a variable; or there is
            nothing to compare with.
    """
    import pandas

    run = Run.open(folder)
    rows = list(_of_rows(run.feedback(), run.analysis("mean")))
    if against is not None:
        with in_keys({**KEYS, "dataset": in_python(pathlib.Path(against))}):
            rows += _of_truth(run, pathlib.Path(against), prior)
    if not rows:
        raise ValueError(
            f"the run in '{run.folder}' has no withheld rows; give a truth to verify against, or run with "
            "quality.withheld = 0.1."
        )
    table = pandas.DataFrame(rows)
    with replacing(run.folder / SCORES) as part:
        table.to_csv(part, index=False)
    return table


def _of_rows(feedback: pandas.DataFrame, analysis: Any) -> Iterator[dict[str, Any]]:
    """Scores of withheld rows, by variable, and by the nearest level of the prior where rows have a pressure."""
    import pandas

    apart = feedback["flag"].isin([Flag.WITHHELD, Flag.WITHHELD_FAR])
    withheld = feedback[apart & np.isfinite(feedback["analysis"].to_numpy(float))]
    for what in ("background", "analysis"):
        there = withheld[np.isfinite(withheld[what].to_numpy(float))]
        for (name, level), both in there.groupby(
            ["name", pandas.Series(_levels(there, analysis), there.index)], sort=True, dropna=False
        ):
            some = both[both["flag"] == Flag.WITHHELD]
            found = departure(some["value"], some[what], some["unit"])
            error = some["error_used"].to_numpy(float)
            of_mean, expected = (
                float(np.sqrt(np.mean(square))) if len(some) else np.nan
                for square in (found**2, some[f"{what}_spread"].to_numpy(float) ** 2 + error**2)
            )
            yield {
                "what": what,
                "against": "withheld rows",
                "lead_hours": 0.0,
                "variable": name,
                "level": level,
                "unit": both["unit"].iloc[0],
                "count": len(some),
                "rmse": of_mean,
                "spread": expected,
                "spread_skill": expected / of_mean if of_mean else np.nan,
                "crps": float(some[f"{what}_crps"].mean()),
                "left_out": len(both) - len(some),
            }


def _levels(rows: pandas.DataFrame, analysis: Any) -> np.ndarray:
    """Level of the prior, in hPa, that is nearest to the pressure of each row; NaN for rows without a pressure."""
    if "level" not in analysis.coords:
        return np.full(len(rows), np.nan)
    return nearest_level(rows["pres"].to_numpy(float) / 100.0, analysis["level"].values.astype(float))


def _of_truth(run: Run, against: pathlib.Path, prior: EmulatorPrior | None) -> list[dict[str, Any]]:
    """Scores of analyses and forecast against a gridded truth, by variable and level."""
    prior = open_prior(run.config.prior) if prior is None else prior
    emulator = emulator_of(run.config, run.facts, prior)
    found: list[dict[str, Any]] = []
    with open_dataset(against) as truth:
        layout = _of_those_in(truth, emulator.prior.layout, against)
        fill: dict[str, float] = getattr(prior, "fill_values", dict)()
        fill = {name: value for name, value in fill.items() if name in {v.name for v in layout.variables}}
        has = dataset_times(truth)
        for what, members, dim, valid in _sources(run):
            common = [i for i, time in enumerate(valid) if time in has]
            if not common and what == "analysis":
                raise ValueError(
                    f"'{against}' has none of the times of the run, {valid[0]} to {valid[-1]}; give a truth with some."
                )
            parts = []
            for i in common:
                try:
                    states = read_states(truth, layout, valid[i : i + 1], fill=fill)
                except ValueError as error:
                    raise ValueError(f"'{against}': {error}") from None
                parts.append(_scores(layout, members.isel({dim: i}), states[0]))
            if what == "analysis":
                found += _rows(layout, parts, what, 0.0)
                continue
            for i, part in zip(common, parts, strict=True):
                found += _rows(layout, [part], what, float(members[dim].values[i] / np.timedelta64(1, "h")))
    return found


def _sources(run: Run) -> Iterator[tuple[str, Any, str, np.ndarray]]:
    """Yield what is scored: its name, members, dimension of times, and the times for which its states are."""
    import xarray

    analysis = run.analysis("members")
    yield "analysis", analysis, "time", analysis["time"].values
    if (run.folder / FORECAST).is_dir():
        made = xarray.open_zarr(run.folder / FORECAST, chunks=None).isel(time=0)
        yield "forecast", made, LEAD, made["time"].values + made[LEAD].values


def _of_those_in(truth: Any, layout: Layout, against: pathlib.Path) -> Layout:
    """Layout of the variables that a truth has."""
    there = [v for v in layout.variables if {v.name, *SHORT_NAMES.get(v.name, ())} & set(truth.data_vars)]
    if not there:
        names = ", ".join(variable.name for variable in layout.variables)
        raise ValueError(f"'{against}' has no variable of the prior; give a truth with some of {names}.")
    channels = sum(variable.num_channels for variable in there)
    return dataclasses.replace(layout, shape=(*layout.shape[:-1], channels), variables=tuple(there))


def _scores(layout: Any, members: Any, truth: np.ndarray) -> dict[tuple[str, float], tuple[float, float, float]]:
    """Squared error of the mean, variance and CRPS by variable and level, area-weighted, at one time."""
    weights = area_weights(layout.coords()["latitude"])[:, None]
    found = {}
    for name, (_, values, _) in layout.split(truth).items():
        levels = layout.variable(name).levels
        for i, level in enumerate(levels or (np.nan,)):
            field = values[i] if levels else values
            array = members[name].sel(level=level) if levels else members[name]
            ensemble = array.transpose("number", "latitude", "longitude").values
            ensemble = np.where(np.isfinite(field), ensemble, np.nan)
            scores = (f(ensemble, field, weights=weights) for f in (rmse, crps))
            of_mean, of_members = scores
            width = (
                spread(ensemble, weights=np.where(np.isfinite(field), weights, 0.0)) if len(ensemble) > 1 else np.nan
            )
            found[name, float(level)] = (float(of_mean) ** 2, float(width) ** 2, float(of_members))
    return found


def _rows(layout: Any, parts: list[Any], what: str, lead_hours: float) -> list[dict[str, Any]]:
    """Rows of the table of scores, means over times."""
    rows = []
    for key in parts[0] if parts else ():
        square, variance, of_members = np.mean([part[key] for part in parts], axis=0)
        rows.append(
            {
                "what": what,
                "against": "truth",
                "lead_hours": lead_hours,
                "variable": key[0],
                "level": key[1],
                "unit": layout.variable(key[0]).units,
                "count": len(parts),
                "rmse": float(np.sqrt(square)),
                "spread": float(np.sqrt(variance)),
                "spread_skill": float(np.sqrt(variance / square)) if square else np.nan,
                "crps": float(of_members),
                "left_out": 0,
            }
        )
    return rows
