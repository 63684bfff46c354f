"""Runs of filters over a program, without a mesh and with meshes; prints as JSON how far their results are apart.

    python runs.py "FILTER;FILTER" DEVICES[,DEVICES] [PROCESS PORT]

With a process number this is one of two processes that share the devices (`jax.distributed`).
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda

N, SITES, STEPS = 16, 6, 3
RNG = np.random.default_rng(0)
TRANSITION = 0.95 * np.linalg.qr(RNG.normal(size=(SITES, SITES)))[0]
NEAR = np.abs(np.arange(SITES)[:, None] - np.arange(SITES)[None])
COVARIANCE = 0.25 * np.exp(-np.minimum(NEAR, SITES - NEAR) / 3.0)
OBSERVATIONS = RNG.normal(size=(STEPS, SITES // 2)).astype(np.float32)


def model(y: Any, scale: Any = 0.5) -> None:
    """Nonlinear autoregression on a ring, observed at every second site."""

    def body(x: Any, y_t: Any) -> tuple[Any, None]:
        mean = jnp.asarray(TRANSITION, jnp.float32) @ x + 0.1 * jnp.sin(x)
        x = numpyro.sample("x", dist.MultivariateNormal(mean, jnp.asarray(COVARIANCE, jnp.float32)))
        numpyro.sample("y", dist.Normal(x[::2], scale).to_event(1), obs=y_t)
        return x, None

    scan(body, numpyro.sample("x0", dist.Normal(jnp.zeros(SITES), 1.0).to_event(1)), y)


def unknown_error(y: Any) -> None:
    """The same program with the observation error as a parameter."""
    model(y, numpyro.sample("error", dist.LogNormal(-0.7, 0.3)))


def taper() -> ndda.Taper:
    """Localization on the ring."""
    places = np.arange(float(SITES))[:, None]
    return ndda.Taper(2.0, ndda.Ring(float(SITES)), {"y": places[::2]}, state=places)


FILTERS: dict[str, Callable[[], Any]] = {
    "FAAPF": lambda: ndda.FAAPF(model, inflation=(ndda.RTPS(0.3),)),
    "local": lambda: ndda.FAAPF(model, taper=taper(), move=False),
    "moved": lambda: ndda.FAAPF(model, taper=taper(), lag=2),
    "moved, global": lambda: ndda.FAAPF(model, move=True),
    "Bootstrap": lambda: ndda.Bootstrap(model),
    "GuidedPF": lambda: ndda.GuidedPF(model, resample_below=0.5),
    "EnKF": lambda: ndda.EnKF(model, inflation=(ndda.ForecastMultiplicative(1.05), ndda.RTPS(0.3)), lag=2),
    "EnKF with V": lambda: ndda.EnKF(model, transition_covariance=True, inflation=(ndda.smc.RTPP(0.3),)),
    "EnKF, local": lambda: ndda.EnKF(model, taper=taper(), transition_covariance=True, lag=2),
    "LETKF": lambda: ndda.EnKF(
        model, taper=taper(), update=ndda.smc.SquareRoot(), inflation=(ndda.RTPS(0.3), ndda.smc.Jitter(0.1))
    ),
    "check": lambda: ndda.GrossErrorCheck(ndda.FAAPF(model), members=6),
}


def mesh_of(number: int) -> Any:
    """Mesh of the first devices, or of all; None for 0."""
    return jax.make_mesh((number,), ("particles",), devices=jax.devices()[:number]) if number else None


def whole_series(name: str, number: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Result of a run: what must not depend on the devices, and what is said of them."""
    run = ndda.Filter(FILTERS[name](), num_particles=N, mesh=mesh_of(number), progress_bar=False)
    run.run(jax.random.key(0), OBSERVATIONS)
    result = run.result
    stats = {n: v for n, v in result.sample_stats.items() if not n.startswith("bytes")}
    background = result.background["y"]
    arrays = {**result.posterior, **stats, "B": background.mean, "P": background.variance}
    if result.lagged is not None:
        arrays["lagged"] = result.lagged
    run.to_datatree()
    return arrays, {n: v.sum() for n, v in result.sample_stats.items() if n.startswith("bytes")}


def one_by_one(number: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Steps of an `OnlineFilter`, inside a compiled loop of the user's."""
    online = ndda.OnlineFilter(FILTERS["FAAPF"](), num_particles=N, mesh=mesh_of(number), keep_steps=STEPS)
    state = online.init(jax.random.key(0), OBSERVATIONS[:1])
    for t in range(STEPS):
        state, _ = online.step(jax.random.key(t), state, OBSERVATIONS[t : t + 1])

    @functools.partial(jax.jit, static_argnums=2)
    def again(state: Any, ys: Any, steps: int) -> Any:
        def step(state: Any, t: Any) -> Any:
            return online.step(jax.random.fold_in(jax.random.key(9), t), state, ys[t][None])

        return jax.lax.scan(step, state, jnp.arange(steps))[1].log_weights

    weights = again(state, jnp.asarray(OBSERVATIONS), STEPS)
    return {**online.result.posterior, "in a loop": np.asarray(weights)}, {}


def parameters(kind: str, number: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Draws of a parameter."""
    filter_ = ndda.Bootstrap(unknown_error)
    common: dict[str, Any] = {"num_particles": N, "mesh": mesh_of(number), "progress_bar": False}
    run: Any
    if kind == "PMMH":
        run = ndda.PMMH(filter_, num_warmup=2, num_samples=4, num_chains=2, **common)
    else:
        run = ndda.SMC2(filter_, num_parameter_particles=16, num_moves=1, target_ess=0.9, **common)
    run.run(jax.random.key(0), OBSERVATIONS)
    stats = {n: v for n, v in run.result.sample_stats.items() if not n.startswith("bytes")}
    arrays = {**run.result.posterior, **run.result.over_time, **stats}
    return arrays, {n: v.sum() for n, v in run.result.sample_stats.items() if n.startswith("bytes")}


def result_of(name: str, number: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Result of a run of a filter, or of another inference."""
    if name == "OnlineFilter":
        return one_by_one(number)
    return parameters(name, number) if name in ("PMMH", "SMC2") else whole_series(name, number)


def main(names: str, numbers: str, process: str | None = None, port: str | None = None) -> None:
    """Print the largest difference of each array from that without a mesh, by filter and number of devices."""
    if process is not None:
        jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    found: dict[str, Any] = {}
    for name in names.split(";"):
        plain, _ = result_of(name, 0)
        for number in map(int, numbers.split(",")):
            arrays, traffic = result_of(name, number)
            assert arrays.keys() == plain.keys()
            both = {n: [np.nan_to_num(np.asarray(of[n], float)) for of in (arrays, plain)] for n in plain}
            apart = {n: float(np.max(np.abs(one - other))) for n, (one, other) in both.items()}
            found[f"{name}, {number}"] = {"apart": apart, **{n: float(v) for n, v in traffic.items()}}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
