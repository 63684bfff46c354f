"""What `PMMH` and `SMC2` share: a filter's evidence at parameters of a program, compiled; and their results."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.arguments import require_count
from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.inference.batching import check_batch_size, particles_at_a_time, split_batch
from numpyro_diffusion_da.inference.compilation import Compiled
from numpyro_diffusion_da.inference.evidence import EvidenceEstimator, FilterEvidence, check_evidence
from numpyro_diffusion_da.program.parameters import GlobalParameters
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.results.result import ParameterResult
from numpyro_diffusion_da.smc.base import map_particles

if TYPE_CHECKING:
    import xarray

BATCH = 16  # points at which the evidence is estimated in one call
REPEATS = 2  # such calls for the spread of log p^(y) at one point


class ParameterInference(abc.ABC):
    """Draws of a program's global parameters; the part of it that does not depend on how they are made."""

    def __init__(
        self,
        algorithm: FilterAlgorithm,
        num_particles: int,
        batch_size: int | None,
        progress_bar: bool,
        **numbers: int,
    ) -> None:
        check_batch_size(batch_size)
        for name, value in {"num_particles": num_particles, **numbers}.items():
            require_count(value, self, name, least=0 if name == "num_warmup" else 1)
        self.algorithm = algorithm
        self.num_particles = num_particles
        self.batch_size = batch_size
        self.progress_bar = progress_bar
        self._estimator = EvidenceEstimator(algorithm, num_particles)
        self._filters_at_a_time: int | None = None
        self._compiled: dict[str, Compiled] = {}
        self._result: ParameterResult | None = None

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[GlobalParameters, dict[str, Any]]:
        """The program's parameters, and the attributes of a result that are known before it is there."""
        name = type(self).__name__
        parameters = GlobalParameters(StateSpaceModel(self.algorithm.model, args, kwargs))
        known = parameters.placeholder()
        bias_reasons = check_evidence(self.algorithm, known, name)
        if not self._compiled:
            batch = particles_at_a_time(self.batch_size, self.num_particles * self._num_filters(), known)
            self._filters_at_a_time, of_filter = split_batch(batch, self.num_particles)
            self._estimator = EvidenceEstimator(self.algorithm, self.num_particles, of_filter)
            self._compiled = {part: Compiled(fn) for part, fn in self._parts(parameters).items()}
        return parameters, {
            "inference": name,
            "model": parameters.program.structure.name,
            "num_particles": self.num_particles,
            **self.algorithm.settings(known),
            "evidence_bias_reasons": "; ".join(bias_reasons),
        }

    @abc.abstractmethod
    def _num_filters(self) -> int:
        """The number of filters that run side by side."""

    def _parts(self, parameters: GlobalParameters) -> dict[str, Callable[..., Any]]:
        """What is compiled. Kept, so that a second run with arguments of the same shapes compiles nothing."""

        def evaluate(rng_key: Any, positions: Array, given: Any) -> FilterEvidence:
            keys = jax.random.split(rng_key, BATCH)
            evidence = map_particles(self._evidence(parameters.at(*given)), self._filters_at_a_time)(keys, positions)
            return FilterEvidence(evidence.state._replace(particles=()), evidence.passes)

        def values(positions: Array, given: Any) -> dict[str, Array]:
            flat = jax.vmap(parameters.at(*given).values)(positions.reshape(-1, parameters.size))
            return jax.tree.map(lambda v: v.reshape(*positions.shape[:-1], *v.shape[1:]), flat)

        return {"evaluate": evaluate, "values": values}

    def _evidence(self, parameters: GlobalParameters) -> Callable[..., FilterEvidence]:
        """(rng_key, position[, steps]) -> what the filter leaves behind there."""

        def run(rng_key: PRNGKeyArray, position: Array, steps: Any = None) -> FilterEvidence:
            return self._estimator.run(rng_key, parameters.filterable(position), steps)

        return run

    def _at(self, rng_key: PRNGKeyArray, positions: Any, given: Any) -> tuple[np.ndarray, dict[str, float]]:
        """Log-evidences at `BATCH` positions, and mean network passes of one run of the filter."""
        evidence = jax.device_get(self._compiled["evaluate"](rng_key, positions, given))
        passes = {f"network_passes_{n}": float(v.mean()) for n, v in evidence.passes._asdict().items()}
        return evidence.state.log_evidence.astype(np.float64), passes

    def _spread(self, rng_key: PRNGKeyArray, position: Float[np.ndarray, " d"], given: Any) -> dict[str, float]:
        """Standard deviation of log p^(y) at one position, and network passes of one estimate."""
        positions = np.broadcast_to(position, (BATCH, *position.shape)).astype(jnp.zeros(()).dtype)
        runs = [self._at(jax.random.fold_in(rng_key, i), positions, given) for i in range(REPEATS)]
        return {"log_evidence_std": float(np.concatenate([logs for logs, _ in runs]).std(ddof=1)), **runs[0][1]}

    def _values(self, positions: np.ndarray, given: Any) -> dict[str, np.ndarray]:
        """GlobalParameters of positions (..., d), in their own space."""
        return {name: np.asarray(value) for name, value in self._compiled["values"](positions, given).items()}

    # --- the result ---------------------------------------------------------------------------------------------------

    @property
    def result(self) -> ParameterResult:
        """The arrays of the last run.

        Raises:
            RuntimeError: nothing has been run.
        """
        if self._result is None:
            raise RuntimeError(f"this {type(self).__name__} has not run yet; call .run(jax.random.key(0), ...) first.")
        return self._result

    def get_samples(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """The draws of each parameter, (chain x draw, ...), or (chain, draw, ...) by chain.

        Raises:
            RuntimeError: nothing has been run.
        """
        posterior = self.result.posterior
        return posterior if group_by_chain else {n: v.reshape(-1, *v.shape[2:]) for n, v in posterior.items()}

    def print_summary(self) -> None:
        """Print what to look at first after a run, see `summary.parameter_summary`.

        Raises:
            RuntimeError: nothing has been run.
        """
        from rich.console import Console

        from numpyro_diffusion_da.results.summary import parameter_summary_table

        Console().print(parameter_summary_table(self.result))

    def to_datatree(
        self, *, dims: Mapping[str, Sequence[str]] | None = None, coords: Mapping[str, Any] | None = None
    ) -> xarray.DataTree:
        """The last run as an `xarray.DataTree`, see `convert.parameters_to_datatree`.

        Args:
            dims: names for a parameter's axes: ``{"bias": ["station"]}``.
            coords: coordinate values of dimensions: ``{"station": ["Oslo", "Bergen"]}``.

        Raises:
            RuntimeError: nothing has been run.
            ValueError: names or coordinates that do not fit.
        """
        from numpyro_diffusion_da.results import convert

        return convert.parameters_to_datatree(self.result, dims=dims, coords=coords)

    def to_arviz(
        self, *, dims: Mapping[str, Sequence[str]] | None = None, coords: Mapping[str, Any] | None = None
    ) -> Any:
        """The last run as the installed ArviZ takes it, see `convert.parameters_to_arviz`.

        Arguments and errors as `to_datatree`.
        """
        from numpyro_diffusion_da.results import convert

        return convert.parameters_to_arviz(self.result, dims=dims, coords=coords)
