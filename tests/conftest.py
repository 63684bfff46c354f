"""Shared by tests: the linear-Gaussian state-space model, programs of `examples/`, a count of what is compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda

jax.config.update("jax_numpy_rank_promotion", "raise")
# Most tests compile longer than they compute: a third less time for the suite.
jax.config.update("jax_disable_most_optimizations", True)
# What several tests compile, each with a filter of its own, XLA sees once in a process. Workers do not share: JAX
# writes an entry in place, where another may read half of it.
COMPILED = tempfile.mkdtemp(prefix="compiled-by-tests-")
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_unconfigure() -> None:
    shutil.rmtree(COMPILED, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class LinearGaussian:
    """x' = A x + N(0, Q); y = x[::2] + N(0, error^2)."""

    transition: np.ndarray
    covariance: np.ndarray
    error: float

    @staticmethod
    def make(seed: int, d: int, spread: float = 0.5, error: float = 0.5) -> LinearGaussian:
        """The linear-Gaussian model of the yardsticks: A = 0.95 x a random rotation, exponential covariance."""
        rng = np.random.default_rng(seed)
        i = np.arange(d)
        covariance = spread**2 * np.exp(-np.abs(i[:, None] - i[None]) / 3)
        return LinearGaussian(0.95 * np.linalg.qr(rng.normal(size=(d, d)))[0], covariance, error)

    def simulate(self, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """(states, observations), each leading with time, from a draw of the stationary distribution."""
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
        """The program with a `GaussianPrior` as its transition."""
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
    """A program of `examples/` as a module."""
    spec = importlib.util.spec_from_file_location(f"program_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What is compiled inside the `with`, one entry a program."""
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
    """A four-dimensional model for tests of behavior."""
    return LinearGaussian.make(0, 4)


@pytest.fixture(autouse=True)
def optimized_where_it_pays(request):
    """Optimize what `slow` tests compile, as they compute for long; unless their module says that it only compiles."""
    computes = request.node.get_closest_marker("slow") is not None and not hasattr(request.module, "COMPILES_A_LOT")
    jax.config.update("jax_disable_most_optimizations", not computes)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
