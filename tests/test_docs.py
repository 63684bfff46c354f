"""Every Python example of the documents runs, smaller where it is large, and the links between them hold."""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALLER = {"num_particles=256": "num_particles=16", "num_chains=4": "num_chains=2", "(30, 10)": "(4, 10)"}


def examples(page):
    """Those of dynestyx, which not every Python has, are left to a test of their own."""
    return [text for text in blocks(page) if "import dynestyx" not in text]


def blocks(page):
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
    # Of neighbours.md some code is cuthbert's, which relies on rank promotion.
    with jax.numpy_rank_promotion("allow" if page.name == "neighbours.md" else "raise"):
        run(examples(page), page)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="dynestyx needs Python 3.12 or newer")
@pytest.mark.skipif(importlib.util.find_spec("dynestyx") is None, reason="dynestyx is not installed")
def test_examples_of_dynestyx_run():
    page = ROOT / "docs" / "neighbours.md"
    (example,) = [text for text in blocks(page) if "import dynestyx" in text]
    with jax.numpy_rank_promotion("allow"):
        run([example], page)


def run(texts, page):
    names: dict[str, object] = {}
    for example in texts:  # later examples build on earlier ones
        for large, small in SMALLER.items():
            example = example.replace(large, small)
        exec(compile(example, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_hold(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
