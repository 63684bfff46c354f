"""Prior from any JAX network of yours, in any of the usual parametrizations.

    prior = ndda.DenoiserPrior(
        model.apply,                                    # (parameters, z_t, index, conditioning) -> output
        ndda.priors.parametrization.Epsilon(VariancePreserving(DiscreteTable(alphas_cumprod))),
        parameters=parameters, layout=(40,), residual=True, scale=increment_scale,
    )

The network predicts the latent z of x' = a + S z. A parametrization says what its output means and turns the output
into the denoiser D(z_s, s) = E[z | z_s]. The module `priors.parametrization` states the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from numpyro_diffusion_da.arguments import real_array, require, require_count, shown
from numpyro_diffusion_da.diffusion.noise import Noise, WhiteNoise
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior, EmulatorPrior
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.priors.parametrization import Denoised, Parametrization

if TYPE_CHECKING:
    import numpyro.distributions as dist

USUAL_RANGE = (2e-2, 80.0)
"""Default (lowest, highest) noise level for a latent of unit variance, before limits of the parametrization."""

CALLABLE = cast(type, Callable)
"""Class of all callables for `arguments.require`; a type checker does not accept `Callable` as a class."""


class _ByIdentity:
    """Holder of a value that is not an array, such as a function; it compares and hashes by identity, as jit needs."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Function(eqx.Module):
    """Callable split into its arrays, which are leaves of the pytree, and a static rest.

    The leaves of a prior must be arrays, because they are checksummed and passed through jit and vmap. An equinox
    module has leaves that are not arrays, such as activation functions.
    """

    arrays: PyTree
    static: _ByIdentity = eqx.field(static=True)

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.arrays, static = eqx.partition(fn, eqx.is_array)
        self.static = _ByIdentity(static)

    def __call__(self, *args: Any) -> Any:
        return eqx.combine(self.arrays, self.static.value)(*args)


class NetworkConditioning(NamedTuple):
    """Quantities of one step that do not depend on the noise level.

    Attributes:
        given: conditioning that the network takes.
        location: location a in the unit of the state, shape of the state.
        scale: diagonal of S in the unit of the state, a scalar or an array that broadcasts to the state.
    """

    given: PyTree
    location: Float[Array, ...]
    scale: Float[Array, ...]


class NetworkPrior(EmulatorPrior):
    """Base class of the priors from a network of yours: its parameters, conditioning, location and scale.

    Args:
        network: the network; its first argument is `parameters`, if they are given.
        layout: a `Layout` of the state, or only the shape of the state.
        parameters: pytree of arrays, the first argument of the network; None for a network without this argument.
        condition: function (state, inputs) -> conditioning, which runs once per step. None uses the state as the
            conditioning, and refuses inputs.
        location: location a in the unit of the state: a number or array that broadcasts to the state, or a function of
            the conditioning; None for 0.
        residual: True uses the previous state as the location: the state, or the last one of a tuple of states.
        scale: diagonal of S in the unit of the state: a number or array that broadcasts to the state, or a function of
            the conditioning.
        climatology: NumPyro distribution of initial states, or None.
        conditioning_passes: number of network passes that `condition` makes.

    Attributes:
        conditioner: the function `condition`, or None.
        to_location: the location as a function or an array; None if `residual` is True.
        to_scale: the scale as a function or an array.
        initial: the climatology.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the shapes do not match, or both `location` and `residual` are given.
    """

    network: _Function
    parameters: PyTree
    conditioner: _Function | None
    to_location: _Function | Float[Array, ...] | None
    to_scale: _Function | Float[Array, ...]
    layout: Layout = eqx.field(static=True)
    conditioning_passes: int = eqx.field(static=True)
    initial: _ByIdentity = eqx.field(static=True)

    def __init__(
        self,
        network: Callable[..., Any],
        *,
        layout: Layout | int | Sequence[int],
        parameters: PyTree,
        condition: Callable[[PyTree, PyTree], PyTree] | None,
        location: ArrayLike | Callable[[PyTree], ArrayLike] | None,
        residual: bool,
        scale: ArrayLike | Callable[[PyTree], ArrayLike],
        climatology: dist.Distribution | None,
        conditioning_passes: int,
    ) -> None:
        if condition is not None:
            require(condition, CALLABLE, self, "condition", "lambda state, inputs: (state, inputs)")
        if residual and location is not None:
            raise ValueError(
                f"{type(self).__name__} got location= and residual=True, which uses the previous state as the "
                "location; give one of them."
            )
        self.network = _Function(network)
        self.parameters = jax.tree.map(jnp.asarray, parameters)
        for path, leaf in jax.tree_util.tree_flatten_with_path(self.parameters)[0]:
            # Infinite numbers may be masks, but a NaN makes every draw NaN.
            known = jnp.issubdtype(leaf.dtype, jnp.inexact) and not isinstance(leaf, jax.core.Tracer)
            if known and bool(np.isnan(np.asarray(leaf)).any()):
                raise ValueError(
                    f"{type(self).__name__} got parameters with NaN in '{jax.tree_util.keystr(path)}'; give "
                    "parameters of a training that converged."
                )
        self.layout = _layout(layout, type(self).__name__)
        self.conditioner = None if condition is None else _Function(condition)
        if residual:
            self.to_location = None
        else:
            self.to_location = self._broadcast(0.0 if location is None else location, "location")
        self.to_scale = self._broadcast(scale, "scale")
        require_count(conditioning_passes, self, "conditioning_passes", 0)
        self.conditioning_passes = conditioning_passes
        if climatology is not None:
            self._check_climatology(climatology)
        self.initial = _ByIdentity(climatology)

    def _check_climatology(self, climatology: dist.Distribution) -> None:
        """Check that a climatology is a distribution of one state.

        Raises:
            TypeError: it is not a NumPyro distribution.
            ValueError: it has another event shape than the state, or a batch shape.
        """
        import numpyro.distributions as dist

        example = f"dist.Normal(jnp.zeros({self.layout.shape}), 1.0).to_event({len(self.layout.shape)})"
        require(climatology, dist.Distribution, self, "climatology", example)
        if climatology.event_shape != self.layout.shape or climatology.batch_shape != ():
            raise ValueError(
                f"{type(self).__name__} got a climatology with event shape {climatology.event_shape} and batch shape "
                f"{climatology.batch_shape}, but states have the shape {self.layout.shape}; give a distribution of one "
                f"state, for example {example}."
            )

    def _broadcast(self, value: Any, name: str) -> Any:
        """Convert a location or a scale to a function, a scalar, or an array with all axes of the state."""
        if callable(value):
            return _Function(value)
        if not isinstance(value, jax.core.Tracer):
            given = real_array(value, self, name, "1.0")
            if name == "scale" and (given < 0).any():
                raise ValueError(
                    f"{type(self).__name__} got a negative scale; give the diagonal of S, positive numbers."
                )
        return _fit(jnp.asarray(value), self.layout.shape, name)

    def condition(self, state: PyTree, inputs: PyTree = None) -> NetworkConditioning:
        """Compute the conditioning of the network, the location and the scale.

        Args:
            state: previous state in its unit, shape of the state, or a pytree of several previous states.
            inputs: inputs for the function `condition` of the constructor, or None.

        Raises:
            ValueError: `inputs` are given without a function `condition`, a state has another shape, or
                `residual=True` finds no previous state.
        """
        batch_shape = self.check_state(state)
        if batch_shape != ():
            raise ValueError(
                f"condition got a batch of states of shape {batch_shape}, but takes one state of shape "
                f"{self.layout.shape}; use jax.vmap for a batch."
            )
        if self.conditioner is not None:
            given = self.conditioner(state, inputs)
        elif inputs is not None:
            raise ValueError(
                f"{type(self).__name__} got inputs, but no function that takes them; give "
                "condition=lambda state, inputs: (state, inputs), or another conditioning that the network takes."
            )
        else:
            given = state
        dtype = jnp.result_type(*jax.tree.leaves(state), float)
        location = self._last(state) if self.to_location is None else self._at(self.to_location, given, "location")
        location = jnp.broadcast_to(location, self.layout.shape).astype(dtype)
        return NetworkConditioning(given, location, self._at(self.to_scale, given, "scale").astype(dtype))

    def _last(self, state: PyTree) -> Array:
        """The previous state: the state itself, or the last one of a tuple of states."""
        last = state[-1] if isinstance(state, (tuple, list)) else state
        if not eqx.is_array_like(last):
            raise ValueError(
                f"residual=True got a {type(last).__name__}, but needs a state or a tuple of states, whose last is the "
                "location; leave residual out and give location=, a function of the conditioning."
            )
        return jnp.asarray(last)

    def _at(self, value: Any, given: PyTree, name: str) -> Array:
        """Value of a location or a scale at a conditioning."""
        return _fit(jnp.asarray(value(given)), self.layout.shape, name) if isinstance(value, _Function) else value

    def _run(self, *arguments: Any, name: str, expected: tuple[int, ...], dtype: jnp.dtype) -> Array:
        """Run the network, and check that it gives one array of the shape of the state.

        Args:
            *arguments: arguments of the network after its parameters.
            name: what the network got, for the message.
            expected: shape of the state.
            dtype: precision of the state, which a sampler keeps even if the network has half precision.

        Raises:
            TypeError: the output of the network is not one array.
            ValueError: the output of the network has another shape than the state.
        """
        output = self.network(*(() if self.parameters is None else (self.parameters,)), *arguments)
        if not eqx.is_array_like(output):
            raise TypeError(
                f"the network gave a {type(output).__name__}, expected one array; pass a function that selects it."
            )
        if jnp.shape(output) != expected:
            raise ValueError(
                f"the network gave an output of shape {jnp.shape(output)} for {name}, expected the shape {expected} of "
                "the state; for a network with a batch axis, pass a function that adds and removes it."
            )
        return jnp.asarray(output).astype(dtype)

    def climatology(self) -> dist.Distribution:
        """Distribution of initial states: the argument `climatology`.

        Raises:
            NotImplementedError: no climatology was given.
        """
        return super().climatology() if self.initial.value is None else self.initial.value


class DenoiserPrior(NetworkPrior, DiffusionPrior):
    """Diffusion prior p(x' | c) from a network of yours: flax, haiku, equinox, or a plain function.

    All methods act on one state, without a batch dimension. For a network that needs a batch dimension, pass a function
    that adds and removes it.

    Args:
        network: function (z_t, index, conditioning) -> output, or (parameters, z_t, index, conditioning) -> output if
            `parameters` are given. z_t and the output have the shape of the state. z_t = alpha z_s and the index
            follow from the parametrization; by default they are z_s = z + s e and the noise level s. Arrays of an
            equinox module become arrays of the prior. A plain function may close over arrays, but no checksum includes
            them.
        parametrization: meaning of the output, from `ndda.priors.parametrization`; by default `Denoised()`, E[z | z_s].
        layout: a `Layout` of the state, or only the shape of the state.
        parameters: pytree of arrays, the first argument of the network; None for a network without this argument.
        condition: function (state, inputs) -> conditioning, which runs once per step. By default the conditioning is
            the state as the program passes it, and inputs are refused.
        location: location a, the state at z = 0, in the unit of the state: a number or array that broadcasts to the
            state, or a function of the conditioning; 0 by default.
        residual: True uses the previous state as the location: the state, or the last one of a tuple of states.
        scale: diagonal of S in the unit of the state: a number or array that broadcasts to the state, or a function of
            the conditioning; 1 by default.
        noise: noise of the forward process; white noise by default.
        noise_range: (lowest, highest) noise level that the network was trained for, in the unit of z. A
            parametrization without limits, such as the default `Denoised()`, needs this argument. Otherwise the default
            is 0.02 to 80, cut to the limits of the parametrization.
        climatology: NumPyro distribution of initial states, or None.
        conditioning_passes: number of network passes that `condition` makes.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the shapes do not match, the noise range is missing or beyond the limits of the parametrization, or
            both `location` and `residual` are given.
    """

    parametrization: Parametrization
    noise: Noise
    noise_range: tuple[float, float] = eqx.field(static=True)

    def __init__(
        self,
        network: Callable[..., Any],
        parametrization: Parametrization | None = None,
        *,
        layout: Layout | int | Sequence[int],
        parameters: PyTree = None,
        condition: Callable[[PyTree, PyTree], PyTree] | None = None,
        location: ArrayLike | Callable[[PyTree], ArrayLike] | None = None,
        residual: bool = False,
        scale: ArrayLike | Callable[[PyTree], ArrayLike] = 1.0,
        noise: Noise | None = None,
        noise_range: tuple[float, float] | None = None,
        climatology: dist.Distribution | None = None,
        conditioning_passes: int = 0,
    ) -> None:
        require(network, CALLABLE, self, "network", "lambda z_s, noise_level, conditioning: z_s")
        parametrization = Denoised() if parametrization is None else parametrization
        require(parametrization, Parametrization, self, "parametrization", "ndda.priors.parametrization.Velocity()")
        noise = WhiteNoise() if noise is None else noise
        require(noise, Noise, self, "noise", "ndda.diffusion.WhiteNoise()")
        super().__init__(
            network,
            layout=layout,
            parameters=parameters,
            condition=condition,
            location=location,
            residual=residual,
            scale=scale,
            climatology=climatology,
            conditioning_passes=conditioning_passes,
        )
        self.parametrization = parametrization
        self.noise = noise
        self.noise_range = _noise_range(parametrization, noise_range)

    def denoise(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], conditioning: NetworkConditioning
    ) -> Float[Array, ...]:
        """Denoiser D(z_s, s; c) = E[z | z_s, c], by one call of the network.

        Args:
            z_s: noised latent, shape of the state.
            noise_level: noise level s > 0.
            conditioning: result of `condition` for the previous state.

        Returns:
            Denoised latent, shape of the state.

        Raises:
            TypeError: the output of the network is not one array.
            ValueError: the output of the network has another shape than the state.
        """

        def network(z_t: Array, index: Array) -> Array:
            name = f"a latent of shape {z_s.shape}"
            return self._run(z_t, index, conditioning.given, name=name, expected=z_s.shape, dtype=z_s.dtype)

        return self.parametrization(network, z_s, jnp.asarray(noise_level, z_s.dtype), self.noise)

    def location(self, conditioning: NetworkConditioning) -> Float[Array, ...]:
        """Location a in the unit of the state: the argument `location`, or the previous state if `residual` is True."""
        return conditioning.location

    def scale(self, conditioning: NetworkConditioning) -> Float[Array, ...]:
        """Diagonal of S in the unit of the state: the argument `scale`, or its value at the conditioning."""
        return conditioning.scale

    def provenance(self) -> dict[str, str]:
        """Class of the prior, checksum of its arrays and class of the parametrization, for the record of a result."""
        return {**super().provenance(), "parametrization": type(self.parametrization).__name__}


def _fit(value: Array, shape: tuple[int, ...], name: str) -> Array:
    """Check that an array broadcasts to a shape, and add leading axes, because the library does not promote ranks.

    A scalar stays a scalar.

    Raises:
        ValueError: the array does not broadcast to the shape.
    """
    try:
        fits = jnp.broadcast_shapes(value.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} has shape {value.shape}, which does not broadcast to the state's shape {shape}; give a number or "
            "an array of the shape of the state."
        )
    if value.ndim in (0, len(shape)):
        return value
    return value.reshape((1,) * (len(shape) - value.ndim) + value.shape)


def _layout(layout: Any, owner: str) -> Layout:
    """Layout of a state, from a layout or from the shape of the state.

    Args:
        layout: a layout, or a shape.
        owner: class that got it, for messages.

    Raises:
        TypeError: the argument is neither a layout nor a shape of positive integers.
    """
    require(layout, (Layout, int, Sequence), owner, "layout", "(40,)")
    if isinstance(layout, Layout):
        return layout
    shape = (layout,) if isinstance(layout, int) else tuple(layout)
    if not all(isinstance(n, int) and n > 0 for n in shape):
        raise TypeError(
            f"{owner} got layout={shown(layout)}; give an ndda.Layout, or the shape of a state as positive integers."
        )
    return Layout(shape, ("component",) if len(shape) == 1 else tuple(f"axis_{i}" for i in range(len(shape))))


def _noise_range(parametrization: Parametrization, given: tuple[float, float] | None) -> tuple[float, float]:
    """Noise range of a prior: the given one if it is within the limits of the parametrization, or the default.

    Raises:
        TypeError: the given range is not a pair.
        ValueError: the range is missing, beyond the limits, or not two increasing positive levels.
    """
    limits, name = parametrization.limits, type(parametrization).__name__
    if given is None:
        if limits is None:
            raise ValueError(
                f"the parametrization {name} has no limits here, so the noise levels that the network was trained for "
                "are unknown; give noise_range=(lowest, highest), for example (0.02, 80.0) for a latent of unit "
                "variance."
            )
        lowest, highest = max(USUAL_RANGE[0], limits[0]), min(USUAL_RANGE[1], limits[1])
    else:
        require(given, (tuple, list, np.ndarray), "DenoiserPrior", "noise_range", "(0.02, 80.0)")
        if len(given) != 2:
            raise ValueError(f"noise_range has {len(given)} values; give two levels, (lowest, highest).")
        lowest, highest = real_array(given, "DenoiserPrior", "noise_range", "(0.02, 80.0)").tolist()
        # Allow for rounding in limits that were copied from elsewhere.
        low, high = (0.0, math.inf) if limits is None else (limits[0] * (1 - 1e-5), limits[1] * (1 + 1e-5))
        if lowest < low or highest > high:
            raise ValueError(
                f"noise_range is {given}, but the parametrization {name} is limited to the levels {low:.4g} to "
                f"{high:.4g}; give levels within these limits."
            )
    if not 0.0 < lowest < highest < math.inf:
        raise ValueError(f"noise_range is {(lowest, highest)}; give two levels with 0 < lowest < highest.")
    return lowest, highest
