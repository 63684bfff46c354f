"""Harmonics of scalars and winds against what is known of them, and their noise against its covariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from numpyro_diffusion_da.priors import HarmonicNoise, SphericalHarmonics

KEY = jax.random.key(0)
H = SphericalHarmonics(7, 9, num_scalars=2, num_winds=1)
LATITUDE, LONGITUDE = np.deg2rad(H.latitudes), np.arange(18) * 2 * np.pi / 18


@pytest.fixture(scope="module")
def coefficients():
    return jax.random.normal(KEY, H.coefficients_shape) * jnp.asarray(H.mask, jnp.float32)


def test_analysis_inverts_synthesis_and_keeps_the_mean_square(coefficients):
    fields = jax.jit(H.synthesis)(coefficients)
    np.testing.assert_allclose(jax.jit(H.analysis)(fields), coefficients, atol=2e-5)
    square = np.einsum("j,jqc->c", H.weights, np.square(fields)) / H.num_longitudes
    total = np.sum(np.square(coefficients), axis=(0, 1, 2))
    np.testing.assert_allclose(square[:2], total[:2], rtol=1e-4)
    np.testing.assert_allclose(square[2] + square[3], total[2] + total[3], rtol=1e-4)


def test_solid_rotation_and_a_gradient():
    """u = cos(latitude) has the vorticity 2 sin(latitude); the gradient of cos(longitude) cos(latitude) is known."""
    u = jnp.asarray(np.cos(LATITUDE)[:, None, None] * np.ones((1, 18, 1)), jnp.float32)
    b, g = H.of_winds(u, jnp.zeros_like(u))
    degree = jnp.asarray(H.degree_weights(), jnp.float32)[None, None, :, None]
    np.testing.assert_allclose(H.scalars(-degree * b)[:, 0, 0], 2 * np.sin(LATITUDE), atol=1e-5)
    np.testing.assert_allclose(g, 0.0, atol=1e-5)
    wave = np.cos(LATITUDE)[:, None] * np.cos(LONGITUDE)[None]
    a = H.of_scalars(jnp.asarray(wave[..., None], jnp.float32))
    east, north = H.winds(jnp.zeros_like(a), degree * a)
    np.testing.assert_allclose(east[..., 0], np.broadcast_to(-np.sin(LONGITUDE)[None], wave.shape), atol=1e-5)
    np.testing.assert_allclose(north[..., 0], -np.sin(LATITUDE)[:, None] * np.cos(LONGITUDE)[None], atol=1e-5)


def test_transpose_and_mirror(coefficients):
    v = jax.random.normal(jax.random.key(1), (9, 18, 4))
    fields = H.synthesis(coefficients)
    np.testing.assert_allclose(jnp.sum(v * fields), jnp.sum(H.synthesis_transpose(v) * coefficients), rtol=1e-4)
    mirrored = H.synthesis(coefficients * jnp.asarray(H.reflection, jnp.float32)[None])
    signs = jnp.array([1.0, 1.0, 1.0, -1.0])[None, None]
    np.testing.assert_allclose(mirrored, fields[::-1] * signs, atol=1e-4)


def test_noise_is_isotropic():
    """Scalars: C(t) = 1/n sum P_l(cos t). Winds: unit variance of both components everywhere."""
    noise = HarmonicNoise(H)

    @jax.jit
    @jax.vmap
    def columns(index):
        return noise.covariance_product(jnp.zeros(9 * 18 * 4).at[index].set(1.0).reshape(9, 18, 4)).reshape(-1)

    covariance = np.asarray(columns(jnp.arange(9 * 18 * 4))).reshape(9 * 18, 4, 9 * 18, 4)
    place = np.stack(
        [
            np.outer(np.cos(LATITUDE), np.cos(LONGITUDE)).ravel(),
            np.outer(np.cos(LATITUDE), np.sin(LONGITUDE)).ravel(),
            np.outer(np.sin(LATITUDE), np.ones(18)).ravel(),
        ],
        axis=1,
    )
    cosine = np.clip(place @ place.T, -1.0, 1.0)
    expected = sum(scipy.special.eval_legendre(degree, cosine) for degree in range(7)) / 7
    np.testing.assert_allclose(covariance[:, 0, :, 0], expected, atol=1e-5)
    np.testing.assert_allclose(covariance[:, 0, :, 1:], 0.0, atol=1e-5)
    for channel in (2, 3):
        np.testing.assert_allclose(np.diag(covariance[:, channel, :, channel]), 1.0, atol=1e-5)
    np.testing.assert_allclose(np.einsum("ii->i", covariance[:, 2, :, 3]), 0.0, atol=1e-5)


def test_too_few_latitudes_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="10 degrees on 9 latitudes"):
        SphericalHarmonics(10, 9, 1, 1)
    with pytest.raises(ValueError, match=r"expected \(9, 18, 4\)"):
        HarmonicNoise(H).sample(KEY, (9, 18, 3), jnp.float32)
