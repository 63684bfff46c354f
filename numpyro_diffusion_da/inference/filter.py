"""`Filter`: the one loop over time, for any filter kernel, in independent chains."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from numpyro_diffusion_da.filters.base import FilterAlgorithm
from numpyro_diffusion_da.inference import backward_simulation as backward
from numpyro_diffusion_da.inference.batching import batch_in_memory, check_batch_size, particles_at_a_time
from numpyro_diffusion_da.inference.compilation import Compiled
from numpyro_diffusion_da.inference.progress import step_progress
from numpyro_diffusion_da.inference.storage import RunStore
from numpyro_diffusion_da.program.scan import TimeInputs
from numpyro_diffusion_da.program.state_space import StateSpaceModel
from numpyro_diffusion_da.results import smoothing
from numpyro_diffusion_da.results.advice import rejection_advice
from numpyro_diffusion_da.results.result import PER_PARTICLE, FilterResult
from numpyro_diffusion_da.results.summary import tempering_advice
from numpyro_diffusion_da.smc.base import Info, State, init

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
        if not isinstance(algorithm, FilterAlgorithm):
            raise TypeError(
                f"Filter got {type(algorithm).__name__}; give a filter of your program, "
                "as in Filter(ndda.FAAPF(model), num_particles=256)."
            )
        for name, value, least in (
            ("num_particles", num_particles, 1),
            ("num_chains", num_chains, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value}; give {least} or more.")
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
        self._compiled: dict[Any, Any] = {}

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
        program = StateSpaceModel(self.algorithm.model, args, kwargs)
        program.check(self.algorithm.needs_gaussian, self.algorithm.needs_gaussian_errors)
        start, step, _ = self._functions(program)
        given = (args, kwargs)
        attributes = self._attributes(program, rng_key)
        store = self._store(attributes)
        with step_progress(self.progress_bar, self.num_chains * program.length) as advance:
            chains = []
            for chain in range(self.num_chains):
                chain_key = jax.random.fold_in(rng_key, chain)
                init_key, run_key = jax.random.split(chain_key)
                state, xs = start(init_key, given)
                xs = jax.device_get(xs)  # a slice of a numpy array compiles nothing
                if store is not None:
                    store.check_program(jax.device_get(program.probe(_at_time(xs, 0))))
                steps = []
                done = 0 if store is None else min(store.steps_done(chain), program.length)
                for t in range(program.length):
                    inputs = _at_time(xs, t)
                    if store is not None and t < done:
                        output = store.outputs(chain, t, inputs)
                    else:
                        if store is not None and t == done > 0:
                            state = store.state(chain, state)
                        state, output = step(jax.random.fold_in(run_key, t), state, inputs, given)
                        output = jax.device_get(output)
                        self._check(output, t)
                        if store is not None:
                            store.save(chain, t, inputs, output, state)
                    steps.append(output)
                    advance(output["stats"])
                chains.append(jax.tree.map(lambda *v: np.stack(v), *steps))
        self._result = self._collect(program, attributes, chains)
        self._given, self._inputs = given, xs
        for advice in (rejection_advice(self._result), tempering_advice(self._result)):
            if advice is not None:
                warnings.warn(advice, stacklevel=2)

    def _functions(self, program: StateSpaceModel) -> tuple[Any, Any, Any]:
        """The jitted start, step and step back. Kept: a second run with the same shapes compiles nothing."""
        if not self._compiled:

            def start(rng_key: PRNGKeyArray, given: Any) -> tuple[State, PyTree]:
                at = program.at(*given)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(rng_key, jnp.arange(self.num_particles))
                return init(jax.vmap(at.initial)(keys)), at.inputs()

            batch_size = particles_at_a_time(self.batch_size, self.num_particles, program)

            def step(rng_key: PRNGKeyArray, state: State, inputs: TimeInputs, given: Any) -> Any:
                at = program.at(*given)
                new, info = self.algorithm.kernel(at, batch_size)(rng_key, state, inputs)
                first = jax.tree.map(lambda x: x[0], state.particles)
                stats = {
                    "log_weights": info.log_weights,
                    "ancestors": info.ancestors,
                    "ess": info.ess,
                    "tempering": info.tempering,
                    "log_evidence_increment": info.log_evidence_increment,
                    "distinct_ancestors": info.distinct_ancestors,
                    "log_weight_std": info.log_weight_std,
                    "solver_residual": info.proposal.draw.solver_residual,
                }
                return new, {
                    **({"forecast": self._forecast(at, info)} if self.keep_forecasts else {}),
                    "sites": self._kept(info.proposal.sites),
                    "stats": stats,
                    "passes": self.algorithm.passes(info)._asdict(),
                    "observations": at.observations(first, inputs),
                    **({} if info.check == () else {"rejected": info.check.rejected}),
                    "nonfinite_weights": info.nonfinite_weights,
                    "nonfinite_particles": info.nonfinite_particles,
                }

            def back(given: Any, *of_step: Any) -> backward.Selection:
                return backward.select(program.at(*given), *of_step)

            self._compiled = {"start": Compiled(start), "step": Compiled(step), "back": Compiled(back)}
        return self._compiled["start"], self._compiled["step"], self._compiled["back"]

    def _store(self, attributes: dict[str, Any]) -> RunStore | None:
        """Where steps are written."""
        if self.directory is None:
            return None
        kept = {name: getattr(self, name) for name in ("keep", "keep_observed", "keep_forecasts")}
        return RunStore(self.directory, {**attributes, **kept})

    def _kept(self, sites: dict[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
        if not self.keep_observed:
            sites = {**sites, "posterior_predictive": {}, "log_likelihood": {}}
        if self.keep is None:
            return sites
        if unknown := set(self.keep) - set(sites["posterior"]):
            known = sorted(sites["posterior"])
            raise ValueError(f"keep names {sorted(unknown)}, but the latent and deterministic sites are {known}.")
        return {**sites, "posterior": {name: sites["posterior"][name] for name in self.keep}}

    def _attributes(self, program: StateSpaceModel, rng_key: PRNGKeyArray) -> dict[str, Any]:
        """What is needed to run it again."""
        transition = program.diffusion()
        return {
            "model": program.name,
            "seed": str(np.asarray(jax.random.key_data(rng_key)).tolist()),
            "num_particles": self.num_particles,
            **({} if transition is None else transition.prior.provenance()),
            **self.algorithm.settings(program),
            "evidence_bias_reasons": "; ".join(self.algorithm.weight_bias_reasons(program)),
        }

    def _forecast(self, program: StateSpaceModel, info: Info) -> Array:
        forecast = getattr(info.weighing, "forecast", None)
        if forecast is None:
            raise ValueError(
                f"{self.algorithm} computes no one-step forecasts; leave keep_forecasts out, "
                "or use FAAPF with Dirac or Moment weights."
            )
        return self.algorithm.parents(program, info.ancestors, forecast)

    def _check(self, output: dict[str, Any], t: int) -> None:
        for name, site in output["observations"].items():
            if site["bad_error"]:
                raise ValueError(
                    f"the observation error of site '{name}' at step {t} is not positive and finite; "
                    "give a standard deviation above zero (mark a missing value by NaN in the observation)."
                )
            if np.any(np.isinf(site["value"])):
                raise ValueError(
                    f"site '{name}' has an infinite observation at step {t}; mark missing values with NaN."
                )
        n = self.num_particles
        for what, count in (("weights", output["nonfinite_weights"]), ("particles", output["nonfinite_particles"])):
            if count < n:
                continue
            for name, site in output["observations"].items():
                if site["undefined"]:
                    raise ValueError(
                        f"site '{name}' at step {t} compares {site['undefined']} observed values with NaN: what is "
                        "observed has no value in the state (sea surface temperature over land, say); mark those "
                        "observations missing with NaN, or leave them out."
                    )
            raise FloatingPointError(
                f"all {n} {what} are non-finite at step {t}; check the observations and their errors at that step, "
                "and the guidance (fewer solver products, a larger observation error)."
            )

    def _collect(self, program: StateSpaceModel, attributes: dict[str, Any], chains: list[Any]) -> FilterResult:
        outputs = jax.tree.map(lambda *v: np.stack(v), *chains)  # (chain, time, ...)

        def by_draw(x: np.ndarray) -> np.ndarray:
            return np.moveaxis(x, 1, 2)

        stats = {name: by_draw(x) if name in PER_PARTICLE else x for name, x in outputs["stats"].items()}
        groups = jax.tree.map(by_draw, outputs["sites"])
        observations = jax.tree.map(lambda x: x[0], outputs["observations"])
        transition = program.diffusion()
        has_state = program.latent_name in groups["posterior"]
        return FilterResult(
            posterior=groups["posterior"],
            posterior_predictive=groups.get("posterior_predictive", {}),
            log_likelihood=groups.get("log_likelihood", {}),
            observed_data={n: np.where(s["observed"], s["value"], np.nan) for n, s in observations.items()},
            observed_mask={n: s["observed"] for n, s in observations.items()},
            observed_error={n: s["error"] for n, s in observations.items()},
            forecast=by_draw(outputs["forecast"]) if self.keep_forecasts else None,
            sample_stats=stats,
            network_passes=outputs["passes"],
            latent_name=program.latent_name if has_state else next(iter(groups["posterior"])),
            layout=transition.prior.layout if transition is not None and has_state else None,
            attributes={
                **attributes,
                "num_chains": self.num_chains,
                "batch_size": particles_at_a_time(self.batch_size, self.num_particles, program) or self.num_particles,
            },
            rejected=outputs.get("rejected", {}),
        )

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
        program = StateSpaceModel(self.algorithm.model, args, kwargs)
        backward.check(program, result, num_draws)
        check_batch_size(batch_size)
        size = result.posterior[program.latent_name][0, 0, 0].size
        batch_size = batch_in_memory(
            batch_size, self.num_particles * num_draws, backward.bytes_of_density(program, size)
        )
        _, _, back = self._functions(program)

        def step(*of_step: Any) -> backward.Selection:
            return back(self._given, *of_step, batch_size)

        return backward.simulate(rng_key, result, lambda t: _at_time(self._inputs, t), step, num_draws, self._kept)

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
