"""The emulator on the sphere: its symmetries and its denoiser on random weights."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_diffusion_da.diffusion import Sampler, WhiteNoise
from numpyro_diffusion_da.fields import Variable
from numpyro_diffusion_da.priors import (
    GaussianDenoiser,
    HarmonicNoise,
    SphericalEmulator,
    SphericalHarmonics,
    SphericalMeanNetwork,
    SphericalResidualNetwork,
    ZonalOperator,
    read_spherical_emulator,
    save_spherical_emulator,
    spherical_layout,
)
from numpyro_diffusion_da.transition import DiffusionDynamics

pytestmark = pytest.mark.slow

H = SphericalHarmonics(6, 8, num_scalars=2, num_winds=1)
SIZE = 6 * 4
VARIABLES = (
    Variable("surface_pressure", "hPa"),
    Variable("temperature", "K", (500,)),
    Variable("u_component_of_wind", "m s-1", (500,)),
    Variable("v_component_of_wind", "m s-1", (500,)),
)


def randomised(tree, key, scale):
    """Random numbers of half precision's resolution added to every array."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noisy = [x + scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, [x.astype(jnp.float16).astype(jnp.float32) for x in noisy])


def gaussian(key, rank):
    """Orthonormal vectors among the functions that exist, real for m = 0, and their variances."""
    generator = np.random.default_rng(int(jax.random.randint(key, (), 0, 1000)))
    vectors, values = np.zeros((6, rank, SIZE), complex), np.zeros((6, rank))
    for m in range(6):
        exists = np.flatnonzero(H.mask[0, m].reshape(-1))
        kept = min(rank, len(exists))
        matrix = generator.standard_normal((len(exists), kept)) + 1j * (m > 0) * generator.standard_normal(
            (len(exists), kept)
        )
        vectors[m, :kept, exists] = np.linalg.qr(matrix)[0].conj()
        values[m, :kept] = generator.gamma(1.0, size=kept)
    operator = ZonalOperator(jnp.asarray(vectors.real, jnp.float32), jnp.asarray(vectors.imag, jnp.float32))
    return GaussianDenoiser(operator, jnp.asarray(values, jnp.float32))


def small_emulator():
    """Random weights on a grid of 8 x 16 points."""
    keys = jax.random.split(jax.random.key(0), 6)
    propagator = ZonalOperator(0.1 * jax.random.normal(keys[0], (6, SIZE, SIZE)), jnp.zeros((6, SIZE, SIZE)))
    return SphericalEmulator(
        mean_network=randomised(SphericalMeanNetwork.init(keys[1], H, propagator, 2, 5), keys[2], 0.05),
        gaussian=gaussian(keys[3], 10),
        residual_network=randomised(SphericalResidualNetwork.init(keys[4], H, 5), keys[5], 0.1),
        state_mean=jnp.stack([jnp.full(8, 1000.0), jnp.full(8, 250.0), jnp.full(8, 10.0), jnp.zeros(8)], axis=1),
        state_scale=jnp.array([5.0, 3.0, 4.0, 4.0]),
        latent_scale=jnp.array([0.5, 0.3, 0.4, 0.4]),
        climate=gaussian(keys[3], 12),
        noise=HarmonicNoise(H),
        layout=spherical_layout(H, VARIABLES),
        noise_range=(0.02, 80.0),
    )


@pytest.fixture(scope="module")
def emulator():
    return small_emulator()


@pytest.fixture(scope="module")
def state(emulator):
    return emulator.climatology().sample(jax.random.key(1))


def test_turned_state_has_a_turned_forecast(emulator, state):
    z_s = 2.0 * emulator.noise.sample(jax.random.key(2), emulator.layout.shape, jnp.float32)

    @jax.jit
    def run(state, z_s):
        conditioning = emulator.condition(state)
        return emulator.location(conditioning), emulator.denoise(z_s, jnp.asarray(1.5), conditioning)

    for here, there in zip(run(state, z_s), run(jnp.roll(state, 5, 1), jnp.roll(z_s, 5, 1)), strict=True):
        np.testing.assert_allclose(jnp.roll(here, 5, 1), there, atol=2e-3)


@pytest.mark.parametrize("level", [0.1, 3.0])
def test_jacobian_is_a_covariance(emulator, state, level):
    """J C must be symmetric, so that s^2 J C is Cov[z | z_s]."""
    terms = eqx.filter_jit(emulator.condition)(state).terms
    z_s = (1.0 + level) * jax.random.normal(jax.random.key(3), H.coefficients_shape) * jnp.asarray(H.mask, jnp.float32)
    denoise = lambda z: emulator.denoise_coefficients(z, jnp.asarray(level), terms)  # noqa: E731
    a, b = jax.random.normal(jax.random.key(4), (2, *z_s.shape)) * jnp.asarray(H.mask, jnp.float32)[None]
    product = jax.jit(lambda v: jax.jvp(denoise, (z_s,), (v,))[1])
    np.testing.assert_allclose(jnp.sum(a * product(b)), jnp.sum(b * product(a)), rtol=1e-3, atol=1e-3)


def test_gaussian_denoiser_is_exact(emulator):
    """Against the dense formula, wave by wave."""
    z_s = jax.random.normal(jax.random.key(5), H.coefficients_shape) * jnp.asarray(H.mask, jnp.float32)
    denoised = np.asarray(emulator.gaussian(z_s, jnp.asarray(0.7)), np.float64)
    vectors = np.asarray(emulator.gaussian.vectors.real) + 1j * np.asarray(emulator.gaussian.vectors.imaginary)
    for m in range(6):
        covariance = (vectors[m].conj().T * np.asarray(emulator.gaussian.values)[m]) @ vectors[m]
        x = np.asarray(z_s[0, m] - 1j * z_s[1, m]).reshape(-1)
        expected = covariance @ np.linalg.solve(covariance + 0.49 * np.eye(SIZE), x)
        np.testing.assert_allclose(denoised[0, m].reshape(-1), expected.real, atol=1e-4)
        np.testing.assert_allclose(-denoised[1, m].reshape(-1), expected.imag, atol=1e-4)


def test_written_and_read_again(emulator, state, tmp_path):
    save_spherical_emulator(emulator, {"name": "small"}, tmp_path, "small")
    again = read_spherical_emulator(tmp_path, "small")
    assert again.layout == emulator.layout
    mean = jax.jit(lambda e, x: e.condition(x).mean)
    np.testing.assert_allclose(mean(again, state), mean(emulator, state), atol=0.3)
    assert again.layout.select(state[None], "temperature", 500).shape == (1, 8, 16)


def test_larger_errors_around_the_same_mean(emulator, state):
    """The same draw of z, at 1.4 times the distance from the mean."""
    draw = eqx.filter_jit(lambda e: DiffusionDynamics(e, e.condition(state), Sampler()).draw(jax.random.key(6))[0])
    mean = eqx.filter_jit(emulator.condition)(state).mean
    wider = draw(emulator.with_errors_times(1.4)) - mean
    np.testing.assert_allclose(wider, 1.4 * (draw(emulator) - mean), atol=2e-3)
    with pytest.raises(ValueError, match="factor=-1"):
        emulator.with_errors_times(-1.0)


def test_unknown_inputs_are_refused(emulator, state):
    with pytest.raises(ValueError, match="takes no inputs"):
        emulator.condition(state, jnp.zeros(1))
    with pytest.raises(ValueError, match=r"expected \(8, 16, 4\)"):
        emulator.condition(state[:4])


def test_arguments_of_the_wrong_kind_are_refused(emulator, tmp_path):
    with pytest.raises(TypeError, match=r"SphericalEmulator got noise=WhiteNoise\(\); expected a HarmonicNoise"):
        dataclasses.replace(emulator, noise=WhiteNoise())
    with pytest.raises(TypeError, match=r"got layout=\(8, 16, 4\); expected a Layout: write layout=spherical_layout"):
        dataclasses.replace(emulator, layout=(8, 16, 4))
    with pytest.raises(TypeError, match=r"got mean_network=.*; expected a SphericalMeanNetwork"):
        dataclasses.replace(emulator, mean_network=emulator.residual_network)
    with pytest.raises(TypeError, match="got residual_network=None; expected a SphericalResidualNetwork"):
        dataclasses.replace(emulator, residual_network=None)
    for name in ("gaussian", "climate"):
        with pytest.raises(TypeError, match=f"got {name}=.*; expected a GaussianDenoiser"):
            dataclasses.replace(emulator, **{name: emulator.mean_network.propagator})
    with pytest.raises(TypeError, match=r"HarmonicNoise got harmonics=22; expected a SphericalHarmonics"):
        HarmonicNoise(22)
    with pytest.raises(TypeError, match=r"got folder='out'; expected a Path or Traversable"):
        read_spherical_emulator("out", "small")
    with pytest.raises(TypeError, match=r"got folder='out'; expected a Path: write"):
        save_spherical_emulator(emulator, {}, "out", "small")
    with pytest.raises(TypeError, match=r"save_spherical_emulator got emulator=.*; expected a SphericalEmulator"):
        save_spherical_emulator(emulator.mean_network, {}, tmp_path, "small")
