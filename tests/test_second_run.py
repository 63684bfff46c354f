"""A second run of the same object gives what a new object gives, whatever has changed between the two runs."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import compilations
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.inference import Compiled

KEY = jax.random.key(2)
Y = np.array([[0.3, -0.2], [0.5, 0.1]], np.float32)


ERROR = 0.5
OFFSET = jnp.array([0.1, 0.2])
TABLE = np.array([0.3, -0.3], np.float32)
FAMILY = dist.Normal
HOLDER = types.SimpleNamespace(rate=0.9, read=lambda x: x)


def model(y):
    rate = HOLDER.rate  # read before the scan

    def step(x, y_t):
        x = jax.pure_callback(HOLDER.read, jax.ShapeDtypeStruct((2,), x.dtype), x, vmap_method="expand_dims")
        x = numpyro.sample("x", dist.Normal(rate * x + TABLE, 0.5).to_event(1))
        numpyro.sample("y", FAMILY(x + OFFSET, ERROR).to_event(1), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(jnp.zeros(2), ERROR).to_event(1)), y)


def make(algorithm=ndda.Bootstrap):
    return ndda.Filter(algorithm(model), num_particles=4, progress_bar=False)


def particles(filter_):
    filter_.run(KEY, Y)
    return filter_.result.posterior["x"], filter_.result.sample_stats["log_weights"]


def twice(x):
    """Double the state."""
    return 2 * x


CHANGES = {
    "values": (
        {"ERROR": 0.25, "OFFSET": jnp.array([0.4, -0.3]), "TABLE": np.array([0.0, 0.7], np.float32)},
        {},
        False,
    ),
    "operations": ({"FAMILY": dist.Laplace}, {"rate": 0.2, "read": twice}, True),
}


@pytest.fixture(scope="module")
def has_run():
    filter_ = make()
    particles(filter_)
    return filter_


@pytest.mark.parametrize("what", ["values", pytest.param("operations", marks=pytest.mark.slow)])
def test_what_the_program_reads_is_read_anew(has_run, monkeypatch, what):
    read, attributes, compiles = CHANGES[what]
    before = particles(has_run)
    for name, value in read.items():
        monkeypatch.setitem(globals(), name, value)
    for name, value in attributes.items():
        monkeypatch.setattr(HOLDER, name, value)
    with compilations() as compiled:
        changed = particles(has_run)
    assert bool(compiled) == compiles
    assert not np.array_equal(changed[0], before[0]) or not np.array_equal(changed[1], before[1])
    for one, other in zip(changed, particles(make()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_changed_compiles_nothing(has_run):
    particles(has_run)
    with compilations() as compiled:
        particles(has_run)
    assert compiled == []


def test_an_online_filter_reads_anew_after_init(monkeypatch):
    def first(online):
        state = online.init(KEY, Y[:1])
        return online.step(KEY, state, Y[:1])[0].log_evidence

    online = ndda.OnlineFilter(ndda.Bootstrap(model), num_particles=4)
    before = first(online)
    monkeypatch.setitem(globals(), "ERROR", 0.25)
    with compilations() as compiled:
        changed = first(online)
    assert not compiled
    assert changed != before
    assert changed == first(ndda.OnlineFilter(ndda.Bootstrap(model), num_particles=4))


def test_each_kind_of_change_alone():
    """What a compiled function reads from outside, changed between two calls."""
    read = {"number": 2.0, "array": jnp.ones(2), "table": np.ones(2, np.float32), "function": jnp.sin, "call": None}
    scaled = lambda by: lambda x: by * x  # noqa: E731

    def fn(x):
        inner = jax.jit(lambda z: z * read["table"])  # its constants may stay inside its own jaxpr
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        called = 0.0 if read["call"] is None else jax.pure_callback(read["call"], shape, x)
        return read["function"](inner(x) * read["number"] + read["array"]) + called

    ours, x = Compiled(fn), jnp.array([0.1, 0.2])
    for name, value, compiles in (
        ("number", 2.0, False),
        ("number", 3.0, True),
        ("array", jnp.array([0.5, np.nan]), False),
        ("array", jnp.array([0.5, 0.1]), False),
        ("table", np.array([2.0, 3.0], np.float32), None),  # compiles if it is a constant of an inner jaxpr
        ("function", jnp.cos, True),
        ("call", scaled(2.0), True),
        ("call", scaled(2.0), False),
        ("call", scaled(np.float32(4.0)), True),
        ("array", jnp.ones(()), True),
    ):
        ours(x)
        read[name] = value
        ours.read_anew()
        with compilations() as compiled:
            found = ours(x)
        assert compiles is None or bool(compiled) == compiles, (name, value)
        np.testing.assert_allclose(found, fn(x), rtol=1e-6)
