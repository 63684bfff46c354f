"""Trained priors that ship with the package."""

from __future__ import annotations

import difflib
import importlib.resources
from typing import Literal, overload

from numpyro_diffusion_da.arguments import require, require_count
from numpyro_diffusion_da.priors.ring import WIDTH, RingEmulator, read_ring_emulator
from numpyro_diffusion_da.priors.ring_one_pass import RingOnePassEmulator, read_ring_one_pass
from numpyro_diffusion_da.priors.spherical.emulator import SphericalEmulator, read_spherical_emulator

SHIPPED = ("lorenz96", "lorenz96_one_pass", "held_suarez")
"""Names of the priors that `load_prior` loads."""


@overload
def load_prior(name: Literal["lorenz96"], num_sites: int | None = None) -> RingEmulator: ...


@overload
def load_prior(name: Literal["lorenz96_one_pass"], num_sites: int | None = None) -> RingOnePassEmulator: ...


@overload
def load_prior(name: Literal["held_suarez"]) -> SphericalEmulator: ...


@overload
def load_prior(name: str, num_sites: int | None = None) -> RingEmulator | RingOnePassEmulator | SphericalEmulator: ...


def load_prior(name: str, num_sites: int | None = None) -> RingEmulator | RingOnePassEmulator | SphericalEmulator:
    """Load a trained prior that ships with the package.

    Args:
        name: name of the prior. "lorenz96" is stochastic Lorenz-96 with forcing F = 8, steps of 0.1 time units and
            noise variance 0.5, without physical units; "lorenz96_one_pass" is the same system as an emulator of one
            pass, for `OnePassTransition`. "held_suarez" is the weather of a dry atmosphere every 12 hours
            on 32 x 64 points, in the units of its layout (docs/mini_weather.md).
        num_sites: number of sites of the Lorenz-96 ring, 5 or more; 40 by default. The networks were trained on 40
            sites. They are local, so that they work on rings of other sizes.

    Returns:
        A `RingEmulator` for "lorenz96", a `RingOnePassEmulator` for "lorenz96_one_pass", a `SphericalEmulator` for
        "held_suarez".

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the name is unknown, `num_sites` is too small or given for "held_suarez", or a file does not have
            the checksum that its card states.
    """
    require(name, str, "load_prior", "name", '"lorenz96"')
    if name not in SHIPPED:
        near = difflib.get_close_matches(name, SHIPPED, n=1, cutoff=0.4)
        nearest = f"; {near[0]!r} is the nearest name" if near else ""
        raise ValueError(
            f"no prior named '{name}' ships with this package; give {', '.join(map(repr, SHIPPED[:-1]))} or "
            f"{SHIPPED[-1]!r}{nearest}."
        )
    folder = importlib.resources.files("numpyro_diffusion_da").joinpath("data")
    if name != "held_suarez":
        num_sites = 40 if num_sites is None else num_sites
        require_count(num_sites, "load_prior", "num_sites", WIDTH)
        if name == "lorenz96_one_pass":
            return read_ring_one_pass(folder, name, num_sites)
        return read_ring_emulator(folder, name, num_sites)
    if num_sites is not None:
        raise ValueError(
            f"load_prior got num_sites={num_sites}, which only the Lorenz-96 emulators have; leave it out for '{name}'."
        )
    return read_spherical_emulator(folder, name)
