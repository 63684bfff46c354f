"""Results read back from the tree of `to_datatree`, and what such a tree needs in addition to be complete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.fields.layout import Layout
from numpyro_diffusion_da.results.axes import PARTICLE
from numpyro_diffusion_da.results.result import Background, FilterResult

if TYPE_CHECKING:
    import xarray

LAGGED = "lagged"
"""Group with the states on the lines of the particles some steps later, for a filter with a lag."""

REDUCED = ("mean", "std", "quantile")
"""Kinds of reductions over particles."""

PASSES = "network_passes_"
"""Prefix of the numbers of network passes in `sample_stats`."""


def with_lagged(tree: xarray.DataTree, result: FilterResult, left: np.ndarray | None) -> xarray.DataTree:
    """Tree of a result with the group `lagged`, if the filter has a lag.

    Args:
        tree: tree of the result.
        result: the result.
        left: states of the particles' lines before the lag, (chain, draw, time, ...); None for a filter without a lag.
    """
    import xarray

    if left is None:
        return tree
    dims = (*PARTICLE, *(f"{result.latent_name}_dim_{i}" for i in range(left.ndim - len(PARTICLE))))
    description = "States L steps before each time on the lines of the particles, for the lag L of the filter."
    tree[LAGGED] = xarray.DataTree(
        xarray.Dataset({result.latent_name: (dims, left)}, attrs={"description": description})
    )
    return tree


def read_result(
    tree: xarray.DataTree,
    latent_name: str,
    layout: Layout | None,
    observed_names: tuple[str, ...],
    attributes: Mapping[str, Any],
    particles: bool = True,
) -> tuple[FilterResult, np.ndarray | None]:
    """Read a result from its tree, as numpy arrays.

    Args:
        tree: tree of the result.
        latent_name: name of the state in the program.
        layout: layout of the state; None if the transition has none.
        observed_names: names of the observed sites.
        attributes: attributes of the result.
        particles: whether to read what each particle has, and not only the rest.

    Returns:
        (the result, with NaN at undefined points of the state; states of the group `lagged`, or None). Without
        particles `posterior`, `posterior_predictive`, `log_likelihood` and `forecast` are empty.
    """

    def values(group: str) -> dict[str, np.ndarray]:
        return {str(name): v.values for name, v in tree[group].data_vars.items()} if group in tree.children else {}

    def sites(group: str) -> dict[str, np.ndarray]:
        """Sites of a group; the fields of the state are joined."""
        found = values(group)
        names = [] if layout is None else [v.name for v in layout.variables]
        if layout is not None and names and set(names) <= set(found) and latent_name not in found:
            state = layout.join({name: found.pop(name) for name in names})
            found = {latent_name: state, **found}
        return found

    posterior = sites("posterior") if particles else {}
    constant, stats = values("constant_data"), values("sample_stats")
    passes = {name.removeprefix(PASSES): stats.pop(name) for name in list(stats) if name.startswith(PASSES)}
    rejected = {site: stats.pop(f"{site}_rejected") for site in observed_names if f"{site}_rejected" in stats}
    background = {}
    for site in observed_names:
        if f"{site}_background" in stats:
            stats.pop(f"{site}_departure")
            background[site] = Background(
                mean=stats.pop(f"{site}_background"),
                variance=stats.pop(f"{site}_background_variance"),
                error_variance=stats.pop(f"{site}_background_error_variance"),
                members=stats.pop(f"{site}_background_members"),
            )
    error = {site: constant.pop(f"{site}_error") for site in observed_names}
    mask = {site: ~constant.pop(f"{site}_missing") for site in observed_names}
    has_state = latent_name in posterior or not posterior
    forecast = sites("prior").get(latent_name) if particles else None
    result = FilterResult(
        posterior=posterior,
        posterior_predictive=values("posterior_predictive") if particles else {},
        log_likelihood=values("log_likelihood") if particles else {},
        observed_data=values("observed_data"),
        observed_mask=mask,
        observed_error=error,
        forecast=forecast,
        sample_stats=stats,
        network_passes=passes,
        latent_name=latent_name if has_state else next(iter(posterior)),
        layout=layout if has_state else None,
        attributes=dict(attributes),
        rejected=rejected,
        metadata=constant,
        background=background,
        reduced={kind: found for kind in REDUCED if (found := sites(f"posterior_{kind}"))},
    )
    return result, values(LAGGED).get(latent_name) if particles else None
