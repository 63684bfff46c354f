"""Twin experiment with weather: a known truth on the sphere, a sparse observing network, and several filters.

The truth is a run of a dry general circulation model, and all filters use a diffusion emulator of it. Only the surface
and the lowest level are observed, so all information about the levels above comes through the emulator. All filters
start from an ensemble whose mean has an error of half the standard deviation of the climate, with a matching spread.
The free ensemble, which gets no observations, is the reference that each filter must beat.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos.held_suarez_truth import STEP_HOURS
from numpyro_diffusion_da.demos.scores import check_spin_up, summarized, table_of_scores

if TYPE_CHECKING:
    from rich.table import Table
    from xarray import DataTree

FREE, GUIDED, GLOBAL, LOCAL, ENKF, ENKF_V, MAIN = FILTERS = (
    "free ensemble",
    "equal weights",
    "FA-APF",
    "FA-APF, local",
    "EnKF, emulator",
    "EnKF with V",
    "FA-APF, moved",
)
NEAR_GROUND = ("surface_pressure", "temperature_850", "u_component_of_wind_850", "v_component_of_wind_850")
"""Channels that the default network observes."""

COLUMNS = {
    "passes": "passes",
    "rmse": "RMSE",
    "rmse_observed": "obs.",
    "rmse_unobserved": "unobs.",
    "spread_skill": "spread/\nskill",
    "crps": "CRPS",
}
"""Headings of the scores in the table."""

PLUS = {"passes": "conditioning"}
"""Scores that stand behind another one in its column."""

SAMPLER = ndda.Sampler(ndda.DPMSolverPP2M(), ndda.KarrasSchedule(8, rho=20.0, lowest=0.1))
"""Sampler for observation errors near the one-step spread; docs/mini_weather.md has its error."""

GUIDED_ERRORS = 1.6
"""Factor on the errors of the emulator in guided filters, because the errors are correlated from step to step."""

MOVED_ERRORS = 1.3
"""The same factor where ancestors are moved, for 64 particles and more."""

RELAXATION = 0.5
"""Amount of `RTPS` of the ensemble Kalman filters, for 64 members and more."""


@dataclasses.dataclass(frozen=True)
class WeatherExperiment:
    """Settings of the weather twin experiment: observing networks, length, first ensemble, and tempering.

    Args:
        networks: observing networks by the name of their site in the program; None for 200 stations that observe
            `NEAR_GROUND` with errors of a fifth of the standard deviation of the climate.
        cycles: number of filter steps.
        spin_up: number of steps at the start that are not scored.
        start_error: error of the mean of the first ensemble and its spread, in standard deviations of the climate.
        step_hours: length of one step of the emulator, in hours.
        target_ess: target ESS of local FA-APF without a move, as a fraction of the particles. 0.8 was chosen for 64
            particles. With 256 particles, 0.5 gives less error, and also less spread (docs/mini_weather.md).
        moved_errors: factor on the errors of the emulator where ancestors are moved. Fewer particles need a larger one.
        relaxation: amount of `RTPS` of the ensemble Kalman filters. Fewer members need a larger one.

    Raises:
        ValueError: no cycles are left to score, or `start_error` is not positive.
    """

    networks: dict[str, ndda.observation.ObservingNetwork] | None = None
    cycles: int = 30
    spin_up: int = 20
    start_error: float = 0.5
    step_hours: float = STEP_HOURS
    target_ess: float = 0.8
    moved_errors: float = MOVED_ERRORS
    relaxation: float = RELAXATION

    def __post_init__(self) -> None:
        check_spin_up(self.spin_up, self.cycles)
        if not self.start_error > 0:
            raise ValueError(f"start_error={self.start_error}; give a positive number of standard deviations.")

    def observing(self, prior: ndda.priors.SphericalEmulator) -> dict[str, ndda.observation.ObservingNetwork]:
        """Observing networks by site name: `networks`, or the default stations."""
        if self.networks is not None:
            return self.networks
        return {
            "stations": ndda.observation.Stations(
                ndda.observation.fraction_of(np.asarray(prior.state_scale), NEAR_GROUND, prior.layout, 0.2), count=200
            )
        }

    def observed_channels(self, prior: ndda.priors.SphericalEmulator) -> np.ndarray:
        """Mask of the channels that a network observes, shape (channel,)."""
        observed = {c for network in self.observing(prior).values() for c in network.channels(prior.layout)}
        return np.isin(np.arange(prior.layout.shape[-1]), sorted(observed))

    def observations(
        self,
        rng_key: PRNGKeyArray,
        prior: ndda.priors.SphericalEmulator,
        states: Float[np.ndarray, "time lat lon channel"],
    ) -> dict[str, Float[np.ndarray, "time place observed"]]:
        """Simulate the observations of each network at all times of `states`, with errors; NaN where it has none.

        Args:
            rng_key: random key of the errors.
            prior: emulator, for its layout.
            states: true states in the units of the layout.

        Returns:
            Observations of each network, by site name.
        """
        found, networks = {}, self.observing(prior)
        for key, (name, network) in zip(jax.random.split(rng_key, len(networks)), networks.items(), strict=True):
            exact = jax.vmap(lambda x, network=network: network.observe(x, prior.layout))(jnp.asarray(states))
            y = np.asarray(exact) + network.error() * np.asarray(jax.random.normal(key, exact.shape))
            found[name] = np.where(network.reports(len(states), prior.layout)[..., None], y, np.nan)
        return found

    def first_guess(self, rng_key: PRNGKeyArray, prior: ndda.priors.SphericalEmulator, truth: Array) -> Array:
        """Mean of the first ensemble: truth + `start_error` times the anomaly of a draw from the climate."""
        climate = prior.climatology()
        return truth + self.start_error * (climate.sample(rng_key) - climate.mean)

    def program(self, prior: ndda.priors.SphericalEmulator) -> Callable[[Array, dict[str, Array]], None]:
        """State-space model with the emulator as transition."""
        networks, climate = self.observing(prior), prior.climatology()

        def weather(first_guess: Array, y: dict[str, Array]) -> None:
            x0 = numpyro.sample("x0", climate)

            def step(x: Array, y_t: dict[str, Array]) -> tuple[Array, None]:
                x = numpyro.sample("x", ndda.DiffusionTransition(prior, x, sampler=SAMPLER))
                for name, network in networks.items():
                    seen = network.observe(x, prior.layout)
                    numpyro.sample(name, dist.Normal(seen, network.error()).to_event(2), obs=y_t[name])
                return x, None

            scan(step, first_guess + self.start_error * (x0 - climate.mean), y)

        return weather

    def taper(self, prior: ndda.priors.SphericalEmulator, radius: float) -> ndda.Taper:
        """Localization by great-circle distance; `radius` is the half-width in kilometers on the Earth."""
        places = {name: network.places(prior.layout) for name, network in self.observing(prior).items()}
        return ndda.Taper(radius, ndda.GreatCircle(), places)

    def filters(self, prior: ndda.priors.SphericalEmulator) -> dict[str, ndda.filters.FilterAlgorithm]:
        """Filters by name; settings were chosen with 200 stations on two parts of a run that is not scored.

        Guided filters use the emulator with larger errors (`SphericalEmulator.with_errors_times`). The free ensemble
        and the Kalman filters use the emulator itself; the Kalman filters have RTPS inflation and are best with it.
        """
        plain = self.program(prior)
        guided = self.program(prior.with_errors_times(GUIDED_ERRORS))
        taper, inflation = self.taper(prior, 2500.0), (ndda.RTPS(self.relaxation),)
        return {
            FREE: ndda.Bootstrap(plain),  # gets no observations, so that all weights are equal and it forecasts
            GUIDED: ndda.FAAPF(guided, weight=ndda.Equal(), guidance=ndda.MMPS.cheap()),
            GLOBAL: ndda.FAAPF(guided, guidance=ndda.MMPS.cheap()),
            LOCAL: ndda.FAAPF(
                guided,
                weight=ndda.Dirac(),
                target_ess=self.target_ess,
                guidance=ndda.MMPS.cheap(),
                taper=taper,
                move=False,
            ),
            ENKF: ndda.EnKF(plain, taper=taper, inflation=inflation),
            ENKF_V: ndda.EnKF(plain, taper=taper, inflation=inflation, transition_covariance=True),
            MAIN: ndda.FAAPF(
                self.program(prior.with_errors_times(self.moved_errors)), guidance=ndda.MMPS.cheap(), taper=taper
            ),
        }


@dataclasses.dataclass(frozen=True)
class WeatherRun:
    """Statistics of one filter on one truth; channels are those of the state, and times are the cycles.

    Attributes:
        mean: ensemble mean, in the units of the layout.
        spread: standard deviation of the particles, in the units of the layout.
        rmse: area-weighted RMSE of the mean, in standard deviations of the climate.
        spread_by_time: area-weighted spread, in standard deviations of the climate.
        crps: area-weighted CRPS, in standard deviations of the climate.
        ranks: counts of the rank of the truth after the spin-up, on a thinned grid.
        at_stations: particles at the places of the first network, in the units of the layout.
        last: particles of the last cycle, in the units of the layout.
        passes: number of network passes per particle and step, without those of the conditioning network.
        conditioning: number of passes of the conditioning network per particle and step.
    """

    mean: Float[np.ndarray, "time latitude longitude channel"]
    spread: Float[np.ndarray, "time latitude longitude channel"]
    rmse: Float[np.ndarray, "time channel"]
    spread_by_time: Float[np.ndarray, "time channel"]
    crps: Float[np.ndarray, "time channel"]
    ranks: Float[np.ndarray, "channel rank"]
    at_stations: Float[np.ndarray, "draw time place channel"]
    last: Float[np.ndarray, "draw latitude longitude channel"]
    passes: float
    conditioning: float


@dataclasses.dataclass(frozen=True)
class WeatherResult:
    """Runs of all filters on all truths, with the truths and their observations.

    Attributes:
        runs: filter -> one run per truth.
        states: truths, shape (truth, time, latitude, longitude, channel).
        observations: observations of the first truth, by site name.
        observed: mask of the observed channels, shape (channel,).
        spin_up: number of cycles at the start that are not scored.
    """

    runs: dict[str, list[WeatherRun]]
    states: np.ndarray
    observations: dict[str, np.ndarray]
    observed: np.ndarray
    spin_up: int

    def by_time(self, name: str, score: str, channels: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Score over time of several channels together, shape (truth, time).

        Args:
            name: name of the filter.
            score: "rmse", "spread_by_time" or "crps". RMSE and spread average squares over channels, CRPS its values.
            channels: mask or slice of the channels.
        """
        values = np.stack([getattr(run, score) for run in self.runs[name]])[..., channels]
        return values.mean(-1) if score == "crps" else np.sqrt(np.mean(values**2, axis=-1))

    def scores(self, name: str) -> dict[str, np.ndarray]:
        """Scores of a filter for each truth, over cycles after the spin-up, in standard deviations of the climate."""
        late = slice(self.spin_up, None)

        def root(score: str, channels: np.ndarray | slice = slice(None)) -> np.ndarray:
            return np.sqrt(np.mean(self.by_time(name, score, channels)[:, late] ** 2, axis=1))

        return {
            "passes": np.array([run.passes for run in self.runs[name]]),
            "conditioning": np.array([run.conditioning for run in self.runs[name]]),
            "rmse": root("rmse"),
            "rmse_observed": root("rmse", self.observed),
            "rmse_unobserved": root("rmse", ~self.observed),
            "spread_skill": root("spread_by_time") / root("rmse"),
            "crps": self.by_time(name, "crps")[:, late].mean(1),
        }

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean and standard error over truths of each score of each filter, as Python floats."""
        return summarized({name: self.scores(name) for name in self.runs})

    def rank_frequencies(
        self, name: str, channels: np.ndarray, bars: int = 13
    ) -> tuple[Float[np.ndarray, " edge"], Float[np.ndarray, " bar"]]:
        """Rank histogram of the truth after the spin-up, with neighboring ranks combined into bars.

        Args:
            name: name of the filter.
            channels: mask or indices of the channels to count together.
            bars: number of bars.

        Returns:
            Edges of the bars, from 0 to 1, and frequency of each bar divided by that of a flat histogram.
        """
        counts = sum(run.ranks[channels].sum(0) for run in self.runs[name])
        parts = np.array_split(counts, min(bars, len(counts)))
        sizes = np.array([len(part) for part in parts])
        density = np.array([part.sum() for part in parts]) / sizes * (len(counts) / counts.sum())
        return np.append(0, np.cumsum(sizes)) / len(counts), density


def area_weights(prior: ndda.priors.SphericalEmulator) -> Float[np.ndarray, "latitude 1"]:
    """Quadrature weights of the grid points, to broadcast against fields (..., latitude, longitude)."""
    return np.asarray(prior.noise.harmonics.weights)[:, None]


def in_climate_units(
    fields: Float[np.ndarray, "*batch latitude longitude channel"], prior: ndda.priors.SphericalEmulator
) -> Float[np.ndarray, "*batch channel latitude longitude"]:
    """Scale fields to standard deviations of the climate of each channel, with the channel axis before the grid."""
    return np.moveaxis(fields, -1, -3) / np.asarray(prior.state_scale)[:, None, None]


def summarize_run(
    result: ndda.FilterResult,
    states: np.ndarray,
    prior: ndda.priors.SphericalEmulator,
    network: ndda.observation.ObservingNetwork,
    spin_up: int,
) -> WeatherRun:
    """Compute scores of a run and the statistics that the figures need.

    Args:
        result: result of a filter with the latent site "x".
        states: truth, shape (time, latitude, longitude, channel).
        prior: emulator, for its grid and the standard deviations of its climate.
        network: observing network at whose places all particles are kept.
        spin_up: number of cycles at the start whose ranks are not counted.
    """
    particles = result.posterior["x"][0]
    weights = area_weights(prior)
    scores: dict[str, list[Any]] = {"rmse": [], "spread": [], "crps": []}
    for t in range(len(states)):
        x, truth = (in_climate_units(v[..., t, :, :, :], prior) for v in (particles, states))
        scores["rmse"].append(ndda.diagnostics.rmse(x, truth, axis=(1, 2), weights=weights))
        scores["spread"].append(ndda.diagnostics.spread(x, axis=(1, 2), weights=weights))
        scores["crps"].append(ndda.diagnostics.crps(x, truth, axis=(1, 2), weights=weights))
    late = (slice(None), slice(spin_up, None), slice(None, None, 4), slice(None, None, 4))
    ranks = [
        ndda.diagnostics.rank_histogram(particles[(*late, c)], states[(*late[1:], c)]) for c in range(states.shape[-1])
    ]
    at_stations = jax.vmap(jax.vmap(lambda x: network.at_places(x, prior.layout)))(particles)
    return WeatherRun(
        particles.mean(0),
        particles.std(0, ddof=1),
        np.array(scores["rmse"]),
        np.array(scores["spread"]),
        np.array(scores["crps"]),
        np.array(ranks),
        np.asarray(at_stations),
        np.asarray(particles[:, -1]),
        *result.mean_passes(),
    )


class FilterInputs(NamedTuple):
    """Inputs of all filters for one truth.

    Attributes:
        first_guess: mean of the first ensemble.
        observations: observations of each network, by site name.
        rng_key: random key from which the key of each filter is derived.
    """

    first_guess: Float[Array, "latitude longitude channel"]
    observations: dict[str, np.ndarray]
    rng_key: PRNGKeyArray


def _filter_inputs(
    rng_key: PRNGKeyArray, experiment: WeatherExperiment, prior: ndda.priors.SphericalEmulator, truth: np.ndarray
) -> FilterInputs:
    """Draw first guess and observations for one truth."""
    guess_key, error_key, filter_key = jax.random.split(rng_key, 3)
    first_guess = experiment.first_guess(guess_key, prior, jnp.asarray(truth[0]))
    return FilterInputs(first_guess, experiment.observations(error_key, prior, truth[1:]), filter_key)


def _run_filter(
    name: str,
    experiment: WeatherExperiment,
    prior: ndda.priors.SphericalEmulator,
    states: Sequence[np.ndarray] | np.ndarray,
    inputs: Sequence[FilterInputs],
    num_particles: int,
) -> list[WeatherRun]:
    """Run one filter on all truths; depends on its arguments only, because it may run in a process of its own."""
    filter = ndda.Filter(
        experiment.filters(prior)[name], num_particles=num_particles, progress_bar=False, keep_observed=False
    )
    network = next(iter(experiment.observing(prior).values()))
    runs = []
    for truth, (first_guess, y, rng_key) in zip(states, inputs, strict=True):
        seen = jax.tree.map(lambda v: np.full_like(v, np.nan), y) if name == FREE else y
        with warnings.catch_warnings():
            # The table has columns for what these warn of.
            warnings.filterwarnings("ignore", message="weights are tempered")
            warnings.filterwarnings("ignore", message="observations are farther from the forecast")
            filter.run(jax.random.fold_in(rng_key, FILTERS.index(name)), first_guess, seen)
        runs.append(summarize_run(filter.result, truth[1:], prior, network, experiment.spin_up))
    return runs


def run_weather_twin(
    experiment: WeatherExperiment,
    prior: ndda.priors.SphericalEmulator,
    states: Sequence[Float[np.ndarray, "time latitude longitude channel"]] | np.ndarray,
    *,
    seed: int = 0,
    num_particles: int = 64,
    only: Sequence[str] = FILTERS,
    processes: int = 1,
    on_done: Callable[[str], None] = lambda name: None,
) -> WeatherResult:
    """Run the filters on all truths.

    Args:
        experiment: settings of the experiment.
        prior: emulator.
        states: true states, shape (truth, cycles + 1, latitude, longitude, channel). The first state of each truth is
            not observed.
        seed: seed of first guesses, observations and filters.
        num_particles: number of particles, or members, of each filter.
        only: names of the filters to run.
        processes: number of filters to run at the same time. With more than one, each filter runs in a process of its
            own, because a filter of this size uses a single core. The result does not depend on it. Keep 1 on a GPU,
            which the processes would share, and in scripts without ``if __name__ == "__main__":``.
        on_done: function that is called with the name of each filter after its last run.

    Raises:
        ValueError: a truth has another length or grid, a filter is unknown, or `processes` is below 1.
    """
    expected = (experiment.cycles + 1, *prior.layout.shape)
    if len(states) < 1 or any(np.shape(truth) != expected for truth in states):
        shapes = sorted({np.shape(truth) for truth in states})
        raise ValueError(f"states has truths of shapes {shapes}; give one truth or more of shape {expected}.")
    if unknown := sorted(set(only) - set(FILTERS)):
        raise ValueError(f"only names unknown filters {unknown}; the filters are {', '.join(map(repr, FILTERS))}.")
    if processes < 1:
        raise ValueError(f"processes={processes}; give 1 or more.")
    names = [name for name in FILTERS if name in only]
    root = jax.random.key(seed)
    inputs = [_filter_inputs(jax.random.fold_in(root, i), experiment, prior, truth) for i, truth in enumerate(states)]
    arguments = (experiment, prior, states, inputs, num_particles)
    runs: dict[str, list[WeatherRun]] = {}
    if processes == 1:
        for name in names:
            runs[name] = _run_filter(name, *arguments)
            on_done(name)
    else:
        # Use processes, because threads would share NumPyro's stack of handlers. Spawn them, because forking is unsafe
        # with the threads of JAX.
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            started = {pool.submit(_run_filter, name, *arguments): name for name in names}
            for future in as_completed(started):
                runs[started[future]] = future.result()
                on_done(started[future])
    return WeatherResult(
        {name: runs[name] for name in names},
        np.stack([truth[1:] for truth in states]),
        inputs[0].observations,
        experiment.observed_channels(prior),
        experiment.spin_up,
    )


def shortfalls(prior: ndda.priors.SphericalEmulator, result: WeatherResult) -> list[str]:
    """Known shortfalls of moved FA-APF on these truths and of the emulator, one sentence each.

    A filter falls short if its spread differs from its error by more than a fifth on any truth, or if its rank
    histogram is U-shaped. The emulator falls short, by the validation on its data card, if its CRPS is above 0.3 of the
    error of persistence, or if its climate is off by more than 10 % (20 % for power at the smallest quarter of scales).

    Args:
        prior: emulator with its data card.
        result: runs of the experiment, with moved FA-APF among them.
    """
    found = []
    ratios = result.scores(MAIN)["spread_skill"]
    if ratios.min() < 0.8 or ratios.max() > 1.2:
        least, most = (f"{ratio:.2f}" for ratio in (ratios.min(), ratios.max()))
        between = least if least == most else f"{least} to {most}"
        found.append(f"The spread of moved FA-APF is {between} times its error; it should be 0.8 to 1.2 times.")
    for which, channels in (("observed", result.observed), ("unobserved", ~result.observed)):
        if not channels.any():
            continue
        _, frequencies = result.rank_frequencies(MAIN, channels)
        ends = 0.5 * (frequencies[0] + frequencies[-1])
        if ends > 1.25:
            found.append(
                f"The rank histogram of moved FA-APF for {which} variables is U-shaped: its end bars are "
                f"{ends:.1f} times as high as in a flat histogram."
            )
    validation = prior.card.get("validation", {})
    limits = {
        "ratio of CRPS to the error of persistence": ("one_step", "crps_over_persistence", 0.3),
        "relative error of the climate variance": ("climate", "variance", 0.1),
        "relative error of the power at one zonal wavenumber": ("climate", "power", 0.1),
        "relative error of the power at the smallest quarter of scales": ("climate", "power_of_smallest_quarter", 0.2),
    }
    missed = []
    for what, (group, name, limit) in limits.items():
        worst = max(validation.get(group, {}).get(name, [0.0]), key=abs)
        if abs(worst) > limit:
            missed.append(f"{what} {worst:.2g} (limit {limit})")
    if missed:
        found.append(f"The emulator exceeds limits, at its worst variable: {'; '.join(missed)}.")
    return found


def to_datatree(experiment: WeatherExperiment, prior: ndda.priors.SphericalEmulator, result: WeatherResult) -> DataTree:
    """Convert the first truth, its observations, and mean and spread of each filter to a tree of labeled fields.

    The groups are "truth", "observations/{site}" for each network, and one for each filter. In the group of a filter, a
    variable is the ensemble mean, and the same name with "_spread" appended is the standard deviation of the particles.

    Args:
        experiment: settings of the experiment.
        prior: emulator, for its layout.
        result: runs of the experiment.
    """
    import xarray

    layout = prior.layout
    hours = experiment.step_hours * (1 + np.arange(experiment.cycles))
    coords = {"time": ("time", hours, {"units": "hours"}), **layout.level_coords(), **layout.coords()}
    coords.pop("channel", None)

    def fields(values: np.ndarray, suffix: str = "") -> dict[str, Any]:
        return {
            name + suffix: (("time", *dims), data.astype(np.float32), {"units": units})
            for name, (dims, data, units) in layout.split_by_levels(values).items()
        }

    groups = {"truth": xarray.Dataset(fields(result.states[0]), coords)}
    for name, runs in result.runs.items():
        both = {**fields(runs[0].mean), **fields(runs[0].spread, "_spread")}
        groups[name.replace(", ", "_").replace(" ", "_")] = xarray.Dataset(both, coords)
    for site, network in experiment.observing(prior).items():
        places = network.places(layout)
        groups[f"observations/{site}"] = xarray.Dataset(
            {
                name: (("time", "place"), result.observations[site][..., j], {"error": network.errors[name]})
                for j, name in enumerate(network.errors)
            },
            {
                "time": coords["time"],
                "latitude": ("place", places[:, 0], {"units": "degrees_north"}),
                "longitude": ("place", places[:, 1], {"units": "degrees_east"}),
            },
        )
    return xarray.DataTree.from_dict(groups)


def score_table(result: WeatherResult) -> Table:
    """Table of scores with one row per filter, mean ± standard error over truths."""
    title = f"mean over {len(result.states)} truths" if len(result.states) > 1 else "one truth"
    return table_of_scores(title, result.summary(), COLUMNS, MAIN, decimals=3, plain={"passes": 0}, plus=PLUS)
