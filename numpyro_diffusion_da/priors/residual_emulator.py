r"""Form that the two shipped emulators share: a conditional mean and a small diffusion model of the residual.

The next state is $x' = m(x) + S z$ with a diagonal $S$. A mean network runs once per step. It gives the conditional
mean $m(x)$ and features of each grid point. A residual network $F$ runs at every noise level $s$ and corrects the
denoiser of a Gaussian. Its layers have the form

$$W^T [a \tanh(W z + b)],$$

where the shift $b$ and the amplitude $a$ of the hidden units are the sum of a term from the features and of a term from
the noise level. Both products share the weights $W$, so that $F$ is the gradient of a scalar function of $z$. Its
Jacobian $J$ is therefore symmetric, which it must be for $s^2 J$ to be a covariance.
"""

# Annotations are not postponed here: equinox recognizes an `AbstractVar` only if its annotation is not a string.
import abc
import contextlib
import json
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import real_array
from numpyro_diffusion_da.checksums import named_leaves
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior, EmulatorPrior
from numpyro_diffusion_da.priors.stored import read_stored, write_stored


class NoiseLevelTerms(NamedTuple):
    """Terms of the shift and of the amplitude of hidden units that `gradient_layer` adds up.

    Attributes:
        shift: term of the shift b, shape (*points, hidden).
        amplitude: term of the amplitude a, shape (*points, hidden).
    """

    shift: Float[Array, "*points hidden"]
    amplitude: Float[Array, "*points hidden"]


def gradient_layer(
    inputs: Float[Array, "*points inputs"],
    taps: Float[Array, "inputs hidden"],
    features: NoiseLevelTerms,
    level: NoiseLevelTerms,
) -> Float[Array, "*points inputs"]:
    """Layer W^T [a tanh(W z + b)], the gradient of a scalar function of its input.

    Args:
        inputs: input z of each point.
        taps: weights W.
        features: terms of b and a from the features of each point.
        level: terms of b and a from the noise level, the same for all points.

    Returns:
        Output of each point, of the shape of the input.
    """
    hidden = jnp.tanh(inputs @ taps + features.shift + level.shift)
    return ((features.amplitude + level.amplitude) * hidden) @ taps.T


def init_level_layer(rng_key: PRNGKeyArray, level_hidden: int, num_terms: int) -> dict[str, Array]:
    """Initial weights of `level_layer` by the name of their field in a residual network.

    Args:
        rng_key: key of the random weights.
        level_hidden: number of hidden units.
        num_terms: number of outputs, which are zero at first.
    """
    return {
        "level_scale": 0.5 * jax.random.normal(rng_key, (level_hidden,)),
        "level_bias": jnp.linspace(-2.0, 2.0, level_hidden),
        "level_terms": jnp.zeros((level_hidden, num_terms)),
    }


def level_layer(
    noise_level: Float[Array, ""],
    level_scale: Float[Array, " level_hidden"],
    level_bias: Float[Array, " level_hidden"],
    level_terms: Float[Array, "level_hidden terms"],
) -> Float[Array, " terms"]:
    """Terms that a noise level s adds to shifts and amplitudes, from a layer with the hidden units tanh(w log s + b).

    Args:
        noise_level: noise level s > 0.
        level_scale: weights w of the hidden units.
        level_bias: biases b of the hidden units.
        level_terms: weights from the hidden units to the terms.
    """
    return jnp.tanh(level_scale * jnp.log(noise_level) + level_bias) @ level_terms


class EmulatorConditioning(NamedTuple):
    """Quantities of one step that do not depend on the noise level.

    Attributes:
        mean: conditional mean m(x) in the unit of the state, shape of the state.
        terms: terms of the residual network from the features of the previous state.
    """

    mean: Float[Array, "..."]
    terms: PyTree


class ResidualEmulator(DiffusionPrior):
    """Base class of trained emulators whose latent is the scaled residual of a conditional mean.

    Attributes:
        residual_network: network F, which runs at every noise level. Its method `terms` takes the features.
    """

    residual_network: eqx.AbstractVar[Any]

    # A property and not an `AbstractVar`, because the field has a default in the subclasses.
    @property
    @abc.abstractmethod
    def card_text(self) -> str:
        """Data card of the emulator, as JSON text."""

    @property
    def card(self) -> dict[str, Any]:
        """Data card as a dictionary: how the emulator was trained, and measurements of its skill."""
        return json.loads(self.card_text)

    @abc.abstractmethod
    def mean_and_features(self, x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Run the mean network on the previous state.

        Args:
            x: previous state in its unit, shape of the state.

        Returns:
            (conditional mean in the unit of the state, features of each grid point).
        """

    def condition(self, state: PyTree, inputs: PyTree = None) -> EmulatorConditioning:
        """Compute the conditional mean and the features' terms, by one pass of the mean network.

        Args:
            state: previous state in its unit, shape of the state.
            inputs: None; an emulator of this form takes no inputs.

        Raises:
            ValueError: `inputs` is not None, or the state has another shape.
        """
        mean, features = self.mean_and_features(self.only_state(state, inputs))
        return EmulatorConditioning(mean, self.residual_network.terms(features))

    def location(self, conditioning: EmulatorConditioning) -> Float[Array, "..."]:
        """Conditional mean m(x) in the unit of the state, shape of the state."""
        return conditioning.mean


def save_emulator(
    emulator: ResidualEmulator, arrays: dict[str, np.ndarray], card: dict[str, Any], folder: Path, name: str
) -> None:
    """Write the files of an emulator, with its noise range added to the card.

    Args:
        emulator: the emulator.
        arrays: arrays of the emulator by their path in it, in the precision to store.
        card: data card, a dictionary that JSON can hold.
        folder: folder of the files.
        name: name of the emulator.
    """
    write_stored(arrays, {**card, "noise_range": list(emulator.noise_range)}, folder, name)


def require_finite(emulator: EmulatorPrior) -> None:
    """Raise a ValueError if an array of an emulator is not finite, or a scale is not positive.

    Args:
        emulator: the emulator. Arrays that are traced are not checked.

    Raises:
        ValueError: the message names the array.
    """
    for name, leaf in named_leaves(emulator).items():
        if isinstance(leaf, jax.core.Tracer) or not jnp.issubdtype(jnp.result_type(leaf), jnp.number):
            continue
        values = real_array(leaf, emulator, name, "an array")
        if name in ("state_scale", "increment_scale", "latent_scale") and not (values > 0).all():
            raise ValueError(f"{type(emulator).__name__} got {name}={values.tolist()}; give positive numbers.")


class StoredEmulator(NamedTuple):
    """Content of the files of an emulator.

    Attributes:
        arrays: arrays by their path in the emulator.
        card: data card.
        noise_range: (lowest, highest) noise level of the training.
        checksum: SHA-256 of arrays and card in hexadecimal.
        card_text: data card, as JSON text.
    """

    arrays: dict[str, np.ndarray]
    card: dict[str, Any]
    noise_range: tuple[float, float]
    checksum: str
    card_text: str


def read_emulator(folder: Path | Traversable, name: str, script: str) -> StoredEmulator:
    """Read the files of an emulator that `save_emulator` wrote.

    Args:
        folder: folder of the files.
        name: name of the emulator.
        script: script that makes the files, for an error message.

    Raises:
        TypeError: `folder` is not a path.
        FileNotFoundError: the folder has no such files.
        ValueError: a file is damaged, or the checksum of arrays and card is not the one in the card.
    """
    arrays, card_text = read_stored(folder, name, script)
    card = json.loads(card_text)
    if "noise_range" not in card:
        raise ValueError(
            f"the data card of '{name}' in '{folder}' has no noise_range, so it is not that of an emulator."
        )
    lowest, highest = card["noise_range"]
    return StoredEmulator(arrays, card, (float(lowest), float(highest)), card["sha256"], card_text)


@contextlib.contextmanager
def of_kind(kind: str, folder: Path | Traversable, name: str) -> Iterator[None]:
    """Context that builds an emulator from files, and refuses files of another kind of emulator.

    Args:
        kind: kind of the emulator, for the message.
        folder: folder of the files.
        name: name of the emulator.

    Raises:
        ValueError: an array or an entry of the card is missing, or there are others.
    """
    try:
        yield
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the files '{name}' in '{folder}' are not those of a {kind} ({error}); give the folder and the name of a "
            f"{kind}."
        ) from None
