"""Are path weights unbiased, how much do they vary, and how close is the discretized emulator to the exact one?

A guided draw of a stochastic sampler has a weight whose mean is p(y | c) under the *discretized* emulator, which is the
distribution of the sampler at its number of noise levels. With an exact Gaussian prior this distribution is Gaussian,
and its covariance follows from the linear recursion of the sampler. All tables but the last have an exact answer:

1. Discretized emulator on a ring of 64 points: 2-Wasserstein distance of its distribution to the prior, divided by the
   square root of the total variance of the prior; its total variance divided by that of the prior; and log p(y | c) of
   16 observations with error 0.1 minus that of the prior, mean and standard deviation over y.
2. One step on a chain of 16 points with unit variance, m of them observed with error r: standard deviation of log w,
   and mean of w / p(y | c) under the discretized emulator, which should be 1. Rows differ in the solve of the guidance.
   With Girsanov's weights, the draw is the unguided step shifted by the guided denoiser, with an unchanged width.
3. One step with noise of the diffusion that is not white, and with singular noise.
4. Filters on a linear-Gaussian state-space model, a chain of d points with every second observed: mean of Z^ / Z and
   standard deviation of log Z^ over runs. Z is the evidence of the Kalman filter, for the discretized emulator if the
   transition is a diffusion.
5. One step of the Lorenz-96 emulator of the package, whose denoiser is learned, with every fourth of 40 points observed
   with error r: log of the mean weight of guided draws, log of the mean likelihood of twenty times as many unguided
   draws, relative standard errors of both means, standard deviations of the logarithms, and the Moment weight.

    python examples/benchmarks/path_weights.py --out path_weights.json
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.linalg
import typer
from numpyro.contrib.control_flow import scan
from report import json_file, print_table, write_json
from rich.console import Console

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import ObservingDenoiser, PriorDenoiser, StepInputs
from numpyro_diffusion_da.filters import PATH_SAMPLER
from numpyro_diffusion_da.transition import DiffusionDynamics

# Stochastic steps by name.
STEPS: dict[str, ndda.diffusion.StochasticStep] = {
    "SDE-DPM-Solver++(2M)": ndda.SDEDPMSolverPP2M(),
    "ancestral DDIM": ndda.diffusion.DDIM(1.0),
}
GUIDANCE = {
    "exact": ndda.MMPS(ndda.diffusion.DirectSolve()),
    "4 products": ndda.MMPS(ndda.diffusion.KrylovSolve(4)),
    "2 products": ndda.MMPS.cheap(),
}
GIRSANOV = "exact, Girsanov"


def chain(size: int) -> np.ndarray:
    """Covariance exp(-|i - j| / 3) of a chain."""
    i = np.arange(size)
    return np.exp(-np.abs(i[:, None] - i) / 3)


def ring(size: int) -> np.ndarray:
    """Covariance of the ring of ring64.py."""
    i = np.arange(size)
    distance = np.abs(i[:, None] - i)
    return np.exp(-((np.minimum(distance, size - distance) / 4.0) ** 1.5)) + 1e-3 * np.eye(size)


def with_levels(step: ndda.diffusion.Step, levels: int) -> ndda.Sampler:
    """Sampler with the given step and number of levels, spaced as in the sampler of `GuidedPF`."""
    assert isinstance(PATH_SAMPLER.schedule, ndda.KarrasSchedule)
    return ndda.Sampler(step, ndda.KarrasSchedule(levels, PATH_SAMPLER.schedule.rho))


def law(prior: ndda.GaussianPrior, sampler: ndda.Sampler) -> np.ndarray:
    """Covariance of unguided draws around A x, by one recursion for each of the modes that diagonalize Q and C."""
    step, variances = sampler.stochastic_step(), prior.variances
    levels = sampler.schedule.levels(prior.noise_range)
    constants = sampler.constants(prior.noise_range, variances.dtype)
    zero, one = jnp.zeros_like(variances), jnp.ones_like(variances)
    nothing = step.init(zero)
    # Covariance of (z, history of the step); the history is empty for a step without memory.
    zz, zh, hh = levels[0] ** 2 * one, zero, zero
    for i in range(len(levels) - 1):
        c = {name: v[i] for name, v in constants.items()}
        shrink = variances / (variances + c["start"] ** 2)

        def move(z: jax.Array, denoised: jax.Array, history: Any, c: Any = c) -> tuple[Any, ...]:
            at = StepInputs(None, None, prior.noise, z, c["start"], c["stop"], c)
            mean, spread, history = step.law(at, denoised, history)
            return mean, spread, sum(jax.tree.leaves(history), zero)

        by_z, spread, keeps_z = move(one, shrink, nothing)
        by_h, _, keeps_h = move(zero, zero, jax.tree.map(jnp.ones_like, nothing))
        keeps_h = keeps_h if jax.tree.leaves(nothing) else zero
        zz, zh, hh = (
            by_z**2 * zz + 2 * by_z * by_h * zh + by_h**2 * hh + spread**2,
            by_z * keeps_z * zz + (by_z * keeps_h + by_h * keeps_z) * zh + by_h * keeps_h * hh,
            keeps_z**2 * zz + 2 * keeps_z * keeps_h * zh + keeps_h**2 * hh,
        )
    shrink = variances / (variances + levels[-1] ** 2)
    modes = np.asarray(prior.latent_scale * prior.from_modes)
    return (modes * np.asarray(shrink**2 * zz)) @ modes.T


def log_evidence(y: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Log-density log N(y; 0, covariance), y of shape (..., m)."""
    factor = np.linalg.cholesky(covariance)
    white = scipy.linalg.solve_triangular(factor, y.T, lower=True)
    return -0.5 * np.sum(white**2, axis=0) - np.sum(np.log(np.diag(factor))) - 0.5 * len(factor) * np.log(2 * np.pi)


def emulator_rows(levels: list[int], size: int = 64) -> list[dict[str, Any]]:
    """Rows of table 1: distance of the discretized emulator to the prior."""
    q, h, error = ring(size), np.eye(size)[::4], 0.1
    prior = ndda.GaussianPrior(np.eye(size), q)
    r = error**2 * np.eye(len(h))
    y = np.random.default_rng(0).normal(size=(4000, len(h))) @ np.linalg.cholesky(h @ q @ h.T + r).T
    root = scipy.linalg.sqrtm(q).real
    rows = []
    for name, step in STEPS.items():
        for n in levels:
            v = law(prior, with_levels(step, n))
            cross = scipy.linalg.sqrtm(root @ v @ root).real
            difference = log_evidence(y, h @ v @ h.T + r) - log_evidence(y, h @ q @ h.T + r)
            rows.append(
                {
                    "sampler": name,
                    "levels": n,
                    "distance": float(np.sqrt(max(np.trace(v + q - 2 * cross), 0.0) / np.trace(q))),
                    "variance ratio": float(np.trace(v) / np.trace(q)),
                    "log p(y) off by": float(difference.mean()),
                    "its sd over y": float(difference.std()),
                }
            )
    return rows


class Problem(NamedTuple):
    """One step from a Gaussian prior with observations."""

    prior: ndda.GaussianPrior
    h: np.ndarray
    y: np.ndarray
    error: float

    def log_evidence(self, sampler: ndda.Sampler) -> float:
        """Log-evidence of the observations under the discretized emulator."""
        covariance = self.h @ law(self.prior, sampler) @ self.h.T + self.error**2 * np.eye(len(self.h))
        return float(log_evidence(self.y[None], covariance)[0])

    @property
    def likelihood(self) -> ndda.observation.GaussianLikelihood:
        """Likelihood of the observations."""
        scale, seen = jnp.full(len(self.y), self.error), jnp.ones(len(self.y), bool)
        return ndda.observation.GaussianLikelihood(
            lambda x: [ndda.observation.GaussianObservation(jnp.asarray(self.h) @ x, scale, jnp.asarray(self.y), seen)]
        )


def problem(size: int, observations: int, error: float, noise: np.ndarray | None = None) -> Problem:
    """Make a chain with evenly spaced observations y, drawn from the prior; `noise` is the covariance C, None for I."""
    rng, q = np.random.default_rng(1), chain(size)
    h = np.eye(size)[:: size // observations]
    if noise is not None and np.linalg.matrix_rank(noise) < size:
        values, vectors = np.linalg.eigh(noise)
        onto = vectors[:, values > 1e-9] @ vectors[:, values > 1e-9].T
        q = onto @ q @ onto  # the prior may vary only in the range of C
    y = h @ rng.multivariate_normal(np.zeros(size), q) + error * rng.normal(size=len(h))
    return Problem(ndda.GaussianPrior(np.eye(size), q, noise_covariance=noise), h, y, error)


def girsanov(
    step: DiffusionDynamics,
    likelihood: ndda.observation.GaussianLikelihood,
    guidance: ndda.diffusion.Guidance,
    key: Any,
) -> Any:
    """Draw with the guided denoiser in the mean of each step; returns the draw, Girsanov's log w, and passes."""
    prior, sampler, law_of = step.prior, step.sampler, step.sampler.stochastic_step().law
    denoiser = guidance(PriorDenoiser(prior, step.conditioning), likelihood)
    assert isinstance(denoiser, ObservingDenoiser)
    start_key, loop_key = jax.random.split(key)
    location = prior.location(step.conditioning)
    z = sampler.initial(start_key, prior.noise, prior.noise_range, location.shape, location.dtype)
    first = step.sampler.step.init(z)

    def body(carry: Any, c: Any) -> Any:
        z, free, guided, shift, memory, log_ratio = carry
        denoised, seen, memory = denoiser.directions(z, c["start"], memory)
        # The guided denoiser is D + C d. Steps are linear, so the mean moves by C u, where u is the step of d. This
        # avoids the inverse of C.
        d = c["start"] ** 2 * jnp.tensordot(jnp.linalg.solve(seen.covariance, seen.residual), seen.pulled, 1)
        at = StepInputs(loop_key, denoiser, prior.noise, z, c["start"], c["stop"], c)
        mean, spread, free = law_of(at, denoised, free)
        to, _, guided = law_of(at, denoised + prior.noise.covariance_product(d), guided)
        u, _, shift = law_of(at._replace(z=jnp.zeros_like(z)), d, shift)
        e = prior.noise.sample(jax.random.fold_in(loop_key, c["index"]), z.shape, z.dtype)
        log_ratio -= jnp.vdot(u, e) / spread + 0.5 * jnp.vdot(u, to - mean) / spread**2
        return (to + spread * e, free, guided, shift, memory, log_ratio), None

    carry = (z, first, first, first, denoiser.init(), jnp.zeros((), z.dtype))
    (z, *_, memory, log_ratio), _ = jax.lax.scan(body, carry, sampler.constants(prior.noise_range, z.dtype))
    lowest = jnp.asarray(sampler.schedule.levels(prior.noise_range)[-1], z.dtype)
    z, memory = denoiser.base(z, lowest, memory)
    x = location + prior.scale(step.conditioning) * z
    return x, likelihood.log_prob(x) + log_ratio, memory.passes.total()


def one_step(p: Problem, sampler: ndda.Sampler, how: str, draws: int) -> dict[str, Any]:
    """Standard deviation of log w and mean of w / p(y), over draws."""
    step = DiffusionDynamics(p.prior, p.prior.condition(jnp.zeros(len(p.prior.covariance))), sampler)
    likelihood = p.likelihood

    def draw(key: Any) -> Any:
        if how == GIRSANOV:
            return girsanov(step, likelihood, GUIDANCE["exact"], key)
        x, log_weight, record = step.weighted_draw(key, likelihood, GUIDANCE[how])
        return x, log_weight, record.passes.total()

    _, log_weights, passes = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), draws))
    ratio = np.exp(np.asarray(log_weights) - p.log_evidence(sampler))
    return {
        "passes": int(passes[0]),
        "sd of log w": float(np.std(log_weights)),
        "w / p(y)": float(ratio.mean()),
        "w / p(y) SE": float(ratio.std(ddof=1) / np.sqrt(draws)),
    }


def weight_rows(size: int, levels: list[int], draws: int) -> list[dict[str, Any]]:
    """Rows of table 2: weights of one step by levels, observations and guidance."""
    step, few = ndda.SDEDPMSolverPP2M(), min(4, size)
    cases = [(n, few, error, how) for error in (1.0, 0.3, 0.1) for n in levels for how in ("exact", GIRSANOV)]
    cases += [(24, m, 0.3, how) for m in sorted({1, few, size}) for how in (*GUIDANCE, GIRSANOV)]
    rows: list[dict[str, Any]] = []
    for n, m, error, how in dict.fromkeys(cases):
        case = {"m": m, "r": error, "levels": n, "guided": how}
        rows.append({**case, **one_step(problem(size, m, error), with_levels(step, n), how, draws)})
    return rows


def noise_rows(size: int, draws: int) -> list[dict[str, Any]]:
    """Rows of table 3: weights of one step with different noises of the diffusion."""
    factor = np.random.default_rng(2).normal(size=(size, size)) / np.sqrt(size)
    noises = {
        "white": None,
        "C": factor @ factor.T + 0.3 * np.eye(size),
        "C, singular": factor[:, : size * 3 // 4] @ factor[:, : size * 3 // 4].T,
    }
    return [
        {"noise": name, "guided": how, **one_step(problem(size, min(4, size), 0.3, noise), PATH_SAMPLER, how, draws)}
        for name, noise in noises.items()
        for how in ("exact", "2 products")
    ]


def kalman(y: np.ndarray, a: np.ndarray, q: np.ndarray, initial: np.ndarray, error: float) -> float:
    """Log-evidence of the Kalman filter."""
    h = np.eye(len(a))[::2]
    mean, p, total = np.zeros(len(a)), initial, 0.0
    for y_t in y:
        mean, p = a @ mean, a @ p @ a.T + q
        s = h @ p @ h.T + error**2 * np.eye(len(h))
        total += float(log_evidence((y_t - h @ mean)[None], s)[0])
        gain = np.linalg.solve(s, h @ p).T
        mean, p = mean + gain @ (y_t - h @ mean), p - gain @ h @ p
    return total


FILTERS: dict[str, Callable[[Any], ndda.filters.FilterAlgorithm]] = {
    "GuidedPF": ndda.GuidedPF,
    "GuidedPF, 2 products": lambda model: ndda.GuidedPF(model, guidance=ndda.MMPS.cheap()),
    "Bootstrap": lambda model: ndda.Bootstrap(model, sampler=PATH_SAMPLER),
    "FAAPF, Moment": lambda model: ndda.FAAPF(model, weight=ndda.Moment(), target_ess=0.0, guidance=ndda.MMPS.cheap()),
    "FAAPF, Dirac": lambda model: ndda.FAAPF(model, weight=ndda.Dirac(), target_ess=0.0, guidance=ndda.MMPS.cheap()),
}


def filter_rows(
    filters: list[str], dims: list[int], runs: int, experiments: int, steps: int, particles: int
) -> list[dict[str, Any]]:
    """Rows of table 4: evidence of filters."""
    error, rows = 0.5, []
    for d in dims:
        q = 0.25 * chain(d)
        a = 0.95 * np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
        prior = ndda.GaussianPrior(a, q)
        root = np.linalg.cholesky(q)

        def model(y: Any, diffusion: bool, d: int = d, prior: Any = prior, a: Any = a, root: Any = root) -> None:
            x0 = numpyro.sample("x0", dist.MultivariateNormal(jnp.zeros(d), scale_tril=jnp.asarray(root)))

            def step(x: Any, y_t: Any) -> Any:
                closed = dist.MultivariateNormal(jnp.asarray(a) @ x, scale_tril=jnp.asarray(root))
                x = numpyro.sample(
                    "x", ndda.DiffusionTransition(prior, x, sampler=ndda.Sampler.cheap()) if diffusion else closed
                )
                numpyro.sample("y", dist.Normal(x[::2], error).to_event(1), obs=y_t)
                return x, None

            scan(step, x0, y)

        def in_closed_form(y: Any, model: Any = model) -> None:
            model(y, False)

        def through_a_diffusion(y: Any, model: Any = model) -> None:
            model(y, True)

        laws = {in_closed_form: q, through_a_diffusion: law(prior, PATH_SAMPLER)}
        for program, covariance in laws.items():
            for name in filters:
                if program is in_closed_form and "products" in name:
                    continue
                run = ndda.Filter(FILTERS[name](program), num_particles=particles, num_chains=runs, progress_bar=False)
                logs, off = [], []
                for seed in range(experiments):
                    rng = np.random.default_rng(100 + seed)
                    x, y = root @ rng.normal(size=d), []
                    for _ in range(steps):
                        x = a @ x + root @ rng.normal(size=d)
                        y.append(x[::2] + error * rng.normal(size=(d + 1) // 2))
                    run.run(jax.random.key(seed), jnp.asarray(np.array(y), jnp.float32))
                    exact = kalman(np.array(y), a, covariance, q, error)
                    off.append(exact - kalman(np.array(y), a, q, q, error))
                    logs.append(run.result.sample_stats["log_evidence_increment"].sum(1, dtype=float) - exact)
                ratio = np.exp(np.array(logs)).reshape(-1)
                rows.append(
                    {
                        "d": d,
                        "transition": "closed form" if program is in_closed_form else "diffusion",
                        "filter": name,
                        "passes": run.result.mean_passes().network,
                        "Z^ / Z": float(ratio.mean()),
                        "Z^ / Z SE": float(ratio.std(ddof=1) / np.sqrt(ratio.size)),
                        "sd of log Z^": float(np.sqrt(np.mean(np.var(logs, axis=1, ddof=1)))),
                        "log Z - Kalman's": float(np.mean(off)),
                    }
                )
    return rows


def learned_rows(draws: int) -> list[dict[str, Any]]:
    """Rows of table 5: weights of one step of the learned Lorenz-96 emulator."""
    prior = ndda.load_prior("lorenz96")
    keys = jax.random.split(jax.random.key(0), 4)
    before = prior.climatology().sample(keys[0])
    step = DiffusionDynamics(prior, prior.condition(before), PATH_SAMPLER)
    x, _ = step.draw(keys[1])
    noise, seen = jax.random.normal(keys[2], x[::4].shape), jnp.ones(len(x[::4]), bool)
    guided, free = jax.random.split(keys[3], draws), jax.random.split(keys[3], 20 * draws)
    states = jax.jit(lambda keys: jax.lax.map(lambda key: step.draw(key)[0], keys, batch_size=500))(free)
    rows = []
    for r in (2.0, 1.0, 0.5):

        def observe(x: jax.Array, y: jax.Array, r: float = r) -> list[ndda.observation.GaussianObservation]:
            return [ndda.observation.GaussianObservation(x[::4], jnp.full(len(y), r), y, seen)]

        y = x[::4] + r * noise
        likelihood = ndda.observation.GaussianLikelihood(lambda x, y=y, observe=observe: observe(x, y))
        draw = jax.jit(jax.vmap(lambda key, at=likelihood: step.weighted_draw(key, at, GUIDANCE["exact"])))
        _, log_weights, record = draw(guided)
        row: dict[str, Any] = {"r": r, "passes": int(record.passes.total()[0])}
        for name, logs in (("w", log_weights), ("unguided", jax.vmap(likelihood.log_prob)(states))):
            logs = np.asarray(logs, float)
            w = np.exp(logs - logs.max())
            row[f"log mean {name}"] = float(logs.max() + np.log(w.mean()))
            row[f"log mean {name} SE"] = float(w.std(ddof=1) / w.mean() / np.sqrt(len(w)))
            row[f"sd of log {name}"] = float(logs.std())
        row["Moment"] = float(ndda.Moment(10.0)(step, likelihood)[0])
        rows.append(row)
    return rows


def main(
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the tables to.")] = None,
    tables: Annotated[
        list[int] | None, typer.Option(help="Table to print, 1 to 5; may be repeated; all by default.")
    ] = None,
    levels: Annotated[
        list[int] | None, typer.Option(help="Number of levels (table 2: every second); may be repeated.")
    ] = None,
    points: Annotated[int, typer.Option(help="Points of the ring of table 1.", min=4)] = 64,
    size: Annotated[int, typer.Option(help="Points of the chain of tables 2 and 3.", min=4)] = 16,
    draws: Annotated[int, typer.Option(help="Draws of tables 2 and 3.", min=2)] = 4000,
    dims: Annotated[list[int] | None, typer.Option(help="Dimension in table 4; may be repeated.")] = None,
    filters: Annotated[
        list[str] | None, typer.Option(help="Filter of table 4; may be repeated; all by default.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Runs of each filter on the same observations.", min=2)] = 32,
    experiments: Annotated[int, typer.Option(help="Sets of observations in table 4.", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="Steps of each filter in table 4.", min=1)] = 8,
    particles: Annotated[int, typer.Option(help="Particles of each filter in table 4.", min=1)] = 256,
) -> None:
    """Print bias and spread of path weights, of their evidence, and of the discretized emulator."""
    console, levels = Console(), levels or [12, 16, 24, 32, 48, 64]
    filters = filters or list(FILTERS)
    if unknown := sorted(set(filters) - set(FILTERS)):
        raise typer.BadParameter(f"no filter called {', '.join(unknown)}; give one of {'; '.join(FILTERS)}.")
    wanted = tables or [1, 2, 3, 4, 5]
    title = f"Filters, {steps} steps, N = {particles}, {experiments} sets of observations, {runs} runs of each"
    with jax.enable_x64(True):
        double: dict[int, tuple[str, Callable[[], list[dict[str, Any]]]]] = {
            1: (f"Discretized emulator, ring of {points} points", lambda: emulator_rows(levels, points)),
            2: (f"One step, chain of {size} points, {draws} draws", lambda: weight_rows(size, levels[::2], draws)),
            3: (f"One step, noise of the diffusion not white, {draws} draws", lambda: noise_rows(size, draws)),
        }
        results = {title: rows() for table, (title, rows) in double.items() if table in wanted}
    if 4 in wanted:
        results[title] = filter_rows(filters, dims or [4, 10], runs, experiments, steps, particles)
    if 5 in wanted:
        results[f"One step of the Lorenz-96 emulator, {draws // 8} draws"] = learned_rows(draws // 8)
    for title, rows in results.items():
        columns = {name: "g" if name in ("r", "passes") else "" for name in rows[0] if not name.endswith(" SE")}
        print_table(console, title, rows, columns)
    sizes = {"points": points, "size": size, "draws": draws, "runs": runs, "steps": steps, "particles": particles}
    write_json(out, {**sizes, "levels": levels, "experiments": experiments}, tables=results)


if __name__ == "__main__":
    typer.run(main)
