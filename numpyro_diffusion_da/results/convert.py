"""Result -> `xarray.DataTree` -> ArviZ. The only module that knows ArviZ.

xarray and ArviZ are imported where they are used: they take longer to load than the rest of the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_diffusion_da.results.axes import CHAIN, PARTICLE, SHARED, Axes, Coords, Dims
from numpyro_diffusion_da.results.result import OF_WEIGHTS

if TYPE_CHECKING:
    import xarray

    from numpyro_diffusion_da.results.result import FilterResult, ParameterResult

GROUPS = {
    "posterior": "Analysis particles, equally weighted: draws of the state at each time given observations up to it.",
    "prior": "The one-step forecast E[x' | c] that each analysis particle came from: a mean, not a draw.",
    "posterior_predictive": "A draw of each observed site, observation error included, for each analysis particle.",
    "log_likelihood": "log p(y | x) of each observation at each analysis particle.",
    "observed_data": "The observations.",
    "constant_data": "Standard deviation of each observation's error (NaN where it has none), and what is missing.",
    "sample_stats": "Diagnostics of the filter at each step.",
}

SMOOTHED = {
    "genealogy": "Trajectories, equally weighted: each draw is a path of states given all observations.",
    "backward simulation": "Trajectories, equally weighted: each draw is a path of states given all observations.",
    "fixed lag": "Particles, equally weighted: draws of the state at each time given observations up to smoothing_lag "
    "steps later.",
}
"""What the posterior is, by the attribute `smoothing`."""

PARAMETER_GROUPS = {
    "posterior": "Global parameters, equally weighted: draws given all observations.",
    "posterior_over_time": "Global parameters, equally weighted: draws given observations up to each time.",
    "sample_stats": "Diagnostics of the inference.",
}

MISSING = {
    "log_likelihood": "0, where rejected too",
    "observed_data": "NaN",
    "posterior_predictive": "a draw, as elsewhere",
}

STATS = {
    "log_weights": (
        "log-weight before tempering",
        "draw is the index of the particle before resampling, not that of posterior; -inf: could not be selected",
    ),
    "ancestors": (
        "ancestor of each particle",
        "for each draw of posterior, the draw at the previous time that it comes from",
    ),
    "ess": ("effective sample size of the weights before tempering", "between 1 and the number of particles"),
    "tempering": (
        "alpha of the tempering of the weights",
        "in (0, 1]: their exponent, or that of the likelihood in them (the attribute tempering says which); below 1 "
        "the weights would have kept too few particles",
    ),
    "log_evidence_increment": (
        "estimate of log p(y_k | y_1, ..., y_k-1)",
        "log mean of the weights before tempering; sum over time for the log-evidence",
    ),
    "distinct_ancestors": ("number of different ancestors", "between 1 and the number of particles"),
    "filter_draw": ("particle of the filter", "for each draw of the smoothed posterior, its draw in the filter's"),
    "distinct_lines": (
        "number of different particles of the filter among the smoothed draws",
        "between 1 and the number of particles; where it is small, the smoothed draws are copies of few",
    ),
    "backward_ess": (
        "effective sample size of the weights that links back were drawn by",
        "between 1 and the number of particles; near 1, particles could hardly have come from another",
    ),
    "backward_passes_forward": (
        "forward passes of the densities",
        "of one draw, to link it to the particles of a time",
    ),
    "backward_passes_jvp": ("Jacobian-vector products of the densities", "of one draw, to link it to those of a time"),
    "backward_passes_vjp": ("vector-Jacobian products of the densities", "of one draw, to link it to those of a time"),
    "log_weight_std": (
        "standard deviation of the finite log-weights",
        "weights collapse near sqrt(2 log N) for N particles",
    ),
    "solver_residual": ("largest relative residual of the linear solves of a draw", "0 where no solve was made"),
    "acceptance_rate": ("probability with which a proposal was accepted", "NaN where none was made"),
    "is_accepted": ("whether the proposal was accepted", ""),
    "log_evidence": ("estimate of log p(y | parameters)", "that of the current point, made once and kept"),
    "filter_steps": ("steps of state filters made", "over all parameters, those of moves included"),
    "lp": ("log prior in unconstrained space + log-evidence", "the chain's log-density, up to a constant"),
    "network_passes_forward": ("forward passes of the network", "per particle and step, averaged over particles"),
    "network_passes_jvp": ("Jacobian-vector products of the network", "per particle and step, averaged over particles"),
    "network_passes_vjp": ("vector-Jacobian products of the network", "per particle and step, averaged over particles"),
}


def to_datatree(
    result: FilterResult, *, time: Any = None, dims: Dims | None = None, coords: Coords | None = None
) -> xarray.DataTree:
    """The result of a run with names for everything, ready for xarray, netCDF and Zarr.

    Groups: `posterior`, `prior` where forecasts were kept, `posterior_predictive`, `log_likelihood`, `observed_data`,
    `constant_data` (for each observed site ``{site}_error`` and ``{site}_missing``) and `sample_stats` (with
    ``{site}_rejected`` of a gross-error check); each says in its attribute `description` what it is. Dimensions are
    `chain` (independent filter), `draw` (particle), `time`, then those of the site: the layout's for the state,
    ``{site}_dim_0``, ... for others.

    A state whose layout names variables (a gridded one) is not one array there but a variable for every field, such as
    ``posterior["temperature"]`` with (chain, draw, time, level, latitude, longitude), in its unit, and NaN where it is
    undefined. Only these with NaN are copied.

    The tree goes through files as it is: ``tree.to_netcdf(path, engine="h5netcdf")``,
    ``tree.to_zarr(path, consolidated=False)``.

    Args:
        result: `Filter.result`, or one of `smoothing`.
        time: coordinate of the time axis, one value a step (dates, hours, ...); by default 0, 1, ...
        dims: names for a site's axes after `time`, as ArviZ's converters take them: ``{"y": ["station"]}``.
        coords: coordinate values of dimensions: ``{"station": ["Oslo", "Bergen"]}``. They take precedence over the
            layout's.

    Raises:
        ValueError: `time`, a coordinate or a site's names do not fit the arrays, or name something that is not there.
    """
    import xarray

    axes = Axes(result, time, dims or {}, coords or {})
    latent = {result.latent_name: result.posterior[result.latent_name]}  # first, whatever the others are called
    stats = {
        **result.sample_stats,
        **{f"network_passes_{name}": passes for name, passes in result.network_passes.items()},
    }
    forecasts = {} if result.forecast is None else {result.latent_name: result.forecast}
    groups = {
        "posterior": axes.with_state({**latent, **result.posterior}),
        "prior": axes.with_state(forecasts),
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
        },
        "sample_stats": {name: _statistic(axes, name, values) for name, values in stats.items()}
        | {
            f"{site}_rejected": axes.variable(site, values, CHAIN, {"long_name": f"values left out of {site}"})
            for site, values in result.rejected.items()
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
    """The result as the installed ArviZ takes it: `InferenceData` before ArviZ 1, a `DataTree` from then on.

    It is `to_datatree`, with every observed site as a list of what was observed: in `log_likelihood`,
    `posterior_predictive` and `observed_data` the site `y` has one dimension ``y_observed``, whose coordinates
    ``y_time``, ... say where each value belongs. ArviZ has no notion of missing values: it would count them as data
    points in `loo` (ArviZ 1 fails), and draws of them in predictive plots; and some plots of ArviZ 1 take observations
    along one dimension only. A site of which nothing was observed is left out, and so is what a gross-error check
    rejected in any chain.

    What ArviZ's numbers mean here:

    - A chain is an independent filter, and its draws at one time are exchangeable particles, not a Markov chain:
      nothing follows from their order, except that systematic resampling puts those of one ancestor side by side.
    - `az.rhat` compares the filters. For N particles whose mean has the error of n independent draws, R-hat is near
      sqrt(1 + 1/n - 1/N): 1.01 is about n = 50. It sees what one filter cannot: error carried from step to step. It
      does not see a bias that all filters share (tempering, an approximate weight). The default R-hat splits each
      chain into halves, which differ when few ancestors remain; ``method="identity"`` compares whole filters only.
    - `az.ess` and `az.mcse` are made for Markov chains: they take siblings for autocorrelation, and ESS falls with the
      number of ancestors. The effective sample size of the weights is ``sample_stats["ess"]``.
    - `az.loo` at time k leaves one observation out of y_1, ..., y_k, as a draw at k has not seen later ones: a sum of
      log p(y_kj | the others up to k), not the leave-one-out of the whole series. Its Pareto k tends to P / (P + R) for
      an observation whose forecast from the others has variance P, and error variance R: above 0.7, where the error is
      small, elpd is too high. There compare models by their log-evidence, the sum of
      ``sample_stats["log_evidence_increment"]``. Of smoothed draws "up to k" is up to k + lag; of whole trajectories,
      the leave-one-out of the series, worth little where few lines are left (``sample_stats["distinct_lines"]``).

    Args:
        result: `Filter.result`, or one of `smoothing`.
        time: see `to_datatree`.
        dims: see `to_datatree`.
        coords: see `to_datatree`.

    Raises:
        ValueError: see `to_datatree`.
    """
    import xarray

    tree = to_datatree(result, time=time, dims=dims, coords=coords)
    groups = {name: group.to_dataset() for name, group in tree.children.items()}
    rejected = {site: values.any(0) for site, values in result.rejected.items()}
    used = {site: mask & ~rejected.get(site, np.False_) for site, mask in result.observed_mask.items()}
    for name in {"log_likelihood", "posterior_predictive", "observed_data"} & set(groups):
        groups[name] = _as_lists(groups[name], used)
    listed = xarray.DataTree.from_dict({name: group for name, group in groups.items() if group.data_vars})
    listed.attrs.update(tree.attrs)
    return _as_installed(listed)


def parameters_to_datatree(
    result: ParameterResult, *, dims: Dims | None = None, coords: Coords | None = None
) -> xarray.DataTree:
    """Draws of global parameters with names for everything.

    Groups: `posterior` with (chain, draw, then the parameter's own dims), `sample_stats` with (chain, draw) for `PMMH`
    and (chain, time) for `SMC2`, and for the latter `posterior_over_time` with (chain, draw, time, own dims).

    Args:
        result: `PMMH.result` or `SMC2.result`.
        dims: names for a parameter's own axes: ``{"bias": ["station"]}``; by default ``bias_dim_0``, ...
        coords: coordinate values of dimensions: ``{"station": ["Oslo", "Bergen"]}``.

    Raises:
        ValueError: names or coordinates that do not fit the arrays, or name something that is not there.
    """
    import xarray

    given, named = dict(coords or {}), dict(dims or {})
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
                    f"'{name}' cannot name an axis of '{site}' of {size} values: it is another one's name, or has "
                    "coordinates of another length."
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
    """`posterior` and `sample_stats` of `parameters_to_datatree` as the installed ArviZ takes them.

    The chains of `PMMH` are Markov chains: `az.rhat`, `az.ess` and `az.summary` mean what they say. Those of `SMC2` are
    independent runs of exchangeable draws: R-hat compares the runs, and `az.ess` says little.

    Args:
        result: see `parameters_to_datatree`.
        dims: see `parameters_to_datatree`.
        coords: see `parameters_to_datatree`.

    Raises:
        ValueError: see `parameters_to_datatree`.
    """
    import xarray

    tree = parameters_to_datatree(result, dims=dims, coords=coords)
    groups = {name: group.to_dataset() for name, group in tree.children.items() if name != "posterior_over_time"}
    listed = xarray.DataTree.from_dict(groups)
    listed.attrs.update(tree.attrs)
    return _as_installed(listed)


def _as_installed(tree: xarray.DataTree) -> Any:
    import arviz

    # By version: 1.x has the name InferenceData too, as another name of DataTree.
    if int(arviz.__version__.split(".")[0]) >= 1:
        return tree
    return arviz.InferenceData.from_datatree(tree)


def _statistic(axes: Axes, name: str, values: np.ndarray) -> Any:
    long_name, description = STATS.get(name, (name.replace("_", " "), ""))
    block = ("block",) if axes.result.is_local and name in OF_WEIGHTS else ()
    leading = PARTICLE if values.ndim - len(block) >= len(PARTICLE) else CHAIN
    own = block or tuple(f"{name}_dim_{i}" for i in range(values.ndim - len(leading)))
    axes.sizes.update(zip(own, values.shape[len(leading) :], strict=True))
    return (*leading, *own), values, {"long_name": long_name, "description": description}


def _description(group: str, result: FilterResult) -> dict[str, str]:
    missing = {"missing_observations": MISSING[group]} if group in MISSING else {}
    smoothed = SMOOTHED.get(str(result.attributes.get("smoothing"))) if group == "posterior" else None
    return {"description": smoothed or GROUPS[group], **missing}


def _attributes(result: FilterResult | ParameterResult) -> dict[str, Any]:
    """Where the result comes from, in values that netCDF and Zarr can hold."""
    __version__ = version("numpyro-diffusion-da")
    created = {
        "creation_library": "numpyro_diffusion_da",
        "creation_library_version": __version__,
        "inference_library": "numpyro_diffusion_da",
        "inference_library_version": __version__,
    }
    return {**created, **{name: _plain(value) for name, value in result.attributes.items()}}


def _plain(value: Any) -> str | int | float:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return str(value)
    return value


def _as_lists(group: xarray.Dataset, masks: Mapping[str, np.ndarray]) -> xarray.Dataset:
    """The group with each site cut down to what was observed, along one dimension."""
    import xarray

    variables: dict[Any, Any] = {}
    coordinates: dict[str, Any] = {name: group[name] for name in ("chain", "draw") if name in group.coords}
    for site, variable in group.data_vars.items():
        lead = [name for name in variable.dims if name in ("chain", "draw")]
        own = variable.dims[len(lead) :]
        # A multivariate site has one log-likelihood for several values: it is there when any of them is.
        kept = masks[str(site)].any(tuple(range(len(own), masks[str(site)].ndim)))
        if not kept.any():
            continue
        at: tuple[Any, ...] = np.nonzero(kept)
        dim = f"{site}_observed"
        variables[site] = ((*lead, dim), variable.values[(..., *at)], variable.attrs)
        coordinates[dim] = np.arange(len(at[0]))
        for name, index in zip(own, at, strict=True):
            coordinates[f"{site}_{name}"] = (dim, variable[name].values[index])
    return xarray.Dataset(variables, coordinates, {**group.attrs, "missing_observations": "left out"})
