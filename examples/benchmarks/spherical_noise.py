"""How large is the error if guidance takes noise on the sphere for white noise, and what does the right noise cost?

The prior is exact and Gaussian on a latitude-longitude grid with both poles. It is isotropic on the sphere, with unit
variance and power (1 + (l / 5)^2)^-2 at total wavenumber l. 40 grid points are observed with error 0.1. The noise of
the diffusion is `SphericalNoise`, as in GenCast. Guidance uses either its covariance C, or C = I as the published
method does. The script prints four tables:

1. Rank of C on three grids, and its largest and smallest non-zero eigenvalue.
2. Relative error of the guidance vector D_y - D at several noise levels, compared with the closed form; root mean
   square over draws of truth, observations and z_s. For C = I there are two solves: one of the system as it is, at
   which the published method aims, and one by `DirectSolve`, which symmetrizes the system. (Only with the right C is
   the system symmetric.)
3. Error of the whole sampler: 2-Wasserstein distance between its Gaussian and the exact posterior, divided by
   sqrt(trace of the posterior covariance). It has no Monte Carlo error, because with exact solves a draw is an affine
   function of its noise.
4. Seconds of one product with C and of one draw of the noise on the CPU of this machine, in float32, and their
   floating-point operations by formula, compared with a forward pass of GenCast's 1 degree Mini model (1.6 TFLOP).

    python examples/benchmarks/spherical_noise.py --out spherical_noise.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from report import json_file, print_table, write_json
from rich.console import Console

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import LinearSolver, PriorDenoiser, Product, Solution, relative_residual

FORWARD_FLOP = 1.6e12
"""Floating-point operations of a forward pass of GenCast's 1 degree Mini model."""


class PlainSolve(LinearSolver):
    """Dense solver without assumed symmetry and without safeguard, the limit of BiCGStab or GMRES."""

    def init(self, size: int, dtype: Any) -> Any:
        """Return an empty state, because there is no warm start."""
        return ()

    def __call__(self, product: Product, rhs: jax.Array, warm_start: Any) -> tuple[Solution, Any]:
        """Solve with one product for each observation."""
        columns, images = jax.vmap(product)(jnp.eye(len(rhs), dtype=rhs.dtype))
        answer = jnp.linalg.solve(columns.T, rhs)
        residual = relative_residual(rhs, answer @ columns)
        return Solution(answer, jnp.tensordot(answer, images, 1), residual, jnp.asarray(len(rhs))), warm_start


GUIDANCES: dict[str, ndda.MMPS] = {
    "C": ndda.MMPS(ndda.diffusion.DirectSolve()),
    "C = I": ndda.MMPS(PlainSolve(), noise=ndda.diffusion.WhiteNoise()),
    "C = I, symmetrized": ndda.MMPS(ndda.diffusion.DirectSolve(), noise=ndda.diffusion.WhiteNoise()),
}


def harmonics(noise: ndda.diffusion.SphericalNoise) -> tuple[np.ndarray, np.ndarray]:
    """Matrix A of C = A A^T, shape (points, rank), and the total wavenumber of each of its columns."""
    factor = np.asarray(noise.factor, np.float64)
    longitude = 2.0 * np.pi * np.arange(noise.num_longitudes) / noise.num_longitudes
    columns, degrees = [], []
    for m in range(len(factor)):
        for wave in (np.cos(m * longitude), np.sin(m * longitude))[: 1 if m == 0 else 2]:
            for degree in range(m, len(factor)):
                columns.append(np.outer(factor[m, :, degree], wave).ravel())
                degrees.append(degree)
    return np.array(columns).T, np.array(degrees)


class Sphere:
    """Prior on the sphere with observations, and exact results in terms of coefficients w of z = A w."""

    def __init__(self, num_latitudes: int, num_longitudes: int, observations: int, error: float = 0.1) -> None:
        self.noise = ndda.diffusion.SphericalNoise(num_latitudes, num_longitudes)
        self.synthesis, degrees = harmonics(self.noise)
        points = num_latitudes * num_longitudes
        spectrum = (1.0 + (degrees / 5.0) ** 2) ** -2.0
        # The latent of the prior has unit mean variance, so with a state of unit variance it equals the state.
        self.spectrum = spectrum * points / np.sum(spectrum * np.sum(self.synthesis**2, 0))
        grid = (num_latitudes, num_longitudes)
        rows = jax.vmap(lambda v: self.noise.covariance_product(v.reshape(grid)).reshape(-1))(jnp.eye(points))
        self.prior = ndda.GaussianPrior(
            np.zeros((points, points)),
            (self.synthesis * self.spectrum) @ self.synthesis.T,
            noise_covariance=np.asarray(rows),
        )
        self.observed = np.sort(np.random.default_rng(0).choice(points, observations, replace=False))
        self.points, self.error = points, error

    def observe(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a truth from the prior, and observations of it."""
        truth = self.synthesis @ (np.sqrt(self.spectrum) * rng.normal(size=len(self.spectrum)))
        return truth[self.observed] + self.error * rng.normal(size=len(self.observed))

    def denoiser(self, guidance: ndda.MMPS, y: jax.Array) -> Any:
        """Denoiser of the posterior by `guidance`."""
        scale, seen = jnp.full(len(self.observed), self.error), jnp.ones(len(self.observed), bool)
        likelihood = ndda.observation.GaussianLikelihood(
            lambda x: [ndda.observation.GaussianObservation(x[self.observed], scale, jnp.asarray(y), seen)]
        )
        return guidance(PriorDenoiser(self.prior, self.prior.condition(jnp.zeros(self.points))), likelihood)

    def update(self, mean: np.ndarray, variances: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Kalman update of N(mean, V), V = A diag(variances) A^T: increment gain (y - H mean), and gain H V."""
        covariance = (self.synthesis * variances) @ self.synthesis.T
        seen = covariance[self.observed]
        system = seen[:, self.observed] + self.error**2 * np.eye(len(self.observed))
        gain = np.linalg.solve(system, seen).T
        return gain @ (y - mean[self.observed]), gain @ seen


def spectrum_rows(grids: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Rows of table 1: spectrum of C, which is block diagonal in zonal wavenumbers, so that no matrix is large."""
    rows = []
    for num_latitudes, num_longitudes in grids:
        noise = ndda.diffusion.SphericalNoise(num_latitudes, num_longitudes)
        values: list[np.ndarray] = []
        for m, block in enumerate(np.asarray(noise.factor, np.float64)):
            squared = np.linalg.svd(block[:, m:], compute_uv=False) ** 2
            # Sum of cos^2 over longitudes; that of sin^2 is the same.
            values += [num_longitudes * squared] if m == 0 else 2 * [num_longitudes / 2 * squared]
        spectrum = np.concatenate(values)
        rows.append(
            {
                "grid": f"{num_latitudes} x {num_longitudes}",
                "points": num_latitudes * num_longitudes,
                "rank": noise.rank,
                "largest": float(spectrum.max()),
                "smallest": float(spectrum.min()),
            }
        )
    return rows


def guidance_rows(sphere: Sphere, levels: list[float], draws: int) -> list[dict[str, Any]]:
    """Rows of table 2: relative error of the guidance vector."""
    rng = np.random.default_rng(1)
    rank = len(sphere.spectrum)

    def vector(guidance: ndda.MMPS) -> Callable[..., Any]:
        def added(z_s: jax.Array, level: jax.Array, y: jax.Array) -> jax.Array:
            denoiser = sphere.denoiser(guidance, y)
            return denoiser(z_s, level, denoiser.init())[0] - sphere.prior.denoise(z_s, level, jnp.zeros(sphere.points))

        return jax.jit(jax.vmap(added, (0, None, 0)))

    vectors = {name: vector(guidance) for name, guidance in GUIDANCES.items()}
    rows = []
    for level in levels:
        ys, coefficients, exact = [], [], []
        for _ in range(draws):
            w = np.sqrt(sphere.spectrum + level**2) * rng.normal(size=rank)
            shrink = sphere.spectrum / (sphere.spectrum + level**2)
            y = sphere.observe(rng)
            exact.append(sphere.update(sphere.synthesis @ (shrink * w), level**2 * shrink, y)[0])
            ys.append(y)
            coefficients.append(w)
        z_s = jnp.asarray(np.array(coefficients) @ sphere.synthesis.T)
        row: dict[str, Any] = {"noise level": level}
        for name, of in vectors.items():
            off = np.asarray(of(z_s, jnp.asarray(level), jnp.asarray(np.array(ys)))) - np.array(exact)
            relative = np.linalg.norm(off, axis=1) / np.linalg.norm(exact, axis=1)
            row[name] = float(np.sqrt(np.mean(relative**2)))
        rows.append(row)
    return rows


def wasserstein(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> float:
    """2-Wasserstein distance of two Gaussians, relative to the spread of the second; covariances may be singular."""
    values, vectors = np.linalg.eigh(covariance2)
    root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covariance1 @ root)
    squared = np.sum((mean1 - mean2) ** 2) + np.trace(covariance1) + np.trace(covariance2)
    squared -= 2.0 * np.sum(np.sqrt(np.maximum(cross, 0.0)))
    return float(np.sqrt(max(squared, 0.0) / np.trace(covariance2)))


def sampler_rows(sphere: Sphere) -> list[dict[str, Any]]:
    """Rows of table 3: error of the whole sampler."""
    y = sphere.observe(np.random.default_rng(2))
    mean, explained = sphere.update(np.zeros(sphere.points), sphere.spectrum, y)
    covariance = (sphere.synthesis * sphere.spectrum) @ sphere.synthesis.T - explained
    prior, rank = sphere.prior, len(sphere.spectrum)
    samplers = {
        "cheap recipe": ndda.Sampler(ndda.DPMSolverPP2M(), ndda.KarrasSchedule(lowest=2e-2, highest=80.0)),
        "Adams-Bashforth 3": ndda.Sampler(ndda.diffusion.AdamsBashforth(3), ndda.KarrasSchedule(32, 6.0, 2e-5, 80.0)),
    }
    rows = []
    for sampler_name, sampler in samplers.items():
        for guidance_name, guidance in GUIDANCES.items():
            denoiser = sphere.denoiser(guidance, y)
            levels = sampler.schedule.levels(prior.noise_range)

            def draw(w: jax.Array, sampler: Any = sampler, denoiser: Any = denoiser, top: Any = levels[0]) -> jax.Array:
                start = top * (jnp.asarray(sphere.synthesis) @ w)
                z, _ = sampler(jax.random.key(0), denoiser, prior.noise, prior.noise_range, start)
                return prior.latent_scale * z

            values = jax.lax.map(jax.jit(draw), jnp.concatenate([jnp.zeros((1, rank)), jnp.eye(rank)]), batch_size=16)
            center, columns = np.asarray(values[0]), np.asarray(values[1:] - values[:1]).T
            drawn = columns @ columns.T
            rows.append(
                {
                    "sampler": sampler_name,
                    "noise levels": len(levels),
                    "guidance": guidance_name,
                    "trace ratio": float(np.trace(drawn) / np.trace(covariance)),
                    "error": wasserstein(center, drawn, mean, covariance),
                }
            )
    prior_error = wasserstein(np.zeros(sphere.points), covariance + explained, mean, covariance)
    ratio = float(np.trace(covariance + explained) / np.trace(covariance))
    rows.append({"sampler": "none: the prior itself", "noise levels": 0, "guidance": "none", "trace ratio": ratio})
    rows[-1]["error"] = prior_error
    return rows


def cost_rows(num_latitudes: int, num_longitudes: int, channels: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of table 4: cost of products and draws."""
    noise = ndda.diffusion.SphericalNoise(num_latitudes, num_longitudes)
    shape, n = (num_latitudes, num_longitudes, channels), num_longitudes // 2
    v = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    # A or A^T applies a (latitude x l) matrix for each m to real and imaginary part, with two operations per element. A
    # real FFT of length N takes 2.5 N log2 N operations.
    legendre = 2 * 2 * n * num_latitudes * n * channels
    fourier = 2.5 * num_longitudes * np.log2(num_longitudes) * num_latitudes * channels
    entries: list[tuple[str, Callable[..., jax.Array], Any, int]] = [
        ("covariance_product", jax.jit(lambda noise, v: noise.covariance_product(v)), v, 2),
        ("sample", jax.jit(lambda noise, key: noise.sample(key, shape, v.dtype)), jax.random.key(1), 1),
    ]
    rows = []
    for name, fn, argument, transforms in entries:
        fn(noise, argument).block_until_ready()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            fn(noise, argument).block_until_ready()
            seconds.append(time.perf_counter() - start)
        flop = transforms * (legendre + fourier)
        rows.append(
            {
                "operation": name,
                "shape": " x ".join(map(str, shape)),
                "seconds": statistics.median(seconds),
                "GFLOP": flop / 1e9,
                "of a forward pass": flop / FORWARD_FLOP,
                "factor, MB": noise.factor.nbytes / 1e6,
            }
        )
    return rows


def main(
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the tables to.")] = None,
    num_latitudes: Annotated[int, typer.Option(help="Latitudes n of tables 2 and 3, with 2 (n - 1) longitudes.")] = 13,
    observations: Annotated[int, typer.Option(help="Number of observed grid points.")] = 40,
    draws: Annotated[int, typer.Option(help="Draws of table 2.")] = 20,
    cost_latitudes: Annotated[int, typer.Option(help="Latitudes of table 4 and of the largest grid in table 1.")] = 181,
    channels: Annotated[int, typer.Option(help="Channels of table 4.")] = 84,
    repeats: Annotated[int, typer.Option(help="Runs of table 4; the median is reported.")] = 9,
) -> None:
    """Print errors of guidance with C and with C = I on the sphere in double precision, and the cost of C in single."""
    console = Console()
    grids = [(size, 2 * (size - 1)) for size in (13, 19, cost_latitudes)]
    with jax.enable_x64(True):
        sphere = Sphere(num_latitudes, 2 * (num_latitudes - 1), observations)
        tables = {
            "spectrum": spectrum_rows(grids),
            "guidance": guidance_rows(sphere, [10.0, 3.0, 1.0, 0.3, 0.1, 0.02], draws),
            "samplers": sampler_rows(sphere),
        }
    tables["cost"] = cost_rows(*grids[-1], channels, repeats)
    where = f"{num_latitudes} x {2 * (num_latitudes - 1)}, {observations} observations"
    print_table(console, "Eigenvalues of C", tables["spectrum"], default=".3g")
    print_table(console, f"Relative error of the guidance vector, {where}", tables["guidance"], default=".3g")
    print_table(console, f"2-Wasserstein error of the whole sampler, {where}", tables["samplers"], default=".3g")
    print_table(console, "Cost on this CPU", tables["cost"], default=".3g")
    settings = {
        "num_latitudes": num_latitudes,
        "observations": observations,
        "draws": draws,
        "cost_latitudes": cost_latitudes,
        "channels": channels,
        "repeats": repeats,
    }
    write_json(out, settings, **tables)


if __name__ == "__main__":
    typer.run(main)
