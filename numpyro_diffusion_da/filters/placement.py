"""A taper at the places of a program's values."""

from __future__ import annotations

import numpy as np

from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc.localization import PlacedTaper, Taper


def place_taper(taper: Taper, program: StateSpaceModel) -> PlacedTaper:
    """Place a taper on a program; positions of the state are by default those of its prior's layout.

    Raises:
        ValueError: positions that do not fit the program, see `Taper.place`, or positions of the state that neither
            the taper nor the layout has.
    """
    diffusion = program.structure.diffusion
    axes = None if taper.state is not None else grid_axes(None if diffusion is None else diffusion.prior.layout)
    return taper.place(program.structure.state_shape, program.structure.observed, axes)


def grid_axes(layout: Layout | None) -> dict[str, np.ndarray]:
    """Coordinates of the leading dimensions of a layout, up to the first that has no numbers.

    Raises:
        ValueError: no layout, or one without such coordinates.
    """
    if layout is None:
        raise ValueError(
            "Taper has no positions of the state, and the transition has no prior whose layout has them; "
            "give Taper(state=...), one position for each value."
        )
    axes: dict[str, np.ndarray] = {}
    coordinates = layout.coords()
    for dim in layout.dims[: len(layout.dims) - bool(layout.variables)]:
        if dim not in coordinates or coordinates[dim].dtype.kind not in "iuf":
            break
        axes[dim] = coordinates[dim]
    if not axes:
        raise ValueError(
            f"Taper has no positions of the state, and its layout has no coordinates of '{layout.dims[0]}'; "
            "give Taper(state=...), one position for each value."
        )
    return axes
