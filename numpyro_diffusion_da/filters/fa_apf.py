"""Fully adapted auxiliary particle filter of a NumPyro program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import require, require_number, require_program
from numpyro_diffusion_da.diffusion.guidance import MMPS, Guidance
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.diffusion.steps import Step
from numpyro_diffusion_da.filters.background import Screen, background_key, background_of_transition, probe_level
from numpyro_diffusion_da.filters.base import ConditionedKernel, FilterAlgorithm, Proposal, line_of, with_past
from numpyro_diffusion_da.filters.checks import check_resampling, check_taper, set_lag, set_sampler, set_target_ess
from numpyro_diffusion_da.filters.conditioning import conditioning_leaves, with_conditioning
from numpyro_diffusion_da.filters.placement import moved_ancestors, place_taper, shared_arrays
from numpyro_diffusion_da.filters.settings import (
    in_full,
    inflation_setting,
    resampling_setting,
    sampler_settings,
    taper_setting,
)
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc import fa_apf
from numpyro_diffusion_da.smc.base import (
    Info,
    Kernel,
    Resampling,
    State,
    particle_keys,
    total_particles,
)
from numpyro_diffusion_da.smc.inflation import Inflation, check_inflation, need_forecast
from numpyro_diffusion_da.smc.kalman_move import KalmanMove, PlacedMove
from numpyro_diffusion_da.smc.local_ancestors import LocalAncestors
from numpyro_diffusion_da.smc.localization import PlacedTaper, Taper
from numpyro_diffusion_da.smc.probing import class_vectors
from numpyro_diffusion_da.smc.sharding import first, own
from numpyro_diffusion_da.smc.tempering import Tempering, WeightTempering
from numpyro_diffusion_da.transition.base import Centering, DrawRecord
from numpyro_diffusion_da.transition.departure import exact_up_to, predict
from numpyro_diffusion_da.transition.weights import Dirac, Equal, Moment, PredictiveWeight, WeightRecord

TARGET_ESS, TARGET_ESS_OF_MOVES = 0.2, 0.5
"""Default target of the effective sample size, as a fraction of the particles: without and with a move. With a move
little is lost by selecting less, and the test of Gaussianity is more reliable at a higher effective sample size."""


class Probing(NamedTuple):
    """Particle of a kernel, with its earlier states, its conditioning, and what its products with V need.

    V is the covariance of the transition.

    Attributes:
        carry: carry of the particle.
        key: random key of the signs of its weight's products; () if ancestors do not move.
        past: earlier states of the particle, shape (L, ...); () without a lag.
        vectors: vectors of its products for the move, shape (q, m); None if ancestors do not move, or if the particle
            makes a product for each observation.
        conditioning: conditioning of the carry of a particle before selection; None if it is not held. A particle that
            was glued or moved keeps that of its place, which nothing uses.
    """

    carry: PyTree
    key: Any
    past: Any
    vectors: Array | None
    conditioning: PyTree | None


@dataclasses.dataclass(frozen=True, eq=False)
class FAAPF(FilterAlgorithm):
    r"""Fully adapted auxiliary particle filter of a program (`smc.fa_apf`).

    Each step weighs every particle by its predictive likelihood $p(y \mid c)$, resamples, and draws each new particle
    from $p(x' \mid c, y)$ by guidance. Here y are the observations, x' is the next state, and c is the particle's
    conditioning, its previous state and inputs (Savary, Rozet & Louppe 2026, arXiv 2605.20028, Section 3). With a
    `taper`, each block of the state selects its ancestors by itself, by the observations near the block.

    Args:
        model: NumPyro program with one `scan`, whose transition is a `DiffusionTransition`, `Normal` or
            `MultivariateNormal`. Observed sites may have any distribution of independent elements, or a
            `MultivariateNormal`. NaN marks a missing value.
        weight: estimate of log p(y | c); None for `Dirac()` with a diffusion, and the exact `Moment()` with a
            transition in closed form.
        target_ess: effective sample size to reach by tempering, as a fraction of the particles in [0, 1); 0 for no
            tempering. None is 0.2, or 0.5 with a `move`, which uses what tempering leaves of the observations.
        guidance: guidance of the draws by the observations.
        sampler: sampler of the guided draws, or a bare step such as `ndda.diffusion.DDIM()`; None for the transition's
            own.
        resampling: function of `blackjax.smc.resampling`; None for systematic resampling.
        taper: localization, `Taper(radius, distance, observations)`; None selects whole particles. With a taper there
            is no evidence.
        block_radius: largest distance of a place from the center of its block, in the unit of the taper's distance; 0
            makes each place a block.
        inflation: sequence of `Inflation`, applied to the new states in its order: `(RTPS(0.3), Jitter(0.1))`. `RTPS`
            needs the spread of the forecast, which costs one more, unguided draw of each particle.
        tempering: tempering of the weights if their effective sample size is below its target:
            `smc.WeightTempering()` or `smc.LikelihoodTempering()`. Both are the same with Dirac weights.
        move: move of the selected ancestors by the part of the likelihood that selection leaves, `ndda.KalmanMove()`;
            True is the same with its defaults, and False makes no move. None moves if there is a taper: without one the
            filter is the published one, which selects only.
        lag: number L of earlier states of each particle that are selected and moved with it. `smoothed(L)` and
            `to_datatree(lag=L)` then have the states given the observations up to L steps later, also after moves and
            with a taper. Each particle holds L more states. 0 keeps none. The filter itself does not depend on it.

    Raises:
        TypeError: an argument is of the wrong kind; the message names it.
        ValueError: `target_ess` is outside [0, 1); `block_radius` is negative, or is given without a taper; `lag` is
            negative; or an inflation needs a forecast member for each analysis member (`RTPP`,
            `ForecastMultiplicative`).
    """

    can_be_sharded: ClassVar[bool] = True

    model: Callable[..., Any]
    weight: PredictiveWeight | None = None
    target_ess: float = None  # type: ignore[assignment]  # a number as soon as the filter is made
    guidance: Guidance = dataclasses.field(default_factory=MMPS)
    sampler: Sampler | Step | None = None
    resampling: Resampling | None = None
    taper: Taper | None = None
    block_radius: float = 0.0
    inflation: Sequence[Inflation] = ()
    tempering: Tempering = dataclasses.field(default_factory=WeightTempering)
    move: KalmanMove | bool | None = None
    lag: int = 0

    def __post_init__(self) -> None:
        require_program(self.model, "FAAPF")
        if self.weight is not None:
            require(self.weight, PredictiveWeight, "FAAPF", "weight", "ndda.Moment()")
        require(self.guidance, Guidance, "FAAPF", "guidance", "ndda.MMPS()")
        set_sampler(self)
        check_resampling(self.resampling, "FAAPF")
        check_taper(self.taper, "FAAPF")
        check_inflation(self.inflation, "FAAPF", paired=False)
        require(self.tempering, Tempering, "FAAPF", "tempering", "ndda.smc.WeightTempering()")
        block_radius = require_number(self.block_radius, "FAAPF", "block_radius", "give 0 or more.", least=0.0)
        object.__setattr__(self, "block_radius", block_radius)
        if isinstance(self.move, np.bool_):
            object.__setattr__(self, "move", bool(self.move))
        if self.move is not None and not isinstance(self.move, bool):
            require(self.move, KalmanMove, "FAAPF", "move", "ndda.KalmanMove()")
        if isinstance(self.move, KalmanMove) and self.move.radius is not None and self.taper is None:
            raise ValueError(f"FAAPF got {self.move} and no taper, which the radius needs; give both, or no radius.")
        if self.target_ess is None:
            object.__setattr__(self, "target_ess", TARGET_ESS if self.moves is None else TARGET_ESS_OF_MOVES)
        set_target_ess(self)
        set_lag(self)
        if self.block_radius and self.taper is None:
            raise ValueError(f"FAAPF got block_radius={self.block_radius} and no taper; give both, or neither.")

    def has_evidence(self) -> bool:
        """Whether the filter estimates the evidence; False with equal weights or with a taper."""
        return not isinstance(self.weight, Equal) and self.taper is None

    @property
    def moves(self) -> KalmanMove | None:
        """Move of the ancestors, with its default filled in; None if ancestors do not move."""
        if isinstance(self.move, KalmanMove):
            return self.move
        moves = self.taper is not None if self.move is None else self.move
        return KalmanMove() if moves else None

    def weight_bias_reasons(self, program: StateSpaceModel) -> list[str]:
        """Reasons why the weights are not exact: those of `weight`, and inflation."""
        closed_form = program.structure.emulator is None
        bias_reasons = self._weight(program).bias_reasons(closed_form, program.structure.observes_linearly)
        if self.moves is not None:
            bias_reasons = [
                *bias_reasons,
                "ancestors are moved by a regression, which is exact for Gaussian ensembles only",
            ]
        inflations = inflation_setting(self.inflation)
        return bias_reasons + ([f"the particles' spread is inflated: {inflations}"] if self.inflation else [])

    def _weight(self, program: StateSpaceModel) -> PredictiveWeight:
        """Predictive weight, with its default filled in."""
        if self.weight is not None:
            return self.weight
        if program.structure.emulator is None:
            return Moment()
        # With a taper, the move makes the product with V in any case.
        if self.moves is not None and self.taper is not None:
            return Moment(noise_level=probe_level(program), probes=1)
        return Dirac()

    def kernel(self, program: StateSpaceModel, batch_size: int | None = None, screen: Screen | None = None) -> Kernel:
        """Build the FA-APF kernel of the program; `FilterAlgorithm.kernel` explains arguments and return value.

        The background is that of the transition (see `filters/background.py`), around the forecasts that the weights
        compute. With a `screen` it is made of unguided draws.

        Raises:
            ValueError: the positions of the taper do not fit the program, or `LikelihoodTempering` cannot temper a
                site; the message names it.
        """
        if screen is not None:
            return self.screened_by_draws(program, batch_size, screen)
        return self.holding_conditioning(program, batch_size)

    def conditioned_kernel(self, program: StateSpaceModel, batch_size: int | None = None) -> ConditionedKernel:
        """Build the FA-APF kernel for particles whose conditioning may be known; see `FilterAlgorithm`.

        Raises:
            ValueError: the positions of the taper do not fit the program, or `LikelihoodTempering` cannot temper a
                site; the message names it.
        """
        moves, localized = self.moves, self.taper is not None
        # A move has the blocks of the selection too.
        placed = None if moves is None else self._placed(moves, program)
        local: LocalAncestors | Callable[[TimeInputs], LocalAncestors] | None = None
        if moves is None:
            local = self._local(program)
            if self.taper is not None and self.taper.moving:
                local = functools.partial(self._at_places, self.taper, program)
        if self.tempering.needs_likelihood_tempering and not isinstance(self.weight, Equal):
            self._check_errors(program)

        weight = self._weight(program)

        def log_predictive(particle: Probing, inputs: TimeInputs) -> tuple[Any, PyTree]:
            log_weight, record = weigh(particle, inputs)
            return log_weight, with_conditioning(record, program)

        def weigh(particle: Probing, inputs: TimeInputs) -> tuple[Any, WeightRecord]:
            carry = particle.carry
            dynamics = program.transition(carry, inputs, self.sampler, particle.conditioning)
            if moves is not None:
                return predict(
                    weight,
                    dynamics,
                    program.likelihood(carry, inputs),
                    particle.key,
                    particle.vectors,
                    localized=localized,
                    tempered=self.tempering.needs_likelihood_tempering,
                    noise_level=probe_level(program) if moves.noise_level is None else moves.noise_level,
                )
            predictive: Callable[..., tuple[Any, WeightRecord]]
            if self.tempering.needs_likelihood_tempering:
                predictive = weight.temperable_pointwise if localized else weight.temperable
            else:
                predictive = weight.pointwise if localized else weight
            return predictive(dynamics, program.likelihood(carry, inputs))

        # Where whole particles are selected, the conditioning of a new one is its ancestor's.
        gathered = moves is None and not localized

        # With inflation, the kernel calls `draw` and `advance` with the same key, and inflates the states in between.
        # They split it alike, so the draws are those of `propose`.
        def draw(
            rng_key: PRNGKeyArray, particle: Probing, inputs: TimeInputs, centering: Centering | None
        ) -> tuple[Array, DrawRecord]:
            carry = particle.carry
            draw_key, _ = jax.random.split(rng_key)
            conditioning = particle.conditioning if gathered else None
            dynamics = program.transition(carry, inputs, self.sampler, conditioning)
            x, record = dynamics.conditional_draw(draw_key, program.likelihood(carry, inputs), self.guidance, centering)
            return x, record if conditioning is not None else with_conditioning(record, program)

        def advance(
            rng_key: PRNGKeyArray, x: Array, particle: Probing, inputs: TimeInputs, record: DrawRecord
        ) -> tuple[PyTree, Proposal]:
            carry = particle.carry
            _, record_key = jax.random.split(rng_key)
            sites = program.record(record_key, x, carry, inputs)
            return program.advance(x, carry, inputs), Proposal(record, sites, line_of(particle.past, x))

        def propose(
            rng_key: PRNGKeyArray, particle: Probing, inputs: TimeInputs, centering: Centering | None
        ) -> tuple[PyTree, Proposal]:
            x, record = draw(rng_key, particle, inputs, centering)
            return advance(rng_key, x, particle, inputs, record)

        def forecast(
            rng_key: PRNGKeyArray, particle: Probing, inputs: TimeInputs, centering: Centering | None
        ) -> tuple[Array, DrawRecord]:
            draw_key, _ = jax.random.split(rng_key)
            return program.draw(draw_key, particle.carry, inputs, self.sampler, centering, particle.conditioning)

        def kernel(
            rng_key: PRNGKeyArray, state: State, inputs: TimeInputs, conditioning: PyTree | None
        ) -> tuple[State, Info]:
            n = total_particles(state.particles)
            centering = self._centering(program, rng_key, state.particles, inputs, conditional=True)
            ahead = None
            if need_forecast(self.inflation):
                ahead = self._centering(program, rng_key, state.particles, inputs, conditional=False)
            here = placed(inputs) if callable(placed) else placed
            step = fa_apf.build_kernel(
                log_predictive,
                functools.partial(draw if self.inflation else propose, centering=centering),
                self.resampling,
                self.target_ess,
                batch_size,
                local,
                self.inflation,
                advance,
                functools.partial(forecast, centering=ahead),
                self.tempering,
                here,
            )
            keys: Any = ()
            vectors = None
            if here is not None:
                # A seventh and an eighth key leave the others the same with and without a move.
                keys = own(particle_keys(jax.random.split(rng_key, 7)[6], n))
                vectors = self._vectors(program, jax.random.split(rng_key, 8)[7], state.particles, inputs, here.taper)
            particles = Probing(state.particles, keys, state.past, vectors, conditioning)
            new, info = step(rng_key, state._replace(particles=particles), inputs)
            background = background_of_transition(
                program,
                background_key(rng_key),
                state.particles,
                inputs,
                forecast=getattr(info.weighing, "forecast", None),
                noise_level=self.weight.noise_level if isinstance(self.weight, Moment) else None,
                conditioning=conditioning,
                batch_size=batch_size,
            )
            return with_past(new, info), info._replace(background=background)

        return kernel

    def _centering(
        self, program: StateSpaceModel, rng_key: PRNGKeyArray, particles: PyTree, inputs: TimeInputs, conditional: bool
    ) -> Centering | None:
        """Centering of the random numbers of a step's draws; None where independent draws give the evidence no bias.

        Args:
            program: state-space model at given arguments of the program.
            rng_key: random key of the step.
            particles: carries before the step, leading axis N.
            inputs: inputs of the time.
            conditional: whether the draws are those given the observations, not forecasts.
        """
        if self.has_evidence() and self.moves is None:
            return None
        # The kernel draws with the second key of the step, and `draw` with the first key of a particle's.
        keys = particle_keys(jax.random.split(rng_key)[1], total_particles(particles))
        draw_keys = jax.vmap(lambda key: jax.random.split(key)[0])(keys)
        return program.centering(draw_keys, first(particles), inputs, self.sampler, conditional)

    def _vectors(
        self,
        program: StateSpaceModel,
        rng_key: PRNGKeyArray,
        particles: PyTree,
        inputs: TimeInputs,
        taper: PlacedTaper | None,
    ) -> Array | None:
        """Vectors of the particles' products with the covariance of the observations, shape (N, q, m).

        None if each particle makes a product for each observation: if they are few, or if a weight does.
        """
        moves, weight = self.moves, self._weight(program)
        assert moves is not None

        def observed(carry: PyTree) -> Array:
            mean = program.transition(carry, inputs, self.sampler).moments().mean
            return program.likelihood(carry, inputs).pointwise(mean)

        m = jax.eval_shape(observed, jax.tree.map(lambda leaf: leaf[0], particles)).shape[0]
        few = m <= exact_up_to(program.structure.emulator is None, moves.most_products)
        if few or (isinstance(weight, Moment) and weight.probes is None):
            return None
        return own(class_vectors(rng_key, total_particles(particles), m, taper))

    def _check_errors(self, program: StateSpaceModel) -> None:
        """Check that `LikelihoodTempering` can temper all sites.

        Raises:
            ValueError: a site is not Gaussian, or its error or the slope of its mean changes with the state.
        """
        for name in program.structure.observed_names:
            if name in program.structure.general_names:
                raise ValueError(
                    f"the likelihood of site '{name}' cannot be tempered inside its weight: it is not Gaussian, or its "
                    "error or the slope of its mean changes with the state; use "
                    f"tempering=ndda.smc.WeightTempering() in place of {self.tempering}."
                )

    def _local(self, program: StateSpaceModel) -> LocalAncestors | None:
        """Localized selection of ancestors, with the taper placed on the program; None without a taper.

        Its blocks hold for all times, and so do its neighborhoods unless places move.
        """
        return None if self.taper is None else self._at_places(self.taper, program, None)

    def _at_places(self, taper: Taper, program: StateSpaceModel, inputs: TimeInputs | None) -> LocalAncestors:
        """Localized selection of ancestors by the places of one time; see `place_taper` for the arguments."""
        placed = place_taper(taper, program, inputs)
        structure = program.structure
        shared = shared_arrays(structure)
        # A `Probing` particle has its carry, its key, earlier states, its vectors and its conditioning. All but the
        # carry and the earlier states belong to its place.
        key = len(structure.carry)
        vectors = key + (self.moves is not None) + (self.lag > 0)
        keys = () if self.moves is None else (key,)
        shared = (*shared, *keys, *range(vectors, vectors + 1 + len(conditioning_leaves(program))))
        return LocalAncestors.at(placed, structure.state_shape, self.block_radius, shared)

    def _placed(self, move: KalmanMove, program: StateSpaceModel) -> PlacedMove | Callable[[TimeInputs], PlacedMove]:
        """Move of the ancestors placed on the program; a function of the inputs if places of observations move."""
        carried = moved_ancestors(program.structure, localized=self.taper is not None)
        bounds = move.bounds(program.structure.state_shape)
        # The earlier states of a `Probing` particle come after its carry and its key.
        along = (len(program.structure.carry) + 1,) if self.lag else ()
        bounded = (*(i for i in carried if program.structure.carry[i].has_places), *along)
        # Equal weights select nothing.
        share = 0.0 if isinstance(self.weight, Equal) else move.selection_share
        taper = self.taper
        if taper is None:
            return PlacedMove(None, None, carried, share, bounds, bounded, along)
        wide = taper if move.radius is None else taper.with_radius(move.radius)

        def at(inputs: TimeInputs | None) -> PlacedMove:
            local = self._at_places(taper, program, inputs)
            return PlacedMove(local, place_taper(wide, program, inputs), carried, share, bounds, bounded, along)

        return at if taper.moving else at(None)

    def parents(self, program: StateSpaceModel, ancestors: Array, values: Array) -> Array:
        """Select the value of each new particle's ancestor, block by block if the filter has a taper."""
        local = self._local(program)
        if local is None:
            return super().parents(program, ancestors, values)
        return dataclasses.replace(local, shared=()).glue(values, ancestors)

    def settings(self, program: StateSpaceModel) -> dict[str, str | float]:
        """Settings of the filter as plain values, for the attributes of a result."""
        return {
            "algorithm": "FAAPF",
            "weight": in_full(self._weight(program)),
            "target_ess": self.target_ess,
            "tempering": in_full(self.tempering),
            "guidance": in_full(self.guidance),
            **sampler_settings(self.sampler, program),
            "resampling": resampling_setting(self.resampling),
            "taper": taper_setting(self.taper),
            "block_radius": self.block_radius,
            "inflation": inflation_setting(self.inflation),
            "move": "none" if self.moves is None else repr(self.moves),
            "lag": self.lag,
        }
