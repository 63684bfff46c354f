"""GenCast's own package against the adapter; skipped where the package is absent.

pytest -m gencast
"""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

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
    from numpyro_diffusion_da.priors.gencast_synthetic import write_synthetic

    return write_synthetic(tmp_path_factory.mktemp("gencast"))


@pytest.fixture(scope="module")
def dataset(files):
    return xarray.load_dataset(files.data, engine="h5netcdf")


@pytest.fixture(scope="module")
def prior(files):
    return ndda.GenCastPrior.from_checkpoint(files.checkpoint, stats=files.stats, surface=files.data)


@pytest.fixture(scope="module")
def package(files):
    """The package's modules and what it reads of the checkpoint and of the statistics."""
    from numpyro_diffusion_da.priors.gencast import read_statistics, weathernext

    wn = weathernext()
    with open(files.checkpoint, "rb") as file:
        checkpoint = wn.checkpoint.load(file, wn.gencast.CheckPoint)
    return wn, checkpoint, read_statistics(files.stats)


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


def test_conditioning_is_normalised_as_the_package_does(prior, dataset, package):
    from weathernext.utils import normalization

    _, _, statistics = package
    inputs, _, _ = extract(dataset, package)
    name = "sea_surface_temperature"
    inputs = inputs.assign({name: inputs[name].fillna(statistics["min"][name].astype(np.float32))})
    normalised = normalization.normalize(inputs, statistics["stddev"], statistics["mean"])
    frames = prior.frames(dataset, dataset.time.values[:2])
    forcings = jax.tree.map(lambda v: v[0], prior.forcings(dataset.time.values[2:3]))
    ours = prior.condition((jnp.asarray(frames[0]), jnp.asarray(frames[1])), forcings)
    names = [v.name for v in prior.layout.variables if v.name in normalised]
    for t in range(2):
        expected = stacked(normalised[names].isel(time=[t]))
        np.testing.assert_allclose(ours.inputs[t], expected, atol=2e-5)
    static = np.stack([normalised[n].values for n in ("geopotential_at_surface", "land_sea_mask")], -1)
    np.testing.assert_allclose(prior.statics, static, atol=1e-6)


def test_unguided_sampler_is_the_official_one(prior, files, dataset, package, monkeypatch):
    """The same noise through the package's predictor (SST, normalisation, sampler without churn) and through ours."""
    from weathernext.utils import nan_cleaning, normalization
    from weathernext.weathernext1_gen import samplers_utils

    from numpyro_diffusion_da.priors.gencast import as_the_package_expects

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

    with as_the_package_expects(), jax.default_matmul_precision("highest"):
        run = jax.jit(lambda p, i, t, f: official.apply(p, jax.random.key(0), i, t, f))
        expected = stacked(run(checkpoint.params, inputs, targets * 0, forcings).compute())

    sampler = ndda.Sampler(ndda.DPMSolverPP2S(), ndda.KarrasSchedule(20, rho=7.0, lowest=0.03, highest=80.0))
    frames = prior.frames(dataset, dataset.time.values[:2])
    forcings = jax.tree.map(lambda v: v[0], prior.forcings(dataset.time.values[2:3]))

    @jax.jit
    def ours(previous, last):
        from numpyro_diffusion_da.denoiser import PriorDenoiser

        conditioning = prior.condition((previous, last), forcings)
        z, memory = sampler(
            jax.random.key(0), PriorDenoiser(prior, conditioning), prior.noise, prior.noise_range, 80.0 * noise
        )
        return prior.location(conditioning) + prior.scale(conditioning) * z, memory.passes.forward

    x, passes = ours(frames[0], frames[1])
    assert passes == 39
    defined = np.isfinite(expected)
    assert not defined.all()
    # In units of the normalised residual; rounding of x itself is up to 1.3e-4 of it for SST (290 K, of 0.12 K).
    scale = np.asarray(prior.latent_scale)[defined]
    error = np.abs(np.asarray(x)[defined] - expected[defined]) / scale
    rounding = np.abs(expected[defined]) * np.finfo(np.float32).eps / scale
    assert np.all(error < 1e-5 + 2 * rounding)
