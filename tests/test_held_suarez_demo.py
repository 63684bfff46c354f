"""The weather twin: its truth, its scores, and a small run of its filters."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import EXAMPLES, load_program
from test_networks import LAYOUT
from test_spherical_prior import small_emulator

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import held_suarez_demo as twin
from numpyro_diffusion_da.demos import held_suarez_figures as plots_weather
from numpyro_diffusion_da.demos import held_suarez_truth as held_suarez
from numpyro_diffusion_da.observation import BlockMeans, Stations, Swath


def test_truth_is_what_was_packed(tmp_path):
    values = np.random.default_rng(0).normal([1000.0, 250.0], [5.0, 2.0], (3, 4, 8, 2)).astype(np.float32)
    packed = load_program(EXAMPLES / "mini_weather" / "packing.py").packed(values)
    np.savez(tmp_path / "held_suarez_truth.npz", **packed)
    np.testing.assert_allclose(held_suarez.truth(tmp_path), values, atol=1e-3)
    with pytest.raises(ValueError, match=r"lack \['offset', 'scale'\]"):
        held_suarez.unpacked({"packed": values})
    with pytest.raises(ValueError, match="one number for each channel"):
        held_suarez.unpacked({**packed, "scale": np.ones(3)})


@pytest.mark.slow
def test_scores_are_by_area_and_channel():
    """Of a run that is known, against the weighted sums written out."""
    rng = np.random.default_rng(0)
    cycles, members = 5, 6
    states = rng.normal(size=(cycles, 8, 16, 3)).astype(np.float32)
    particles = states[None] + rng.normal(0.3, 1.0, (members, cycles, 8, 16, 3)).astype(np.float32)
    weights = np.arange(1.0, 9.0) / 36.0
    scale = np.array([4.0, 1.0, 2.0])
    prior = SimpleNamespace(
        state_scale=scale, layout=LAYOUT, noise=SimpleNamespace(harmonics=SimpleNamespace(weights=weights))
    )
    passes = ndda.results.MeanPasses(7.0, 2.0)
    result = SimpleNamespace(posterior={"x": particles[None]}, mean_passes=lambda: passes)
    network = Stations({"surface_pressure": 1.0}, count=3)
    run = twin.summarize_run(result, states, prior, network, 2)
    squares = np.einsum("tjqc,j->tc", (particles.mean(0) - states) ** 2, weights) / 16
    np.testing.assert_allclose(run.rmse, np.sqrt(squares) / scale, rtol=1e-5)
    variance = np.einsum("tjqc,j->tc", particles.var(0, ddof=1), weights) / 16
    np.testing.assert_allclose(run.spread_by_time, np.sqrt((1 + 1 / members) * variance) / scale, rtol=1e-5)
    by_hand = ndda.diagnostics.crps(
        particles[:, 3, ..., 2], states[3, ..., 2], weights=np.repeat(weights[:, None], 16, 1)
    )
    np.testing.assert_allclose(run.crps[3, 2], by_hand / 2.0, rtol=1e-5)
    assert run.ranks.shape == (3, members + 1)
    assert run.ranks.sum() == 3 * 3 * 2 * 4  # channels, scored cycles, every fourth latitude and longitude
    assert run.at_stations.shape == (members, cycles, 3, 3)
    assert (run.passes, run.conditioning) == passes

    observed = np.array([True, False, True])
    whole = twin.WeatherResult({twin.FREE: [run]}, states[None], {}, observed, 2)
    scores = whole.scores(twin.FREE)
    late = squares[2:] / scale**2
    np.testing.assert_allclose(scores["rmse"], np.sqrt(late.mean()), rtol=1e-5)
    np.testing.assert_allclose(scores["rmse_observed"], np.sqrt(late[:, observed].mean()), rtol=1e-5)
    np.testing.assert_allclose(scores["rmse_unobserved"], np.sqrt(late[:, 1].mean()), rtol=1e-5)


def test_wrong_experiments():
    with pytest.raises(ValueError, match="more cycles"):
        twin.WeatherExperiment(cycles=5, spin_up=5)
    with pytest.raises(ValueError, match="start_error=0"):
        twin.WeatherExperiment(start_error=0.0)
    with pytest.raises(ValueError, match="target_ess=2"):
        twin.WeatherExperiment(target_ess=2.0).filters(ndda.load_prior("held_suarez"))
    prior = SimpleNamespace(layout=LAYOUT)
    with pytest.raises(ValueError, match=r"\(4, 8, 16, 3\)"):
        twin.run_weather_twin(twin.WeatherExperiment(cycles=3, spin_up=1), prior, np.zeros((1, 3, 8, 16, 3)))
    with pytest.raises(ValueError, match=r"\['best'\]"):
        twin.run_weather_twin(
            twin.WeatherExperiment(cycles=3, spin_up=1), prior, np.zeros((1, 4, 8, 16, 3)), only=("best",)
        )
    with pytest.raises(ValueError, match="processes=0"):
        twin.run_weather_twin(
            twin.WeatherExperiment(cycles=3, spin_up=1), prior, np.zeros((1, 4, 8, 16, 3)), processes=0
        )


def test_what_falls_short_is_said():
    def result(spread, ranks):
        states = np.zeros((1, 4, 8, 16, 2))
        error = np.ones((4, 2))
        run = twin.WeatherRun(states[0], states[0], error, spread * error, error, ranks, states, states[0], 27.0, 2.0)
        return twin.WeatherResult({twin.MAIN: [run]}, states, {}, np.array([True, False]), 2)

    flat, deep = np.full(26, 10), np.array([20, *[8] * 24, 20])
    prior = SimpleNamespace(card={})
    assert twin.shortfalls(prior, result(1.0, np.stack([flat, flat]))) == []
    narrow = twin.shortfalls(prior, result(0.7, np.stack([flat, deep])))
    assert "is 0.70 times its error; it should be 0.8 to 1.2 times" in narrow[0]
    assert "unobserved variables is U-shaped: its end bars are 1.6 times" in narrow[1]  # (20 + 8) / 2 over 232 / 26
    card = {"validation": {"one_step": {"crps_over_persistence": [0.2, 0.312]}, "climate": {"power": [0.05, -0.2]}}}
    (emulator,) = twin.shortfalls(SimpleNamespace(card=card), result(1.0, np.stack([flat, flat])))
    assert "0.31 (limit 0.3)" in emulator
    assert "-0.2 (limit 0.1)" in emulator
    assert "variance" not in emulator


@pytest.mark.slow
def test_processes_do_not_change_a_run(monkeypatch):
    # Processes read what is compiled here, and write nothing: two would write the same entries.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1e9")
    prior = small_emulator()
    networks = {"stations": Stations({"surface_pressure": 1.0}, count=5)}
    experiment = twin.WeatherExperiment(networks, cycles=2, spin_up=1)
    states = np.asarray(prior.climatology().sample(jax.random.key(1), (3,)))[None]
    done = []
    one, two = (
        twin.run_weather_twin(
            experiment,
            prior,
            states,
            num_particles=4,
            only=(twin.ENKF, twin.FREE),
            processes=processes,
            on_done=done.append,
        )
        for processes in (1, 2)
    )
    assert list(one.runs) == list(two.runs) == [twin.FREE, twin.ENKF]
    assert sorted(done) == sorted(2 * [twin.FREE, twin.ENKF])
    for name, (run,) in one.runs.items():
        np.testing.assert_allclose(run.last, two.runs[name][0].last, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_small_run_and_its_figures():
    prior = small_emulator()
    networks = {
        "stations": Stations({"surface_pressure": 1.0, "v_component_of_wind_500": 0.8}, count=5),
        "swath": Swath({"temperature_500": 0.6}, width=90.0, thinning=2),
        "blocks": BlockMeans({"temperature_500": 0.3}, size=4),
    }
    experiment = twin.WeatherExperiment(networks, cycles=2, spin_up=1, target_ess=0.6)
    assert experiment.filters(prior)[twin.LOCAL].target_ess == 0.6
    states = np.asarray(prior.climatology().sample(jax.random.key(1), (3,)))
    only = (twin.MAIN,)
    result = twin.run_weather_twin(experiment, prior, states[None], num_particles=4, only=only)
    assert result.observed.tolist() == [True, True, False, True]
    assert result.observations["stations"].shape == (2, 5, 2)
    assert np.isnan(result.observations["swath"]).any(axis=(1, 2)).all()
    assert all(np.isfinite(values).all() for values in result.scores(twin.MAIN).values())
    # The run's scores are of the members that it kept, at their time.
    run = result.runs[twin.MAIN][0]
    np.testing.assert_allclose(run.last.mean(0), run.mean[-1], rtol=1e-4, atol=1e-4)
    squares = np.einsum("jqc,j->c", (run.mean[-1] - states[2]) ** 2, prior.noise.harmonics.weights) / states.shape[2]
    np.testing.assert_allclose(run.rmse[-1], np.sqrt(squares) / np.asarray(prior.state_scale), rtol=1e-3)
    tree = twin.to_datatree(experiment, prior, result)
    assert tree["truth/temperature"].dims == ("time", "level", "latitude", "longitude")
    np.testing.assert_allclose(tree["FA-APF_moved/temperature"][1, 0], result.runs[twin.MAIN][0].mean[1, ..., 1])
    assert tree["observations/stations/surface_pressure"].attrs["error"] == 1.0
    result.runs[twin.FREE] = result.runs[twin.MAIN]  # figures compare the two
    names = ("surface_pressure", "u_component_of_wind_500")
    skill = plots_weather.skill_over_time(experiment, prior, result)
    assert [axes.get_title() for axes in skill.axes].count("u 500 hPa") == 1
    assert len(plots_weather.spread_and_error(experiment, result).axes) == 4
    assert len(plots_weather.maps(experiment, prior, result, names[1], (0.5, 1)).axes) == 12
    assert len(plots_weather.at_station(experiment, prior, result, names).axes) == 2
    assert len(plots_weather.rank_histograms(result).axes) == 4
