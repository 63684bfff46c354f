"""The global parameters of a program: its unobserved sites outside the scan that the scan's body depends on.

Their prior is a NumPyro program too: the given one with its scan skipped and the sites of its initial state hidden. So
transforms, log-determinants, hierarchical priors and observations of a parameter are NumPyro's own affair. A position
is a vector of all parameters in unconstrained space, transformed by `numpyro.distributions.biject_to`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.infer.util import compute_log_probs, constrain_fn, potential_energy

from numpyro_diffusion_da.program.scan import SkipScan
from numpyro_diffusion_da.program.state_space import StateSpaceModel


class GlobalParameters:
    """The global parameters of a program, as a vector in unconstrained space.

    Args:
        program: at given arguments.

    Raises:
        ValueError: the program has no global parameters, or one that is discrete.
    """

    def __init__(self, program: StateSpaceModel) -> None:
        if not program.structure.needed_names:
            raise ValueError(
                f"the scan of '{program.structure.name}' uses no unobserved site outside it, so there is no parameter to infer; "
                "filter it with ndda.Filter."
            )
        self.program = program
        self.names = program.structure.global_names
        shapes = jax.eval_shape(self._draw, jax.random.key(0))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        flat, self._unravel = ravel_pytree(zeros)
        self.size = flat.size

    def at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GlobalParameters:
        """The same parameters at other arguments of the program (tracers, say)."""
        other = object.__new__(GlobalParameters)
        other.__dict__.update(self.__dict__)
        other.program = self.program.at(args, kwargs)
        return other

    @property
    def prior_program(self) -> Callable[..., None]:
        """The program of the parameters alone, and of what observes them: what `numpyro.infer` can run."""
        program = self.program
        hidden = set(program.structure.initial_names)

        def anything(site: dict[str, Any]) -> Array | None:
            # Nothing that is left depends on these sites: any value will do.
            return site["fn"].sample(jax.random.key(0)) if site["name"] in hidden else None

        def prior(*args: Any, **kwargs: Any) -> None:
            with handlers.block(hide=list(hidden)), SkipScan(), handlers.substitute(substitute_fn=anything):
                program.model(*args, **kwargs)

        return prior

    def _draw(self, rng_key: PRNGKeyArray) -> dict[str, Array]:
        program = self.program
        seeded = handlers.seed(self.prior_program, rng_key)
        sites = handlers.trace(seeded).get_trace(*program.args, **program.kwargs)
        unconstrained = {}
        for name in self.names:
            support = sites[name]["fn"].support
            if support.is_discrete:
                raise ValueError(
                    f"site '{name}' of '{program.structure.name}' is discrete; a random walk cannot move it: "
                    "condition on it, and compare the log-evidences of its values."
                )
            unconstrained[name] = dist.biject_to(support).inv(sites[name]["value"])
        return unconstrained

    def draw(self, rng_key: PRNGKeyArray) -> Float[Array, " d"]:
        """A position from the prior."""
        return ravel_pytree(self._draw(rng_key))[0]

    def values(self, position: Float[Array, " d"]) -> dict[str, Array]:
        """The parameters, by site, in their own space."""
        program = self.program
        prior = handlers.seed(self.prior_program, jax.random.key(0))  # never drawn from: every site is given
        sites = constrain_fn(prior, program.args, program.kwargs, self._unravel(position))
        return {name: sites[name] for name in self.names}

    def log_prior(self, position: Float[Array, " d"]) -> Float[Array, ""]:
        """log p(parameters) + log p(what observes them outside the scan) + log |det J| of the transforms."""
        program = self.program
        return -potential_energy(self.prior_program, program.args, program.kwargs, self._unravel(position))

    def log_outside(self, position: Float[Array, " d"]) -> Float[Array, ""]:
        """log p of what is observed outside the scan, given the parameters; 0 where nothing is."""
        program = self.program
        log_probs, _ = compute_log_probs(self.prior_program, program.args, program.kwargs, self.values(position))
        return jnp.asarray(sum((log_probs[name] for name in program.structure.outside_names), start=0.0))

    def filterable(self, position: Float[Array, " d"]) -> StateSpaceModel:
        """The program with its parameters known."""
        return self.program.given(self.values(position))

    def placeholder(self) -> StateSpaceModel:
        """The program with its parameters known to be anything: for its structure."""
        shapes = jax.eval_shape(self.values, jax.ShapeDtypeStruct((self.size,), jnp.zeros(()).dtype))
        return self.program.given(jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes))
