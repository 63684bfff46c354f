"""The conditioning network runs as seldom as it can, is counted, and does not change results where it is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.filters import conditioning as held

N, SITES = 20, 6
RAN = [0]


def counted(x):
    """The state, and a note that the conditioning network has run on it."""

    def note(x):
        RAN[0] += x.size // SITES
        return np.asarray(x)

    return jax.pure_callback(note, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="expand_dims")


def gaussian_denoiser(z, level, conditioning):
    """Denoiser of N(mean, 1): the mean of the latent is in the conditioning."""
    return (z + level**2 * conditioning) / (1.0 + level**2)


PRIOR = ndda.DenoiserPrior(
    gaussian_denoiser,
    layout=ndda.Layout((SITES,), ("site",), (("site", tuple(range(SITES))),)),
    condition=lambda x, inputs: jnp.tanh(counted(x)),
    noise_range=(0.02, 80.0),
    conditioning_passes=1,
)
SAMPLER = ndda.Sampler(schedule=ndda.KarrasSchedule(3))
Y = np.random.default_rng(0).normal(size=(1, SITES // 2)).astype(np.float32)


def model(y):
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(SITES), 1.0).to_event(1))

    def step(x, y_t):
        x = numpyro.sample("x", ndda.DiffusionTransition(PRIOR, x, sampler=SAMPLER))
        numpyro.sample("y", dist.Normal(x[::2], 0.5).to_event(1), obs=y_t)
        return x, None

    scan(step, x0, y)


TAPER = ndda.Taper(2.0, ndda.Ring(SITES), {"y": np.arange(0, SITES, 2)})
PATH = ndda.Sampler(ndda.SDEDPMSolverPP2M(), ndda.KarrasSchedule(3, rho=20.0))
FEW = ndda.MMPS(ndda.diffusion.KrylovSolve(products=1))
CASES = {
    # Filter, and conditioning passes per particle and step if they are held, and if each use computes its own. The
    # background has products at 16 particles, for `GuidedPF` also the means of all, and for the check 4 draws.
    "FA-APF": (ndda.FAAPF(model, guidance=FEW), 1, 2.8),
    "forecasts": (ndda.FAAPF(model, guidance=FEW, inflation=(ndda.smc.RTPS(0.3),)), 1, 3.8),
    "moved": (ndda.FAAPF(model, guidance=FEW, taper=TAPER, inflation=(ndda.smc.RTPS(0.3),), lag=1), 2, 3.8),
    "carried weights": (ndda.GuidedPF(model, guidance=FEW, sampler=PATH, resample_below=0.5), 1, 2.8),
    "covariance": (ndda.EnKF(model, transition_covariance=True), 1, 2),
    "check": (ndda.GrossErrorCheck(ndda.FAAPF(model, guidance=FEW), members=4), 1, 2.2),
}


def one_step(algorithm, batch_size):
    """New particles, ancestors, passes per particle, and how often the conditioning network ran per particle."""
    program = ndda.program.StateSpaceModel(model, (Y,))
    state = algorithm.initial_state(program, jax.random.key(0), N)
    inputs = jax.tree.map(lambda x: x[0], program.time_inputs())
    RAN[0] = 0
    state, info = jax.jit(algorithm.kernel(program, batch_size))(jax.random.key(1), state, inputs)
    jax.block_until_ready(state)
    return np.asarray(state.particles), np.asarray(info.ancestors), algorithm.passes(info), RAN[0] / N


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "FA-APF" else pytest.mark.slow) for n in CASES])
def test_the_conditioning_runs_once_a_particle_where_it_can_is_counted_and_gives_the_same_particles(name, monkeypatch):
    """Callbacks say how often it ran. Held or not, the same numbers go into the same operations.

    Only the compiler's fusion of the conditioning with its use may differ, so particles agree to rounding and not to
    the last bit. Where nothing is held, the compiler may find that two uses have the same particles.
    """
    algorithm, once, each = CASES[name]
    batch_size = None if name in ("FA-APF", "moved") else 7
    particles, ancestors, passes, ran = one_step(algorithm, batch_size)
    assert ran == float(passes.conditioning) == once
    monkeypatch.setattr(held, "SHARE_OF_MEMORY", 0.0)
    anew, ancestors_anew, passes_anew, ran = one_step(algorithm, batch_size)
    assert float(passes_anew.conditioning) == pytest.approx(each)
    assert once <= ran <= each + 1e-6
    assert passes._replace(conditioning=0) == passes_anew._replace(conditioning=0)
    np.testing.assert_allclose(particles, anew, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(ancestors, ancestors_anew)
