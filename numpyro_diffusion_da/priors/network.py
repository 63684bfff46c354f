"""A network that you have, as a prior: any JAX callable, in any of the usual parametrizations.

    prior = ndda.DenoiserPrior(
        model.apply,                                    # (parameters, z_t, index, conditioning) -> output
        ndda.priors.parametrization.Epsilon(VariancePreserving(DiscreteTable(alphas_cumprod))),
        parameters=parameters, layout=(40,), residual=True, scale=increment_scale,
    )

The network predicts the latent z of x' = a + S z; what its output means is a value of `priors.parametrization`, which
turns it into D(z_s, s) with the formulas stated there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from numpyro_diffusion_da.diffusion.noise import Noise, WhiteNoise
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.priors.parametrization import Denoised, Parametrization

if TYPE_CHECKING:
    import numpyro.distributions as dist

USUAL_RANGE = (2e-2, 80.0)
"""Noise levels for a latent of unit variance, cut to what a parametrization knows."""


class _ByIdentity:
    """A value that is no array, such as a function; compares and hashes by identity, so that jit can key on it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Function(eqx.Module):
    """A callable as its arrays, which are leaves, and all the rest of it.

    The leaves of a prior must be arrays: they are checksummed, and passed through jit and vmap. Those of an equinox
    module are not (activation functions).
    """

    arrays: PyTree
    static: _ByIdentity = eqx.field(static=True)

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.arrays, static = eqx.partition(fn, eqx.is_array)
        self.static = _ByIdentity(static)

    def __call__(self, *args: Any) -> Any:
        return eqx.combine(self.arrays, self.static.value)(*args)


class NetworkConditioning(NamedTuple):
    """What one step is conditioned on.

    Attributes:
        given: what the network takes.
        location: a, shape of the state.
        scale: the diagonal of S, a number or of the shape of the state.
    """

    given: PyTree
    location: Float[Array, ...]
    scale: Float[Array, ...]


class DenoiserPrior(DiffusionPrior):
    """p(x' | c) from a network of yours: flax, haiku, equinox, or a plain function.

    Everything acts on one state, without a batch dimension; a network that wants one gets it in a function around it.

    Args:
        network: (z_t, index, conditioning) -> output, or (parameters, z_t, index, conditioning) -> output where
            `parameters` are given. z_t and the output have the shape of the state; z_t = alpha z_s and the index are
            those of the parametrization, for the default z_s = z + s e and the noise level s. Arrays of an equinox
            module become the prior's; arrays that a plain function closes over work, but are in no checksum.
        parametrization: what the output means; `Denoised()`, E[z | z_s], by default.
        parameters: a pytree of arrays, the network's first argument; None for a network that takes none.
        layout: of the state: a `Layout`, or only its shape.
        condition: (state, inputs) -> conditioning, run once a step; by default the state as the program gives it, and
            no inputs.
        location: a, what z = 0 stands for: a number or an array that broadcasts to the state, or a function of the
            conditioning; 0 by default.
        residual: True puts the last state in the place of `location`: the state, or the last of a tuple of states.
        scale: the diagonal of S, in units of the state: a number or an array that broadcasts to the state, or a
            function of the conditioning; 1 by default.
        noise: of the forward process; white by default.
        noise_range: (lowest, highest) level that the network was trained for, in units of z. By default 0.02 to 80,
            cut to what the parametrization knows; it must be given where that knows nothing (`VarianceExploding`).
        climatology: a NumPyro distribution of initial states, or None.
        conditioning_passes: network passes that `condition` makes.

    Raises:
        TypeError: an argument of another kind.
        ValueError: shapes that do not match, no noise range or one beyond the parametrization's, or both a location
            and `residual`.
    """

    network: _Function
    parametrization: Parametrization
    parameters: PyTree
    conditioner: _Function | None
    to_location: _Function | Float[Array, ...] | None
    to_scale: _Function | Float[Array, ...]
    noise: Noise
    noise_range: tuple[float, float] = eqx.field(static=True)
    layout: Layout = eqx.field(static=True)
    conditioning_passes: int = eqx.field(static=True)
    initial: _ByIdentity = eqx.field(static=True)

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
        if not callable(network):
            raise TypeError(f"DenoiserPrior got a network of type {type(network).__name__}; give something to call.")
        if condition is not None and not callable(condition):
            raise TypeError(f"condition is a {type(condition).__name__}; give a function (state, inputs) -> pytree.")
        parametrization = Denoised() if parametrization is None else parametrization
        if not isinstance(parametrization, Parametrization):
            raise TypeError(
                f"DenoiserPrior got the parametrization {parametrization!r}; give a value of ndda.priors.parametrization, "
                "for example ndda.priors.parametrization.Velocity()."
            )
        noise = WhiteNoise() if noise is None else noise
        if not isinstance(noise, Noise):
            raise TypeError(f"DenoiserPrior got noise of type {type(noise).__name__}; give an ndda.diffusion.Noise.")
        if residual and location is not None:
            raise ValueError("DenoiserPrior got a location and residual=True, which is another; give one of them.")
        self.network = _Function(network)
        self.parametrization = parametrization
        self.parameters = jax.tree.map(jnp.asarray, parameters)
        self.layout = _layout(layout)
        self.conditioner = None if condition is None else _Function(condition)
        if residual:
            self.to_location = None
        else:
            self.to_location = self._broadcast(0.0 if location is None else location, "location")
        self.to_scale = self._broadcast(scale, "scale")
        self.noise = noise
        self.noise_range = _noise_range(parametrization, noise_range)
        self.conditioning_passes = conditioning_passes
        if climatology is not None:
            shape = getattr(climatology, "event_shape", None)
            if shape != self.layout.shape or climatology.batch_shape != ():
                raise ValueError(
                    f"climatology is {climatology!r} with the event shape {shape}, but states have the shape "
                    f"{self.layout.shape}; give a distribution of one state (.to_event() makes axes part of it)."
                )
        self.initial = _ByIdentity(climatology)

    def _broadcast(self, value: Any, name: str) -> Any:
        """A number, an array of the shape of the state, or a function."""
        if callable(value):
            return _Function(value)
        return _fit(jnp.asarray(value), self.layout.shape, name)

    def condition(self, state: PyTree, inputs: PyTree = None) -> NetworkConditioning:
        """What the network takes, and where its latent lies: one call of each function given.

        Args:
            state: the previous state, in its own units, or a pytree of several.
            inputs: for the `condition` that was given, or None.

        Raises:
            ValueError: inputs without a `condition` to take them, states of another shape, or for a residual no
                last state.
        """
        if self.check_state(state) != ():
            raise ValueError(f"condition takes one state of shape {self.layout.shape}; use jax.vmap for a batch.")
        if self.conditioner is not None:
            given = self.conditioner(state, inputs)
        elif inputs is not None:
            raise ValueError(
                "DenoiserPrior got inputs, but no function that takes them; give "
                "condition=lambda state, inputs: (state, inputs), or what the network takes."
            )
        else:
            given = state
        dtype = jnp.result_type(*jax.tree.leaves(state), float)
        location = self._last(state) if self.to_location is None else self._at(self.to_location, given, "location")
        location = jnp.broadcast_to(location, self.layout.shape).astype(dtype)
        return NetworkConditioning(given, location, self._at(self.to_scale, given, "scale").astype(dtype))

    def _last(self, state: PyTree) -> Array:
        last = state[-1] if isinstance(state, (tuple, list)) else state
        if not eqx.is_array_like(last):
            raise ValueError(
                f"residual=True takes the state, or the last of a tuple of states, got a {type(last).__name__}; "
                "give location=, a function of the conditioning."
            )
        return jnp.asarray(last)

    def _at(self, value: Any, given: PyTree, name: str) -> Array:
        return _fit(jnp.asarray(value(given)), self.layout.shape, name) if isinstance(value, _Function) else value

    def denoise(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], conditioning: NetworkConditioning
    ) -> Float[Array, ...]:
        """D(z_s, s; c), by one call of the network and its parametrization; shape of the state.

        Raises:
            TypeError: the network gives something else than one array.
            ValueError: the network's output has another shape than the state.
        """

        def network(z_t: Array, index: Array) -> Array:
            arguments = () if self.parameters is None else (self.parameters,)
            output = self.network(*arguments, z_t, index, conditioning.given)
            if not eqx.is_array_like(output):
                raise TypeError(f"the network gave a {type(output).__name__}, expected one array; wrap it.")
            if jnp.shape(output) != z_s.shape:
                raise ValueError(
                    f"the network gave an output of shape {jnp.shape(output)} for a latent of shape {z_s.shape}; they "
                    "must be the same. A network with a batch axis needs a function that adds and removes it."
                )
            # A network of half precision still makes a sampler of the state's own.
            return jnp.asarray(output).astype(z_s.dtype)

        return self.parametrization(network, z_s, jnp.asarray(noise_level, z_s.dtype), self.noise)

    def location(self, conditioning: NetworkConditioning) -> Float[Array, ...]:
        """The location given, or the last state."""
        return conditioning.location

    def scale(self, conditioning: NetworkConditioning) -> Float[Array, ...]:
        """The scale given."""
        return conditioning.scale

    def climatology(self) -> dist.Distribution:
        """The distribution given.

        Raises:
            NotImplementedError: none was given.
        """
        return super().climatology() if self.initial.value is None else self.initial.value

    def provenance(self) -> dict[str, str]:
        """The parametrization beside the class and the checksum of all arrays."""
        return {**super().provenance(), "parametrization": type(self.parametrization).__name__}


def _fit(value: Array, shape: tuple[int, ...], name: str) -> Array:
    """A number as it is; an array at the full shape, because nothing here may lean on rank promotion."""
    try:
        fits = jnp.broadcast_shapes(value.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} has shape {value.shape}, which does not broadcast to the state's {shape}.")
    if value.ndim in (0, len(shape)):
        return value
    return value.reshape((1,) * (len(shape) - value.ndim) + value.shape)


def _layout(layout: Any) -> Layout:
    if isinstance(layout, Layout):
        return layout
    shape = (layout,) if isinstance(layout, int) else tuple(layout)
    if not all(isinstance(n, int) and n > 0 for n in shape):
        raise TypeError(f"layout is {layout!r}; give an ndda.Layout, or the shape of a state as positive integers.")
    return Layout(shape, ("component",) if len(shape) == 1 else tuple(f"axis_{i}" for i in range(len(shape))))


def _noise_range(parametrization: Parametrization, given: tuple[float, float] | None) -> tuple[float, float]:
    limits, name = parametrization.limits, type(parametrization).__name__
    if given is None:
        if limits is None:
            raise ValueError(
                f"{name} on this path does not say which noise levels the network was trained for; give noise_range, "
                "lowest and highest, for example (0.02, 80.0) for a latent of unit variance."
            )
        lowest, highest = max(USUAL_RANGE[0], limits[0]), min(USUAL_RANGE[1], limits[1])
    else:
        lowest, highest = map(float, given)
        # Rounding of limits that were copied from elsewhere is no reason to refuse them.
        low, high = (0.0, math.inf) if limits is None else (limits[0] * (1 - 1e-5), limits[1] * (1 + 1e-5))
        if lowest < low or highest > high:
            raise ValueError(
                f"noise_range is {given}, but {name} knows the levels {low:.4g} to {high:.4g} only; stay within them."
            )
    if not 0.0 < lowest < highest < math.inf:
        raise ValueError(f"the noise range is {(lowest, highest)}; give two levels, 0 < lowest < highest.")
    return lowest, highest
