"""Closures become arguments; traced once; and the memory that decides how many particles move at a time."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import compilations
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import memory
from numpyro_diffusion_da.inference import Compiled, batching


def test_what_is_closed_over_is_an_argument():
    large = jax.random.normal(jax.random.key(0), (200, 200))

    def fn(x):
        def body(carry, _):
            return jnp.tanh(large @ carry), None

        return jax.lax.scan(body, x, None, length=3)[0]

    x = jnp.ones(200)
    ours = Compiled(fn)
    assert len(ours.lower(x).as_text()) < 1e4
    assert len(jax.jit(fn).lower(x).as_text()) > 4e4
    np.testing.assert_allclose(ours(x), fn(x), rtol=1e-5)


def test_traced_once_for_each_shape_and_static_value():
    traces = []

    def fn(x, name, y):
        traces.append(name)
        return x if y is None else x + y

    ours = Compiled(fn)
    one = jnp.ones(3)
    for x in (one, 2 * one, np.ones(3, np.float32)):
        np.testing.assert_array_equal(ours(x, "a", None), x)
    assert traces == ["a"]
    ours(one, "b", None)
    ours(jnp.ones(4), "a", None)
    np.testing.assert_array_equal(ours(one, "a", one), 2 * one)
    assert traces == ["a", "b", "a", "a"]


def test_a_first_value_from_a_python_number_does_not_compile_the_next_step_again():
    start, step = Compiled(lambda: jnp.asarray(0.0)), Compiled(lambda x: 0.5 * x + 1.0)
    x = step(start())
    with compilations() as found:
        np.testing.assert_array_equal(step(x), 1.5)
    assert not found


def test_backward_bytes_counts_what_is_kept_and_not_what_is_there():
    weights = jnp.ones((50, 50))
    at = jax.ShapeDtypeStruct((50,), jnp.float32)
    linear = memory.backward_bytes(lambda x: weights @ x, at)
    assert linear == 0
    assert memory.backward_bytes(lambda x: weights @ jnp.tanh(weights @ x), at) in (200, 400)
    deep = memory.backward_bytes(lambda x: jnp.tanh(weights @ jnp.tanh(weights @ jnp.tanh(weights @ x))), at)
    remade = memory.backward_bytes(
        jax.checkpoint(lambda x: jnp.tanh(weights @ jnp.tanh(weights @ jnp.tanh(weights @ x)))), at
    )
    assert remade < deep
    assert memory.device_memory() > 2**28


@pytest.mark.parametrize(
    ("cores", "number", "batch"),
    [(None, 4096, None), (2, 128, None), (2, 256, 128), (2, 4096, 128), (2, 300, 100), (2, 257, None), (1, 66, 33)],
)
def test_batches_of_a_cpu_divide_the_particles(monkeypatch, cores, number, batch):
    monkeypatch.setattr(batching, "device_cores", lambda: cores)
    assert batching.fast_batch(number) == batch


@pytest.mark.slow
def test_particles_move_in_batches_that_fit(small, monkeypatch):
    y = small.simulate(1, 2)[1].astype(np.float32)
    results = []
    for available in (2**34, 4000, 1):
        monkeypatch.setattr(batching, "device_memory", lambda available=available: available)
        filter = ndda.Filter(ndda.Bootstrap(small.diffusion_program()), num_particles=20, progress_bar=False)
        filter.run(jax.random.key(0), y)
        results.append(filter.result)
    sizes = [result.attributes["batch_size"] for result in results]
    assert sizes[0] == 20
    assert 1 < sizes[1] < 20
    assert sizes[2] == 1
    for result in results[1:]:
        np.testing.assert_allclose(result.posterior["x"], results[0].posterior["x"], atol=1e-4)


@pytest.mark.parametrize("found", [None, "graphcast"])
def test_gencast_without_its_package_says_what_to_install(monkeypatch, tmp_path, found):
    find = importlib.util.find_spec

    def without(name, *args):
        if name == "weathernext":
            return None
        if name == "graphcast":
            return find("numpy") if found else None
        return find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ImportError, match="not on PyPI") as error:
        ndda.GenCastPrior.from_checkpoint(tmp_path / "a.npz", stats=tmp_path, surface=tmp_path / "a.nc")
    assert ("jax <= 0.8.1" in str(error.value)) == (found == "graphcast")


@pytest.mark.slow
def test_a_second_process_compiles_nothing_that_takes_long(tmp_path):
    code = """
import sys, jax, numpy as np, numpyro, numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
import numpyro_diffusion_da as ndda

ndda.inference.cache_compiled(sys.argv[1])
missed = []
jax.monitoring.register_event_listener(lambda name, **rest: missed.append(name) if name.endswith("cache_misses") else 0)

def model(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        return x, None
    scan(step, 0.0, y)

run = ndda.Filter(ndda.Bootstrap(model), num_particles=8, progress_bar=False)
run.run(jax.random.key(0), np.zeros(3, np.float32))
print(len(missed), run.result.posterior["x"].sum())
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "cache")]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    (first, first_sum), (second, second_sum) = outputs
    assert int(first) > 0
    assert int(second) < int(first)
    assert first_sum == second_sum


def test_solves_of_a_step_run_on_one_thread():
    from threadpoolctl import threadpool_info

    def threads():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    before, seen = threads(), []

    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            jax.debug.callback(lambda: seen.append(threads()))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    run = ndda.Filter(ndda.Bootstrap(model), num_particles=4, progress_bar=False)
    run.run(jax.random.key(0), np.zeros(2, np.float32))
    jax.effects_barrier()
    assert seen
    assert all(found == {1} for found in seen)
    assert threads() == before
