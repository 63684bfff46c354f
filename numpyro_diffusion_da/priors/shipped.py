"""The trained priors that come with the package."""

from __future__ import annotations

import importlib.resources
from typing import Literal, overload

import numpy as np
from jaxtyping import Float

from numpyro_diffusion_da.priors.emulator import RingEmulator, read_emulator
from numpyro_diffusion_da.priors.spherical_emulator import SphericalEmulator, read_spherical_emulator

SHIPPED = ("lorenz96", "held_suarez")
"""What `load_prior` knows."""


@overload
def load_prior(name: Literal["lorenz96"], num_sites: int | None = None) -> RingEmulator: ...


@overload
def load_prior(name: Literal["held_suarez"], num_sites: None = None) -> SphericalEmulator: ...


@overload
def load_prior(name: str, num_sites: int | None = None) -> RingEmulator | SphericalEmulator: ...


def load_prior(name: str, num_sites: int | None = None) -> RingEmulator | SphericalEmulator:
    """A trained prior that comes with this package.

    Args:
        name: "lorenz96": stochastic Lorenz-96, F = 8, steps of 0.1, noise variance 0.5 (`priors.lorenz96`).
            "held_suarez": the dry atmosphere of Held & Suarez (1994) at T21, steps of 12 hours.
        num_sites: sites of the Lorenz-96 ring, 40 by default. Trained on 40; the networks are local, so other rings
            work.

    Raises:
        ValueError: an unknown name, too few sites, sites of a prior that has none, or a file that is not the one its
            card describes.
    """
    folder = importlib.resources.files("numpyro_diffusion_da").joinpath("data")
    if name == "lorenz96":
        return read_emulator(folder, name, 40 if num_sites is None else num_sites)
    if name != "held_suarez":
        raise ValueError(f"no prior named '{name}' ships with this package; there is {', '.join(map(repr, SHIPPED))}.")
    if num_sites is not None:
        raise ValueError(f"load_prior got num_sites={num_sites}, which only 'lorenz96' has; leave it out.")
    return read_spherical_emulator(folder, name)


def load_truth(name: str) -> Float[np.ndarray, "time latitude longitude channel"]:
    """Successive states of a run of the true system that the emulator has not seen, in the layout of `load_prior`.

    Args:
        name: "held_suarez": 12 hours apart. (The true system of "lorenz96" is a function, `priors.lorenz96`.)

    Raises:
        ValueError: no states of that name ship.
    """
    if name != "held_suarez":
        raise ValueError(f"no true states of '{name}' ship with this package; there are those of 'held_suarez'.")
    file = importlib.resources.files("numpyro_diffusion_da").joinpath("data", f"{name}_truth.npz")
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
        return stored["packed"] * stored["scale"] + stored["offset"]


def pack(values: Float[np.ndarray, "*shape channel"]) -> dict[str, np.ndarray]:
    """16-bit integers with an offset and a scale for each channel, as `load_truth` reads them."""
    axes = tuple(range(values.ndim - 1))
    low, high = values.min(axis=axes), values.max(axis=axes)
    offset, scale = (0.5 * (low + high)).astype(np.float32), ((high - low) / 65000.0).astype(np.float32)
    return {"packed": np.rint((values - offset) / scale).astype(np.int16), "offset": offset, "scale": scale}
