"""States as labeled fields: layouts, ERA5-like datasets, units."""

from numpyro_diffusion_da.fields.datasets import (
    SHORT_NAMES,
    dataset_times,
    grid,
    read_states,
    static_field,
    to_dataset,
    undefined_mask,
)
from numpyro_diffusion_da.fields.layout import Layout, Undefined, Variable
from numpyro_diffusion_da.fields.units import Conversion, conversion, same_unit

__all__ = [
    "SHORT_NAMES",
    "Conversion",
    "Layout",
    "Undefined",
    "Variable",
    "conversion",
    "dataset_times",
    "grid",
    "read_states",
    "same_unit",
    "static_field",
    "to_dataset",
    "undefined_mask",
]
