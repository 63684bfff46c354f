"""`SMC2`: the global parameters of a program as observations arrive, by a particle filter over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from numpyro_diffusion_da.filters.base import FilterAlgorithm, takes_algorithm
from numpyro_diffusion_da.inference.base import BATCH, ParameterInference
from numpyro_diffusion_da.inference.evidence import FilterEvidence
from numpyro_diffusion_da.inference.progress import progress
from numpyro_diffusion_da.program.parameters import GlobalParameters
from numpyro_diffusion_da.results.result import ParameterResult
from numpyro_diffusion_da.smc import smc2
from numpyro_diffusion_da.smc.base import map_particles


class SMC2(ParameterInference):
    """SMC^2 over a NumPyro program (Chopin, Jacob & Papaspiliopoulos 2013).

    Draws of the global parameters given the observations up to each time, and the evidence of the program with its
    parameters integrated out. Exact as M grows, whatever the number of state particles, where the filter's evidence is
    unbiased. The price grows with the square of the series: each move runs new filters from the first observation on.

    Args:
        algorithm: `Bootstrap(model)`, or another filter of the program. A warning says where its evidence is biased.
        num_particles: state particles N of each parameter's filter.
        num_parameter_particles: parameter particles M.
        num_moves: steps of `PMMH` that each parameter makes after it was resampled.
        target_ess: parameters are resampled and moved where their effective sample size is below this fraction of M.
        num_chains: independent runs; they become the chains of the result.
        batch_size: state particles moved at a time, of all parameter particles together; None for as many as half of
            the device's memory takes. Below N, one parameter particle is handled at a time.
        progress_bar: show a bar over the steps.

    Raises:
        ValueError: a number below its least value, or target_ess outside [0, 1].
        TypeError: `algorithm` is not a filter.
    """

    @takes_algorithm("num_particles=256, num_parameter_particles=128")
    def __init__(
        self,
        algorithm: FilterAlgorithm,
        *,
        num_particles: int,
        num_parameter_particles: int,
        num_moves: int = 3,
        target_ess: float = 0.5,
        num_chains: int = 1,
        batch_size: int | None = None,
        progress_bar: bool = True,
    ) -> None:
        if not 0.0 <= target_ess <= 1.0:
            raise ValueError(f"target_ess={target_ess}: give a fraction of the parameter particles, 0.5 say.")
        numbers = {
            "num_parameter_particles": num_parameter_particles,
            "num_moves": num_moves,
            "num_chains": num_chains,
        }
        super().__init__(algorithm, num_particles, batch_size, progress_bar, **numbers)
        self.num_parameter_particles = num_parameter_particles
        self.num_moves = num_moves
        self.target_ess = target_ess
        self.num_chains = num_chains

    def run(self, rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> None:
        """Take in the observations in the program's arguments, one time after the other.

        A chain's key is fold_in(rng_key, chain), a step's fold_in of that and the step.

        Args:
            rng_key: from `jax.random.key`.
            *args: the program's arguments.
            **kwargs: the program's keyword arguments.

        Raises:
            ValueError: a program without global parameters, or one that the filter cannot run.
            FloatingPointError: no parameter has any evidence at a step (naming the step).
        """
        parameters, attributes = self._begin(args, kwargs)
        given, length = (args, kwargs), parameters.program.structure.length
        chains = []
        with progress(self.progress_bar, "SMC^2", self.num_chains * length) as advance:
            for chain in range(self.num_chains):
                key = jax.random.fold_in(rng_key, chain)
                state = self._compiled["start"](jax.random.fold_in(key, length), given)
                infos = []
                for t in range(length):
                    state, info = self._compiled["step"](jax.random.fold_in(key, t), state, np.asarray(t), given)
                    infos.append(jax.device_get(info))
                    if not np.isfinite(infos[-1].log_evidence_increment):
                        raise FloatingPointError(
                            f"no parameter has any evidence at step {t}; check the observations at that step, and "
                            "whether the prior holds values under which they are possible."
                        )
                    advance(1, f"ESS {infos[-1].ess:.0f}")
                chains.append(jax.tree.map(lambda *v: np.stack(v), *infos))
        infos_ = jax.tree.map(lambda *v: np.stack(v), *chains)  # (chain, time, ...)
        positions = np.moveaxis(infos_.draws, 1, 2)
        over_time = self._values(positions, given)
        center = positions[:, :, -1].reshape(-1, positions.shape[-1]).mean(0, dtype=float)
        steps = self.num_parameter_particles * (1 + infos_.moved * self.num_moves * (1 + np.arange(length)))
        self._result = ParameterResult(
            posterior={name: values[:, :, -1] for name, values in over_time.items()},
            sample_stats={
                "ess": infos_.ess,
                "log_evidence_increment": infos_.log_evidence_increment,
                "acceptance_rate": infos_.acceptance_rate,
                "filter_steps": steps,
            },
            over_time=over_time,
            attributes={
                **attributes,
                "seed": str(np.asarray(jax.random.key_data(rng_key)).tolist()),
                "num_parameter_particles": self.num_parameter_particles,
                "num_moves": self.num_moves,
                "parameter_target_ess": self.target_ess,
                "num_chains": self.num_chains,
                **self._spread(jax.random.fold_in(rng_key, self.num_chains), center, given),
            },
        )

    def _num_filters(self) -> int:
        return max(self.num_parameter_particles, BATCH)

    def _parts(self, parameters: GlobalParameters) -> dict[str, Callable[..., Any]]:
        def start(rng_key: Any, given: Any) -> smc2.SMC2State:
            at = parameters.at(*given)
            draw_key, filter_key = jax.random.split(rng_key)
            m = self.num_parameter_particles
            positions = jax.vmap(at.draw)(jax.random.split(draw_key, m))

            def begin(key: Any, position: Array) -> Any:
                return self._estimator.start(key, at.filterable(position))

            filters = map_particles(begin, self._filters_at_a_time)(jax.random.split(filter_key, m), positions)
            return smc2.init(positions, filters, jax.vmap(at.log_prior)(positions), jax.vmap(at.log_outside)(positions))

        def step(rng_key: Any, state: smc2.SMC2State, t: Array, given: Any) -> tuple[smc2.SMC2State, smc2.SMC2Info]:
            at = parameters.at(*given)

            def advance(key: Any, position: Array, filter: FilterEvidence, t: Array) -> tuple[FilterEvidence, Array]:
                return self._estimator.step(key, at.filterable(position), filter, t)

            def restart(key: Any, position: Array, number: Array) -> tuple[Array, FilterEvidence]:
                evidence = self._evidence(at)(key, position, number)
                return evidence.state.log_evidence, evidence

            kernel = smc2.build_kernel(
                at.log_prior, advance, restart, self.num_moves, self.target_ess, self._filters_at_a_time
            )
            return kernel(rng_key, state, t)

        return {**super()._parts(parameters), "start": start, "step": step}
