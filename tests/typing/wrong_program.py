"""A user's mistakes: mypy names each line that ends in `# wrong`, and no other (tests/test_typing.py)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.observation import Likelihood
from numpyro_diffusion_da.transition import Dynamics, PredictiveWeight


def model(y: Array) -> None:
    """A program; what it contains does not matter here."""


class OnlyTheWeight(PredictiveWeight):
    """A weight that forgets its record."""

    def __call__(self, dynamics: Dynamics, likelihood: Likelihood) -> Array:  # wrong
        return likelihood.log_prob(dynamics.moments().mean)


ndda.FAAPF(model, weight="moment")  # wrong
ndda.FAAPF(model, weight=ndda.Moment)  # wrong
ndda.FAAPF(model, taper=5.0)  # wrong
ndda.EnKF(model, update="sqrt")  # wrong
ndda.EnKF(model, inflation=ndda.Multiplicative(1.05))  # wrong
ndda.Sampler("heun")  # wrong
ndda.MMPS(2)  # wrong
ndda.OnlineFilter(model, num_particles=8)  # wrong
ndda.load_prior("lorenz96", num_sites="forty")  # wrong
ndda.DiffusionTransition("lorenz96", jnp.zeros(40))  # wrong

ndda.Filter(model, num_particles=8)  # wrong
filter = ndda.Filter(ndda.FAAPF(model), num_particles="many")  # wrong
filter.run(0, jnp.zeros((3, 10)))  # wrong
filter.run(jax.random.key(0), jnp.zeros((3, 10)))
print(filter.result.posteriors)  # wrong
filter.to_datatree(lag="all")  # wrong
