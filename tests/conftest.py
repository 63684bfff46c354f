"""Shared by tests: a linear-Gaussian state-space model, programs of `examples/`, a count of compilations."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("MPLBACKEND", "Agg")

import jax

# XLA would split each program for many threads, which costs the small ones of tests up to a fifth of their compiling.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__[:2] == (0, 10):
    # Compiling takes a third less time with the older code generator of XLA. Newer XLA has no such flag.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda

jax.config.update("jax_numpy_rank_promotion", "raise")
# Most tests spend more time compiling than computing: without optimizations the suite takes a third less time.
jax.config.update("jax_disable_most_optimizations", True)
# Several tests compile the same programs with filters of their own: this cache lets XLA compile each only once. The
# workers of a run share it, and so do the parts of .ci/run. JAX writes entries in place, so a process may read half of
# one: its checksum tells, JAX warns, which pyproject.toml ignores, and compiles.
OWNS_COMPILED = "COMPILED_BY_TESTS" not in os.environ
if OWNS_COMPILED:
    os.environ["COMPILED_BY_TESTS"] = tempfile.mkdtemp(prefix="compiled-by-tests-")
COMPILED = os.environ["COMPILED_BY_TESTS"]
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# For processes that a test starts: they compile as tests do, and read what tests have compiled.
OF_PROCESSES = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": COMPILED,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}


# About how many seconds of a core the slow tests of a file take, where they are many. Other files count by their tests.
SECONDS = {
    "test_assimilation": 45,
    "test_assimilation_examples": 55,
    "test_background": 85,
    "test_backward_simulation": 55,
    "test_conditioning": 70,
    "test_density": 100,
    "test_docs": 190,
    "test_ensemble_smoother": 55,
    "test_example_programs": 85,
    "test_examples": 630,
    "test_families": 60,
    "test_filter": 65,
    "test_fuzz": 110,
    "test_gross_error_check": 60,
    "test_held_suarez_demo": 110,
    "test_inflation": 125,
    "test_kalman_move": 90,
    "test_likelihood": 125,
    "test_lorenz96_demo": 380,
    "test_moving_places": 80,
    "test_network_prior": 75,
    "test_numpyro_surface": 75,
    "test_pmmh": 60,
    "test_report": 50,
    "test_sharding": 320,
    "test_storage": 130,
    "test_streaming": 210,
}
SECONDS_OF_OTHERS = 5  # for each test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="I/N", default="1/1", help="of the slow tests, run those of part I of N")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow tests of other parts than that of `--part`, and run the files that take longest first.

    The tests of a file are in one part, because they share fixtures and compiled programs. Parts take about as long:
    each file, from the longest to the shortest, goes to the part that has least so far.
    """
    part, parts = map(int, config.getoption("--part").split("/"))
    slow = Counter(item.path.stem for item in items if item.get_closest_marker("slow"))
    seconds = {file: SECONDS.get(file, SECONDS_OF_OTHERS * tests) for file, tests in slow.items()}
    longest_first = sorted(seconds, key=lambda file: (-seconds[file], file))
    in_all, part_of = [0] * parts, {}
    for file in longest_first:
        part_of[file] = in_all.index(min(in_all))
        in_all[part_of[file]] += seconds[file]
    ordered = [item for item in items if not item.get_closest_marker("slow")]
    others = []
    for file in longest_first:
        of_file = [item for item in items if item.path.stem == file and item.get_closest_marker("slow")]
        (ordered if part_of[file] == part - 1 else others).extend(of_file)
    if others:
        config.hook.pytest_deselected(items=others)
    items[:] = ordered


# The garbage collector took a tenth of the time: it waits until all is imported, passes over that, and runs less often.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_unconfigure() -> None:
    if OWNS_COMPILED:
        shutil.rmtree(COMPILED, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class LinearGaussian:
    """Linear-Gaussian state-space model: x' = A x + N(0, Q); y = x[::2] + N(0, error^2).

    Attributes:
        transition: A, shape (d, d).
        covariance: Q, shape (d, d).
        error: standard deviation of each observation's error.
    """

    transition: np.ndarray
    covariance: np.ndarray
    error: float

    @staticmethod
    def make(seed: int, d: int, spread: float = 0.5, error: float = 0.5) -> LinearGaussian:
        """Make a model: A is 0.95 times a random rotation, Q an exponential covariance of variance spread^2."""
        rng = np.random.default_rng(seed)
        i = np.arange(d)
        covariance = spread**2 * np.exp(-np.abs(i[:, None] - i[None]) / 3)
        return LinearGaussian(0.95 * np.linalg.qr(rng.normal(size=(d, d)))[0], covariance, error)

    def simulate(self, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Simulate (states, observations), each leading with time, from a draw of the stationary distribution."""
        rng = np.random.default_rng(seed)
        d = len(self.transition)
        root = np.linalg.cholesky(self.covariance)
        x = np.zeros(d)
        for _ in range(200):
            x = self.transition @ x + root @ rng.normal(size=d)
        states, observations = [], []
        for _ in range(steps):
            x = self.transition @ x + root @ rng.normal(size=d)
            states.append(x)
            observations.append(x[::2] + self.error * rng.normal(size=(d + 1) // 2))
        return np.array(states), np.array(observations)

    def diffusion_program(self, sampler: ndda.Sampler | None = None):
        """NumPyro program of the model, with a `GaussianPrior` as its transition."""
        prior = ndda.GaussianPrior(self.transition, self.covariance)

        def model(y):
            x0 = numpyro.sample("x0", prior.climatology())

            def step(x, y_t):
                x = numpyro.sample("x", ndda.DiffusionTransition(prior, x, sampler=sampler))
                numpyro.sample("y", dist.Normal(x[::2], self.error).to_event(1), obs=y_t)
                return x, None

            scan(step, x0, y)

        return model


EXAMPLES = Path(__file__).parents[1] / "examples"
BENCHMARKS = EXAMPLES / "benchmarks"


def load_program(path: Path) -> ModuleType:
    """Import a program of `examples/` as a module."""
    spec = importlib.util.spec_from_file_location(f"program_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up annotations there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect the compilations inside the `with` block in a list, one entry for each compiled program."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **kwargs) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def small() -> LinearGaussian:
    """Four-dimensional linear-Gaussian model, for tests of behavior."""
    return LinearGaussian.make(0, 4)
