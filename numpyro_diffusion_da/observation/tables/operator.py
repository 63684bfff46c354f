"""Observation operator of a table: the observations of one step as a function of the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.fields.units import Conversion
from numpyro_diffusion_da.observation.tables.names import LINEAR
from numpyro_diffusion_da.observation.tables.quantities import PRESSURE, DerivedQuantity


class ObservationOperator:
    """Observations of one step without error, as a function of the state: ``operator(x, at)``.

    `ObservationTable.on` makes it. It holds what the rows of a table observe, and the argument `at` holds where they
    are, so the operator of one table takes the rows of another one on the same layout.

    Attributes:
        layout: layout of the state.
        quantities: derived quantities by name, with the conversion of each of their inputs from the layout's unit.
    """

    def __init__(
        self, layout: Layout, quantities: Mapping[str, tuple[DerivedQuantity, tuple[Conversion, ...]]]
    ) -> None:
        self.layout, self.quantities = layout, dict(quantities)

    def __repr__(self) -> str:
        return f"ObservationOperator({', '.join([LINEAR, *self.quantities])})"

    def __call__(self, x: Float[Array, "latitude longitude channel"], at: Mapping[str, Any]) -> Float[Array, " m"]:
        """Observations of a state without error, in the order of ``at["y"]``.

        Args:
            x: state in the units of the layout, shape (latitude, longitude, channel).
            at: values of one time of `PlacedObservations.xs`, as the body of a scan gets them.

        Returns:
            One value for each row and each place that padding takes, each in the unit of the layout or of the derived
            quantity.

        Raises:
            ValueError: the state has another shape than the layout, or `at` is not of a table on this layout.
        """
        if jnp.shape(x) != self.layout.shape:
            raise ValueError(
                f"the operator got a state of shape {jnp.shape(x)}, but the layout describes {self.layout.shape}; give "
                "one state, and use jax.vmap for several."
            )
        if not isinstance(at, Mapping) or not isinstance(at.get("parts"), Mapping):
            raise ValueError("the operator got no parts; give the values of one time of PlacedObservations.xs.")
        values = x.reshape(-1)
        found = [self._part(name, values, part) for name, part in sorted(at["parts"].items())]
        return jnp.concatenate(found)

    def _part(self, name: str, x: Float[Array, " size"], part: Mapping[str, Array]) -> Float[Array, " n"]:
        """Observations of one part, whose rows are computed in the same way."""
        gathered = jnp.sum(part["weight"].astype(x.dtype) * x[part["index"]], axis=-1)
        if name == LINEAR:
            return gathered[:, 0]
        if name not in self.quantities:
            raise ValueError(
                f"the operator got the part '{name}', but has {sorted(self.quantities)}; use its own table."
            )
        quantity, conversions = self.quantities[name]
        values, column = [], 0
        for given, (factor, offset) in zip(quantity.inputs, conversions, strict=True):
            if given == PRESSURE:
                values.append(part["pressure"])
            else:
                values.append(factor * gathered[:, column] + offset)
                column += 1
        return quantity.near(quantity.function(*values), part["near"] if quantity.period else gathered[:, 0])
