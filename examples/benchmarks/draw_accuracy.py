"""What does it cost to draw accurately, and what do the cheap recipes lose? Four posteriors of one step.

Each case is one transition with observations. All recipes draw from the same starting noise, and are compared with a
reference draw from that noise: 3.5 times as many noise levels, with exact solves (on the weather, twice as many levels,
and solves to a tenth of the default's tolerance). The table has, by case and recipe:

- passes: network passes of a draw, where a vjp counts as one pass. The solver makes as many products as the draw of the
  batch needs that needs most; these are counted, because they run.
- products: mean number of products per solve.
- distance: RMS distance of a draw to its reference, over the RMS spread of the reference draws.
- variance: mean over components of the variance of draws over that of the reference, minus 1, in percent.
- worst mode: the same in the direction where it is largest, for the Gaussian cases, whose posterior is known.

The cases are Lorenz-96 (40 sites, every second observed, error variance 0.1) and the atmosphere (200 stations, as in
the demonstration) with their learned emulators, a ring of 64 points (every 4th observed with error 0.1), and a Gaussian
of rank 4 in 6 dimensions with singular noise, eigenvalues over three decades and three observed combinations.

    python examples/benchmarks/draw_accuracy.py --out draw_accuracy.json
    python examples/benchmarks/draw_accuracy.py --case lorenz96 --draws 16               # quick
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from report import json_file, print_table, write_json
from rich.console import Console

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import held_suarez_demo
from numpyro_diffusion_da.diffusion import DirectSolve, GeometricSchedule, KrylovSolve, UniPC
from numpyro_diffusion_da.observation import GaussianLikelihood, GaussianObservation
from numpyro_diffusion_da.transition import DiffusionDynamics


class Recipe(NamedTuple):
    """Sampler and guidance of a guided draw."""

    sampler: ndda.Sampler
    guidance: ndda.MMPS


RECIPES = {
    "cheap": Recipe(ndda.Sampler.cheap(), ndda.MMPS.cheap()),
    "default": Recipe(ndda.Sampler(), ndda.MMPS()),
}
FINE = ndda.Sampler(UniPC(), GeometricSchedule(1.17))
REFERENCE = Recipe(FINE, ndda.MMPS(DirectSolve()))
WEATHER_REFERENCE = Recipe(
    ndda.Sampler(UniPC(), GeometricSchedule(1.32)), ndda.MMPS(KrylovSolve(tolerance=3e-3, max_products=64))
)


class Case(NamedTuple):
    """Transition with observations.

    Attributes:
        prior: prior of the transition.
        state: previous state.
        observe: function from the state to the observed values, shape (m,).
        errors: standard deviations of the observation errors, shape (m,).
        reference: recipe of the reference draws.
        draws: number of draws, at most.
        covariance: covariance of the posterior, if it is known.
    """

    prior: ndda.DiffusionPrior
    state: jax.Array
    observe: Callable[[jax.Array], jax.Array]
    errors: jax.Array
    reference: Recipe
    draws: int
    covariance: np.ndarray | None = None

    def drawn(self, recipe: Recipe, draws: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return draws, shape (draws, d), and for each the network passes in total and the number of evaluations."""
        prior = self.prior
        conditioning = jax.jit(lambda state: prior.condition(state))(self.state)
        step = DiffusionDynamics(prior, conditioning, recipe.sampler)
        ahead = DiffusionDynamics(prior, conditioning, ndda.Sampler())
        truth = jax.jit(lambda key: ahead.draw(key)[0])(jax.random.key(1))
        m = len(self.errors)
        y = self.observe(truth) + self.errors * jax.random.normal(jax.random.key(2), (m,))
        likelihood = GaussianLikelihood(
            lambda x: [GaussianObservation(self.observe(x), self.errors, y, jnp.ones(m, bool))]
        )

        def one(key: jax.Array) -> tuple[jax.Array, ndda.diffusion.NetworkPasses]:
            x, record = step.conditional_draw(key, likelihood, recipe.guidance)
            return x.reshape(-1), record.passes

        x, passes = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), draws))
        return np.asarray(x, float), np.asarray(passes.total()), int(passes.forward[0])

    def worst_mode(self, x: np.ndarray, reference: np.ndarray) -> float | None:
        """Largest relative error of the variance of draws in any direction, with its sign; None if it is not known.

        Draws are nearly a linear function of reference draws, whose covariance is known. The function is fitted, which
        leaves next to no sampling error.
        """
        if self.covariance is None:
            return None
        values, vectors = np.linalg.eigh(self.covariance)
        kept = values > 1e-7 * values.max()
        white = vectors[:, kept] / np.sqrt(values[kept])
        at = np.concatenate([np.ones((len(x), 1)), reference @ white], 1)
        fit = np.linalg.lstsq(at, x @ white, rcond=None)[0]
        rest = x @ white - at @ fit
        ratios = np.linalg.eigvalsh(fit[1:].T @ fit[1:] + rest.T @ rest / len(x)) - 1.0
        return float(ratios[np.argmax(np.abs(ratios))])


def gaussian(covariance: np.ndarray, h: np.ndarray, errors: np.ndarray, noise: np.ndarray | None = None) -> Case:
    """Case with a Gaussian prior N(0, covariance), observed through the matrix h."""
    d = len(covariance)
    prior = ndda.GaussianPrior(np.zeros((d, d)), covariance, noise_covariance=noise)
    gain = covariance @ h.T @ np.linalg.inv(h @ covariance @ h.T + np.diag(errors**2))
    matrix = jnp.asarray(h, jnp.float32)
    return Case(
        prior,
        jnp.zeros(d),
        lambda x: matrix @ x,
        jnp.asarray(errors, jnp.float32),
        REFERENCE,
        256,
        covariance - gain @ h @ covariance,
    )


def ring64() -> Case:
    """Ring of 64 points, as in `ring64.py`."""
    i = np.arange(64)
    apart = np.minimum(np.abs(i[:, None] - i), 64 - np.abs(i[:, None] - i))
    return gaussian(np.exp(-((apart / 4) ** 1.5)) + 1e-3 * np.eye(64), np.eye(64)[::4], np.full(16, 0.1))


def rank4() -> Case:
    """Gaussian of rank 4 in 6 dimensions, with diffusion noise of the same range."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 4))
    axes = np.linalg.qr(root)[0] @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
    q = axes * np.geomspace(1.0, 1e-3, 4) @ axes.T
    return gaussian(q, rng.normal(size=(3, 6)), np.array([0.05, 0.5, 2.0]), root @ root.T / 4)


def lorenz96() -> Case:
    """Lorenz-96 with its learned emulator."""
    prior = ndda.load_prior("lorenz96")
    state = prior.climatology().sample(jax.random.key(0))
    return Case(prior, state, lambda x: x[::2], jnp.full(20, 0.1**0.5), REFERENCE, 256)


def weather() -> Case:
    """Atmosphere with its learned emulator and the stations of the demonstration, at one time."""
    experiment, emulator = held_suarez_demo.WeatherExperiment(), ndda.load_prior("held_suarez")
    prior = emulator.with_errors_times(held_suarez_demo.GUIDED_ERRORS)
    (network,) = experiment.observing(prior).values()
    state = prior.climatology().sample(jax.random.key(0))
    shape = jax.eval_shape(lambda x: network.observe(x, prior.layout), state).shape
    errors = jnp.broadcast_to(jnp.asarray(network.error(), jnp.float32), shape).reshape(-1)
    return Case(prior, state, lambda x: network.observe(x, prior.layout).reshape(-1), errors, WEATHER_REFERENCE, 4)


CASES: dict[str, Callable[[], Case]] = {"lorenz96": lorenz96, "weather": weather, "ring64": ring64, "rank 4": rank4}


def rows_of(name: str, case: Case, draws: int) -> list[dict[str, Any]]:
    """Rows of one case."""
    n = min(draws, case.draws)
    reference, _, _ = case.drawn(case.reference, n)
    spread = reference.std(0, ddof=1)
    seen = spread > 1e-4 * spread.max()
    rows = []
    for recipe_name, recipe in RECIPES.items():
        x, passes, evaluations = case.drawn(recipe, n)
        distance = np.sqrt(np.mean((x - reference) ** 2)) / np.sqrt(np.mean(spread**2))
        ratio = np.mean(x.var(0)[seen] / reference.var(0)[seen]) - 1.0
        worst = case.worst_mode(x, reference)
        rows.append(
            {
                "case": f"{name}, {len(case.errors)} obs.",
                "recipe": recipe_name,
                "passes": float(passes.mean()),
                "products": float((passes.mean() - evaluations) / evaluations),
                "distance": float(distance),
                "variance, %": 100.0 * float(ratio),
                "worst mode, %": None if worst is None else 100.0 * worst,
            }
        )
    return rows


def main(
    case: Annotated[list[str] | None, typer.Option(help="Case; may be repeated; all by default.")] = None,
    draws: Annotated[int, typer.Option(min=2, help="Draws of each recipe, at most 256, and 4 of the weather.")] = 256,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print passes and errors of guided draws with the cheap recipes and with the defaults."""
    console = Console(width=130)
    if unknown := sorted(set(case or ()) - set(CASES)):
        raise typer.BadParameter(f"no case called {', '.join(unknown)}; give one of {', '.join(CASES)}.")
    rows: list[dict[str, Any]] = []
    for name in case or CASES:
        rows += rows_of(name, CASES[name](), draws)
        # Write after every case, so that an interrupted run keeps what it has.
        write_json(out, {"draws": draws}, rows=rows)
    columns = {"case": "", "recipe": "", "passes": ".0f", "products": ".1f", "distance": ".3f"}
    columns |= {"variance, %": "+.1f", "worst mode, %": "+.1f"}
    print_table(console, "Guided draws of one step", rows, columns, group="case")


if __name__ == "__main__":
    typer.run(main)
