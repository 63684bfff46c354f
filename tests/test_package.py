"""The layers of the package: which folder imports which, who imports a neighbor, and how light the import is."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import numpyro_diffusion_da as ndda

PACKAGE = "numpyro_diffusion_da"
ROOT = Path(ndda.__file__).parent
CHECKOUT = Path(__file__).parent.parent

# The folders from the bottom up, and which of those before it each may import.
MAY_IMPORT = {
    "fields": set(),
    "smc": set(),
    "observation": {"fields"},
    "results": {"fields"},
    "diffusion": {"fields", "observation"},
    "diagnostics": {"fields", "results"},
    "report": {"diagnostics"},
    "transition": {"diffusion", "observation", "smc"},
    "priors": {"diffusion", "fields"},
    "program": {"transition", "diffusion", "observation"},
    "filters": {"program", "transition", "diffusion", "smc", "fields"},
    "inference": {"filters", "program", "transition", "diffusion", "observation", "smc", "results", "diagnostics"},
    "assimilation": {
        *{"fields", "smc", "observation", "results", "diffusion", "diagnostics", "transition", "priors", "program"},
        *{"filters", "inference"},
    },
    # Demos and commands are written as a user writes: on the root and its public names.
    "demos": set(),
    "commands": set(),
}
# Modules of the root that every folder may import, and that import nothing of the package.
LEAVES = {"arguments", "checksums", "spelling"}

# Where a neighbor is imported, anywhere in a module: a folder, or one of its modules.
NEIGHBORS = {
    "arviz": {"results"},
    "blackjax": {"smc"},
    "jinja2": {"report.page"},
    "matplotlib": {
        "diagnostics",
        "report.figures",
        "demos.held_suarez_figures",
        "demos.lorenz96_figures",
        "demos.run_figures",
    },
    # Priors offer their climatology as a NumPyro distribution; results take NumPyro's diagnostics of chains.
    "numpyro": {"program", "priors", "diffusion.prior", "results.summary", "assimilation", "demos"},
    "rich": {"results", "inference", "demos", "commands"},
    "scoringrules": {"diagnostics"},
    "torch": {"priors.torch_network"},
    "torchax": {"priors.torch_network"},
    "typer": {"commands"},
    "zarr": {"inference.storage"},
    "weathernext": {"priors.weathernext"},
    "xarray": {
        "fields",
        "observation.tables",
        "results",
        "diagnostics",
        "report.folder",
        "priors.gencast",
        "priors.weathernext",
        "priors.weathernext2",
        "inference",
        "assimilation",
        "demos",
        "commands",
    },
    "pyarrow": {"observation.tables"},
    "pydantic": {"assimilation.config"},
    # What their filters ask for is given as functions (docs/neighbors.md).
    "cuthbert": set(),
    "dynestyx": set(),
}


@functools.cache
def modules():
    """(Name below the package, nodes of its syntax) of each module; a folder's `__init__` goes by the folder's name."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        found.append((name, list(ast.walk(ast.parse(path.read_text())))))
    return found


def imported(nodes):
    """The dotted names that a module imports: `from a.b import c` is a.b.c."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, places):
    """Whether a module is one of `places`, or lies in one of them."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_the_table_has_every_folder_and_points_upwards_only():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)
    below = set()
    for folder, allowed in MAY_IMPORT.items():
        assert allowed <= below, f"{folder} may import {allowed - below}, which come later in the table"
        below.add(folder)


def test_a_folder_imports_only_what_its_row_allows():
    for name, nodes in modules():
        folder = name.split(".")[0]
        if folder == "__init__":
            continue
        assert folder in MAY_IMPORT or folder in LEAVES, f"{name} is neither in a folder of the table nor a leaf"
        for target in imported(nodes):
            package, _, rest = target.partition(".")
            if package != PACKAGE:
                continue
            to = rest.split(".")[0]
            if folder in LEAVES:
                allowed = False
            elif folder in ("demos", "commands"):
                allowed = to in ("", "demos", folder)
            else:
                allowed = to == folder or to in LEAVES or to in MAY_IMPORT[folder]
            assert allowed, f"{name} imports {target}"


def test_neighbors_are_imported_only_where_they_belong():
    found = {neighbor: set() for neighbor in NEIGHBORS}
    for name, nodes in modules():
        # weathernext and torchax are imported by the names of their modules, which are strings.
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        named = (text for text in texts if re.fullmatch(r"(weathernext|torchax)(\.\w+)+", text))
        for target in [*imported(nodes), *named]:
            neighbor = target.split(".")[0]
            if neighbor in NEIGHBORS:
                assert within(name, NEIGHBORS[neighbor]), f"{name} imports {target}"
                found[neighbor] |= {place for place in NEIGHBORS[neighbor] if within(name, {place})}
    assert found == NEIGHBORS, "a place of the table does not import its neighbor: take it out"


def test_states_and_transitions_know_no_particles():
    """The folders of one state speak of no particles; `feynman_kac` is written for the particle filters of others."""
    for name, nodes in modules():
        if not within(name, {"fields", "observation", "diffusion", "transition", "priors", "program"}):
            continue
        if name == "program.feynman_kac":
            continue
        words = {node.id for node in nodes if isinstance(node, ast.Name)}
        words |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        assert not {word for word in words if "particle" in word.lower()}, name


@functools.cache
def programs():
    """(Place, its import statements) of every test, every example and every Python block of the documents."""
    texts = []
    for folder in ("tests", "examples"):
        texts += [(path, path.read_text()) for path in sorted((CHECKOUT / folder).rglob("*.py"))]
    for path in [*sorted(CHECKOUT.glob("*.md")), *sorted((CHECKOUT / "docs").rglob("*.md"))]:
        texts += [(path, block) for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)]
    return [
        (
            str(path.relative_to(CHECKOUT)),
            [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)],
        )
        for path, text in texts
    ]


def test_programs_import_at_most_one_folder_below_the_root():
    for place, nodes in programs():
        for node in nodes:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                parts = name.split(".")
                assert parts[0] != PACKAGE or len(parts) <= 2, (
                    f"{place}, line {node.lineno}, imports {name}; import from {'.'.join(parts[:2])}"
                )


def test_examples_import_public_names():
    for place, nodes in programs():
        if not place.startswith("examples"):
            continue
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == PACKAGE:
                if node.module in (f"{PACKAGE}.demos", f"{PACKAGE}.commands"):
                    continue
                public = importlib.import_module(node.module).__all__
                private = {alias.name for alias in node.names} - set(public)
                assert not private, f"{place} imports {private}, which {node.module} does not export"


@pytest.mark.parametrize(
    "folder", ["", *(f".{folder}" for folder in MAY_IMPORT if folder not in ("demos", "commands"))]
)
def test_exported_names_exist(folder):
    module = importlib.import_module(f"{PACKAGE}{folder}")
    assert len(module.__all__) == len(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_citation_has_the_version_of_the_package():
    assert re.search(r"^version: (.*)$", (CHECKOUT / "CITATION.cff").read_text(), re.MULTILINE)[1] == ndda.__version__


def test_contributing_names_files_that_exist():
    paths = re.findall(r"`([\w/]+\.py)", (CHECKOUT / "CONTRIBUTING.md").read_text())
    folders = (CHECKOUT, CHECKOUT / "tests", CHECKOUT / PACKAGE)
    assert paths
    assert [path for path in paths if not any((folder / path).exists() for folder in folders)] == []


def documents():
    """The documents, without a changelog, which keeps the names of its time."""
    pages = [*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md"), *(CHECKOUT / "examples").rglob("*.md")]
    return sorted(page for page in pages if page.name != "CHANGELOG.md")


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_documents_name_what_exists(page):
    """In text and in code: `ndda.folder.name`, and members of a class."""
    made_up = {"diffusion.Midpoint"}  # the example of docs/extending.md
    for dotted in set(re.findall(r"\bndda\.((?:\w+\.)*\w+)", page.read_text())) - made_up:
        value = ndda
        for name in dotted.split("."):
            assert hasattr(value, name), f"{page.name} says ndda.{dotted}, which does not exist"
            value = getattr(value, name)


HEAVY = (
    "arviz",
    "matplotlib",
    "weathernext",
    "graphcast",
    "xarray",
    "blackjax",
    "scoringrules",
    "typer",
    "pydantic",
    "cuthbert",
)


def test_import_is_light():
    """Heavy neighbors wait until they are used; examples/benchmarks/import_time.py measures what that gives."""
    program = f"import sys, numpyro_diffusion_da; print(*[m for m in {HEAVY} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.split() == []


@pytest.mark.parametrize("missing", ["torch", "torchax"])
def test_what_a_torch_network_needs_is_named_where_it_is_missing(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    ndda.priors.torch_network.import_torch.cache_clear()
    if missing == "torchax":
        # Enough of PyTorch to come to the import of torchax, where there is no PyTorch.
        attention = SimpleNamespace(get_fastpath_enabled=lambda: True, set_fastpath_enabled=lambda value: None)
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(backends=SimpleNamespace(mha=attention)))
    name = {"torch": "PyTorch", "torchax": "torchax"}[missing]
    with pytest.raises(ImportError, match=rf"needs {name}, which is not installed; pip install '.*\[torch\]'"):
        ndda.priors.TorchNetwork(None)
