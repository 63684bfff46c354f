"""Configuration of an assimilation run: the keys of `run.toml`, their defaults, and messages about wrong ones.

Each class below is a table of the file. Their fields are the keys; docs/assimilate.md lists them, and a test compares
the list with these classes.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import json
import os
import pathlib
import tomllib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field

from numpyro_diffusion_da.arguments import shown
from numpyro_diffusion_da.fields.times import utc_times
from numpyro_diffusion_da.spelling import Spelling, spelled_as

LARGEST_FILE = 2**20
"""Largest number of bytes of a configuration: 1 MB."""

MOST_STEPS = 100_000
"""Largest number of steps of a run."""

Whole = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
Flagged = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1, strict=True)]
Path = Annotated[pathlib.Path, Field(strict=False)]


class Settings(BaseModel):
    """Table of a configuration: unknown keys are refused, and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)

    def unused(self) -> dict[str, str]:
        """Keys that have no effect beside the other ones, each with words that say beside which, and which have it."""
        return {}

    @pydantic.model_validator(mode="after")
    def _refuse_unused(self) -> Self:
        for key, beside in self.unused().items():
            if key in self.model_fields_set and getattr(self, key) not in (None, False):  # nor 0
                raise ValueError(f"{key} is not used {beside}; leave it out.")
        return self


def _only_with(key: str, value: str, takers: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Keys that have an effect only with some values of another key, and not with the one that it has.

    Args:
        key: the other key.
        value: what it has.
        takers: values of the other key that each key needs.
    """
    return {
        name: f'with {key} = "{value}", only with {" or ".join(map(json.dumps, needed))}'
        for name, needed in takers.items()
        if value not in needed
    }


NEEDED_BY = {"gencast": ("stats", "surface"), "weathernext2": ("configuration", "surface")}
"""Keys that a checkpoint needs, by the key that names it."""

TAKEN_BY = {
    "stats": ("gencast",),
    "configuration": ("weathernext2",),
    **dict.fromkeys(("resolution", "attention", "precision"), tuple(NEEDED_BY)),
}
"""Keys that only some checkpoints take."""


class PriorSettings(Settings):
    """Table `[prior]`: the emulator that makes forecasts. Give `name`, `gencast` or `weathernext2`."""

    name: Literal["held_suarez"] | None = Field(default=None, description="prior that ships with the library")
    gencast: Path | None = Field(default=None, description="checkpoint of GenCast (.npz)")
    weathernext2: Path | None = Field(default=None, description="checkpoint of WeatherNext 2 (.npz)")
    stats: Path | None = Field(default=None, description="folder of GenCast's published statistics")
    configuration: Text | None = Field(
        default=None, description="WeatherNext 2's configuration: its published name, or the path of a file"
    )
    surface: Path | None = Field(
        default=None, description="file with geopotential_at_surface, land_sea_mask and sea_surface_temperature"
    )
    resolution: Positive | None = Field(default=None, description="degrees; by default the grid of `surface`")
    attention: Text | None = Field(
        default=None, description='"mha", "triblockdiag_mha" or "splash_mha"; by default by device'
    )
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = Field(
        default="float32", description="precision of the network's matrix products"
    )

    @pydantic.model_validator(mode="after")
    def _one_prior(self) -> PriorSettings:
        given = [key for key in ("name", "gencast", "weathernext2") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; give one of name, gencast and weathernext2.")
        for kind in given:
            for key in NEEDED_BY.get(kind, ()):
                if getattr(self, key) is None:
                    raise ValueError(f"{kind} needs {key} too; add it.")
        return self

    def unused(self) -> dict[str, str]:
        """Keys of checkpoints that are not given."""
        given = [key for key in ("name", *NEEDED_BY) if getattr(self, key) is not None]
        beside = f"with {given[0]}, only" if given else "without a checkpoint, only"
        return {
            key: f"{beside} with {' or '.join(takers)}"
            for key, takers in TAKEN_BY.items()
            if not set(takers) & set(given)
        }


class FirstGuessSettings(Settings):
    """Table `[first_guess]`: the states one step before `start`."""

    kind: Literal["climatology", "ensemble", "frames"] = Field(
        default="climatology",
        description="draws from the prior's climate, members of an ensemble, or the state of an analysis",
    )
    file: Path | None = Field(default=None, description="NetCDF file or Zarr group with the states")
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] = Field(
        default=0.0, description="for frames: added anomalies, in standard deviations of the prior's climate"
    )
    smoothing: Share = Field(
        default=0.5,
        description="for ensembles: share of each draw's anomaly that is a random combination of all members",
    )
    interpolate: Flagged = Field(default=False, description="interpolate the file to the grid of the prior")

    @pydantic.model_validator(mode="after")
    def _file(self) -> FirstGuessSettings:
        if self.kind != "climatology" and self.file is None:
            raise ValueError(f'kind = "{self.kind}" needs file; add it.')
        return self

    def unused(self) -> dict[str, str]:
        """Keys of other kinds of first guesses."""
        takers = {
            "file": ("ensemble", "frames"),
            "spread": ("frames",),
            "smoothing": ("ensemble",),
            "interpolate": ("ensemble", "frames"),
        }
        return _only_with("kind", self.kind, takers)


class TimeSettings(Settings):
    """Table `[times]`: the times of the analyses."""

    start: str = Field(description="time of the first analysis, one step after the first guess")
    end: str = Field(description="time of the last analysis")
    step: Text | None = Field(
        default=None, description="time between analyses; by default the prior's own, which it must be"
    )

    @pydantic.field_validator("start", "end", mode="before")
    @classmethod
    def _date(cls, value: Any) -> str:
        if isinstance(value, datetime.datetime | datetime.date | np.datetime64):
            value = str(value)
        try:
            if not isinstance(value, str) or not value[:1].isdigit():  # no "now"
                raise ValueError
            return str(utc_times([value])[0].astype("datetime64[s]"))
        except ValueError:
            raise ValueError(f"it should be a time such as 2026-01-01T00, not {shown(value)}.") from None

    @pydantic.field_validator("step")
    @classmethod
    def _length(cls, value: str | None) -> str | None:
        if value is not None and not step_of(value) > np.timedelta64(0, "s"):
            raise ValueError(f'it should be a time difference such as "12h", not {shown(value)}.')
        return value

    @pydantic.model_validator(mode="after")
    def _order(self) -> TimeSettings:
        if np.datetime64(self.end) < np.datetime64(self.start):
            raise ValueError(f"end = {self.end} is before start = {self.start}; give them in order.")
        return self


class ObservationSettings(Settings):
    """Table `[observations]`: tables of observations, as `observation.read_table` reads them."""

    files: tuple[Path, ...] = Field(description="CSV, Parquet or NetCDF files")
    window: Text | tuple[Text, Text] | None = Field(
        default=None,
        description="width around each time, or its parts before and after; by default windows fill the time",
    )
    columns: dict[Text, Text] = Field(default={}, description="names of columns in the files = names that are known")
    variables: dict[Text, Text | Literal[False]] = Field(
        default={}, description="names of variables in the files = names of the prior's; false leaves one out"
    )
    units: dict[Text, Text] = Field(default={}, description="units of variables whose rows have none")
    correlation: Fraction | None = Field(
        default=None,
        description="correlation of the errors of two rows of a step with the same `group`; by default independent",
    )
    bias_from: Path | None = Field(
        default=None, description="folder of an earlier run whose departures give the biases of instruments to remove"
    )
    bias_by: tuple[Text, ...] = Field(default=("station",), description="columns that tell instruments apart")
    missing_codes: tuple[float, ...] | None = Field(default=None, description="numbers that mean a missing value")

    def unused(self) -> dict[str, str]:
        """The columns of biases, without biases."""
        return {"bias_by": "without bias_from"} if self.bias_from is None else {}

    @pydantic.field_validator("files", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | os.PathLike) else value

    @pydantic.field_validator("files")
    @classmethod
    def _some(cls, value: tuple[pathlib.Path, ...]) -> tuple[pathlib.Path, ...]:
        if not value:
            raise ValueError("it is empty; name one file or more.")
        return value

    @pydantic.field_validator("window")
    @classmethod
    def _length(cls, value: Any) -> Any:
        widths = [step_of(part) for part in ((value,) if isinstance(value, str) else value or ())]
        none = np.timedelta64(0, "s")
        if widths and not (all(width >= none for width in widths) and max(widths) > none):
            raise ValueError(f'it should be a width such as "6h", or a pair of them, not {shown(value)}.')
        return value


class QualitySettings(Settings):
    """Table `[quality]`: checks of `ndda.observation`, in the order of these keys."""

    accepted: tuple[Text | Whole, ...] = Field(
        default=(), description="marks of good rows in the table's column `quality`"
    )
    blacklist: dict[Literal["stations", "types", "variables"], tuple[Text | Whole, ...]] = Field(
        default={}, description="rows that are known to be bad, by stations, types and variables"
    )
    blacklist_file: Path | None = Field(
        default=None,
        description="CSV or Parquet file of such rows with the columns station, type and variable, or some of them",
    )
    bounds: Flagged = Field(
        default=True, description="refuse values that are impossible, or far from the prior's climate"
    )
    bounds_factor: Positive = Field(
        default=8.0, description="largest distance from the climate, in standard deviations"
    )
    max_speed: dict[Text, Positive] = Field(
        default={"ship": 75.0}, description="largest speed of stations by their type, km/h; {} for no check of tracks"
    )
    still_hours: Positive | None = Field(
        default=None, description="time after which a station of these types that does not move is set aside"
    )
    duplicates: Flagged = Field(default=True, description="use one of several equal rows, and one report of a station")
    height_difference: Positive | None = Field(
        default=None, description="largest difference of a station's height from that of the prior's surface, m"
    )
    thinning_km: Positive | None = Field(default=None, description="smallest distance of two rows of a variable")
    superobbing_km: Positive | None = Field(default=None, description="size of the cells whose rows are averaged")
    withheld: Fraction | tuple[Text | Whole, ...] = Field(
        default=0.0, description="fraction of the stations, or their names, that are compared and not assimilated"
    )
    background_check: Positive | Literal[False] = Field(
        default=5.0,
        description="largest distance from the forecast, in expected standard deviations; false for no check",
    )

    @pydantic.field_validator("blacklist")
    @classmethod
    def _some(cls, value: dict[str, tuple[str | int, ...]]) -> dict[str, tuple[str | int, ...]]:
        if value and not any(value.values()):
            raise ValueError("it names no stations, types or variables; name some, or leave it out.")
        return value

    def unused(self) -> dict[str, str]:
        """The size of bounds without bounds, and a time without types."""
        found = {} if self.bounds else {"bounds_factor": "with bounds = false"}
        return found if self.max_speed else {**found, "still_hours": "with max_speed = {}"}


LOCAL = ("fa_apf", "enkf")
"""Filters that take a taper, and inflation."""


class FilterSettings(Settings):
    """Table `[filter]`: the filter and what it is made of."""

    method: Literal["fa_apf", "enkf", "guided_pf", "bootstrap"] = Field(
        default="fa_apf", description="FAAPF with moved ancestors, EnKF, GuidedPF or Bootstrap"
    )
    particles: Annotated[int, Field(ge=2, le=2**31 - 1, strict=True)] = Field(
        default=32, description="particles, or members of the EnKF"
    )
    taper_km: Positive | Literal[False] = Field(
        default=2500.0, description="half-width of the localization of fa_apf and enkf; false for none"
    )
    likelihood: Literal["normal", "huber"] = Field(
        default="normal",
        description="distribution of errors; huber, not for enkf, limits the influence of rows that are far off",
    )
    huber_threshold: Positive = Field(default=1.345, description="where Huber's tails begin, in standard deviations")
    error_factor: Positive | None = Field(
        default=None,
        description="factor on the prior's one-step errors; by default 1.3 for held_suarez with fa_apf, else 1",
    )
    inflation: Share | None = Field(
        default=None, description="relaxation of the spread to its prior (RTPS); by default 0.5 for enkf, else 0"
    )
    sampler: Literal["fast", "cheap", "accurate"] | None = Field(
        default=None,
        description="noise levels of a draw: 8, 16 with a cheap step, or the library's default",
    )
    guidance: Literal["cheap", "accurate"] | None = Field(
        default=None,
        description="products of the guidance's solver: two at each level (cheap, by default), or as many as it needs",
    )
    batch_size: Count | None = Field(default=None, description="particles moved at a time; by default as memory allows")

    @pydantic.model_validator(mode="after")
    def _likelihood(self) -> FilterSettings:
        if self.likelihood == "huber" and self.method == "enkf":
            raise ValueError(
                'likelihood = "huber" has errors that are not Gaussian, which method = "enkf" needs; give '
                'likelihood = "normal" or another method.'
            )
        return self

    def unused(self) -> dict[str, str]:
        """Keys of other methods, and of another likelihood."""
        takers = {"taper_km": LOCAL, "inflation": LOCAL, "guidance": ("fa_apf", "guided_pf")}
        found = _only_with("method", self.method, takers)
        return found | _only_with("likelihood", self.likelihood, {"huber_threshold": ("huber",)})


class OutputSettings(Settings):
    """Table `[output]`: the folder of the run and what is in it."""

    folder: Path = Field(default=pathlib.Path("run"), description="folder of the run; nothing is written outside it")
    seed: Seed = Field(default=0, description="seed of all random numbers")
    members: Count | None = Field(default=None, description="members kept in analysis.zarr; by default all particles")
    background: Flagged = Field(
        default=False, description="write background.zarr, forecasts from the analysis one step before"
    )


Errors = dict[Text, Positive]


class RunConfig(Settings):
    """Configuration of an assimilation run. Read it from a file, or make it from keywords.

        config = RunConfig.read("run.toml")
        config = RunConfig(
            prior={"name": "held_suarez"},
            times={"start": "2026-01-01T00", "end": "2026-01-02T12"},
            observations={"files": ["stations.csv"], "window": "6h"},
        )

    Attributes:
        prior: the emulator; without a name it is given to `assimilate` as an object.
        first_guess: states one step before the first analysis.
        times: times of the analyses.
        observations: tables of observations.
        errors: standard deviation of the errors of rows without one of their own, by variable ("temperature"), channel
            ("temperature_850") or type and variable ("ship/2m_temperature"), in the unit of the prior's layout.
        quality: checks of the rows.
        filter: the filter.
        output: folder and what is written into it.

    Raises:
        ValueError: a key is unknown or missing, or a value is not what its key holds. The message names the key.
    """

    prior: PriorSettings = PriorSettings()
    first_guess: FirstGuessSettings = FirstGuessSettings()
    times: TimeSettings
    observations: ObservationSettings
    errors: Errors = {}
    quality: QualitySettings = QualitySettings()
    filter: FilterSettings = FilterSettings()
    output: OutputSettings = OutputSettings()

    def __init__(self, /, **tables: Any) -> None:
        try:
            super().__init__(**tables)
        except pydantic.ValidationError as error:
            raise ValueError(f"{OF_PYTHON}{sentence(error)}") from None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RunConfig:
        """Read a configuration from a TOML file. Paths in it are relative to the folder of the file.

        Args:
            path: the file, such as "run.toml".

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not TOML, a key is unknown or missing, or a value is not what its key holds. The message
                names the file and the key.
        """
        path = pathlib.Path(path)
        try:
            found = cls(**_read_toml(path))
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix(OF_PYTHON)}") from None
        return found.with_paths_from(path.parent)

    def with_paths_from(self, folder: pathlib.Path) -> RunConfig:
        """Configuration whose relative paths begin in a folder.

        Args:
            folder: the folder.
        """

        def placed(value: Any) -> Any:
            if isinstance(value, tuple) and value and isinstance(value[0], pathlib.Path):
                return tuple(folder / one for one in value)
            return folder / value if isinstance(value, pathlib.Path) else value

        tables = {}
        for name in type(self).model_fields:
            table = getattr(self, name)
            if isinstance(table, Settings):
                tables[name] = table.model_copy(update={key: placed(value) for key, value in table})
        text = self.prior.configuration
        if text is not None and (folder / text).is_file():
            tables["prior"] = tables["prior"].model_copy(update={"configuration": str(folder / text)})
        return self.model_copy(update=tables)

    def values(self) -> dict[str, Any]:
        """Values by table and key, as JSON and TOML hold them, with absolute paths.

        Keys that are None and keys that have no effect beside the others are left out.
        """
        given = self.with_paths_from(pathlib.Path.cwd())
        found = dict(given.model_dump(mode="json", exclude_none=True))
        for table in found:
            if isinstance(settings := getattr(given, table), Settings):
                found[table] = {key: value for key, value in found[table].items() if key not in settings.unused()}
        return found

    def to_toml(self) -> str:
        """Text of a TOML file with every key that has a value and an effect, and with absolute paths."""
        lines = []
        for table, keys in self.values().items():
            lines += ["", f"[{table}]", *(f"{_key(key)} = {_toml(value)}" for key, value in keys.items())]
        return "\n".join(lines[1:]) + "\n"


OF_PYTHON = "RunConfig: "
"""Beginning of a message about a configuration that is not from a file."""


def step_of(text: str) -> np.timedelta64:
    """Time difference that a text states, such as "12h"; NaT if it states none.

    Args:
        text: the text.
    """
    import pandas

    try:
        return pandas.Timedelta(text).to_timedelta64().astype("timedelta64[s]")
    except (ValueError, OverflowError):
        return np.timedelta64("NaT", "s")


def _read_toml(path: pathlib.Path) -> dict[str, Any]:
    """Tables of a TOML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is not TOML. The message does not name the file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file '{path}'; give the path of a configuration.") from None
    except (OSError, ValueError) as error:  # a folder, no permission, or a name that no file can have
        raise ValueError(f"it cannot be read ({getattr(error, 'strerror', None) or error}); give a file.") from None
    if len(content) > LARGEST_FILE:
        raise ValueError("it has more than 1 MB; give a configuration, a small file.")
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    except (ValueError, RecursionError, OverflowError) as error:  # among them TOMLDecodeError
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"it is not TOML ({first}); texts need quotation marks.") from None


def _key(key: str) -> str:
    """Key as TOML spells it."""
    return key if key.replace("_", "").isalnum() and key.isascii() else _toml(key)


def _toml(value: Any) -> str:
    """Value as TOML spells it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if value is ...:
        return "..."
    if value is None:
        return "false"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


KEYS: Mapping[str, str | None] = {
    **{f"read_table.{name}": f"observations.{name}" for name in ("columns", "variables", "units")},
    **{name: f"observations.{name}" for name in ("window", "correlation")},
    "errors": "errors",
    "accepted": "quality.accepted",
    "Blacklist": "the blacklist of [quality]",
    "Withheld": "quality.withheld",
    "still": "quality.still_hours",
    "height_difference": "quality.height_difference",
    "Superobbing": "quality.superobbing_km",
    "threshold": "quality.background_check",
    "inflation": "filter.inflation",
    "taper": "filter.taper_km",
    "FAAPF": 'filter.method = "fa_apf"',
    "weight": "",
    "error_variances": "ndda report",
    "prior.stats": "prior.stats",
    "prior.resolution": "prior.resolution",
    "prior.config": "prior.configuration",
    "interpolate": "",
    "without_precipitation": "",
    "missing value": "leave a missing value empty",
    "gross errors": "leave gross errors out with quality.background_check = 5.0",
    "site y": "of the rows",
    "site y_groups": "of the rows of groups",
}
"""Keys by the argument that they give, for messages; "" for an argument that no key gives."""


def in_keys(
    keys: Mapping[str, str | None] = KEYS,
    observation: Callable[[str, int, tuple[int, ...]], str] | None = None,
    step: Callable[[int], str] | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Name keys of a configuration, not arguments, in the messages of what is called within.

    Args:
        keys: keys by the argument that they give.
        observation: words for an observed value by its site, step and index.
        step: words for a step.
    """
    return spelled_as(Spelling(keys, _toml, observation, step))


# --- messages ---------------------------------------------------------------------------------------------------------


def sentence(error: pydantic.ValidationError) -> str:
    """Say in one sentence what is wrong with a configuration, by its key.

    Args:
        error: what pydantic found. Unknown keys come first, because a misspelled key is missing under its right name.
    """
    found = error.errors(include_url=False)
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    where, field = _place(first["loc"])
    more = len({_place(one["loc"])[0] for one in found}) - 1
    others = "" if more == 0 else f" ({more} more {'key is' if more == 1 else 'keys are'} wrong)"
    if first["type"] == "extra_forbidden":
        return _unknown(first["loc"]) + others + "."
    if first["type"] == "missing":
        if len(first["loc"]) == 1:
            return f"the table [{where}] is missing; add it with {_needed(where)}{others}."
        return f"{where} is missing; add it{_described(field)}{others}."
    wrong = [one for one in found if _place(one["loc"])[0] == where]
    own = next((one for one in wrong if one["type"] == "value_error"), None)
    if own is not None:
        return f"{where}: {str(own['ctx']['error']).removesuffix('.')}{others}."
    expected = " or ".join(dict.fromkeys(_expected(one) for one in wrong))
    return f"{where} is {shown(first['input'])}; it should be {expected}{_described(field)}{others}."


def _place(loc: tuple[int | str, ...]) -> tuple[str, Any]:
    """Key that a place in the tables has in words, and its field; alternatives of a type are no part of a key."""
    model: Any = RunConfig
    words, field = [], None
    for part in loc:
        if model is not None:
            words.append(str(part))
            field = model.model_fields.get(part)
            kind = None if field is None else field.annotation
            model = kind if isinstance(kind, type) and issubclass(kind, Settings) else None
        elif field is not None and "dict" in str(field.annotation) and str(part) != "[key]":
            words.append(str(part))
            break
    return ".".join(words), field


def _unknown(loc: tuple[int | str, ...]) -> str:
    """Message about an unknown key, with the nearest known one."""
    *tables, key = map(str, loc)
    model: Any = RunConfig
    for table in tables:
        model = model.model_fields[table].annotation
    known = list(model.model_fields)
    where = f"[{tables[0]}]" if tables else "a configuration"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"{where} has no {'key' if tables else 'table'} {shown(key)}; the nearest known one is {near[0]!r}"
    elsewhere = [
        name
        for name, field in RunConfig.model_fields.items()
        if key in getattr(field.annotation, "model_fields", {}) and [name] != tables
    ]
    if elsewhere:
        return f"{where} has no key {shown(key)}; it belongs to [{elsewhere[0]}]"
    return f"{where} has no {'key' if tables else 'table'} {shown(key)}; it has {', '.join(known)}"


def _expected(one: Any) -> str:
    """Words for what a value should be, those of pydantic where they are plain."""
    words = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "float_parsing": "a number",
        "finite_number": "a finite number",
        "string_type": "a text",
        "string_too_short": "a text that is not empty",
        "bool_type": "true or false",
        "path_type": "a path",
        "tuple_type": "a list",
        "too_long": "a list of {max_length} at most",
        "missing": "a longer list",
        "dict_type": "a table",
        "model_type": "a table",
        "greater_than": "more than {gt:g}",
        "greater_than_equal": "{ge:g} or more",
        "less_than": "less than {lt:g}",
        "less_than_equal": "{le:g} or less",
    }
    if one["type"] == "literal_error":
        return str(one["ctx"]["expected"]).replace("False", "false")
    if one["type"] in words:
        return words[one["type"]].format(**one.get("ctx", {}))
    return str(one["msg"]).removeprefix("Input should be ")


def _described(field: Any) -> str:
    """Description of a key, in brackets."""
    description = getattr(field, "description", None)
    return f" ({description})" if description else ""


def _needed(table: str) -> str:
    """Keys that a table must have, as words."""
    fields = RunConfig.model_fields[table].annotation.model_fields  # type: ignore[union-attr]
    return " and ".join(name for name, field in fields.items() if field.is_required())
