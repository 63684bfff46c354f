"""GenCast's own package against the adapter; skipped where the package is absent.

pytest -m gencast
"""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from conftest import compilations
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda

pytestmark = [
    pytest.mark.gencast,
    pytest.mark.skipif(
        importlib.util.find_spec("weathernext") is None,
        reason="google-deepmind's weathernext is not installed (it is not on PyPI; see the README)",
    ),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random checkpoint with its statistics and data."""
    from numpyro_diffusion_da.priors import write_synthetic_gencast

    return write_synthetic_gencast(tmp_path_factory.mktemp("gencast"))


@pytest.fixture(scope="module")
def dataset(files):
    return xarray.load_dataset(files.data, engine="h5netcdf")


@pytest.fixture(scope="module")
def prior(files):
    return ndda.GenCastPrior.from_checkpoint(files.checkpoint, stats=files.stats, surface=files.data)


@pytest.fixture(scope="module")
def package(files):
    """The package's modules and what it reads of the checkpoint and of the statistics."""
    from numpyro_diffusion_da.priors import import_weathernext, read_gencast_statistics

    wn = import_weathernext()
    with open(files.checkpoint, "rb") as file:
        checkpoint = wn.checkpoint.load(file, wn.gencast.CheckPoint)
    return wn, checkpoint, read_gencast_statistics(files.stats)


def in_the_package_s_form(dataset):
    """An ERA5-like dataset as the package's own example files are laid out."""
    renamed = dataset.rename(latitude="lat", longitude="lon")
    static = ["geopotential_at_surface", "land_sea_mask"]
    moving = renamed.drop_vars(static).expand_dims("batch")
    out = moving.assign({name: renamed[name] for name in static})
    datetime = renamed.time.values
    return out.assign_coords(datetime=(("batch", "time"), datetime[None]), time=datetime - datetime[0])


def extract(dataset, package):
    """(inputs, targets, forcings) of the first step, by the package."""
    from weathernext.utils import data_utils

    _, checkpoint, _ = package
    return data_utils.extract_inputs_targets_forcings(
        in_the_package_s_form(dataset.isel(time=slice(0, 3))),
        target_lead_times=slice("12h", "12h"),
        **dataclasses.asdict(checkpoint.task_config),
    )


def stacked(dataset):
    """(lat, lon, channel) by the package's own stacking."""
    from weathernext.utils import model_utils

    return model_utils.dataset_to_stacked(dataset).transpose("batch", "lat", "lon", ...).values[0]


def test_frames_are_stacked_as_the_package_does(prior, dataset, package):
    frame = prior.frames(dataset, dataset.time.values[2:3])[0]
    _, targets, _ = extract(dataset, package)
    expected = stacked(targets)
    assert frame.shape == expected.shape == prior.layout.shape
    defined = np.isfinite(expected)
    np.testing.assert_array_equal(frame[defined], expected[defined])
    fill = prior.fill_values()
    assert set(fill) == {"sea_surface_temperature"}
    assert np.all(frame[~defined] == np.float32(fill["sea_surface_temperature"]))


def test_forcings_are_the_package_s(prior, dataset, package):
    inputs, _, forcings = extract(dataset, package)
    ours = prior.forcings(dataset.time.values[2:3])
    for i, name in enumerate(("cos", "sin")):
        day = np.concatenate([inputs[f"day_progress_{name}"].values[0], forcings[f"day_progress_{name}"].values[0]])
        year = np.concatenate([inputs[f"year_progress_{name}"].values[0], forcings[f"year_progress_{name}"].values[0]])
        np.testing.assert_allclose(ours.day[0, ..., i], day, atol=2e-7)
        np.testing.assert_allclose(ours.year[0, ..., i], year, atol=2e-7)


def test_conditioning_is_normalized_as_the_package_does(prior, dataset, package):
    from weathernext.utils import normalization

    _, _, statistics = package
    inputs, _, _ = extract(dataset, package)
    name = "sea_surface_temperature"
    inputs = inputs.assign({name: inputs[name].fillna(statistics["min"][name].astype(np.float32))})
    normalized = normalization.normalize(inputs, statistics["stddev"], statistics["mean"])
    frames = prior.frames(dataset, dataset.time.values[:2])
    forcings = jax.tree.map(lambda v: v[0], prior.forcings(dataset.time.values[2:3]))
    ours = prior.condition((jnp.asarray(frames[0]), jnp.asarray(frames[1])), forcings)
    names = [v.name for v in prior.layout.variables if v.name in normalized]
    for t in range(2):
        expected = stacked(normalized[names].isel(time=[t]))
        np.testing.assert_allclose(ours.inputs[t], expected, atol=2e-5)
    static = np.stack([normalized[n].values for n in ("geopotential_at_surface", "land_sea_mask")], -1)
    np.testing.assert_allclose(prior.statics, static, atol=1e-6)


def test_unguided_sampler_is_the_official_one(prior, files, dataset, package, monkeypatch):
    """The same noise through the package's predictor (SST, normalization, sampler without churn) and through ours."""
    from weathernext.utils import nan_cleaning, normalization
    from weathernext.weathernext1_gen import samplers_utils

    from numpyro_diffusion_da.priors import package_settings

    wn, checkpoint, statistics = package
    inputs, targets, forcings = extract(dataset, package)
    noise = jax.random.normal(jax.random.key(3), prior.layout.shape)

    def given_noise(template):
        values = {}
        for name, array in template.items():
            part = np.asarray(noise)[..., prior.layout.channels(name)]
            part = np.moveaxis(part, -1, 0) if "level" in array.dims else part[..., 0]
            values[name] = (array.dims, jnp.asarray(part)[None, None])
        return wn.xarray_jax.Dataset(values, coords=template.coords)

    monkeypatch.setattr(samplers_utils, "spherical_white_noise_like", given_noise)
    sampler_config = dataclasses.replace(checkpoint.sampler_config, stochastic_churn_rate=0.0)

    @wn.haiku.transform
    def official(inputs, template, forcings):
        predictor = wn.gencast.GenCast(
            checkpoint.task_config,
            checkpoint.denoiser_architecture_config,
            sampler_config,
            checkpoint.noise_config,
            checkpoint.noise_encoder_config,
        )
        predictor = normalization.InputsAndResiduals(
            predictor, statistics["stddev"], statistics["mean"], statistics["diffs_stddev"]
        )
        predictor = nan_cleaning.NaNCleaner(predictor, "sea_surface_temperature", statistics["min"], True)
        return predictor(inputs, targets_template=template, forcings=forcings)

    with package_settings(), jax.default_matmul_precision("highest"):
        run = jax.jit(lambda p, i, t, f: official.apply(p, jax.random.key(0), i, t, f))
        expected = stacked(run(checkpoint.params, inputs, targets * 0, forcings).compute())

    sampler = ndda.Sampler(ndda.diffusion.DPMSolverPP2S(), ndda.KarrasSchedule(20, rho=7.0, lowest=0.03, highest=80.0))
    frames = prior.frames(dataset, dataset.time.values[:2])
    forcings = jax.tree.map(lambda v: v[0], prior.forcings(dataset.time.values[2:3]))

    @jax.jit
    def ours(previous, last):
        from numpyro_diffusion_da.diffusion import PriorDenoiser

        conditioning = prior.condition((previous, last), forcings)
        z, memory = sampler(
            jax.random.key(0), PriorDenoiser(prior, conditioning), prior.noise, prior.noise_range, 80.0 * noise
        )
        return prior.location(conditioning) + prior.scale(conditioning) * z, memory.passes.forward

    x, passes = ours(frames[0], frames[1])
    assert passes == 39
    defined = np.isfinite(expected)
    assert not defined.all()
    # In units of the normalized residual; rounding of x itself is up to 1.3e-4 of it for SST (290 K, of 0.12 K).
    scale = np.asarray(prior.latent_scale)[defined]
    error = np.abs(np.asarray(x)[defined] - expected[defined]) / scale
    rounding = np.abs(expected[defined]) * np.finfo(np.float32).eps / scale
    assert np.all(error < 1e-5 + 2 * rounding)


def test_the_network_depends_on_all_it_is_given(prior, dataset):
    """A random initialization may forget the noise level; the checkpoint of the tests must not."""
    frames = jnp.asarray(prior.frames(dataset, dataset.time.values[:2]))
    forcings = jax.tree.map(lambda v: v[0], prior.forcings(dataset.time.values[2:4]))
    later = jax.tree.map(lambda v: v[1], prior.forcings(dataset.time.values[2:4]))
    z = jax.random.normal(jax.random.key(0), prior.layout.shape)

    def run(z, level, frames, forcings):
        return prior.denoise(z, jnp.asarray(level), prior.condition((frames[0], frames[1]), forcings))

    base = run(z, 1.0, frames, forcings)
    assert base.shape == prior.layout.shape
    others = [
        run(2 * z, 1.0, frames, forcings),
        run(z, 1.5, frames, forcings),
        run(z, 1.0, frames[::-1], forcings),
        run(z, 1.0, frames, later),
    ]
    for other in others:
        assert float(jnp.abs(other - base).max()) > 1e-3


@pytest.mark.parametrize("attention", ["triblockdiag_mha"])
def test_attention_does_not_change_the_network(prior, files, dataset, attention):
    other = ndda.GenCastPrior.from_checkpoint(
        files.checkpoint, stats=files.stats, surface=dataset, attention=attention, memory_budget=0.0
    )
    assert other.rematerialize
    assert not prior.rematerialize
    assert other.backward_bytes() < prior.backward_bytes()
    frames = jnp.asarray(prior.frames(dataset, dataset.time.values[:2]))
    forcings = jax.tree.map(lambda v: v[0], prior.forcings(dataset.time.values[2:3]))
    z = jax.random.normal(jax.random.key(0), prior.layout.shape)

    def forward_and_pull(prior):
        conditioning = prior.condition((frames[0], frames[1]), forcings)
        denoised, pull = jax.vjp(lambda v: prior.denoise(v, jnp.asarray(1.0), conditioning), z)
        return denoised, pull(z)[0]

    for a, b in zip(forward_and_pull(prior), forward_and_pull(other), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6 * float(jnp.abs(a).max()))


def test_bfloat16_is_close(prior, files, dataset):
    other = ndda.GenCastPrior.from_checkpoint(
        files.checkpoint, stats=files.stats, surface=dataset, precision="bfloat16"
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(other.network.parameters)} == {jnp.dtype("bfloat16")}
    frames = jnp.asarray(prior.frames(dataset, dataset.time.values[:2]))
    forcings = jax.tree.map(lambda v: v[0], prior.forcings(dataset.time.values[2:3]))
    z = jax.random.normal(jax.random.key(0), prior.layout.shape)
    a, b = (p.denoise(z, jnp.asarray(1.0), p.condition((frames[0], frames[1]), forcings)) for p in (prior, other))
    assert b.dtype == z.dtype
    error = float(jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(a**2)))
    assert 0 < error < 0.05  # eight bits of mantissa through some twenty layers


def program(prior, data, steps=3, particles_error=0.5):
    """(model, arguments, operators): T2m at stations and block means of temperature, 16 particles' worth."""
    layout = prior.layout
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(1, layout.shape[0] - 1, 30), rng.integers(0, layout.shape[1], 30)

    def stations(x):
        return layout.select(x, "2m_temperature")[rows, columns]

    def means(x):
        return layout.select(x, "temperature", level=850)[:12].reshape(4, 3, 8, 3).mean((1, 3))

    def model(y, frames, forcings):
        def step(carry, at):
            (y_stations, y_means), forcings_t = at
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, carry, forcings_t))
            numpyro.sample("stations", dist.Normal(stations(x), 0.5).to_event(1), obs=y_stations)
            numpyro.sample("means", dist.Normal(means(x), 0.3).to_event(2), obs=y_means)
            return (carry[1], x), None

        scan(step, (frames[0], frames[1]), (y, forcings))

    times = data.time.values
    frames = jnp.asarray(prior.frames(data, times[:2]))
    truth = jnp.asarray(prior.frames(data, times[2 : 2 + steps]))
    exact = jax.vmap(stations)(truth), jax.vmap(means)(truth)
    y = exact[0] + 0.5 * rng.normal(size=exact[0].shape), exact[1] + 0.3 * rng.normal(size=exact[1].shape)
    return model, (y, frames, prior.forcings(times[2 : 2 + steps])), (stations, means)


def test_filter_end_to_end(prior, dataset, tmp_path):
    """16 particles, 3 steps: towards the observations, nothing compiled after the first step, killed and resumed."""
    model, arguments, operators = program(prior, dataset)
    y, frames, forcings = arguments
    filter = ndda.Filter(ndda.FAAPF(model), num_particles=16, progress_bar=False)
    filter.run(jax.random.key(0), *arguments)
    result = filter.result
    analysis = jnp.asarray(result.posterior["x"][0]).mean(0)  # (time, ...)
    for operator, observed in zip(operators, y, strict=True):
        before = np.sqrt(np.mean((np.asarray(jax.vmap(operator)(jnp.stack([frames[1]] * 3))) - observed) ** 2))
        after = np.sqrt(np.mean((np.asarray(jax.vmap(operator)(analysis)) - observed) ** 2))
        assert after < 0.35 * before
    # Weight and draw, and one of each for the background of 16 particles.
    passes = {n: set(p.ravel()) for n, p in result.network_passes.items()}
    assert passes == {"forward": {18}, "jvp": {0}, "vjp": {33}, "conditioning": {0}}

    with compilations() as compiled:
        filter.run(jax.random.key(1), *arguments)
    assert not compiled

    tree = filter.to_datatree(time=dataset.time.values[2:5])
    assert tree["posterior"]["temperature"].dims == ("chain", "draw", "time", "level", "latitude", "longitude")
    assert tree["posterior"]["temperature"].attrs["units"] == "K"
    over_land = dataset.land_sea_mask.values > 0.5
    assert np.isnan(tree["posterior"]["sea_surface_temperature"].values[..., over_land]).all()

    # Killed after two of three steps; the rest is done by another process, so to speak.
    short = (jax.tree.map(lambda v: v[:2], y), frames, jax.tree.map(lambda v: v[:2], forcings))
    for given in (short, arguments):
        resumed = ndda.Filter(ndda.FAAPF(model), num_particles=16, progress_bar=False, directory=tmp_path)
        resumed.run(jax.random.key(0), *given)
    np.testing.assert_array_equal(resumed.result.posterior["x"], result.posterior["x"])
    np.testing.assert_array_equal(resumed.result.sample_stats["ancestors"], result.sample_stats["ancestors"])


def test_sea_surface_temperature_over_land_cannot_be_observed(prior, dataset):
    _, (_, frames, forcings), _ = program(prior, dataset)
    rows, columns = (v[:3] for v in np.nonzero(dataset.land_sea_mask.values > 0.5))

    def model(y, frames, forcings):
        def step(carry, at):
            y_t, forcings_t = at
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, carry, forcings_t))
            sst = prior.layout.select(x, "sea_surface_temperature")[rows, columns]
            numpyro.sample("buoys", dist.Normal(sst, 0.5).to_event(1), obs=y_t)
            return (carry[1], x), None

        scan(step, (frames[0], frames[1]), (y, forcings))

    filter = ndda.Filter(ndda.FAAPF(model), num_particles=2, progress_bar=False)
    with pytest.raises(ValueError, match="site 'buoys' at step 0 compares 3 observed values with NaN"):
        filter.run(jax.random.key(0), jnp.full((3, 3), 290.0), frames, forcings)


def test_wrong_use_is_refused(prior, files, dataset):
    _, (_, frames, forcings), _ = program(prior, dataset)
    at = jax.tree.map(lambda v: v[0], forcings)
    with pytest.raises(ValueError, match="conditioned on two frames, got 1"):
        ndda.DiffusionTransition(prior, frames[0], at).sample(jax.random.key(0))
    with pytest.raises(ValueError, match=r"prior\.forcings\(times\)"):
        ndda.DiffusionTransition(prior, (frames[0], frames[1])).sample(jax.random.key(0))
    with pytest.raises(ValueError, match="attention='splash'"):
        ndda.GenCastPrior.from_checkpoint(files.checkpoint, stats=files.stats, surface=dataset, attention="splash")
    with pytest.raises(ValueError, match="precision='fp8'"):
        ndda.GenCastPrior.from_checkpoint(files.checkpoint, stats=files.stats, surface=dataset, precision="fp8")
    with pytest.raises(FileNotFoundError, match="published statistics"):
        ndda.GenCastPrior.from_checkpoint(files.checkpoint, stats=files.checkpoint.parent, surface=dataset)
    with pytest.raises(ValueError, match="one target time per step"):
        prior.forcings("2019-03-29")
    with pytest.raises(NotImplementedError, match="climatology"):
        prior.climatology()


def test_both_frames_of_an_ancestor_move(prior, dataset):
    """With a taper, both frames move by one regression; what is undefined over land stays as it is."""
    model, (y, frames, forcings), _ = program(prior, dataset, steps=2)
    layout = prior.layout
    latitude, longitude = layout.coords()["latitude"], layout.coords()["longitude"]
    rng = np.random.default_rng(0)  # the stations of `program`
    rows, columns = rng.integers(1, layout.shape[0] - 1, 30), rng.integers(0, layout.shape[1], 30)
    blocks = np.meshgrid(latitude[:12].reshape(4, 3).mean(1), longitude.reshape(8, 3).mean(1), indexing="ij")
    places = {"stations": np.stack([latitude[rows], longitude[columns]], -1), "means": np.stack(blocks, -1)}
    taper = ndda.Taper(3000.0, ndda.GreatCircle(), places)
    first_guess_error = 0.1 * jnp.asarray(prior.stddev)[None, None]

    def started(y, frames, forcings):
        error = numpyro.sample("error", dist.Normal(0.0, 1.0).expand(layout.shape).to_event(3))
        model(y, (frames[0] + first_guess_error * error, frames[1] - first_guess_error * error), forcings)

    algorithm = ndda.FAAPF(started, weight=ndda.Equal(), taper=taper, guidance=ndda.MMPS.cheap(), lag=1)
    run = ndda.Filter(algorithm, num_particles=8, progress_bar=False)
    run.run(jax.random.key(0), y, frames, forcings)
    assert (run.result.sample_stats["moved_share"] > 0.9).all()  # equal weights leave everything to the move
    # The first analysis as it was, and as the second step moved it; equal weights select nothing.
    before, after = run.result.posterior["x"][0, :, 0], run.result.lagged[0, :, 0]
    shift = np.abs(after - before).mean((0, 1, 2)) / np.asarray(prior.stddev)
    assert (shift > 1e-4).all()  # every variable has covariances with the observed ones
    over_land = dataset.land_sea_mask.values > 0.5
    sst = [np.asarray(layout.select(x, "sea_surface_temperature")) for x in (before, after)]
    np.testing.assert_allclose(sst[0][:, over_land], sst[1][:, over_land], rtol=1e-6)
