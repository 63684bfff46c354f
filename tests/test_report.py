"""Findings and the page of a report, on feedback made up by numpy."""

import html.parser
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import xarray

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.report import Findings

FIELDS = (  # name, unit, pressure in Pa, typical value, spread, error, type
    ("temperature", "K", 85000.0, 275.0, 0.9, 1.0, "sonde"),
    ("u_component_of_wind", "m s-1", 85000.0, 5.0, 1.8, 1.5, "sonde"),
    ("u_component_of_wind", "m s-1", 25000.0, 25.0, 2.8, 2.5, "sonde"),
    ("surface_pressure", "hPa", np.nan, 1005.0, 0.8, 1.0, "land"),
)


def feedback(seed=0, cycles=24, stations=20, shared=0.3):
    """Calibrated feedback; a part of the background's error is shared by all rows of a cycle."""
    rng = np.random.default_rng(seed)
    frames = []
    for name, unit, pressure, typical, p, r, kind in FIELDS:
        places = np.random.default_rng(1)
        n = cycles * stations
        cycle = np.repeat(np.arange(cycles), stations)
        error = p * (np.sqrt(shared) * rng.normal(size=cycles)[cycle] + np.sqrt(1 - shared) * rng.normal(size=n))
        truth = typical + 5 * rng.normal(size=n)
        value, background = truth + r * rng.normal(size=n), truth - error
        analysis = background + p**2 / (p**2 + r**2) * (value - background)
        frames.append(
            pd.DataFrame(
                {
                    "cycle": cycle,
                    "station": np.tile([f"{kind[0].upper()}{i:02d}" for i in range(stations)], cycles),
                    "lat": np.tile(np.degrees(np.arcsin(places.uniform(-1, 1, stations))), cycles),
                    "lon": np.tile(places.uniform(-180, 180, stations), cycles),
                    "value": value,
                    "background": background,
                    "analysis": analysis,
                }
            ).assign(
                name=name,
                unit=unit,
                pres=pressure,
                type=kind,
                error_used=r,
                background_spread=p,
                flag="used",
                analysis_spread=np.sqrt(p**2 * r**2 / (p**2 + r**2)),
            )
        )
    frame = pd.concat(frames, ignore_index=True)
    withheld = frame["station"].isin(["S00", "L00"])
    frame.loc[withheld, "flag"] = "withheld"
    frame.loc[withheld, "analysis"] = frame["background"]
    frame.loc[withheld, "analysis_spread"] = frame["background_spread"]
    return frame


def of(rows, **columns):
    """Where the columns have these values."""
    return np.logical_and.reduce([rows[name] == value for name, value in columns.items()])


def test_a_calibrated_run_is_called_so():
    found = Findings(feedback())
    assert found.calibrated
    assert found.sentence.startswith("Calibrated: 1920 observations in 24 cycles agree")
    assert len(found) == 0


def too_sure(rows):
    rows[["error_used", "background_spread", "analysis_spread"]] *= 0.7
    return {"too sure", "P or R too small", "analysis too sure"}, "Too sure: observations are farther"


def too_wide(rows):
    rows[["error_used", "background_spread", "analysis_spread"]] *= 1.6
    return {"spread too large", "P or R too large"}, "Spread too large: observations are"


def one_error(rows):
    """The analysis keeps the gain of the right error, so Desroziers' estimates tell it from the spread."""
    here = of(rows, name="u_component_of_wind", pres=85000.0)
    rows.loc[here, "error_used"] *= 0.4
    return {"R too small"}, "but: R too small for u_component_of_wind at 850 hPa."


def model_bias(rows):
    rows.loc[of(rows, name="temperature"), "value"] += 1.2
    return {"biased"}, "but: bias of temperature at 850 hPa."


def biased_station(rows):
    rows.loc[of(rows, name="temperature", station="S05"), "value"] -= 3.0
    return {"biased station"}, "but: biased station S05 (temperature)."


def noisy_station(rows):
    here = of(rows, name="surface_pressure", station="L07")
    rows.loc[here, "value"] += 5.0 * np.random.default_rng(5).normal(size=here.sum())
    return {"noisy station"}, "but: noisy station L07 (surface_pressure)."


def rejected_type(rows):
    here = of(rows, type="land", flag="used") & (np.random.default_rng(6).random(len(rows)) < 0.1)
    rows.loc[here, "flag"] = "far from background"
    return {"many rejections"}, "but: many rejections of surface_pressure."


def rejected_station(rows):
    rows.loc[of(rows, station="S03", name="temperature"), "flag"] = "out of bounds"
    return {"many rejections"}, "but: many rejections of temperature of station S03"


def wrong_shape(rows):
    """Departures of the right size, all of the same absolute value."""
    z = np.sign(rows["value"] - rows["background"])
    rows["value"] = rows["background"] + z * np.sqrt(rows["background_spread"] ** 2 + rows["error_used"] ** 2)
    return {"ranks not flat"}, "but: ranks not flat."


FAULTS = (too_sure, too_wide, model_bias, noisy_station, rejected_type, rejected_station, wrong_shape)
SLOW = pytest.mark.slow


@pytest.mark.parametrize("fault", [one_error, biased_station, *(pytest.param(f, marks=SLOW) for f in FAULTS)])
def test_each_fault_is_named(fault):
    rows = feedback()
    kinds, words = fault(rows)
    found = Findings(rows)
    assert {str(one.kind) for one in found} == kinds
    assert words in found.sentence
    assert all(one.p_value <= one.threshold for one in found)
    assert list(found.table()["kind"]) == [one.kind for one in found]
    suspects = found.suspects()[["station", "variable"]].to_numpy().tolist()
    of_station = {
        biased_station: [["S05", "temperature"]],
        noisy_station: [["L07", "surface_pressure"]],
        rejected_station: [["S03", "temperature"]],
    }
    assert suspects == of_station.get(fault, [])


def test_a_station_with_two_suspect_variables_is_suspect_as_a_whole():
    """A bias that is too small for a finding of its own is suspect where another variable has a finding."""
    rows = feedback()
    biased_station(rows)
    rows.loc[of(rows, name="u_component_of_wind", station="S05"), "value"] += 1.5
    found = Findings(rows)
    assert [one.subject for one in found] == ["S05 (temperature)"]
    listed = found.suspects()
    assert listed["station"].tolist() == ["S05"]
    assert listed["variable"].isna().all()
    assert listed["why"][0].startswith("2 of its ")


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_stated():
    """At a rate of 10 %, of 60 faultless runs; the bound holds with a probability of 99.9 %."""
    runs = 60
    alarms = sum(len(Findings(feedback(100 + seed), false_alarm_rate=0.1)) > 0 for seed in range(runs))
    assert alarms <= scipy.stats.binom.ppf(0.999, runs, 0.1)


def test_what_cannot_be_judged_is_not():
    assert "Too few cycles to judge calibration (3, at least 8)" in Findings(feedback(cycles=3)).sentence
    assert Findings(feedback()[:0]).sentence == "Nothing to judge: the table has no rows."
    found = Findings(feedback().assign(background=np.nan))
    assert not found.calibrated
    assert "no row that is used has a background" in found.sentence
    with pytest.raises(ValueError, match=r"false_alarm_rate=0; give the share of faultless runs"):
        Findings(feedback(), false_alarm_rate=0)


class Page(html.parser.HTMLParser):
    """Elements of a page; closing tags have to fit."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


EVIL = "<script>alert('$x^')</script>&amp;\"{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def page():
    """A page of one variable, whose names are hostile."""
    rows = feedback(cycles=9, stations=6)
    rows = rows[rows["name"] == "temperature"].replace({"name": {"temperature": EVIL}})
    rows.loc[rows["station"] == "S05", "station"] = EVIL
    rows = rows.assign(unit=EVIL, type=EVIL).drop(columns=["lat", "lon"])
    rows.loc[rows.index[:3], "flag"] = EVIL
    rows.loc[rows.index[-3:], "flag"] = "far from background"
    cycles = pd.DataFrame({"time": pd.date_range("2026-01-01", periods=9, freq="12h"), "ess": 5.0})
    return ndda.report.html(rows, cycles=cycles, facts={EVIL: {EVIL: [EVIL]}}, title=EVIL)


def test_a_page_needs_nothing_from_elsewhere(page):
    found = Page(page)
    links = [each.get(name, "") for _, each in found.elements for name in ("href", "src", "xlink:href")]
    assert all(link == "" or link.startswith("#") for link in links)
    assert not {tag for tag, _ in found.elements} & {"script", "link", "img", "iframe", "object", "image"}
    assert re.findall(r"url\((?!#)|@import", page) == []


def test_a_page_shows_texts_of_a_table_as_texts(page):
    assert "<script" not in page
    texts = "".join(Page(page).texts)
    assert texts.count(EVIL) >= 6
    assert not any(EVIL in name for _, each in Page(page).elements for name in each)


def test_a_page_can_be_read_without_seeing_it(page):
    found = Page(page)
    assert found.all("html") == [{"lang": "en"}]
    assert all(figure["aria-label"] for figure in found.all("figure"))
    assert len(found.all("figure")) == len(found.all("svg")) == 5
    assert len(found.all("caption")) == len(found.all("table")) >= 5
    names = [each["id"] for _, each in found.elements if "id" in each]
    assert len(names) == len(set(names))
    targets = {each["href"][1:] for each in found.all("a")}
    assert targets <= set(names)


@pytest.mark.parametrize("left", [["flag", "cycle", "value", "name"], None], ids=["no background", "no rows"])
def test_a_page_of_little(left):
    rows = feedback(cycles=2)
    page = Page(ndda.report.html(rows[left] if left else rows[:0]))
    assert page.all("figure") == []
    assert "Nothing to judge" in "".join(page.texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[rows["cycle"] == 0],
        lambda rows: rows[rows["flag"] != "withheld"],
        lambda rows: rows.assign(flag="out of bounds", background=np.nan, analysis=np.nan),
        lambda rows: rows.drop(columns=["analysis", "analysis_spread"]),
        lambda rows: rows.drop(columns=["background_spread", "station", "type", "unit"]),
        lambda rows: rows.drop(columns=["lat", "lon", "pres"]),
        lambda rows: rows.assign(value=rows["background"], background_spread=0.0),
        lambda rows: rows.assign(time=pd.Timestamp("2026-01-01", tz="UTC"), station=np.arange(len(rows)) % 7),
        lambda rows: rows.assign(lat=50.0 + 0.01 * rows["lat"], lon=5.0 + 0.01 * rows["lon"]),
    ],
)
def test_a_page_without_optional_parts(change):
    rows = feedback(cycles=9, stations=4)
    rows = change(rows[rows["name"] == "u_component_of_wind"]).reset_index(drop=True)
    page = Page(ndda.report.html(rows))
    assert len(page.all("table")) >= 1
    assert "nan" not in " ".join(page.texts).lower().split()


def test_increments_and_coastlines_of_a_run(tmp_path):
    """Analysis minus background over the cycles that both have, and the circle of a round continent."""
    latitude, longitude = np.linspace(88.0, -88.0, 45), np.arange(0.0, 360.0, 4.0)
    times = pd.date_range("2026-01-01", periods=3, freq="12h")
    rng = np.random.default_rng(0)
    dims = ("time", "level", "latitude", "longitude")
    after = xarray.Dataset(
        {
            "z": (dims, rng.normal(size=(3, 2, 45, 90)), {"units": "m"}),
            "t": (dims[:1] + dims[2:], np.ones((3, 45, 90))),
        },
        coords={"time": times, "level": [850.0, 500.0], "latitude": latitude, "longitude": longitude},
    )
    before = after.isel(time=slice(1, None)) - xarray.DataArray([1.0, 3.0], {"time": times[1:]})
    for name, fields in (("analysis", after), ("background", before)):
        fields.to_zarr(tmp_path / f"{name}.zarr", group="mean", consolidated=False)
    t, z = ndda.report.read_increments(tmp_path, ["t"])
    assert (t.name, z.name, z.level, z.unit, z.cycles) == ("t", "z", 500.0, "m", 2)
    np.testing.assert_allclose(z.field, 2.0)
    assert z.rms == pytest.approx(np.sqrt(5.0))
    assert ndda.report.read_increments(tmp_path / "none") == []

    assert ndda.report.read_coast(tmp_path) == []
    (tmp_path / "run.toml").write_text(f"[prior]\nsurface = {str(tmp_path / 'mask.nc')!r}\n")
    assert ndda.report.read_coast(tmp_path) == []  # the file is not there any more
    off = np.hypot(latitude[:, None] - 10.0, (longitude + 180.0) % 360.0 - 180.0)
    mask = xarray.Dataset(
        {"lsm": (("lat", "lon"), np.clip((32.0 - off) / 4.0, 0.0, 1.0))}, {"lat": latitude, "lon": longitude}
    )
    mask.to_netcdf(tmp_path / "mask.nc", engine="h5netcdf")
    coast = np.concatenate(ndda.report.read_coast(tmp_path))
    np.testing.assert_allclose(np.hypot(coast[:, 1] - 10.0, (coast[:, 0] + 180.0) % 360.0 - 180.0), 30.0, atol=0.4)


@pytest.mark.slow
def test_the_folder_of_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no feedback.parquet"):
        ndda.report.write_report(tmp_path)
    feedback(cycles=9, stations=4).to_parquet(tmp_path / "feedback.parquet")
    pd.DataFrame({"time": pd.date_range("2026-01-01", periods=9, freq="12h"), "tempering": 0.5}).to_csv(
        tmp_path / "cycles.csv", index=False
    )
    (tmp_path / "run.json").write_text('{"members": 16, "prior": {"name": "held_suarez"}}')
    longitude = np.arange(0.0, 360.0, 15.0)
    wave = 3.0 * np.cos(np.deg2rad(4 * longitude))
    dims = ("time", "number", "level", "latitude", "longitude")
    fields = xarray.Dataset(
        {"temperature": (dims, np.broadcast_to(wave, (2, 3, 2, 6, 24)), {"units": "K"})},
        coords={"level": [850.0, 500.0], "latitude": np.linspace(75, -75, 6), "longitude": longitude},
    )
    fields.to_zarr(tmp_path / "analysis.zarr", group="members", consolidated=False)
    mean = fields.mean("number").assign_coords(time=pd.date_range("2026-01-01", periods=2, freq="12h"))
    mean.to_zarr(tmp_path / "analysis.zarr", group="mean", consolidated=False)
    (0.5 * mean).to_zarr(tmp_path / "background.zarr", group="mean", consolidated=False)
    fields.to_zarr(tmp_path / "background.zarr", group="members", consolidated=False)
    path = ndda.report.write_report(tmp_path)
    assert path == tmp_path / "report.html"
    texts = "".join(Page(path.read_text(encoding="utf-8")).texts)
    for words in (
        "2026-01-05 00:00 UTC",
        "Tempering of the weights",
        "prior: name",
        "held_suarez",
        "temperature at 500 hPa",
        "Mean over 2 cycles; RMS over cycles and area: 1.06",
    ):
        assert words in texts
    (spectrum,) = ndda.report.read_spectra(tmp_path)
    power = spectrum.power["analysis members"]
    np.testing.assert_allclose(power, 4.5 * (np.arange(1, 13) == 4), atol=1e-6)
