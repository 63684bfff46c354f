r"""A program as a Feynman-Kac model: the functions that particle filters of other libraries take.

A Feynman-Kac model is the distribution

$$
Q(x_{0:t}) \propto M_0(x_0) \prod_{1 \le s \le t} M_s(x_s \mid x_{s-1}) \, G_s(x_{s-1}, x_s)
$$

(Chopin & Papaspiliopoulos 2020, An Introduction to Sequential Monte Carlo, ch. 5). M moves a particle and G weighs it.
`bootstrap` and `guided` make two such models of one program. If the guided draw and its weight are exact, both models
have the same marginals, the filtering distributions of the program, and the same normalizing constant, its evidence.

Names and arguments of the functions are those of `cuthbert.smc`. This module does not import cuthbert, and other
libraries can take the functions too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from numpyro_diffusion_da.diffusion.guidance import MMPS, Guidance
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.diffusion.steps import Step
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.sites import pointwise_log_likelihood
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.transition.weights import Dirac, Moment, PredictiveWeight


class Particle(NamedTuple):
    """Particle of a Feynman-Kac model at one time.

    Attributes:
        carry: carry of the program's scan after this time.
        x: value of the latent site at this time, in the shape of the state; NaN before the first time.
    """

    carry: PyTree
    x: Float[Array, ...]


class FeynmanKac(NamedTuple):
    """Functions of one particle that define a Feynman-Kac model, and the inputs of all times.

    Attributes:
        init_sample: function (rng_key) -> particle, a draw from M_0.
        propagate_sample: function (rng_key, particle, inputs) -> particle, a draw from M.
        log_potential: function (particle before, particle, inputs) -> log G, a scalar.
        model_inputs: inputs of all times, with a leading axis of time; the functions take the inputs of one time.
    """

    init_sample: Callable[[PRNGKeyArray], Particle]
    propagate_sample: Callable[[PRNGKeyArray, Particle, TimeInputs], Particle]
    log_potential: Callable[[Particle, Particle, TimeInputs], Float[Array, ""]]
    model_inputs: TimeInputs


def bootstrap(program: StateSpaceModel, sampler: Sampler | Step | None = None) -> FeynmanKac:
    """Feynman-Kac model of the bootstrap filter: M = p(x' | c) and G = p(y | x').

    The transition may be any distribution that can be sampled. The likelihood may be any with a `log_prob`.

    Args:
        program: state-space model, ``ndda.program.StateSpaceModel(model, (y,))``.
        sampler: sampler of a diffusion's draws, or a bare step such as `ndda.diffusion.DDIM()`; None for the
            transition's own.

    Raises:
        ValueError: the program cannot be filtered; the message names the site.
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
    sampler: Sampler | Step | None = None,
) -> FeynmanKac:
    """Feynman-Kac model of guided draws: M draws from p(x' | c, y), and G estimates p(y | c).

    The draw and the weight are those of `FAAPF`, but a particle is weighed after it moves, and not before.

    Args:
        program: state-space model, ``ndda.program.StateSpaceModel(model, (y,))``, with a diffusion or a Gaussian as its
            transition.
        weight: estimate of log p(y | c); None for `Dirac()` with a diffusion, and `Moment()` with a Gaussian
            transition.
        guidance: guidance of a diffusion; None for `MMPS()`.
        sampler: sampler of a diffusion's draws, or a bare step such as `ndda.diffusion.DDIM()`; None for the
            transition's own.

    Raises:
        ValueError: the program cannot be filtered, or its transition or likelihood cannot be guided; the message names
            the site.
    """
    program.check(needs_dynamics=True)
    if weight is None:
        weight = Moment() if program.structure.emulator is None else Dirac()
    guide = MMPS() if guidance is None else guidance

    def propagate_sample(rng_key: PRNGKeyArray, particle: Particle, inputs: TimeInputs) -> Particle:
        dynamics = program.transition(particle.carry, inputs, sampler)
        x, _ = dynamics.conditional_draw(rng_key, program.likelihood(particle.carry, inputs), guide)
        return Particle(program.advance(x, particle.carry, inputs), x)

    def log_potential(before: Particle, particle: Particle, inputs: TimeInputs) -> Array:
        dynamics = program.transition(before.carry, inputs, sampler)
        return weight(dynamics, program.likelihood(before.carry, inputs))[0]

    return FeynmanKac(_init_sample(program), propagate_sample, log_potential, program.time_inputs())


def _init_sample(program: StateSpaceModel) -> Callable[[PRNGKeyArray], Particle]:
    """Build the function that draws a particle before the first time."""

    def latent_shape() -> Array:
        call = program.call(jax.random.key(0))
        return jnp.zeros(program.sites(call.init, call.first_inputs()).latent[program.structure.latent_name].shape())

    x = jax.eval_shape(latent_shape)

    def init_sample(rng_key: PRNGKeyArray) -> Particle:
        return Particle(program.initial(rng_key), jnp.full(x.shape, jnp.nan, x.dtype))

    return init_sample
