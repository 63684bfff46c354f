"""Placement of a taper: positions for the values of a program's state and observations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.program.structure import Structure
from numpyro_diffusion_da.smc.localization import PlacedTaper, Taper


def place_taper(taper: Taper, program: StateSpaceModel, inputs: TimeInputs | None = None) -> PlacedTaper:
    """Place a taper on the state and the observations of a program.

    The positions of the state come from the taper, else from the layout of the program's prior.

    Args:
        taper: taper of a filter.
        program: state-space model of the program.
        inputs: inputs of the time, for places that move; None puts these places at 0, to check everything else.

    Raises:
        ValueError: positions do not fit the program (see `Taper.place`), neither the taper nor the layout has positions
            of the state, or a named site cannot hold positions (see `check_sources`).
    """
    places: dict[str, Any] = {}
    if taper.moving:
        check_sources(taper, program.structure)
        known = program.structure.deterministic
        empty = {source: np.zeros(known[source].shape or ()) for source in taper.moving.values()}
        places = empty if inputs is None else program.metadata(inputs)
    emulator = program.structure.emulator
    axes = None if taper.state is not None else grid_axes(None if emulator is None else emulator.layout)
    for name, site in program.structure.observed.items():
        if site.shape[-1:] == (0,):
            raise ValueError(
                f"site '{name}' is a numpyro.factor, which has no place that a taper could use; leave the taper out of "
                "the filter, or write the factor as an observation."
            )
    observed = {name: (site.shape, site.values_per_error) for name, site in program.structure.observed.items()}
    return taper.place(program.structure.state_shape, observed, axes, places)


def check_sources(taper: Taper, structure: Structure) -> None:
    """Check that the deterministic sites which hold a taper's moving positions exist and hold positions.

    Args:
        taper: taper of a filter.
        structure: structure of the program.

    Raises:
        ValueError: a site does not exist, is no array of real numbers, or depends on the state, the carry or random
            draws. The message names the site.
    """
    for name, source in taper.moving.items():
        site = structure.deterministic.get(source)
        if site is None:
            raise ValueError(
                f"Taper takes the places of '{name}' from the deterministic site '{source}', but the body of the scan "
                f"of '{structure.name}' has {_listed(structure.deterministic)}; write "
                f"numpyro.deterministic('{source}', ...) in it, or give an array of positions."
            )
        if site.depends_on:
            raise ValueError(
                f"Taper takes the places of '{name}' from the deterministic site '{source}', which depends on "
                f"{' and '.join(site.depends_on)}; compute places from the inputs of the scan and arguments of the "
                "program only."
            )
        if site.shape is None or np.dtype(site.dtype).kind not in "fiu":
            raise ValueError(
                f"Taper takes the places of '{name}' from the deterministic site '{source}', which holds "
                f"{f'values of type {site.dtype}' if site.dtype else 'no array'}; give one array of real positions."
            )


def _listed(sites: Iterable[str]) -> str:
    """Text that lists the deterministic sites of a program."""
    names = ", ".join(f"'{name}'" for name in sites)
    return f"the deterministic sites {names}" if names else "no deterministic sites"


def grid_axes(layout: Layout | None) -> dict[str, np.ndarray]:
    """Numeric coordinates of the leading dimensions of a layout, by name, up to the first dimension without them.

    Args:
        layout: layout of the state; None if the transition has none.

    Raises:
        ValueError: there is no layout, or its first dimension has no numeric coordinates.
    """
    if layout is None:
        raise ValueError(
            "Taper has no positions of the state, and the transition has no prior with a layout that has them; "
            "give Taper(..., state=...), one position for each value."
        )
    axes: dict[str, np.ndarray] = {}
    coordinates = layout.coords()
    for dim in layout.dims[: len(layout.dims) - bool(layout.variables)]:
        if dim not in coordinates or coordinates[dim].dtype.kind not in "iuf":
            break
        axes[dim] = coordinates[dim]
    if not axes:
        raise ValueError(
            f"Taper has no positions of the state, and the layout has no numeric coordinates of '{layout.dims[0]}'; "
            "give Taper(..., state=...), one position for each value."
        )
    return axes


def carried_along(structure: Structure, localized: bool) -> tuple[int, ...]:
    """Indices of the arrays of the carry that an ensemble update moves along with the state.

    Args:
        structure: structure of the program.
        localized: whether the update has a taper.

    Raises:
        ValueError: there is a taper, and such an array has no places of the state.
    """
    along = [i for i, leaf in enumerate(structure.carry) if leaf.moves_with_the_state]
    if localized:
        for i in along:
            check_places_of(structure, i, "the update")
    return tuple(along)


def moved_ancestors(structure: Structure, localized: bool) -> tuple[int, ...]:
    """Indices of the arrays of the carry that a move of the ancestors moves: all real ones that particles do not share.

    Args:
        structure: structure of the program.
        localized: whether the move has a taper.

    Raises:
        ValueError: there is a taper, and such an array has no places of the state.
    """
    moved = [i for i, leaf in enumerate(structure.carry) if leaf.is_real and not leaf.is_shared]
    if localized:
        for i in moved:
            check_places_of(structure, i, "a move of the ancestors")
    return tuple(moved)


def shared_arrays(structure: Structure) -> tuple[int, ...]:
    """Indices of the arrays of the carry that localized resampling leaves as they are: clocks, counters and keys.

    Args:
        structure: structure of the program.

    Raises:
        ValueError: an array of real numbers that differs between particles has no places of the state.
    """
    stay = []
    for i, leaf in enumerate(structure.carry):
        if leaf.is_shared or (not leaf.is_real and not leaf.has_places):
            stay.append(i)
        else:
            check_places_of(structure, i, "localized resampling")
    return tuple(stay)


def check_places_of(structure: Structure, index: int, what: str) -> None:
    """Check that an array of the carry has the places of the state.

    Raises:
        ValueError: it has none. The message names the array.
    """
    leaf = structure.carry[index]
    if not leaf.has_places:
        raise ValueError(
            f"with a taper, {what} has to move carry{leaf.name} of '{structure.name}' place by place, but it has no "
            f"places of the state, whose shape is {structure.state_shape}; leave it out of the carry, or leave the "
            "taper out of the filter."
        )
