"""`SMC2`: draw the global parameters of a program given the observations up to each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from numpyro_diffusion_da.arguments import require_key, require_number
from numpyro_diffusion_da.filters.base import FilterAlgorithm, takes_algorithm
from numpyro_diffusion_da.inference.base import BATCH, ParameterInference
from numpyro_diffusion_da.inference.devices import to_host
from numpyro_diffusion_da.inference.evidence import FilterEvidence
from numpyro_diffusion_da.inference.progress import progress
from numpyro_diffusion_da.inference.threads import lapack_on_one_thread
from numpyro_diffusion_da.program.parameters import GlobalParameters
from numpyro_diffusion_da.results.result import ParameterResult
from numpyro_diffusion_da.smc import smc2


class SMC2(ParameterInference):
    """SMC^2 over a NumPyro program: a particle filter over its global parameters, each with its own state filter.

    It draws the global parameters given the observations up to each time, and estimates the evidence of the program
    with the parameters integrated out. Global parameters are the unobserved sites outside the scan that its body uses;
    sites that only give the initial state are drawn by the state filter. A run takes the whole series.
    If the evidence of the state filter is unbiased, the result is exact as M grows, for any number of state particles.
    The cost grows with the square of the length of the series, because each move runs a new filter from the first
    observation on.

    Source: Chopin, Jacob & Papaspiliopoulos 2013, J. R. Stat. Soc. B 75, 397.

    Args:
        algorithm: `Bootstrap(model)`, or another filter of the program that estimates its evidence. A run warns if the
            evidence is biased.
        num_particles: number of state particles N of the filter of each parameter particle.
        num_parameter_particles: number of parameter particles M.
        num_moves: number of `PMMH` steps of each parameter particle after resampling.
        target_ess: parameters are resampled and moved if their effective sample size is below this fraction of M, in
            [0, 1].
        num_chains: number of independent runs; they become the chains of the result.
        batch_size: number of state particles moved at a time, over all parameter particles, which bounds the memory;
            None for as many as fit into half of the device's memory, and on a CPU for no more than its cores move
            fastest. Below N, one parameter particle is handled at a time.
        progress_bar: whether to show a progress bar over the steps.
        mesh: devices that share the parameter particles, `jax.make_mesh((8,), ("particles",))`; None for one device.
            The state filter of a parameter particle is on its device, and resampling moves whole filters. The result
            does not depend on it, up to rounding (docs/scale.md).

    Raises:
        ValueError: a number is below 1, `target_ess` is outside [0, 1], `mesh` has another axis than "particles", or
            its devices cannot share the parameter particles equally.
        TypeError: `algorithm` is not a filter, or a number is not a whole number.
    """

    divided: ClassVar[str] = "num_parameter_particles"

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
        mesh: Mesh | None = None,
    ) -> None:
        advice = "give a fraction of the parameter particles, from 0 to 1."
        target_ess = require_number(target_ess, "SMC2", "target_ess", advice, least=0.0, most=1.0)
        numbers = {"num_parameter_particles": num_parameter_particles, "num_moves": num_moves}
        super().__init__(algorithm, num_particles, num_chains, batch_size, progress_bar, mesh, **numbers)
        self.num_parameter_particles = num_parameter_particles
        self.num_moves = num_moves
        self.target_ess = target_ess

    def run(self, rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> None:
        """Assimilate the observations in the arguments of the program, one time after the other.

        `result` holds the result afterwards. With M parameter particles, `posterior` has the shapes (num_chains, M,
        ...) and `over_time` (num_chains, M, time, ...). The statistics `ess`, `log_evidence_increment`,
        `acceptance_rate` and `filter_steps` have the shape (num_chains, time); with a mesh also `bytes_moved`,
        `bytes_needed` and `bytes_gathered`, as of a `Filter`. The keys of chains and steps are folded from `rng_key` by
        their indices, so `num_chains` does not change the draws of a chain.

        Each run reads anew what the program reads from outside its arguments, as `Filter.run` does.

        Args:
            rng_key: random key, from `jax.random.key`.
            *args: arguments of the program.
            **kwargs: keyword arguments of the program.

        Raises:
            ValueError: the program has no global parameters or a discrete one, the filter cannot run it, or the filter
                does not estimate the evidence.
            FloatingPointError: no parameter particle has a finite log-evidence at a step; the message names the step.
        """
        require_key(rng_key, self)
        parameters, attributes = self._begin(args, kwargs)
        program = parameters.program
        given, length = (program.args, program.kwargs), program.structure.length
        chains = []
        with lapack_on_one_thread(), progress(self.progress_bar, "SMC^2", self.num_chains * length) as advance:
            for chain in range(self.num_chains):
                key = jax.random.fold_in(rng_key, chain)
                state = self._compiled["start"](jax.random.fold_in(key, length), given)
                infos = []
                for t in range(length):
                    state, info = self._compiled["step"](jax.random.fold_in(key, t), state, np.asarray(t), given)
                    infos.append(to_host(info))
                    if not np.isfinite(infos[-1].log_evidence_increment):
                        raise FloatingPointError(
                            f"no parameter particle has a finite log-evidence at step {t}; check the observations at "
                            "that step, and whether they are possible under any parameters of the prior."
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
                **({} if self.mesh is None else {f"bytes_{n}": v for n, v in infos_.traffic._asdict().items()}),
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
        """Largest number of filters that run at the same time."""
        return max(self.num_parameter_particles, BATCH)

    def _parts(self, parameters: GlobalParameters) -> dict[str, Callable[..., Any]]:
        """Functions to compile, by name: those of the base class, `start` (prior draws) and `step` (one time)."""

        def start(rng_key: Any, given: Any) -> smc2.SMC2State:
            at = parameters.at(*given)
            draw_key, filter_key = jax.random.split(rng_key)
            m = self.num_parameter_particles
            positions = jax.vmap(at.draw)(jax.random.split(draw_key, m))

            def begin(key: Any, position: Array) -> Any:
                return self._estimator.start(key, at.filterable(position))

            filters = self._map_filters(begin)(jax.random.split(filter_key, m), positions)
            logs = jax.vmap(at.log_prior)(positions), jax.vmap(at.log_outside)(positions)
            return smc2.init(positions, filters, *logs, mesh=self.mesh)

        def step(rng_key: Any, state: smc2.SMC2State, t: Array, given: Any) -> tuple[smc2.SMC2State, smc2.SMC2Info]:
            at = parameters.at(*given)

            def advance(key: Any, position: Array, filter: FilterEvidence, t: Array) -> tuple[FilterEvidence, Array]:
                return self._estimator.step(key, at.filterable(position), filter, t)

            def restart(key: Any, position: Array, number: Array) -> tuple[Array, FilterEvidence]:
                evidence = self._evidence(at)(key, position, number)
                return evidence.state.log_evidence, evidence

            kernel = smc2.build_kernel(
                at.log_prior,
                advance,
                restart,
                self.num_moves,
                self.target_ess,
                self._filters_at_a_time,
                mesh=self.mesh,
            )
            return kernel(rng_key, state, t)

        return {**super()._parts(parameters), "start": start, "step": step}
