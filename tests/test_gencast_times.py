"""Times and values that GenCast's prior takes, without GenCast's package: the prior is made by hand."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pandas
import pytest
import xarray as xr

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.fields import Undefined, Variable

LATITUDE, LONGITUDE = np.linspace(-90.0, 90.0, 4), np.arange(6) * 60.0
TIMES = np.datetime64("2019-03-29T00", "ns") + np.arange(5) * np.timedelta64(6, "h")
LAND = np.zeros((4, 6), bool)
LAND[1, 1] = True
SST = "sea_surface_temperature"
H12 = TIMES[::2]


@pytest.fixture(scope="module")
def prior():
    layout = ndda.Layout(
        (4, 6, 2),
        ("latitude", "longitude", "channel"),
        {"latitude": LATITUDE, "longitude": LONGITUDE},
        variables=(Variable("2m_temperature", "K"), Variable(SST, "K", undefined=Undefined(LAND))),
    )
    per_channel, state = jnp.array([278.0, 287.0]), jnp.full(layout.shape, 271.0)
    return ndda.GenCastPrior(
        network=None,
        noise=ndda.diffusion.WhiteNoise(),
        statics=jnp.zeros((4, 6, 2)),
        mean=per_channel,
        stddev=jnp.array([21.0, 11.0]),
        offset=state,
        keep=state,
        latent_scale=state,
        forcing_mean=jnp.zeros(4),
        forcing_stddev=jnp.ones(4),
        input_channels=(0, 1),
        layout=layout,
        noise_range=(0.02, 80.0),
        rematerialize=False,
        description="made by hand",
        conditioning_passes=0,
    )


def dataset(**changed):
    rng = np.random.default_rng(0)
    values = {name: rng.normal(285.0, 5.0, (5, 4, 6)) for name in ("2m_temperature", SST)}
    values[SST] = np.where(LAND, np.nan, values[SST])
    dims = ("time", "latitude", "longitude")
    variables = {name: (dims, v, {"units": "K"}) for name, v in {**values, **changed}.items()}
    return xr.Dataset(variables, {"time": TIMES, "latitude": LATITUDE, "longitude": LONGITUDE})


def test_frames_are_read(prior):
    frames = prior.frames(dataset(), H12)
    np.testing.assert_array_equal(frames[..., 0], dataset()["2m_temperature"].values[::2].astype(np.float32))
    assert (frames[:, LAND, 1] == 271.0).all()
    zone = pandas.DatetimeIndex(H12).tz_localize("UTC").tz_convert("America/Caracas")
    np.testing.assert_array_equal(prior.frames(dataset(), zone), frames)
    for ours, others in zip(prior.forcings(H12), prior.forcings(zone), strict=True):
        np.testing.assert_array_equal(ours, others)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (TIMES[:2], "need times 12 h apart, but 2019-03-29T00:00 is followed by 2019-03-29T06:00, 6 h later"),
        (H12[::-1], "2019-03-30T00:00 is followed by 2019-03-29T12:00, -12 h later"),
        (H12[[0, 0]], "2019-03-29T00:00 is followed by 2019-03-29T00:00, 0 h later"),
        (H12[[0, 2]], "24 h later"),
        ([0, 12], "give a list of dates"),
        ([H12[0], np.datetime64("NaT", "ns")], "missing date"),
    ],
)
def test_times_of_another_spacing_are_refused(prior, times, message):
    for call in (prior.forcings, lambda at: prior.frames(dataset(), at)):
        with pytest.raises(ValueError, match=message):
            call(times)


def test_values_far_from_the_training_are_refused(prior):
    for name in ("2m_temperature", SST):
        values = dataset()[name].values
        for wrong in (values - 273.15, np.where(LAND, np.nan, 9.96921e36), 0.1 * values):
            with pytest.raises(ValueError, match=f"'{name}'"):
                prior.frames(dataset(**{name: wrong}), H12)
    with pytest.raises(ValueError, match="'2m_temperature' has the mean 140, but 278 with a standard dev"):
        prior.frames(dataset(**{"2m_temperature": np.full((5, 4, 6), 140.0)}), H12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.isel(level=[0]), r"'temperature' in mean_by_level.nc lack the levels \[850\] hPa"),
        (lambda d: d.where(d.level > 500), r"'temperature' in mean_by_level.nc are \[nan, 1.0\]; expected finite"),
        (lambda d: d.drop_vars("temperature"), "mean_by_level.nc have no variable 'temperature'"),
    ],
)
def test_statistics_that_are_incomplete_are_refused(change, message):
    layout = ndda.Layout((2,), ("channel",), variables=(Variable("temperature", "K", (500, 850)),))
    whole = xr.Dataset({"temperature": ("level", [1.0, 1.0])}, {"level": [500, 850]})
    whole_of_all = dict.fromkeys(("mean", "stddev", "diffs_stddev", "min"), whole)
    channel_statistics = ndda.priors.weathernext.statistics.channel_statistics
    sources = dict.fromkeys(whole_of_all, "mean_by_level.nc")
    assert channel_statistics(layout, whole_of_all, ("temperature",), sources).mean.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=message):
        channel_statistics(layout, {**whole_of_all, "mean": change(whole)}, ("temperature",), sources)


def test_statistics_that_are_damaged_are_refused(tmp_path):
    for name in ("mean_by_level.nc", "stddev_by_level.nc", "diffs_stddev_by_level.nc", "min_by_level.nc"):
        (tmp_path / name).write_bytes(b"no netCDF")
    with pytest.raises(ValueError, match=r"file '.*mean_by_level.nc' of stats= cannot be read as netCDF"):
        ndda.priors.read_gencast_statistics(tmp_path)


def test_a_checkpoint_that_is_damaged_is_refused(tmp_path, monkeypatch):
    package = SimpleNamespace(
        checkpoint=SimpleNamespace(load=lambda file, kind: np.load(file)), gencast=SimpleNamespace(CheckPoint=None)
    )
    monkeypatch.setattr(ndda.priors.gencast.prior, "import_weathernext", lambda: package)
    (tmp_path / "gencast.npz").write_bytes(b"PK cut off")
    with pytest.raises(ValueError, match=r"file '.*gencast.npz' cannot be read as a checkpoint of GenCast"):
        ndda.GenCastPrior.from_checkpoint(tmp_path / "gencast.npz", stats=tmp_path, surface=dataset())
