"""Prior from a network of yours that makes the next state from noise in one pass.

    prior = ndda.NoiseConditionedPrior(
        model.apply,                                    # (parameters, e, conditioning) -> output
        noise_shape=(32,), parameters=parameters, layout=(40,), residual=True, scale=increment_scale,
    )

Such networks are trained by a proper score (the CRPS) in place of a denoising loss: functional generative networks
(WeatherNext 2), AIFS-CRPS, FourCastNet 3, stochastic NeuralGCM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
from jaxtyping import Array, ArrayLike, Float, PyTree

from numpyro_diffusion_da.arguments import require, require_count, shown
from numpyro_diffusion_da.diffusion.prior import OnePassPrior
from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.priors.network import CALLABLE, NetworkConditioning, NetworkPrior

if TYPE_CHECKING:
    import numpyro.distributions as dist


class NoiseConditionedPrior(NetworkPrior, OnePassPrior):
    """Prior x' = a + S F(e, c) from a network F of yours that takes white noise e ~ N(0, I).

    All methods act on one state, without a batch dimension. For a network that needs a batch dimension, pass a function
    that adds and removes it. A network that needs other noise, such as fields on the sphere, makes it from e.

    Args:
        network: function (e, conditioning) -> output, or (parameters, e, conditioning) -> output if `parameters` are
            given. e has the shape `noise_shape`, the output that of the state. Arrays of an equinox module become
            arrays of the prior. A plain function may close over arrays, but no checksum includes them. It must be
            differentiable in e, forward and backward.
        noise_shape: shape of the noise e, an integer or a tuple.
        layout: a `Layout` of the state, or only the shape of the state.
        parameters: pytree of arrays, the first argument of the network; None for a network without this argument.
        condition: function (state, inputs) -> conditioning, which runs once per step. By default the conditioning is
            the state as the program passes it, and inputs are refused.
        location: location a in the unit of the state: a number or array that broadcasts to the state, or a function of
            the conditioning; 0 by default.
        residual: True uses the previous state as the location: the state, or the last one of a tuple of states.
        scale: diagonal of S in the unit of the state: a number or array that broadcasts to the state, or a function of
            the conditioning; 1 by default.
        climatology: NumPyro distribution of initial states, or None.
        conditioning_passes: number of network passes that `condition` makes.
        passes: number of network passes of one call of `network`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the shapes do not match, or both `location` and `residual` are given.
    """

    noise_shape: tuple[int, ...] = eqx.field(static=True)
    generator_passes: int = eqx.field(static=True)

    def __init__(
        self,
        network: Callable[..., Any],
        *,
        noise_shape: int | Sequence[int],
        layout: Layout | int | Sequence[int],
        parameters: PyTree = None,
        condition: Callable[[PyTree, PyTree], PyTree] | None = None,
        location: ArrayLike | Callable[[PyTree], ArrayLike] | None = None,
        residual: bool = False,
        scale: ArrayLike | Callable[[PyTree], ArrayLike] = 1.0,
        climatology: dist.Distribution | None = None,
        conditioning_passes: int = 0,
        passes: int = 1,
    ) -> None:
        require(network, CALLABLE, self, "network", "lambda noise, state: state + noise")
        require(noise_shape, (int, Sequence), self, "noise_shape", "(32,)")
        shape = (noise_shape,) if isinstance(noise_shape, int) else tuple(noise_shape)
        if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
            raise TypeError(
                f"NoiseConditionedPrior got noise_shape={shown(noise_shape)}; give the shape of the noise as positive "
                "integers."
            )
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
        require_count(passes, self, "passes", 0)
        self.noise_shape, self.generator_passes = shape, passes

    def generate(self, noise: Float[Array, ...], conditioning: NetworkConditioning) -> Float[Array, ...]:
        """Return the next state a + S F(e, c) in its unit, by one call of the network.

        Args:
            noise: e, shape `noise_shape`.
            conditioning: result of `condition` for the previous state.

        Raises:
            TypeError: the output of the network is not one array.
            ValueError: the noise has another shape than `noise_shape`, or the output of the network another shape than
                the state.
        """
        self._check_noise(noise)
        location = conditioning.location
        name = f"a noise of shape {self.noise_shape}"
        output = self._run(noise, conditioning.given, name=name, expected=location.shape, dtype=location.dtype)
        return location + conditioning.scale * output
