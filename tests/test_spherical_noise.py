"""The noise of the sphere: its covariance against the formula, its draws, and what guidance needs it for."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import BENCHMARKS, load_program

import numpyro_diffusion_da as ndda

GRIDS = [(13, 24), (19, 36)]


@functools.cache
def formula(num_latitudes: int, num_longitudes: int) -> np.ndarray:
    """C from angles between grid points and Legendre polynomials, with nothing of the library in it."""
    latitude = np.repeat(np.deg2rad(np.linspace(-90, 90, num_latitudes)), num_longitudes)
    longitude = np.tile(2 * np.pi * np.arange(num_longitudes) / num_longitudes, num_latitudes)
    points = np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=1
    )
    cosine = np.clip(points @ points.T, -1.0, 1.0)
    n = num_longitudes // 2
    return sum(scipy.special.eval_legendre(degree, cosine) for degree in range(n)) / n


@functools.cache
def covariance(num_latitudes: int, num_longitudes: int) -> np.ndarray:
    """C from products with unit vectors."""
    noise = ndda.diffusion.SphericalNoise(num_latitudes, num_longitudes)
    points = num_latitudes * num_longitudes
    units = jnp.eye(points).reshape(points, num_latitudes, num_longitudes)
    return np.asarray(jax.jit(jax.vmap(noise.covariance_product))(units)).reshape(points, points)


def assert_covariance(draws: np.ndarray, expected: np.ndarray, sigmas: float = 6.0) -> None:
    """Every entry within `sigmas` standard errors of products of normals, which as a whole are neither loose."""
    estimate = draws.T @ draws / len(draws)
    variance = np.diag(expected)
    errors = (estimate - expected) / np.sqrt((np.outer(variance, variance) + expected**2) / len(draws))
    assert np.abs(errors).max() < sigmas
    assert 0.8 < np.sqrt(np.mean(errors**2)) < 1.2
    assert np.abs(draws.mean(0) / np.sqrt(variance / len(draws))).max() < sigmas


# --- C ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "rank", "largest", "smallest"), [((13, 24), 144, 36.5, 0.68), ((19, 36), 324, 54.6, 0.66)]
)
def test_eigenvalues(grid, rank, largest, smallest):
    values = np.linalg.eigvalsh(covariance(*grid).astype(np.float64))[::-1]
    assert ndda.diffusion.SphericalNoise(*grid).rank == rank
    assert round(values[0], 1) == largest
    assert round(values[rank - 1], 2) == smallest
    assert np.abs(values[rank:]).max() < 1e-5


@pytest.mark.parametrize("grid", GRIDS)
def test_covariance_is_the_formula(grid):
    c = covariance(*grid)
    np.testing.assert_allclose(c, formula(*grid), atol=1e-5)
    np.testing.assert_allclose(np.diag(c), 1.0, atol=1e-6)
    np.testing.assert_allclose(c, c.T, atol=1e-6)
    # Each pole is one point: its row of the grid is one number.
    for pole in (c[: grid[1]], c[-grid[1] :]):
        np.testing.assert_allclose(pole, pole[:1] + 0 * pole, atol=1e-6)


def test_the_largest_grid():
    """One degree: unit variance, and far apart from each other three entries against the formula."""
    noise = ndda.diffusion.SphericalNoise(181, 360)
    assert (noise.rank, noise.num_latitudes, noise.num_longitudes) == (32_400, 181, 360)
    np.testing.assert_allclose(jnp.sum(noise.factor**2, (0, 2)), 1.0, atol=1e-6)
    product = jax.jit(noise_product)(noise, jnp.zeros((181, 360)).at[120, 10].set(1.0))
    for j, k in ((120, 10), (121, 12), (90, 300), (180, 0)):
        a, b = np.deg2rad(120 - 90), np.deg2rad(j - 90)
        cosine = np.sin(a) * np.sin(b) + np.cos(a) * np.cos(b) * np.cos(np.deg2rad(k - 10))
        expected = np.mean(scipy.special.eval_legendre(np.arange(180), cosine))
        np.testing.assert_allclose(product[j, k], expected, atol=1e-5)


def noise_product(noise, v):
    """The method as a function: the factor is an argument of what is compiled, not a constant in it."""
    return noise.covariance_product(v)


@pytest.mark.slow
def test_product_is_symmetric_linear_and_the_same_for_every_channel():
    noise = ndda.diffusion.SphericalNoise(13, 24)
    v, w = jax.random.normal(jax.random.key(0), (2, 13, 24, 3))
    product = jax.jit(noise_product)(noise, v)
    np.testing.assert_allclose(jnp.vdot(w, product), jnp.vdot(noise_product(noise, w), v), rtol=1e-4)
    for channel in range(3):
        np.testing.assert_allclose(product[..., channel], noise_product(noise, v[..., channel]), atol=2e-5)
    np.testing.assert_allclose(product.reshape(312, 3), covariance(13, 24) @ v.reshape(312, 3), atol=2e-4)
    energy = jax.grad(lambda v: 0.5 * jnp.vdot(v, noise_product(noise, v)))(v)
    np.testing.assert_allclose(energy, product, atol=2e-5)


@pytest.mark.slow
def test_double_and_half_precision():
    noise = ndda.diffusion.SphericalNoise(5, 8)
    single = noise.covariance_product(jnp.ones((5, 8)))
    half = noise.covariance_product(jnp.ones((5, 8), jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), single, rtol=1e-2)
    with jax.enable_x64(True):
        double = noise.covariance_product(jnp.ones((5, 8), jnp.float64))
        draw = noise.sample(jax.random.key(0), (5, 8), jnp.dtype("float64"))
    assert (double.dtype, draw.dtype) == (np.float64, np.float64)
    np.testing.assert_allclose(double, single, rtol=1e-6)
    (leaf,) = jax.tree.leaves(noise)
    assert (leaf.shape, leaf.dtype) == ((4, 5, 4), np.float32)


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [GRIDS[0], pytest.param(GRIDS[1], marks=pytest.mark.slow)])
def test_draws_have_the_covariance(grid):
    """Channels are independent, so that 20 000 of them are 20 000 draws."""
    noise = ndda.diffusion.SphericalNoise(*grid)
    draws = np.asarray(noise.sample(jax.random.key(0), (*grid, 20_000), jnp.dtype("float32")), np.float64)
    np.testing.assert_allclose(draws[[0, -1]], draws[[0, -1], :1] + 0 * draws[[0, -1]], atol=1e-5)
    assert_covariance(draws.reshape(-1, 20_000).T, formula(*grid))


@pytest.mark.slow
def test_draws_with_jit_and_vmap():
    noise, dtype = ndda.diffusion.SphericalNoise(7, 12), jnp.dtype("float32")
    keys = jax.random.split(jax.random.key(0), 3)
    one_by_one = jnp.stack([noise.sample(key, (7, 12, 2), dtype) for key in keys])
    together = jax.jit(jax.vmap(lambda key: noise.sample(key, (7, 12, 2), dtype)))(keys)
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
    assert one_by_one.dtype == dtype
    without = noise.sample(keys[0], (7, 12), dtype)
    np.testing.assert_allclose(without, noise.sample(keys[0], (7, 12, 1), dtype)[..., 0], atol=1e-6)


@pytest.mark.gencast
@pytest.mark.filterwarnings("ignore")
def test_gencast_draws_the_same_noise():
    """The package's own generator: 20 000 draws of one variable."""
    reason = "weathernext is not installed (it is not on PyPI; see docs)"
    samplers_utils = pytest.importorskip("weathernext.weathernext1_gen.samplers_utils", reason=reason)
    haiku, xarray = pytest.importorskip("haiku", reason=reason), pytest.importorskip("xarray")
    template = xarray.DataArray(
        np.zeros((20_000, 13, 24), np.float32),
        dims=("batch", "lat", "lon"),
        coords={"lat": np.linspace(-90, 90, 13), "lon": np.arange(24) * 15.0},
    ).to_dataset(name="t")
    with jax.numpy_rank_promotion("allow"):
        generate = haiku.transform(lambda: samplers_utils.spherical_white_noise_like(template))
        drawn = generate.apply({}, jax.random.PRNGKey(0))["t"]
    draws = np.asarray(getattr(drawn.data, "jax_array", drawn.data), np.float64)
    assert_covariance(draws.reshape(20_000, -1), covariance(13, 24).astype(np.float64))


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(13, 26), (12, 24), (90, 180)])
def test_other_grids_are_refused(grid):
    with pytest.raises(ValueError, match=r"got .* expected num_longitudes = 2 \(num_latitudes - 1\)"):
        ndda.diffusion.SphericalNoise(*grid)


def test_coordinates():
    latitudes, longitudes = np.linspace(-90, 90, 13), np.arange(24) * 15.0
    noise = ndda.diffusion.SphericalNoise.from_coordinates(latitudes, longitudes)
    np.testing.assert_array_equal(noise.factor, ndda.diffusion.SphericalNoise(13, 24).factor)
    for bad, sentence in (
        ((latitudes[::-1], longitudes), "latitudes go from 90 to -90, expected 13"),
        ((latitudes, longitudes - 180), "longitudes go from -180 to 165, expected 24"),
        ((latitudes[1:-1], longitudes), "latitudes go from -75 to 75"),
        ((latitudes[:, None], longitudes), "expected a list"),
        ((np.linspace(-90, 90, 12), longitudes), "got 12 latitudes and 24 longitudes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ndda.diffusion.SphericalNoise.from_coordinates(*bad)


@pytest.mark.parametrize("shape", [(24, 13), (3, 13, 24), (312,)])
def test_latents_of_another_grid_are_refused(shape):
    noise = ndda.diffusion.SphericalNoise(13, 24)
    with pytest.raises(ValueError, match="put latitude and longitude first"):
        noise.covariance_product(jnp.zeros(shape))
    with pytest.raises(ValueError, match="put latitude and longitude first"):
        noise.sample(jax.random.key(0), shape, jnp.dtype("float32"))


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_guidance_is_exact_with_c_and_wrong_without():
    """Every noise level, 20 draws: rounding with C; 58 to 93 % off with the published C = I."""
    benchmark = load_program(BENCHMARKS / "spherical_noise.py")
    with jax.enable_x64(True):
        sphere = benchmark.Sphere(13, 24, 40)
        np.testing.assert_allclose(sphere.synthesis @ sphere.synthesis.T, formula(13, 24), atol=1e-6)
        rows = benchmark.guidance_rows(sphere, [10.0, 1.0, 0.1, 0.02], 20)
    for row in rows:
        assert row["C"] < 1e-11
        assert 0.5 < row["C = I"] < 1.0
        assert row["C = I, symmetrized"] > 0.5
    np.testing.assert_allclose([row["C = I"] for row in rows], [0.78, 0.58, 0.80, 0.92], atol=0.1)


@pytest.mark.slow
def test_guided_sampler_is_the_benchmark():
    benchmark = load_program(BENCHMARKS / "spherical_noise.py")
    with jax.enable_x64(True):
        rows = benchmark.sampler_rows(benchmark.Sphere(13, 24, 40))
    errors = {(row["sampler"], row["guidance"]): row["error"] for row in rows}
    assert errors["cheap recipe", "C"] < 0.05
    assert errors["Adams-Bashforth 3", "C"] < 0.02
    assert 0.5 < errors["cheap recipe", "C = I"] < 1.0


def test_white_noise_in_guidance_changes_nothing_where_the_noise_is_white(small):
    prior = ndda.GaussianPrior(small.transition, small.covariance)
    likelihood = ndda.observation.GaussianLikelihood(
        lambda x: [ndda.observation.GaussianObservation(x[::2], jnp.full(2, 0.5), jnp.ones(2), jnp.ones(2, bool))]
    )
    step = ndda.DiffusionTransition(prior, jnp.zeros(4)).dynamics()
    draws = [
        jax.jit(lambda key, guidance=guidance: step.conditional_draw(key, likelihood, guidance)[0])(jax.random.key(0))
        for guidance in (ndda.MMPS(), ndda.MMPS(noise=ndda.diffusion.WhiteNoise()))
    ]
    np.testing.assert_array_equal(*draws)


@pytest.mark.slow
def test_benchmark_runs(tmp_path, capsys):
    out = tmp_path / "tables.json"
    benchmark = load_program(BENCHMARKS / "spherical_noise.py")
    benchmark.main(out, num_latitudes=5, observations=4, draws=2, cost_latitudes=13, channels=2, repeats=2)
    tables = json.loads(out.read_text())
    assert tables["settings"]["num_latitudes"] == 5
    assert [row["rank"] for row in tables["spectrum"]] == [144, 324, 144]
    assert all(row["of a forward pass"] < 0.05 for row in tables["cost"])
    assert all(row["C"] < 1e-9 for row in tables["guidance"])
    assert "error of the whole sampler" in " ".join(capsys.readouterr().out.split())
