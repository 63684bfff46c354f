"""WeatherNext 2: google-deepmind's own package against the adapter, and what needs no package.

pytest -m gencast
"""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.priors import forward_differentiable

K = 6  # elements of the noise


def cannot_run():
    """Why the package cannot run here; empty if it can."""
    if importlib.util.find_spec("weathernext") is None:
        return "weathernext is not installed"
    try:
        ndda.priors.weathernext2.network.check_xarray()
    except ImportError as error:
        return str(error)
    return ""


def needs_package(test):
    return pytest.mark.gencast(pytest.mark.skipif(bool(cannot_run()), reason=cannot_run() or "-")(test))


# --- without the package --------------------------------------------------------------------------------------------


def test_without_the_package_the_message_says_what_to_install(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "weathernext" else find(name, *a))
    with pytest.raises(ImportError, match=r"WeatherNext 2's package `weathernext` .* not on PyPI"):
        ndda.WeatherNext2Prior.from_checkpoint(tmp_path / "a.npz", config="WeatherNext2", surface=tmp_path / "a.nc")


def test_an_xarray_that_is_too_new_is_named(monkeypatch):
    def refuses(data_vars=None):
        if data_vars is not None:
            raise TypeError("Passing a Dataset as `data_vars` to the Dataset constructor is not supported.")
        return "a dataset"

    monkeypatch.setattr(xarray, "Dataset", refuses)
    with pytest.raises(ImportError, match=r"pip install 'xarray<=2026\.2\.0'"):
        ndda.priors.weathernext2.network.check_xarray()


def test_options_are_checked_first(tmp_path):
    for option, value in (("attention", "splash_mha"), ("precision", "fp8")):
        with pytest.raises(ValueError, match=f"{option}='{value}'; give one of"):
            ndda.WeatherNext2Prior.from_checkpoint(
                tmp_path / "a.npz", config="WeatherNext2", surface=tmp_path / "a.nc", **{option: value}
            )


@pytest.fixture(scope="module")
def by_hand():
    """A prior of three variables without a network: one residual, precipitation, and a field of cyclones."""
    names = ("2m_temperature", "cyclone_usa_pres_disc", "total_precipitation_6hr")
    units = ("K", "1", "m")
    latitude, longitude = np.linspace(-90.0, 90.0, 4), np.arange(6) * 60.0
    layout = ndda.Layout(
        (4, 6, 3),
        ("latitude", "longitude", "channel"),
        {"latitude": latitude, "longitude": longitude},
        variables=tuple(ndda.Variable(n, u) for n, u in zip(names, units, strict=True)),
    )
    mean = jnp.array([278.0, 988.0, 6e-4])
    is_input = jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0]), layout.shape)
    return ndda.WeatherNext2Prior(
        network=lambda inputs, statics, day, year, e: e.sum() * jnp.ones(layout.shape),
        statics=jnp.zeros((4, 6, 2)),
        mean=mean,
        stddev=jnp.array([21.0, 20.0, 2e-3]),
        offset=(1.0 - is_input) * mean[None, None],
        keep=is_input,
        output_scale=jnp.broadcast_to(jnp.array([2.6, 20.0, 2e-3]), layout.shape),
        forcing_mean=jnp.zeros(4),
        forcing_stddev=jnp.ones(4),
        input_channels=(0,),
        layout=layout,
        noise_shape=(K,),
        generator_passes=1,
        rematerialize=False,
        description="made by hand",
        conditioning_passes=0,
    )


def hourly(steps=3, hours=6, **changed):
    times = np.datetime64("2019-03-29T00", "ns") + np.arange(steps) * np.timedelta64(hours, "h")
    t2m = 285.0 + np.random.default_rng(0).normal(size=(steps, 4, 6))
    dims = ("time", "latitude", "longitude")
    coords = {"time": times, "latitude": np.linspace(-90.0, 90.0, 4), "longitude": np.arange(6) * 60.0}
    return xarray.Dataset({"2m_temperature": (dims, t2m, {"units": "K"}), **changed}, coords)


def test_frames_need_no_precipitation_and_no_cyclones(by_hand):
    data = hourly()
    frames = by_hand.frames(data, data.time.values)
    np.testing.assert_array_equal(frames[..., 0], data["2m_temperature"].values.astype(np.float32))
    assert (frames[..., 1] == 988.0).all()
    assert (frames[..., 2] == 0.0).all()
    # Six hourly values that end at the time are its sum.
    fine = hourly(13, 1)
    fine["total_precipitation"] = (
        fine["2m_temperature"].dims,
        np.full(fine["2m_temperature"].shape, 1e-3),
        {"units": "m"},
    )
    np.testing.assert_allclose(by_hand.frames(fine, fine.time.values[6::6])[..., 2], 6e-3, rtol=1e-6)


def test_steps_are_six_hours(by_hand):
    data = hourly(hours=12)
    for call in (lambda: by_hand.frames(data, data.time.values), lambda: by_hand.forcings(data.time.values)):
        with pytest.raises(ValueError, match=r"WeatherNext2Prior.* 6 h"):
            call()
    forcings = by_hand.forcings(np.array(["2019-03-29T12"], "datetime64[ns]"))
    # Noon at Greenwich, 6 h and 12 h after: the cosine of the local time of day at longitude 0.
    np.testing.assert_allclose(forcings.day[0, :, 0, 0], np.cos(2 * np.pi * np.array([0.0, 0.25, 0.5])), atol=1e-6)


def test_a_draw_is_affine_in_the_output_of_the_network(by_hand):
    frame = jnp.broadcast_to(jnp.array([280.0, 0.0, 0.0]), by_hand.layout.shape)
    forcings = jax.tree.map(lambda v: v[0], by_hand.forcings(["2019-03-29T12"]))
    x = by_hand.generate(jnp.full(K, 0.5), by_hand.condition((frame, frame), forcings))
    np.testing.assert_allclose(x[0, 0], np.array([280.0, 988.0, 6e-4]) + 3.0 * np.array([2.6, 20.0, 2e-3]), rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected \(6,\)"):
        by_hand.generate(jnp.zeros(3), by_hand.condition((frame, frame), forcings))
    with pytest.raises(ValueError, match=r"WeatherNext 2 is conditioned on two frames, got 1; give OnePassTransition"):
        by_hand.condition(frame, forcings)
    with pytest.raises(ValueError, match=r"WeatherNext 2 needs the forcings"):
        by_hand.condition((frame, frame))


def test_parts_with_their_own_backward_pass_get_forward_derivatives():
    @jax.custom_vjp
    def doubled(x):
        return 2.0 * x

    doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (2.0 * g,))

    def function(tree, x):
        return tree["a"] * jnp.sin(jax.checkpoint(jax.jit(doubled))(x)) + doubled(x) ** 2

    tree, x = {"a": jnp.asarray(3.0)}, jnp.arange(4.0)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: function(tree, x), (x,), (x,))
    ours = forward_differentiable(function, tree, jax.ShapeDtypeStruct(x.shape, x.dtype))
    value, slope = jax.jvp(lambda x: ours(tree, x), (x,), (jnp.ones(4),))
    np.testing.assert_allclose(value, function(tree, x), rtol=1e-6)
    np.testing.assert_allclose(slope, 6.0 * jnp.cos(2.0 * x) + 8.0 * x, rtol=1e-6)


# --- with the package -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random checkpoint with its configuration and data."""
    from numpyro_diffusion_da.priors import write_synthetic_weathernext2

    return write_synthetic_weathernext2(tmp_path_factory.mktemp("weathernext2"), noise_size=K)


@pytest.fixture(scope="module")
def dataset(files):
    return xarray.load_dataset(files.data, engine="h5netcdf")


@pytest.fixture(scope="module")
def prior(files):
    return ndda.WeatherNext2Prior.from_checkpoint(files.checkpoint, config=files.config, surface=files.data)


@pytest.fixture(scope="module")
def conditioning(prior, dataset):
    """Conditioning of the first step."""
    frames = jnp.asarray(prior.frames(dataset, dataset.time.values[:2]))
    return prior.condition(
        (frames[0], frames[1]), jax.tree.map(lambda v: v[0], prior.forcings(dataset.time.values[2:3]))
    )


@needs_package
def test_a_draw_is_the_package_s_own(prior, files, dataset, conditioning):
    """The package's predictor with its wrappers (normalization, SST, autoregression) and its own draw of the noise."""
    import dataclasses

    from weathernext.utils import data_utils, model_utils

    from numpyro_diffusion_da.priors import import_weathernext, package_settings

    wn = import_weathernext("WeatherNext 2")
    config = wn.configurations.get_fiddle_config(files.config.read_text())
    with open(files.checkpoint, "rb") as file:
        parameters = wn.checkpoint.load(file, wn.fgn.CheckPoint).params
    inference = dataclasses.replace(config, predictor_wrappers=config.predictor_wrappers[:-1])  # no ensemble wrapper
    # The package's form, which has the fields of cyclones as targets.
    renamed = dataset.isel(time=slice(0, 3)).rename(latitude="lat", longitude="lon")
    static = ["geopotential_at_surface", "land_sea_mask"]
    moving = renamed.drop_vars(static).expand_dims("batch")
    cyclones = {n: 0.0 * moving["2m_temperature"] for n in config.task.target_variables if n.startswith("cyclone")}
    times = renamed.time.values
    whole = moving.assign(cyclones).assign({name: renamed[name] for name in static})
    whole = whole.assign_coords(datetime=(("batch", "time"), times[None]), time=times - times[0])
    # Published files have coordinates in single precision. In double precision, the package puts a few points of this
    # grid, which lie on edges of the mesh, into other triangles.
    whole = whole.assign_coords({name: whole[name].astype(np.float32) for name in ("lat", "lon")})
    inputs, targets, forcings = data_utils.extract_inputs_targets_forcings(
        whole, target_lead_times=slice("6h", "6h"), **dataclasses.asdict(config.task)
    )

    @wn.haiku.transform
    def official(inputs, template, forcings):
        return wn.fgn.construct_predictor(inference)(inputs, targets_template=template, forcings=forcings)

    @wn.haiku.transform
    def drawn(inputs, forcings):
        """The package's generator of noise, which takes the first key of a pass."""
        how = config.predictor_kwargs["noise_generator_kwargs"]
        return wn.fgn.gaussian_noise_generator(inputs, forcings, jnp.float32, **how)[0]["noise"].values

    key = jax.random.key(5)
    with package_settings(), jax.default_matmul_precision("highest"):
        run = jax.jit(lambda p, i, t, f: official.apply(p, key, i, t, f))
        expected = run(parameters, inputs, targets * np.nan, forcings)
        noise = np.asarray(drawn.apply({}, key, inputs, forcings))[0]
    expected = model_utils.dataset_to_stacked(expected).transpose("batch", "lat", "lon", ...).values[0]
    assert noise.shape == prior.noise_shape == (K,)
    assert expected.shape == prior.layout.shape
    ours = jax.jit(lambda e: prior.generate(e, conditioning))
    x = np.asarray(ours(noise))
    defined = np.isfinite(expected)
    assert 0 < np.sum(~defined) < 0.1 * defined.size  # sea surface temperature over land
    scale = np.asarray(prior.output_scale)[defined]
    rounding = np.abs(expected[defined]) * np.finfo(np.float32).eps / scale
    assert np.all(np.abs(x[defined] - expected[defined]) / scale < 2e-5 + 2 * rounding)
    # Other noise is another draw.
    other = np.asarray(ours(-noise))
    assert np.sqrt(np.mean(((other - x)[defined] / scale) ** 2)) > 0.1


@needs_package
def test_derivatives_in_the_noise_and_the_rank_of_a_step(prior, conditioning):
    """Forward and backward derivatives agree with each other and with a difference; a step spans K directions."""
    scale = jnp.where(prior.output_scale > 0, prior.output_scale, 1.0)
    frame = conditioning.frame

    @jax.jit
    def normalized(e):
        return (prior.generate(e, conditioning) - frame) / scale

    e, direction = jax.random.normal(jax.random.key(0), (2, K))
    value, push = jax.linearize(normalized, e)
    slope = push(direction)
    w = jax.random.normal(jax.random.key(1), value.shape)
    pulled = jax.vjp(normalized, e)[1](w)[0]
    np.testing.assert_allclose(jnp.vdot(slope, w), jnp.vdot(direction, pulled), rtol=1e-4)
    defined = np.asarray(prior.output_scale) > 0
    step = 1e-2
    difference = (normalized(e + step * direction) - normalized(e - step * direction)) / (2 * step)
    error = np.asarray(difference - slope)[defined]
    assert np.sqrt(np.mean(error**2)) < 0.03 * np.sqrt(np.mean(np.asarray(slope)[defined] ** 2))
    jacobian = np.asarray(jax.vmap(push)(jnp.eye(K))).reshape(K, -1)
    dynamics = ndda.transition.OnePassDynamics(prior, conditioning)
    product = dynamics.moments().covariance_product
    probes = jax.random.normal(jax.random.key(2), (K + 3, *prior.layout.shape))
    images = np.asarray(jax.jit(jax.vmap(product))(probes)).reshape(K + 3, -1) / np.asarray(scale).reshape(-1)
    singular = np.linalg.svd(images, compute_uv=False)
    assert np.linalg.matrix_rank(jacobian) == K
    assert singular[K - 1] > 1e-3 * singular[0]
    assert singular[K] < 1e-5 * singular[0]


def program(prior, data, steps=2):
    """(model, arguments, operator): 2 m temperature at stations."""
    layout = prior.layout
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(1, layout.shape[0] - 1, 30), rng.integers(0, layout.shape[1], 30)

    def stations(x):
        return layout.select(x, "2m_temperature")[rows, columns]

    def model(y, frames, forcings):
        def step(carry, at):
            y_t, forcings_t = at
            x = numpyro.sample("x", ndda.OnePassTransition(prior, carry, forcings_t))
            numpyro.sample("stations", dist.Normal(stations(x), 0.5).to_event(1), obs=y_t)
            return (carry[1], x), None

        scan(step, (frames[0], frames[1]), (y, forcings))

    times = data.time.values
    frames = jnp.asarray(prior.frames(data, times[:2]))
    forcings = prior.forcings(times[2 : 2 + steps])
    # The truth is a run of the prior itself, so that it lies in its reach.
    truth, carry = [], (frames[0], frames[1])
    draw = jax.jit(lambda e, c, f: prior.generate(e, prior.condition(c, f)))
    for t in range(steps):
        x = draw(jax.random.normal(jax.random.key(10 + t), (K,)), carry, jax.tree.map(lambda v, t=t: v[t], forcings))
        truth.append(stations(x))
        carry = (carry[1], x)
    y = np.asarray(truth) + 0.5 * rng.normal(size=(steps, 30))
    return model, (y, frames, forcings), stations


@needs_package
@pytest.mark.parametrize("algorithm", ["FAAPF", "GuidedPF"])
def test_filters_run(prior, dataset, algorithm):
    model, arguments, stations = program(prior, dataset)
    made = {"FAAPF": lambda: ndda.FAAPF(model, weight=ndda.Moment()), "GuidedPF": lambda: ndda.GuidedPF(model)}
    misfit = {}
    for name, chosen in {algorithm: made[algorithm](), "free": ndda.Bootstrap(model)}.items():
        run = ndda.Filter(chosen, num_particles=8, progress_bar=False)
        y = arguments[0] if name != "free" else np.full_like(arguments[0], np.nan)
        run.run(jax.random.key(0), y, *arguments[1:])
        x = jnp.asarray(run.result.posterior["x"][0])
        assert np.isfinite(np.asarray(x)).all()
        misfit[name] = np.sqrt(np.mean((np.asarray(jax.vmap(jax.vmap(stations))(x)).mean(0) - arguments[0]) ** 2))
    assert misfit[algorithm] < 0.5 * misfit["free"]
    tree = run.to_datatree(time=dataset.time.values[2:4])
    assert tree["posterior"]["temperature"].dims == ("chain", "draw", "time", "level", "latitude", "longitude")
    assert tree.attrs["prior"] == "WeatherNext2Prior"


@needs_package
def test_attention_memory_and_precision(prior, files, dataset, conditioning):
    other = ndda.WeatherNext2Prior.from_checkpoint(
        files.checkpoint, config=files.config, surface=dataset, attention="triblockdiag_mha", memory_budget=0.0
    )
    assert other.rematerialize
    assert other.backward_bytes() < prior.backward_bytes()
    e = jax.random.normal(jax.random.key(0), (K,))
    scale = np.maximum(np.asarray(prior.output_scale), 1e-12)
    for derivative in (
        lambda p: p.generate(e, conditioning),
        lambda p: jax.jvp(lambda v: p.generate(v, conditioning), (e,), (e,))[1],
    ):
        a, b = (np.asarray(derivative(p)) for p in (prior, other))
        rounding = np.abs(a) * 4 * np.finfo(np.float32).eps
        assert np.all(np.abs(a - b) <= 2e-4 * scale + rounding)
    low = ndda.WeatherNext2Prior.from_checkpoint(
        files.checkpoint, config=files.config, surface=dataset, precision="bfloat16"
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(low.network.parameters)} == {jnp.dtype("bfloat16")}
    a, b = (np.asarray(p.run_network(conditioning, e)) for p in (prior, low))
    assert 0 < np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)) < 0.1


@needs_package
def test_files_that_do_not_belong_together_are_refused(files, dataset, tmp_path):
    opening = ndda.WeatherNext2Prior.from_checkpoint
    with pytest.raises(FileNotFoundError, match="neither a published configuration"):
        opening(files.checkpoint, config="WeatherNext3", surface=dataset)
    with pytest.raises(ValueError, match="do not fit the configuration 'WeatherNextCyclones_Mini'"):
        opening(files.checkpoint, config="WeatherNextCyclones_Mini", surface=dataset)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        opening(files.checkpoint, config=tmp_path / "config.json", surface=dataset)
    (tmp_path / "a.npz").write_bytes(b"PK cut off")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of WeatherNext 2"):
        opening(tmp_path / "a.npz", config=files.config, surface=dataset)
    text = files.config.read_text().replace('"day_progress_cos"', '"toa_incident_solar_radiation"')
    assert json.loads(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"further inputs \['toa_incident_solar_radiation'\]"):
        opening(files.checkpoint, config=tmp_path / "config.json", surface=dataset)
