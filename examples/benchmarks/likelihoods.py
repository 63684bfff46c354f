"""How accurate are guidance and weights for observations that are not Gaussian?

The script prints three tables:

1. One observation of one Gaussian state: guided draws, Moment weight and Dirac weight, compared with quadrature.
2. Four observations of a correlated Gaussian state of 8 components: guided draws and Moment weight (by expectation
   propagation), compared with importance sampling.
3. Filters on a linear-Gaussian state that is observed by counts (Poisson) or with gross errors (StudentT), compared
   with a bootstrap filter with very many particles.

    python examples/benchmarks/likelihoods.py --out likelihoods.json
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from numpyro.contrib.control_flow import scan
from report import json_file, mean_and_error, print_table, write_json
from rich.console import Console
from rich.progress import track
from scipy import stats

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.observation import GeneralLikelihood, GeneralObservation, find_linear_predictor
from numpyro_diffusion_da.program import general_observation, pointwise_log_likelihood, predicted_observation
from numpyro_diffusion_da.transition import DiffusionDynamics, GaussianDynamics

Kind = Callable[[jax.Array], dist.Distribution]
EITHER = dist.Categorical(probs=jnp.array([0.5, 0.5]))
RARE = dist.Categorical(probs=jnp.array([0.9, 0.1]))
KINDS: dict[str, tuple[Kind, float]] = {
    "Normal, error 0.5": (lambda x: dist.Normal(x, 0.5), 0.8),
    "Poisson, log rate x, 20 counts": (lambda x: dist.Poisson(jnp.exp(x)), 20.0),
    "Poisson, log rate x, none": (lambda x: dist.Poisson(jnp.exp(x)), 0.0),
    "StudentT(3), scale 0.3, at 2": (lambda x: dist.StudentT(3.0, x, 0.3), 2.0),
    "StudentT(3), scale 0.3, at 6": (lambda x: dist.StudentT(3.0, x, 0.3), 6.0),
    "Bernoulli, logit 3 x": (lambda x: dist.Bernoulli(logits=3.0 * x), 1.0),
    "VonMises(4)": (lambda x: dist.VonMises(x, 4.0), 1.5),
    "x or -x": (lambda x: dist.MixtureSameFamily(EITHER, dist.Normal(x[:, None] * jnp.array([1.0, -1.0]), 0.3)), 1.0),
    "gross error in one of ten": (lambda x: dist.Mixture(RARE, [dist.Normal(x, 0.2), dist.Normal(x, 3.0)]), 1.5),
    "censored above 1": (lambda x: dist.RightCensoredDistribution(dist.Normal(x, 0.3), jnp.ones(1)), 1.0),
    "volatility: Normal(0, exp(x / 2))": (lambda x: dist.Normal(0.0, jnp.exp(0.5 * x)), 2.0),
    "abs(x), error 0.3": (lambda x: dist.Normal(jnp.abs(x), 0.3), 1.0),
}
FOUR: dict[str, Kind] = {
    "Normal, error 0.3": lambda x: dist.Normal(x, 0.3),
    "Poisson, log rate 1 + x": lambda x: dist.Poisson(jnp.exp(1.0 + x)),
    "StudentT(3), scale 0.3": lambda x: dist.StudentT(3.0, x, 0.3),
    "Bernoulli, logit 3 x": lambda x: dist.Bernoulli(logits=3.0 * x),
}
SERIES: dict[str, Kind] = {
    "Poisson, log rate 1 + x": lambda x: dist.Poisson(jnp.exp(1.0 + x)),
    "StudentT(3), scale 0.3": lambda x: dist.StudentT(3.0, x, 0.3),
}


def likelihood_of(kind: Kind, value: jax.Array, look: jax.Array) -> GeneralLikelihood:
    """Likelihood of `value`, a draw of `kind(look @ x)`, made as it is made from a program."""
    parts = find_linear_predictor(lambda x: pointwise_log_likelihood(kind(look @ x), value).reshape(-1), look.shape[1:])

    def observe(x: jax.Array) -> list[GeneralObservation]:
        if parts is None:
            return [general_observation("y", kind(look @ x), value)]
        return [predicted_observation(kind(look @ x), value, parts.predictor(x), parts.link, parts.components)]

    return GeneralLikelihood(observe)


def guided(
    covariance: np.ndarray, likelihood: Any, guidance: ndda.diffusion.Guidance, draws: int
) -> tuple[np.ndarray, int]:
    """Guided draws from the posterior with the prior N(0, covariance), and network passes per draw."""
    d = len(covariance)
    prior = ndda.GaussianPrior(np.eye(d), covariance)
    step = DiffusionDynamics(prior, prior.condition(jnp.zeros(d)), ndda.Sampler.cheap())
    draw = jax.jit(jax.vmap(lambda key: step.conditional_draw(key, likelihood, guidance)))
    x, record = draw(jax.random.split(jax.random.key(1), draws))
    return np.asarray(x, float), int(record.passes.total()[0])


def one_observation(name: str, draws: int) -> dict[str, Any]:
    """Row of the first table."""
    kind, value = KINDS[name]
    likelihood = likelihood_of(kind, jnp.full(1, value), jnp.eye(1))
    x, passes = guided(np.eye(1), likelihood, ndda.MMPS.cheap(), draws)
    grid = np.linspace(-9.0, 9.0, 20001)
    logs = np.asarray(jax.vmap(lambda x: likelihood.log_prob(x[None]))(jnp.asarray(grid, jnp.float32)), float)
    weights = np.exp(logs + stats.norm.logpdf(grid))
    evidence = np.log(weights.sum() * (grid[1] - grid[0]))
    weights /= weights.sum()
    mean = weights @ grid
    spread = np.sqrt(weights @ (grid - mean) ** 2)
    exact = np.interp(np.sort(x[:, 0]), grid, np.cumsum(weights))
    step = GaussianDynamics(jnp.zeros(1), jnp.ones(1))
    return {
        "observation": name,
        "mean error": float((x.mean() - mean) / spread),
        "sd ratio": float(x.std() / spread),
        "Kolmogorov distance": float(np.abs(exact - (np.arange(draws) + 0.5) / draws).max()),
        "Moment": float(ndda.Moment()(step, likelihood)[0] - evidence),
        "Dirac": float(ndda.Dirac()(step, likelihood)[0] - evidence),
        "passes": passes,
    }


def four_observations(name: str, seeds: int, draws: int) -> list[dict[str, Any]]:
    """Rows of the second table, means over data sets."""
    kind, at = FOUR[name], np.arange(8)
    covariance = np.exp(-np.abs(at[:, None] - at) / 3.0)
    root, look = np.linalg.cholesky(covariance), np.eye(8)[::2]
    solvers = {
        "2 products": ndda.diffusion.KrylovSolve(),
        "4 products": ndda.diffusion.KrylovSolve(4),
        "exact": ndda.diffusion.DirectSolve(),
    }
    found: dict[str, list[tuple[float, ...]]] = {solver: [] for solver in solvers}
    for seed in range(seeds):
        truth = root @ np.random.default_rng(seed).normal(size=8)
        value = jnp.asarray(kind(jnp.asarray(look @ truth)).sample(jax.random.key(seed)), jnp.float32)
        likelihood = likelihood_of(kind, value, jnp.asarray(look))
        step = GaussianDynamics(jnp.zeros(8), jnp.asarray(root))
        close = jax.jit(jax.vmap(lambda key, s=step, li=likelihood: s.conditional_draw(key, li, ndda.MMPS.cheap())[0]))
        near = np.asarray(close(jax.random.split(jax.random.key(2), 20_000)), float)
        wide = np.linalg.cholesky(1.7 * np.cov(near.T))
        noise = np.random.default_rng(seed).standard_t(5, size=(8, 100_000))
        x = near.mean(0) + (wide @ noise).T
        logs = np.asarray(jax.jit(jax.vmap(likelihood.log_prob))(jnp.asarray(x, jnp.float32)), float)
        logs += stats.multivariate_normal(np.zeros(8), covariance).logpdf(x)
        logs -= stats.t(5).logpdf(noise).sum(0) - np.log(np.diag(wide)).sum()
        weights = np.exp(logs - logs.max())
        evidence = np.log(weights.mean()) + logs.max()
        weights /= weights.sum()
        mean = weights @ x
        variance = weights @ (x - mean) ** 2
        moment = float(ndda.Moment()(step, likelihood)[0]) - evidence
        for solver, how in solvers.items():
            drawn, passes = guided(covariance, likelihood, ndda.MMPS(how), draws)
            error = np.sqrt(np.mean((drawn.mean(0) - mean) ** 2 / variance))
            found[solver].append((error, np.mean(drawn.var(0) / variance), moment, passes))
    return [
        {
            "observations": name,
            "solve": solver,
            **dict(zip(("mean error", "variance ratio", "Moment"), map(float, np.mean(rows, axis=0)), strict=False)),
            "passes": int(rows[0][3]),
        }
        for solver, rows in found.items()
    ]


def program(kind: Kind, diffusion: bool) -> Callable[[jax.Array], None]:
    """State-space model with a linear-Gaussian state of 4 components, all observed."""
    at = np.arange(4)
    rotation = 0.95 * np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    covariance = 0.25 * np.exp(-np.abs(at[:, None] - at) / 3.0)
    prior = ndda.GaussianPrior(rotation, covariance)

    def model(y: jax.Array) -> None:
        def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            moved = dist.MultivariateNormal(jnp.asarray(rotation) @ x, jnp.asarray(covariance))
            x = numpyro.sample(
                "x", ndda.DiffusionTransition(prior, x, sampler=ndda.Sampler.cheap()) if diffusion else moved
            )
            numpyro.sample("y", kind(x).to_event(1), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x0", prior.climatology()), y)

    return model


def filters(name: str, seeds: int, particles: int, reference: int, steps: int) -> list[dict[str, Any]]:
    """Rows of the third table, means over data sets with their standard errors."""
    kind = SERIES[name]
    diffusion, closed = program(kind, True), program(kind, False)
    compared = {
        "bootstrap": ndda.Bootstrap(diffusion),
        "guided, equal weights": ndda.FAAPF(diffusion, weight=ndda.Equal(), guidance=ndda.MMPS.cheap()),
        "FA-APF, Dirac + tempering": ndda.FAAPF(diffusion, guidance=ndda.MMPS.cheap()),
        "FA-APF, Moment": ndda.FAAPF(diffusion, weight=ndda.Moment(), target_ess=0.0, guidance=ndda.MMPS.cheap()),
        "GuidedPF": ndda.GuidedPF(diffusion),
        "FA-APF, Moment, closed form": ndda.FAAPF(closed, target_ess=0.0),
    }
    quiet = {"progress_bar": False, "keep_observed": False}
    truth = ndda.Filter(ndda.Bootstrap(closed), num_particles=reference, **quiet)
    runs = {label: ndda.Filter(a, num_particles=particles, **quiet) for label, a in compared.items()}
    found: dict[str, list[tuple[float, ...]]] = {label: [] for label in compared}
    for seed in range(seeds):
        draw = numpyro.infer.Predictive(closed, num_samples=1)
        x = draw(jax.random.key(seed), jnp.full((steps, 4), jnp.nan))["x"][0]
        y = np.asarray(kind(x).sample(jax.random.key(1000 + seed)), np.float32)
        truth.run(jax.random.key(2000 + seed), y)
        exact = truth.result
        mean, spread = exact.posterior["x"][0].mean(0), exact.posterior["x"][0].std(0)
        for label, run in runs.items():
            run.run(jax.random.key(3000 + seed), y)
            got = run.result
            ensemble = got.posterior["x"][0]
            difference = got.sample_stats["log_evidence_increment"].sum() - (
                exact.sample_stats["log_evidence_increment"].sum()
            )
            passes = got.mean_passes().network
            error = np.sqrt(np.mean(((ensemble.mean(0) - mean) / spread) ** 2))
            found[label].append((error, np.mean(ensemble.var(0) / spread**2), difference, passes))
    rows = []
    for label, values in found.items():
        row: dict[str, Any] = {"observations": name, "filter": label}
        table = np.array(values).T
        for key, column in zip(("mean error", "variance ratio", "log-evidence error"), table, strict=False):
            row |= mean_and_error(key, column)
        rows.append({**row, "passes": round(float(table[3].mean()))})
    return rows


def main(
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the tables to.")] = None,
    draws: Annotated[int, typer.Option(min=10, help="Guided draws of the first two tables.")] = 4000,
    seeds: Annotated[int, typer.Option(min=2, help="Data sets of the last two tables.")] = 6,
    particles: Annotated[int, typer.Option(min=2, help="Particles of each filter.")] = 256,
    reference: Annotated[int, typer.Option(min=2, help="Particles of the reference filter.")] = 50_000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each series.")] = 15,
    kinds: Annotated[int, typer.Option(min=1, help="Number of kinds of observations in each table.")] = 12,
    tables: Annotated[list[int] | None, typer.Option(help="Table to print, 1 to 3; may be repeated.")] = None,
) -> None:
    """Print errors of guidance and weights for observations that are not Gaussian."""
    console = Console()
    wanted = tables or [1, 2, 3]
    made: dict[str, list[dict[str, Any]]] = {}
    if 1 in wanted:
        names = track(list(KINDS)[:kinds], "one observation", console=console)
        made["one"] = [one_observation(name, draws) for name in names]
        title = f"One observation of x ~ N(0, 1), {draws} guided draws; Moment and Dirac: error of log p(y)"
        print_table(console, title, made["one"])
    if 2 in wanted:
        names = track(list(FOUR)[:kinds], "four observations", console=console)
        made["four"] = [row for name in names for row in four_observations(name, seeds, draws)]
        title = f"Four observations of a correlated state of 8, means over {seeds} data sets; Moment: error of log p(y)"
        print_table(console, title, made["four"])
    if 3 in wanted:
        names = track(list(SERIES)[:kinds], "filters", console=console)
        made["filters"] = [row for name in names for row in filters(name, seeds, particles, reference, steps)]
        title = f"Filters, N = {particles}, {steps} steps, {seeds} series; mean ± standard error over series"
        print_table(console, title, made["filters"], default=".2f")
    sizes = {"draws": draws, "seeds": seeds, "particles": particles, "reference": reference, "steps": steps}
    write_json(out, sizes, **made)


if __name__ == "__main__":
    typer.run(main)
