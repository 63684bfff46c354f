"""NumPyro program and filter of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from numpyro_diffusion_da.assimilation.config import LOCAL, FilterSettings, QualitySettings
from numpyro_diffusion_da.assimilation.emulator import Emulator
from numpyro_diffusion_da.diffusion.guidance import MMPS
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.filters.bootstrap import Bootstrap
from numpyro_diffusion_da.filters.enkf import EnKF
from numpyro_diffusion_da.filters.fa_apf import FAAPF
from numpyro_diffusion_da.filters.gross_error_check import GrossErrorCheck
from numpyro_diffusion_da.filters.guided_pf import GuidedPF
from numpyro_diffusion_da.observation.tables.operator import ObservationOperator
from numpyro_diffusion_da.program.huber import Huber
from numpyro_diffusion_da.smc.distances import GreatCircle
from numpyro_diffusion_da.smc.inflation import RTPS
from numpyro_diffusion_da.smc.localization import Taper

STATE, OBSERVATION, PLACE, PREVIOUS = "x", "y", "y_place", "previous"
"""Names of sites of the program: the state, its observations, their places, and the state before."""

GROUPS, GROUPS_PLACE = "y_groups", "y_groups_place"
"""Names of sites of the program: observations with correlated errors, and the places of their groups."""

WORDS = {
    "x0": "the first guess",
    STATE: "the state",
    PREVIOUS: "the state before",
    OBSERVATION: "the table",
    GROUPS: "the table's groups",
    PLACE: "the places of the table",
    GROUPS_PLACE: "the places of the table's groups",
}
"""Words for the sites of the program, for messages: a user of a configuration has not written them."""

RELAXATION = 0.5
"""Relaxation of the EnKF's spread to its prior for the shipped weather (docs/mini_weather.md)."""


def assimilation_program(
    emulator: Emulator, operator: ObservationOperator, first_guess: dist.Distribution, settings: FilterSettings
) -> Callable[[Any], None]:
    """Make the state-space model of a run, a NumPyro program of one argument.

    Args:
        emulator: the prior of the run.
        operator: observation operator of the placed table.
        first_guess: distribution of the states before the first step, from `first_guess`.
        settings: table `[filter]` of a configuration.

    Returns:
        Program of `xs`, the arrays of a placed table (`PlacedObservations.xs`) and, for a prior with forcings, these as
        `forcings`. Its sites are the state "x", its observations "y" and, with a taper, their places "y_place". If rows
        have correlated errors, "y_groups" and "y_groups_place" are those of the groups.
    """
    has_places = settings.method in LOCAL and settings.taper_km is not False

    def observe(x: Any, at: dict[str, Any]) -> None:
        if has_places:
            numpyro.deterministic(PLACE, at["place"])
        seen = operator(x, at)
        if settings.likelihood == "huber":
            errors: dist.Distribution = Huber(seen, at["error"], settings.huber_threshold)
        else:
            errors = dist.Normal(seen, at["error"])
        numpyro.sample(OBSERVATION, errors.to_event(1), obs=at["y"])
        if "groups" in at:
            groups = at["groups"]
            if has_places:
                numpyro.deterministic(GROUPS_PLACE, groups["place"])
            of_groups = dist.MultivariateNormal(seen[groups["rows"]], covariance_matrix=groups["covariance"])
            numpyro.sample(GROUPS, of_groups.to_event(1), obs=groups["y"])

    def weather(xs: Any) -> None:
        x0 = numpyro.sample("x0", first_guess)

        def step(x: Any, at: dict[str, Any]) -> tuple[Any, None]:
            x = numpyro.sample(STATE, emulator.transition(x, None))
            observe(x, at)
            return x, None

        def step_of_pairs(pair: Any, at: dict[str, Any]) -> tuple[Any, None]:
            x = numpyro.sample(STATE, emulator.transition(pair, at["forcings"]))
            numpyro.deterministic(PREVIOUS, pair[1])
            observe(x, at)
            return (pair[1], x), None

        if emulator.frames == 1:
            scan(step, x0, xs)
        else:
            scan(step_of_pairs, (x0[0], x0[1]), xs)

    return weather


def filter_of(
    program: Callable[[Any], None],
    emulator: Emulator,
    settings: FilterSettings,
    quality: QualitySettings,
    grouped: bool = False,
) -> FilterAlgorithm:
    """Make the filter of a program.

    Args:
        program: the program, from `assimilation_program`.
        emulator: the prior of the run.
        settings: table `[filter]` of a configuration.
        quality: table `[quality]`, for the background check.
        grouped: whether the program has a site of groups with correlated errors.
    """
    taper = None
    if settings.method in LOCAL and settings.taper_km is not False:
        places = {OBSERVATION: PLACE, **({GROUPS: GROUPS_PLACE} if grouped else {})}
        taper = Taper(settings.taper_km, GreatCircle(), places)
    relaxation = settings.inflation
    if relaxation is None:
        relaxation = RELAXATION if settings.method == "enkf" else 0.0
    inflation = (RTPS(relaxation),) if relaxation else ()
    guided: dict[str, Any] = {}
    if isinstance(emulator.prior, DiffusionPrior) and settings.guidance != "accurate":
        guided["guidance"] = MMPS.cheap()
    found: FilterAlgorithm
    if settings.method == "fa_apf":
        found = FAAPF(program, taper=taper, inflation=inflation, **guided)
    elif settings.method == "enkf":
        found = EnKF(program, taper=taper, inflation=inflation)
    elif settings.method == "guided_pf":
        found = GuidedPF(program, **guided)
    else:
        found = Bootstrap(program)
    if quality.background_check is False:
        return found
    return GrossErrorCheck(found, threshold=quality.background_check)
