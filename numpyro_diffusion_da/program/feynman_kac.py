"""A program as a Feynman-Kac model: the functions that a particle filter of another library asks for.

    Q(x_{0:t})  prop.  M_0(x_0) prod_{s <= t} M_s(x_s | x_{s-1}) G_s(x_{s-1}, x_s)

(Chopin & Papaspiliopoulos 2020, An Introduction to Sequential Monte Carlo, ch. 5). M moves a particle and G weighs it.
`bootstrap` and `guided` give two such models of one program; where the guided draw and its weight are exact, both have
the filter of the program as marginals and its evidence as normalising constant. Names and arguments are those of
`cuthbert.smc`; nothing of cuthbert is imported here, and a library with functions of the same sense takes them too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.guidance import MMPS, Guidance
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.sites import pointwise_log_likelihood
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.transition.weights import Dirac, Moment, PredictiveWeight


class Particle(NamedTuple):
    """What is carried from one time to the next.

    Attributes:
        carry: the carry of the program's scan after this time.
        x: value of the latent site at this time; NaN before the first.
    """

    carry: PyTree
    x: Float[Array, ...]


class FeynmanKac(NamedTuple):
    """Four parts, each for one particle.

    Attributes:
        init_sample: (rng_key) -> particle, from M_0.
        propagate_sample: (rng_key, particle, inputs) -> particle, from M.
        log_potential: (particle before, particle, inputs) -> log G.
        model_inputs: the inputs of all times, leading axis time.
    """

    init_sample: Callable[[PRNGKeyArray], Particle]
    propagate_sample: Callable[[PRNGKeyArray, Particle, TimeInputs], Particle]
    log_potential: Callable[[Particle, Particle, TimeInputs], Float[Array, ""]]
    model_inputs: TimeInputs


def bootstrap(program: StateSpaceModel, sampler: Sampler | None = None) -> FeynmanKac:
    """M = p(x' | c), G = p(y | x'): any transition that can be sampled, any likelihood with a log_prob.

    Args:
        program: ``ndda.program.StateSpaceModel(model, (y,))``.
        sampler: reverse diffusion of the draw; by default the transition's own.

    Raises:
        ValueError: a program that cannot be filtered.
    """
    program.check(needs_dynamics=False)

    def propagate_sample(rng_key: PRNGKeyArray, particle: Particle, inputs: TimeInputs) -> Particle:
        x, _ = program.draw(rng_key, particle.carry, inputs, sampler)
        return Particle(program.advance(x, particle.carry, inputs), x)

    def log_potential(before: Particle, particle: Particle, inputs: TimeInputs) -> Array:
        observed = program.sites(before.carry, inputs, particle.x).observed.values()
        return jnp.sum(jnp.stack([jnp.sum(pointwise_log_likelihood(*site)) for site in observed]))

    return FeynmanKac(_init_sample(program), propagate_sample, log_potential, program.time_inputs())


def guided(
    program: StateSpaceModel,
    weight: PredictiveWeight | None = None,
    guidance: Guidance | None = None,
    sampler: Sampler | None = None,
) -> FeynmanKac:
    """M = the guided draw from p(x' | c, y), G = p^(y | c): `FAAPF`'s proposal and weight, weighed after the move.

    Args:
        program: as for `bootstrap`, its transition a diffusion or Gaussian.
        weight: estimate of log p(y | c); `Dirac()` for a diffusion and `Moment()` in closed form by default.
        guidance: how the score is guided; `MMPS()` by default.
        sampler: reverse diffusion of the draw; by default the transition's own.

    Raises:
        ValueError: a program that cannot be filtered so.
    """
    program.check(needs_dynamics=True)
    if weight is None:
        weight = Moment() if program.structure.diffusion is None else Dirac()
    guide = MMPS() if guidance is None else guidance

    def propagate_sample(rng_key: PRNGKeyArray, particle: Particle, inputs: TimeInputs) -> Particle:
        step = program.transition(particle.carry, inputs, sampler)
        x, _ = step.conditional_draw(rng_key, program.likelihood(particle.carry, inputs), guide)
        return Particle(program.advance(x, particle.carry, inputs), x)

    def log_potential(before: Particle, particle: Particle, inputs: TimeInputs) -> Array:
        step = program.transition(before.carry, inputs, sampler)
        return weight(step, program.likelihood(before.carry, inputs))[0]

    return FeynmanKac(_init_sample(program), propagate_sample, log_potential, program.time_inputs())


def _init_sample(program: StateSpaceModel) -> Callable[[PRNGKeyArray], Particle]:
    def latent_shape() -> Array:
        call = program.call(jax.random.key(0))
        return jnp.zeros(program.sites(call.init, call.first_inputs()).latent[program.structure.latent_name].shape())

    x = jax.eval_shape(latent_shape)

    def init_sample(rng_key: PRNGKeyArray) -> Particle:
        return Particle(program.initial(rng_key), jnp.full(x.shape, jnp.nan, x.dtype))

    return init_sample
