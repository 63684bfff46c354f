"""Assimilation with the interface of earth2studio's data assimilation models, around an `OnlineFilter`.

earth2studio's observation sources give a `pandas.DataFrame` (or cudf's) with the columns `time`, `lat`, `lon`,
`observation` and `variable`, and its models take such frames through `__call__`, for one analysis, or send them to a
generator, for one analysis after another (`earth2studio.models.da.base.AssimilationModel`, version 0.19). The package
is not imported here: what it knows of a model are the methods of `Earth2StudioAssimilation`.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array

from numpyro_diffusion_da.arguments import require, require_count, shown
from numpyro_diffusion_da.assimilation.config import FilterSettings, QualitySettings
from numpyro_diffusion_da.assimilation.earth2studio_names import (
    NAMES,
    NAMES_ON_LEVELS,
    Channel,
    channels,
    unit_of,
)
from numpyro_diffusion_da.assimilation.emulator import Emulator
from numpyro_diffusion_da.assimilation.guesses import FrameGuess
from numpyro_diffusion_da.assimilation.placing import bounds_of
from numpyro_diffusion_da.assimilation.program import OBSERVATION, STATE, assimilation_program, filter_of
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior, EmulatorPrior
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.fields.grids import Grid
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.fields.times import hours, utc_times
from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.filters.gross_error_check import GrossErrorCheck
from numpyro_diffusion_da.inference.online_filter import OnlineFilter
from numpyro_diffusion_da.observation import (
    Duplicates,
    ObservationOperator,
    PlacedObservations,
    QualityCheck,
    read_table,
)
from numpyro_diffusion_da.observation.tables.names import LINEAR
from numpyro_diffusion_da.smc.base import Info, State

if TYPE_CHECKING:
    import pandas
    import xarray

Program = Callable[..., Any]
"""NumPyro program of `PlacedObservations.xs`."""

COLUMNS = ("time", "lat", "lon", "observation", "variable")
"""Columns that every frame of observations has."""

ADVICE = "fetch it with earth2studio.data.fetch_dataframe, or set frame.attrs['request_time'] = np.array([time])"

OUTPUTS = ("mean", "spread", "members", "feedback")
"""What an analysis may consist of."""


@dataclasses.dataclass
class _Cycling:
    """Where a generator stands: the filter's state after a number of steps, the last of them at a time."""

    time: np.datetime64 | None = None
    state: State | None = None
    frames: tuple[Array, ...] = ()
    steps: int = 0


class Earth2StudioAssimilation:
    r"""Ensemble assimilation of observations with the interface of earth2studio's `AssimilationModel`.

    It fetches nothing and imports nothing of earth2studio. A frame of one of its observation sources goes in, and
    analyses come out as `xarray.DataArray`s with earth2studio's names, dimensions and units:

        model = ndda.assimilation.Earth2StudioAssimilation(prior, ndda.EnKF, num_particles=32, step="12h", errors=1.0)
        generator = model.create_generator()
        next(generator)
        for time in times:
            frame = fetch_dataframe(source, time=np.array([time]), variable=..., fields=...)
            mean, members = generator.send(frame)

    A frame says in ``frame.attrs["request_time"]`` which analyses are wanted, as `earth2studio.data.fetch_dataframe`
    writes it. Without that, a generator goes on by one step. A generator's first analysis is one step of the prior
    after its first guess, and it makes all steps between the last analysis and the next one, as forecasts where there
    are no rows. ``model(frame)`` makes each analysis by itself, from the first guess.

    Rows without units are in earth2studio's (Pa, K, m s-1). Columns that earth2studio has and that mean something here
    are `pres` (Pa), `station`, `type`, `quality`, and `station_elev` (m), which is our `elev`.

    Args:
        prior: emulator, with a layout of (latitude, longitude, channel) and variables.
        algorithm: function from a NumPyro program to a filter, such as `ndda.EnKF` or ``lambda program:
            ndda.FAAPF(program, taper=taper)``. The state is the site "x", its observations are "y", and "y_place" has
            their places for a taper: ``ndda.Taper(2500.0, ndda.GreatCircle(), {"y": "y_place"})``. None for the filter
            of `ndda assimilate`: FA-APF with this taper and a background check.
        num_particles: number of members.
        step: length of a step of the prior, such as "12h"; None for that of GenCast or WeatherNext 2.
        first_guess: NumPyro distribution of the state one step before the first analysis; None for the climatology of
            the prior. GenCast and WeatherNext 2 get two frames by `create_generator` instead.
        sampler: sampler of the draws of a diffusion; None for `Sampler.cheap()`.
        window: window of observations around each analysis, as for `ObservationTable.on`; None for the whole step.
        errors: standard deviations of the observation errors, as for `ObservationTable.on`, in the layout's units.
        quality: checks of the rows, as for `ObservationTable.on`; None for `Bounds` and `Duplicates`.
        variables: earth2studio's names that a source is asked for, which `input_coords` has; or a mapping from these to
            the names of the layout, as {"pres": "surface_pressure"}. By default those of the layout.
        columns: further columns that a source is asked for, such as ("pres", "station").
        outputs: what each analysis consists of, in this order: "mean"; "spread", the standard deviation of the members;
            "members", with a leading dimension "ensemble", whose coordinate `weight` has their weights; "feedback", a
            `pandas.DataFrame` of all rows with their flags, background and analysis.
        program: function from an `ObservationOperator` to the NumPyro program of `PlacedObservations.xs`, for a program
            of your own; None for `assimilation_program`, with Gaussian errors. Programs of GenCast and WeatherNext 2
            take the two frames of their first guess as further arguments, and find the forcings in ``xs["forcings"]``.
        reserve: number of rows that the arrays of a step have at least. A frame with more rows than any before compiles
            the step anew.
        seed: seed of all random numbers.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the layout has no grid or no variables, an output is unknown or given twice, or a step is needed.
    """

    def __init__(
        self,
        prior: EmulatorPrior,
        algorithm: Callable[[Program], FilterAlgorithm] | None = None,
        *,
        num_particles: int = 32,
        step: Any = None,
        first_guess: dist.Distribution | None = None,
        sampler: Sampler | None = None,
        window: Any = None,
        errors: float | Mapping[Any, float] | None = None,
        quality: Sequence[QualityCheck] | None = None,
        variables: Sequence[str] | Mapping[str, str] | None = None,
        columns: Sequence[str] = (),
        outputs: Sequence[str] = ("mean", "members"),
        program: Callable[[ObservationOperator], Program] | None = None,
        reserve: int = 0,
        seed: int = 0,
    ) -> None:
        name = type(self).__name__
        require(prior, EmulatorPrior, name, "prior", 'ndda.load_prior("held_suarez")')
        if algorithm is not None and not callable(algorithm):
            raise TypeError(
                f"{name} got algorithm={shown(algorithm)}; give a function of a program, such as ndda.EnKF."
            )
        require_count(reserve, name, "reserve", least=0)
        self.prior, self.layout = prior, prior.layout
        self._grid, self._channels = Grid.of(prior.layout), channels(prior.layout)
        self.step = _step(prior, step)
        if quality is None:
            quality = [bounds_of(prior, QualitySettings().bounds_factor), Duplicates()]
        self._placing: dict[str, Any] = {
            "window": self.step if window is None else window,
            "errors": errors,
            "quality": quality,
        }
        self._names = _names(variables, prior.layout, "pres" in columns)
        self._columns = _columns(columns)
        self.outputs = _outputs(outputs)
        self.seed = int(seed)
        self._sizes = {LINEAR: (reserve, 1)} if reserve else None
        draws = isinstance(prior, DiffusionPrior)
        self._emulator = Emulator(
            prior=prior,
            step=self.step,
            sampler=Sampler.cheap() if draws and sampler is None else sampler,
        )
        placed = read_table(_no_rows()).on(prior.layout, [np.datetime64(0, "s")], window=self.step)
        self._operator = placed.operator
        model = _program(self._emulator, self._operator, first_guess) if program is None else program(self._operator)
        if algorithm is None:
            made = filter_of(model, self._emulator, FilterSettings(), QualitySettings())
        else:
            made = algorithm(model)
        self._threshold = _threshold(made)
        self.filter = OnlineFilter(made, num_particles=num_particles)

    def init_coords(self) -> tuple[OrderedDict[str, np.ndarray], ...] | None:
        """Coordinates of the first guess, the last frames before the first step; None where the prior needs none."""
        if self._emulator.frames == 1:
            return None
        coords = self._coords(
            np.empty(0, "datetime64[ns]"), lead_time=self.step * np.arange(1 - self._emulator.frames, 1)
        )
        # An emulator of weather makes precipitation, and does not start from it.
        return (OrderedDict(coords, variable=np.array([c.name for c in self._channels if not _is_sum(c)])),)

    def input_coords(self) -> tuple[OrderedDict[str, np.ndarray], ...]:
        """Columns that a frame of observations has: the names of variables, and for others an empty array of a type."""
        return (OrderedDict({**self._columns, "variable": np.array(list(self._names))}),)

    def output_coords(
        self,
        input_coords: tuple[OrderedDict[str, np.ndarray], ...],
        request_time: Any = None,
        request_lead_time: Any = None,
        **kwargs: Any,
    ) -> tuple[OrderedDict[str, np.ndarray], ...]:
        """Coordinates of each output of an analysis.

        Args:
            input_coords: those of `input_coords`; not used.
            request_time: times of the analyses; None for times that are not known.
            request_lead_time: lead times to add to them.
            **kwargs: further attributes of a frame; not used.
        """
        times = np.array(["NaT"], "datetime64[ns]")
        if request_time is not None:
            times = _valid_times(request_time, request_lead_time)
        feedback = OrderedDict({**self._columns, "variable": np.array(list(self._names)), "flag": np.empty(0, str)})
        found = {
            "mean": self._coords(times),
            "spread": self._coords(times),
            "members": OrderedDict({"ensemble": np.arange(self.filter.num_particles), **self._coords(times)}),
            "feedback": feedback,
        }
        return tuple(found[name] for name in self.outputs)

    def to(self, device: Any) -> Earth2StudioAssimilation:
        """Return this model. JAX decides where it computes, and what it gives and takes is in the host's memory."""
        return self

    def set_rng(self, seed: int, reset: bool = True) -> None:
        """Set the seed of the analyses that follow.

        Args:
            seed: seed of all random numbers.
            reset: not used; a generator draws by the number of its step, and has nothing to set back.
        """
        self.seed = int(seed)

    def __call__(self, *args: Any) -> tuple[pandas.DataFrame | xarray.DataArray, ...]:
        """Analyses at the times that the frames request, each by itself from the first guess.

        Args:
            *args: frames of observations, or None for a source that has nothing; before them, the first guess of a
                prior that needs one.

        Returns:
            The outputs that were asked for, each with a dimension of times.

        Raises:
            TypeError: an argument is neither a frame nor a first guess.
            ValueError: no frame says which analyses are wanted, a first guess is missing, or a row cannot be meant.
        """
        first, frames = self._apart(args)
        times = _requested(frames)
        if times is None:
            raise ValueError(
                f'no frame has the attribute "request_time", which says what analyses are wanted; {ADVICE}.'
            )
        each = [self._start(first) for _ in times]
        for at, time in zip(each, times, strict=True):
            if at.time is not None and at.time + self.step != time:
                raise ValueError(f"the first guess is of {at.time}, so the analysis one step later is not of {time}.")
            at.steps = int(time.astype("datetime64[m]").astype(int)) % 2**31  # so that no time shares random numbers
        found = self._cycle(each, frames, times)
        return self._joined(found, times)

    def create_generator(
        self, *args: Any
    ) -> Generator[
        tuple[pandas.DataFrame | xarray.DataArray, ...] | None,
        pandas.DataFrame | Sequence[pandas.DataFrame | None] | None,
        None,
    ]:
        """Make a generator that takes frames of observations by `send` and yields analyses, one after another.

        ``next(generator)`` comes first and yields None. After it, ``generator.send(frame)`` yields the analyses at the
        times that the frame requests, or one step after the last one where it requests none; ``generator.send(None)``
        is a step without observations. Several sources are sent as a tuple of frames. As in every generator of Python,
        an error ends it: check what a frame holds before, with `read_table`, where a run must go on.

        Args:
            *args: first guess of a prior that needs one: an `xarray.DataArray` with the coordinates of `init_coords`,
                of one time.

        Raises:
            TypeError: an argument is not such an array.
            ValueError: a first guess is missing, or too much; then, at a `send`, the first analysis has no time, or
                requested times are not a whole number of steps after the last one.
        """
        first, frames = self._apart(args)
        if frames:
            raise TypeError("create_generator got a frame of observations; send it to the generator.")
        return self._analyses(self._start(first))

    def _analyses(self, at: _Cycling) -> Generator[Any, Any, None]:
        """Generator of analyses from where a cycling stands."""
        sent = yield None
        while True:
            frames = [one for one in (sent if isinstance(sent, (tuple, list)) else (sent,)) if one is not None]
            times = self._next_times(at, _requested(frames))
            found = self._cycle([at] * len(times), frames, times)
            wanted = _requested(frames)
            keep = times[-1:] if wanted is None else wanted
            sent = yield self._joined([one for one, time in zip(found, times, strict=True) if time in keep], keep)

    def _next_times(self, at: _Cycling, wanted: np.ndarray | None) -> np.ndarray:
        """Times of all steps up to the last one that is wanted."""
        if wanted is None:
            if at.time is not None:
                return np.array([at.time + self.step])
            raise ValueError(
                'the first frame has no attribute "request_time", so the time of the first analysis is not known; '
                f"{ADVICE}."
            )
        since = wanted[0] - self.step if at.time is None else at.time
        apart = (wanted - since) / self.step
        if np.any(apart != np.round(apart)) or apart[0] < 1:
            raise ValueError(
                f"an analysis at {wanted[np.argmax((apart != np.round(apart)) | (apart < 1))]} was requested, but "
                f"analyses are {hours(self.step)} apart and the last one is of {since}; request times that are whole "
                "steps after it."
            )
        return since + self.step * np.arange(1, int(apart[-1]) + 1)

    def _start(self, first: xarray.DataArray | None) -> _Cycling:
        """Where a cycling stands before its first step."""
        if first is None:
            if self._emulator.frames > 1:
                raise ValueError(
                    f"{type(self.prior).__name__} starts from {self._emulator.frames} frames; give them as the first "
                    "argument, an xarray.DataArray with the coordinates of init_coords()."
                )
            return _Cycling()
        if self._emulator.frames == 1:
            raise ValueError(
                f"{type(self.prior).__name__} starts from its climatology and takes no first guess; leave it out."
            )
        time, frames = _frames(first, self)
        return _Cycling(time, None, frames)

    def _apart(self, args: tuple[Any, ...]) -> tuple[xarray.DataArray | None, list[Any]]:
        """(First guess, frames of observations) of the arguments."""
        import xarray

        first, frames = None, []
        for i, one in enumerate(args):
            if isinstance(one, xarray.DataArray) and i == 0:
                first = one
            elif one is not None:
                frames.append(one)
        return first, frames

    def _place(self, frames: list[Any], times: np.ndarray) -> PlacedObservations:
        """Rows of all frames on the grid at the times of some steps."""
        table = [_renamed(frame) for frame in map(_pandas, frames)] or [_no_rows()]
        given = {str(name) for frame in table for name in frame["variable"].dropna().unique()}
        units = {name: unit for name in given if (unit := unit_of(name)) is not None}
        read = read_table(table, variables=self._renamed_variables(), units=units)
        placed = read.on(self.layout, times, sizes=self._sizes, **self._placing)
        self._sizes = placed.sizes
        # The operator of one table takes the rows of all, and one is compiled once.
        return dataclasses.replace(placed, operator=self._operator)

    def _renamed_variables(self) -> dict[str, str]:
        return {name: to for name, to in self._names.items() if name != to}

    def _cycle(self, each: Sequence[_Cycling], frames: list[Any], times: np.ndarray) -> list[dict[str, Any]]:
        """Make a step to each of some times, from where `each` stands before it, and return the outputs of each."""
        placed = self._place(frames, times)
        init_key, run_key = jax.random.split(jax.random.key(self.seed))
        found, record, initial = [], [], None
        for k, (at, time) in enumerate(zip(each, times, strict=True)):
            now: dict[str, Any] = jax.tree.map(lambda values, k=k: jnp.asarray(values[k : k + 1]), placed.xs)
            if self._emulator.frames > 1:
                now["forcings"] = self._emulator.forcings(times[k : k + 1])
            if at.state is None:
                initial = self.filter.init(init_key, now, *at.frames) if initial is None else initial
                at.state = initial
            step_key = jax.random.fold_in(run_key, at.steps)
            at.state, info = self.filter.step(step_key, at.state, now, *at.frames)
            at.time, at.steps = time, at.steps + 1
            members, weights = _members(at.state, info)
            found.append(self._described(members, weights, time))
            if "feedback" in self.outputs:
                record.append(_departures(info, placed, members, weights, k))
        if record:
            columns = {name: np.stack([one[name] for one in record]) for name in record[0]}
            rows = placed.feedback(rejected=columns.pop("rejected"), threshold=self._threshold, **columns)
            for k, one in enumerate(found):
                # Rows that belong to no step are told once, with the last one.
                one["feedback"] = rows[(rows["cycle"] == k) | ((rows["cycle"] < 0) & (k == len(found) - 1))]
        return found

    def _described(self, members: np.ndarray, weights: np.ndarray, time: np.datetime64) -> dict[str, Any]:
        """Outputs of one analysis, each with a dimension of one time."""
        mean = np.einsum("n,n...->...", weights, members)
        found: dict[str, Any] = {}
        for name in self.outputs:
            if name == "mean":
                found[name] = self._labeled(mean[None], time)
            elif name == "spread":
                square = np.einsum("n,n...->...", weights, (members - mean) ** 2) / max(1.0 - np.sum(weights**2), 1e-12)
                found[name] = self._labeled(np.sqrt(square)[None], time, with_offset=False)
            elif name == "members":
                array = self._labeled(members[:, None], time, {"ensemble": np.arange(len(members))})
                found[name] = array.assign_coords(weight=(("ensemble", "time"), weights[:, None]))
        return found

    def _labeled(
        self,
        states: np.ndarray,
        time: np.datetime64,
        lead: Mapping[str, np.ndarray] | None = None,
        with_offset: bool = True,
    ) -> xarray.DataArray:
        """States (leading axes, time, latitude, longitude, channel) as earth2studio has them."""
        import xarray

        fields = np.stack([states[..., c] for c in range(states.shape[-1])], axis=-3)
        fields = np.where(_undefined(self.layout), np.nan, fields)
        factor, offset = (np.array([getattr(c, name) for c in self._channels]) for name in ("factor", "offset"))
        fields = factor[:, None, None] * fields + (offset[:, None, None] if with_offset else 0.0)
        coords = {**(lead or {}), **self._coords(np.array([time], "datetime64[ns]"))}
        return xarray.DataArray(fields.astype(np.float32), coords, tuple(coords))

    def _coords(self, times: np.ndarray, **more: np.ndarray) -> OrderedDict[str, np.ndarray]:
        """Coordinates of fields at given times, with earth2studio's names."""
        names = np.array([channel.name for channel in self._channels])
        fields = {"variable": names, "lat": self._grid.latitude, "lon": self._grid.longitude}
        return OrderedDict({"time": times, **more, **fields})

    def _joined(self, found: list[dict[str, Any]], times: np.ndarray) -> tuple[Any, ...]:
        """Outputs of several analyses as one each."""
        import pandas
        import xarray

        joined: list[Any] = []
        for name in self.outputs:
            parts = [one[name] for one in found]
            if name == "feedback":
                frame = pandas.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
                frame.attrs["request_time"] = times.astype("datetime64[ns]")
                joined.append(frame)
            else:
                joined.append(xarray.concat(parts, "time") if len(parts) > 1 else parts[0])
        return tuple(joined)


def _step(prior: EmulatorPrior, step: Any) -> np.timedelta64:
    """Length of a step of the prior."""
    import pandas

    own: np.timedelta64 | None = getattr(prior, "TIME_STEP", None)
    if step is None and own is None:
        raise ValueError(f'{type(prior).__name__} does not say how long its step is; give step="12h".')
    try:
        found: Any = own if step is None else pandas.Timedelta(step).to_timedelta64()
    except (ValueError, TypeError, OverflowError):
        raise TypeError(f'got step={shown(step)}; give a time difference such as "12h".') from None
    if not found > np.timedelta64(0, "ns"):
        raise ValueError(f'got step={shown(step)}; give a positive time difference such as "12h".')
    if own is not None and found != own:
        raise ValueError(f"got step={shown(step)}, but a step of {type(prior).__name__} is {hours(own)}; leave it out.")
    return np.timedelta64(found, "ns")


def _names(variables: Any, layout: Layout, has_pressure: bool) -> dict[str, str]:
    """Names in the layout by the names that a source is asked for."""
    if variables is None:
        # With a column of pressures a source has "t" at any pressure, and without it "t850".
        short = [NAMES_ON_LEVELS[v.name][0] for v in layout.variables if v.levels and v.name in NAMES_ON_LEVELS]
        surface = [NAMES[v.name][0] for v in layout.variables if not v.levels and v.name in NAMES]
        names = [*surface, *short] if has_pressure else [channel.name for channel in channels(layout)]
        return dict(zip(names, names, strict=True))
    if isinstance(variables, str) or not isinstance(variables, (Mapping, Sequence)) or not variables:
        raise TypeError(f'got variables={shown(variables)}; give names that a source has, such as ("t2m", "u10m").')
    return dict(variables) if isinstance(variables, Mapping) else dict(zip(variables, variables, strict=True))


def _columns(more: Any) -> dict[str, np.ndarray]:
    """Columns of a frame but `variable`, with empty arrays of their types."""
    if isinstance(more, str) or not isinstance(more, Sequence) or not all(isinstance(name, str) for name in more):
        raise TypeError(f'got columns={shown(more)}; give names of columns, such as ("pres", "station").')
    numbers = ("lat", "lon", "pres", "elev", "station_elev", "observation", "error")
    names = [*COLUMNS[:3], *(name for name in more if name not in COLUMNS), "observation"]
    types: dict[str, Any] = {"time": "datetime64[ns]", **dict.fromkeys(numbers, np.float32)}
    return {name: np.empty(0, types.get(name, str)) for name in names}


def _outputs(outputs: Any) -> tuple[str, ...]:
    """Names of the outputs, after a check."""
    names = () if isinstance(outputs, str) or not isinstance(outputs, Sequence) else tuple(outputs)
    if not names or any(name not in OUTPUTS for name in names) or len(set(names)) < len(names):
        raise ValueError(f"got outputs={shown(outputs)}; give some of {OUTPUTS}, each once.")
    return names


def _no_rows() -> pandas.DataFrame:
    """Frame of observations without rows."""
    import pandas

    return pandas.DataFrame({name: pandas.Series(dtype=object) for name in COLUMNS})


def _pandas(frame: Any) -> pandas.DataFrame:
    """Frame of observations as pandas has it; cudf's and Arrow's tables have a method for it."""
    import pandas

    found = frame.to_pandas() if callable(getattr(frame, "to_pandas", None)) else frame
    if not isinstance(found, pandas.DataFrame):
        raise TypeError(
            f"got {shown(frame)} in place of a frame; give a DataFrame with the columns {', '.join(COLUMNS)}."
        )
    return found


def _renamed(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Frame with our names of columns: earth2studio's `elev` is the height of the observation itself."""
    if "station_elev" not in frame:
        return frame
    return frame.rename(columns={"elev": "observation_elev"}).rename(columns={"station_elev": "elev"})


def _valid_times(request_time: Any, lead_time: Any = None) -> np.ndarray:
    """Times of analyses from the attributes of a frame, in order, each once."""
    times = request_time if np.ndim(request_time) else [request_time]
    found = utc_times(times)
    if lead_time is not None:
        found = (found[:, None] + np.atleast_1d(lead_time).astype("timedelta64[ns]")).ravel()
    return np.unique(found)


def _requested(frames: Sequence[Any]) -> np.ndarray | None:
    """Times of the analyses that frames request; None if they request none.

    Raises:
        ValueError: two frames request different times.
    """
    found = None
    for frame in frames:
        given = getattr(frame, "attrs", None) or {}
        if given.get("request_time") is None:
            continue
        times = _valid_times(given["request_time"], given.get("request_lead_time"))
        if found is not None and not np.array_equal(times, found):
            raise ValueError(f"the frames request analyses at {found} and at {times}; give frames of the same times.")
        found = times
    return found


def _program(emulator: Emulator, operator: ObservationOperator, first_guess: dist.Distribution | None) -> Program:
    """Program of a run with Gaussian errors: of `xs`, and of its first frames for a prior that starts from two."""
    settings = FilterSettings()

    def from_frames(xs: Mapping[str, Any], *frames: Array) -> None:
        guess = FrameGuess(jnp.stack(frames), None, 0.0, emulator.frames)
        assimilation_program(emulator, operator, guess, settings)(xs)

    if emulator.frames > 1:
        return from_frames
    guess = emulator.prior.climatology() if first_guess is None else first_guess
    return assimilation_program(emulator, operator, guess, settings)


def _frames(first: Any, model: Earth2StudioAssimilation) -> tuple[np.datetime64, tuple[Array, ...]]:
    """(Time of the last frame, frames) of a first guess with earth2studio's names and units.

    Raises:
        ValueError: dimensions, times or variables are not those of `init_coords`.
    """
    import xarray

    expected = ("time", "lead_time", "variable", "lat", "lon")
    if not isinstance(first, xarray.DataArray) or sorted(map(str, first.dims)) != sorted(expected):
        dims = first.dims if isinstance(first, xarray.DataArray) else shown(first)
        raise ValueError(f"the first guess has {dims}; give an xarray.DataArray with the dimensions {expected}.")
    if first.sizes["time"] != 1:
        raise ValueError(f"the first guess has {first.sizes['time']} times; give one, and the frames as lead times.")
    times = first.time.values.astype("datetime64[ns]") + first.lead_time.values.astype("timedelta64[ns]")
    steps = model.step * np.arange(1 - model._emulator.frames, 1)
    if len(times) != len(steps) or not np.array_equal(times - times[-1], steps):
        raise ValueError(
            f"the first guess is of {times}, expected {len(steps)} frames {hours(model.step)} apart; fetch the lead "
            "times of init_coords()."
        )
    fields = (
        first.isel(time=0, drop=True).transpose(*expected[1:]).assign_coords(lead_time=times).rename(lead_time="time")
    )
    has = {str(name) for name in fields["variable"].values}
    variables: dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, str]]] = {}
    for variable in model.layout.variables:
        own = [channel for channel in channels(model.layout) if channel.variable == variable.name]
        if not all(channel.name in has for channel in own):
            continue  # the prior says what it needs
        values = np.stack([(fields.sel(variable=c.name).values - c.offset) / c.factor for c in own], axis=1)
        dims, part = ("time", "level", "latitude", "longitude"), {"units": variable.units}
        if variable.levels:
            variables[variable.name] = (dims, values, part)
        else:
            variables[variable.name] = (dims[:1] + dims[2:], values[:, 0], part)
    levels = next((variable.levels for variable in model.layout.variables if variable.levels), ())
    coords = {"time": times, "latitude": fields.lat.values, "longitude": fields.lon.values}
    dataset = xarray.Dataset(variables, coords | ({"level": list(levels)} if levels else {}))
    frames = model.prior.frames(dataset, times)  # type: ignore[attr-defined]
    return times[-1], tuple(map(jnp.asarray, frames))


def _is_sum(channel: Channel) -> bool:
    return channel.variable.startswith("total_precipitation")


def _undefined(layout: Layout) -> np.ndarray:
    """Where channels have no value, (channel, latitude, longitude)."""
    masks = [
        np.zeros(layout.shape[:2], bool) if variable.undefined is None else variable.undefined.mask()
        for variable in layout.variables
        for _ in range(variable.num_channels)
    ]
    return np.stack(masks)


def _threshold(algorithm: FilterAlgorithm) -> float | None:
    """Threshold of a filter's background check of the observations; None for a filter without."""
    if not isinstance(algorithm, GrossErrorCheck):
        return None
    given = algorithm.threshold
    return given.get(OBSERVATION) if isinstance(given, Mapping) else given


def _members(state: State, info: Info) -> tuple[np.ndarray, np.ndarray]:
    """(Members of the analysis, their weights, which sum to 1).

    A filter that carries weights on has them beside its particles, if these are states; its draws are equally weighted.
    """
    sites = info.proposal.sites["posterior"]
    if STATE not in sites:
        raise ValueError(f"the program has the sites {', '.join(map(repr, sites))}; call the state '{STATE}'.")
    draws = np.asarray(sites[STATE], np.float32)
    particles = jax.tree.leaves(state.particles)
    if isinstance(state.log_weights, tuple) or len(particles) != 1 or particles[0].shape != draws.shape:
        return draws, np.full(len(draws), 1.0 / len(draws), np.float32)
    weights = jax.nn.softmax(jnp.asarray(state.log_weights))
    return np.asarray(particles[0], np.float32), np.asarray(weights)


def _departures(
    info: Info, placed: PlacedObservations, members: np.ndarray, weights: np.ndarray, step: int
) -> dict[str, np.ndarray]:
    """Columns of the feedback at one step, each of the shape (row,); NaN for what a filter does not record."""
    shape = placed.xs["y"].shape[1:]
    seen = np.asarray(placed.observe(members, step), float)
    analysis = weights @ seen
    site = info.background.sites.get(OBSERVATION) if hasattr(info.background, "sites") else None
    rejected = info.check.rejected.get(OBSERVATION) if hasattr(info.check, "rejected") else None
    background, variance = (
        np.full(shape, np.nan) if site is None else np.asarray(v) for v in (site[:2] if site else (0, 0))
    )
    return {
        "rejected": np.zeros(shape, bool) if rejected is None else np.asarray(rejected),
        "background": background,
        "background_spread": np.sqrt(variance),
        "analysis": analysis,
        "analysis_spread": np.sqrt(weights @ (seen - analysis) ** 2 / max(1.0 - np.sum(weights**2), 1e-12)),
    }
