"""Global parameters of a program: the unobserved sites outside its scan that the scan's body depends on.

The prior of the parameters is a NumPyro program too: the given program without its scan and without the sites of its
initial state. NumPyro therefore takes care of transforms, log-determinants, hierarchical priors and observations of a
parameter. A position is the vector of all parameters in unconstrained space, by `numpyro.distributions.biject_to`.
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
    """Global parameters of a program, as a vector of length d in unconstrained space.

    Args:
        program: state-space model at given arguments of the program.

    Attributes:
        program: the state-space model.
        names: names of the parameters' sites, in the program's order.
        size: d, the number of unconstrained values.

    Raises:
        ValueError: the program has no global parameters, or a discrete one.
    """

    def __init__(self, program: StateSpaceModel) -> None:
        if not program.structure.needed_names:
            for leaf, sites in program.structure.parameters_in_carry.items():
                raise ValueError(
                    f"the scan of '{program.structure.name}' carries {sites} unchanged as carry{leaf}, and only values "
                    "that its body reads from outside can be inferred; leave it out of the carry, and use it in the "
                    "body as a variable of the program around it."
                )
            raise ValueError(
                f"the scan of '{program.structure.name}' uses no unobserved site outside it, so there is no parameter "
                "to infer; filter the program with ndda.Filter."
            )
        self.program = program
        self.names = program.structure.global_names
        shapes = jax.eval_shape(self._draw, jax.random.key(0))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        flat, self._unravel = ravel_pytree(zeros)
        self.size = flat.size

    def at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GlobalParameters:
        """Return the same parameters at other arguments of the program.

        Args:
            args: positional arguments of the program, of the same shapes; they may be tracers.
            kwargs: keyword arguments of the program, of the same shapes; they may be tracers.
        """
        other = object.__new__(GlobalParameters)
        other.__dict__.update(self.__dict__)
        other.program = self.program.at(args, kwargs)
        return other

    @property
    def prior_program(self) -> Callable[..., None]:
        """NumPyro program of the parameters' prior, with the observations of them outside the scan.

        It takes the arguments of the program, and `numpyro.infer` can run it.
        """
        program = self.program
        hidden = set(program.structure.initial_names)

        def anything(site: dict[str, Any]) -> Array | None:
            # No remaining site depends on these sites, so any value will do.
            return site["fn"].sample(jax.random.key(0)) if site["name"] in hidden else None

        def prior(*args: Any, **kwargs: Any) -> None:
            with handlers.block(hide=list(hidden)), SkipScan(), handlers.substitute(substitute_fn=anything):
                program.model(*args, **kwargs)

        return prior

    def _draw(self, rng_key: PRNGKeyArray) -> dict[str, Array]:
        """Draw the parameters from the prior, and return them in unconstrained space, by site.

        Raises:
            ValueError: a parameter is discrete.
        """
        program = self.program
        seeded = handlers.seed(self.prior_program, rng_key)
        sites = handlers.trace(seeded).get_trace(*program.args, **program.kwargs)
        unconstrained = {}
        for name in self.names:
            support = sites[name]["fn"].support
            if support.is_discrete:
                raise ValueError(
                    f"site '{name}' of '{program.structure.name}' is discrete, and a random walk cannot move it; "
                    "condition on each of its values, and compare their log-evidences."
                )
            unconstrained[name] = dist.biject_to(support).inv(sites[name]["value"])
        return unconstrained

    def draw(self, rng_key: PRNGKeyArray) -> Float[Array, " d"]:
        """Draw a position, shape (d,), from the prior."""
        return ravel_pytree(self._draw(rng_key))[0]

    def values(self, position: Float[Array, " d"]) -> dict[str, Array]:
        """Convert a position, shape (d,), to the values of the parameters in their own space, by site."""
        program = self.program
        prior = handlers.seed(self.prior_program, jax.random.key(0))  # has no effect, because every site has a value
        sites = constrain_fn(prior, program.args, program.kwargs, self._unravel(position))
        return {name: sites[name] for name in self.names}

    def log_prior(self, position: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-density of the prior at a position, shape (d,), in unconstrained space.

        It is log p(parameters) plus log |det J| of the transforms, plus the log-likelihood of the sites observed
        outside the scan.
        """
        program = self.program
        return -potential_energy(self.prior_program, program.args, program.kwargs, self._unravel(position))

    def log_outside(self, position: Float[Array, " d"]) -> Float[Array, ""]:
        """Log-likelihood of the sites observed outside the scan, at a position, shape (d,); 0 if there are none."""
        program = self.program
        log_probs, _ = compute_log_probs(self.prior_program, program.args, program.kwargs, self.values(position))
        return jnp.asarray(sum((log_probs[name] for name in program.structure.outside_names), start=0.0))

    def filterable(self, position: Float[Array, " d"]) -> StateSpaceModel:
        """State-space model with its parameters fixed at a position, shape (d,), which a filter can run."""
        return self.program.given(self.values(position))

    def placeholder(self) -> StateSpaceModel:
        """State-space model with its parameters fixed at arbitrary values, to look at its structure."""
        shapes = jax.eval_shape(self.values, jax.ShapeDtypeStruct((self.size,), jnp.zeros(()).dtype))
        return self.program.given(jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes))
