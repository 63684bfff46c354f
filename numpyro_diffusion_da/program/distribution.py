"""A diffusion prior as a NumPyro distribution: one line of a program.

The prior travels behind one identity-hashed handle: NumPyro's `scan` stacks every data field of a distribution over
time, and network parameters must not be among them. What varies (the previous state, inputs) are data fields.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.util import is_prng_key

from numpyro_diffusion_da.arguments import require
from numpyro_diffusion_da.diffusion.density import ProbabilityFlow
from numpyro_diffusion_da.diffusion.guidance import MMPS, Guidance
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.diffusion.sampler import Sampler, as_sampler
from numpyro_diffusion_da.diffusion.steps import Step
from numpyro_diffusion_da.observation.likelihood import Likelihood
from numpyro_diffusion_da.transition.base import DrawRecord
from numpyro_diffusion_da.transition.diffusion import DiffusionDynamics


class StaticByIdentity:
    """Holds static values and compares by the identity of each: what jit and scan may use as a key."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def __hash__(self) -> int:
        return hash(tuple(id(v) for v in self.values.values()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StaticByIdentity) or self.values.keys() != other.values.keys():
            return False
        return all(v is other.values[k] for k, v in self.values.items())


DEFAULT_SAMPLER = Sampler()


class DiffusionTransition(dist.Distribution):
    """p(x' | x) of a diffusion prior, for use inside a NumPyro program.

    It can be sampled, and has a mean (one network pass). A program that contains it is filtered
    (`ndda.Filter`); a density costs some hundred network passes, and is there for who asks for it (`density`).

    Args:
        prior: the diffusion prior.
        state: the previous state, shape (..., *prior.layout.shape), or a pytree of several past ones; the leading
            axes are the batch shape.
        inputs: forcings and other inputs of the prior, a pytree whose leaves lead with the batch shape; or None.
        sampler: the reverse diffusion; 16 levels of DPM-Solver++(2M) by default.
        density: how `log_prob` is computed, for example `ndda.diffusion.ProbabilityFlow()`; None: it raises.

    Raises:
        ValueError: a state whose trailing shape is not the prior's.
        TypeError: `prior` is not a diffusion prior.
    """

    pytree_data_fields: tuple[str, ...] = ("state", "inputs")
    pytree_aux_fields: tuple[str, ...] = ("_handle",)
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        prior: DiffusionPrior,
        state: PyTree,
        inputs: PyTree = None,
        sampler: Sampler | Step | None = None,
        *,
        density: ProbabilityFlow | None = None,
        validate_args: bool | None = None,
    ) -> None:
        require(prior, DiffusionPrior, "DiffusionTransition", "prior", 'ndda.load_prior("lorenz96")')
        self.state = jax.tree.map(jnp.asarray, state)
        self.inputs = jax.tree.map(jnp.asarray, inputs)
        sampler = DEFAULT_SAMPLER if sampler is None else as_sampler(sampler, "DiffusionTransition")
        if density is not None:
            require(density, ProbabilityFlow, "DiffusionTransition", "density", "ndda.diffusion.ProbabilityFlow()")
        self._handle = StaticByIdentity(prior=prior, sampler=sampler, density=density)
        batch_shape = prior.check_state(self.state)
        super().__init__(batch_shape, prior.layout.shape, validate_args=validate_args)

    @property
    def prior(self) -> DiffusionPrior:
        """The diffusion prior."""
        return self._handle.values["prior"]

    @property
    def sampler(self) -> Sampler:
        """The reverse diffusion that draws."""
        return self._handle.values["sampler"]

    @property
    def density(self) -> ProbabilityFlow | None:
        """How `log_prob` is computed, or None."""
        return self._handle.values["density"]

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """Any real state; not checked, because a check costs more than a small network's pass."""
        return constraints.dependent(is_discrete=False, event_dim=self.event_dim)

    def step(self, state: PyTree, inputs: PyTree = None) -> DiffusionDynamics:
        """The transition from one state, without batch axes."""
        return DiffusionDynamics(self.prior, self.prior.condition(state, inputs), self.sampler)

    def only_step(self) -> DiffusionDynamics:
        """The transition of this distribution, which must have no batch axes.

        Raises:
            ValueError: it has a batch shape.
        """
        if self.batch_shape != ():
            raise ValueError(f"this DiffusionTransition has the batch shape {self.batch_shape}, expected one state.")
        return self.step(self.state, self.inputs)

    def _map(self, fn: Any, *args: Array) -> Any:
        """`fn(*args, step)` over the flattened batch axes; `args` lead with (number, batch size)."""
        count = int(jnp.size(jnp.zeros(self.batch_shape)))
        flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[len(self.batch_shape) :]), (self.state, self.inputs))
        over_batch = jax.vmap(lambda given, *a: fn(*a, self.step(*given)))
        return over_batch(flat, *args)

    @property
    def mean(self) -> Float[Array, ...]:
        """E[x' | x]: one evaluation at the largest noise level (Savary et al. 2026, Theorem A.1)."""
        means = self._map(lambda step: step.moments().mean)
        return means.reshape(self.batch_shape + self.event_shape)

    def sample_with_intermediates(
        self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Float[Array, ...], list[DrawRecord]]:
        """Draws, and one `DrawRecord` of the same leading shape (network passes, solver residual)."""
        return self._draw(key, sample_shape, lambda key, step: step.draw(key))

    def _draw(self, key: PRNGKeyArray, sample_shape: tuple[int, ...], draw: Any) -> tuple[Array, list[DrawRecord]]:
        leading = sample_shape + self.batch_shape
        batch = int(jnp.size(jnp.zeros(self.batch_shape)))
        number = int(jnp.size(jnp.zeros(sample_shape)))
        keys = jax.random.split(key, (number, batch))
        x, record = jax.vmap(lambda k: self._map(draw, k))(keys)
        record = jax.tree.map(lambda v: v.reshape(leading), record)
        return x.reshape(leading + self.event_shape), [record]

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, ...]:
        """Draws of shape sample_shape + batch_shape + event_shape."""
        assert is_prng_key(key)
        return self.sample_with_intermediates(key, sample_shape)[0]

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """log p(value), by `density`.

        Args:
            value: shape (..., *event_shape), whose leading axes broadcast with the batch shape.
            intermediates: not used.

        Returns:
            The log-density, of the shape that the leading axes broadcast to.

        Raises:
            NotImplementedError: no `density` was asked for, or the prior's noise is singular; says what to do instead.
            RuntimeError: a component of the prior's scale is zero.
        """
        density = self.density
        if density is None:
            raise NotImplementedError(self._without_density())
        value = jnp.asarray(value)
        leading = jnp.broadcast_shapes(value.shape[: value.ndim - self.event_dim], self.batch_shape)
        given = (self.state, self.inputs, value)
        keep = (len(self.batch_shape), len(self.batch_shape), value.ndim - self.event_dim)

        def flat(tree: PyTree, batch_dims: int) -> PyTree:
            return jax.tree.map(
                lambda v: jnp.broadcast_to(
                    v.reshape((1,) * (len(leading) - batch_dims) + v.shape), leading + v.shape[batch_dims:]
                ).reshape(-1, *v.shape[batch_dims:]),
                tree,
            )

        def one(state: PyTree, inputs: PyTree, x: Array) -> Array:
            return density(self.prior, self.prior.condition(state, inputs), x)[0]

        return jax.vmap(one)(*map(flat, given, keep)).reshape(leading)

    def _without_density(self) -> str:
        return (
            f"a {type(self).__name__} has no density: filter the program with "
            "ndda.Filter(ndda.FAAPF(model), ...), take the site out of the density with .mask(False), or pay "
            "for a density with DiffusionTransition(..., density=ndda.diffusion.ProbabilityFlow())."
        )

    def conditioned(self, likelihood: Likelihood, guidance: Guidance | None = None) -> ConditionedTransition:
        """p(x' | x, y), sampled by the score-guided reverse diffusion.

        Args:
            likelihood: the observations of x', the same for every batch element.
            guidance: how the score is guided; `MMPS()` by default.
        """
        return ConditionedTransition(self, likelihood, MMPS() if guidance is None else guidance)


class ConditionedTransition(DiffusionTransition):
    """p(x' | x, y), a `DiffusionTransition` given observations of x'; see `DiffusionTransition.conditioned`."""

    pytree_data_fields: tuple[str, ...] = ()
    pytree_aux_fields: tuple[str, ...] = ("_guide",)

    def __init__(self, base: DiffusionTransition, likelihood: Likelihood, guidance: Guidance) -> None:
        self._guide = StaticByIdentity(likelihood=likelihood, guidance=guidance)
        super().__init__(base.prior, base.state, base.inputs, base.sampler)

    def sample_with_intermediates(
        self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Float[Array, ...], list[DrawRecord]]:
        """Guided draws, and one `DrawRecord` of the same leading shape."""
        likelihood, guidance = self._guide.values["likelihood"], self._guide.values["guidance"]
        return self._draw(key, sample_shape, lambda key, step: step.conditional_draw(key, likelihood, guidance))

    @property
    def mean(self) -> Float[Array, ...]:
        """Not available.

        Raises:
            NotImplementedError: always; average samples instead.
        """
        raise NotImplementedError("a ConditionedTransition has no mean in closed form; average samples of it.")

    def _without_density(self) -> str:
        return (
            "a ConditionedTransition has no density: filter the program with ndda.Filter(ndda.FAAPF(model), "
            "...), or take the site out of the density with .mask(False)."
        )


@promote_batch_shape.register
def _promote_batch_shape_diffusion(d: DiffusionTransition) -> DiffusionTransition:
    """The batch shape after NumPyro's scan has stacked the previous states over time."""
    promoted = copy.copy(d)
    promoted._batch_shape = d.prior.check_state(d.state)
    return promoted
