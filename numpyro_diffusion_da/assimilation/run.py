"""Run of a configuration: filter into a store that goes on after a kill, and write the outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from numpyro_diffusion_da.assimilation.config import KEYS, LOCAL, RunConfig, in_keys
from numpyro_diffusion_da.assimilation.files import (
    ANALYSIS,
    CONFIGURATION,
    FACTS,
    FEEDBACK,
    STORE,
    check_files,
    replace_text,
)
from numpyro_diffusion_da.assimilation.outputs import write_outputs
from numpyro_diffusion_da.assimilation.prepared import PreparedRun, prepare
from numpyro_diffusion_da.assimilation.program import WORDS
from numpyro_diffusion_da.diffusion.prior import EmulatorPrior
from numpyro_diffusion_da.inference.identity import versions
from numpyro_diffusion_da.observation.tables.table import ObservationTable


@dataclasses.dataclass(frozen=True)
class Run:
    """Folder of a finished run.

    Attributes:
        folder: the folder; docs/assimilate.md lists its files.
    """

    folder: pathlib.Path

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the run, `run.json`."""
        return dict(json.loads((self.folder / FACTS).read_text()))

    @property
    def config(self) -> RunConfig:
        """Configuration of the run, `run.toml`."""
        return RunConfig.read(self.folder / CONFIGURATION)

    def analysis(self, group: str = "members") -> Any:
        """Analyses as an `xarray.Dataset` whose values are read when they are used.

        Args:
            group: "members", "mean" or "spread".

        Raises:
            ValueError: they are missing or damaged.
        """
        import xarray

        check_files(self.folder, (ANALYSIS,))
        return xarray.open_zarr(self.folder / ANALYSIS, group=group, chunks=None)

    def feedback(self) -> Any:
        """Rows of the tables with what became of them, a `pandas.DataFrame`."""
        import pandas

        return pandas.read_parquet(self.folder / FEEDBACK)

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> Run:
        """Open the folder of a finished run.

        Args:
            folder: the folder.

        Raises:
            ValueError: it holds no run, one that has not finished, or one with a damaged file. The message names it.
        """
        path = pathlib.Path(folder)
        if not (path / CONFIGURATION).is_file():
            raise ValueError(f"'{path}' holds no run; give the folder of `ndda assimilate`.")
        if not (path / FACTS).is_file():
            raise ValueError(f"the run in '{path}' has not finished; run ndda assimilate {path / CONFIGURATION} again.")
        RunConfig.read(path / CONFIGURATION)
        check_files(path)
        return Run(path)


def assimilate(
    config: RunConfig,
    *,
    prior: EmulatorPrior | None = None,
    table: ObservationTable | None = None,
    progress_bar: bool = True,
) -> Run:
    """Assimilate tables of observations as a configuration says, and write the outputs into its folder.

    A run that was interrupted goes on if it is started again. A run that has finished is not made again.

    Args:
        config: the configuration.
        prior: the emulator, if the configuration does not name one.
        table: the observations in place of the files of the configuration.
        progress_bar: whether to show a progress bar over the steps.

    Returns:
        The folder with its outputs.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something in the configuration or in a file is not what is needed, or the folder holds another run.
            The message names it.
        FloatingPointError: all weights or all particles of a step are non-finite; the message names the step.
    """
    run = prepare(config, prior=prior, table=table)
    return Run(run.folder) if is_finished(run) else run_prepared(run, progress_bar)


def run_prepared(run: PreparedRun, progress_bar: bool = True) -> Run:
    """Filter a prepared run, from where an interrupted one ended, and write its outputs.

    Args:
        run: the prepared run, from `prepare`.
        progress_bar: whether to show a progress bar over the steps.

    Raises:
        ValueError: the folder holds another run.
        FloatingPointError: all weights or all particles of a step are non-finite; the message names the step.
    """
    claim_folder(run)
    started = time.perf_counter()
    with _in_words(run):
        run.filter(progress_bar).run(jax.random.key(run.config.output.seed), run.inputs)
    filtered = time.perf_counter()
    facts = write_outputs(run, run.folder / STORE)
    facts["seconds"] = {"filter": filtered - started, "outputs": time.perf_counter() - filtered}
    replace_text(run.folder / FACTS, json.dumps({**identity(run), **facts}, indent=1) + "\n")
    return Run(run.folder)


NOT_LOCAL = {"inflation": "filter.error_factor", "taper": 'filter.method = "fa_apf"'}
"""Keys in place of those that filters without a taper do not take."""


@contextlib.contextmanager
def _in_words(run: PreparedRun) -> Iterator[None]:
    """Name keys, rows and times in the messages of a filter, not arguments, sites and steps."""
    keys = KEYS if run.config.filter.method in LOCAL else {**KEYS, **NOT_LOCAL}
    with in_keys(keys, observation=run.row_of, step=lambda step: str(run.times[step])):
        try:
            yield
        except (ValueError, FloatingPointError) as error:
            # Errors of a filter come from all of its parts, which know the program's sites only.
            said = str(error)
            for site, words in WORDS.items():
                said = said.replace(f"site '{site}'", words)
            if said != str(error):
                error.args = (said,)
            raise


def identity(run: PreparedRun) -> dict[str, Any]:
    """Facts that are known before a run, as JSON can hold them.

    Args:
        run: the prepared run.
    """
    settings = run.config.filter
    return {
        "times": [str(time) for time in run.times],
        "step_hours": float(run.emulator.step / np.timedelta64(1, "h")),
        "prior": run.config.prior.name or type(run.emulator.prior).__name__,
        "prior_checksum": run.checksum,
        "particles": settings.particles,
        "members": run.config.output.members or settings.particles,
        "seed": run.config.output.seed,
        "tables": {str(file): _checksum(file) for file in run.config.observations.files if file.is_file()},
        "notes": list(run.placed.notes),
        "versions": versions(),
    }


def _checksum(file: pathlib.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def is_finished(run: PreparedRun) -> bool:
    """Whether the folder of a run holds its outputs already.

    Args:
        run: the prepared run.

    Raises:
        ValueError: the folder holds another run, or a file of it is damaged.
    """
    check_same(run)
    facts = run.folder / FACTS
    if not facts.is_file():
        return False
    check_files(run.folder)
    before, now = json.loads(facts.read_text()), identity(run)
    for name in ("prior_checksum", "tables"):
        if before.get(name) != now[name]:
            what = "the prior" if name == "prior_checksum" else "a table of observations"
            raise ValueError(f"'{run.folder}' holds a run, and {what} has changed since; give another output.folder.")
    return True


def check_same(run: PreparedRun) -> None:
    """Check that the folder of a run is empty, or holds the same run.

    Args:
        run: the prepared run.

    Raises:
        ValueError: the folder is a file, holds something else, or a run with another configuration. The message names
            the first key that differs.
    """
    folder, known = run.folder, run.folder / CONFIGURATION
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"output.folder '{folder}' is no folder; give another one.")
    if not known.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"output.folder '{folder}' holds something that is no run; give another one, or empty it.")
        return
    before, now = RunConfig.read(known).values(), run.config.values()
    for table in now:
        for key in sorted({*before[table], *now[table]}):
            if (table, key) == ("output", "folder"):
                continue
            was, is_now = before[table].get(key), now[table].get(key)
            if was != is_now:
                raise ValueError(
                    f"output.folder '{folder}' holds a run with {table}.{key} = {was!r}, but now it is {is_now!r}; "
                    "give another folder, or empty this one."
                )


def claim_folder(run: PreparedRun) -> None:
    """Make the folder of a run and write its configuration into it, if it is not there.

    `run_prepared` does so itself.

    Args:
        run: the prepared run.

    Raises:
        ValueError: the folder holds another run, or cannot be written to.
    """
    check_same(run)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        if not (run.folder / CONFIGURATION).is_file():
            replace_text(run.folder / CONFIGURATION, HEADER + run.config.to_toml())
    except OSError as error:
        raise ValueError(f"output.folder '{run.folder}' cannot be written to ({error.strerror}).") from None


HEADER = "# Written by `ndda assimilate`: the configuration of this run, with all defaults.\n"
