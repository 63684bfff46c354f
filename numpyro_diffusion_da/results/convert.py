"""Conversion of results to `xarray.DataTree` and to ArviZ.

xarray and ArviZ are imported inside functions, because they take longer to load than the rest of the package. No other
module imports ArviZ.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.arguments import require
from numpyro_diffusion_da.results.axes import (
    CHAIN,
    PARTICLE,
    SHARED,
    Axes,
    Coords,
    Dims,
    coordinate_values,
    names_of_axes,
)
from numpyro_diffusion_da.results.result import OF_WEIGHTS, FilterResult, ParameterResult

if TYPE_CHECKING:
    import xarray

GROUPS = {
    "posterior": "Analysis particles, equally weighted: draws of the state at each time given observations up to it.",
    "prior": "One-step forecast E[x' | c] from which each analysis particle was drawn: a mean, not a draw.",
    "posterior_predictive": "One draw of each observed site per analysis particle, observation error included.",
    "log_likelihood": "log p(y | x) of each observation at each analysis particle.",
    "observed_data": "Observations, NaN where missing.",
    "constant_data": "Standard deviation of the error of each observation (NaN if it has none), missing values, and "
    "deterministic sites that are the same for all particles.",
    "sample_stats": "Diagnostics of the filter at each step.",
}
"""Description of each group of a filter result."""

REDUCED = {
    "posterior_mean": "Mean over the analysis particles.",
    "posterior_std": "Standard deviation over the analysis particles, with the divisor N - 1.",
    "posterior_quantile": "Quantiles of the analysis particles.",
}
"""Description of each group of reductions over particles."""

SMOOTHED = {
    "genealogy": "Trajectories, equally weighted: each draw is a path of states given all observations.",
    "backward simulation": "Trajectories, equally weighted: each draw is a path of states given all observations.",
    "ensemble smoother": "Trajectories, equally weighted: each draw is a path of states that the filter has moved by "
    "all observations.",
    "fixed lag": "Particles, equally weighted: draws of the state at each time given observations up to smoothing_lag "
    "steps later.",
}
"""Description of the posterior of a smoothed result, for each value of the attribute `smoothing`."""

PARAMETER_GROUPS = {
    "posterior": "Global parameters, equally weighted: draws given all observations.",
    "posterior_over_time": "Global parameters, equally weighted: draws given observations up to each time.",
    "sample_stats": "Diagnostics of the inference.",
}
"""Description of each group of a parameter result."""

MISSING = {
    "log_likelihood": "0, also where rejected",
    "observed_data": "NaN",
    "posterior_predictive": "a draw, as for other observations",
}
"""Values that groups have in place of missing observations."""

STATS = {
    "log_weights": (
        "log-weight before tempering",
        "draw counts particles before resampling, unlike in posterior; -inf for particles that cannot be selected",
    ),
    "ancestors": (
        "ancestor of each particle",
        "for each draw of posterior, the index of its parent among the draws of the previous time",
    ),
    "ess": ("effective sample size of the weights before tempering", "between 1 and the number of particles"),
    "tempering": (
        "tempering exponent alpha",
        "in (0, 1]: exponent of the weights, or of the likelihood in the weights (see the attribute tempering); below "
        "1 if untempered weights would have kept too few particles",
    ),
    "log_evidence_increment": (
        "estimate of log p(y_k | y_1, ..., y_k-1)",
        "log of the mean weight before tempering; the sum over time is the log-evidence",
    ),
    "distinct_ancestors": ("number of distinct ancestors", "between 1 and the number of particles"),
    "filter_draw": (
        "index of the particle of the filter",
        "for each draw of the smoothed posterior, its index among the particles of the filter",
    ),
    "distinct_lines": (
        "number of distinct particles of the filter among the smoothed draws",
        "between 1 and the number of particles; if small, the smoothed draws are copies of a few particles",
    ),
    "backward_ess": (
        "effective sample size of the weights from which backward simulation drew the links",
        "between 1 and the number of particles; near 1, draws could hardly have come from another particle",
    ),
    "backward_passes_forward": (
        "forward passes of the transition densities",
        "to link one draw to the particles of the previous time",
    ),
    "backward_passes_conditioning": (
        "passes of the conditioning network for the transition densities",
        "to link one draw to the particles of the previous time",
    ),
    "backward_passes_jvp": (
        "Jacobian-vector products of the transition densities",
        "to link one draw to the particles of the previous time",
    ),
    "backward_passes_vjp": (
        "vector-Jacobian products of the transition densities",
        "to link one draw to the particles of the previous time",
    ),
    "log_weight_std": (
        "standard deviation of the finite log-weights",
        "weights collapse near sqrt(2 log N) for N particles",
    ),
    "non_gaussianity": (
        "non-Gaussianity D of the ensemble before the step",
        "squared differences of weighted means and variances from those of a Kalman step, in their sampling variances; "
        "about 1 or less if the ensemble is Gaussian, 0 where there is no observation",
    ),
    "selection_share": (
        "share of its power that selection uses",
        "lambda = max(0, 1 - 1 / mean D) unless it is fixed; the move of the ancestors uses the rest",
    ),
    "moved_share": (
        "share of the observations that the move of the ancestors uses",
        "from 0 (selection uses all of them) to 1 (no selection)",
    ),
    "resampled": (
        "whether the particles were resampled",
        "otherwise they carried their weights on, and the draws were resampled for the result alone",
    ),
    "solver_residual": (
        "largest relative residual of the linear solves of a draw, or of an ensemble update",
        "0 without linear solves",
    ),
    "acceptance_rate": ("acceptance probability of proposals", "NaN if none was made"),
    "is_accepted": ("whether the proposal was accepted", ""),
    "log_evidence": ("estimate of log p(y | parameters)", "estimate at the current point, made once and kept"),
    "filter_steps": ("number of steps of state filters", "over all parameters, including those of moves"),
    "lp": ("log prior in unconstrained space + log-evidence", "log-density of the chain, up to a constant"),
    "network_passes_forward": ("forward passes of the network", "per particle and step, averaged over particles"),
    "network_passes_conditioning": (
        "passes of the conditioning network",
        "per particle and step, averaged over particles; not among the forward passes",
    ),
    "network_passes_jvp": ("Jacobian-vector products of the network", "per particle and step, averaged over particles"),
    "network_passes_vjp": ("vector-Jacobian products of the network", "per particle and step, averaged over particles"),
}
"""Long name and description of each statistic."""


def to_datatree(
    result: FilterResult, *, time: Any = None, dims: Dims | None = None, coords: Coords | None = None
) -> xarray.DataTree:
    """Convert a filter result to a tree of named and labeled arrays for xarray, netCDF and Zarr.

    The groups are `posterior`, `posterior_mean`, `posterior_std` and `posterior_quantile` if the run kept them, `prior`
    if forecasts were kept, `posterior_predictive`, `log_likelihood`, `observed_data`,
    `constant_data` (``{site}_error`` and ``{site}_missing`` for each observed site, and the
    deterministic sites of `FilterResult.metadata`) and `sample_stats` (with ``{site}_background``,
    ``{site}_background_variance``, ``{site}_background_error_variance``, ``{site}_background_members`` and
    ``{site}_departure`` for each observed site that has a mean and a variance, and ``{site}_rejected`` for a
    gross-error check). The attribute `description` of a group explains its contents.
    Dimensions are `chain` (independent filters), `draw` (particles), `time`, and then those of the site: the dimensions
    of the layout for the state, ``{site}_dim_0``, ... for others.

    If the layout of the state has variables, as for gridded states, each field becomes a variable of its own, for
    example ``posterior["temperature"]`` with dimensions (chain, draw, time, level, latitude, longitude), with its unit,
    and NaN where it is undefined. Only fields with undefined points are copied.

    Files hold the tree without changes: ``tree.to_netcdf(path, engine="h5netcdf")``,
    ``tree.to_zarr(path, consolidated=False)``.

    Args:
        result: `Filter.result`, or a smoothed result.
        time: coordinate of the time axis, one value per step (dates, hours, ...), increasing; by default 0, 1, ...
            Dates with a time zone are converted to UTC.
        dims: names of the axes of sites after `time`, in the form of ArviZ's converters: ``{"y": ["station"]}``.
        coords: coordinate values of dimensions, ``{"station": ["Oslo", "Bergen"]}``; they override those of the layout.

    Returns:
        Tree with one dataset per group.

    Raises:
        ValueError: `time`, `dims` or `coords` do not fit the arrays, or name sites or dimensions that do not exist.
    """
    import xarray

    require(result, FilterResult, "to_datatree", "result", "filter.result")
    axes = Axes(result, time, {} if dims is None else dims, {} if coords is None else coords)
    first = [name for name in (result.latent_name,) if name in result.posterior]  # the state comes first
    latent = {name: result.posterior[name] for name in first}
    stats = {
        **result.sample_stats,
        **{f"network_passes_{name}": passes for name, passes in result.network_passes.items()},
    }
    forecasts = {} if result.forecast is None else {result.latent_name: result.forecast}
    groups = {
        "posterior": axes.with_state({**latent, **result.posterior}),
        "prior": axes.with_state(forecasts),
        **{
            f"posterior_{kind}": axes.with_state(arrays, (*CHAIN, "quantile") if kind == "quantile" else CHAIN)
            for kind, arrays in result.reduced.items()
        },
        "posterior_predictive": axes.sites(result.posterior_predictive, PARTICLE),
        "log_likelihood": axes.sites(result.log_likelihood, PARTICLE),
        "observed_data": axes.sites(result.observed_data, ("time",)),
        "constant_data": {
            f"{site}_{name}": axes.variable(site, values, ("time",), {"long_name": f"{long_name} {site}"})
            for site, mask in result.observed_mask.items()
            for name, values, long_name in (
                ("error", result.observed_error[site], "standard deviation of the error of"),
                ("missing", ~mask, "missing values of"),
            )
        }
        | axes.sites(result.metadata, ("time",)),
        "sample_stats": {name: _statistic(axes, name, values) for name, values in stats.items()}
        | {
            f"{site}_rejected": axes.variable(site, values, CHAIN, {"long_name": f"rejected values of {site}"})
            for site, values in result.rejected.items()
        }
        | {
            f"{site}_{name}": axes.variable(site, values, CHAIN, {"long_name": long_name, "description": description})
            for site in result.background
            for name, values, long_name, description in _of_background(result, site)
        }
        | {
            f"{site}_background_members": (
                CHAIN,
                background.members,
                {"long_name": f"number of particles of the background mean of {site}"},
            )
            for site, background in result.background.items()
        },
    }
    axes.check_all_used()
    attributes = _attributes(result)
    tree = xarray.DataTree.from_dict(
        {
            name: xarray.Dataset(variables, axes.coordinates(variables), {**_description(name, result), **attributes})
            for name, variables in groups.items()
            if variables
        }
    )
    tree.attrs.update(attributes)
    return tree


def to_arviz(result: FilterResult, *, time: Any = None, dims: Dims | None = None, coords: Coords | None = None) -> Any:
    """Convert a filter result for the installed ArviZ: `InferenceData` before ArviZ 1, a `DataTree` since.

    The result is that of `to_datatree`, with each observed site as a list of its observed values. In `log_likelihood`,
    `posterior_predictive` and `observed_data` the site `y` has one dimension ``y_observed``, whose coordinates
    ``y_time``, ... give the place of each value. ArviZ does not handle missing values: `loo` would count them as data
    (or fail, in ArviZ 1), and predictive plots would show draws of them. Some plots of ArviZ 1 also require a single
    dimension. Sites without any observation are left out, and so are values that a gross-error check rejected in any
    chain.

    How to read ArviZ's diagnostics of a filter:

    - A chain is an independent filter. Its draws at one time are exchangeable particles, not a Markov chain. Their
      order has no meaning, except that systematic resampling places particles of one ancestor next to each other.
    - `az.rhat` compares the filters. For N particles whose mean has the error of n independent draws, R-hat is near
      sqrt(1 + 1/n - 1/N); 1.01 corresponds to about n = 50. It detects error that a filter carries from step to step,
      which one filter alone cannot show. It does not detect a bias that all filters share, such as that of tempering
      or of approximate weights. The default R-hat splits each chain into halves, which differ when few ancestors
      remain; ``method="identity"`` compares whole filters.
    - `az.ess` and `az.mcse` are made for Markov chains. They interpret siblings as autocorrelation, so ESS falls with
      the number of ancestors. The effective sample size of the weights is ``sample_stats["ess"]``.
    - `az.loo` at time k leaves one observation out of y_1, ..., y_k, because a draw at k has not seen later ones. It
      sums log p(y_kj | the others up to k) and is not the leave-one-out of the whole series. Let R be the error
      variance of an observation, and P the variance of its forecast from the others. Its Pareto k tends to P / (P + R).
      Above 0.7, that is for small errors, elpd is too high. Then compare models by their log-evidence, the sum of
      ``sample_stats["log_evidence_increment"]``. With a fixed lag, "up to k" means up to k + lag. With whole
      trajectories it is the leave-one-out of the series, but unreliable if few distinct lines remain
      (``sample_stats["distinct_lines"]``).

    Args:
        result: `Filter.result`, or a smoothed result.
        time: coordinate of the time axis, one value per step, as in `to_datatree`.
        dims: names of the axes of sites after `time`, as in `to_datatree`.
        coords: coordinate values of dimensions, as in `to_datatree`.

    Returns:
        `arviz.InferenceData` before ArviZ 1, an `xarray.DataTree` since.

    Raises:
        ValueError: `time`, `dims` or `coords` do not fit the arrays, or name sites or dimensions that do not exist.
    """
    import xarray

    tree = to_datatree(result, time=time, dims=dims, coords=coords)
    groups = {name: group.to_dataset() for name, group in tree.children.items()}
    rejected = {site: values.any(0) for site, values in result.rejected.items()}
    used = {site: mask & ~rejected.get(site, np.False_) for site, mask in result.observed_mask.items()}
    # Missing values make an array of counts one of real numbers; without them it is whole again, as ArviZ's plots need.
    whole = {site for site, draws in result.posterior_predictive.items() if draws.dtype.kind in "iu"}
    for name in {"posterior_predictive", "observed_data", "log_likelihood"} & set(groups):
        groups[name] = _as_lists(groups[name], used, whole)
    listed = xarray.DataTree.from_dict({name: group for name, group in groups.items() if group.data_vars})
    listed.attrs.update(tree.attrs)
    return _as_installed(listed)


def parameters_to_datatree(
    result: ParameterResult, *, dims: Dims | None = None, coords: Coords | None = None
) -> xarray.DataTree:
    """Convert draws of global parameters to a tree of named and labeled arrays.

    The groups are `posterior` with dimensions (chain, draw, ...) and `sample_stats` with (chain, draw) for `PMMH` and
    (chain, time) for `SMC2`. `SMC2` also has `posterior_over_time` with (chain, draw, time, ...). The dots are the axes
    of the parameter.

    Args:
        result: `PMMH.result` or `SMC2.result`.
        dims: names of the axes of parameters, ``{"bias": ["station"]}``; by default ``bias_dim_0``, ...
        coords: coordinate values of dimensions, ``{"station": ["Oslo", "Bergen"]}``.

    Returns:
        Tree with one dataset per group.

    Raises:
        ValueError: `dims` or `coords` do not fit the arrays, or name parameters or dimensions that do not exist.
    """
    import xarray

    require(result, ParameterResult, "parameters_to_datatree", "result", "pmmh.result")
    for name, value in (("dims", dims), ("coords", coords)):
        require(value, (Mapping, type(None)), "parameters_to_datatree", name, '{"bias": ["station"]}')
    given = {name: coordinate_values(name, values) for name, values in (coords or {}).items()}
    named = {site: names_of_axes(site, names) for site, names in (dims or {}).items()}
    if unknown := set(named) - set(result.posterior):
        raise ValueError(f"dims has {sorted(unknown)}, but the parameters are {sorted(result.posterior)}.")
    axes: dict[str, tuple[str, ...]] = {}
    sizes: dict[str, int] = {}
    for site, values in result.posterior.items():
        shape = values.shape[2:]
        axes[site] = tuple(named.get(site, [f"{site}_dim_{i}" for i in range(len(shape))]))
        if len(axes[site]) != len(shape):
            raise ValueError(f"dims names {len(axes[site])} axes {axes[site]} of '{site}', which has {len(shape)}.")
        for name, size in zip(axes[site], shape, strict=True):
            if name in SHARED or sizes.setdefault(name, size) != size or len(given.get(name, range(size))) != size:
                raise ValueError(
                    f"'{name}' cannot name an axis of {size} values of '{site}': another axis has this name, or coords "
                    "gives it another number of values; give another name in dims."
                )
    if unknown := set(given) - set(sizes):
        raise ValueError(f"coords has {sorted(unknown)}, but the dimensions are {sorted(sizes)}.")
    stats_dims = CHAIN if result.over_time else ("chain", "draw")
    variables: dict[str, dict[str, Any]] = {
        "posterior": {n: (("chain", "draw", *axes[n]), v) for n, v in result.posterior.items()},
        "posterior_over_time": {n: ((*PARTICLE, *axes[n]), v) for n, v in result.over_time.items()},
        "sample_stats": {
            n: (stats_dims, v, dict(zip(("long_name", "description"), STATS.get(n, (n, "")), strict=True)))
            for n, v in result.sample_stats.items()
        },
    }
    attributes = _attributes(result)
    tree = {}
    for group, arrays in variables.items():
        if arrays:
            dataset = xarray.Dataset(arrays, attrs={"description": PARAMETER_GROUPS[group], **attributes})
            tree[group] = dataset.assign_coords({n: given.get(str(n), np.arange(s)) for n, s in dataset.sizes.items()})
    found = xarray.DataTree.from_dict(tree)
    found.attrs.update(attributes)
    return found


def parameters_to_arviz(result: ParameterResult, *, dims: Dims | None = None, coords: Coords | None = None) -> Any:
    """Convert draws of global parameters for the installed ArviZ, with the groups `posterior` and `sample_stats`.

    The chains of `PMMH` are Markov chains, so `az.rhat`, `az.ess` and `az.summary` have their usual meaning. The chains
    of `SMC2` are independent runs with exchangeable draws: `az.rhat` compares the runs, and `az.ess` is not
    informative.

    Args:
        result: `PMMH.result` or `SMC2.result`.
        dims: names of the axes of parameters, as in `parameters_to_datatree`.
        coords: coordinate values of dimensions, as in `parameters_to_datatree`.

    Returns:
        `arviz.InferenceData` before ArviZ 1, an `xarray.DataTree` since.

    Raises:
        ValueError: `dims` or `coords` do not fit the arrays, or name parameters or dimensions that do not exist.
    """
    import xarray

    tree = parameters_to_datatree(result, dims=dims, coords=coords)
    groups = {name: group.to_dataset() for name, group in tree.children.items() if name != "posterior_over_time"}
    listed = xarray.DataTree.from_dict(groups)
    listed.attrs.update(tree.attrs)
    return _as_installed(listed)


def _as_installed(tree: xarray.DataTree) -> Any:
    """Convert a tree to `InferenceData` if the installed ArviZ is older than 1."""
    import arviz

    # Decide by version, because ArviZ 1 also has the name InferenceData, as an alias of DataTree.
    if int(arviz.__version__.split(".")[0]) >= 1:
        return tree
    return arviz.InferenceData.from_datatree(tree)


def _statistic(axes: Axes, name: str, values: np.ndarray) -> Any:
    """Make a variable of `sample_stats` as xarray takes it: (dims, values, attributes)."""
    long_name, description = STATS.get(name, (name.replace("_", " "), ""))
    block = ("block",) if axes.result.is_local and name in OF_WEIGHTS else ()
    leading = PARTICLE if values.ndim - len(block) >= len(PARTICLE) else CHAIN
    own = block or tuple(f"{name}_dim_{i}" for i in range(values.ndim - len(leading)))
    axes.sizes.update(zip(own, values.shape[len(leading) :], strict=True))
    return (*leading, *own), values, {"long_name": long_name, "description": description}


def _of_background(result: FilterResult, site: str) -> list[tuple[str, np.ndarray, str, str]]:
    """Name, values, long name and description of each variable of a site's background."""
    background = result.background[site]
    return [
        (
            "background",
            background.mean,
            f"background mean of {site}",
            "mean of the predicted observation, before the filter used the observation",
        ),
        (
            "background_variance",
            background.variance,
            f"background variance of {site}",
            "without the observation error; includes the sampling error of the background mean",
        ),
        (
            "background_error_variance",
            background.error_variance,
            f"variance of the error of {site} that the filter used",
            "a mean over the particles",
        ),
        (
            "departure",
            result.departure(site),
            f"observation minus background mean of {site}",
            "NaN where missing; if the filter is right, its square has the mean of background variance plus variance "
            "of the observation error",
        ),
    ]


def _description(group: str, result: FilterResult) -> dict[str, str]:
    """Attributes that describe the contents of a group and its values for missing observations."""
    missing = {"missing_observations": MISSING[group]} if group in MISSING else {}
    smoothed = SMOOTHED.get(str(result.attributes.get("smoothing"))) if group == "posterior" else None
    return {"description": smoothed or {**GROUPS, **REDUCED}[group], **missing}


def _attributes(result: FilterResult | ParameterResult) -> dict[str, Any]:
    """Attributes on the origin of a result, as values that netCDF and Zarr can hold."""
    __version__ = version("numpyro-diffusion-da")
    created = {
        "creation_library": "numpyro_diffusion_da",
        "creation_library_version": __version__,
        "inference_library": "numpyro_diffusion_da",
        "inference_library_version": __version__,
    }
    return {**created, **{name: _plain(value) for name, value in result.attributes.items()}}


def _plain(value: Any) -> str | int | float:
    """Convert `value` to a number or a string."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return str(value)
    return value


def _as_lists(group: xarray.Dataset, masks: Mapping[str, np.ndarray], whole: Container[str]) -> xarray.Dataset:
    """Reduce each site of a group to its observed values, along one dimension.

    Args:
        group: a group of the tree.
        masks: mask of the observed values of each site.
        whole: names of the sites whose values are whole numbers.
    """
    import xarray

    variables: dict[Any, Any] = {}
    coordinates: dict[str, Any] = {name: group[name] for name in ("chain", "draw") if name in group.coords}
    for site, variable in group.data_vars.items():
        lead = [name for name in variable.dims if name in ("chain", "draw")]
        own = variable.dims[len(lead) :]
        # A multivariate site has one log-likelihood for several values; keep it if any of them is observed.
        if str(site) not in masks:  # a term of the likelihood that observes nothing, `numpyro.factor`
            continue
        kept = masks[str(site)].any(tuple(range(len(own), masks[str(site)].ndim)))
        if not kept.any():
            continue
        at: tuple[Any, ...] = np.nonzero(kept)
        dim = f"{site}_observed"
        values = variable.values[(..., *at)]
        if str(site) in whole and np.issubdtype(values.dtype, np.floating) and not lead:
            values = values.astype(np.int64)
        variables[site] = ((*lead, dim), values, variable.attrs)
        coordinates[dim] = np.arange(len(at[0]))
        for name, index in zip(own, at, strict=True):
            coordinates[f"{site}_{name}"] = (dim, variable[name].values[index])
    return xarray.Dataset(variables, coordinates, {**group.attrs, "missing_observations": "left out"})
