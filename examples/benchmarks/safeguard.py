"""Why does the linear solve of the guidance need a safeguard? Plain conjugate gradients against the library's solver.

The Jacobian of a learned network is neither symmetric nor positive. The script compares two priors on 40 sites, with
every second site observed:

- the Lorenz-96 emulator of the package;
- a network with random weights in EDM's preconditioning, a bad emulator whose Jacobian has no symmetry.

The first table describes B = s^2 H S J C S H^T along unguided draws, in units of the observation errors: its asymmetry
|B - B^T| / |B + B^T| in the Frobenius norm, and the smallest eigenvalue of its symmetric part. If this is below -1,
I + B is not a covariance. The second table has guided draws with k products per noise level: the RMS distance of draws
to the observations in units of their errors ("misfit"), and the largest distance of any site from the unguided mean in
units of the spread S of the prior ("farthest").

    python examples/benchmarks/safeguard.py --out safeguard.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from report import json_file, print_table, write_json
from rich.console import Console

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import LinearSolver, Product, Solution, relative_residual

SITES = 40


class ConjugateGradients(LinearSolver):
    """Textbook conjugate gradients from zero, without a safeguard.

    Args:
        products: number of steps, with one product each.
    """

    products: int

    def init(self, size: int, dtype: Any) -> Any:
        """Return an empty state, because there is no warm start."""
        return ()

    def __call__(self, product: Product, rhs: jax.Array, warm_start: Any) -> tuple[Solution, Any]:
        """Solve by `products` steps; the image of the answer is combined from the images of the products."""
        answer, left, direction = jnp.zeros_like(rhs), rhs, rhs
        column = jnp.zeros_like(rhs)
        image: Any = 0.0
        for _ in range(self.products):
            seen, pulled = product(direction)
            curvature = jnp.vdot(direction, seen)
            size = jnp.vdot(left, left)
            step = jnp.where(size > 1e-12 * jnp.vdot(rhs, rhs), size / curvature, 0.0)
            answer, column, image = answer + step * direction, column + step * seen, image + step * pulled
            fresh = left - step * seen
            direction = fresh + jnp.where(size > 0, jnp.vdot(fresh, fresh) / size, 0.0) * direction
            left = fresh
        return Solution(answer, image, relative_residual(rhs, column), jnp.asarray(self.products)), warm_start


def random_network(gain: float, hidden: int = 64) -> ndda.DenoiserPrior:
    """Prior whose network F has random weights: D = z / (1 + s^2) + s / (1 + s^2)^(1/2) F(z / (1 + s^2)^(1/2)).

    Args:
        gain: approximate RMS of the eigenvalues of the Jacobian of F.
        hidden: number of hidden units.
    """
    keys = jax.random.split(jax.random.key(0), 2)
    parameters = (
        gain * jax.random.normal(keys[0], (SITES, hidden)) / hidden**0.5,
        jax.random.normal(keys[1], (hidden, SITES)) / SITES**0.5,
    )

    def network(parameters: Any, z: jax.Array, index: jax.Array, conditioning: Any) -> jax.Array:
        back, forth = parameters
        return back @ jnp.tanh(forth @ z)

    return ndda.DenoiserPrior(
        network,
        ndda.priors.parametrization.Preconditioned(1.0),
        parameters=parameters,
        layout=SITES,
        noise_range=(0.02, 80.0),
    )


class Case:
    """Prior at one previous state, with observations of one of its draws.

    Args:
        prior: prior of 40 sites.
        state: previous state.
        error: standard deviation of the observation errors, in units of the spread S of the prior.
    """

    def __init__(self, prior: ndda.DiffusionPrior, state: jax.Array, error: float) -> None:
        self.prior, self.conditioning = prior, prior.condition(state)
        self.step = ndda.DiffusionTransition(prior, state, sampler=ndda.Sampler.cheap()).dynamics()
        self.spread = float(jnp.mean(prior.scale(self.conditioning)))
        self.error = error * self.spread
        self.unguided = jax.jit(jax.vmap(lambda key: self.step.draw(key)[0]))(jax.random.split(jax.random.key(1), 64))
        noise = self.error * jax.random.normal(jax.random.key(2), (SITES // 2,))
        self.value = self.unguided[0, ::2] + noise

    def likelihood(self) -> ndda.observation.GaussianLikelihood:
        """Likelihood of the observations of every second site."""
        scale, seen = jnp.full(SITES // 2, self.error), jnp.ones(SITES // 2, bool)
        return ndda.observation.GaussianLikelihood(
            lambda x: [ndda.observation.GaussianObservation(x[::2], scale, self.value, seen)]
        )

    def system(self, level: jax.Array, z_s: jax.Array) -> jax.Array:
        """Matrix B at one noise level and noisy state, shape (observations, observations)."""
        jacobian = jax.jacfwd(lambda z: self.prior.denoise(z, level, self.conditioning))(z_s)
        return (level / self.error) ** 2 * self.spread**2 * jacobian[::2, ::2]

    def systems(self) -> dict[str, float]:
        """Largest asymmetry and smallest eigenvalue of B over draws and the default noise levels."""
        levels = ndda.KarrasSchedule().levels(self.prior.noise_range)
        z = (self.unguided[:16] - self.prior.location(self.conditioning)[None]) / self.spread
        e = jax.random.normal(jax.random.key(3), z.shape)
        b = np.stack([jax.vmap(lambda z, s=s: self.system(jnp.asarray(s), z))(z + s * e) for s in levels])
        b = np.asarray(b, np.float64)
        turned = np.swapaxes(b, 2, 3)
        asymmetry = np.linalg.norm(b - turned, axis=(2, 3)) / np.linalg.norm(b + turned, axis=(2, 3))
        return {
            "asymmetry": float(asymmetry.max()),
            "smallest eigenvalue": float(np.linalg.eigvalsh(0.5 * (b + turned)).min()),
        }

    def draws(self, solver: LinearSolver, n: int) -> dict[str, float]:
        """Distances of guided draws to the observations and to the unguided mean, and the largest solver residual."""
        guidance, likelihood = ndda.MMPS(solver), self.likelihood()
        keys = jax.random.split(jax.random.key(4), n)
        x, record = jax.jit(jax.vmap(lambda key: self.step.conditional_draw(key, likelihood, guidance)))(keys)
        misfit = (x[:, ::2] - self.value[None]) / self.error
        return {
            "misfit": float(jnp.sqrt(jnp.mean(misfit**2))),
            "farthest": float(jnp.max(jnp.abs(x - self.unguided.mean(0)[None]))) / self.spread,
            "solver residual": float(jnp.max(record.solver_residual)),
        }


def cases() -> dict[str, Case]:
    """All cases by name."""
    emulator = ndda.load_prior("lorenz96")
    state = emulator.climatology().sample(jax.random.key(0))
    return {
        **{f"lorenz96, error {error:g}": Case(emulator, state, error) for error in (0.5, 0.1, 0.02)},
        **{
            f"random weights, gain {gain:g}, error 0.1": Case(random_network(gain), jnp.zeros(SITES), 0.1)
            for gain in (0.3, 1.0)
        },
    }


def main(
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the tables to.")] = None,
    draws: Annotated[int, typer.Option(help="Guided draws for each row.")] = 64,
) -> None:
    """Print accuracy of guided draws with and without the safeguard of the linear solve."""
    console = Console()
    systems, rows = [], []
    for name, case in cases().items():
        systems.append({"prior": name, **case.systems()})
        for products in (2, 3, 6):
            solvers = {"unguarded": ConjugateGradients(products), "library": ndda.diffusion.KrylovSolve(products)}
            for kind, solver in solvers.items():
                rows.append({"prior": name, "products": products, "solve": kind, **case.draws(solver, draws)})
    print_table(console, "Systems B along unguided draws", systems, default=".3g")
    print_table(console, f"{draws} guided draws", rows, default=".3g", group="prior")
    write_json(out, {"draws": draws}, systems=systems, draws=rows)


if __name__ == "__main__":
    typer.run(main)
