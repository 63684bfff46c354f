"""Everything that a run needs, read and checked before anything is computed."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import numpyro.distributions as dist

from numpyro_diffusion_da.arguments import require
from numpyro_diffusion_da.assimilation.config import LOCAL, NEEDED_BY, RunConfig, in_keys
from numpyro_diffusion_da.assimilation.cost import cost_of
from numpyro_diffusion_da.assimilation.emulator import Emulator, open_prior
from numpyro_diffusion_da.assimilation.files import STORE
from numpyro_diffusion_da.assimilation.guesses import first_guess
from numpyro_diffusion_da.assimilation.placing import place_observations
from numpyro_diffusion_da.assimilation.program import GROUPS, PREVIOUS, STATE, assimilation_program, filter_of
from numpyro_diffusion_da.diffusion.prior import EmulatorPrior
from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.inference.filter import Filter
from numpyro_diffusion_da.inference.keeping import Kept
from numpyro_diffusion_da.observation.tables.groups import extent, grouped
from numpyro_diffusion_da.observation.tables.placed import PlacedObservations
from numpyro_diffusion_da.observation.tables.table import ObservationTable, where


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedRun:
    """Everything that a run needs, read and checked, before anything is computed. `prepare` makes it.

    Attributes:
        config: the configuration.
        emulator: the prior, with its step and its sampler.
        times: times of the analyses, datetime64[s].
        placed: the observations on the grid and the times.
        first_guess: distribution of the states one step before the first analysis.
        inputs: arrays for the scan: those of the observations, and forcings.
        algorithm: the filter.
        checksum: SHA-256 of the prior as it was opened.
    """

    config: RunConfig
    emulator: Emulator
    times: np.ndarray
    placed: PlacedObservations
    first_guess: dist.Distribution
    inputs: dict[str, Any]
    algorithm: FilterAlgorithm
    checksum: str

    @property
    def folder(self) -> pathlib.Path:
        """Folder of the run."""
        return self.config.output.folder

    def row_of(self, site: str, step: int, index: tuple[int, ...]) -> str:
        """Words for the row that an observed value is from.

        Args:
            site: name of the site of the program.
            step: number of the step.
            index: index of the value in the site's value.
        """
        position = self.placed.xs["groups"]["rows"][(step, *index)] if site == GROUPS else index[0]
        return self.placed.where(step, int(position))

    def report(self) -> str:
        """Text with the number of rows by flag, and with what the run will cost."""
        return "\n".join([self.placed.report(), *self._groups(), "", *cost_of(self)])

    def _groups(self) -> list[str]:
        """Sentence about the rows with correlated errors."""
        correlation = self.config.observations.correlation
        if not correlation:
            return []
        rows = self.placed.rows[grouped(self.placed.rows)]
        groups = [part for _, part in rows.groupby(["cycle", "group"])] if len(rows) else []
        found = [f"{len(rows)} rows in {len(groups)} groups have errors with the correlation {correlation:g}."]
        radius = self.config.filter.taper_km
        if self.config.filter.method not in LOCAL or radius is False:
            return found
        widths = [extent(part) for part in groups]
        if wide := [i for i, width in enumerate(widths) if width > radius]:
            first = groups[wide[0]]
            name, row = first["group"].iloc[0], where(first, first.index[0])
            found.append(
                f"{row}: rows of the group '{name}' are up to {widths[wide[0]]:.0f} km from its middle ({len(wide)} "
                f"groups are so wide), but the filter takes all of a group to be there, and filter.taper_km is "
                f"{radius:g}; give smaller groups."
            )
        return found

    def filter(self, progress_bar: bool = True) -> Filter:
        """Filter that writes into the store of the run.

        Args:
            progress_bar: whether to show a progress bar over the steps.
        """
        settings = self.config.filter
        keep = {STATE: Kept()}
        if self.emulator.frames > 1:
            keep[PREVIOUS] = Kept(every=1 if self.config.output.background else len(self.times))
        return Filter(
            self.algorithm,
            num_particles=settings.particles,
            batch_size=settings.batch_size,
            progress_bar=progress_bar,
            keep=keep,
            keep_observed=False,
            directory=self.folder / STORE,
            time=self.times.astype("datetime64[ns]"),
        )


def prepare(
    config: RunConfig, *, prior: EmulatorPrior | None = None, table: ObservationTable | None = None
) -> PreparedRun:
    """Read and check everything that a run needs; nothing is computed or written.

    Args:
        config: the configuration.
        prior: the emulator, if the configuration does not name one.
        table: the observations in place of the files of the configuration.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something in the configuration or in a file is not what is needed. The message names it.
    """
    require(config, RunConfig, "prepare", "config", 'RunConfig.read("run.toml")')
    with in_keys():
        return _prepared(config, prior, table)


def _prepared(config: RunConfig, prior: EmulatorPrior | None, table: ObservationTable | None) -> PreparedRun:
    """Everything that a run needs."""
    if config.output.members is not None and config.output.members > config.filter.particles:
        raise ValueError(
            f"output.members is {config.output.members}, but the filter has {config.filter.particles} particles; give "
            "as many or fewer."
        )
    if prior is None:
        prior = open_prior(config.prior)
    else:
        require(prior, EmulatorPrior, "prepare", "prior", 'ndda.load_prior("held_suarez")')
        if named := [key for key in ("name", *NEEDED_BY) if getattr(config.prior, key) is not None]:
            raise ValueError(f"prepare got a prior, and prior.{named[0]} names one too; leave one of them out.")
    if config.observations.correlation and config.filter.likelihood != "normal":
        raise ValueError(
            f"observations.correlation is {config.observations.correlation}, but filter.likelihood = "
            f"{config.filter.likelihood!r} has independent errors; leave one of them out."
        )
    checksum = prior.provenance()["prior_checksum"]
    emulator = Emulator.of(config, prior)
    times = emulator.times(config)
    placed = place_observations(config, emulator, times, table)
    guess = first_guess(config.first_guess, emulator, times[0])
    inputs = dict(placed.xs)
    if emulator.frames > 1:
        inputs["forcings"] = emulator.forcings(times)
    program = assimilation_program(emulator, placed.operator, guess, config.filter)
    algorithm = filter_of(program, emulator, config.filter, config.quality, "groups" in placed.xs)
    return PreparedRun(config, emulator, times, placed, guess, inputs, algorithm, checksum)
