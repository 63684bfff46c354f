"""What do outliers, wrong errors, correlated errors and a biased transition do to the scores, and what helps?

Stochastic Lorenz-96 (d = 40, F = 8, step 0.1, noise variance 0.5), every second site observed with error variance 0.1.
What is wrong (the scenario), on the same truths and with the same random errors in all of them:

- clean: nothing;
- gross errors: one observation in twenty has ten times the error;
- R too small, R too large: the filter is given a quarter of the error variance, or four times it;
- correlated errors: correlation exp(-|i - j| / 3) between sites i and j;
- biased transition: the filter's has a mean that is 0.3 too high at every site and step.

Filters: localized FA-APF with Moment weights, the localized ensemble Kalman filter, the free ensemble. Thresholds and
degrees of freedom are textbook values; amounts of inflation, factors on R and estimates of R are from other truths than
those reported, by `--tune`.

    python examples/benchmarks/robustness.py --out robustness.json
    python examples/benchmarks/robustness.py --scenario "gross errors" --emulator --truths 3
"""

from __future__ import annotations

import functools
import json
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
from rich.console import Console
from rich.progress import track
from rich.table import Table

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
SAMPLER = ndda.Sampler(schedule=ndda.KarrasSchedule(13, rho=20.0, lowest=0.04))
"""Of the emulator's draws: fewer passes than the default, for its error (docs/method.md, ring-64)."""

LIKELIHOODS: dict[str, Callable[[jax.Array, jax.Array], dist.Distribution]] = {
    "Normal": lambda seen, error: dist.Normal(seen, error).to_event(1),
    "StudentT(4)": lambda seen, error: dist.StudentT(4.0, seen, error).to_event(1),
    "Huber(1.5)": lambda seen, error: ndda.Huber(seen, error, 1.5).to_event(1),
    "correlated": lambda seen, error: dist.MultivariateNormal(seen, error**2 * CORRELATION),
}


class Treatment(NamedTuple):
    """A filter, and what it is told.

    Attributes:
        filter: "FA-APF", "EnKF", either of them " global" (without a taper), or "free ensemble".
        likelihood: one of `LIKELIHOODS`.
        error_factor: the variance that the filter is given, over that of the scenario's.
        threshold: of a gross-error check; None for none.
        inflation: of the spread.
    """

    filter: str
    likelihood: str = "Normal"
    error_factor: float = 1.0
    threshold: float | None = None
    inflation: str = ""
    amount: float = 0.0

    def label(self) -> str:
        """For the table."""
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
    """What is wrong.

    Attributes:
        given: the variance that the filter is given, over the true one.
        gross: whether some errors are gross.
        correlated: whether errors are.
        bias: of the filter's transition.
        treatments: what is tried.
    """

    given: float = 1.0
    gross: bool = False
    correlated: bool = False
    bias: float = 0.0
    treatments: tuple[Treatment, ...] = ()


FA, EK, FREE = Treatment("FA-APF"), Treatment("EnKF"), Treatment("free ensemble")
GLOBAL_FA, GLOBAL_EK = Treatment("FA-APF global"), Treatment("EnKF global")
# Factors on R and amounts of inflation are those that `--tune` found; for correlated errors it found 1 best, and 2 is what
# is usual.
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
            FA, FA._replace(inflation="Multiplicative", amount=1.075), FA._replace(inflation="Jitter", amount=0.312), EK,
            EK._replace(inflation="Multiplicative", amount=1.05), FREE,
        ),
    ),
}  # fmt: skip


class Shifted(ndda.DiffusionPrior):
    """Another prior with a mean that is off by a number."""

    prior: ndda.DiffusionPrior
    shift: float = eqx.field(static=True)
    noise: ndda.diffusion.Noise
    noise_range: tuple[float, float] = eqx.field(static=True)
    layout: ndda.Layout = eqx.field(static=True)
    conditioning_passes: int = eqx.field(static=True)

    def condition(self, state: Any, inputs: Any = None) -> Any:
        """The other one's."""
        return self.prior.condition(state, inputs)

    def denoise(self, z_s: Any, noise_level: Any, conditioning: Any) -> Any:
        """The other one's."""
        return self.prior.denoise(z_s, noise_level, conditioning)

    def location(self, conditioning: Any) -> Any:
        """Shifted."""
        return self.prior.location(conditioning) + self.shift

    def scale(self, conditioning: Any) -> Any:
        """The other one's."""
        return self.prior.scale(conditioning)


def program(likelihood: str, bias: float, emulator: bool) -> Callable[..., None]:
    """The state-space model; the standard deviation of the error is an argument, so that it compiles nothing."""
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
    """(states, observations, where they are grossly wrong) after 50 steps of spin-up."""
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
    """The filter; `amount` may be traced."""
    model = program(treatment.likelihood, bias, emulator)
    amount = treatment.amount if amount is None else amount
    wide = treatment.filter.endswith("global")
    inflations = {"Multiplicative": ndda.Multiplicative, "Jitter": ndda.smc.Jitter}
    inflation = (inflations[treatment.inflation](amount),) if treatment.inflation else ()

    def taper(radius: float) -> ndda.Taper | None:
        return None if wide else ndda.Taper(radius, ndda.Ring(SITES), {"y": AT}, state=np.arange(SITES))

    # The settings of local_ancestors.py for this case.
    made: ndda.filters.FilterAlgorithm
    if treatment.filter == "free ensemble":
        made = ndda.Bootstrap(model)
    elif treatment.filter.startswith("EnKF"):
        made = ndda.EnKF(model, taper=taper(9.0), tempering=1.02, inflation=inflation)
    else:
        probes = None if wide else 1
        weight = ndda.Moment(noise_level=10.0, probes=probes) if emulator else ndda.Moment()
        made = ndda.FAAPF(model, weight=weight, taper=taper(5.0), target_ess=0.2 if wide else 0.1, inflation=inflation)
    return made if treatment.threshold is None else ndda.GrossErrorCheck(made, treatment.threshold)


@functools.cache
def runner(treatment: Treatment, bias: float, emulator: bool, particles: int) -> ndda.Filter:
    """Kept: the error that a filter is given does not compile it again."""
    made = algorithm(treatment, bias, emulator)
    return ndda.Filter(made, num_particles=particles, progress_bar=False, keep_observed=False)


SCORES = ("RMSE", "spread/skill", "CRPS", "rejected, gross", "rejected, good", "passes")


def row_of(
    name: str, treatment: Treatment, emulator: bool, *, seed: int, truths: int, particles: int, cycles: int,
    spin_up: int,
) -> dict[str, Any]:  # fmt: skip
    """Means over truths with their standard errors."""
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
                "passes": float(sum(v.mean() for v in run.result.network_passes.values())),
            }
        )
    row: dict[str, Any] = {"scenario": name, "name": treatment.label(), **treatment._asdict(), "lost": lost}
    for key in SCORES:
        values = np.array([score[key] for score in scores])
        known = len(values) > 0 and not np.isnan(values).any()
        row[key] = float(values.mean()) if known else None
        row[f"{key} SE"] = float(values.std(ddof=1) / np.sqrt(len(values))) if known and len(values) > 1 else None
    return row


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for name in ("scenario", "filter", *SCORES, "lost"):
        table.add_column(name, no_wrap=True)
    before = None
    for row in rows:

        def cell(key: str, form: str, row: dict[str, Any] = row) -> str:
            value, se = row[key], row[f"{key} SE"]
            if value is None:
                return "-"
            return f"{value:{form}}" + (f" ± {se:{form}}" if se is not None else "")

        shares = [cell("rejected, gross", ".0%"), cell("rejected, good", ".2%")]
        table.add_row(
            "" if row["scenario"] == before else row["scenario"], row["name"], cell("RMSE", ".3f"),
            cell("spread/skill", ".2f"), cell("CRPS", ".4f"), *shares, f"{row['passes'] or 0:.0f}", str(row["lost"]),
        )  # fmt: skip
        before = row["scenario"]
    console.print(table)


def estimated_error(name: str, treatment: Treatment, emulator: bool, particles: int, cycles: int) -> list[float]:
    """Estimates of R over the true one, each from a filter that was given the one before (Desroziers et al. 2005)."""
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
    """Print what the treatments of `SCENARIOS` are made of, from other truths."""
    sizes = {"seed": TUNING_SEED, "truths": 2, "particles": particles, "cycles": cycles, "spin_up": cycles // 4}
    for name in ("R too small", "R too large"):
        if name in wanted:
            for treatment in (FA, EK):
                found = estimated_error(name, treatment, emulator, particles, cycles)
                factors = ", ".join(f"{r / SCENARIOS[name].given:.3f}" for r in found)
                console.print(f"{name}, {treatment.filter}: estimates of R over the given one: {factors}")
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
            console.print(f"{name}, {treatment.filter}, {inflation}: {found_amount.amount:.3f}, {found_amount.ratio}")
        except (ValueError, FloatingPointError) as problem:
            console.print(f"{name}, {treatment.filter}, {inflation}: {problem}")
    if "correlated errors" in wanted:
        trials = [of._replace(error_factor=f) for of in (FA, EK) for f in (1.5, 2.0, 3.0, 4.0)]
        rows = [row_of("correlated errors", of, emulator, **sizes) for of in (FA, EK, *trials)]
        show(console, "correlated errors, tuning truths", rows)


def main(
    scenario: Annotated[list[str] | None, typer.Option(help="Only this scenario; may be repeated.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this filter, as the table names it.")] = None,
    emulator: Annotated[bool, typer.Option(help="The learned transition, not the true one.")] = False,
    truths: Annotated[int, typer.Option(min=1, help="Truths.")] = 6,
    particles: Annotated[int, typer.Option(min=2, help="Particles of each filter.")] = 128,
    cycles: Annotated[int, typer.Option(min=2, help="Cycles of each truth.")] = 80,
    spin_up: Annotated[int, typer.Option(min=0, help="Cycles that are not scored.")] = 20,
    tuning: Annotated[bool, typer.Option("--tune", help="Print amounts found on other truths instead.")] = False,
    seed: Annotated[int, typer.Option(help="Of the truths reported.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the table to this JSON file.")] = None,
) -> None:
    """Outliers, wrong and correlated errors, and a biased transition."""
    console = Console(width=150)
    if unknown := sorted(set(scenario or ()) - set(SCENARIOS)):
        raise typer.BadParameter(f"no scenario called {', '.join(unknown)}; there are {', '.join(SCENARIOS)}.")
    if not spin_up < cycles:
        raise typer.BadParameter(f"spin-up of {spin_up} of {cycles} cycles leaves none to score.")
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
        raise typer.BadParameter(f"no filter called {', '.join(map(repr, unknown))} there.")
    sizes = {"truths": truths, "particles": particles, "cycles": cycles, "spin_up": spin_up}
    rows = []
    for name, treatment in track(work, "filtering", console=console, transient=True):
        rows.append(row_of(name, treatment, emulator, seed=seed, **sizes))
        if out is not None:
            settings = {**sizes, "emulator": emulator, "seed": seed}
            found = {"version": ndda.__version__, "settings": settings, "rows": rows}
            out.write_text(json.dumps(found, indent=1) + "\n")
    transition = "the emulator's transition" if emulator else "the true transition"
    show(console, f"Lorenz-96, {transition}, N = {particles}, {truths} truths of {cycles} cycles", rows)


if __name__ == "__main__":
    typer.run(main)
