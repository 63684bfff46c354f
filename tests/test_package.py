"""The walls of the house: who imports what, and how light the package is to import."""

import ast
import subprocess
import sys
from pathlib import Path

import numpyro_diffusion_da as ndda

ROOT = Path(ndda.__file__).parent

# Who may import a neighbor, anywhere in a module.
ALLOWED = {
    "arviz": {"convert"},
    "matplotlib": {"plots", "plots_weather"},
    "scoringrules": {"verification"},
    "blackjax": {"smc"},
    # Priors offer their climatology as a NumPyro distribution, inside a method.
    "numpyro": {
        "distribution",
        "free_parameters",
        "huber",
        "linear_gaussian",
        "site",
        "program",
        "state_space",
        "parameters",
        "summary",
        "prior",
        "priors",
        "twin",
        "weather_twin",
    },
    "weathernext": {"priors.gencast_package"},
    # What their filters ask for is given as functions (docs/neighbors.md).
    "cuthbert": set(),
    "dynestyx": set(),
}

# From the top down: a module imports only from later entries.
ORDER = [
    "__init__", "cli", "plots_weather", "weather_twin", "plots", "twin", "twin_scores",
    "verification", "innovations", "spectra", "labeling",
    "filtering", "online", "pmmh", "smc2", "inference",
    "summary", "backward", "smoothing", "convert", "result_axes", "progress", "storage", "evidence",
    "gross_error_check", "result", "algorithm", "feynman_kac", "linear_gaussian", "smc", "parameters", "state_space",
    "program", "linear_predictor", "dependence", "site", "free_parameters", "huber", "distribution", "density",
    "weight", "transition", "path", "piecewise_guidance", "approximate_guidance", "guidance", "likelihood",
    "moment_matching", "linear_solve", "sampler", "schedule",
    "denoiser", "observation_network", "priors", "prior", "spherical_harmonics", "spherical_noise", "noise",
    "gridded_data", "axis_positions", "units", "layout",
    "compilation", "footprint",
]  # fmt: skip


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name, ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_neighbors_are_imported_only_where_they_belong():
    for name, tree in modules():
        for target in imported(tree):
            for neighbor, allowed in ALLOWED.items():
                if target.split(".")[0] == neighbor:
                    assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{name} imports {target}"


def test_imports_point_downwards():
    rank = {name: i for i, name in enumerate(ORDER)}
    for name, tree in modules():
        room = name.split(".")[0]
        assert room in rank, f"{room} has no place in ORDER"
        for target in imported(tree):
            parts = target.split(".")
            if parts[0] != "numpyro_diffusion_da" or parts[1] not in rank or name == "__init__":
                continue
            assert rank[parts[1]] >= rank[room], f"{name} imports {target}, which stands above it"


def test_nothing_below_the_filters_speaks_of_particles():
    for name, tree in modules():
        room = name.split(".")[0]
        if room in ORDER and ORDER.index(room) > ORDER.index("state_space"):
            words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert not {w for w in words if "particle" in w}, name


HEAVY = ("arviz", "matplotlib", "weathernext", "graphcast", "xarray", "blackjax", "scoringrules", "typer", "cuthbert")


def test_import_is_light():
    """Heavy neighbors wait until they are used; examples/benchmarks/import_time.py measures what that gives."""
    program = f"import sys, numpyro_diffusion_da; print(*[m for m in {HEAVY} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.split() == []
