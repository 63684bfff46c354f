"""What does a PyTorch network cost as a prior, compared with the same network written in JAX?

Both get the same parameters, at random. Columns: largest difference of the two outputs, milliseconds of one call for
all states, alone and inside a `jax.lax.scan` as a sampler makes it, the ratio of PyTorch over JAX, and seconds to
compile. `vjp` adds a product with the transposed Jacobian. Calls of the two alternate. Times are the shortest of all
repeats, because other programs on the machine only lengthen them.

Needs the extra "torch" of this package.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import typer
from report import json_file, print_table, write_json
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention, silu

import numpyro_diffusion_da as ndda

SIZE = 64


class Perceptron(torch.nn.Module):
    """Two hidden layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [torch.nn.Linear(SIZE, width), torch.nn.Linear(width, width), torch.nn.Linear(width, SIZE)]
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Output of the shape of z."""
        for layer in self.layers[:-1]:
            z = silu(layer(z))
        return self.layers[-1](z)


def perceptron(w: dict[str, jax.Array], z: jax.Array) -> jax.Array:
    for i in range(3):
        z = w[f"layers.{i}.weight"] @ z + w[f"layers.{i}.bias"]
        z = jax.nn.silu(z) if i < 2 else z
    return z


class Convolutions(torch.nn.Module):
    """Four convolutions on a ring."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [1, width, width, width, 1]
        self.layers = torch.nn.ModuleList(
            [torch.nn.Conv1d(n, m, 5, padding=2, padding_mode="circular") for n, m in itertools.pairwise(sizes)]
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Output of the shape of z."""
        z = z[None, None]
        for layer in self.layers[:-1]:
            z = silu(layer(z))
        return self.layers[-1](z)[0, 0]


def convolutions(w: dict[str, jax.Array], z: jax.Array) -> jax.Array:
    z = z[None, None]
    for i in range(4):
        wrapped = jnp.pad(z, ((0, 0), (0, 0), (2, 2)), mode="wrap")
        z = jax.lax.conv_general_dilated(wrapped, w[f"layers.{i}.weight"], (1,), "VALID")
        z = z + w[f"layers.{i}.bias"][None, :, None]
        z = jax.nn.silu(z) if i < 3 else z
    return z[0, 0]


class Transformer(torch.nn.Module):
    """One layer of attention between all sites."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.back = torch.nn.Linear(1, width), torch.nn.Linear(width, 1)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Output of the shape of z."""
        tokens = self.embed(z[:, None])
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, 4, -1)).permute(1, 2, 0, 3)
        attended = scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        return self.back(silu(tokens + self.out(attended)))[:, 0]


def transformer(w: dict[str, jax.Array], z: jax.Array) -> jax.Array:
    def linear(name: str, x: jax.Array) -> jax.Array:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"][None]

    tokens = linear("embed", z[:, None])
    centered = tokens - tokens.mean(-1, keepdims=True)
    scaled = centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    normed = scaled * w["norm.weight"][None] + w["norm.bias"][None]
    q, k, v = jnp.moveaxis(linear("qkv", normed).reshape(SIZE, 3, 4, -1), 1, 0)
    attended = jax.nn.dot_product_attention(q[None], k[None], v[None])[0].reshape(SIZE, -1)
    return linear("back", jax.nn.silu(tokens + linear("out", attended)))[:, 0]


NETWORKS: dict[str, tuple[Callable[[int], torch.nn.Module], Callable[..., jax.Array]]] = {
    "MLP": (Perceptron, perceptron),
    "convolutions": (Convolutions, convolutions),
    "transformer": (Transformer, transformer),
}


def tasks(steps: int) -> dict[str, Callable[..., Any]]:
    """Functions of (network, states) to time, each of one network and a batch of states."""

    def vjp(network: Callable[..., jax.Array], z: jax.Array) -> jax.Array:
        out, back = jax.vjp(network, z)
        return out + back(out)[0]

    def batched(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
        return lambda network, states: jax.vmap(lambda z: fn(network, z))(states)

    def scanned(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
        def run(network: Callable[..., jax.Array], states: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda z, _: (0.5 * jnp.tanh(batched(fn)(network, z)), None), states, length=steps)[0]

        return run

    def call(network: Callable[..., jax.Array], z: jax.Array) -> jax.Array:
        return network(z)

    return {"call": batched(call), "call in a scan": scanned(call), "vjp": batched(vjp), "vjp in a scan": scanned(vjp)}


class InJax(eqx.Module):
    """A network in JAX with its parameters."""

    parameters: dict[str, jax.Array]
    fn: Callable[..., jax.Array] = eqx.field(static=True)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Output of the shape of z."""
        return self.fn(self.parameters, z)


def compare(name: str, width: int, states: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of one network."""
    torch.manual_seed(0)
    make, fn = NETWORKS[name]
    ours = ndda.priors.TorchNetwork(make(width).eval())
    networks = {"PyTorch": ours, "JAX": InJax(ours.arrays, fn)}
    z = jax.random.normal(jax.random.key(0), (states, SIZE))
    difference = np.abs(jax.vmap(networks["PyTorch"])(z) - jax.vmap(networks["JAX"])(z)).max()
    rows = []
    for task, run in tasks(steps).items():
        compile_s, compiled, times = {}, {}, {}
        for which, network in networks.items():
            start = time.perf_counter()
            compiled[which] = eqx.filter_jit(run).lower(network, z).compile()
            compile_s[which] = time.perf_counter() - start
            times[which] = []
        for _ in range(repeats):
            for which, network in networks.items():
                start = time.perf_counter()
                jax.block_until_ready(compiled[which](network, z))
                times[which].append(time.perf_counter() - start)
        calls = steps if "scan" in task else 1
        fastest = {which: 1e3 * min(values) / calls for which, values in times.items()}
        rows.append(
            {
                "network": name,
                "task": task,
                "difference": float(difference),
                "JAX, ms": fastest["JAX"],
                "PyTorch, ms": fastest["PyTorch"],
                "ratio": fastest["PyTorch"] / fastest["JAX"],
                "compile JAX, s": compile_s["JAX"],
                "compile PyTorch, s": compile_s["PyTorch"],
            }
        )
    return rows


def main(
    width: Annotated[int, typer.Option(min=4, help="Channels of the networks, a multiple of 4.")] = 32,
    states: Annotated[int, typer.Option(min=1, help="States in a batch.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Calls in a scan.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each, in alternation.")] = 31,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print outputs' differences, times of a call and of compiling, and ratios of PyTorch over JAX."""
    rows = [row for name in NETWORKS for row in compare(name, width, states, steps, repeats)]
    formats = {"network": "", "task": "", "difference": ".0e", "JAX, ms": ".2f", "PyTorch, ms": ".2f", "ratio": ".2f"}
    columns = formats | {"compile JAX, s": ".2f", "compile PyTorch, s": ".2f"}
    print_table(Console(), f"{states} states of {SIZE}, width {width}", rows, columns, group="network")
    write_json(out, {"width": width, "states": states, "steps": steps, "repeats": repeats}, rows=rows)


if __name__ == "__main__":
    typer.run(main)
