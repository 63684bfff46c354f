"""`Filter`: the one loop over time, for any filter kernel, in independent chains."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import require_count
from numpyro_diffusion_da.filters.base import FilterAlgorithm, takes_algorithm
from numpyro_diffusion_da.inference import backward_simulation as backward
from numpyro_diffusion_da.inference.batching import batch_in_memory, check_batch_size, particles_at_a_time
from numpyro_diffusion_da.inference.compilation import Compiled
from numpyro_diffusion_da.inference.progress import step_progress
from numpyro_diffusion_da.inference.records import Keep, check_record, collect, record_step
from numpyro_diffusion_da.inference.storage import RunStore
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.results import smoothing
from numpyro_diffusion_da.results.advice import rejection_advice, tempering_advice
from numpyro_diffusion_da.results.result import FilterResult
from numpyro_diffusion_da.smc.base import State, init

if TYPE_CHECKING:
    import xarray


class Filter:
    """Runs a filter over a NumPyro program, as `numpyro.infer.MCMC` runs a sampler.

    Args:
        algorithm: `FAAPF(model)`, `GuidedPF(model)`, `Bootstrap(model)` or `EnKF(model)`.
        num_particles: particles N of each filter.
        num_chains: independent filters; they become the chains of the result.
        batch_size: particles moved at a time; None for as many as half of the device's memory takes. The result
            does not depend on it.
        progress_bar: show a bar over the steps.
        keep_forecasts: keep the one-step forecast that each particle came from (the group `prior` of the result).
        keep_observed: keep a predictive draw and the log-likelihood of each observation for every particle (the groups
            `posterior_predictive` and `log_likelihood`). They are as large as particles times observations.
        keep: latent and deterministic sites whose particles the result keeps; None for all. A state too large to keep
            at every step can so be reduced in the program, by a `numpyro.deterministic` of what is wanted.
        directory: where each step is written as it is made. A run that died goes on from its last step when it is
            started again with the same key and arguments, and gives what it would have given. None keeps nothing.

    Raises:
        ValueError: a number of particles or chains below 1, or a negative batch size.
        TypeError: `algorithm` is not a filter.
    """

    @takes_algorithm("num_particles=256")
    def __init__(
        self,
        algorithm: FilterAlgorithm,
        *,
        num_particles: int,
        num_chains: int = 1,
        batch_size: int | None = None,
        progress_bar: bool = True,
        keep_forecasts: bool = False,
        keep_observed: bool = True,
        keep: Sequence[str] | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        require_count(num_particles, "Filter", "num_particles")
        require_count(num_chains, "Filter", "num_chains")
        check_batch_size(batch_size)
        if keep is not None and (isinstance(keep, str) or not keep):
            raise ValueError(
                f"keep={keep!r}; give a list of one or more latent or deterministic sites, or None for all."
            )
        self.algorithm = algorithm
        self.num_particles = num_particles
        self.num_chains = num_chains
        self.batch_size = batch_size
        self.progress_bar = progress_bar
        self.keep_forecasts = keep_forecasts
        self.keep_observed = keep_observed
        self.keep = None if keep is None else tuple(keep)
        self.directory = directory
        self._result: FilterResult | None = None
        self._given: Any = None
        self._inputs: PyTree = None
        self._program: StateSpaceModel | None = None
        self._batch: int | None = None
        self._compiled: dict[str, Compiled] = {}

    def run(self, rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> None:
        """Filter the observations in the program's arguments.

        A chain's key is fold_in(rng_key, chain), a step's fold_in of that and the step, a particle's fold_in of that
        and the particle: neither batching nor the number of chains changes a draw. Warns where half of the weights or
        more are tempered to alpha below 0.1, and says what to do.

        Args:
            rng_key: from `jax.random.key`.
            *args: the program's arguments.
            **kwargs: the program's keyword arguments.

        Raises:
            ValueError: a program that cannot be filtered, an observation error that is not positive (naming the site
                and the step), or a `directory` that holds another run.
            FloatingPointError: every particle of a step is non-finite (naming the step).
        """
        program = self._prepared(args, kwargs)
        given = (args, kwargs)
        attributes = self._attributes(program, rng_key)
        store = self._store(attributes)
        with step_progress(self.progress_bar, self.num_chains * program.structure.length) as advance:
            chains = []
            for chain in range(self.num_chains):
                init_key, run_key = jax.random.split(jax.random.fold_in(rng_key, chain))
                state, xs = self._compiled["start"](init_key, given)
                xs = jax.device_get(xs)  # a slice of a numpy array compiles nothing
                done = 0
                if store is not None:
                    store.check_program(jax.device_get(program.probe(_at_time(xs, 0))))
                    done = min(store.steps_done(chain), program.structure.length)
                records = []
                for t in range(program.structure.length):
                    inputs = _at_time(xs, t)
                    if store is not None and t < done:
                        record = store.outputs(chain, t, inputs)
                    else:
                        if store is not None and t == done > 0:
                            state = store.state(chain, state)
                        step_key = jax.random.fold_in(run_key, t)
                        state, record = self._compiled["step"](step_key, state, inputs, given)
                        record = jax.device_get(record)
                        check_record(record, t, self.num_particles)
                        if store is not None:
                            store.save(chain, t, inputs, record, state)
                    records.append(record)
                    advance(record["stats"])
                chains.append(records)
        sizes = {"num_chains": self.num_chains, "batch_size": self._batch or self.num_particles}
        self._result = collect(program.structure, {**attributes, **sizes}, chains)
        self._given, self._inputs = given, xs
        for advice in (rejection_advice(self._result), tempering_advice(self._result)):
            if advice is not None:
                warnings.warn(advice, stacklevel=2)

    def _prepared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StateSpaceModel:
        """The program at these arguments, checked, with its functions compiled for it.

        A second run of a program with the same structure traces it once, checks nothing again and compiles nothing.
        """
        before = None if self._program is None else self._program.structure
        program = StateSpaceModel(self.algorithm.model, args, kwargs, like=before)
        if not program.structure.same_as(before):
            program.check(self.algorithm.needs_gaussian, self.algorithm.needs_gaussian_errors)
            self._batch = particles_at_a_time(self.batch_size, self.num_particles, program)
            self._compiled = self._functions(program)
        self._program = program
        return program

    def _functions(self, program: StateSpaceModel) -> dict[str, Compiled]:
        """The jitted first draw, step, and step back of backward simulation."""
        batch_size = self._batch

        def start(rng_key: PRNGKeyArray, given: Any) -> tuple[State, PyTree]:
            at = program.at(*given)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(rng_key, jnp.arange(self.num_particles))
            return init(jax.vmap(at.initial)(keys)), at.inputs()

        def step(rng_key: PRNGKeyArray, state: State, inputs: TimeInputs, given: Any) -> Any:
            at = program.at(*given)
            new, info = self.algorithm.kernel(at, batch_size)(rng_key, state, inputs)
            return new, record_step(self.algorithm, at, self._keep, info, state.particles, inputs)

        def back(given: Any, *of_step: Any) -> backward.Selection:
            return backward.select(program.at(*given), *of_step)

        return {"start": Compiled(start), "step": Compiled(step), "back": Compiled(back)}

    @property
    def _keep(self) -> Keep:
        return Keep(self.keep, self.keep_observed, self.keep_forecasts)

    def _store(self, attributes: dict[str, Any]) -> RunStore | None:
        """The directory of the run's steps; None where nothing is written."""
        if self.directory is None:
            return None
        kept = {name: getattr(self, name) for name in ("keep", "keep_observed", "keep_forecasts")}
        return RunStore(self.directory, {**attributes, **kept})

    def _attributes(self, program: StateSpaceModel, rng_key: PRNGKeyArray) -> dict[str, Any]:
        """The attributes that are enough to run it again."""
        diffusion = program.structure.diffusion
        return {
            "model": program.structure.name,
            "seed": str(np.asarray(jax.random.key_data(rng_key)).tolist()),
            "num_particles": self.num_particles,
            **({} if diffusion is None else diffusion.prior.provenance()),
            **self.algorithm.settings(program),
            "evidence_bias_reasons": "; ".join(self.algorithm.weight_bias_reasons(program)),
        }

    @property
    def result(self) -> FilterResult:
        """The arrays of the last run.

        Raises:
            RuntimeError: nothing has been run.
        """
        if self._result is None:
            raise RuntimeError("this Filter has not run yet; call .run(jax.random.key(0), ...) first.")
        return self._result

    def smoothed(self, lag: int | None = None) -> FilterResult:
        """The last run's particles given later observations too, from their genealogy (see `smoothing`).

        Args:
            lag: steps of later observations, as `smoothing.fixed_lag`; None for all of them: `smoothing.trajectories`.

        Raises:
            RuntimeError: nothing has been run.
            ValueError: a negative lag, or an ensemble Kalman filter, which has no genealogy.
        """
        return smoothing.trajectories(self.result) if lag is None else smoothing.fixed_lag(self.result, lag)

    def backward_simulation(
        self, rng_key: PRNGKeyArray, num_draws: int = 100, *, batch_size: int | None = None
    ) -> FilterResult:
        """Whole trajectories given all observations, for a transition with a density (see `backward`).

        Each draw is a path of particles, ``posterior[site][chain, i]``, whose links are drawn by the transition's
        density and not taken from the genealogy: lines part again after they have met, so that fewer draws are copies.
        Any filter's particles can be linked, an ensemble Kalman filter's too. What the program derives (deterministic
        sites, log-likelihoods, predictive draws) is computed along the paths; forecasts are those of the particles.
        `convert.to_datatree` and `convert.to_arviz` name the result as any other. Log-likelihoods are of all
        observations, those too that a gross-error check rejected.

        In `sample_stats`, `filter_draw` says which particle each draw is and `distinct_lines` counts them;
        `backward_ess` is the effective sample size of the weights that a link was chosen by, and
        `backward_passes_forward`, ... are the network passes of a draw's densities at each step.

        Args:
            rng_key: from `jax.random.key`; not the one of the run.
            num_draws: trajectories of each chain. Their cost is num_particles densities each and step.
            batch_size: densities computed at a time; None for as many as half of the device's memory takes. The result does not depend on it.

        Raises:
            RuntimeError: nothing has been run.
            ValueError: a transition without a density (a `DiffusionTransition` needs ``density=``), a carry that
                depends on more than the latent site, or a latent site that was not kept.
            FloatingPointError: no particle of a step can have led to the next (naming the step).
        """
        result = self.result
        args, kwargs = self._given
        program = self._prepared(args, kwargs)
        backward.check(program, result, num_draws)
        check_batch_size(batch_size)
        size = result.posterior[program.structure.latent_name][0, 0, 0].size
        batch_size = batch_in_memory(
            batch_size, self.num_particles * num_draws, backward.bytes_of_density(program, size)
        )

        def step(*of_step: Any) -> backward.Selection:
            return self._compiled["back"](self._given, *of_step, batch_size)

        return backward.simulate(rng_key, result, lambda t: _at_time(self._inputs, t), step, num_draws, self._keep.of)

    def to_datatree(
        self,
        *,
        lag: int | None = 0,
        time: Any = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Any] | None = None,
    ) -> xarray.DataTree:
        """The last run as an `xarray.DataTree`, see `convert.to_datatree`.

        Args:
            lag: each draw has seen the observations up to this many steps later: 0 is the filter, more is fixed-lag
                smoothing, None whole trajectories given all observations (see `smoothed`).
            time: coordinate of the time axis, one value a step.
            dims: names for a site's axes after time: ``{"y": ["station"]}``.
            coords: coordinate values of dimensions: ``{"station": ["Oslo", "Bergen"]}``.

        Raises:
            RuntimeError: nothing has been run.
            ValueError: names or coordinates that do not fit, or a lag that `smoothed` refuses.
        """
        from numpyro_diffusion_da.results import convert

        result = self.result if lag == 0 else self.smoothed(lag)
        return convert.to_datatree(result, time=time, dims=dims, coords=coords)

    def to_arviz(
        self,
        *,
        lag: int | None = 0,
        time: Any = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Any] | None = None,
    ) -> Any:
        """The last run as the installed ArviZ takes it; `convert.to_arviz` says what its numbers mean for particles.

        Arguments and errors as `to_datatree`.
        """
        from numpyro_diffusion_da.results import convert

        result = self.result if lag == 0 else self.smoothed(lag)
        return convert.to_arviz(result, time=time, dims=dims, coords=coords)

    def print_summary(self) -> None:
        """Print what to look at first after a run, see `summary.summary`.

        Raises:
            RuntimeError: nothing has been run.
        """
        from rich.console import Console

        from numpyro_diffusion_da.results.summary import summary_table

        Console().print(summary_table(self.result))


def _at_time(xs: PyTree, t: int) -> TimeInputs:
    """The scan's slice at step t, for inputs in numpy."""
    return TimeInputs(jnp.asarray(t), jax.tree.map(lambda x: x[t], xs))
