"""Tables of observations: what is read from CSV, Parquet, NetCDF, pandas and xarray, and what is refused."""

import importlib.util

import jax
import numpy as np
import pandas
import pytest
import xarray
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

from numpyro_diffusion_da.fields import Layout, Variable
from numpyro_diffusion_da.observation import Blacklist, Duplicates, Flag, Superobbing, read_table

CSV = """# stations of a winter
time,lat,lon,variable,level,observation,units,error,station,Type,wmo block

2019-03-29T12:00Z,50.1,-0.4,t,850,8.1,degC,1.0,01234,sonde,a b
2019-03-29T14:30+02:00,-89.5,359.6,sp,,-999,hPa,,01234,,
2019-03-29 12:00:00,50.1,-0.4,temperature,,12,K,1.5,"A, B",ship,"x
y"
"""
GOOD = "time,lat,lon,variable,observation\n2019-03-29,1,2,t2m,280\n"


def write(tmp_path, text, name="a.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def same(a, b):
    pandas.testing.assert_frame_equal(a.frame.drop(columns=["source", "row"]), b.frame.drop(columns=["source", "row"]))


def test_csv(tmp_path):
    """Rows are numbered as in the file; zones become UTC; codes become missing values, with a note."""
    table = read_table(write(tmp_path, CSV))
    frame = table.frame
    assert list(frame["row"]) == [4, 5, 6]
    assert set(frame["source"]) == {"a.csv"}
    expected = np.array(["2019-03-29T12:00", "2019-03-29T12:30", "2019-03-29T12:00"], "datetime64[us]")
    np.testing.assert_array_equal(frame["time"].to_numpy(), expected)
    np.testing.assert_array_equal(frame["observation"], [8.1, np.nan, 12.0])
    np.testing.assert_array_equal(frame["pres"], [85000.0, np.nan, np.nan])
    np.testing.assert_array_equal(frame["error"], [1.0, np.nan, 1.5])
    assert list(frame["station"]) == ["01234", "01234", "A, B"]  # a number with a leading zero is a name
    assert frame["type"].isna().tolist() == [False, True, False]
    assert frame["wmo block"].iloc[2] == "x\ny"
    assert table.notes == ("a.csv: 1 of 3 values of observation are -999, which means missing.",)
    assert table.where(1) == "a.csv, row 5"
    assert len(read_table(write(tmp_path, CSV.splitlines()[1] + "\n"))) == 0
    np.testing.assert_array_equal(read_table(tmp_path / "a.csv", missing_codes=[]).frame["observation"], [])


def test_all_forms_give_the_same_table(tmp_path):
    path = write(tmp_path, CSV)
    table = read_table(path)
    semicolons = CSV.replace('"A, B"', "A| B").replace(",", ";").replace("A| B", "A, B")
    same(read_table(write(tmp_path, semicolons, "b.txt")), table)
    frame = pandas.read_csv(path, dtype={"station": str}, comment="#")
    frame.loc[1, "observation"] = np.nan
    frame["time"] = pandas.to_datetime(frame["time"], utc=True, format="ISO8601")
    same(read_table(frame), table)
    assert list(read_table(frame[1:]).frame["row"]) == [1, 2]  # rows of pandas keep their numbers
    dataset = xarray.Dataset.from_dataframe(frame.assign(time=frame["time"].dt.tz_localize(None))).rename(index="obs")
    same(read_table(dataset), table)
    texts = ["variable", "units", "station", "Type", "wmo block"]
    filled = dataset.assign({name: dataset[name].fillna("").astype(str) for name in texts})
    # In files, attributes state units.
    filled["level"] = (100.0 * filled["level"]).assign_attrs(units="Pa")
    filled.to_netcdf(tmp_path / "c.nc", engine="h5netcdf")
    found = read_table(tmp_path / "c.nc")
    assert found.notes[-1] == "c.nc: level was converted from Pa to hPa."
    drop = ["wmo block", "source", "row"]
    pandas.testing.assert_frame_equal(
        found.frame.drop(columns=drop)[sorted(set(found.frame) - set(drop))],
        table.frame.drop(columns=drop)[sorted(set(table.frame) - set(drop))],
        rtol=1e-12,
    )
    # One text for all rows, as bytes, without the dimension.
    one = filled.drop_vars("variable").assign_coords(variable=np.bytes_(b"t2m"))
    one.to_netcdf(tmp_path / "d.nc", engine="h5netcdf")
    assert list(read_table(tmp_path / "d.nc").frame["variable"]) == ["t2m"] * 3
    joined = read_table([path, frame])
    assert list(joined.frame["source"]) == ["a.csv"] * 3 + ["the table"] * 3
    assert list(joined.frame.index) == list(range(6))
    assert repr(joined) == "ObservationTable(6 rows of 3 variables from a.csv, the table)"


def test_parquet(tmp_path, monkeypatch):
    if importlib.util.find_spec("pyarrow") is not None:
        table = read_table(write(tmp_path, CSV))
        table.frame.drop(columns=["source", "row"]).to_parquet(tmp_path / "a.parquet")
        same(read_table(tmp_path / "a.parquet"), table)
        write(tmp_path, "no table", "b.parquet")
        with pytest.raises(ValueError, match=r"b.parquet cannot be read as Parquet \("):
            read_table(tmp_path / "b.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a.pq is a Parquet file, which needs pyarrow; pip install pyarrow"):
        read_table(write(tmp_path, "", "a.pq"))


def test_names_of_columns(tmp_path):
    path = write(tmp_path, "Valid_Time;Latitude;LON;WHAT;OBSERVATION\n2019-03-29;1;2;t2m;280\n")
    frame = read_table(path, columns={"WHAT": "variable"}).frame
    assert {"time", "lat", "lon", "variable", "observation"} <= set(frame.columns)
    # earth2studio's frames
    frame = pandas.DataFrame(
        {"time": pandas.to_datetime(["2019-03-29"]), "lat": [1.0], "lon": [2.0], "observation": [280.0]}
    ).assign(variable="t2m", station="72404", elev=np.float32(12.0), pres=np.nan)
    assert read_table(frame).frame["elev"].iloc[0] == 12.0


BAD = {
    "no column": (
        "time,lat,variable,observation\n",
        r"a.csv has no column 'lon'; it has time, lat, v.* columns={'your",
    ),
    "twice": ("time,lat,lon,lat\n", r"a.csv, row 1: the header has the column 'lat' twice"),
    "two spellings": (
        GOOD.replace("lat,", "Latitude,LAT,"),
        r"a.csv has 'Latitude' and 'LAT' for 'lat'; say which, columns=",
    ),
    "number": (GOOD + "2019-03-30,x,2,t2m,1\n", r"a.csv, row 3: lat is 'x'; give a number, or nothing where"),
    "comma": ("a;" + GOOD.replace(",", ";").replace(";280", ";280,5"), r"a.csv, row 2: "),
    "pole": (GOOD + "2019-03-30,91,2,t2m,1\n\n2019-03-30,92,2,t2m,1\n", r"row 3: lat is 91; give .* \(2 rows are such"),
    "lon": (GOOD + "2019-03-30,1,-190,t2m,1\n", r"a.csv, row 3: lon is -190; give degrees east, from -180 to 360."),
    "date": (GOOD + "30/3/2019,1,2,t2m,1\n", r"a.csv, row 3: time is '30/3/2019'; give a date such as 2019-03-29T"),
    "epoch": (GOOD + "1553860800,1,2,t2m,1\n", r"a.csv, row 3: time is '1553860800'; give a date"),
    "fields": (GOOD + "2019-03-30,1,2,t2m,1,7\n", r"a.csv, row 3: 6 fields, but the header has 5; quote a field"),
    "first": (GOOD.replace("280", "280,7"), r"a.csv, row 2: more fields than the header, which has 5; quote"),
    "quote": (GOOD + '"2019-03-30,1,2,t2m,1\n', r"a.csv cannot be read as CSV \(.*\); save the table as CSV in UTF-8."),
    "empty": ("\n# nothing\n", r"a.csv is empty; give a table with a header."),
    "error": (
        "time,lat,lon,variable,observation,error\n2019-03-29,1,2,t,3,0\n",
        r"row 2: error is 0; give a positive st",
    ),
    "footprint": (
        "time,lat,lon,variable,observation,footprint\n2019-03-29,1,2,t,3,-5\n",
        r"footprint is -5; give a dia",
    ),
    "pressure": (
        "time,lat,lon,variable,observation,pres\n2019-03-29,1,2,t,3,-5\n",
        r"pres is -5; give a pressure in Pa",
    ),
    "level": (
        "time,lat,lon,variable,observation,level\n2019-03-29,1,2,t,3,85000\n",
        r"a.csv, row 2: level is 85000; give a pressure in hPa, up to 1200; pres is the column of pressures in Pa.",
    ),
    "levels": (
        "time,lat,lon,variable,observation,pres,level\n2019-03-29,1,2,t,3,85000,85\n",
        r"a.csv, row 2: pres is 85000 Pa and level is 85 hPa; give the same pressure in both, or one of them.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    text, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_table(write(tmp_path, text))


def table_of(**columns):
    given = {"time": ["2019-03-29"], "lat": [1.0], "lon": [2.0], "variable": ["t2m"], "observation": [280.0], **columns}
    return pandas.DataFrame({name: column for name, column in given.items() if column is not None})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: read_table(3), "read_table got 3; give the path of a CSV"),
        (lambda t: read_table([]), "empty list"),
        (lambda t: read_table(t / "a.xls"), "give a file whose name ends in .csv"),
        (lambda t: read_table(t / "b.csv"), "does not exist; give the path"),
        (lambda t: read_table(table_of().set_axis([list("aabbc"), list("abcde")], axis=1)), "columns of 2 levels"),
        (lambda t: read_table(table_of(time=[1.0])), r"the table, row 0: time is 1; give a date"),
        (lambda t: read_table(table_of(time=[7])), r"the table, row 0: time is 7; give a date"),
        (lambda t: read_table(table_of(lat=[True])), r"the table, row 0: lat is True; give a number"),
        (lambda t: read_table(table_of(lat=[[1.0]])), r"the table, row 0: lat is \[1.0\]; give a number"),
        (lambda t: read_table(table_of(lat=[1j])), "lat holds complex numbers"),
        (lambda t: read_table(xarray.Dataset({"a": ("x", [1.0])})), r"dimensions \('x',\); give a table with the one"),
        (lambda t: read_table(xarray.DataArray([1.0])), "give the path of a CSV"),
        (lambda t: read_table(table_of(), columns={"x": "lat"}), "no column 'x', which columns= names"),
        (lambda t: read_table(table_of(), columns=3), "read_table got columns=3"),
        (lambda t: read_table(table_of(), variables={"t2m": 3}), "variables with 't2m': 3; give names as text"),
        (lambda t: read_table(table_of(), units={"t2m": None}), "units with 't2m': None; give names as text"),
        (lambda t: read_table(table_of(), missing_codes="-999"), "missing_codes='-999'; give numbers"),
        (lambda t: read_table(table_of(), missing_codes=["x"]), "missing_codes with 'x'; give numbers"),
        (lambda t: read_table(table_of(a=[1.0]), columns={"a": "lat"}), "has two columns for 'lat'; name one of them"),
    ],
)
def test_wrong_arguments(tmp_path, call, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        call(tmp_path)


def test_names_that_match_nothing_are_said():
    """Names in any case; those of errors are known or refused; those of units and variables may be of another table."""
    table = table_of(
        time=["2019-03-29"] * 2, lat=[1.0, 2.0], lon=[2.0, 3.0], variable=["T2M", "T850"], observation=[280.0] * 2
    )
    read = read_table(table, units={"foo": "K"}, variables={"T2M": "2m_temperature"})
    assert read.notes == ("units has 'foo', but no row has this variable.",)
    placed = read.on(LAYOUT, ["2019-03-29"], window="2h", errors={"t2m": 1.0, ("ship", "t"): 2.0, "t850": 3.0})
    rows = placed.rows
    assert dict(zip(rows["name"], rows["error_used"], strict=True)) == {"2m_temperature": 1.0, "temperature": 3.0}
    assert list(rows["pres"].dropna()) == [85000.0]
    black = read.on(LAYOUT, ["2019-03-29"], window="2h", errors=1.0, quality=[Blacklist(variables=["T850"])])
    assert list(black.rows["flag"]) == ["used", "blacklisted"]
    with pytest.raises(ValueError, match="errors names 'temprature', which is not known, or is it 'temperature'"):
        read.on(LAYOUT, ["2019-03-29"], window="2h", errors={"temprature": 1.0})
    with pytest.raises(ValueError, match="a correlation of errors was given, but the table has no column group"):
        read.on(LAYOUT, ["2019-03-29"], window="2h", errors=1.0, correlation=0.5)
    early = read.on(LAYOUT, ["2026-01-01"], window="2h", errors=1.0).report()
    assert "All rows are off the windows: their times are from 2019-03-29T00:00 to 2019-03-29T00:00 UTC." in early


def test_a_file_that_is_no_netcdf(tmp_path):
    with pytest.raises(ValueError, match=r"a.nc cannot be read as NetCDF-4 \(.*\); write it again."):
        read_table(write(tmp_path, "x" * 600, "a.nc"))


# --- fuzzed tables: a result, or one sentence with the file and the row ----------------------------------------------

LAYOUT = Layout(
    (4, 8, 4),
    ("latitude", "longitude", "channel"),
    {"latitude": np.linspace(-67.5, 67.5, 4).tolist(), "longitude": (np.arange(8) * 45.0).tolist()},
    variables=(Variable("2m_temperature", "K"), Variable("temperature", "K", (500, 700, 850))),
)
CELLS = {
    "time": ["2019-03-29T12:00Z", "2019-03-29T11:00:00.5+01:00", "2019-03-29", "", "yesterday", "1e9", "2019-13-01"],
    "lat": ["50.1", "-90", "90", "", "-999", "91", "north", "inf", "1e300"],
    "lon": ["0", "-180", "360", "179.99", "", "361", "9.96921e36", "x"],
    "variable": ["t2m", "temperature", "t850", "T", "air_temperature", "", "q", "z500", "nonsense", "2m_temperature"],
    "observation": ["280", "8.5", "", "-999", "nan", "1e20", "a", "28O", "inf", "-inf"],
    "level": ["850", "", "700.5", "1000", "100", "0", "-5", "-999", "85000"],
    "units": ["K", "degC", "degF", "", "hPa", "nonsense", "°C"],
    "error": ["1", "", "0.5", "-1", "0", "x", "1e400", "1e-30"],
    "group": ["G", "", "H", "1"],
    "station": ["A", "", "01", 'a "quoted" name', "é"],
    "type": ["sonde", "", "ship"],
    "footprint": ["", "10", "300", "-1", "1e6"],
}
MISSPELLED = st.sampled_from(["", ",", "\n", '"', "#", "\x00", "time,lat", "é", ";;;"])


@st.composite
def tables(draw):
    """CSV tables that are nearly right."""
    names = [name for name in CELLS if name in ("time", "lat", "lon", "variable", "observation") or draw(st.booleans())]
    good = draw(st.booleans())  # otherwise nearly every table has a wrong cell
    lines = [",".join(names)]
    for _ in range(draw(st.integers(0, 5))):
        cells = [draw(st.sampled_from(CELLS[name][:3] if good else CELLS[name])) for name in names]
        lines.append(",".join(f'"{cell.replace(chr(34), 2 * chr(34))}"' if '"' in cell else cell for cell in cells))
    text = "\n".join(lines) + "\n"
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(MISSPELLED) + text[at:]
    return text


def check_fuzzed(path, text):
    path.write_text(text)
    try:
        table = read_table(path)
        given = {"errors": {"temperature": 1.0}}
        if "group" in table.frame:
            given |= {"correlation": 0.5, "quality": [Duplicates(), Superobbing(3000.0)]}
        placed = table.on(LAYOUT, ["2019-03-29T00", "2019-03-29T12"], window="12h", **given)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message, message
        assert message.endswith(".") or message.endswith("?"), message
        assert path.name in message, message
        return
    assert len(placed.rows) == len(table) + placed.rows.get("superobbed_rows", pandas.Series()).notna().sum()
    assert max(map(len, placed.report().split("\n")[1:3])) <= 80  # headings of the counts
    assert placed.rows["flag"].isin(list(map(str, Flag))).all()
    used = placed.rows["flag"] == Flag.USED
    apart = np.isfinite(placed.xs["groups"]["y"]).sum() if "groups" in placed.xs else 0
    assert np.isfinite(placed.xs["y"]).sum() + apart == used.sum()
    assert sorted(placed.xs["id"][placed.xs["id"] >= 0]) == list(placed.rows.index[used])
    for t in range(2):
        y = placed.operator(np.full(LAYOUT.shape, 250.0, np.float32), at_step(placed.xs, t))
        np.testing.assert_allclose(y[np.isfinite(placed.xs["y"][t])], 250.0, rtol=1e-5)


def at_step(xs, t):
    return jax.tree.map(lambda values: values[t], xs)


@fuzz(25)
@given(text=tables())
def test_fuzzed_tables(tmp_path_factory, text):
    check_fuzzed(tmp_path_factory.getbasetemp() / "fuzzed.csv", text)


@pytest.mark.slow
@fuzz(300)
@given(text=tables())
def test_many_fuzzed_tables(tmp_path_factory, text):
    check_fuzzed(tmp_path_factory.getbasetemp() / "fuzzed.csv", text)
