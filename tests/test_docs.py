"""Every Python example of the documents runs, smaller where it is large, and the links between them hold."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALLER = {"num_particles=256": "num_particles=16", "num_chains=4": "num_chains=2", "(30, 10)": "(4, 10)"}


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


needs_gencast = [
    pytest.mark.gencast,
    pytest.mark.skipif(importlib.util.find_spec("weathernext") is None, reason="weathernext is not installed"),
]
WITH_EXAMPLES = [
    pytest.param(page, marks=needs_gencast if page.name == "gencast.md" else []) for page in PAGES if examples(page)
]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda p: p.name)
def test_examples_run(page):
    names: dict[str, object] = {}
    for example in examples(page):  # later examples build on earlier ones
        for large, small in SMALLER.items():
            example = example.replace(large, small)
        exec(compile(example, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_hold(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
