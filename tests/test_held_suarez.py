"""The weather emulator that ships."""

import importlib.resources
import json

import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import held_suarez_truth as held_suarez


def test_what_ships():
    """Small enough for the wheel, the arrays that the card describes, and weather of the Earth's size."""
    folder = importlib.resources.files("numpyro_diffusion_da").joinpath("data")
    names = [f"held_suarez{end}" for end in (".npz", ".json", "_truth.npz")]
    assert sum(len(folder.joinpath(name).read_bytes()) for name in names) < 10e6
    json.loads(folder.joinpath("held_suarez.json").read_text(), parse_constant=pytest.fail)
    prior, states = ndda.load_prior("held_suarez"), held_suarez.truth()
    assert prior.layout.shape == states.shape[1:] == (32, 64, 9)
    assert len(states) == 61
    pressure = states[..., prior.layout.channels("surface_pressure").start]
    assert 980.0 < pressure.mean() < 1020.0
    # One step of the conditional mean is nearer to the next state than the state itself, in every channel.
    mean = np.asarray(prior.condition(jnp.asarray(states[0])).mean)
    errors = [np.sqrt(np.mean((x - states[1]) ** 2, axis=(0, 1))) for x in (mean, states[0])]
    assert np.all(errors[0] < 0.6 * errors[1])
    with pytest.raises(ValueError, match="num_sites=40, which only the Lorenz-96 emulators have"):
        ndda.load_prior("held_suarez", num_sites=40)
