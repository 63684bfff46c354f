"""Forecast from the last analysis of a run."""

from __future__ import annotations

import os
import pathlib

import jax
import numpy as np

from numpyro_diffusion_da.arguments import require_count
from numpyro_diffusion_da.assimilation.config import RunConfig, in_keys
from numpyro_diffusion_da.assimilation.emulator import Emulator, open_prior
from numpyro_diffusion_da.assimilation.files import STORE, check_files, replacing
from numpyro_diffusion_da.assimilation.outputs import append, last_states, spread_evenly
from numpyro_diffusion_da.assimilation.run import Run
from numpyro_diffusion_da.diffusion.prior import EmulatorPrior
from numpyro_diffusion_da.fields.datasets import to_dataset
from numpyro_diffusion_da.fields.times import hours, utc_times

FORECAST = "forecast.zarr"
"""Name in the folder of a run."""

LEAD = "prediction_timedelta"
"""Name of the dimension of lead times, as WeatherBench-X expects it."""

STREAM = 3
"""Stream of random numbers of forecasts beside those of the filter."""

MOST_STEPS = 10_000
"""Largest number of steps."""


def forecast(
    folder: str | os.PathLike[str],
    *,
    steps: int | None = None,
    until: str | None = None,
    prior: EmulatorPrior | None = None,
) -> pathlib.Path:
    """Forecast from the last analysis of a run, and write forecast.zarr into its folder.

    The members are those of analysis.zarr. The dimensions are (time, prediction_timedelta, number, level, latitude,
    longitude), with the time of the analysis as the one `time`.

    Args:
        folder: folder of a run that has finished.
        steps: number of steps.
        until: time of the last step, in place of `steps`.
        prior: the emulator, if the configuration of the run does not name one.

    Returns:
        Path of forecast.zarr.

    Raises:
        ValueError: the folder holds no finished run, the prior is another one, or neither `steps` nor `until` says how
            long.
    """
    import xarray

    run = Run.open(folder)
    check_files(run.folder, (STORE,))
    config, facts = run.config, run.facts
    emulator = emulator_of(config, facts, prior)
    last = np.datetime64(facts["times"][-1])
    count = _number_of_steps(emulator, last, steps, until)
    times = last + emulator.step * np.arange(1, count + 1)
    forcings = emulator.forcings(times)
    key = jax.random.fold_in(jax.random.key(config.output.seed), STREAM)
    with xarray.open_datatree(run.folder / STORE, engine="zarr", chunks=None) as tree:
        members = last_states(tree, emulator, len(facts["times"]) - 1)
        kept = spread_evenly(tree["posterior"].sizes["draw"], facts["members"])
    members = jax.tree.map(lambda states: states[kept], members)
    with replacing(run.folder / FORECAST) as part:
        for t in range(count):
            inputs = None if forcings is None else jax.tree.map(lambda v, t=t: v[t], forcings)
            new = emulator.advance(jax.random.fold_in(key, t), members, inputs, config.filter.batch_size)
            members = new if emulator.frames == 1 else (members[1], new)
            lead = [(t + 1) * emulator.step.astype("timedelta64[ns]")]
            axes = {"time": [last.astype("datetime64[ns]")], LEAD: np.array(lead), "number": np.arange(len(kept))}
            dataset = to_dataset(np.asarray(new)[None, None], emulator.prior.layout, axes)
            dataset["time"].attrs.update(standard_name="forecast_reference_time", long_name="time of the analysis")
            dataset[LEAD].attrs.update(standard_name="forecast_period", long_name="time since the analysis")
            append(dataset, part, None, LEAD)
    return run.folder / FORECAST


def emulator_of(config: RunConfig, facts: dict[str, object], prior: EmulatorPrior | None) -> Emulator:
    """Prior of a finished run.

    Args:
        config: configuration of the run.
        facts: facts of the run.
        prior: the emulator, if the configuration does not name one.

    Raises:
        ValueError: it is another prior than that of the run.
    """
    with in_keys():
        prior = open_prior(config.prior) if prior is None else prior
    if prior.provenance()["prior_checksum"] != facts["prior_checksum"]:
        raise ValueError(
            f"the prior is not that of the run: its checksum is {prior.provenance()['prior_checksum'][:12]}, but the "
            f"run had {str(facts['prior_checksum'])[:12]}; give the same prior."
        )
    return Emulator.of(config, prior)


def _number_of_steps(emulator: Emulator, last: np.datetime64, steps: int | None, until: str | None) -> int:
    """Number of steps of a forecast."""
    if (steps is None) == (until is None):
        raise ValueError("give either the number of steps or the time until which to forecast.")
    if until is not None:
        end = utc_times([until], "until")[0].astype("datetime64[s]")
        if end <= last or (end - last) % emulator.step != np.timedelta64(0, "s"):
            raise ValueError(
                f"until is {end}, which is no whole number of steps of {hours(emulator.step)} after the analysis at "
                f"{last}."
            )
        steps = int((end - last) // emulator.step)
    require_count(steps, "forecast", "steps")
    assert steps is not None
    if steps > MOST_STEPS:
        raise ValueError(f"forecast got steps={steps}; give {MOST_STEPS} at most.")
    return steps
