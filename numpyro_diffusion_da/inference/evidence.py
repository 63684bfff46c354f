"""Estimate of the evidence p(y_1, ..., y_T) of a program by a filter, as one compiled loop over time."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.smc.base import State
from numpyro_diffusion_da.smc.mesh import on_mesh, started_on_mesh


class FilterEvidence(NamedTuple):
    """State and cost of a filter after some steps.

    Attributes:
        state: state of the filter after the last step; its `log_evidence` is -inf if it was not a number.
        passes: network passes made, summed over particles and steps.
    """

    state: State
    passes: NetworkPasses


class EvidenceEstimator(NamedTuple):
    """Filter with its sizes, which runs on a program whose global parameters are known.

    Attributes:
        algorithm: filter of the program.
        num_particles: number of particles N.
        batch_size: number of particles moved at a time on each device; None moves all at once.
        mesh: devices that share the particles; None for one device.
    """

    algorithm: FilterAlgorithm
    num_particles: int
    batch_size: int | None = None
    mesh: Mesh | None = None

    def start(self, rng_key: PRNGKeyArray, program: StateSpaceModel) -> FilterEvidence:
        """Draw N particles of the initial state, before any observation.

        Args:
            rng_key: random key.
            program: state-space model with its global parameters fixed.
        """
        initial = functools.partial(self.algorithm.initial_state, program, n=self.num_particles)
        state = started_on_mesh(initial, self.mesh)(rng_key)
        return FilterEvidence(state, NetworkPasses(*(jnp.zeros(()) for _ in NetworkPasses._fields)))

    def step(
        self, rng_key: PRNGKeyArray, program: StateSpaceModel, evidence: FilterEvidence, t: Int[Array, ""]
    ) -> tuple[FilterEvidence, Float[Array, ""]]:
        """Assimilate the observations of time t.

        Args:
            rng_key: random key of the step.
            program: state-space model with its global parameters fixed.
            evidence: state and cost before the step.
            t: index of the time, from 0.

        Returns:
            (state and cost after the step; increment of the log-evidence, -inf if it was not a number).
        """
        inputs = TimeInputs(t, jax.tree.map(lambda x: x[t], program.inputs()))
        kernel = on_mesh(self.algorithm.kernel(program, self.batch_size), self.mesh)
        state, info = kernel(rng_key, evidence.state, inputs)
        increment = info.log_evidence_increment
        increment = jnp.where(jnp.isnan(increment), -jnp.inf, increment)
        # Nothing here uses the background, so the compiler leaves its network passes out. They are not counted either.
        made = self.algorithm.passes(info._replace(background=()))
        passes = jax.tree.map(lambda n: self.num_particles * n, made)
        state = state._replace(log_evidence=evidence.state.log_evidence + increment)
        return FilterEvidence(state, NetworkPasses(*map(jnp.add, evidence.passes, passes))), increment

    def run(
        self, rng_key: PRNGKeyArray, program: StateSpaceModel, steps: Int[Array, ""] | int | None = None
    ) -> FilterEvidence:
        """Filter the observations of the first `steps` times, and return the last state and the cost.

        Args:
            rng_key: random key; each step folds its index into it.
            program: state-space model with its global parameters fixed.
            steps: number of times; None for all. It may be traced, so that one compilation serves all numbers.
        """
        init_key, run_key = jax.random.split(rng_key)

        def step(t: Int[Array, ""], evidence: FilterEvidence) -> FilterEvidence:
            return self.step(jax.random.fold_in(run_key, t), program, evidence, t)[0]

        steps = program.structure.length if steps is None else steps
        return jax.lax.fori_loop(0, steps, step, self.start(init_key, program))


def check_evidence(algorithm: FilterAlgorithm, program: StateSpaceModel, name: str) -> list[str]:
    """Check that a filter estimates the evidence of a program, and warn if the estimate is biased.

    Args:
        algorithm: filter of the program.
        program: state-space model with its global parameters fixed.
        name: name of the inference that needs the evidence, for the warning.

    Returns:
        Reasons why the evidence is biased; empty if it is unbiased.

    Raises:
        ValueError: the filter cannot run the program, or does not estimate the evidence.
    """
    program.check(algorithm.needs_gaussian, algorithm.needs_gaussian_errors)
    kind = type(algorithm).__name__
    if not algorithm.has_evidence():
        raise ValueError(
            f"this {kind} estimates no evidence, because it does not weigh whole particles; use "
            "ndda.GuidedPF(model) or ndda.Bootstrap(model)."
        )
    bias_reasons = algorithm.evidence_bias_reasons(program)
    if bias_reasons:
        instead = "ndda.GuidedPF(model), ndda.Bootstrap(model)"
        if program.structure.emulator is None and algorithm.needs_gaussian and program.structure.observes_linearly:
            instead += ", ndda.FAAPF(model, weight=ndda.Moment(), target_ess=0.0)"
        warnings.warn(
            f"the evidence of {kind} is biased: {'; '.join(bias_reasons)}. {name} then does not draw from the "
            f"posterior of the parameters, and more particles do not help; use {instead}.",
            stacklevel=3,
        )
    return bias_reasons
