"""Pretrained emulators as NumPyro distributions, so that a transition is one line of a program.

NumPyro's `scan` stacks all data fields of a distribution over time, and network parameters must not be among them. The
prior is therefore held behind one handle that is hashed by identity. Only values that change over time, the previous
state and the inputs, are data fields.
"""

from __future__ import annotations

import abc
import copy
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.util import is_prng_key

from numpyro_diffusion_da.arguments import require, require_count
from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.density import ProbabilityFlow
from numpyro_diffusion_da.diffusion.guidance import MMPS, Guidance
from numpyro_diffusion_da.diffusion.prior import Conditioning, DiffusionPrior, EmulatorPrior, OnePassPrior
from numpyro_diffusion_da.diffusion.sampler import Sampler, as_sampler
from numpyro_diffusion_da.diffusion.steps import Step
from numpyro_diffusion_da.observation.likelihood import Likelihood
from numpyro_diffusion_da.transition.base import DrawRecord
from numpyro_diffusion_da.transition.diffusion import DiffusionDynamics
from numpyro_diffusion_da.transition.one_pass import OnePassDynamics


class StaticByIdentity:
    """Holder of static values, hashed and compared by identity, so that `jit` and `scan` can compare distributions.

    Args:
        **values: the values, by name.
    """

    def __init__(self, **values: Any) -> None:
        self.values = values

    def __hash__(self) -> int:
        return hash(tuple(id(v) for v in self.values.values()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StaticByIdentity) or self.values.keys() != other.values.keys():
            return False
        return all(v is other.values[k] for k, v in self.values.items())


DEFAULT_SAMPLER = Sampler()
"""Sampler that a `DiffusionTransition` uses by default."""


class EmulatorTransition(dist.Distribution):
    """Base class of the transitions p(x' | x) of pretrained emulators; it holds the prior, the states and the inputs.

    The batch shape is the shape of the leading axes of `state`. The event shape is `prior.layout.shape`, the shape of
    one state.

    Args:
        prior: the emulator.
        state: previous state, shape (..., *prior.layout.shape), or a pytree of several past states, as the prior needs.
        inputs: forcings and other inputs of the prior, a pytree whose leaves have the batch shape as leading axes; None
            if the prior takes none.
        settings: everything else that does not change over time, by name.
        validate_args: whether NumPyro checks the arguments and values; None for NumPyro's default.

    Raises:
        ValueError: a state does not end in the shape `prior.layout.shape`, or states have different batch shapes.
    """

    pytree_data_fields: tuple[str, ...] = ("state", "inputs")
    pytree_aux_fields: tuple[str, ...] = ("_handle",)
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        prior: EmulatorPrior,
        state: PyTree,
        inputs: PyTree,
        settings: dict[str, Any],
        validate_args: bool | None = None,
    ) -> None:
        self.state = jax.tree.map(jnp.asarray, state)
        self.inputs = jax.tree.map(jnp.asarray, inputs)
        self._handle = StaticByIdentity(prior=prior, **settings)
        batch_shape = prior.check_state(self.state)
        super().__init__(batch_shape, prior.layout.shape, validate_args=validate_args)

    @property
    def prior(self) -> Any:
        """Prior of the transition."""
        return self._handle.values["prior"]

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """Support of the distribution, all real states; it is not checked, because a check costs too much."""
        return constraints.dependent(is_discrete=False, event_dim=self.event_dim)

    @abc.abstractmethod
    def dynamics_given(self, conditioning: Conditioning) -> Any:
        """Return the dynamics p(x' | c) for the conditioning of one state.

        Args:
            conditioning: return value of `prior.condition`.
        """

    def dynamics(self, conditioning: Conditioning | None = None) -> Any:
        """Return the dynamics p(x' | x) of this distribution, which must not have batch axes.

        Args:
            conditioning: return value of `conditioning`, if it is known; None computes it.

        Raises:
            ValueError: the distribution has batch axes, or the prior does not take the inputs.
        """
        return self.dynamics_given(self.conditioning() if conditioning is None else conditioning)

    def conditioning_passes(self) -> NetworkPasses:
        """Return the network passes of one call of `conditioning`."""
        return NetworkPasses.of(conditioning=self.prior.conditioning_passes)

    def conditioning(self) -> Conditioning:
        """Return the prior's conditioning on the state of this distribution, which must not have batch axes.

        Raises:
            ValueError: the distribution has batch axes, or the prior does not take the inputs.
        """
        if self.batch_shape != ():
            raise ValueError(
                f"this {type(self).__name__} has batch shape {self.batch_shape}, but one state is expected; "
                "give a state without batch axes."
            )
        return self.prior.condition(self.state, self.inputs)

    def _map(self, fn: Any, *args: Array) -> Any:
        """Call `fn(*args, dynamics)` for each batch element.

        The batch axes are flattened to one, which is the leading axis of `args` and of the result.
        """
        count = int(jnp.size(jnp.zeros(self.batch_shape)))
        flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[len(self.batch_shape) :]), (self.state, self.inputs))
        over_batch = jax.vmap(lambda given, *a: fn(*a, self.dynamics_given(self.prior.condition(*given))))
        return over_batch(flat, *args)

    @property
    def mean(self) -> Float[Array, ...]:
        """Mean E[x' | x], shape batch_shape + event_shape, from one network pass.

        For a diffusion it is taken at the highest noise level (Savary et al. 2026, arXiv 2605.20028, Theorem A.1). For
        an emulator of one pass it is the state made without noise, which is the mean if it is linear in the noise.
        """
        means = self._map(lambda dynamics: dynamics.moments().mean)
        return means.reshape(self.batch_shape + self.event_shape)

    def sample_with_intermediates(
        self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Float[Array, ...], list[DrawRecord]]:
        """Draw states, and record the cost of each draw.

        Args:
            key: random key.
            sample_shape: leading shape of the draws.

        Returns:
            (draws, shape sample_shape + batch_shape + event_shape; list of one `DrawRecord` with network passes and
            solver residual, each of shape sample_shape + batch_shape).
        """
        return self._draw(key, sample_shape, lambda key, dynamics: dynamics.draw(key))

    def _draw(self, key: PRNGKeyArray, sample_shape: tuple[int, ...], draw: Any) -> tuple[Array, list[DrawRecord]]:
        """Draw states with `draw(key, dynamics)` for all samples and batch elements; return (states, [record])."""
        leading = sample_shape + self.batch_shape
        batch = int(jnp.size(jnp.zeros(self.batch_shape)))
        number = int(jnp.size(jnp.zeros(sample_shape)))
        keys = jax.random.split(key, (number, batch))
        x, record = jax.vmap(lambda k: self._map(draw, k))(keys)
        record = record._replace(passes=record.passes.plus(self.conditioning_passes()))
        record = jax.tree.map(lambda v: v.reshape(leading), record)
        return x.reshape(leading + self.event_shape), [record]

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, ...]:
        """Draw states of shape sample_shape + batch_shape + event_shape.

        Args:
            key: random key.
            sample_shape: leading shape of the draws.
        """
        assert is_prng_key(key)
        return self.sample_with_intermediates(key, sample_shape)[0]


class DiffusionTransition(EmulatorTransition):
    """Transition p(x' | x) of a diffusion prior, as a distribution for NumPyro programs.

    It can be sampled, and its mean costs one network pass. A program that contains it is meant to be filtered, for
    example by `ndda.Filter`. By default there is no density, because a density costs about a hundred
    forward passes, and by default 24 Jacobian-vector products for each component of the state; the argument `density`
    provides it.

    The batch shape is the shape of the leading axes of `state`. The event shape is `prior.layout.shape`, the shape of
    one state. Units are those of the prior's layout.

    Args:
        prior: diffusion prior.
        state: previous state, shape (..., *prior.layout.shape), or a pytree of several past states, as the prior needs.
        inputs: forcings and other inputs of the prior, a pytree whose leaves have the batch shape as leading axes; None
            if the prior takes none.
        sampler: sampler of the reverse diffusion, or a bare step such as `ndda.diffusion.DDIM()`; None for 16 levels of
            DPM-Solver++(2M).
        density: computation of `log_prob`, for example `ndda.diffusion.ProbabilityFlow()`. With None, `log_prob`
            raises.
        validate_args: whether NumPyro checks the arguments and values; None for NumPyro's default.

    Raises:
        ValueError: a state does not end in the shape `prior.layout.shape`, or states have different batch shapes; when
            used, the prior does not take these inputs.
        TypeError: `prior`, `sampler` or `density` is of the wrong kind.
    """

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
        if isinstance(prior, OnePassPrior):
            raise TypeError(
                f"DiffusionTransition got prior={type(prior).__name__}(...), which makes a state in one pass and has "
                "no denoiser; give it to ndda.OnePassTransition."
            )
        require(prior, DiffusionPrior, "DiffusionTransition", "prior", 'ndda.load_prior("lorenz96")')
        sampler = DEFAULT_SAMPLER if sampler is None else as_sampler(sampler, "DiffusionTransition")
        if density is not None:
            require(density, ProbabilityFlow, "DiffusionTransition", "density", "ndda.diffusion.ProbabilityFlow()")
        super().__init__(prior, state, inputs, {"sampler": sampler, "density": density}, validate_args)

    @property
    def sampler(self) -> Sampler:
        """Sampler of the reverse diffusion."""
        return self._handle.values["sampler"]

    @property
    def density(self) -> ProbabilityFlow | None:
        """Computation of `log_prob`; None if there is none."""
        return self._handle.values["density"]

    def dynamics_given(self, conditioning: Conditioning) -> DiffusionDynamics:
        """Return the dynamics p(x' | c) for the conditioning of one state.

        Args:
            conditioning: return value of `prior.condition`.
        """
        return DiffusionDynamics(self.prior, conditioning, self.sampler)

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log-density log p(x' | x) of states, by the computation given as `density`.

        Args:
            value: states x', shape (..., *event_shape); leading axes broadcast with the batch shape.
            intermediates: not used; NumPyro passes it.

        Returns:
            Log-density, in the shape to which the leading axes broadcast.

        Raises:
            NotImplementedError: the transition was made without `density`, or the covariance of the prior's noise has
                no inverse.
            RuntimeError: a component of the prior's scale is zero.
        """
        density = self.density
        if density is None:
            raise NotImplementedError(self._without_density())
        value = jnp.asarray(value)
        leading = jnp.broadcast_shapes(value.shape[: value.ndim - self.event_dim], self.batch_shape)
        given = (self.state, self.inputs, value)
        keep = (len(self.batch_shape), len(self.batch_shape), value.ndim - self.event_dim)

        # NumPyro broadcasts the value with the batch shape. Here every pair of state and value needs its own network
        # passes, so both are expanded to the common leading shape and flattened for one vmap.
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
        """Return the message of the error that `log_prob` raises without `density`."""
        return (
            f"a {type(self).__name__} has no density; filter the program with "
            "ndda.Filter(ndda.FAAPF(model), ...), leave the site out of the density with .mask(False), or give "
            "DiffusionTransition(..., density=ndda.diffusion.ProbabilityFlow()), which costs about "
            "a hundred forward passes and many more Jacobian-vector products."
        )

    def conditioned(self, likelihood: Likelihood, guidance: Guidance | None = None) -> ConditionedTransition:
        """Return the distribution p(x' | x, y) given observations y of x', which is sampled by guided diffusion.

        Args:
            likelihood: likelihood of the observations, the same for all batch elements.
            guidance: guidance of the reverse diffusion; None for `MMPS()`.
        """
        return ConditionedTransition(self, likelihood, MMPS() if guidance is None else guidance)


class ConditionedTransition(DiffusionTransition):
    """Distribution p(x' | x, y) of a `DiffusionTransition` given observations y of x', sampled by guided diffusion.

    `DiffusionTransition.conditioned` makes it. It has neither a mean nor a density.

    Args:
        base: transition p(x' | x).
        likelihood: likelihood of the observations, the same for all batch elements.
        guidance: guidance of the reverse diffusion.
    """

    pytree_data_fields: tuple[str, ...] = ()
    pytree_aux_fields: tuple[str, ...] = ("_guide",)

    def __init__(self, base: DiffusionTransition, likelihood: Likelihood, guidance: Guidance) -> None:
        self._guide = StaticByIdentity(likelihood=likelihood, guidance=guidance)
        super().__init__(base.prior, base.state, base.inputs, base.sampler)

    def sample_with_intermediates(
        self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Float[Array, ...], list[DrawRecord]]:
        """Draw guided states, and record the cost of each draw.

        Args:
            key: random key.
            sample_shape: leading shape of the draws.

        Returns:
            (draws, shape sample_shape + batch_shape + event_shape; list of one `DrawRecord` with network passes and
            solver residual, each of shape sample_shape + batch_shape).
        """
        likelihood, guidance = self._guide.values["likelihood"], self._guide.values["guidance"]
        return self._draw(key, sample_shape, lambda key, dynamics: dynamics.conditional_draw(key, likelihood, guidance))

    @property
    def mean(self) -> Float[Array, ...]:
        """Mean of the distribution, which is not available.

        Raises:
            NotImplementedError: always; average samples instead.
        """
        raise NotImplementedError("a ConditionedTransition has no mean in closed form; average samples of it.")

    def _without_density(self) -> str:
        """Return the message of the error that `log_prob` always raises."""
        return (
            "a ConditionedTransition has no density; filter the program with ndda.Filter(ndda.FAAPF(model), "
            "...), or leave the site out of the density with .mask(False)."
        )


class OnePassTransition(EmulatorTransition):
    """Transition p(x' | x) of an emulator that makes the next state from noise in one pass, for NumPyro programs.

    The next state is x' = f(x, e) with e ~ N(0, I). It can be sampled, its mean costs one network pass, and filters can
    guide its noise by observations (`transition.OnePassDynamics`). It has no density.

    The batch shape is the shape of the leading axes of `state`. The event shape is `prior.layout.shape`, the shape of
    one state. Units are those of the prior's layout.

    Args:
        prior: emulator of one pass, such as `ndda.NoiseConditionedPrior`.
        state: previous state, shape (..., *prior.layout.shape), or a pytree of several past states, as the prior needs.
        inputs: forcings and other inputs of the prior, a pytree whose leaves have the batch shape as leading axes; None
            if the prior takes none.
        iterations: number of times that a guided draw linearizes the emulator, 1 or more. One is exact if the emulator
            is linear in its noise, and the observations in the state.
        validate_args: whether NumPyro checks the arguments and values; None for NumPyro's default.

    Raises:
        ValueError: a state does not end in the shape `prior.layout.shape`, states have different batch shapes, or
            `iterations` is less than 1; when used, the prior does not take these inputs.
        TypeError: `prior` or `iterations` is of the wrong kind.
    """

    def __init__(
        self,
        prior: OnePassPrior,
        state: PyTree,
        inputs: PyTree = None,
        *,
        iterations: int = 2,
        validate_args: bool | None = None,
    ) -> None:
        if isinstance(prior, DiffusionPrior):
            raise TypeError(
                f"OnePassTransition got prior={type(prior).__name__}(...), which is a diffusion; give it to "
                "ndda.DiffusionTransition."
            )
        require(prior, OnePassPrior, "OnePassTransition", "prior", "ndda.NoiseConditionedPrior(...)")
        require_count(iterations, "OnePassTransition", "iterations")
        super().__init__(prior, state, inputs, {"iterations": iterations}, validate_args)

    @property
    def iterations(self) -> int:
        """Number of times that a guided draw linearizes the emulator."""
        return self._handle.values["iterations"]

    def dynamics_given(self, conditioning: Conditioning) -> OnePassDynamics:
        """Return the dynamics p(x' | c) for the conditioning of one state.

        Args:
            conditioning: return value of `prior.condition`.
        """
        return OnePassDynamics(self.prior, conditioning, self.iterations)

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log-density of the distribution, which is not available.

        Raises:
            NotImplementedError: always; the message says what to do.
        """
        raise NotImplementedError(
            "a OnePassTransition has no density, because the noise has fewer dimensions than the state or is not an "
            "invertible function of it; filter the program with ndda.Filter(ndda.FAAPF(model), ...), or leave the site "
            "out of the density with .mask(False)."
        )


@promote_batch_shape.register
def _promote_batch_shape_emulator(d: EmulatorTransition) -> EmulatorTransition:
    """Recompute the batch shape after NumPyro's scan has stacked the previous states over time."""
    promoted = copy.copy(d)
    promoted._batch_shape = d.prior.check_state(d.state)
    return promoted
