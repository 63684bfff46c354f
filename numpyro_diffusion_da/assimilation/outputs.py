"""Outputs of a run, written from its store: analyses, feedback of each row, and numbers of each cycle.

The particles are read from the store a few cycles at a time, so their number is bounded by the disk only.
"""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from numpyro_diffusion_da.assimilation.emulator import Emulator
from numpyro_diffusion_da.assimilation.files import ANALYSIS, BACKGROUND, CYCLES, FEEDBACK, replacing
from numpyro_diffusion_da.assimilation.prepared import PreparedRun
from numpyro_diffusion_da.assimilation.program import GROUPS, OBSERVATION, PREVIOUS
from numpyro_diffusion_da.diagnostics.feedback import gaussian_crps
from numpyro_diffusion_da.diagnostics.verification import area_weights, crps, rmse
from numpyro_diffusion_da.fields.datasets import to_dataset
from numpyro_diffusion_da.fields.departures import departure
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.observation.tables.flags import Flag
from numpyro_diffusion_da.observation.tables.placed import PlacedObservations

if TYPE_CHECKING:
    import pandas
    import xarray

BATCH_BYTES = 2**27
"""Number of bytes of the members of a batch of cycles: 128 MB."""

PERTURBED, ONE_STEP = 1, 2
"""Streams of random numbers beside those of the filter: perturbed observations, and one-step forecasts."""


def write_outputs(run: PreparedRun, store: pathlib.Path) -> dict[str, Any]:
    """Write all outputs of a run from its store.

    Args:
        run: the prepared run.
        store: directory of its filter.

    Returns:
        Facts about the run, as JSON can hold them: numbers of rows by flag, network passes per particle and step,
        settings of the filter.
    """
    import xarray

    with xarray.open_datatree(store, engine="zarr", chunks=None) as tree:
        columns = _observed(tree, run.placed)
        columns |= _analyses(tree, run)
        rms = _forecasts(tree, run)
        check = run.config.quality.background_check
        feedback = feedback_of(run.placed, columns, None if check is False else check)
        with replacing(run.folder / FEEDBACK) as part:
            feedback.to_parquet(part, engine="pyarrow", index=False)
        with replacing(run.folder / CYCLES) as part:
            cycles_of(tree, run.times, feedback, rms).to_csv(part, index=False)
        stats = tree["sample_stats"].to_dataset()
        passes = {
            name.removeprefix("network_passes_"): float(stats[name].mean())
            for name in map(str, stats.data_vars)
            if name.startswith("network_passes_")
        }
        settings = {str(key): _plain(value) for key, value in tree.attrs.items()}
    flags = feedback["flag"].value_counts().to_dict()
    return {"rows": {str(flag): int(count) for flag, count in flags.items()}, "passes": passes, "settings": settings}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value.tolist() if isinstance(value, np.ndarray) else value


# --- states -----------------------------------------------------------------------------------------------------------


def stored_states(tree: xarray.DataTree, layout: Layout, steps: slice, name: str | None = None) -> np.ndarray:
    """States of all particles at some steps, from the store of a filter.

    Args:
        tree: tree of the store.
        layout: layout of the state.
        steps: the steps.
        name: name of a site with the shape of the state; None for the state itself, a variable for each field.

    Returns:
        States, shape (member, time, latitude, longitude, channel).
    """
    part = tree["posterior"].to_dataset().isel(chain=0, time=steps)
    if name is not None:
        return np.asarray(part[name].values)
    return layout.join({variable.name: part[variable.name].values for variable in layout.variables})


def spread_evenly(members: int, count: int) -> np.ndarray:
    """Numbers of some of the members, spread evenly over all: neighbors may have the same ancestor.

    Args:
        members: number of members.
        count: number to choose.
    """
    return np.floor(np.arange(count) * members / count).astype(int)


def batches(steps: int, bytes_per_step: int) -> Iterator[slice]:
    """Consecutive parts of the steps that hold few bytes.

    Args:
        steps: number of steps.
        bytes_per_step: bytes of the members of one step.
    """
    size = max(1, BATCH_BYTES // max(1, bytes_per_step))
    for first in range(0, steps, size):
        yield slice(first, min(first + size, steps))


class GroupedWriter:
    """Writer of the groups `members`, `mean` and `spread` of a Zarr store, some cycles at a time.

    Args:
        path: the store; nothing is there.
        layout: layout of the states.
        kept: numbers of the members that are kept.
    """

    def __init__(self, path: pathlib.Path, layout: Layout, kept: np.ndarray) -> None:
        self.path, self.layout, self.kept = path, layout, kept

    def write(self, times: np.ndarray, states: np.ndarray) -> None:
        """Append members, mean and spread of some cycles to the store.

        Args:
            times: their times.
            states: states of all members, shape (member, time, latitude, longitude, channel).
        """
        kept = np.moveaxis(states[self.kept], 0, 1)
        groups = {
            "members": to_dataset(kept, self.layout, {"time": times, "number": np.arange(len(self.kept))}),
            "mean": to_dataset(states.mean(0, dtype=np.float64), self.layout, {"time": times}),
            "spread": to_dataset(states.std(0, ddof=1, dtype=np.float64), self.layout, {"time": times}),
        }
        for variable in groups["spread"].data_vars.values():
            variable.attrs["long_name"] = f"standard deviation of {variable.attrs['long_name']} over the members"
            variable.attrs["cell_methods"] = "realization: standard_deviation"
            variable.attrs.pop("standard_name", None)
        for variable in groups["mean"].data_vars.values():
            variable.attrs["cell_methods"] = "realization: mean"
        for name, dataset in groups.items():
            append(dataset, self.path, name, "time")


def append(dataset: xarray.Dataset, path: pathlib.Path, group: str | None, dim: str) -> None:
    """Append a dataset along one dimension to a group of a Zarr store, or make the group.

    Args:
        dataset: the dataset.
        path: the store.
        group: name of the group; None for the root.
        dim: the dimension.
    """
    there = (path / group if group else path) / "zarr.json"
    how: dict[str, Any] = {"append_dim": dim} if there.exists() else {"encoding": _chunks(dataset, dim)}
    with warnings.catch_warnings():
        # Zarr says that consolidated metadata are no part of format 3 yet. Without them, xarray.open_zarr warns.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        dataset.to_zarr(path, group=group, mode="a", consolidated=True, zarr_format=3, **how)


def _chunks(dataset: xarray.Dataset, dim: str) -> dict[str, Any]:
    """Chunks of one time and one field each."""
    found: dict[str, Any] = {}
    for name, variable in dataset.data_vars.items():
        sizes = [1 if d in ("time", "number", "prediction_timedelta") else n for d, n in variable.sizes.items()]
        found[str(name)] = {"dtype": "float32", "chunks": tuple(sizes)}
    for name in ("time", "prediction_timedelta"):
        if name in dataset.coords:
            found[name] = {"dtype": "int64", "chunks": (4096,)}
    if "time" in dataset.coords:
        found["time"]["units"] = "seconds since 1970-01-01"
    if "prediction_timedelta" in dataset.coords:
        found["prediction_timedelta"]["units"] = "seconds"
    return found


def _analyses(tree: xarray.DataTree, run: PreparedRun) -> dict[str, np.ndarray]:
    """Write the analyses, and compute them at the observations."""
    placed, layout = run.placed, run.placed.layout
    members = tree["posterior"].sizes["draw"]
    kept = spread_evenly(members, run.config.output.members or members)
    shape = placed.xs["y"].shape
    found = {name: np.full(shape, np.nan) for name in ("analysis", "analysis_spread", "analysis_crps")}
    key = jax.random.fold_in(jax.random.key(run.config.output.seed), PERTURBED)
    observed = _values(placed)
    with replacing(run.folder / ANALYSIS) as part:
        writer = GroupedWriter(part, layout, kept)
        for steps in batches(len(run.times), 4 * members * layout.size):
            states = stored_states(tree, layout, steps)
            writer.write(run.times[steps].astype("datetime64[ns]"), states)
            for i, t in enumerate(range(steps.start, steps.stop)):
                seen = np.asarray(placed.observe(states[:, i], t), float)
                found["analysis"][t] = seen.mean(0)
                found["analysis_spread"][t] = seen.std(0, ddof=1)
                noise = np.asarray(jax.random.normal(jax.random.fold_in(key, t), seen.shape))
                perturbed = seen + noise * placed.xs["error"][t]
                found["analysis_crps"][t] = crps(perturbed, observed[t], axis=())
    return found


def _values(placed: PlacedObservations) -> np.ndarray:
    """Value of each row at its place in ``xs["y"]``, also where it is withheld; NaN where padded."""
    ids = placed.xs["id"]
    values = placed.rows["value"].reindex(ids[ids >= 0]).to_numpy(float)
    found = np.full(ids.shape, np.nan)
    found[ids >= 0] = values
    return found


def _forecasts(tree: xarray.DataTree, run: PreparedRun) -> dict[str, np.ndarray]:
    """Write one-step forecasts from the analyses if they are asked for; root mean square of the increments.

    The forecast of a cycle is drawn anew from all members of the analysis before. The first cycle has none.
    """
    if not run.config.output.background:
        return {}
    emulator, layout = run.emulator, run.placed.layout
    steps, members = len(run.times), tree["posterior"].sizes["draw"]
    rms = {variable.name: np.full(steps, np.nan) for variable in layout.variables}
    weights = area_weights(layout.coords()["latitude"])[:, None]
    key = jax.random.fold_in(jax.random.key(run.config.output.seed), ONE_STEP)
    kept = spread_evenly(members, run.config.output.members or members)
    with replacing(run.folder / BACKGROUND) as part:
        writer = GroupedWriter(part, layout, kept)
        for t in range(1, steps):
            inputs = None if emulator.frames == 1 else jax.tree.map(lambda v, t=t: v[t], run.inputs["forcings"])
            before = last_states(tree, emulator, t - 1)
            states = np.asarray(
                emulator.advance(jax.random.fold_in(key, t), before, inputs, run.config.filter.batch_size)
            )
            writer.write(run.times[t : t + 1].astype("datetime64[ns]"), states[:, None])
            increment = stored_states(tree, layout, slice(t, t + 1))[:, 0].mean(0) - states.mean(0)
            for name, (_, values, _) in layout.split(increment).items():
                defined = np.where(np.isfinite(values), 0.0, np.nan)
                rms[name][t] = rmse(values[None], defined, weights=weights)
    return rms


def last_states(tree: xarray.DataTree, emulator: Emulator, step: int) -> Any:
    """Last state of each member at a step, or the pair of the last two, as the prior is conditioned on them.

    Args:
        tree: tree of the store.
        emulator: the prior of the run.
        step: the step.
    """
    layout, at = emulator.prior.layout, slice(step, step + 1)
    state = filled(stored_states(tree, layout, at)[:, 0], emulator)
    if emulator.frames == 1:
        return state
    return filled(stored_states(tree, layout, at, PREVIOUS)[:, 0], emulator), state


def filled(states: np.ndarray, emulator: Emulator) -> np.ndarray:
    """States with the values that the prior holds at points where a variable is undefined, in place of NaN.

    Args:
        states: states, shape (..., latitude, longitude, channel).
        emulator: the prior.
    """
    fill: dict[str, float] = getattr(emulator.prior, "fill_values", dict)()
    for name, value in fill.items():
        channels = emulator.prior.layout.channels(name)
        states[..., channels] = np.nan_to_num(states[..., channels], nan=value)
    return states


# --- rows and cycles --------------------------------------------------------------------------------------------------


def _observed(tree: xarray.DataTree, placed: PlacedObservations) -> dict[str, np.ndarray]:
    """Background of each observation and what the check rejected, from the statistics of a store."""
    stats = tree["sample_stats"].to_dataset().isel(chain=0)
    found = {}
    if f"{OBSERVATION}_background" in stats:
        found["background"] = np.asarray(stats[f"{OBSERVATION}_background"].values, float)
        found["background_spread"] = np.sqrt(np.asarray(stats[f"{OBSERVATION}_background_variance"].values, float))
    if f"{OBSERVATION}_rejected" in stats:
        found["rejected"] = np.asarray(stats[f"{OBSERVATION}_rejected"].values, bool)
    if f"{GROUPS}_rejected" in stats:
        found["rejected"] = found["rejected"] | placed.ungroup(np.asarray(stats[f"{GROUPS}_rejected"].values, bool))
    return found


def feedback_of(
    placed: PlacedObservations, columns: Mapping[str, np.ndarray], threshold: float | None = None
) -> pandas.DataFrame:
    """Rows of the tables with what became of them.

    Args:
        placed: the placed observations.
        columns: arrays of the shape of ``xs["y"]`` by the name of their column, and `rejected`.
        threshold: that of the background check, for withheld rows; None for none.

    Returns:
        One row for each row of the tables and each mean that superobbing added.
    """
    import scipy.special

    names = ("background", "background_spread", "analysis", "analysis_spread", "analysis_crps")
    given = {name: columns.get(name, np.full(placed.xs["y"].shape, np.nan)) for name in names}
    frame = placed.feedback(rejected=columns.get("rejected"), threshold=threshold, **given)
    value, error = frame["value"].to_numpy(float), frame["error_used"].to_numpy(float)
    spread = np.hypot(frame["background_spread"].to_numpy(float), error)
    o_b = departure(value, frame["background"], frame["unit"])
    with np.errstate(divide="ignore", invalid="ignore"):
        frame["background_pit"] = scipy.special.ndtr(o_b / spread)
    frame["background_crps"] = gaussian_crps(o_b, spread)
    for name, quantity in placed.operator.quantities.items():
        if quantity[0].period is not None:
            of_circle = (frame["name"] == name).to_numpy(bool)
            for column in ("background", "analysis"):
                frame.loc[of_circle, column] = frame.loc[of_circle, column] % quantity[0].period
    return frame


def cycles_of(
    tree: xarray.DataTree, times: np.ndarray, feedback: pandas.DataFrame, rms: Mapping[str, np.ndarray]
) -> pandas.DataFrame:
    """Numbers of each cycle.

    Args:
        tree: tree of the store.
        times: times of the analyses.
        feedback: rows with what became of them.
        rms: root mean square of the increments by the name of the variable, shape (time,).
    """
    import pandas

    stats = tree["sample_stats"].to_dataset().isel(chain=0)

    def median(name: str) -> np.ndarray:
        values = np.asarray(stats[name].values, float)
        return np.median(values.reshape(len(values), -1), axis=1)

    def count(flag: Flag) -> np.ndarray:
        there = feedback.loc[(feedback["flag"] == flag) & (feedback["cycle"] >= 0), "cycle"]
        return np.bincount(there.to_numpy(int), minlength=len(times))

    used = feedback[(feedback["flag"] == Flag.USED) & np.isfinite(feedback["background_pit"].to_numpy(float))]
    cycle = used["cycle"].to_numpy(int)
    expected = used["background_spread"].to_numpy(float) ** 2 + used["error_used"].to_numpy(float) ** 2
    square = departure(used["value"], used["background"], used["unit"]) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.bincount(cycle, square, len(times)) / np.bincount(cycle, expected, len(times))
    columns = {
        "time": pandas.DatetimeIndex(times).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "used": count(Flag.USED),
        "rejected": count(Flag.FAR_FROM_BACKGROUND),
        "withheld": count(Flag.WITHHELD),
        "withheld_rejected": count(Flag.WITHHELD_FAR),
        "ess": median("ess"),
        "tempering": median("tempering"),
        "log_evidence_increment": median("log_evidence_increment"),
        "departure_ratio": ratio,
        **{f"increment_rms_{name}": values for name, values in rms.items()},
    }
    return pandas.DataFrame(columns)
