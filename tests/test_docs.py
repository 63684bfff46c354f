"""Every Python example of the documents runs, smaller where it is large; links, names and paths in them exist."""

import importlib.util
import re
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

import numpyro_diffusion_da as ndda

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_EXAMPLES = [ROOT / "examples" / "README.md", *sorted((ROOT / "docs" / "reference").glob("*.md"))]
FOLDERS = [
    "numpyro_diffusion_da",
    "tests",
    *(f"examples{sub}" for sub in ("", "/assimilation", "/benchmarks", "/mini_weather")),
]
SMALLER = {
    "num_particles=256": "num_particles=16",
    "num_chains=4": "num_chains=2",
    "(30, 10)": "(4, 10)",
    "discard=10,": "discard=10, tolerance=0.4,",
}


def examples(page):
    """Those of dynestyx, which not every Python has, and of PyTorch are left to tests of their own."""
    return [text for text in blocks(page) if "import dynestyx" not in text and not of_torch(text)]


def of_torch(text):
    return re.search(r"^import .*\btorch$", text, re.MULTILINE)


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


needs_gencast = [
    pytest.mark.gencast,
    pytest.mark.skipif(importlib.util.find_spec("weathernext") is None, reason="weathernext is not installed"),
]
# .ci/run has the page on ArviZ run by both Pythons, hence by both generations of ArviZ.
# WeatherNext 2 needs an older xarray than GenCast.
needs_weathernext2 = [
    *needs_gencast,
    pytest.mark.skipif(
        tuple(map(int, version("xarray").split(".")[:2])) > (2026, 2), reason="WeatherNext 2 needs xarray <= 2026.2.0"
    ),
]
MARKS = {"gencast.md": needs_gencast, "weathernext2.md": needs_weathernext2} | {
    page: [pytest.mark.slow]
    for page in (
        "arviz.md",
        "extending.md",
        "method.md",
        "verification.md",
        "neighbors.md",
        "robustness.md",
        "choices.md",
        "online.md",
        "scale.md",
        "emulators.md",
        "numpyro.md",
        "observations_table.md",
        "assimilate.md",
    )
}
WITH_EXAMPLES = [pytest.param(page, marks=MARKS.get(page.name, [])) for page in PAGES if examples(page)]


def exact_leave_one_out(y, z):
    """(elpd, PIT, P / (P + R)) of each value given the others up to its time, shape (time, 5), by Kalman's filter."""
    a = 0.95 * np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    q = 0.25 * np.exp(-np.abs(np.arange(4)[:, None] - np.arange(4)) / 3)
    rows, errors = np.vstack([np.eye(4), np.full(4, 0.25)]), np.array([1.0, 1.0, 1.0, 1.0, 0.04])
    mean, spread = np.zeros(4), np.zeros((4, 4))
    values = np.column_stack([y, z])
    found = np.full((3, *values.shape), np.nan)
    for t, value in enumerate(values):
        mean, spread = a @ mean, a @ spread @ a.T + q
        seen = ~np.isnan(value)
        h = rows[seen]
        gain = np.linalg.solve(h @ spread @ h.T + np.diag(errors[seen]), h @ spread).T
        mean, spread = mean + gain @ (value[seen] - h @ mean), spread - gain @ h @ spread
        for j in np.flatnonzero(seen):
            with_it = rows[j] @ spread @ rows[j]
            variance = 1 / (1 / with_it - 1 / errors[j])
            known = scipy.stats.norm(
                variance * (rows[j] @ mean / with_it - value[j] / errors[j]), np.sqrt(variance + errors[j])
            )
            found[:, t, j] = known.logpdf(value[j]), known.cdf(value[j]), variance / (variance + errors[j])
    return found


def says_of_arviz(names):
    """What docs/arviz.md says, against exact answers."""
    y, z, analysis = names["y"], names["z"], names["analysis"]
    seen = ~np.isnan(y)
    assert names["r_hat"].max() < 1.05
    assert names["r_hat_collapsed"].isel(time=-1).mean() > 1.1
    elpd, pit, ratio = exact_leave_one_out(y, z)
    loo = {site: values.elpd_i if names["ARVIZ_1"] else values.loo_i for site, values in names["loo"].items()}
    np.testing.assert_allclose(np.sum(loo["y"]), elpd[:, :4][seen].sum(), atol=1.5)
    assert np.sum(loo["z"]) > np.nansum(elpd[:, 4]) + 3  # too high, where an observation is accurate
    for site, exact in (("y", ratio[:, :4]), ("z", ratio[:, 4])):
        assert abs(np.median(names["loo"][site].pareto_k) - np.nanmedian(exact)) < 0.1
    np.testing.assert_allclose(names["pit"], pit[:, :4][seen], atol=0.1)
    se = np.sqrt(0.2 * 0.8 / seen.sum())
    for right, too_sure in (("pit", "pit_too_sure"), ("pit_forecast", "pit_forecast_too_sure")):
        outer = [np.mean(np.abs(np.asarray(names[which]) - 0.5) > 0.4) for which in (right, too_sure)]
        assert abs(outer[0] - 0.2) < 2 * se
        assert outer[1] > 0.2 + 2 * se
    error = [
        np.sqrt(np.mean((result.posterior["x"].mean((0, 1)) - names["truth"]) ** 2))
        for result in (analysis, ndda.results.fixed_lag(analysis, 5), names["paths"])
    ]
    assert max(error[1:]) < 0.9 * error[0]
    assert names["tree"]["lag_5"].attrs["smoothing"] == "fixed lag"


def says_of_verification(names):
    """What docs/verification.md says, against the exact filter where it is about variances."""
    right, wrong, flat, not_flat = (names[name] for name in ("right", "wrong", "flat", "not_flat"))
    assert right["crps"] < wrong["crps"]
    assert right["energy"] < wrong["energy"]
    assert right["rmse"] < wrong["rmse"] < 1.1 * right["rmse"]
    assert abs(right["spread_skill"] - 1) < 0.05
    assert wrong["spread_skill"] < 0.7
    assert flat.p_value > 0.01
    assert not_flat.dispersion > 8
    assert abs(not_flat.bias) < 3
    assert names["rough"]["mean"] < 0.9 * names["rough"]["members"] < 0.9 * names["rough"]["patched"]
    assert np.all(names["power"]["patched"][3:] > 1.3 * names["power"]["members"][3:])

    a, q, h = names["moved"], names["noise"] @ names["noise"].T, np.eye(12)[::2]
    p = h @ scipy.linalg.solve_discrete_are(a.T, h.T, q, 0.25 * np.eye(6)) @ h.T
    for found, expected in (
        (names["found"]["O-B"].mean, 0.0),
        (names["found_too_sure"]["O-B"].mean, 0.0),
        (names["found"]["consistency"].ratio, 1.0),
        (names["in_result"], 1.0),
        (names["found"]["variances"].observation, 0.25),
        (names["found"]["variances"].background, np.trace(p) / 6),
    ):
        assert abs(found.value - expected) < 3 * found.standard_error
    ratio, variances = names["found_too_sure"]["consistency"].ratio, names["found_too_sure"]["variances"]
    assert ratio.value - 1 > 4 * ratio.standard_error
    value, error = variances.observation
    assert 0.0625 + 4 * error < value < 0.25 - 4 * error


def says_of_observations_table(names):
    """What docs/observations_table.md says of its rows: one flag each, and what the filter knows of them."""
    feedback = names["feedback"]
    flags = dict(zip(feedback["row"], feedback["flag"], strict=True))
    assert list(flags) == list(range(2, 19))
    others = {3: "duplicate", 6: "above model", 10: "repeated report", 11: "out of bounds", 12: "missing"}
    others |= {13: "withheld", 14: "withheld", 17: "off window", 18: "not in model"}
    assert flags == {row: others.get(row, "used") for row in flags}
    known = feedback["flag"].isin(["used", "withheld"])
    assert (feedback["analysis"].notna() == known).all()
    used = feedback[feedback["flag"] == "used"]
    background, analysis = (
        np.sqrt(np.mean(((used["value"] - used[name]) / used["error_used"]) ** 2))
        for name in ("background", "analysis")
    )
    assert analysis < 0.6 * background
    in_page = (ROOT / "docs" / "observations_table.md").read_text()
    printed = names["placed"].report()
    assert printed[: printed.index("stations.csv: 1 of 17 values")] in in_page
    assert names["corrected"].rows["bias_removed"].abs().max() > 0.1


SAYS = {
    "arviz.md": says_of_arviz,
    "verification.md": says_of_verification,
    "observations_table.md": says_of_observations_table,
}


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda p: p.name)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some of them write files
    # Of neighbors.md some code is cuthbert's, which relies on rank promotion.
    with jax.numpy_rank_promotion("allow" if page.name == "neighbors.md" else "raise"):
        run(examples(page), page)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="dynestyx needs Python 3.12 or newer")
@pytest.mark.skipif(importlib.util.find_spec("dynestyx") is None, reason="dynestyx is not installed")
def test_examples_of_dynestyx_run():
    page = ROOT / "docs" / "neighbors.md"
    (example,) = [text for text in blocks(page) if "import dynestyx" in text]
    with jax.numpy_rank_promotion("allow"):
        run([example], page)


@pytest.mark.skipif(importlib.util.find_spec("torchax") is None, reason="PyTorch and torchax are not installed")
def test_examples_of_torch_run():
    page = ROOT / "docs" / "emulators.md"
    (example,) = filter(of_torch, blocks(page))
    run([example], page)


def run(texts, page):
    names: dict[str, object] = {}
    for example in texts:  # later examples build on earlier ones
        for large, small in SMALLER.items():
            example = example.replace(large, small)
        exec(compile(example, page.name, "exec"), names)
    if page.name in SAYS:
        SAYS[page.name](names)


def of_pages(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda p: str(p.relative_to(ROOT)).replace("/", "-"))


# The changelog tells of names that were.
TODAY = [page for page in [*PAGES, *WITHOUT_EXAMPLES] if page.name != "CHANGELOG.md"]


@of_pages([*PAGES, *WITHOUT_EXAMPLES])
def test_links_between_pages_hold(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@of_pages(TODAY)
def test_names_in_pages_exist(page):
    """Nothing executes the names in text and tables."""
    for name in re.findall(r"\bndda((?:\.[A-Za-z_]\w*)+)", page.read_text()):
        value = ndda
        for part in name.split(".")[1:]:
            assert hasattr(value, part), f"{page.name} names ndda{name}, which is not there"
            value = getattr(value, part)


@of_pages(TODAY)
def test_paths_in_pages_exist(page):
    for path in re.findall(r"[\w./-]+\.py\b", page.read_text()):
        found = any((ROOT / folder / path).exists() for folder in ["", *FOLDERS])
        assert found, f"{page.name} names the file {path}, which is not there"


def test_all_examples_are_run():
    assert not any(blocks(page) for page in WITHOUT_EXAMPLES)


def test_readme_gives_two_commands():
    """A newcomer copies them; .ci/run takes the second one from here."""
    text = (ROOT / "README.md").read_text()
    demo, tests = re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)
    assert demo == "python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/ndda demo"
    assert tests == 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[test]" && .venv/bin/pytest -n 2'
    assert re.findall(r"^python3 -m venv .*pytest.*$", text, re.MULTILINE) == [tests]
