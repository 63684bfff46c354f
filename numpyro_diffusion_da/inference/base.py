"""Base class of `PMMH` and `SMC2`: compiled evidence of a filter at parameters of a program, and access to results."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.arguments import require_count, require_flag
from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.inference.batching import check_batch_size, particles_at_a_time, split_batch
from numpyro_diffusion_da.inference.compilation import Compiled, HoldsCompiled
from numpyro_diffusion_da.inference.devices import to_host, usable_mesh
from numpyro_diffusion_da.inference.evidence import EvidenceEstimator, FilterEvidence, check_evidence
from numpyro_diffusion_da.program.parameters import GlobalParameters
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.results.result import ParameterResult
from numpyro_diffusion_da.smc.mesh import check_mesh, map_filters

if TYPE_CHECKING:
    import xarray

BATCH = 16
"""Number of positions at which one call estimates the evidence."""

REPEATS = 2
"""Number of such calls that estimate the standard deviation of log p^(y) at one position."""


class ParameterInference(HoldsCompiled, abc.ABC):
    """Base class of runs that draw the global parameters of a program, without the method that draws them.

    Args:
        algorithm: filter of a program that estimates its evidence.
        num_particles: number of particles N of the filter.
        num_chains: number of independent chains.
        batch_size: number of particles moved at a time, over all filters; None for as many as fit into half of the
            device's memory, and on a CPU for no more than its cores move fastest.
        progress_bar: whether to show a progress bar.
        mesh: devices that share the particles of each filter, or whole filters; None for one device.
        **numbers: other arguments that must be whole numbers of 1 or more (`num_warmup`: 0 or more), by name.

    Raises:
        ValueError: a number is too small.
        TypeError: a number is not a whole number.
    """

    without_compiled: ClassVar[Mapping[str, Any]] = {"_compiled": {}}

    divided: ClassVar[str] = "num_particles"
    """Name of the number that the devices of a mesh divide. If it is another one, each filter is on one device."""

    def __init__(
        self,
        algorithm: FilterAlgorithm,
        num_particles: int,
        num_chains: int,
        batch_size: int | None,
        progress_bar: bool,
        mesh: Mesh | None,
        **numbers: int,
    ) -> None:
        check_batch_size(batch_size, type(self).__name__)
        numbers = {"num_particles": num_particles, "num_chains": num_chains, **numbers}
        for name, value in numbers.items():
            require_count(value, self, name, least=0 if name == "num_warmup" else 1)
        self.algorithm = algorithm
        self.num_particles = int(num_particles)
        self.num_chains = int(num_chains)
        self.batch_size = batch_size
        self.progress_bar = require_flag(progress_bar, self, "progress_bar")
        owner, divided = type(self).__name__, self.divided
        self._within: Mesh | None = None  # devices that share the particles of each filter
        self._across: Mesh | None = None  # devices that share whole filters
        if divided == "num_particles":
            self.mesh = self._within = usable_mesh(mesh, owner, algorithm, num_particles)
        else:
            self.mesh = self._across = check_mesh(mesh, owner, numbers[divided], divided)
        self._estimator = EvidenceEstimator(algorithm, num_particles)
        self._filters_at_a_time: int | None = None
        self._compiled: dict[str, Compiled] = {}
        self._result: ParameterResult | None = None

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[GlobalParameters, dict[str, Any]]:
        """Check the program at given arguments, and prepare the compiled functions.

        Returns:
            (global parameters of the program; attributes of the result that are known before the run).

        Raises:
            ValueError: the program has no global parameters or a discrete one, the filter cannot run it, or the filter
                does not estimate the evidence.
        """
        name = type(self).__name__
        parameters = GlobalParameters(StateSpaceModel(self.algorithm.model, args, kwargs))
        known = parameters.placeholder()
        bias_reasons = check_evidence(self.algorithm, known, name)
        batch = particles_at_a_time(self.batch_size, self.num_particles * self._num_filters(), known, self.mesh)
        share = self.num_particles if self._within is None else self.num_particles // self._within.size
        self._filters_at_a_time, of_filter = split_batch(batch, share)
        self._estimator = EvidenceEstimator(self.algorithm, self.num_particles, of_filter, self._within)
        for part, fn in self._parts(parameters).items():
            self._compiled.setdefault(part, Compiled(fn)).read_anew(fn)
        return parameters, {
            "inference": name,
            "model": parameters.program.structure.name,
            "num_particles": self.num_particles,
            **self.algorithm.settings(known),
            "evidence_bias_reasons": "; ".join(bias_reasons),
        }

    def _map_filters(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Map a function that runs a filter over the leading axis of its arguments, as batches and devices allow."""
        return map_filters(fn, self._across, self._filters_at_a_time)

    @abc.abstractmethod
    def _num_filters(self) -> int:
        """Largest number of filters that run at the same time."""

    def _parts(self, parameters: GlobalParameters) -> dict[str, Callable[..., Any]]:
        """Functions to compile, by name; a second run with arguments of the same shapes does not compile again."""

        def evaluate(rng_key: Any, positions: Array, given: Any) -> FilterEvidence:
            keys = jax.random.split(rng_key, BATCH)
            evidence = self._map_filters(self._evidence(parameters.at(*given)))(keys, positions)
            return FilterEvidence(evidence.state._replace(particles=()), evidence.passes)

        def values(positions: Array, given: Any) -> dict[str, Array]:
            flat = jax.vmap(parameters.at(*given).values)(positions.reshape(-1, parameters.size))
            return jax.tree.map(lambda v: v.reshape(*positions.shape[:-1], *v.shape[1:]), flat)

        return {"evaluate": evaluate, "values": values}

    def _evidence(self, parameters: GlobalParameters) -> Callable[..., FilterEvidence]:
        """Function (rng_key, position[, steps]) -> `FilterEvidence` of the filter at this position."""

        def run(rng_key: PRNGKeyArray, position: Array, steps: Any = None) -> FilterEvidence:
            return self._estimator.run(rng_key, parameters.filterable(position), steps)

        return run

    def _at(self, rng_key: PRNGKeyArray, positions: Any, given: Any) -> tuple[np.ndarray, dict[str, float]]:
        """Log-evidences at `BATCH` positions, shape (BATCH,), and mean network passes of one run of the filter."""
        evidence = to_host(self._compiled["evaluate"](rng_key, positions, given))
        passes = {f"network_passes_{n}": float(v.mean()) for n, v in evidence.passes._asdict().items()}
        return evidence.state.log_evidence.astype(np.float64), passes

    def _spread(self, rng_key: PRNGKeyArray, position: Float[np.ndarray, " d"], given: Any) -> dict[str, float]:
        """Standard deviation of log p^(y) at one position, shape (d,), and network passes of one estimate."""
        positions = np.broadcast_to(position, (BATCH, *position.shape)).astype(jnp.zeros(()).dtype)
        runs = [self._at(jax.random.fold_in(rng_key, i), positions, given) for i in range(REPEATS)]
        return {"log_evidence_std": float(np.concatenate([logs for logs, _ in runs]).std(ddof=1)), **runs[0][1]}

    def _values(self, positions: np.ndarray, given: Any) -> dict[str, np.ndarray]:
        """Convert positions, shape (..., d), to the values of the parameters in their own space, by site."""
        return {name: np.asarray(value) for name, value in to_host(self._compiled["values"](positions, given)).items()}

    # --- the result ---------------------------------------------------------------------------------------------------

    @property
    def result(self) -> ParameterResult:
        """Result of the last run, as numpy arrays: ``result.posterior[site]`` has the shape (chain, draw, ...).

        Raises:
            RuntimeError: `run` has not been called.
        """
        if self._result is None:
            raise RuntimeError(f"this {type(self).__name__} has not run yet; call .run(jax.random.key(0), ...) first.")
        return self._result

    def get_samples(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """Draws of each parameter given all observations, by site.

        Args:
            group_by_chain: whether to keep the chains apart.

        Returns:
            Arrays of shape (chains x draws, ...), or (chains, draws, ...) with `group_by_chain`.

        Raises:
            RuntimeError: `run` has not been called.
        """
        posterior = self.result.posterior
        return posterior if group_by_chain else {n: v.reshape(-1, *v.shape[2:]) for n, v in posterior.items()}

    def print_summary(self) -> None:
        """Print a summary of the last run: acceptance, evidence, cost, and the parameters.

        `results.parameter_summary_table` makes the tables.

        Raises:
            RuntimeError: `run` has not been called.
        """
        from rich.console import Console

        from numpyro_diffusion_da.results.summary import parameter_summary_table

        Console().print(parameter_summary_table(self.result))

    def to_datatree(
        self, *, dims: Mapping[str, Sequence[str]] | None = None, coords: Mapping[str, Any] | None = None
    ) -> xarray.DataTree:
        """Result of the last run as an `xarray.DataTree`, made by `results.parameters_to_datatree`.

        Args:
            dims: names of a parameter's axes: ``{"bias": ["station"]}``.
            coords: coordinates of dimensions: ``{"station": ["Oslo", "Bergen"]}``.

        Raises:
            RuntimeError: `run` has not been called.
            ValueError: `dims` or `coords` do not fit the parameters, or name some that do not exist.
        """
        from numpyro_diffusion_da.results import convert

        return convert.parameters_to_datatree(self.result, dims=dims, coords=coords)

    def to_arviz(
        self, *, dims: Mapping[str, Sequence[str]] | None = None, coords: Mapping[str, Any] | None = None
    ) -> Any:
        """Result of the last run in the form that the installed ArviZ takes, made by `results.parameters_to_arviz`.

        Args:
            dims: names of a parameter's axes: ``{"bias": ["station"]}``.
            coords: coordinates of dimensions: ``{"station": ["Oslo", "Bergen"]}``.

        Raises:
            RuntimeError: `run` has not been called.
            ValueError: `dims` or `coords` do not fit the parameters, or name some that do not exist.
        """
        from numpyro_diffusion_da.results import convert

        return convert.parameters_to_arviz(self.result, dims=dims, coords=coords)
