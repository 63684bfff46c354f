"""Are guided draws as fast as azula's from the same PyTorch network on the same CPU, and are they the same draws?

Both guide by moment-matching posterior sampling (MMPS, Rozet et al. 2024) with the same number of Krylov iterations
from zero, and draw by deterministic DDIM steps over the same noise levels from the same starting noise, with a last
step to zero noise. azula runs the module as it is; this library runs it through `ndda.priors.TorchNetwork`. The two
solvers are GMRES and a Galerkin projection. They differ a little while they have not converged, and where the Jacobian
of a trained network is not symmetric, so draws from the same noise are close and not equal.

The networks are trained for a few seconds on a Gaussian: 64 points on a ring with covariance
exp(-(distance / 4)^1.5) + 0.001 I. Every fourth point is observed with error 0.1. The posterior is known exactly.

Columns: network passes of one draw; "first", seconds of a first call of this library, with tracing and compiling;
median milliseconds of a draw (a call for all particles, divided by their number), in turns in one process; their ratio;
RMS difference of the two draws from the same noise; and for each the RMS error of the mean and the ratio of the mean
variance to the exact one. Differences and errors are in units of the posterior's standard deviation.

    taskset -c 0 python examples/benchmarks/throughput_guided.py --out throughput_guided.json

Needs the extra "torch" of this package, and azula: pip install azula
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from report import json_file, print_table, write_json
from rich.console import Console
from timing import in_turns, require_peer

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import PriorDenoiser
from numpyro_diffusion_da.priors import parametrization as par

SIZE, SPACING, ERROR = 64, 4, 0.1
LOWEST, HIGHEST = 0.02, 80.0


class Posterior(NamedTuple):
    """Gaussian prior with observations of it.

    Attributes:
        prior: covariance of the prior, whose mean is zero.
        y: observations of every `SPACING`-th value.
        mean: mean of the posterior.
        variance: variances of the posterior.
    """

    prior: np.ndarray
    y: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


def posterior() -> Posterior:
    """Prior on a ring, observations of a draw from it, and the exact posterior."""
    i = np.arange(SIZE)
    distance = np.abs(i[:, None] - i[None])
    prior = np.exp(-((np.minimum(distance, SIZE - distance) / 4.0) ** 1.5)) + 1e-3 * np.eye(SIZE)
    h = np.eye(SIZE)[::SPACING]
    rng = np.random.default_rng(0)
    y = h @ np.linalg.cholesky(prior) @ rng.normal(size=SIZE) + ERROR * rng.normal(size=len(h))
    gain = prior @ h.T @ np.linalg.inv(h @ prior @ h.T + ERROR**2 * np.eye(len(h)))
    return Posterior(prior, y, gain @ y, np.diagonal(prior - gain @ h @ prior))


def network(name: str, width: int) -> Any:
    """PyTorch module (z, index of the noise level) -> output of the shape of z, untrained."""
    import torch

    class Perceptron(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [SIZE + 1, width, width, SIZE]
            self.layers = torch.nn.ModuleList([torch.nn.Linear(n, m) for n, m in itertools.pairwise(sizes)])

        def forward(self, z: Any, index: Any) -> Any:
            z = torch.cat([z, index.expand(z.shape[:-1])[..., None]], -1)
            for layer in self.layers[:-1]:
                z = torch.nn.functional.silu(layer(z))
            return self.layers[-1](z)

    class Convolutions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [2, width // 8, width // 8, width // 8, 1]
            self.layers = torch.nn.ModuleList(
                [torch.nn.Conv1d(n, m, 5, padding=2, padding_mode="circular") for n, m in itertools.pairwise(sizes)]
            )

        def forward(self, z: Any, index: Any) -> Any:
            z = torch.stack([z, index.expand(z.shape[:-1])[..., None].expand(z.shape)], -2)
            for layer in self.layers[:-1]:
                z = torch.nn.functional.silu(layer(z))
            return self.layers[-1](z)[..., 0, :]

    return {"perceptron": Perceptron, "convolutions": Convolutions}[name]()


NETWORKS = {"perceptron": 256, "convolutions": 32}
"""Draws of the prior in each step of the training, by name of the network."""


def schedule_of_azula(levels: int) -> Any:
    """Noise levels of azula: at the times 1, 1 - 1/n, ..., 1/n those of this library, and none at time 0."""
    import torch
    from azula.noise import VESchedule

    class ToZero(VESchedule):
        def sigma(self, t: Any) -> Any:
            return torch.where(t > 0, super().sigma(t), 0.0)

    ratio = (HIGHEST / LOWEST) ** (1.0 / (levels - 1))
    return ToZero(sigma_min=LOWEST / ratio, sigma_max=HIGHEST)


def train(module: Any, prior: np.ndarray, batch: int, steps: int, levels: int) -> Any:
    """Denoiser of azula with this module, trained on draws from the prior."""
    import torch
    from azula.denoise import KarrasDenoiser

    denoiser = KarrasDenoiser(module, schedule_of_azula(levels))
    root = torch.tensor(np.linalg.cholesky(prior), dtype=torch.float32)
    optimizer = torch.optim.Adam(module.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        x = torch.randn(batch, SIZE) @ root.T
        loss = denoiser.loss(x, 1.0 / levels + (1.0 - 1.0 / levels) * torch.rand(len(x)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return denoiser.eval().requires_grad_(False)


def of_azula(denoiser: Any, y: np.ndarray, levels: int, iterations: int) -> Callable[[np.ndarray], np.ndarray]:
    """Guided draws from unit starting noise, shape (N, SIZE), by azula."""
    import torch
    from azula.guidance import MMPSDenoiser
    from azula.linalg.covariance import IsotropicCovariance
    from azula.sample import DDIMSampler

    guided = MMPSDenoiser(
        denoiser,
        torch.tensor(y, dtype=torch.float32),
        lambda x: x[..., ::SPACING],
        IsotropicCovariance(ERROR**2),
        solver="gmres",
        iterations=iterations,
    )
    sampler = DDIMSampler(guided, steps=levels, silent=True)

    def draws(noise: np.ndarray) -> np.ndarray:
        return sampler(HIGHEST * torch.tensor(noise)).numpy()

    return draws


def passes_of_azula(module: Any, draws: Callable[[np.ndarray], np.ndarray], noise: np.ndarray) -> tuple[int, int]:
    """Forward passes and vjp of the module in one call of `draws`."""
    forward, vjp = [], []

    def called(module: Any, inputs: Any, output: Any) -> None:
        forward.append(1)
        output.register_hook(lambda gradient: vjp.append(1))

    handle = module.register_forward_hook(called)
    draws(noise)
    handle.remove()
    return len(forward), len(vjp)


def of_this_library(
    module: Any, y: np.ndarray, levels: int, iterations: int
) -> Callable[[np.ndarray], tuple[jax.Array, ndda.diffusion.NetworkPasses]]:
    """Guided draws from unit starting noise, shape (N, SIZE), and network passes of each, compiled."""
    prior = ndda.DenoiserPrior(
        ndda.priors.TorchNetwork(module, lambda module, z, index, x: module(z[None], index)[0]),
        par.Preconditioned(sigma_data=1.0, noise_index=par.LogLevel()),
        layout=SIZE,
        noise_range=(LOWEST, HIGHEST),
    )
    observed, error, there = jnp.asarray(y, jnp.float32), jnp.full(len(y), ERROR), jnp.ones(len(y), bool)
    likelihood = ndda.observation.GaussianLikelihood(
        lambda x: [ndda.observation.GaussianObservation(x[::SPACING], error, observed, there)]
    )
    schedule = ndda.diffusion.GeometricSchedule((HIGHEST / LOWEST) ** (1.0 / (levels - 1)))
    sampler = ndda.Sampler(ndda.diffusion.DDIM(), schedule)
    guidance = ndda.MMPS(ndda.diffusion.KrylovSolve(products=iterations, warm_start=False))

    @jax.jit
    def draws(prior: ndda.DenoiserPrior, noise: jax.Array) -> Any:
        guided = guidance(PriorDenoiser(prior, prior.condition(jnp.zeros(SIZE))), likelihood)

        def draw(e: jax.Array) -> Any:
            z, state = sampler(jax.random.key(0), guided, prior.noise, prior.noise_range, HIGHEST * e)
            return z, state.passes

        return jax.vmap(draw)(noise)

    return lambda noise: draws(prior, noise)


def row_of(
    name: str, n: int, problem: Posterior, module: Any, denoiser: Any, levels: int, iterations: int, repeats: int
) -> dict[str, Any]:
    """Row of the table, for a module and azula's denoiser with it."""
    azula = of_azula(denoiser, problem.y, levels, iterations)
    ours = of_this_library(module, problem.y, levels, iterations)
    noise = [np.random.default_rng(seed).normal(size=(n, SIZE)).astype(np.float32) for seed in range(repeats + 1)]
    runs = {
        "ours": lambda seed: np.asarray(ours(noise[seed])[0]),
        "azula": lambda seed: azula(noise[seed]),
    }
    found = in_turns(runs, repeats)
    passes = jax.tree.map(lambda count: int(count[0]), ours(noise[0])[1])
    forward, vjp = passes_of_azula(module, azula, noise[0])
    spread = np.sqrt(problem.variance)
    draws = {which: np.concatenate(timing.results) for which, timing in found.items()}
    difference = float(np.sqrt(np.mean(((draws["ours"] - draws["azula"]) / spread) ** 2)))

    def error(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(((x.mean(0) - problem.mean) / spread) ** 2)))

    def ratio(x: np.ndarray) -> float:
        return float(np.mean(x.var(0, ddof=1)) / np.mean(problem.variance))

    milliseconds = {which: 1e3 * timing.median / n for which, timing in found.items()}
    return {
        "network": name,
        "N": n,
        "passes": f"{passes.forward} + {passes.vjp} vjp",
        "azula's": f"{forward} + {vjp} vjp",
        "first, s": found["ours"].first,
        "ms": milliseconds["ours"],
        "azula, ms": milliseconds["azula"],
        "over azula": milliseconds["ours"] / milliseconds["azula"],
        "difference": difference,
        "mean error": error(draws["ours"]),
        "azula's mean error": error(draws["azula"]),
        "variance ratio": ratio(draws["ours"]),
        "azula's variance ratio": ratio(draws["azula"]),
    }


def main(
    networks: Annotated[list[str] | None, typer.Option(help="Network; may be repeated; all by default.")] = None,
    particles: Annotated[
        list[int] | None, typer.Option(min=2, help="Draws of a call; may be repeated [64, 256].")
    ] = None,
    width: Annotated[int, typer.Option(min=8, help="Width of the perceptron; 8 times that of convolutions.")] = 256,
    levels: Annotated[int, typer.Option(min=2, help="Noise levels.")] = 16,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations of the linear solve at each level.")] = 2,
    training: Annotated[int, typer.Option(min=0, help="Steps of training of each network.")] = 1500,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each after the first, in turns.")] = 5,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print milliseconds of guided draws, beside azula, and how far apart the draws are."""
    for module, install in (("torch", "'numpyro-diffusion-da[torch]'"), ("azula", "azula")):
        require_peer(module, install)
    if unknown := sorted(set(networks or ()) - set(NETWORKS)):
        raise typer.BadParameter(f"no network called {', '.join(unknown)}; give one of {', '.join(NETWORKS)}.")
    import torch

    problem = posterior()
    rows = []
    for name in networks or NETWORKS:
        torch.manual_seed(0)
        module = network(name, width)
        denoiser = train(module, problem.prior, NETWORKS[name], training, levels)
        for n in particles or [64, 256]:
            rows.append(row_of(name, n, problem, module, denoiser, levels, iterations, repeats))
    title = f"{levels} noise levels, {iterations} iterations, medians of {repeats} calls"
    print_table(Console(), title, rows, group="network")
    settings = {"width": width, "levels": levels, "iterations": iterations, "training": training, "repeats": repeats}
    write_json(out, settings, rows=rows)


if __name__ == "__main__":
    typer.run(main)
