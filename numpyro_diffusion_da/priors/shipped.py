"""The trained priors that come with the package."""

from __future__ import annotations

import importlib.resources
from typing import Literal, overload

from numpyro_diffusion_da.priors.ring import RingEmulator, read_ring_emulator
from numpyro_diffusion_da.priors.spherical.emulator import SphericalEmulator, read_spherical_emulator

SHIPPED = ("lorenz96", "held_suarez")
"""What `load_prior` knows."""


@overload
def load_prior(name: Literal["lorenz96"], num_sites: int | None = None) -> RingEmulator: ...


@overload
def load_prior(name: Literal["held_suarez"]) -> SphericalEmulator: ...


@overload
def load_prior(name: str, num_sites: int | None = None) -> RingEmulator | SphericalEmulator: ...


def load_prior(name: str, num_sites: int | None = None) -> RingEmulator | SphericalEmulator:
    """A trained prior that comes with this package.

    Args:
        name: "lorenz96": stochastic Lorenz-96, F = 8, steps of 0.1, noise variance 0.5 (`priors.lorenz96`);
            "held_suarez": weather of a dry atmosphere every 12 hours, on 32 x 64 points (docs/mini_weather.md).
        num_sites: sites of the Lorenz-96 ring, 40 by default. Trained on 40; the networks are local, so other rings
            work.

    Raises:
        ValueError: an unknown name, too few sites, sites of a prior that has none, or a file that is not the one its
            card describes.
    """
    if name not in SHIPPED:
        raise ValueError(f"no prior named '{name}' ships with this package; there is {', '.join(map(repr, SHIPPED))}.")
    folder = importlib.resources.files("numpyro_diffusion_da").joinpath("data")
    if name == "lorenz96":
        return read_ring_emulator(folder, name, 40 if num_sites is None else num_sites)
    if num_sites is not None:
        raise ValueError(f"load_prior got num_sites={num_sites}, which only 'lorenz96' has; leave it out.")
    return read_spherical_emulator(folder, name)
