"""What it costs to take the noise of the sphere for white noise, and what it costs not to.

The prior is exact and Gaussian on a latitude-longitude grid with both poles: isotropic on the sphere, unit variance,
power (1 + (l / 5)^2)^-2 at total wavenumber l; 40 grid points observed with error 0.1. The diffusion's noise is
`SphericalNoise`, as in GenCast, and guidance takes its covariance C, or takes C = I as the published method does. Four
tables:

1. C on three grids: its rank, and its largest and smallest non-zero eigenvalue.
2. The guidance vector D_y - D at several noise levels: relative error against the closed form, root mean square over
   draws of truth, observations and z_s. C = I with a solve of the system as it is, which is what the published method
   aims at, and with `DirectSolve`, which symmetrizes the system (it is symmetric for the right C only).
3. The whole sampler: 2-Wasserstein distance between its Gaussian and the exact posterior, over sqrt(trace of the
   posterior covariance). No Monte Carlo: with exact solves a sample is an affine function of its noise.
4. Seconds of one product with C and of one draw on this machine's CPU, float32, and floating-point operations counted
   on paper, against one forward pass of GenCast's 1 degree Mini model (1.6 TFLOP, traced).

    python examples/benchmarks/spherical_noise.py --out spherical_noise.json
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import LinearSolver, PriorDenoiser, Product, Solution, relative_residual

FORWARD_FLOP = 1.6e12


class PlainSolve(LinearSolver):
    """Solves the system as it is, dense, with no symmetry assumed and no safeguard: the limit of BiCGStab or GMRES."""

    def init(self, size: int, dtype: Any) -> Any:
        """No warm start."""
        return ()

    def __call__(self, product: Product, rhs: jax.Array, warm_start: Any) -> tuple[Solution, Any]:
        """One product for each observation."""
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
    """A of C = A A^T as a matrix, shape (points, rank), and the total wavenumber of each of its columns."""
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
    """The problem: prior, likelihood, and everything exact in coefficients w of z = A w."""

    def __init__(self, num_latitudes: int, num_longitudes: int, observations: int, error: float = 0.1) -> None:
        self.noise = ndda.diffusion.SphericalNoise(num_latitudes, num_longitudes)
        self.synthesis, degrees = harmonics(self.noise)
        points = num_latitudes * num_longitudes
        spectrum = (1.0 + (degrees / 5.0) ** 2) ** -2.0
        # The prior's own latent has unit mean variance: with a state of unit variance it is the state.
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
        """Observations of a truth drawn from the prior."""
        truth = self.synthesis @ (np.sqrt(self.spectrum) * rng.normal(size=len(self.spectrum)))
        return truth[self.observed] + self.error * rng.normal(size=len(self.observed))

    def denoiser(self, guidance: ndda.MMPS, y: jax.Array) -> Any:
        """The posterior's denoiser, as guided."""
        scale, seen = jnp.full(len(self.observed), self.error), jnp.ones(len(self.observed), bool)
        likelihood = ndda.observation.GaussianLikelihood(
            lambda x: [ndda.observation.GaussianObservation(x[self.observed], scale, jnp.asarray(y), seen)]
        )
        return guidance(PriorDenoiser(self.prior, self.prior.condition(jnp.zeros(self.points))), likelihood)

    def update(self, mean: np.ndarray, variances: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(gain (y - H mean), gain H V) for a Gaussian of this mean and V = A diag(variances) A^T."""
        covariance = (self.synthesis * variances) @ self.synthesis.T
        seen = covariance[self.observed]
        system = seen[:, self.observed] + self.error**2 * np.eye(len(self.observed))
        gain = np.linalg.solve(system, seen).T
        return gain @ (y - mean[self.observed]), gain @ seen


def spectrum_rows(grids: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Table 1. C is block diagonal in zonal wavenumbers, so that no matrix is large."""
    rows = []
    for num_latitudes, num_longitudes in grids:
        noise = ndda.diffusion.SphericalNoise(num_latitudes, num_longitudes)
        values: list[np.ndarray] = []
        for m, block in enumerate(np.asarray(noise.factor, np.float64)):
            squared = np.linalg.svd(block[:, m:], compute_uv=False) ** 2
            # The sum of cos^2 over longitudes; sine and cosine have the same.
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
    """Table 2."""
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
    """Between two Gaussians, over the square root of the second's trace; either covariance may be singular."""
    values, vectors = np.linalg.eigh(covariance2)
    root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covariance1 @ root)
    squared = np.sum((mean1 - mean2) ** 2) + np.trace(covariance1) + np.trace(covariance2)
    squared -= 2.0 * np.sum(np.sqrt(np.maximum(cross, 0.0)))
    return float(np.sqrt(max(squared, 0.0) / np.trace(covariance2)))


def sampler_rows(sphere: Sphere) -> list[dict[str, Any]]:
    """Table 3."""
    y = sphere.observe(np.random.default_rng(2))
    mean, explained = sphere.update(np.zeros(sphere.points), sphere.spectrum, y)
    covariance = (sphere.synthesis * sphere.spectrum) @ sphere.synthesis.T - explained
    prior, rank = sphere.prior, len(sphere.spectrum)
    samplers = {
        "library default": ndda.Sampler(schedule=ndda.KarrasSchedule(lowest=2e-2, highest=80.0)),
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
    """Table 4."""
    noise = ndda.diffusion.SphericalNoise(num_latitudes, num_longitudes)
    shape, n = (num_latitudes, num_longitudes, channels), num_longitudes // 2
    v = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    # A or A^T: a (latitude x l) matrix for each m, on two parts, two operations each; and 2.5 N log2 N for a real FFT.
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


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """One table on the terminal."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def main(
    out: Annotated[Path | None, typer.Option(help="Write the tables to this JSON file.")] = None,
    num_latitudes: Annotated[int, typer.Option(help="Latitudes of tables 2 and 3; longitudes are 2 (n - 1).")] = 13,
    observations: Annotated[int, typer.Option(help="Observed grid points.")] = 40,
    draws: Annotated[int, typer.Option(help="Draws of table 2.")] = 20,
    cost_latitudes: Annotated[int, typer.Option(help="Latitudes of table 4, and of table 1's largest grid.")] = 181,
    channels: Annotated[int, typer.Option(help="Channels of table 4.")] = 84,
    repeats: Annotated[int, typer.Option(help="Runs of table 4, of which the median is given.")] = 9,
) -> None:
    """Error of guidance with C and with C = I on the sphere, in double precision; cost of C, in single."""
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
    show(console, "Eigenvalues of C", tables["spectrum"])
    show(console, f"Relative error of the guidance vector, {where}", tables["guidance"])
    show(console, f"Whole sampler, 2-Wasserstein error, {where}", tables["samplers"])
    show(console, "Cost on this CPU", tables["cost"])
    if out is not None:
        settings = {
            "num_latitudes": num_latitudes,
            "observations": observations,
            "draws": draws,
            "cost_latitudes": cost_latitudes,
            "channels": channels,
            "repeats": repeats,
        }
        out.write_text(json.dumps({"version": ndda.__version__, "settings": settings, **tables}, indent=2) + "\n")
        console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
