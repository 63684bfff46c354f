"""Placement of a taper: positions for the values of a program's state and observations."""

from __future__ import annotations

import numpy as np

from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc.localization import PlacedTaper, Taper


def place_taper(taper: Taper, program: StateSpaceModel) -> PlacedTaper:
    """Place a taper on the state and the observations of a program.

    The positions of the state come from the taper, else from the layout of the program's prior.

    Args:
        taper: taper of a filter.
        program: state-space model of the program.

    Raises:
        ValueError: positions do not fit the program (see `Taper.place`), or neither the taper nor the layout has
            positions of the state.
    """
    diffusion = program.structure.diffusion
    axes = None if taper.state is not None else grid_axes(None if diffusion is None else diffusion.prior.layout)
    return taper.place(program.structure.state_shape, program.structure.observed, axes)


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
