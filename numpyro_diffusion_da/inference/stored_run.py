"""Result of a run in a directory: the tree of some steps that is written, and the whole result that is read."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.diffusion.memory import host_memory
from numpyro_diffusion_da.inference.records import collect, with_later_states
from numpyro_diffusion_da.inference.row_files import StoredRows
from numpyro_diffusion_da.program.structure import Structure
from numpyro_diffusion_da.results import convert, stored
from numpyro_diffusion_da.results.result import FilterResult

if TYPE_CHECKING:
    import xarray


def tree_of_steps(
    structure: Structure,
    attributes: dict[str, Any],
    records: dict[str, Any],
    dims: Mapping[str, Sequence[str]] | None,
    coords: Mapping[str, Any] | None,
) -> xarray.DataTree:
    """Tree of some steps of one chain, as a directory holds it.

    Observed counts are real numbers, because a later step may miss some.

    Args:
        structure: structure of the program.
        attributes: attributes of the result.
        records: records of the steps, with a leading axis of time.
        dims: names of the axes of sites after time.
        coords: coordinate values of dimensions.
    """
    result = collect(structure, attributes, [records])
    observed = {name: v.astype(float) if v.dtype.kind in "iu" else v for name, v in result.observed_data.items()}
    result = dataclasses.replace(result, observed_data=observed)
    left = np.moveaxis(records["lagged"], 0, 1)[None] if "lagged" in records else None
    return stored.with_lagged(convert.to_datatree(result, dims=dims, coords=coords), result, left)


@dataclasses.dataclass(frozen=True)
class StoredResult:
    """Result of a run that is in a directory and not in memory.

    Attributes:
        path: the directory.
        structure: structure of the program.
        attributes: attributes of the result.
        past: states of a lag after the last step of each chain, in memory or in files; empty without a lag.
        chains: number of chains.
        steps: number of steps; the directory may hold more.
    """

    path: pathlib.Path
    structure: Structure
    attributes: dict[str, Any]
    past: list[Any]
    chains: int
    steps: int

    def tree(self) -> xarray.DataTree:
        """Tree of the result, whose arrays are read when they are used."""
        import xarray

        tree = xarray.open_datatree(self.path, engine="zarr", chunks=None)
        return tree.isel(time=slice(self.steps), chain=slice(self.chains), missing_dims="ignore")

    def read(self, particles: bool = True) -> FilterResult:
        """Read the result into memory.

        Args:
            particles: whether to read what each particle has, and not only the rest.

        Raises:
            MemoryError: the particles do not fit into memory.
        """
        structure, emulator = self.structure, self.structure.emulator
        tree = self.tree()
        size = sum(int(v.nbytes) for node in tree.subtree for v in node.data_vars.values())
        if particles and size > 0.8 * host_memory():
            raise MemoryError(
                f"the result in {os.fspath(self.path)!r} has {size / 1e9:.1f} GB, which do not fit into memory; use "
                "to_datatree(), whose arrays are read when they are used."
            )
        found, left = stored.read_result(
            tree,
            structure.latent_name,
            None if emulator is None else emulator.layout,
            structure.observed_names,
            self.attributes,
            particles,
        )
        discrete = {
            name: values.astype(np.int32)
            for name, values in found.observed_data.items()
            if structure.observed[name].is_discrete and found.observed_mask[name].all()
        }
        past = [x.whole() if isinstance(x, StoredRows) else x for x in self.past] if left is not None else []
        lagged = with_later_states(left, past) if left is not None and past else None
        return dataclasses.replace(found, observed_data={**found.observed_data, **discrete}, lagged=lagged)
