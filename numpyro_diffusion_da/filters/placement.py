"""A taper at the places of a program's values."""

from __future__ import annotations

from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc.localization import PlacedTaper, Taper


def place_taper(taper: Taper, program: StateSpaceModel) -> PlacedTaper:
    """The taper at the places of a program's values, those of the state by default from its prior's layout.

    Raises:
        ValueError: positions that do not fit the program, see `Taper.place`.
    """
    diffusion = program.diffusion()
    return taper.place(*program.shapes(), layout=None if diffusion is None else diffusion.prior.layout)
