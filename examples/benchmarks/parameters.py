"""How accurate are posteriors of global parameters? PMMH and SMC^2 in a linear-Gaussian state-space model.

The model is x' = a U x + N(0, 0.5^2 I) with a rotation U, and y = x + N(0, sigma^2 I). The parameters a ~ Uniform(0, 1)
and sigma ~ HalfNormal(1) are unknown. The exact posterior is computed from the evidence of the Kalman filter on a grid.
The table has means over seeds with standard errors (each seed has its own truth and series, with a = 0.8 and
sigma = 0.4):

- bias: (posterior mean - exact mean) / exact standard deviation, of a and of sigma;
- sd ratio: posterior standard deviation / exact standard deviation, of a and of sigma;
- RMS: root mean square of the biases of both parameters;
- expected: RMS of the biases that the effective sample size of the draws alone would give;
- evidence error: error of the log-evidence with parameters integrated out, from SMC^2 only.

    python examples/benchmarks/parameters.py --out parameters.json
    python examples/benchmarks/parameters.py --diffusion --seeds 4 --steps 20     # transition by diffusion
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from numpyro.contrib.control_flow import scan
from numpyro.diagnostics import effective_sample_size
from report import json_file, mean_and_error, print_table, write_json
from rich.console import Console
from rich.progress import track

import numpyro_diffusion_da as ndda

A, SIGMA, NOISE = 0.8, 0.4, 0.5


class Exact(NamedTuple):
    """Exact posterior mean and standard deviation of (a, sigma), and log-evidence with parameters integrated out."""

    mean: np.ndarray
    sd: np.ndarray
    log_evidence: float


def rotation(d: int) -> np.ndarray:
    """Rotation U by one radian in the first two components."""
    u = np.eye(d)
    if d > 1:
        u[:2, :2] = [[np.cos(1.0), -np.sin(1.0)], [np.sin(1.0), np.cos(1.0)]]
    return u


def simulate(seed: int, d: int, steps: int) -> np.ndarray:
    """Simulate observations, shape (time, d), from x0 ~ N(0, I)."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=d), []
    for _ in range(steps):
        x = A * rotation(d) @ x + NOISE * rng.normal(size=d)
        y.append(x + SIGMA * rng.normal(size=d))
    return np.array(y, np.float32)


def kalman_log_evidence(y: np.ndarray, a: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Log-evidence log p(y | a, sigma), elementwise; all covariances are multiples of the identity in this model."""
    d = y.shape[1]
    mean, variance, log = np.zeros((*a.shape, d)), np.ones_like(a), np.zeros_like(a)
    for y_t in y.astype(float):
        mean, variance = a[..., None] * (mean @ rotation(d).T), a**2 * variance + NOISE**2
        s, innovation = variance + sigma**2, y_t - mean
        log -= 0.5 * ((innovation**2).sum(-1) / s + d * np.log(2 * np.pi * s))
        mean, variance = mean + (variance / s)[..., None] * innovation, variance * sigma**2 / s
    return log


def exact(y: np.ndarray, points: int = 400) -> Exact:
    """Exact posterior from a grid of midpoints."""
    a, sigma = np.meshgrid((np.arange(points) + 0.5) / points, (np.arange(points) + 0.5) * 3.0 / points, indexing="ij")
    log_prior = 0.5 * np.log(2 / np.pi) - 0.5 * sigma**2
    log = log_prior + kalman_log_evidence(y, a, sigma)
    weights = np.exp(log - log.max())
    log_evidence = log.max() + np.log(weights.sum() * 3.0 / points**2)
    weights /= weights.sum()
    mean = np.array([np.sum(weights * x) for x in (a, sigma)])
    sd = np.sqrt([np.sum(weights * (x - m) ** 2) for x, m in zip((a, sigma), mean, strict=True)])
    return Exact(mean, sd, float(log_evidence))


def program(d: int, diffusion: bool) -> Callable[..., None]:
    """State-space model with a normal transition, or with the same transition by diffusion."""
    u = rotation(d).astype(np.float32)
    prior = ndda.GaussianPrior(u, NOISE**2 * np.eye(d))

    def model(y: jax.Array) -> None:
        a = numpyro.sample("a", dist.Uniform(0.0, 1.0))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        x0 = numpyro.sample("x0", dist.Normal(np.zeros(d, np.float32), 1.0).to_event(1))

        def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            if diffusion:
                x = numpyro.sample("x", ndda.DiffusionTransition(prior, a * x))
            else:
                x = numpyro.sample("x", dist.Normal(a * (u @ x), NOISE).to_event(1))
            numpyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    return model


FILTERS: dict[str, Callable[..., Any]] = {
    "bootstrap": ndda.Bootstrap,
    "guided": ndda.GuidedPF,
    "FA-APF, exact weights": lambda model: ndda.FAAPF(model, weight=ndda.Moment(), target_ess=0.0),
    "FA-APF, Dirac + tempering": lambda model: ndda.FAAPF(model, weight=ndda.Dirac(), target_ess=0.2),
}


def methods(model: Callable[..., None], particles: int, samples: int, parameters: int) -> dict[str, Any]:
    """Methods to compare, by name."""
    chains = {"num_warmup": samples // 2, "num_samples": samples, "num_chains": 4, "progress_bar": False}
    found: dict[str, Any] = {
        f"PMMH, {name}": ndda.PMMH(make(model), num_particles=particles, **chains) for name, make in FILTERS.items()
    }
    found["SMC^2, bootstrap"] = ndda.SMC2(
        ndda.Bootstrap(model), num_particles=particles, num_parameter_particles=parameters, progress_bar=False
    )
    return found


def score(method: Any, y: np.ndarray, seed: int) -> dict[str, float]:
    """Scores of one run of a method on one series."""
    truth = exact(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one method is a biased control, of which it warns
        method.run(jax.random.key(seed), y)
    draws = method.get_samples(group_by_chain=True)
    result = method.result
    found: dict[str, float] = {}
    expected = []
    for i, name in enumerate(("a", "sigma")):
        values = draws[name].astype(float)
        found[f"bias {name}"] = (values.mean() - truth.mean[i]) / truth.sd[i]
        found[f"sd ratio {name}"] = values.std(ddof=1) / truth.sd[i]
        expected.append(1.0 / np.sqrt(effective_sample_size(values)))
    found["expected"] = float(np.sqrt(np.mean(np.square(expected))))
    found["acceptance"] = float(np.nanmean(result.sample_stats["acceptance_rate"]))
    found["log-evidence sd"] = result.attributes["log_evidence_std"]
    runs = result.sample_stats["acceptance_rate"].size * 1.5
    if "filter_steps" in result.sample_stats:
        total = result.sample_stats["log_evidence_increment"].sum(dtype=float)
        found["evidence error"] = total - truth.log_evidence
        runs = result.sample_stats["filter_steps"].sum() / len(y)
    found["filter runs"] = float(runs)
    passes = sum(result.attributes[f"network_passes_{kind}"] for kind in ("forward", "jvp", "vjp"))
    found["passes per run"] = float(passes)
    return found


def summarize(name: str, scores: list[dict[str, float]]) -> dict[str, Any]:
    """Row of the table: means over seeds with standard errors."""
    row: dict[str, Any] = {"method": name}
    for key in scores[0]:
        row |= mean_and_error(key, [score[key] for score in scores])
    row["RMS"] = float(np.sqrt(np.mean([score[f"bias {n}"] ** 2 for score in scores for n in ("a", "sigma")])))
    return row


COLUMNS = {
    "method": "", "bias a": "", "bias sigma": "", "sd ratio a": "", "sd ratio sigma": "", "RMS": "", "expected": "",
    "acceptance": "", "log-evidence sd": "", "filter runs": ".0f", "passes per run": ".0f", "evidence error": "",
}  # fmt: skip


def main(
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds, one series each.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Steps of each series.", min=1)] = 40,
    d: Annotated[int, typer.Option(help="Dimension of the state.", min=1)] = 2,
    particles: Annotated[int, typer.Option(help="State particles of each filter.", min=1)] = 150,
    samples: Annotated[
        int, typer.Option(help="Draws of each of four chains, after half as many for warm-up.", min=4)
    ] = 600,
    parameters: Annotated[int, typer.Option(help="Parameter particles of SMC^2.", min=2)] = 400,
    only: Annotated[list[str] | None, typer.Option(help="Method to run; may be repeated; all by default.")] = None,
    diffusion: Annotated[bool, typer.Option(help="Transition by diffusion instead of in closed form.")] = False,
) -> None:
    """Print errors of posterior means and standard deviations of two parameters."""
    console = Console()
    chosen = methods(program(d, diffusion), particles, samples, parameters)
    if unknown := sorted(set(only or ()) - set(chosen)):
        raise typer.BadParameter(f"no method called {', '.join(unknown)}; give one of {', '.join(chosen)}.")
    chosen = {name: method for name, method in chosen.items() if not only or name in only}
    series = [simulate(seed, d, steps) for seed in range(seeds)]
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    work = [(name, seed) for name in chosen for seed in range(seeds)]
    for name, seed in track(work, "inferring", console=console, transient=True):
        scores[name].append(score(chosen[name], series[seed], seed))
    rows = [summarize(name, of) for name, of in scores.items()]
    kind = "diffusion" if diffusion else "closed form"
    title = f"{kind}, d = {d}, {steps} steps, N = {particles}, {seeds} seeds; mean ± standard error over seeds"
    plain = ("expected", "acceptance", "log-evidence sd", "filter runs", "passes per run")
    print_table(console, title, rows, COLUMNS, default=".2f", without_error=plain)
    settings = {"seeds": seeds, "steps": steps, "d": d, "particles": particles, "samples": samples}
    write_json(out, {**settings, "parameters": parameters, "diffusion": diffusion}, rows=rows)


if __name__ == "__main__":
    typer.run(main)
