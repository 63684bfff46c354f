import datetime
import importlib.metadata
import io
import re

import jax
import numpy as np
import pandas
import pytest
import xarray as xr

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.fields import Undefined, Variable
from numpyro_diffusion_da.results import convert, summary

CHAINS, DRAWS, STEPS = 2, 64, 8
NEW_ARVIZ = int(importlib.metadata.version("arviz").split(".")[0]) >= 1


@pytest.fixture(scope="module")
def filtered(small):
    _, y = small.simulate(1, STEPS)
    y[2, 1] = np.nan
    y[5] = np.nan
    program = ndda.Filter(
        ndda.FAAPF(small.diffusion_program()), num_particles=DRAWS, num_chains=CHAINS, progress_bar=False
    )
    program.run(jax.random.key(0), y)
    return program


def made(chains=2, draws=5, steps=3, seed=0, **changes):
    """A result with a labeled state, an independent site, a multivariate one and a scalar one."""
    rng = np.random.default_rng(seed)
    lead = (chains, draws, steps)
    mask = np.ones((steps, 4), bool)
    mask[1, 2] = False
    event = np.ones((steps, 3), bool)
    event[0] = False
    event[1, 0] = False
    parts = {
        "posterior": {"a": rng.normal(size=lead), "x": rng.normal(size=(*lead, 2, 3))},
        "posterior_predictive": {
            "y": rng.normal(size=(*lead, 4)),
            "mvn": rng.normal(size=(*lead, 3)),
            "s": rng.normal(size=lead),
        },
        "log_likelihood": {
            "y": np.where(mask, rng.normal(size=(*lead, 4)), 0.0),
            "mvn": np.where(event.any(1), rng.normal(size=lead), 0.0),
            "s": rng.normal(size=lead),
        },
        "observed_data": {
            "y": np.where(mask, 1.0, np.nan),
            "mvn": np.where(event, 1.0, np.nan),
            "s": np.arange(steps, dtype=float),
        },
        "observed_error": {"y": np.full((steps, 4), 0.5), "mvn": np.full((steps, 3), 0.5), "s": np.full(steps, np.nan)},
        "forecast": None,
        "observed_mask": {"y": mask, "mvn": event, "s": np.ones(steps, bool)},
        "sample_stats": {
            "log_weights": rng.normal(size=lead),
            "ancestors": np.tile(np.arange(draws)[:, None], (chains, 1, steps)),
            "solver_residual": np.zeros(lead),
            "ess": rng.uniform(1, draws, (chains, steps)),
            "tempering": np.ones((chains, steps)),
            "distinct_ancestors": np.full((chains, steps), draws),
            "log_evidence_increment": rng.normal(size=(chains, steps)),
            "of_a_new_filter": rng.normal(size=(*lead, 7)),
        },
        "network_passes": {"forward": np.full((chains, steps), 17.0), "vjp": np.zeros((chains, steps))},
        "latent_name": "x",
        "layout": ndda.Layout((2, 3), ("level", "cell"), (("level", (500.0, 850.0)),), "K"),
        "metadata": {"places": rng.normal(size=(steps, 4, 2))},
        "attributes": {"model": "made", "algorithm": "FAAPF", "weight": "Moment()", "seed": "[0, 0]"},
    }
    return ndda.FilterResult(**{**parts, **changes})


def printed(result):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    console.print(summary.summary_table(result))
    return console.file.getvalue()


# --- DataTree --------------------------------------------------------------------------------------------------------


def test_every_array_has_its_names():
    result = made()
    tree = ndda.results.to_datatree(result)
    particle = {"chain": 2, "draw": 5, "time": 3}
    assert list(tree.children) == [name for name in convert.GROUPS if name != "prior"]
    assert all(not group.children for group in tree.children.values())
    assert list(tree["posterior"].data_vars) == ["x", "a"]  # the state first
    assert dict(tree["posterior/x"].sizes) == {**particle, "level": 2, "cell": 3}
    assert tree["posterior/x"].level.values.tolist() == [500.0, 850.0]
    assert tree["posterior/x"].attrs["units"] == "K"
    assert "units" not in tree["posterior/a"].attrs
    for group in ("posterior_predictive", "log_likelihood"):
        assert dict(tree[f"{group}/y"].sizes) == {**particle, "y_dim_0": 4}
    assert dict(tree["log_likelihood/mvn"].sizes) == particle
    assert dict(tree["posterior_predictive/mvn"].sizes) == {**particle, "mvn_dim_0": 3}
    assert dict(tree["observed_data/y"].sizes) == {"time": 3, "y_dim_0": 4}
    assert dict(tree["constant_data/y_error"].sizes) == {"time": 3, "y_dim_0": 4}
    assert tree["constant_data/y_missing"].values.tolist() == (~result.observed_mask["y"]).tolist()
    assert dict(tree["constant_data/places"].sizes) == {"time": 3, "places_dim_0": 4, "places_dim_1": 2}
    named = ndda.results.to_datatree(result, dims={"places": ["station", "axis"], "y": ["station"]})
    assert named["constant_data/places"].dims == ("time", "station", "axis")
    stats = tree["sample_stats"]
    assert dict(stats["log_weights"].sizes) == particle
    assert dict(stats["ess"].sizes) == {"chain": 2, "time": 3}
    assert dict(stats["network_passes_forward"].sizes) == {"chain": 2, "time": 3}
    assert dict(stats["of_a_new_filter"].sizes) == {**particle, "of_a_new_filter_dim_0": 7}
    for group in tree.children.values():
        # Each dimension has a coordinate: ArviZ 1's plots fail without.
        assert all(name in group.coords for name in group.sizes)
        assert group.attrs["description"]
    assert tree["observed_data"].attrs["missing_observations"] == "NaN"


def test_forecasts_are_the_prior():
    result = made()
    tree = ndda.results.to_datatree(made(forecast=result.posterior["x"] + 1.0))
    assert list(tree.children) == list(convert.GROUPS)
    assert tree["prior/x"].dims == tree["posterior/x"].dims
    assert tree["prior/x"].attrs["units"] == "K"
    assert groups_of(ndda.results.to_arviz(made(forecast=result.posterior["x"]))) == set(convert.GROUPS)


def test_values_are_those_of_the_result(filtered):
    result, tree = filtered.result, filtered.to_datatree()
    assert (tree["constant_data/y_error"] == 0.5).all()
    for group in ("posterior", "posterior_predictive", "log_likelihood", "observed_data"):
        for site, values in getattr(result, group).items():
            assert np.shares_memory(tree[f"{group}/{site}"].values, values)
    for name, values in result.sample_stats.items():
        np.testing.assert_array_equal(tree[f"sample_stats/{name}"].values, values)
        assert name in convert.STATS
        assert tree[f"sample_stats/{name}"].attrs["long_name"]
    assert tree["posterior/x"].dims == ("chain", "draw", "time", "component")
    assert tree["observed_data/y"].isnull().sum() == tree["constant_data/y_missing"].sum() == 3


def test_the_user_names_axes_and_time():
    days = np.array(["2024-01-01", "2024-01-02", "2024-01-03"], "datetime64[ns]")
    stations = ["Oslo", "Bergen", "Voss", "Moss"]
    tree = ndda.results.to_datatree(
        made(),
        time=days,
        dims={"y": ["station"], "mvn": ["wind"]},
        coords={"station": stations, "cell": [10, 20, 30]},
    )
    for group in ("posterior_predictive", "log_likelihood", "observed_data"):
        assert tree[f"{group}/y"].station.values.tolist() == stations
    assert tree["constant_data/y_missing"].dims == ("time", "station")
    assert tree["log_likelihood/mvn"].dims == ("chain", "draw", "time")
    assert tree["observed_data/mvn"].dims == ("time", "wind")
    assert tree["posterior/x"].cell.values.tolist() == [10, 20, 30]
    assert all((group.time.values == days).all() for group in tree.children.values())
    assert np.isnan(tree["observed_data/y"].sel(time="2024-01-02", station="Voss"))
    steps = xr.DataArray([0, 6, 12], dims="step", attrs={"long_name": "hours since the start"})
    assert ndda.results.to_datatree(made(), time=steps)["posterior"].time.values.tolist() == [0, 6, 12]
    assert ndda.results.to_datatree(made(), time=steps)["posterior"].time.attrs["long_name"] == "hours since the start"
    dates = [datetime.datetime(2024, 1, day) for day in (1, 2, 3)]
    assert ndda.results.to_datatree(made(), time=dates)["posterior"].time.dtype.kind == "M"
    labels = ["first", "second", "last"]
    assert ndda.results.to_datatree(made(), time=labels)["posterior"].time.values.tolist() == labels


def test_times_with_a_zone_become_utc():
    days = np.array(["2024-01-01T23", "2024-01-02T23", "2024-01-03T23"], "datetime64[ns]")
    oslo = pandas.date_range("2024-01-02", periods=3, tz="Europe/Oslo")
    for time in (oslo, list(oslo), [day.isoformat() for day in oslo], [day.to_pydatetime() for day in oslo]):
        tree = ndda.results.to_datatree(made(), time=time)
        np.testing.assert_array_equal(tree["posterior"].time.values, days)
        assert tree["posterior"].time.dtype == days.dtype  # which files take


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"time": [0, 1]}, "time has 2 values, but the filter made 3 steps"),
        ({"time": 3}, "time is 3; give one value for each of the 3 steps"),
        ({"time": "abc"}, "time is 'abc'; give one value"),
        ({"time": [0, 2, 1]}, "time goes back from 2 to 1 at positions 1 and 2"),
        ({"time": [0.0, np.nan, 2.0]}, "time has a missing value at position 1"),
        ({"time": np.array([0, 12, 12], "m8[h]")}, "time repeats 12 hours"),
        (
            {"time": np.array(["2024-01-03", "2024-01-02", "2024-01-01"], "M8[ns]")},
            "time goes back from 2024-01-03T00:00",
        ),
        ({"time": ["2024-01-03", "2024-01-02", "2024-01-01"]}, "time goes back from 2024-01-03T00:00"),
        ({"time": ["2024-01-01", "2024-01-01", "2024-01-02"]}, "time repeats 2024-01-01T00:00"),
        ({"time": ["a", "b", "a"]}, "time repeats 'a'"),
        ({"time": [datetime.datetime(2024, 1, 1), None, None]}, "missing date"),
        ({"dims": {"y": ["time", "station"]}}, "dims names 2 axes .* of 'y', which has 1 after time"),
        ({"dims": {"z": ["station"]}}, r"dims has \['z'\], but the sites are"),
        ({"dims": {"y": ["draw"]}}, "'draw' cannot name an axis of 'y'"),
        ({"dims": {"y": ["x"]}}, "'x' cannot name an axis of 'y'"),
        ({"dims": {"x": ["i", "i"]}}, "'i' cannot name an axis of 'x'"),
        ({"dims": {"y": ["i"], "mvn": ["i"]}}, "dimension 'i' has 3 values in 'mvn', but 4"),
        ({"coords": {"y_dim_0": [1]}}, "coords gives 'y_dim_0' 1 values, but 'y' has 4"),
        ({"coords": {"station": [1]}}, r"coords has \['station'\], but the dimensions are"),
        ({"coords": {"time": [1, 2, 3]}}, "cannot set 'time': give it as time="),
        ({"coords": {"draw": [1]}}, "cannot set 'draw'"),
    ],
)
def test_names_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ndda.results.to_datatree(made(), **arguments)


def test_a_state_without_its_layout_is_numbered():
    assert ndda.results.to_datatree(made(layout=None))["posterior/x"].dims[3:] == ("x_dim_0", "x_dim_1")
    other = ndda.Layout((6,), ("cell",))  # of the latent inside the prior, say
    assert ndda.results.to_datatree(made(layout=other))["posterior/x"].dims[3:] == ("x_dim_0", "x_dim_1")


def test_attributes_say_where_it_comes_from_in_plain_values():
    odd = {"flag": True, "none": None, "number": np.float32(0.5), "list": [1, 2], "seed": "[0, 1]", "count": 3}
    tree = ndda.results.to_datatree(made(attributes=odd))
    for group in (tree, *tree.children.values()):
        assert group.attrs["creation_library"] == group.attrs["inference_library"] == "numpyro_diffusion_da"
        assert group.attrs["creation_library_version"] == ndda.__version__
        assert {name: group.attrs[name] for name in odd} == {
            "flag": "True",
            "none": "None",
            "number": 0.5,
            "list": "[1, 2]",
            "seed": "[0, 1]",
            "count": 3,
        }


LAND = np.array([[True, False, False], [False, True, False]])


def gridded(levels=((500, 850), (500, 850)), chains=2, draws=5, name="sea_surface_temperature", **changes):
    """A result whose state has variables: two with levels, one of them undefined in places."""
    variables = (
        Variable("geopotential", "m2 s-2", levels[0]),
        Variable(name, "K", undefined=Undefined(LAND)),
        Variable("temperature", "K", levels[1]),
    )
    channels = sum(v.num_channels for v in variables)
    layout = ndda.Layout(
        (2, 3, channels),
        ("latitude", "longitude", "channel"),
        (("latitude", (-45.0, 45.0)), ("longitude", (0.0, 120.0, 240.0))),
        variables=variables,
    )
    x = np.random.default_rng(0).normal(280, 5, (chains, draws, 3, *layout.shape)).astype(np.float32)
    x[..., LAND, len(levels[0])] = 271.0
    posterior = {"a": made(chains, draws).posterior["a"], "x": x}
    return made(chains, draws, **{"posterior": posterior, "forecast": x + 1.0, "layout": layout, **changes})


def test_a_gridded_state_is_one_variable_for_every_field():
    result = gridded()
    x = result.posterior["x"]
    tree = ndda.results.to_datatree(result)
    assert list(tree["posterior"].data_vars) == ["geopotential", "sea_surface_temperature", "temperature", "a"]
    assert list(tree["prior"].data_vars) == ["geopotential", "sea_surface_temperature", "temperature"]
    temperature, sea = tree["posterior/temperature"], tree["posterior/sea_surface_temperature"]
    assert temperature.dims == ("chain", "draw", "time", "level", "latitude", "longitude")
    assert sea.dims == ("chain", "draw", "time", "latitude", "longitude")
    np.testing.assert_array_equal(temperature.sel(level=850), x[..., 4])
    np.testing.assert_array_equal(tree["prior/temperature"].sel(level=500), x[..., 3] + 1.0)
    np.testing.assert_array_equal(np.isnan(sea), np.broadcast_to(LAND, sea.shape))
    assert np.shares_memory(temperature.values, x)
    assert temperature.dtype == sea.dtype == np.float32
    assert temperature.attrs["units"] == "K"
    assert temperature.attrs["site"] == "x"
    assert tree["posterior/geopotential"].attrs["units"] == "m2 s-2"
    assert tree["posterior"].latitude.values.tolist() == [-45.0, 45.0]
    assert tree["posterior"].latitude.attrs["units"] == "degrees_north"
    assert tree["posterior"]["level"].values.tolist() == [500, 850]  # .level is the depth of a tree
    assert dict(tree["observed_data/y"].sizes) == {"time": 3, "y_dim_0": 4}
    np.testing.assert_array_equal(
        ndda.results.to_datatree(gridded(forecast=None))["posterior/temperature"], temperature
    )
    other = ndda.results.to_datatree(gridded(), coords={"longitude": [0, 1, 2]})
    assert other["posterior/temperature"].longitude.values.tolist() == [0, 1, 2]


def test_fields_with_levels_of_their_own():
    tree = ndda.results.to_datatree(gridded(((500, 850), (850, 1000))))
    assert tree["posterior/geopotential"].dims[3] == "level"
    assert tree["posterior/temperature"].dims[3] == "temperature_level"
    assert tree["posterior"].temperature_level.values.tolist() == [850, 1000]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (
            {},
            {"dims": {"x": ["i", "j", "k"]}},
            "dims names the axes of 'x', but its layout splits it into the fields geo",
        ),
        ({"name": "a"}, {}, "the state 'x' has a field 'a', which is the name of another site"),
        ({"name": "draw"}, {}, "the state 'x' has a field 'draw'"),
        ({"name": "level"}, {}, "the state 'x' has a field 'level'"),
        ({}, {"coords": {"channel": range(5)}}, r"coords has \['channel'\], but the dimensions are"),
        ({}, {"dims": {"y": ["latitude"]}}, "dimension 'latitude' has 4 values in 'y', but 2"),
    ],
)
def test_names_that_a_gridded_state_cannot_have(changes, arguments, message):
    with pytest.raises(ValueError, match=message):
        ndda.results.to_datatree(gridded(**changes), **arguments)


def test_a_gridded_state_goes_to_files_and_to_arviz(tmp_path):
    import arviz as az

    tree = ndda.results.to_datatree(gridded())
    tree.to_netcdf(tmp_path / "result.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "result.nc", engine="h5netcdf") as back:
        xr.testing.assert_identical(back.load(), tree)
    data = ndda.results.to_arviz(gridded(draws=64))
    assert groups_of(data) == set(convert.GROUPS)
    rhat = az.rhat(data, method="identity")
    rhat = rhat.to_dataset() if NEW_ARVIZ and isinstance(rhat, xr.DataTree) else rhat
    found = rhat["temperature"].isel(time=-1)
    assert found.dims == ("level", "latitude", "longitude")
    own = summary.chain_r_hat(gridded(draws=64).posterior["x"][:, :, -1])
    np.testing.assert_allclose(found.transpose("latitude", "longitude", "level"), own[..., 3:], rtol=1e-4)


@pytest.mark.parametrize("fmt", ["netcdf", "zarr"])
def test_round_trip(filtered, tmp_path, fmt):
    tree = filtered.to_datatree(
        time=np.arange("2024-01-01", "2024-01-09", dtype="datetime64[D]").astype("datetime64[ns]"),
        dims={"y": ["station"]},
        coords={"station": [3, 7]},
    )
    tree["sample_stats/log_weights"][0, 0, 0] = -np.inf
    path = tmp_path / f"result.{fmt}"
    if fmt == "netcdf":
        tree.to_netcdf(path, engine="h5netcdf")
        back = xr.open_datatree(path, engine="h5netcdf")
    else:
        tree.to_zarr(path, consolidated=False)
        back = xr.open_datatree(path, engine="zarr", consolidated=False)
    with back:
        xr.testing.assert_identical(back.load(), tree)
        for name, group in tree.children.items():
            assert back[name].to_dataset().dtypes == group.to_dataset().dtypes


def test_names_of_stations_go_through_netcdf(tmp_path):
    tree = ndda.results.to_datatree(
        made(), dims={"y": ["station"]}, coords={"station": ["Oslo", "Bergen", "Voss", "Ås"]}
    )
    tree.to_netcdf(tmp_path / "result.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "result.nc", engine="h5netcdf") as back:
        assert back["observed_data/y"].station.values.tolist() == ["Oslo", "Bergen", "Voss", "Ås"]


@pytest.mark.slow
def test_verification_reads_a_result(filtered):
    tree = filtered.to_datatree()
    predicted, y = tree["posterior_predictive/y"].isel(chain=0), tree["observed_data/y"]
    assert ndda.diagnostics.rank_histogram(predicted, y, member="draw").sum() == pytest.approx(13)
    assert np.isnan(ndda.diagnostics.crps(predicted, y, member="draw", axis="y_dim_0").values).tolist() == [
        t == 5 for t in range(8)
    ]


# --- ArviZ -----------------------------------------------------------------------------------------------------------


def groups_of(data):
    return set(data.children) if NEW_ARVIZ else set(data.groups())


def dataset(data, group):
    return data[group].to_dataset() if NEW_ARVIZ else data[group]


def test_arviz_is_given_its_own_type(filtered):
    import arviz as az

    data = filtered.to_arviz()
    assert type(data) is (xr.DataTree if NEW_ARVIZ else az.InferenceData)
    assert groups_of(data) == set(convert.GROUPS) - {"prior"}
    assert data.attrs["creation_library"] == "numpyro_diffusion_da"
    assert dataset(data, "posterior").attrs["num_particles"] == DRAWS
    assert "posterior" in repr(data)
    assert data._repr_html_()


def test_arviz_is_given_only_what_was_observed():
    result = made()
    data = ndda.results.to_arviz(result, time=[10, 20, 30], dims={"y": ["station"]}, coords={"station": list("abcd")})
    assert data["constant_data"]["places"].dims == ("time", "places_dim_0", "places_dim_1")
    observed, predicted = dataset(data, "observed_data"), dataset(data, "posterior_predictive")
    kept = result.observed_mask["y"]
    at = list(zip(*np.nonzero(kept), strict=True))
    assert dict(observed["y"].sizes) == {"y_observed": 11}
    assert dict(predicted["y"].sizes) == {"chain": 2, "draw": 5, "y_observed": 11}
    assert observed["y_time"].values.tolist() == [[10, 20, 30][t] for t, _ in at]
    assert observed["y_station"].values.tolist() == ["abcd"[i] for _, i in at]
    for i, (t, j) in enumerate(at):
        np.testing.assert_array_equal(predicted["y"].values[..., i], result.posterior_predictive["y"][:, :, t, j])
    log_likelihood = dataset(data, "log_likelihood")
    # A multivariate site has one log-likelihood a time: the second, observed in part, counts; the first does not.
    np.testing.assert_array_equal(log_likelihood["mvn"].values, result.log_likelihood["mvn"][:, :, 1:])
    assert log_likelihood["mvn_time"].values.tolist() == [20, 30]
    assert observed["mvn"].sizes == {"mvn_observed": 5}
    assert observed.attrs["missing_observations"] == "left out"
    np.testing.assert_array_equal(observed["s"].values, result.observed_data["s"])
    assert not any(np.isnan(values).any() for values in observed.values())


def test_a_site_without_observations_is_left_out_for_arviz():
    result = made()
    nothing = {**result.observed_mask, "y": np.zeros((3, 4), bool)}
    data = ndda.results.to_arviz(made(observed_mask=nothing))
    for group in ("posterior_predictive", "log_likelihood", "observed_data"):
        assert set(dataset(data, group)) == {"mvn", "s"}
    none = {site: np.zeros_like(mask) for site, mask in nothing.items()}
    assert groups_of(ndda.results.to_arviz(made(observed_mask=none))) == {"posterior", "constant_data", "sample_stats"}


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")  # few particles
def test_arviz_statistics(filtered):
    import arviz as az

    data = filtered.to_arviz()
    table = az.summary(data, var_names=["x"])
    assert len(table) == STEPS * 4
    assert {"mean", "sd", "r_hat", "ess_bulk"} <= set(table.columns)
    mean = filtered.result.posterior["x"].mean((0, 1)).reshape(-1)
    assert table["mean"].astype(float).to_numpy() == pytest.approx(mean, abs=0.05)  # it is rounded
    for ess in (az.ess(data, var_names=["x"]), az.rhat(data, var_names=["x"])):
        assert dict(ess["x"].sizes) == {"time": STEPS, "component": 4}
        assert np.isfinite(ess["x"].values).all()
    assert az.hdi(data)["x"].shape == (STEPS, 4, 2)
    loo = az.loo(data, pointwise=True)
    assert loo.n_data_points == 13
    assert np.isfinite(loo.pareto_k).all()
    assert np.shape(az.loo_pit(data, y="y") if not NEW_ARVIZ else az.loo_pit(data)["y"]) == (13,)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
def test_arviz_plots(filtered):
    import arviz as az
    import matplotlib.pyplot as plt

    data = filtered.to_arviz()
    some = {"var_names": ["x"], "coords": {"time": [0, 7], "component": [1]}}
    plots = [
        lambda: az.plot_trace(data, **some),
        lambda: az.plot_rank(data, **some),
        lambda: az.plot_autocorr(data, **some),
        lambda: az.plot_forest(data, **some),
        lambda: az.plot_pair(data, var_names=["x"], coords={"time": [7]}),
        lambda: az.plot_khat(az.loo(data, pointwise=True)),
    ]
    if NEW_ARVIZ:
        plots += [lambda: az.plot_trace_dist(data, **some), lambda: az.plot_dist(data, **some)]
        plots += [lambda: az.plot_ppc_dist(data), lambda: az.plot_ppc_pit(data), lambda: az.plot_ppc_interval(data)]
        plots += [lambda: az.plot_loo_pit(data)]
    else:
        plots += [lambda: az.plot_posterior(data, **some), lambda: az.plot_ppc(data), lambda: az.plot_bpv(data)]
        plots += [lambda: az.plot_loo_pit(data, y="y")]
    for plot in plots:
        plot()
        plt.close("all")


def test_r_hat_is_that_of_arviz_and_tells_the_error_of_a_filter():
    import arviz as az

    # Filters whose means carry the error of n independent draws, each with many particles around its mean.
    chains, draws, n = 400, 100, 10
    rng = np.random.default_rng(0)
    shift = rng.normal(size=(chains, 1, 1, 1)) / np.sqrt(n)
    within = rng.normal(size=(chains, draws, 3, 4))
    x = shift + (within - within.mean(1, keepdims=True)) / within.std(1, ddof=1, keepdims=True)
    r_hat = summary.chain_r_hat(x)
    # Same answer from ArviZ.
    data = xr.Dataset({"x": (("chain", "draw", "time", "i"), x)})
    data = data.assign_coords({name: np.arange(size) for name, size in data.sizes.items()})
    theirs = az.rhat(data, method="identity")["x"]
    np.testing.assert_allclose(r_hat, theirs.values, rtol=1e-12)
    # R-hat^2 = 1 + 1/n - 1/N, within the error of a variance from so many chains.
    assert np.all(np.abs(r_hat**2 - (1 + 1 / n - 1 / draws)) < 4 * np.sqrt(2 / chains) / n)
    assert np.isnan(summary.chain_r_hat(x[:1])).all()


def test_loo_is_that_of_the_filter_up_to_its_time():
    """Against the Kalman filter, in place of whose distributions a result has independent draws."""
    import arviz as az

    rng = np.random.default_rng(0)
    d, steps, chains, draws, error = 4, 6, 4, 1000, 1.5
    transition = 0.95 * np.linalg.qr(rng.normal(size=(d, d)))[0]
    noise = 0.25 * np.eye(d)
    rows = np.eye(d)[::2]
    y = rng.normal(size=(steps, 2)) * 2

    def update(mean, cov, h, value):
        inner = h @ cov @ h.T + error**2 * np.eye(len(h))
        gain = cov @ h.T @ np.linalg.inv(inner)
        return mean + gain @ (value - h @ mean), cov - gain @ h @ cov

    mean, cov = np.zeros(d), np.eye(d)
    x, exact = np.empty((chains, draws, steps, d)), np.empty((steps, 2))
    for t in range(steps):
        mean, cov = transition @ mean, transition @ cov @ transition.T + noise
        for j in range(2):
            left_mean, left_cov = update(mean, cov, rows[[1 - j]], y[t, [1 - j]])
            variance = rows[j] @ left_cov @ rows[j] + error**2
            exact[t, j] = -0.5 * ((y[t, j] - rows[j] @ left_mean) ** 2 / variance + np.log(2 * np.pi * variance))
        mean, cov = update(mean, cov, rows, y[t])
        x[:, :, t] = rng.multivariate_normal(mean, cov, size=(chains, draws))
    log_likelihood = -0.5 * ((y - x @ rows.T) ** 2 / error**2 + np.log(2 * np.pi * error**2))
    result = made(
        chains=chains,
        draws=draws,
        steps=steps,
        posterior={"x": x},
        posterior_predictive={"y": x @ rows.T},
        log_likelihood={"y": log_likelihood},
        observed_data={"y": y},
        observed_error={"y": np.full_like(y, error)},
        observed_mask={"y": np.ones_like(y, bool)},
        layout=None,
    )
    loo = az.loo(ndda.results.to_arviz(result), pointwise=True)
    estimate = (loo.elpd_i if NEW_ARVIZ else loo.loo_i).values
    # elpd_i = -log mean(1 / p): its standard error is that of the mean, relative.
    inverse = np.exp(-log_likelihood).reshape(-1, steps * 2)
    error_of = inverse.std(0, ddof=1) / inverse.mean(0) / np.sqrt(len(inverse))
    assert np.all(np.abs(estimate - exact.reshape(-1)) < 4.5 * error_of)


# --- what is printed -------------------------------------------------------------------------------------------------


def test_summary_of_a_run(filtered, capsys):
    filtered.print_summary()
    text = capsys.readouterr().out
    for words in ("FAAPF on 'model'", "64 x 2 x 8", "13 of 16", "ESS before tempering", "component=3", "r_hat", "vjp"):
        assert words in text
    assert "not an unbiased estimate" in text
    assert "Dirac" in text
    assert re.search(r"sampler's variance error\s+at most 2.5% for a Gaussian mode", text)
    worst = filtered.result.sample_stats["solver_residual"].max()
    assert f"{worst:.1e}" in text
    total = filtered.result.sample_stats["log_evidence_increment"].sum(1, dtype=float)
    assert f"{total.mean():.2f} (sd {total.std(ddof=1):.2f} over chains)" in text


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"sampler_variance_error": 0.255}, "25.5% .*default, has at most 3%"),
        ({"sampler_variance_error": 0.41, "unresolved_modes": "0.014 to 1.4, resolved 0.04 to 5.3"},
         "41.0% .*deviations 0.014 to 1.4, resolved 0.04 to 5.3 .*wider noise_range"),
    ],
)  # fmt: skip
def test_summary_says_what_to_do_about_inaccurate_draws(attributes, said):
    text = printed(made(attributes={"algorithm": "FAAPF", **attributes}))
    assert re.search(said, " ".join(text.split()))


def test_summary_shows_the_worst_of_a_large_state():
    x = np.random.default_rng(0).normal(size=(2, 200, 3, 2, 500))
    x[1, :, -1, 1, 321] += 5.0
    layout = ndda.Layout((2, 500), ("level", "cell"), (("level", (500.0, 850.0)),), "K")
    text = printed(made(draws=200, posterior={"x": x}, layout=layout))
    assert "the 8 of 1000 values with the largest r_hat" in text
    rows = [line for line in text.splitlines() if "level=" in line]
    assert len(rows) == 8
    assert "x[level=850.0, cell=321]" in rows[0]
    assert " K " in rows[0]
    assert "no linear solves" in text
    assert "17 forward per particle" in text


def test_summary_names_the_fields_of_a_gridded_state():
    result = gridded(draws=200)
    result.posterior["x"][1, :, -1, 1, 2, 4] += 50.0
    text = printed(result)
    assert "x at the last time: the 8 of 28 values with the largest r_hat" in text  # 30 less 2 of land
    rows = [line.split() for line in text.splitlines() if "latitude=" in line]
    assert len(rows) == 8
    first = next(line for line in text.splitlines() if "latitude=" in line)
    assert "temperature[level=850, latitude=45.0, longitude=240.0]" in first
    assert " K " in first
    everything = gridded(draws=200)
    console_rows = summary._state_table(everything, 100).columns[0]._cells
    labels = [str(cell) for cell in console_rows]
    assert len(labels) == 28
    assert sum(label.startswith("sea_surface_temperature[latitude=") for label in labels) == 4
    assert sum(label.startswith("geopotential[level=500, ") for label in labels) == 6


def test_summary_of_one_chain_and_of_equal_weights():
    text = printed(made(chains=1))
    assert "over chains" not in text
    assert [line.split()[-1] for line in text.splitlines() if "level=" in line] == ["-"] * 6
    equal = made().sample_stats | {"log_weights": np.zeros((2, 5, 3))}
    text = printed(made(sample_stats=equal, layout=None))
    assert "no selection, no log-evidence" in text
    assert "x[1, 2]" in text
    scalar = printed(made(posterior={"x": np.ones((2, 1, 3))}, layout=None))
    assert "x at the last time" in scalar


@pytest.mark.parametrize(
    ("known", "tempering", "expected"),
    [
        ("", 1.0, []),
        ("Dirac weights leave out", 1.0, ["Dirac"]),
        ("Dirac weights leave out", 0.5, ["tempered in 100%", "Dirac"]),
        ("Moment: transitions; Moment: observations", 1.0, ["transitions", "observations"]),
        ("", 0.5, ["tempered in 100%"]),
    ],
)
def test_bias_reasons_of_the_log_evidence(known, tempering, expected):
    changed = made().sample_stats | {"tempering": np.full((2, 3), tempering)}
    bias_reasons = ndda.results.evidence_bias_reasons(
        made(attributes={"evidence_bias_reasons": known}, sample_stats=changed)
    )
    assert len(bias_reasons) == len(expected)
    assert all(word in reason for word, reason in zip(expected, bias_reasons, strict=True))


def test_nothing_to_convert_before_a_run(small):
    program = ndda.Filter(ndda.FAAPF(small.diffusion_program()), num_particles=2)
    for call in (program.to_datatree, program.to_arviz, program.print_summary):
        with pytest.raises(RuntimeError, match="has not run"):
            call()
