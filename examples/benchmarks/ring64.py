"""How far is a guided reverse diffusion from the exact posterior, and what does it cost? A ring of 64 points.

The prior is exact and Gaussian: 64 points on a ring with covariance exp(-(distance / 4)^1.5) + 0.001 I. Every fourth
point is observed with error 0.1. All error is therefore that of the sampler. The script prints three tables:

1. Samplers with exact linear solves. The error is the 2-Wasserstein distance between the Gaussian of the sampler and
   the exact posterior, divided by sqrt(trace of the posterior covariance). It has no Monte Carlo error: with exact
   solves, a draw is an affine function of its noise, and its distribution follows from that function.
2. Linear solves, with DPM-Solver++(2M). With inexact solves, a draw is not affine in its noise. The error is the RMS
   distance, path by path, to the exact flow from the same noise, divided by the same number. It is an upper bound on
   the error in 1.
3. Guidance: published alternatives, and MMPS with different numbers of products at different noise levels. The error is
   that of 2. Settings of the cheaper rows were chosen on two other rings, whose errors are in the columns before the
   last.

"passes" counts all network passes of one draw, where one vjp counts as one forward pass. With exact solves this
includes one vjp for each of the 16 observations at each level, so compare samplers by their guided evaluations.

    python examples/benchmarks/ring64.py --out ring64.json
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import typer
from jax.flatten_util import ravel_pytree
from report import json_file, print_table, write_json
from rich.console import Console

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import (
    GuidanceState,
    LinearSolver,
    PriorDenoiser,
    Product,
    Solution,
    StepInputs,
    relative_residual,
)

EXACT = ndda.MMPS(ndda.diffusion.DirectSolve())


class DiagonalSolve(LinearSolver):
    """Solver that divides by the diagonal of I + B, with a single product for the image of the answer."""

    def init(self, size: int, dtype: Any) -> Any:
        """Return an empty state, because there is no warm start."""
        return ()

    def __call__(self, product: Product, rhs: jax.Array, warm_start: Any) -> tuple[Solution, Any]:
        """Divide by the diagonal, which is assumed known, as if the variance of the emulator had been tabulated."""
        columns, _ = jax.vmap(product)(jnp.eye(len(rhs), dtype=rhs.dtype))
        answer = rhs / jnp.diagonal(columns)
        back, image = product(answer)
        return Solution(answer, image, relative_residual(rhs, back), jnp.asarray(1)), warm_start


class GivenNoise(ndda.diffusion.Noise):
    """Noise with a given draw, which makes a stochastic step a function of its noise."""

    draw: jax.Array

    def sample(self, rng_key: Any, shape: Any, dtype: Any) -> jax.Array:
        """Return the given draw."""
        return self.draw

    def covariance_product(self, v: jax.Array) -> jax.Array:
        """Return `v`, because the draw is white noise."""
        return v


class Ring:
    """Prior on a ring with observations and their exact posterior.

    Args:
        points: number of points on the ring.
        length: correlation length of the prior, in points.
        spacing: spacing of the observed points.
        error: standard deviation of the observation errors.
    """

    def __init__(self, points: int, length: float = 4.0, spacing: int = 4, error: float = 0.1) -> None:
        i = np.arange(points)
        distance = np.abs(i[:, None] - i[None])
        distance = np.minimum(distance, points - distance)
        covariance = np.exp(-((distance / length) ** 1.5)) + 1e-3 * np.eye(points)
        observed = i[::spacing]
        h = np.eye(points)[observed]
        gain = covariance @ h.T @ np.linalg.inv(h @ covariance @ h.T + error**2 * np.eye(len(observed)))
        rng = np.random.default_rng(0)
        truth = np.linalg.cholesky(covariance) @ rng.normal(size=points)
        y = truth[observed] + error * rng.normal(size=len(observed))
        self.points, self.observations, self.prior_covariance = points, len(observed), covariance
        self.mean, self.covariance = gain @ y, covariance - gain @ h @ covariance
        self.spread = float(np.sqrt(np.trace(self.covariance)))
        self.prior = ndda.GaussianPrior(np.zeros((points, points)), covariance)
        self.likelihood = ndda.observation.GaussianLikelihood(
            lambda x: [
                ndda.observation.GaussianObservation(
                    x[::spacing], jnp.full(len(y), error), jnp.asarray(y), jnp.ones(len(y), bool)
                )
            ]
        )

    def denoiser(self, guidance: ndda.diffusion.Guidance) -> Any:
        """Denoiser of the posterior by `guidance`."""
        conditioning = self.prior.condition(jnp.zeros(self.points))
        return guidance(PriorDenoiser(self.prior, conditioning), self.likelihood)

    def flow(
        self, sampler: ndda.Sampler, guidance: ndda.diffusion.Guidance
    ) -> Callable[[jax.Array], tuple[jax.Array, GuidanceState]]:
        """Function from starting noise to draw, for a deterministic sampler."""
        denoiser, prior = self.denoiser(guidance), self.prior

        def draw(z: jax.Array) -> tuple[jax.Array, GuidanceState]:
            z, memory = sampler(jax.random.key(0), denoiser, prior.noise, prior.noise_range, z)
            return prior.latent_scale * z, memory

        return jax.jit(draw)

    def wasserstein(self, mean: np.ndarray, covariance: np.ndarray) -> float:
        """2-Wasserstein distance of N(mean, covariance) to the posterior, relative to the spread of the posterior."""
        root = scipy.linalg.sqrtm(self.covariance).real
        cross = scipy.linalg.sqrtm(root @ covariance @ root).real
        squared = np.sum((mean - self.mean) ** 2) + np.trace(covariance + self.covariance - 2 * cross)
        return float(np.sqrt(max(squared, 0.0))) / self.spread


def affine(fn: Callable[[jax.Array], jax.Array], size: int) -> tuple[jax.Array, jax.Array]:
    """Offset b and matrix M of fn(v) = b + M v, from its values at 0 and at the unit vectors."""
    values = jax.vmap(fn)(jnp.concatenate([jnp.zeros((1, size)), jnp.eye(size)]))
    return values[0], (values[1:] - values[:1]).T


def law_of_flow(ring: Ring, sampler: ndda.Sampler) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the draws of a deterministic sampler, from its affine map."""
    flow = ring.flow(sampler, EXACT)
    b, m = affine(lambda z: flow(z)[0], ring.points)
    highest = sampler.schedule.levels(ring.prior.noise_range)[0]
    return np.asarray(b), highest**2 * np.asarray(m @ m.T)


def law_of_langevin(ring: Ring, sampler: ndda.Sampler) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the draws of a deterministic step with Langevin corrections, level by level.

    Each move is an affine function of z, of the history of the step, and of the noise of the move.
    """
    denoiser, prior, step, corrector = ring.denoiser(EXACT), ring.prior, sampler.step, sampler.corrector
    levels = sampler.schedule.levels(prior.noise_range)
    start, stop = levels[:-1], levels[1:]
    constants = jax.tree.map(jnp.asarray, step.coefficients(start, stop))
    memory, key, d = denoiser.init(), jax.random.key(0), ring.points
    zero, unravel = ravel_pytree((jnp.zeros(d), step.init(jnp.zeros(d))))
    move = ndda.diffusion.LangevinCorrector(1, corrector.tau)

    def advance(v: jax.Array, start: jax.Array, stop: jax.Array, constants: Any) -> jax.Array:
        z, history = unravel(v)
        given = StepInputs(key, denoiser, prior.noise, z, start, stop, constants)
        z, history, _ = step(given, history, memory)
        return ravel_pytree((z, history))[0]

    def correct(v: jax.Array, level: jax.Array) -> jax.Array:
        (z, history), e = unravel(v[:-d]), v[-d:]
        z, _ = move(key, denoiser, GivenNoise(e), z, level, memory)
        return ravel_pytree((z, history))[0]

    @jax.jit
    def one_level(
        mean: jax.Array, covariance: jax.Array, start: jax.Array, stop: jax.Array, constants: Any
    ) -> tuple[jax.Array, jax.Array]:
        b, m = affine(lambda v: advance(v, start, stop, constants), len(zero))
        mean, covariance = b + m @ mean, m @ covariance @ m.T
        b, m = affine(lambda v: correct(v, stop), len(zero) + d)
        of_state, of_noise = m[:, :-d], m[:, -d:]
        for _ in range(corrector.steps):
            mean, covariance = b + of_state @ mean, of_state @ covariance @ of_state.T + of_noise @ of_noise.T
        return mean, covariance

    mean = zero
    covariance = jnp.zeros((len(zero), len(zero))).at[:d, :d].set(levels[0] ** 2 * jnp.eye(d))
    for i in range(len(start)):
        now = jax.tree.map(lambda x, i=i: x[i], constants)
        mean, covariance = one_level(mean, covariance, jnp.asarray(start[i]), jnp.asarray(stop[i]), now)
    b, m = affine(lambda z: denoiser(z, jnp.asarray(levels[-1]), memory)[0], d)
    scale = np.asarray(prior.latent_scale)
    return scale * np.asarray(b + m @ mean[:d]), scale**2 * np.asarray(m @ covariance[:d, :d] @ m.T)


def describe(schedule: ndda.KarrasSchedule) -> str:
    """Describe a schedule in words: number of levels, rho, and range of noise levels."""
    return f"{schedule.num_levels}, rho {schedule.rho:g}, {schedule.lowest:g}..{schedule.highest:g}"


def sampler_rows(ring: Ring) -> list[dict[str, Any]]:
    """Rows of table 1: samplers with exact solves."""

    def edm(levels: int) -> ndda.KarrasSchedule:
        return ndda.KarrasSchedule(levels, 7.0, 2e-3, 80.0)

    published = ndda.KarrasSchedule(32, 6.0, 2e-5, 80.0)
    third = ndda.diffusion.AdamsBashforth(3)
    default = ndda.KarrasSchedule(lowest=2e-2, highest=80.0)
    entries = [
        *[
            (
                f"Adams-Bashforth 3 + 2 Langevin corrections, tau {tau:g}",
                ndda.Sampler(third, published, corrector=ndda.diffusion.LangevinCorrector(2, tau)),
            )
            for tau in (0.1, 0.5)
        ],
        ("the same without corrections", ndda.Sampler(third, published)),
        ("Adams-Bashforth 3", ndda.Sampler(third, edm(20))),
        ("DPM-Solver++(2M)", ndda.Sampler(ndda.DPMSolverPP2M(), edm(20))),
        ("DPM-Solver++(2S)", ndda.Sampler(ndda.diffusion.DPMSolverPP2S(), edm(12))),
        ("Heun", ndda.Sampler(ndda.diffusion.Heun(), edm(12))),
        ("DDIM, deterministic", ndda.Sampler(ndda.diffusion.DDIM(), edm(32))),
        ("cheap recipe: DPM-Solver++(2M)", ndda.Sampler(ndda.DPMSolverPP2M(), default)),
    ]
    rows = []
    for name, sampler in entries:
        law = law_of_flow if sampler.corrector is None else law_of_langevin
        mean, covariance = law(ring, sampler)
        evaluations = sampler.evaluations(ring.prior.noise_range)
        rows.append(
            {
                "sampler": name,
                "noise levels": describe(sampler.schedule),
                "guided evaluations": evaluations,
                "passes": evaluations * (1 + ring.observations),
                "trace ratio": float(np.trace(covariance) / np.trace(ring.covariance)),
                "error": ring.wasserstein(mean, covariance),
            }
        )
    return rows


def starting_noise(ring: Ring, paths: int) -> jax.Array:
    """Unit noise at the start of each path."""
    return jax.random.normal(jax.random.key(3), (paths, ring.points))


def exact_flow(ring: Ring, paths: int, levels: int) -> jax.Array:
    """End of each path of the exact flow, shape (paths, points)."""
    reference = ndda.Sampler(ndda.diffusion.DPMSolverPP2S(), ndda.KarrasSchedule(levels, 7.0, 2e-4, 80.0))
    return jax.vmap(lambda z: ring.flow(reference, EXACT)(z)[0])(80.0 * starting_noise(ring, paths))


def path_error(
    ring: Ring, sampler: ndda.Sampler, guidance: ndda.diffusion.Guidance, exact: jax.Array
) -> tuple[float, GuidanceState]:
    """RMS distance to the exact flow, path by path, relative to the posterior spread, and states of the guidance."""
    x, memory = jax.vmap(ring.flow(sampler, guidance))(80.0 * starting_noise(ring, len(exact)))
    return float(jnp.sqrt(jnp.mean(jnp.sum((x - exact) ** 2, -1)))) / ring.spread, memory


def solve_rows(ring: Ring, paths: int, reference_levels: int) -> list[dict[str, Any]]:
    """Rows of table 2: linear solves."""
    exact = exact_flow(ring, paths, reference_levels)

    def edm(levels: int) -> ndda.KarrasSchedule:
        return ndda.KarrasSchedule(levels, 7.0, 2e-3, 80.0)

    default = ndda.KarrasSchedule(lowest=2e-2, highest=80.0)
    entries: list[tuple[str, ndda.KarrasSchedule, LinearSolver]] = [
        ("exact", edm(20), ndda.diffusion.DirectSolve()),
        ("none (diagonal)", edm(20), DiagonalSolve()),
        *[(f"{k} from zero", edm(20), ndda.diffusion.KrylovSolve(k, warm_start=False)) for k in (1, 2, 3)],
        *[(f"{k - 1}, warm-started", edm(20), ndda.diffusion.KrylovSolve(k)) for k in (2, 3)],
        *[("1, warm-started", edm(levels), ndda.diffusion.KrylovSolve(2)) for levels in (16, 24)],
        ("cheap recipe: 1, warm-started", default, ndda.diffusion.KrylovSolve(2)),
        ("cheap sampler, exact", default, ndda.diffusion.DirectSolve()),
    ]
    rows = []
    for name, schedule, solver in entries:
        sampler = ndda.Sampler(ndda.DPMSolverPP2M(), schedule)
        error, memory = path_error(ring, sampler, ndda.MMPS(solver), exact)
        evaluations, passes = int(memory.passes.forward[0]), int(memory.passes.total()[0])
        rows.append(
            {
                "noise levels": describe(schedule),
                "conjugate-gradient steps": name,
                "products": (passes - evaluations) // evaluations,
                "passes": passes,
                "largest residual": float(jnp.max(memory.solver_residual)),
                "error": error,
            }
        )
    return rows


def guidance_rings(points: int) -> dict[str, Ring]:
    """Two rings of their own and the ring of the other tables, by the name of their column in table 3."""
    return {
        "error, length 6, every 4th, 0.15": Ring(points, 6.0, 4, 0.15),
        "error, length 3, every 3rd, 0.2": Ring(points, 3.0, 3, 0.2),
        "error": Ring(points),
    }


def guidance_rows(points: int, paths: int, reference_levels: int) -> list[dict[str, Any]]:
    """Rows of table 3: guidance, on the rings of `guidance_rings`."""
    rings = guidance_rings(points)
    exact = {name: exact_flow(ring, paths, reference_levels) for name, ring in rings.items()}

    def default(levels: int = 16) -> ndda.KarrasSchedule:
        return ndda.KarrasSchedule(levels, lowest=2e-2, highest=80.0)

    def shorter(levels: int) -> ndda.KarrasSchedule:
        return ndda.KarrasSchedule(levels, 20.0, 4e-2, 80.0)

    one, two, three = (ndda.MMPS(ndda.diffusion.KrylovSolve(k)) for k in (1, 2, 3))
    entries = [
        ("cheap recipe: MMPS, 2 products", default(), two),
        ("MMPS, 2 products", default(15), two),
        ("MMPS, 2 products", default(14), two),
        ("none above 40", default(), ndda.diffusion.Piecewise((ndda.diffusion.Unguided(), two), (40.0,))),
        ("none above 10", default(), ndda.diffusion.Piecewise((ndda.diffusion.Unguided(), two), (10.0,))),
        ("none below 0.06", default(), ndda.diffusion.Piecewise((two, ndda.diffusion.Unguided()), (0.06,))),
        ("1 product below 0.2", default(), ndda.diffusion.Piecewise((two, one), (0.2,))),
        ("JFPS below 0.06", default(), ndda.diffusion.Piecewise((two, ndda.diffusion.JFPS()), (0.06,))),
        ("MMPS, 2 products", shorter(13), two),
        ("3 products to 3, 2 to 0.3, then 1", shorter(13), ndda.diffusion.Piecewise((three, two, one), (3.0, 0.3))),
        ("1 product above 40 and below 0.2", shorter(13), ndda.diffusion.Piecewise((one, two, one), (40.0, 0.2))),
        ("1 product above 40 and below 0.2", shorter(12), ndda.diffusion.Piecewise((one, two, one), (40.0, 0.2))),
        ("TMPD", default(), ndda.diffusion.TMPD()),
        ("PiGDM", default(24), ndda.diffusion.PiGDM()),
        ("JFPS", default(48), ndda.diffusion.JFPS()),
        ("DPS", default(24), ndda.diffusion.DPS()),
        ("DPS, zeta 0.3", default(24), ndda.diffusion.DPS(0.3)),
        ("DPS, zeta 1", default(24), ndda.diffusion.DPS(1.0)),
        ("DPS, zeta 3", default(24), ndda.diffusion.DPS(3.0)),
    ]
    rows = []
    for name, schedule, guidance in entries:
        row: dict[str, Any] = {"guidance": name, "noise levels": describe(schedule), "passes": 0}
        for column, ring in rings.items():
            error, memory = path_error(ring, ndda.Sampler(ndda.DPMSolverPP2M(), schedule), guidance, exact[column])
            row["passes"] = int(memory.passes.total()[0])
            row[column] = error
        rows.append(row)
    return rows


def main(
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the tables to.")] = None,
    points: Annotated[int, typer.Option(help="Points on the ring, 24 or more; 64 in the documentation.")] = 64,
    paths: Annotated[int, typer.Option(help="Paths of tables 2 and 3.")] = 256,
    reference_levels: Annotated[int, typer.Option(help="Noise levels of the exact flow.")] = 400,
) -> None:
    """Print error and cost of guided samplers on a ring of points, in double precision."""
    console = Console()
    with jax.enable_x64(True):
        ring = Ring(points)
        tables = {
            "samplers": sampler_rows(ring),
            "solves": solve_rows(ring, paths, reference_levels),
            "guidance": guidance_rows(points, paths, reference_levels),
        }
    print_table(console, f"Samplers on a ring of {points} points, exact solves", tables["samplers"])
    print_table(console, f"Linear solves on a ring of {points} points, DPM-Solver++(2M)", tables["solves"])
    print_table(console, f"Guidance on a ring of {points} points, DPM-Solver++(2M)", tables["guidance"])
    write_json(out, {"points": points, "paths": paths, "reference_levels": reference_levels}, **tables)


if __name__ == "__main__":
    typer.run(main)
