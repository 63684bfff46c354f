"""Prior from a deterministic emulator and a stated error: x' = m(c) + S e with e ~ N(0, C).

    prior = ndda.priors.DeterministicPrior(model.apply, parameters=parameters, layout=layout, scale=error, noise=noise)

This is how a forecast model without an ensemble (GraphCast, Pangu, NeuralGCM) enters a filter. The error is not a part
of the model. Its size can be that of the error of one step against a reanalysis, by variable; its correlations are
those of a `Noise`, such as `ndda.diffusion.SphericalNoise`, or `ndda.diffusion.FactorNoise` of a climatological
covariance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
from jaxtyping import Array, ArrayLike, Float, PyTree

from numpyro_diffusion_da.arguments import require
from numpyro_diffusion_da.diffusion.noise import Noise, WhiteNoise
from numpyro_diffusion_da.diffusion.prior import OnePassPrior
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.priors.network import CALLABLE, NetworkConditioning, NetworkPrior

if TYPE_CHECKING:
    import numpyro.distributions as dist


class DeterministicPrior(NetworkPrior, OnePassPrior):
    """Prior x' = m(c) + S e, e ~ N(0, C), from a forecast m of yours and a Gaussian error that you state.

    The forecast runs once per particle and step; draws, guided draws and weights cost no more passes. The prior is
    linear in its noise: with observations that are linear too, `OnePassTransition(prior, x, iterations=1)` is exact.
    All methods act on one state, without a batch dimension.

    Args:
        forecast: function (conditioning) -> next state in its unit, or (parameters, conditioning) -> next state if
            `parameters` are given. Arrays of an equinox module become arrays of the prior.
        layout: a `Layout` of the state, or only the shape of the state.
        scale: standard deviation of the error, in the unit of the state: a number or array that broadcasts to the
            state, or a function of the conditioning.
        noise: correlations of the error, a `Noise` of unit variance that is made from white noise; independent errors
            by default.
        parameters: pytree of arrays, the first argument of the forecast; None for a forecast without this argument.
        condition: function (state, inputs) -> conditioning. By default the conditioning is the state as the program
            passes it, and inputs are refused.
        residual: True adds the previous state to what `forecast` gives: the state, or the last one of a tuple.
        climatology: NumPyro distribution of initial states, or None.
        passes: number of network passes of one forecast.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the shapes do not match, or the noise cannot have the shape of the state.
        NotImplementedError: the noise does not say how it is made from white noise.
    """

    noise: Noise
    noise_shape: tuple[int, ...] = eqx.field(static=True)
    generator_passes: int = eqx.field(static=True)

    def __init__(
        self,
        forecast: Callable[..., Any],
        *,
        layout: Layout | int | Sequence[int],
        scale: ArrayLike | Callable[[PyTree], ArrayLike],
        noise: Noise | None = None,
        parameters: PyTree = None,
        condition: Callable[[PyTree, PyTree], PyTree] | None = None,
        residual: bool = False,
        climatology: dist.Distribution | None = None,
        passes: int = 1,
    ) -> None:
        require(forecast, CALLABLE, self, "forecast", "lambda state: 0.9 * state")
        noise = WhiteNoise() if noise is None else noise
        require(noise, Noise, self, "noise", "ndda.diffusion.WhiteNoise()")
        super().__init__(
            forecast,
            layout=layout,
            parameters=parameters,
            condition=condition,
            location=None,
            residual=residual,
            scale=scale,
            climatology=climatology,
            conditioning_passes=passes,
        )
        self.noise, self.noise_shape = noise, noise.white_shape(self.layout.shape)
        self.generator_passes = 0

    def condition(self, state: PyTree, inputs: PyTree = None) -> NetworkConditioning:
        """Compute the forecast, which is the location of the result, and the scale of its error.

        Args:
            state: previous state in its unit, shape of the state, or a pytree of several previous states.
            inputs: inputs for the function `condition` of the constructor, or None.

        Raises:
            ValueError: `inputs` are given without a function `condition`, or a state or the forecast has another shape.
        """
        found = super().condition(state, inputs)
        shape, dtype = found.location.shape, found.location.dtype
        forecast = self._run(found.given, name="a state", expected=shape, dtype=dtype)
        return found._replace(location=found.location + forecast)

    def generate(self, noise: Float[Array, ...], conditioning: NetworkConditioning) -> Float[Array, ...]:
        """Return m(c) + S A e in the unit of the state, without a network pass.

        Args:
            noise: e, shape `noise_shape`.
            conditioning: result of `condition` for the previous state.

        Raises:
            ValueError: the noise has another shape than `noise_shape`.
        """
        self._check_noise(noise)
        location = conditioning.location
        return location + conditioning.scale * self.noise.colored(noise, location.shape).astype(location.dtype)
