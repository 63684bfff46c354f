"""The parts of a sharded kernel on 8 virtual devices, and kernels written by hand; prints what was found as JSON.

`test_sharding.py` runs this in a process of its own, because JAX makes its devices once.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.smc import bootstrap, enkf, fa_apf, init, mesh, sharding, smc2

N, DEVICES = 64, 8
ROWS, SAME = PartitionSpec("particles"), PartitionSpec()
FOUND: dict[str, object] = {}


def made(number: int) -> jax.sharding.Mesh:
    """Mesh of some of the devices."""
    axes = jax.make_mesh((number,), ("particles",), devices=jax.devices()[:number])
    checked = mesh.check_mesh(axes, "test", N)
    assert checked is not None
    return checked


def needed(ancestors: np.ndarray, devices: int) -> int:
    """Number of pairs of a device and an ancestor that its new particles have and it does not hold, one by one."""
    share = len(ancestors) // devices
    pairs = {(slot // share, int(a)) for slot, a in enumerate(ancestors)}
    return sum(int(a) // share != device for device, a in pairs)


def exchanges() -> None:
    """Ancestors of several kinds: as drawn by systematic resampling, in no order, all the same, none moved."""
    rng = np.random.default_rng(0)
    kinds = {
        "sorted": np.sort(rng.integers(0, N, N)),
        "any": rng.permutation(rng.integers(0, N, N)),
        "one": np.full(N, 37),
        "own": np.arange(N),
    }
    particles = {
        "x": jnp.asarray(rng.normal(size=(N, 3)), jnp.float32),
        "flag": jnp.arange(N) % 3 == 0,
        "count": jnp.arange(N, dtype=jnp.int8),
        "key": jax.vmap(jax.random.key)(jnp.arange(N)),
    }

    def take(particles: dict[str, jax.Array], ancestors: jax.Array) -> object:
        return sharding.take_ancestors(particles, ancestors), sharding.traffic_of(particles, ancestors)

    sharded = jax.jit(mesh.per_device(take, made(DEVICES), (ROWS, SAME), (ROWS, SAME)))
    each = 3 * 4 + 1 + 1 + 2 * 4
    for kind, ancestors in kinds.items():
        got, traffic = sharded(particles, jnp.asarray(ancestors))
        got["key"], wanted = jax.random.key_data(got["key"]), {n: x[ancestors] for n, x in particles.items()}
        wanted["key"] = jax.random.key_data(wanted["key"])
        FOUND[f"exchange, {kind}"] = {
            "same": all(np.array_equal(got[name], wanted[name]) for name in wanted),
            "moved": float(traffic.moved) / each,
            "needed": float(traffic.needed) / each,
            "counted": needed(ancestors, DEVICES),
        }


def parts() -> None:
    """Rows, places and maps whose numbers the devices do not divide evenly."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(N, 11, 2)), jnp.float32).at[0, 0, 0].set(-0.0)
    few = np.array([0, 9, 18, 33, 63])

    def look(mine: jax.Array, everything: jax.Array) -> dict[str, jax.Array]:
        return {
            "gathered": sharding.whole(mine),
            "first": sharding.first(mine),
            "few": sharding.whole(sharding.rows_at(mine, few), len(few)),
            "spread": sharding.whole(sharding.rows_at(mine, np.arange(0, N, 4)), 16),
            "mapped": sharding.map_divided(lambda row: 2.0 * row, everything[:11], 2),
            "back": sharding.whole(sharding.from_parts(sharding.to_parts(mine), 11)),
            "sum": jax.lax.psum(jnp.sum(sharding.to_parts(mine)), "particles"),
        }

    found = jax.jit(mesh.per_device(look, made(DEVICES), (ROWS, SAME), SAME))(x, x)
    wanted = {
        "gathered": x,
        "first": x[0],
        "few": x[few],
        "spread": x[::4],
        "mapped": 2.0 * x[:11],
        "back": x,
        "sum": jnp.sum(x),
    }
    for name, value in wanted.items():
        FOUND[name] = float(np.max(np.abs(found[name] - value)))
    FOUND["signs"] = bool(np.signbit(found["first"][0, 0]))


def kernels() -> None:
    """Two filters of a linear model, without a mesh (0) and on 8 devices: the largest difference of their states."""

    def log_predictive(x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return -jnp.sum((y - 0.9 * x) ** 2), ()

    def propose(key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return 0.5 * (0.9 * x + y) + 0.3 * jax.random.normal(key, x.shape), ()

    def likelihood(x: jax.Array, record: tuple[()], y: jax.Array) -> jax.Array:
        return -jnp.sum((y - x) ** 2)

    def advance(key: jax.Array, x: jax.Array, old: jax.Array, y: jax.Array, record: tuple[()]) -> object:
        return x, record

    filters = {
        "inflated": fa_apf.build_kernel(
            log_predictive,
            propose,
            batch_size=4,
            inflation=(ndda.RTPS(0.3), ndda.smc.Jitter(0.1)),
            advance_fn=advance,
            forecast_fn=propose,
        ),
        "carried": bootstrap.build_kernel(propose, likelihood, resample_below=0.5),
    }
    x = jnp.asarray(np.random.default_rng(2).normal(size=(N, 2)), jnp.float32)
    ys = jnp.asarray(np.random.default_rng(3).normal(size=(3, 2)), jnp.float32)
    for name, kernel in filters.items():
        start = init(x, 0.5 if name == "carried" else 1.0)
        plain = None
        for number in (0, DEVICES):
            step = mesh.on_mesh(kernel, made(number) if number else None)

            def run(start: object, ys: jax.Array, step: Any = step) -> Any:
                keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(len(ys)))
                return jax.lax.scan(lambda old, at: step(at[0], old, at[1]), start, (keys, ys))

            state, info = jax.jit(run)(start, ys)
            if plain is None:
                plain = state, info
            FOUND[f"{name}, {number}"] = {
                "state": float(np.max(np.abs(state.particles - plain[0].particles))),
                "evidence": float(np.abs(state.log_evidence - plain[0].log_evidence)),
                "ancestors": int(np.sum(info.ancestors != plain[1].ancestors)),
                "devices": len(state.particles.sharding.device_set),
                "traffic": [float(np.sum(v)) for v in info.traffic],
            }
            if name == "carried" and number:
                FOUND["kept"] = np.asarray(info.traffic.needed)[~np.asarray(info.resampled)].tolist()


def updates() -> None:
    """Traffic of an ensemble update with a large state and few observations, on 8 devices, in bytes of the ensemble."""
    large = jnp.asarray(np.random.default_rng(4).normal(size=(N, 1000)), jnp.float32)
    kernel = enkf.build_kernel(
        lambda key, x, y: (0.9 * x + 0.3 * jax.random.normal(key, x.shape), ()),
        lambda x, old, y: y - x[::500],
        lambda key, x, old, y, record: (x, record),
        inflation=(ndda.ForecastMultiplicative(1.1), ndda.RTPS(0.3)),
    )
    found = []
    for number in (0, DEVICES):
        step = mesh.on_mesh(kernel, made(number) if number else None)
        found.append(jax.jit(step)(jax.random.key(0), init(large, 1.0), jnp.ones(2)))
    (plain, _), (state, info) = found
    FOUND["update"] = {
        "state": float(np.max(np.abs(state.particles - plain.particles))),
        "traffic": [float(v) / large.nbytes for v in info.traffic],
    }


def parameters() -> None:
    """SMC^2 with large filters, each of which holds its parameter, without a mesh and on 8 devices."""
    seen = jnp.asarray([0.5, 1.4, 0.2])

    def held(theta: jax.Array) -> jax.Array:
        return jnp.full(1000, theta[0])

    def log_likelihood(theta: jax.Array, t: jax.Array) -> jax.Array:
        return -2.0 * (seen[t] - theta[0]) ** 2

    def restart(key: jax.Array, theta: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        logs = jax.vmap(lambda t: log_likelihood(theta, t))(jnp.arange(3))
        return jnp.sum(jnp.where(jnp.arange(3) < number, logs, 0.0)), held(theta)

    theta = jnp.asarray(np.random.default_rng(5).normal(size=(N, 1)), jnp.float32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(3))
    found = []
    for number in (0, DEVICES):
        devices = made(number) if number else None
        kernel = smc2.build_kernel(
            lambda theta: -0.5 * theta[0] ** 2,
            lambda key, theta, filter, t: (filter, log_likelihood(theta, t)),
            restart,
            num_moves=2,
            target_ess=0.9,
            mesh=devices,
        )

        @jax.jit
        def run(theta: jax.Array, keys: jax.Array, kernel: Any = kernel, devices: Any = devices) -> Any:
            start = smc2.init(theta, jax.vmap(held)(theta), -0.5 * theta[:, 0] ** 2, jnp.zeros(N), mesh=devices)
            return jax.lax.scan(lambda old, at: kernel(at[0], old, at[1]), start, (keys, jnp.arange(3)))

        compiled = run.lower(theta, keys).compile()
        found.append((*compiled(theta, keys), compiled.memory_analysis().temp_size_in_bytes))
    (plain, _, whole), (state, info, share) = found
    filters = state.positions.record
    FOUND["parameters"] = {
        "state": float(np.max(np.abs(state.positions.parameters - plain.positions.parameters))),
        "filters": float(np.max(np.abs(filters - state.positions.parameters))),
        "rows": sorted(shard.data.shape[0] for shard in filters.addressable_shards),
        "memory": share / whole,
        "moves": int(np.sum(info.moved)),
        "traffic": [float(np.sum(v)) / filters[0].nbytes for v in info.traffic],
    }


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    exchanges()
    parts()
    kernels()
    updates()
    parameters()
    print(json.dumps(FOUND, indent=1))
