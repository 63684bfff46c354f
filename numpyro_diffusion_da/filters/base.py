"""From a NumPyro program to a filter kernel: what `ParticleFilter` runs.

Each class here takes a program and its own settings, and builds the kernel of the `smc` module of its name, giving it
the program's transition and likelihood. The kernels' "observation" is `TimeInputs`: the scan's slice at one time.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.guidance import MMPS, Guidance
from numpyro_diffusion_da.diffusion.linear_solve import DirectSolve
from numpyro_diffusion_da.diffusion.sampler import Sampler, SDEDPMSolverPP2M
from numpyro_diffusion_da.diffusion.schedule import KarrasSchedule
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc import bootstrap, enkf, fa_apf, guided_pf
from numpyro_diffusion_da.smc.base import (
    Info,
    Kernel,
    Resampling,
    check_target_ess,
    map_particles,
    num_particles,
    particle_keys,
)
from numpyro_diffusion_da.smc.ensemble_update import EnsembleUpdate, PerturbedObservations
from numpyro_diffusion_da.smc.inflation import Multiplicative, SpreadRepair, check_repairs
from numpyro_diffusion_da.smc.local_ancestors import LocalAncestors
from numpyro_diffusion_da.smc.localization import PlacedTaper, Taper
from numpyro_diffusion_da.smc.tempering import Inflation, Tempering
from numpyro_diffusion_da.transition.base import DrawRecord, GaussianStep
from numpyro_diffusion_da.transition.weights import Dirac, Equal, Moment, Weight


class Proposal(NamedTuple):
    """What a filter keeps of each new particle.

    Attributes:
        draw: network passes and solver residual of the draw.
        sites: values by group and site, see `StateSpaceModel.record`.
    """

    draw: DrawRecord
    sites: dict[str, dict[str, Array]]


class Algorithm(abc.ABC):
    """A program with the settings of one filter."""

    model: Callable[..., Any]
    needs_gaussian: ClassVar[bool] = True
    """Whether the transition must be a diffusion or Gaussian, and the likelihood one that can guide."""
    needs_gaussian_errors: ClassVar[bool] = False
    """Whether all observed sites must be Gaussian."""
    target_ess: float = 0.0
    """Effective sample size that inflation aims at, as a fraction of the particles; 0 for no inflation."""
    sampler: Sampler | None = None
    """Reverse diffusion of the filter's draws; None for the transition's own."""

    @abc.abstractmethod
    def kernel(self, program: StateSpaceModel, batch_size: int) -> Kernel:
        """The program's kernel: (rng_key, state, TimeInputs) -> (State, Info), `info.proposal` being a `Proposal`."""

    @abc.abstractmethod
    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """The settings in plain values, defaults resolved for the program, for the attributes of a result."""

    def has_evidence(self) -> bool:
        """Whether the filter estimates log p(y) at all."""
        return True

    def weight_caveats(self, program: StateSpaceModel) -> list[str]:
        """Why the weights are not exact, so that exp(log-evidence) is no unbiased estimate; inflation apart."""
        return []

    def evidence_caveats(self, program: StateSpaceModel) -> list[str]:
        """Why exp(log-evidence) is no unbiased estimate of p(y); empty where it is one."""
        inflated = f"weights are inflated (target_ess={self.target_ess:g})"
        return self.weight_caveats(program) + ([inflated] if self.target_ess > 0 else [])

    def parents(self, program: StateSpaceModel, ancestors: Array, values: Array) -> Array:
        """What particles come from, of values that each has, leading axis N."""
        return values[ancestors]

    def forecasts(
        self, program: StateSpaceModel, batch_size: int = 0
    ) -> Callable[[PRNGKeyArray, PyTree, TimeInputs], tuple[Array, DrawRecord]]:
        """The next state as the filter takes it to be, one draw from each particle that has not seen the observation.

        Args:
            program: the program.
            batch_size: particles moved at a time; 0 for all at once.

        Returns:
            (rng_key, particles, inputs) -> (N states, records of their draws), with a leading axis of N.
        """

        def forecasts(rng_key: PRNGKeyArray, particles: PyTree, inputs: TimeInputs) -> tuple[Array, DrawRecord]:
            draw = map_particles(lambda key, carry: program.draw(key, carry, inputs, self.sampler), batch_size)
            x, record = draw(particle_keys(rng_key, num_particles(particles)), particles)
            return self._as_background(x), record

        return forecasts

    def background(
        self, program: StateSpaceModel, batch_size: int = 0
    ) -> Callable[[PRNGKeyArray, PyTree, TimeInputs], dict[str, dict[str, Array]]]:
        """What is seen in `forecasts`, observations with their errors among it.

        Args:
            program: the program.
            batch_size: particles moved at a time; 0 for all at once.

        Returns:
            (rng_key, particles, inputs) -> `StateSpaceModel.record` of N forecasts, with a leading axis of N.
        """

        def background(rng_key: PRNGKeyArray, particles: PyTree, inputs: TimeInputs) -> dict[str, dict[str, Array]]:
            draw_key, record_key = jax.random.split(rng_key)
            record = map_particles(lambda key, x, carry: program.record(key, x, carry, inputs), batch_size)
            x, _ = self.forecasts(program, batch_size)(draw_key, particles, inputs)
            return record(particle_keys(record_key, num_particles(particles)), x, particles)

        return background

    def _as_background(self, forecast: Array) -> Array:
        return forecast

    def passes(self, info: Info) -> NetworkPasses:
        """Network passes per particle of one step, averaged over particles."""
        total = info.proposal.draw.passes
        for record in (info.weighing, info.forecast):
            if record != ():
                total = jax.tree.map(jnp.add, total, record.passes)
        return jax.tree.map(lambda n: jnp.mean(n.astype(float)), total)


def _in_full(value: Any) -> str:
    """A module with all its settings: its repr would leave out those at their defaults, which may change."""
    if not isinstance(value, eqx.Module):
        return repr(value)
    settings = ", ".join(f"{f.name}={_in_full(getattr(value, f.name))}" for f in dataclasses.fields(value) if f.init)
    return f"{type(value).__name__}({settings})"


def _sampler_settings(sampler: Sampler | None, program: StateSpaceModel) -> str:
    transition = program.diffusion()
    if transition is None:
        return "closed form"
    return _in_full(transition.sampler if sampler is None else sampler)


def place_taper(taper: Taper, program: StateSpaceModel) -> PlacedTaper:
    """The taper at the places of a program's values, those of the state by default from its prior's layout.

    Raises:
        ValueError: positions that do not fit the program, see `Taper.place`.
    """
    diffusion = program.diffusion()
    return taper.place(*program.shapes(), layout=None if diffusion is None else diffusion.prior.layout)


def _taper_settings(taper: Taper | None) -> str:
    return "none" if taper is None else repr(taper)


def _repair_settings(repairs: Sequence[SpreadRepair]) -> str:
    return ", ".join(_in_full(repair) for repair in repairs) or "none"


def _resampling_settings(resampling: Resampling | None) -> str:
    return "systematic" if resampling is None else getattr(resampling, "__name__", repr(resampling))


@dataclasses.dataclass(frozen=True, eq=False)
class FAAPF(Algorithm):
    """The fully adapted auxiliary particle filter (`smc.fa_apf`).

    Args:
        model: a NumPyro program with one `scan`, whose transition is a `DiffusionTransition`, `Normal` or
            `MultivariateNormal`. Observed sites may have any distribution of independent elements, or a
            `MultivariateNormal`; NaN is missing.
        weight: estimate of log p(y | c). By default `Dirac()` for a diffusion, and the exact `Moment()` for a
            transition in closed form.
        target_ess: effective sample size that inflation aims at, as a fraction of the particles; 0 for none.
        guidance: how the score is guided by the observations.
        sampler: reverse diffusion of the guided draw; by default the transition's own.
        resampling: from `blackjax.smc.resampling`; systematic by default.
        taper: localised ancestors (`smc.local_ancestors`): each block of the state selects by the observations near it,
            `Taper(radius, distance, observations)`. None for a selection of whole particles. There is no evidence then.
        block_radius: how far the places of one block may be from its centre, in the unit of the taper's distance; 0 for
            each place by itself.
        spread_repair: what is done to the new particles' states, in this order: `RTPS(0.3)`, `Multiplicative(1.05)`,
            `Jitter(0.1)`. Nothing by default. RTPS relaxes to the spread of forecasts, for which each particle makes
            one more draw, unguided.
        inflation: of the weights, where their effective sample size is below its target: `Tempering()` or
            `ObservationInflation()` (`smc.inflation`), which are one with Dirac weights.

    Raises:
        TypeError: what is no sequence of repairs, or no inflation of weights.
        ValueError: target_ess outside [0, 1), or a negative block_radius, or one without a taper; `RTPP`, which pairs
            members.
    """

    model: Callable[..., Any]
    weight: Weight | None = None
    target_ess: float = 0.2
    guidance: Guidance = dataclasses.field(default_factory=MMPS)
    sampler: Sampler | None = None
    resampling: Resampling | None = None
    taper: Taper | None = None
    block_radius: float = 0.0
    spread_repair: Sequence[SpreadRepair] = ()
    inflation: Inflation = dataclasses.field(default_factory=Tempering)

    def __post_init__(self) -> None:
        check_target_ess(self.target_ess)
        check_repairs(self.spread_repair, "FAAPF", paired=False)
        if not isinstance(self.inflation, Inflation):
            raise TypeError(
                f"FAAPF got inflation={self.inflation!r}; give ndda.Tempering() or ndda.ObservationInflation(), which "
                "act on its weights (a factor on particles is spread_repair=(ndda.Multiplicative(1.05),))."
            )
        if not self.block_radius >= 0.0:
            raise ValueError(f"FAAPF got block_radius={self.block_radius}; give 0 or more.")
        if self.block_radius and self.taper is None:
            raise ValueError(f"FAAPF got block_radius={self.block_radius} and no taper; give both, or neither.")

    def has_evidence(self) -> bool:
        """With weights of whole particles that differ."""
        return not isinstance(self.weight, Equal) and self.taper is None

    def weight_caveats(self, program: StateSpaceModel) -> list[str]:
        """What the weight says, and that repaired particles are not those of the program."""
        closed_form = program.diffusion() is None
        caveats = self._weight(closed_form).caveats(closed_form, program.observes_linearly())
        repairs = _repair_settings(self.spread_repair)
        return caveats + ([f"the particles' spread is repaired: {repairs}"] if self.spread_repair else [])

    def _weight(self, closed_form: bool) -> Weight:
        if self.weight is not None:
            return self.weight
        return Moment() if closed_form else Dirac()

    def kernel(self, program: StateSpaceModel, batch_size: int = 0) -> Kernel:
        """The FA-APF kernel of the program.

        Raises:
            ValueError: a taper whose positions do not fit the program; a site whose errors are to be inflated and
                cannot be (naming it).
        """
        local = self._local(program)
        if self.inflation.asks_inflatable and not isinstance(self.weight, Equal):
            self._check_errors(program)

        def log_predictive(carry: PyTree, inputs: TimeInputs) -> tuple[Any, PyTree]:
            step = program.transition(carry, inputs, self.sampler)
            weight = self._weight(closed_form=isinstance(step, GaussianStep))
            weigh: Callable[..., tuple[Any, PyTree]]
            if self.inflation.asks_inflatable:
                weigh = weight.inflatable if local is None else weight.inflatable_pointwise
            else:
                weigh = weight if local is None else weight.pointwise
            return weigh(step, program.likelihood(carry, inputs))

        def draw(rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs) -> tuple[Array, DrawRecord]:
            draw_key, _ = jax.random.split(rng_key)
            step = program.transition(carry, inputs, self.sampler)
            return step.conditional_draw(draw_key, program.likelihood(carry, inputs), self.guidance)

        def advance(
            rng_key: PRNGKeyArray, x: Array, carry: PyTree, inputs: TimeInputs, record: DrawRecord
        ) -> tuple[PyTree, Proposal]:
            _, record_key = jax.random.split(rng_key)
            sites = program.record(record_key, x, carry, inputs)
            return program.advance(x, carry, inputs), Proposal(record, sites)

        def propose(rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs) -> tuple[PyTree, Proposal]:
            x, record = draw(rng_key, carry, inputs)
            return advance(rng_key, x, carry, inputs, record)

        def forecast(rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs) -> tuple[Array, DrawRecord]:
            draw_key, _ = jax.random.split(rng_key)
            return program.draw(draw_key, carry, inputs, self.sampler)

        return fa_apf.build_kernel(
            log_predictive,
            draw if self.spread_repair else propose,
            self.resampling,
            self.target_ess,
            batch_size,
            local,
            self.spread_repair,
            advance,
            forecast,
            self.inflation,
        )

    def _check_errors(self, program: StateSpaceModel) -> None:
        for name in program.observed_names:
            if name in program.general_names:
                raise ValueError(
                    f"the errors of site '{name}' cannot be inflated: it is not Gaussian, or its error or the slope of "
                    f"its mean changes with the state; use inflation=ndda.Tempering() in place of {self.inflation}."
                )

    def _local(self, program: StateSpaceModel) -> LocalAncestors | None:
        if self.taper is None:
            return None
        return LocalAncestors.at(place_taper(self.taper, program), program.state_shape, self.block_radius)

    def parents(self, program: StateSpaceModel, ancestors: Array, values: Array) -> Array:
        """Glued together where ancestors are local."""
        local = self._local(program)
        return super().parents(program, ancestors, values) if local is None else local.glue(values, ancestors)

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Plain values."""
        return {
            "algorithm": "FAAPF",
            "weight": _in_full(self._weight(closed_form=program.diffusion() is None)),
            "target_ess": self.target_ess,
            "inflation": _in_full(self.inflation),
            "guidance": _in_full(self.guidance),
            "sampler": _sampler_settings(self.sampler, program),
            "resampling": _resampling_settings(self.resampling),
            "taper": _taper_settings(self.taper),
            "block_radius": self.block_radius,
            "spread_repair": _repair_settings(self.spread_repair),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Bootstrap(Algorithm):
    """The bootstrap particle filter (`smc.bootstrap`) on the same program: unguided draws, weighed afterwards.

    Args:
        model: as `FAAPF`, but with any transition that can be sampled and any likelihood with a log_prob.
        target_ess: inflation, as in `FAAPF`; none by default.
        sampler: reverse diffusion of the draw; by default the transition's own.
        resampling: from `blackjax.smc.resampling`; systematic by default.

    Raises:
        ValueError: target_ess outside [0, 1).
    """

    needs_gaussian: ClassVar[bool] = False

    model: Callable[..., Any]
    target_ess: float = 0.0
    sampler: Sampler | None = None
    resampling: Resampling | None = None

    def __post_init__(self) -> None:
        check_target_ess(self.target_ess)

    def kernel(self, program: StateSpaceModel, batch_size: int = 0) -> Kernel:
        """The bootstrap kernel of the program."""

        def propose(rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs) -> tuple[PyTree, Proposal]:
            draw_key, record_key = jax.random.split(rng_key)
            x, draw = program.draw(draw_key, carry, inputs, self.sampler)
            sites = program.record(record_key, x, carry, inputs)
            return program.advance(x, carry, inputs), Proposal(draw, sites)

        def log_likelihood(carry: PyTree, proposal: Proposal, inputs: TimeInputs) -> Array:
            return jnp.sum(jnp.stack([jnp.sum(v) for v in proposal.sites["log_likelihood"].values()]))

        return bootstrap.build_kernel(propose, log_likelihood, self.resampling, self.target_ess, batch_size)

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Plain values."""
        return {
            "algorithm": "Bootstrap",
            "target_ess": self.target_ess,
            "sampler": _sampler_settings(self.sampler, program),
            "resampling": _resampling_settings(self.resampling),
        }


PATH_SAMPLER = Sampler(SDEDPMSolverPP2M(), KarrasSchedule(24, rho=20.0))
"""What `GuidedPF` draws with where the transition's own sampler has not noise at every step."""


@dataclasses.dataclass(frozen=True, eq=False)
class GuidedPF(Algorithm):
    """The guided particle filter (`smc.guided_pf`): guided draws, weighed after the move; unbiased evidence.

    Each draw comes with a weight whose mean is p(y | c): for a diffusion by path weights (`path`), p being the law of
    the sampler at its number of levels; for a transition in closed form exactly.

    Args:
        model: as `FAAPF`.
        guidance: how the draw is guided. By default with exact solves, one network pass an observation at each noise
            level; fewer, as in `MMPS(KrylovSolve(products=4))`, leave the evidence unbiased, and its spread larger.
        sampler: reverse diffusion of the draw, with noise at every step. By default the transition's own where that has
            it, else 24 levels of `SDEDPMSolverPP2M`.
        target_ess: inflation, as in `FAAPF`; none by default, for it would bias the evidence.
        resampling: from `blackjax.smc.resampling`; systematic by default.

    Raises:
        ValueError: target_ess outside [0, 1), or a sampler that is not stochastic at every step.
    """

    model: Callable[..., Any]
    guidance: Guidance = dataclasses.field(default_factory=lambda: MMPS(DirectSolve()))
    sampler: Sampler | None = None
    target_ess: float = 0.0
    resampling: Resampling | None = None

    def __post_init__(self) -> None:
        check_target_ess(self.target_ess)
        if self.sampler is not None:
            self.sampler.stochastic_step()

    def _sampler(self, program: StateSpaceModel) -> Sampler:
        transition = program.diffusion()
        if self.sampler is None and transition is not None and transition.sampler.is_stochastic:
            return transition.sampler
        return PATH_SAMPLER if self.sampler is None else self.sampler

    def kernel(self, program: StateSpaceModel, batch_size: int = 0) -> Kernel:
        """The guided kernel of the program."""
        sampler = self._sampler(program)

        def propose(rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs) -> tuple[PyTree, Array, Proposal]:
            draw_key, record_key = jax.random.split(rng_key)
            step = program.transition(carry, inputs, sampler)
            x, log_weight, draw = step.weighted_draw(draw_key, program.likelihood(carry, inputs), self.guidance)
            sites = program.record(record_key, x, carry, inputs)
            return program.advance(x, carry, inputs), log_weight, Proposal(draw, sites)

        return guided_pf.build_kernel(propose, self.resampling, self.target_ess, batch_size)

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Plain values."""
        return {
            "algorithm": "GuidedPF",
            "target_ess": self.target_ess,
            "guidance": _in_full(self.guidance),
            "sampler": _sampler_settings(self._sampler(program), program),
            "resampling": _resampling_settings(self.resampling),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class EnKF(Algorithm):
    """The ensemble Kalman filter (`smc.enkf`) on the same program.

    Args:
        model: as `FAAPF`, but with any transition that can be sampled (a `Delta` too), and Gaussian observations.
        inflation: factor on the forecast anomalies, at least 1.
        sampler: reverse diffusion of the forecast; by default the transition's own.
        update: `PerturbedObservations()` or `SquareRoot()`.
        taper: localisation, `Taper(radius, distance, observations)`; None for none.
        rtps: relaxation of the analysis spread to the forecast's, from 0 (none) to 1 (all of it): `RTPS(rtps)` before
            any other repair.
        spread_repair: what is done to the analysis, in this order: `RTPS`, `RTPP`, `Multiplicative`, `Jitter`.

    Raises:
        TypeError: what is no sequence of repairs.
        ValueError: inflation below 1, or rtps outside [0, 1].
    """

    needs_gaussian: ClassVar[bool] = False
    needs_gaussian_errors: ClassVar[bool] = True

    model: Callable[..., Any]
    inflation: float = 1.0
    sampler: Sampler | None = None
    update: EnsembleUpdate = dataclasses.field(default_factory=PerturbedObservations)
    taper: Taper | None = None
    rtps: float = 0.0
    spread_repair: Sequence[SpreadRepair] = ()

    def __post_init__(self) -> None:
        enkf.check_spread_repair(self.inflation, self.rtps)
        check_repairs(self.spread_repair, "EnKF", paired=True)

    def has_evidence(self) -> bool:
        """None: there are no weights."""
        return False

    def kernel(self, program: StateSpaceModel, batch_size: int = 0) -> Kernel:
        """The EnKF kernel of the program.

        Raises:
            ValueError: a taper whose positions do not fit the program.
        """

        def forecast(rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs) -> tuple[Array, DrawRecord]:
            return program.draw(rng_key, carry, inputs, self.sampler)

        def residual(x: Array, carry: PyTree, inputs: TimeInputs) -> Array:
            return program.gaussian_likelihood(carry, inputs).residual(x)

        def advance(
            rng_key: PRNGKeyArray, x: Array, carry: PyTree, inputs: TimeInputs, draw: DrawRecord
        ) -> tuple[PyTree, Proposal]:
            return program.advance(x, carry, inputs), Proposal(draw, program.record(rng_key, x, carry, inputs))

        taper = None if self.taper is None else place_taper(self.taper, program)
        return enkf.build_kernel(
            forecast,
            residual,
            advance,
            self.inflation,
            batch_size,
            self.update,
            taper,
            self.rtps,
            self.spread_repair,
        )

    def _as_background(self, forecast: Array) -> Array:
        """As inflated as the update takes it to be."""
        return Multiplicative(self.inflation)(jax.random.key(0), forecast, None)

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Plain values."""
        return {
            "algorithm": "EnKF",
            "update": _in_full(self.update),
            "inflation": self.inflation,
            "rtps": self.rtps,
            "spread_repair": _repair_settings(self.spread_repair),
            "taper": _taper_settings(self.taper),
            "sampler": _sampler_settings(self.sampler, program),
        }
