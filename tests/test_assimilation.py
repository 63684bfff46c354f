"""From a configuration and a table to analyses on disk: `ndda.assimilation` and the commands of `ndda`."""

import numpy as np
import pytest

from numpyro_diffusion_da.assimilation import RunConfig
from numpyro_diffusion_da.fields import Layout, Variable

MEAN = np.array([280.0, 1000.0], np.float32)
LAYOUT = Layout(
    (4, 6, 2),
    ("latitude", "longitude", "channel"),
    {"latitude": np.linspace(-75, 75, 4), "longitude": np.arange(0, 360, 60.0)},
    variables=(Variable("2m_temperature", "K"), Variable("surface_pressure", "hPa")),
)
TABLES = {
    "prior": {"name": "held_suarez"},
    "times": {"start": "2026-01-01T00", "end": "2026-01-02T12"},
    "observations": {"files": "a.csv"},
}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"filter": {"particels": 3}}, r"\[filter\] has no key 'particels'; the nearest known one is 'particles'\."),
        ({"fliter": {}}, "has no table 'fliter'; the nearest known one is 'filter'"),
        ({"output": {"particles": 3}}, r"\[output\] has no key 'particles'; it belongs to \[filter\]"),
        ({"filter": {"particles": 3.5}}, r"filter.particles is 3.5; it should be a whole number \("),
        ({"filter": {"particles": True}}, "filter.particles is True; it should be a whole number"),
        ({"filter": {"particles": 1}}, "filter.particles is 1; it should be 2 or more"),
        ({"filter": 3}, "filter is 3; it should be a table"),
        ({"filter": {"method": "enfk"}}, "filter.method is 'enfk'; it should be 'fa_apf', 'enkf', 'guided_pf' or"),
        ({"times": {"start": "now", "end": "2026-01-02"}}, "times.start: it should be a time such as .* not 'now'"),
        ({"times": {"start": "2026-01-02", "end": "2026-01-01"}}, "end = .* is before start = .*; give them in order"),
        ({"times": {"start": "2026-01-02"}}, r"times.end is missing; add it \(time of the last analysis\)"),
        ({"quality": {"withheld": 2}}, "quality.withheld is 2; it should be less than 1 or a list"),
        ({"quality": {"blacklist": {"kinds": ["a"]}}}, "quality.blacklist.kinds is 'kinds'; it should be 'stations'"),
        ({"errors": {"t": -1}}, "errors.t is -1; it should be more than 0"),
        ({"prior": {"gencast": "a.npz"}}, "prior: gencast needs stats too; add it"),
        ({"first_guess": {"kind": "ensemble"}}, 'first_guess: kind = "ensemble" needs file'),
        ({"observations": {"files": []}}, "observations.files: it is empty; name one file or more"),
        ({"observations": {"files": ["a"], "window": "x"}}, 'observations.window: it should be a width such as "6h"'),
    ],
)
def test_a_wrong_configuration_is_refused_by_its_key(tables, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**{**TABLES, **tables})


def test_a_configuration_from_a_file(tmp_path):
    """Paths are relative to the file, and the text of a configuration reads as the same one."""
    path = tmp_path / "run.toml"
    path.write_text(
        '[times]\nstart = 2026-01-01T01:00:00+01:00\nend = 2026-01-02\n[observations]\nfiles = ["b\\"c.csv"]\n'
    )
    config = RunConfig.read(path)
    assert config.times.start == "2026-01-01T00:00:00"
    assert config.observations.files == (tmp_path / 'b"c.csv',)
    assert config.output.folder == tmp_path / "run"
    path.write_text(config.to_toml())
    assert RunConfig.read(path) == config
    path.write_text("[times")
    with pytest.raises(ValueError, match=r"run.toml: it is not TOML \(.*\); texts need quotation"):
        RunConfig.read(path)
    path.write_text("[filter]\nparticels = 3\n")
    with pytest.raises(ValueError, match=r"run.toml: \[filter\] has no key 'particels'"):
        RunConfig.read(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*; give the path of a configuration"):
        RunConfig.read(tmp_path / "none.toml")
