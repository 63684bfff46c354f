"""How do outliers, wrong or correlated errors and a biased transition affect filters, and what helps against them?

The system is stochastic Lorenz-96 (d = 40, F = 8, step 0.1, noise variance 0.5). Every second site is observed with
error variance 0.1. The scenarios have the same truths and the same random errors:

- clean: nothing is wrong;
- gross errors: one observation in twenty has ten times the error;
- R too small, R too large: the filter assumes a quarter of the error variance, or four times the error variance;
- correlated errors: the errors of sites i and j have correlation exp(-|i - j| / 3);
- biased transition: the mean of the filter's transition is 0.3 too high at every site and step.

The filters are local FA-APF with Moment weights, a localized ensemble Kalman filter, and the free ensemble. Thresholds
and degrees of freedom are textbook values. Amounts of inflation and factors on R come from other truths than those
reported; `--tune` prints them.

    python examples/benchmarks/robustness.py --out robustness.json
    python examples/benchmarks/robustness.py --scenario "gross errors" --emulator --truths 3
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import equinox as eqx
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

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos import lorenz96_system as lorenz96

TUNING_SEED = 1
SITES = 40
AT = np.arange(0, SITES, 2)
VARIANCE = 0.1
GROSS_SHARE, GROSS_FACTOR = 0.05, 10.0
BIAS = 0.3
DISTANCE = np.minimum(np.abs(AT[:, None] - AT), SITES - np.abs(AT[:, None] - AT))
CORRELATION = np.exp(-DISTANCE / 3.0).astype(np.float32)
SAMPLER = ndda.Sampler(ndda.DPMSolverPP2M(), ndda.KarrasSchedule(13, rho=20.0, lowest=0.04))
"""Sampler of the emulator: fewer passes than the default, with the same error (docs/method.md, ring-64)."""

LIKELIHOODS: dict[str, Callable[[jax.Array, jax.Array], dist.Distribution]] = {
    "Normal": lambda seen, error: dist.Normal(seen, error).to_event(1),
    "StudentT(4)": lambda seen, error: dist.StudentT(4.0, seen, error).to_event(1),
    "Huber(1.5)": lambda seen, error: ndda.Huber(seen, error, 1.5).to_event(1),
    "correlated": lambda seen, error: dist.MultivariateNormal(seen, error**2 * CORRELATION),
}


class Treatment(NamedTuple):
    """Filter with its assumptions on observation errors, gross-error check and inflation.

    Attributes:
        filter: "FA-APF", "EnKF", "FA-APF global" or "EnKF global" (without a taper), or "free ensemble".
        likelihood: key of `LIKELIHOODS`.
        error_factor: factor on the error variance that the scenario gives to the filter.
        threshold: threshold of a gross-error check; None for no check.
        inflation: name of an inflation, "" for none.
        amount: amount of the inflation.
    """

    filter: str
    likelihood: str = "Normal"
    error_factor: float = 1.0
    threshold: float | None = None
    inflation: str = ""
    amount: float = 0.0

    def label(self) -> str:
        """Name of the treatment in the table."""
        parts = [self.filter]
        if self.likelihood != "Normal":
            parts.append(self.likelihood)
        if self.threshold is not None:
            parts.append(f"check {self.threshold:g}")
        if self.error_factor != 1.0:
            parts.append(f"given R x {self.error_factor:.4g}")
        if self.inflation:
            parts.append(f"{self.inflation}({self.amount:.4g})")
        return ", ".join(parts)


class Scenario(NamedTuple):
    """Difference between the filter's assumptions and the truth, and treatments to try.

    Attributes:
        given: error variance that the filter assumes, divided by the true one.
        gross: whether some errors are gross.
        correlated: whether errors are correlated.
        bias: bias of the filter's transition per step.
        treatments: filters to run.
    """

    given: float = 1.0
    gross: bool = False
    correlated: bool = False
    bias: float = 0.0
    treatments: tuple[Treatment, ...] = ()


FA, EK, FREE = Treatment("FA-APF"), Treatment("EnKF"), Treatment("free ensemble")
GLOBAL_FA, GLOBAL_EK = Treatment("FA-APF global"), Treatment("EnKF global")
# `--tune` found the factors on R and the amounts of inflation. For correlated errors it found a factor of 1; the factor
# of 2 is common practice.
SCENARIOS: dict[str, Scenario] = {
    "clean": Scenario(
        treatments=(
            FA, FA._replace(threshold=3.0), FA._replace(threshold=5.0), FA._replace(likelihood="StudentT(4)"),
            FA._replace(likelihood="Huber(1.5)"), EK, FREE,
        )
    ),
    "gross errors": Scenario(
        gross=True,
        treatments=(
            FA, FA._replace(threshold=3.0), FA._replace(threshold=5.0), FA._replace(likelihood="StudentT(4)"),
            FA._replace(likelihood="Huber(1.5)"), EK,
            EK._replace(threshold=3.0), EK._replace(threshold=5.0),
        ),
    ),
    "R too small": Scenario(
        given=0.25,
        treatments=(
            FA, FA._replace(error_factor=2.54), FA._replace(inflation="Multiplicative", amount=1.1), EK,
            EK._replace(error_factor=1.94), EK._replace(inflation="Multiplicative", amount=1.1),
        ),
    ),
    "R too large": Scenario(
        given=4.0, treatments=(FA, FA._replace(error_factor=0.457), EK, EK._replace(error_factor=0.368))
    ),
    "correlated errors": Scenario(
        correlated=True,
        treatments=(
            FA, FA._replace(error_factor=2.0), EK, EK._replace(error_factor=2.0), GLOBAL_FA,
            GLOBAL_FA._replace(likelihood="correlated"), GLOBAL_EK, GLOBAL_EK._replace(likelihood="correlated"),
        ),
    ),
    "biased transition": Scenario(
        bias=BIAS,
        treatments=(
            FA, FA._replace(inflation="Multiplicative", amount=1.075), FA._replace(inflation="Jitter", amount=0.312),
            EK, EK._replace(inflation="Multiplicative", amount=1.05), FREE,
        ),
    ),
}  # fmt: skip


class Shifted(ndda.DiffusionPrior):
    """Prior with the mean of another prior shifted by a constant."""

    prior: ndda.DiffusionPrior
    shift: float = eqx.field(static=True)
    noise: ndda.diffusion.Noise
    noise_range: tuple[float, float] = eqx.field(static=True)
    layout: ndda.Layout = eqx.field(static=True)
    conditioning_passes: int = eqx.field(static=True)

    def condition(self, state: Any, inputs: Any = None) -> Any:
        """Conditioning of the other prior."""
        return self.prior.condition(state, inputs)

    def denoise(self, z_s: Any, noise_level: Any, conditioning: Any) -> Any:
        """Denoiser of the other prior."""
        return self.prior.denoise(z_s, noise_level, conditioning)

    def location(self, conditioning: Any) -> Any:
        """Location of the other prior plus the shift."""
        return self.prior.location(conditioning) + self.shift

    def scale(self, conditioning: Any) -> Any:
        """Scale of the other prior."""
        return self.prior.scale(conditioning)


def program(likelihood: str, bias: float, emulator: bool) -> Callable[..., None]:
    """State-space model; the error is an argument of the program, so that another error does not compile again."""
    prior = ndda.load_prior("lorenz96", num_sites=SITES)
    moving = prior
    if bias and emulator:
        moving = Shifted(prior, bias, prior.noise, prior.noise_range, prior.layout, prior.conditioning_passes)

    def model(y: jax.Array, error: jax.Array) -> None:
        def step(x: jax.Array, y_t: jax.Array) -> tuple[jax.Array, None]:
            moved = dist.Normal(lorenz96.flow(x) + bias, lorenz96.NOISE_VARIANCE**0.5).to_event(1)
            x = numpyro.sample("x", ndda.DiffusionTransition(moving, x, sampler=SAMPLER) if emulator else moved)
            numpyro.sample("y", LIKELIHOODS[likelihood](x[::2], error), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x0", prior.climatology()), y)

    return model


def simulate(key: jax.Array, scenario: Scenario, cycles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw states, observations, and a mask of gross errors, after 50 steps of spin-up."""
    start_key, run_key, error_key, gross_key = jax.random.split(key, 4)
    climate = ndda.load_prior("lorenz96", num_sites=SITES).climatology()
    states = lorenz96.trajectory(run_key, climate.sample(start_key), 50 + cycles)[50:]
    error = jax.random.normal(error_key, (cycles, len(AT)))
    if scenario.correlated:
        error = error @ jnp.linalg.cholesky(CORRELATION).T
    gross = jax.random.bernoulli(gross_key, GROSS_SHARE if scenario.gross else 0.0, error.shape)
    y = states[:, ::2] + VARIANCE**0.5 * jnp.where(gross, GROSS_FACTOR, 1.0) * error
    return np.asarray(states), np.asarray(y), np.asarray(gross)


def algorithm(treatment: Treatment, bias: float, emulator: bool, amount: Any = None) -> ndda.filters.FilterAlgorithm:
    """Filter of a treatment; `amount` replaces its amount of inflation and may be traced."""
    model = program(treatment.likelihood, bias, emulator)
    amount = treatment.amount if amount is None else amount
    wide = treatment.filter.endswith("global")
    inflations = {"Multiplicative": ndda.Multiplicative, "Jitter": ndda.smc.Jitter}
    inflation = (inflations[treatment.inflation](amount),) if treatment.inflation else ()

    def taper(radius: float) -> ndda.Taper | None:
        return None if wide else ndda.Taper(radius, ndda.Ring(SITES), {"y": AT}, state=np.arange(SITES))

    # Use the settings of local_ancestors.py for linear observations.
    made: ndda.filters.FilterAlgorithm
    if treatment.filter == "free ensemble":
        made = ndda.Bootstrap(model)
    elif treatment.filter.startswith("EnKF"):
        made = ndda.EnKF(model, taper=taper(9.0), inflation=(ndda.ForecastMultiplicative(1.02), *inflation))
    else:
        probes = None if wide else 1
        weight = ndda.Moment(noise_level=10.0, probes=probes) if emulator else ndda.Moment()
        made = ndda.FAAPF(
            model,
            weight=weight,
            taper=taper(5.0),
            move=False,
            target_ess=0.2 if wide else 0.1,
            inflation=inflation,
            guidance=ndda.MMPS.cheap(),
        )
    return made if treatment.threshold is None else ndda.GrossErrorCheck(made, treatment.threshold)


@functools.cache
def runner(treatment: Treatment, bias: float, emulator: bool, particles: int) -> ndda.Filter:
    """Filter with settings, cached because a filter need not compile again for another error variance."""
    made = algorithm(treatment, bias, emulator)
    return ndda.Filter(made, num_particles=particles, progress_bar=False, keep_observed=False)


SCORES = ("RMSE", "spread/skill", "CRPS", "rejected, gross", "rejected, good", "passes")


def row_of(
    name: str, treatment: Treatment, emulator: bool, *, seed: int, truths: int, particles: int, cycles: int,
    spin_up: int,
) -> dict[str, Any]:  # fmt: skip
    """Row of the table: means over truths with standard errors; truths on which the filter diverges are lost."""
    scenario = SCENARIOS[name]
    run = runner(treatment._replace(error_factor=1.0), scenario.bias, emulator, particles)
    error = jnp.asarray((VARIANCE * scenario.given * treatment.error_factor) ** 0.5)
    scores: list[dict[str, float]] = []
    lost = 0
    for number in range(truths):
        truth_key, filter_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        states, y, gross = simulate(truth_key, scenario, cycles)
        try:
            run.run(filter_key, np.full_like(y, np.nan) if treatment.filter == "free ensemble" else y, error)
        except FloatingPointError:
            lost += 1
            continue
        x, truth = run.result.posterior["x"][0, :, spin_up:], states[spin_up:]
        rejected = run.result.rejected.get("y")
        scores.append(
            {
                "RMSE": ndda.diagnostics.rmse(x, truth),
                "spread/skill": ndda.diagnostics.spread_skill(x, truth),
                "CRPS": ndda.diagnostics.crps(x, truth),
                "rejected, gross": np.nan if rejected is None or not gross.any() else rejected[0][gross].mean(),
                "rejected, good": np.nan if rejected is None else rejected[0][~gross].mean(),
                "passes": run.result.mean_passes().network,
            }
        )
    row: dict[str, Any] = {"scenario": name, "name": treatment.label(), **treatment._asdict(), "lost": lost}
    for key in SCORES:
        row |= mean_and_error(key, [score[key] for score in scores])
    return row


COLUMNS = {
    "scenario": "", "name": "", "RMSE": ".3f", "spread/skill": ".2f", "CRPS": ".4f", "rejected, gross": ".0%",
    "rejected, good": ".2%", "passes": ".0f", "lost": "",
}  # fmt: skip


def estimated_error(name: str, treatment: Treatment, emulator: bool, particles: int, cycles: int) -> list[float]:
    """Estimates of R relative to the truth, each from a filter with the previous estimate (Desroziers et al. 2005)."""
    scenario = SCENARIOS[name]
    online = ndda.OnlineFilter(algorithm(treatment, scenario.bias, emulator), num_particles=particles)
    truth_key, filter_key = jax.random.split(jax.random.key(TUNING_SEED))
    _, y, _ = simulate(truth_key, scenario, cycles)
    nothing = np.full((1, y.shape[1]), np.nan, y.dtype)
    found = [scenario.given]
    for _ in range(4):
        error = jnp.asarray((VARIANCE * found[-1]) ** 0.5)
        state = online.init(filter_key, nothing, error)
        members: list[tuple[np.ndarray, np.ndarray]] = []
        for t in range(cycles):
            key = jax.random.fold_in(filter_key, t)
            _, forecast = online.step(jax.random.fold_in(key, 1), state, nothing, error)
            state, analysis = online.step(key, state, y[t : t + 1], error)
            both = (np.asarray(info.proposal.sites["posterior"]["x"][:, ::2]) for info in (forecast, analysis))
            members.append(tuple(both))  # type: ignore[arg-type]
        spin = cycles // 4
        background, analyses = (np.stack(x, axis=1)[:, spin:] for x in zip(*members, strict=True))
        estimate = ndda.diagnostics.error_variances(y[spin:], background, analyses, axis=1, block=5).observation
        found.append(float(np.clip(estimate.value / VARIANCE, 0.02, 50.0)))
    return found


def tune(console: Console, emulator: bool, particles: int, cycles: int, wanted: set[str]) -> None:
    """Print the amounts of the treatments of `SCENARIOS`, found on the tuning truths."""
    sizes = {"seed": TUNING_SEED, "truths": 2, "particles": particles, "cycles": cycles, "spin_up": cycles // 4}
    for name in ("R too small", "R too large"):
        if name in wanted:
            for treatment in (FA, EK):
                found = estimated_error(name, treatment, emulator, particles, cycles)
                factors = ", ".join(f"{r / SCENARIOS[name].given:.3f}" for r in found)
                console.print(f"{name}, {treatment.filter}: estimates of R relative to the given R: {factors}")
    for name, treatment, inflation, between in (
        ("R too small", FA, "Multiplicative", (1.0, 1.2)), ("R too small", EK, "Multiplicative", (1.0, 1.2)),
        ("biased transition", FA, "Multiplicative", (1.0, 1.2)), ("biased transition", FA, "Jitter", (0.0, 1.0)),
        ("biased transition", EK, "Multiplicative", (1.0, 1.2)),
    ):  # fmt: skip
        if name not in wanted:
            continue
        scenario = SCENARIOS[name]
        truth_key, filter_key = jax.random.split(jax.random.key(TUNING_SEED))
        _, y, _ = simulate(truth_key, scenario, cycles)

        def make(amount: Any, inflation: str = inflation, start: Treatment = treatment, of: Scenario = scenario) -> Any:
            return algorithm(start._replace(inflation=inflation), of.bias, emulator, amount)

        error = jnp.asarray((VARIANCE * scenario.given) ** 0.5)
        try:
            found_amount = ndda.inference.tune_spread(
                make, filter_key, y, error, between=between, num_particles=particles, discard=cycles // 4, max_runs=6
            )
            amount = f"amount {found_amount.amount:.3f}, ratio {found_amount.ratio}"
            console.print(f"{name}, {treatment.filter}, {inflation}: {amount}")
        except (ValueError, FloatingPointError) as problem:
            console.print(f"{name}, {treatment.filter}, {inflation}: {problem}")
    if "correlated errors" in wanted:
        trials = [of._replace(error_factor=f) for of in (FA, EK) for f in (1.5, 2.0, 3.0, 4.0)]
        rows = [row_of("correlated errors", of, emulator, **sizes) for of in (FA, EK, *trials)]
        print_table(console, "correlated errors, tuning truths", rows, COLUMNS, without_error=["passes"])


def main(
    scenario: Annotated[
        list[str] | None, typer.Option(help="Scenario to run; may be repeated; all by default.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Filter to run, by its name in the table; may be repeated.")
    ] = None,
    emulator: Annotated[bool, typer.Option(help="Use the transition of the emulator instead of the true one.")] = False,
    truths: Annotated[int, typer.Option(min=1, help="Number of truths.")] = 6,
    particles: Annotated[int, typer.Option(min=2, help="Particles of each filter.")] = 128,
    cycles: Annotated[int, typer.Option(min=2, help="Filter steps on each truth.")] = 80,
    spin_up: Annotated[int, typer.Option(min=0, help="Filter steps at the start that are not scored.")] = 20,
    tuning: Annotated[bool, typer.Option("--tune", help="Find amounts on the tuning truths instead.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the truths reported.")] = 0,
    out: Annotated[Path | None, typer.Option(callback=json_file, help="JSON file to write the table to.")] = None,
) -> None:
    """Print scores with outliers, wrong or correlated errors, and a biased transition."""
    console = Console(width=150)
    if unknown := sorted(set(scenario or ()) - set(SCENARIOS)):
        raise typer.BadParameter(f"no scenario called {', '.join(unknown)}; give one of {', '.join(SCENARIOS)}.")
    if not spin_up < cycles:
        raise typer.BadParameter(f"a spin-up of {spin_up} of {cycles} cycles leaves none to score; give fewer.")
    if tuning:
        tune(console, emulator, particles, cycles, set(scenario or SCENARIOS))
        return
    work = [
        (name, treatment)
        for name in scenario or SCENARIOS
        for treatment in SCENARIOS[name].treatments
        if not only or treatment.label() in only
    ]
    if unknown := sorted(set(only or ()) - {treatment.label() for _, treatment in work}):
        raise typer.BadParameter(f"no filter called {', '.join(map(repr, unknown))} in these scenarios.")
    sizes = {"truths": truths, "particles": particles, "cycles": cycles, "spin_up": spin_up}
    rows = []
    for name, treatment in track(work, "filtering", console=console, transient=True):
        rows.append(row_of(name, treatment, emulator, seed=seed, **sizes))
        # Write after every row, so that an interrupted run keeps what it has.
        write_json(out, {**sizes, "emulator": emulator, "seed": seed}, rows=rows)
    transition = "transition of the emulator" if emulator else "true transition"
    title = f"Lorenz-96, {transition}, N = {particles}, {truths} truths of {cycles} cycles; mean ± standard error"
    print_table(console, title, rows, COLUMNS, group="scenario", without_error=["passes"])


if __name__ == "__main__":
    typer.run(main)
