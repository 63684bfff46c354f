"""A NumPyro program as a state-space model: initial state, transition, likelihood, next carry.

The program is an ordinary one: initial state outside, then `numpyro.contrib.control_flow.scan` over time, with one
latent site and any number of observed sites in its body.

The scan's body may close over arrays that exist only inside the current JAX trace. So the program is run up to its scan
wherever its parts are needed; `StateSpaceModel.at` runs it once for all that one compiled function needs.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree
from numpyro import handlers

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.observation.likelihood import (
    GaussianLikelihood,
    GaussianObservation,
    GeneralLikelihood,
    GeneralObservation,
    Likelihood,
)
from numpyro_diffusion_da.observation.linear_predictor import LinearPredictor, find_linear_predictor
from numpyro_diffusion_da.program.distribution import DiffusionTransition
from numpyro_diffusion_da.program.scan import BodySites, ScanCall, TimeInputs, abstractly, run_body, run_to_scan
from numpyro_diffusion_da.program.sites import (
    dynamics_of,
    gaussian_observations,
    general_observation,
    non_positive_error,
    observation_error,
    pointwise_log_likelihood,
    predicted_observation,
    site_mask,
    site_mean,
    undefined_means,
)
from numpyro_diffusion_da.program.structure import Structure, trace_structure
from numpyro_diffusion_da.transition.base import DrawRecord, Dynamics


class StateSpaceModel:
    """The state-space model inside a NumPyro program, at given arguments.

    Building one traces the program and checks its form; nothing is computed. `structure` says what was found.

    Args:
        model: the program.
        args: its positional arguments.
        kwargs: its keyword arguments.
        like: the structure that the program probably has, which saves one trace of it.

    Raises:
        ValueError: no scan or several, an observation of the initial state outside the scan, sites after the scan, or
            not exactly one latent site in the body. The sentence names the site.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        like: Structure | None = None,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs or {}
        self.structure = trace_structure(self.model, self.args, self.kwargs, like)
        self._call: ScanCall | None = None
        self._left_out: dict[str, Array] = {}

    def at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StateSpaceModel:
        """The same structure at other arguments (tracers, say), run up to its scan once.

        What it returns belongs to the trace that is being made: use it inside the function that is being compiled.
        """
        other = copy.copy(self)
        other.args, other.kwargs = args, kwargs
        return other._run()

    def given(self, values: dict[str, Array]) -> StateSpaceModel:
        """The same program with its global sites at these values: a program that a filter can run."""
        other = copy.copy(self)
        other.model = handlers.substitute(self.model, data=values)
        other.structure = dataclasses.replace(self.structure, needed_names=(), global_names=())
        return other._run()

    def without(self, left_out: dict[str, Array]) -> StateSpaceModel:
        """The same program with observed values missing where True, by site, at the shape of the value (or tracers)."""
        other = copy.copy(self)
        other._left_out = left_out
        return other

    def _run(self) -> StateSpaceModel:
        self._call = None
        self._call = self.call(jax.random.key(0))
        return self

    # --- the parts a filter needs -------------------------------------------------------------------------------

    def call(self, rng_key: PRNGKeyArray) -> ScanCall:
        """Run the program up to its scan."""
        call = run_to_scan(lambda: self.model(*self.args, **self.kwargs), rng_key)
        if call is None:
            raise ValueError(
                f"the program '{self.structure.name}' has no numpyro.contrib.control_flow.scan; "
                "write its time loop as scan(step, x0, observations)."
            )
        return call

    def _scan(self) -> ScanCall:
        """The call of the scan with any first carry: that of `at`, or a new run of the program."""
        return self.call(jax.random.key(0)) if self._call is None else self._call

    def initial(self, rng_key: PRNGKeyArray) -> PyTree:
        """A draw of the scan's first carry."""
        return self.call(rng_key).init

    def inputs(self) -> PyTree:
        """The scan's `xs`, observations included; leading axis time."""
        return self._scan().xs

    def time_inputs(self) -> TimeInputs:
        """The inputs of all times; leading axis time."""
        return TimeInputs(jnp.arange(self.structure.length), jax.tree.map(jnp.asarray, self.inputs()))

    def sites(self, carry: PyTree, inputs: TimeInputs, x: Array | None = None) -> BodySites:
        """The sites of the body at a given carry and, where given, value of the latent site."""
        key = jax.random.key(0)  # never used: the one latent site is given its value
        sites = run_body(self._scan(), key, carry, inputs, x)[0]
        for name, left_out in self._left_out.items():
            site = sites.observed[name]
            sites.observed[name] = site._replace(value=jnp.where(left_out, jnp.nan, site.value))
        return sites

    def _latent(self, carry: PyTree, inputs: TimeInputs) -> Any:
        """The distribution of the latent site."""
        return self.sites(carry, inputs).latent[self.structure.latent_name]

    def transition(self, carry: PyTree, inputs: TimeInputs, sampler: Sampler | None = None) -> Dynamics:
        """The dynamics p(x' | c); `sampler` replaces the transition's own where given.

        Raises:
            ValueError: the latent site's distribution is neither a diffusion nor Gaussian.
        """
        return dynamics_of(self.structure.latent_name, self._latent(carry, inputs), sampler)

    def draw(
        self, rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs, sampler: Sampler | None = None
    ) -> tuple[Array, DrawRecord]:
        """A draw x' ~ p(x' | c) with its record, for any distribution that can be sampled."""
        fn = self._latent(carry, inputs)
        if isinstance(fn, DiffusionTransition):
            return dynamics_of(self.structure.latent_name, fn, sampler).draw(rng_key)
        return fn.sample(rng_key), DrawRecord(NetworkPasses.of(), jnp.zeros(()))

    def working_bytes(self) -> int:
        """About how many bytes it takes to move one particle: `DiffusionDynamics.working_bytes`; 0 in closed form."""
        found: list[int] = []

        def look() -> None:
            call = self._scan()
            fn = self._latent(call.init, call.first_inputs())
            if isinstance(fn, DiffusionTransition):
                found.append(fn.only_step().working_bytes())

        jax.eval_shape(look)
        return sum(found)

    def check(self, needs_dynamics: bool, gaussian_errors: bool = False) -> None:
        """Refuse a program that a filter cannot run, before anything is compiled.

        Args:
            needs_dynamics: whether the filter needs the transition as `Dynamics`, and a likelihood that can guide.
            gaussian_errors: whether the filter needs Gaussian observations.

        Raises:
            ValueError: one sentence naming the site: a global site whose value is not known, among others.
        """
        for name in self.structure.needed_names:
            raise ValueError(
                f"the scan of '{self.structure.name}' uses the unobserved site '{name}', which is outside it; a filter "
                f"needs its value: wrap the program in handlers.condition(model, {{'{name}': value}}), or infer it "
                "with ndda.PMMH."
            )
        for name in self.structure.scaled_names:
            raise ValueError(
                f"site '{name}' is under handlers.scale, which a filter cannot take for a latent site; "
                "scale observed sites only."
            )

        def look() -> None:
            here = copy.copy(self)._run()
            call = here._scan()
            given = call.init, call.first_inputs()
            if needs_dynamics:
                here.likelihood(*given).log_prob(here.transition(*given).moments().mean)
            if gaussian_errors:
                here.gaussian_likelihood(*given).log_prob(jnp.zeros(self.structure.state_shape))

        abstractly(look)

    def likelihood(self, carry: PyTree, inputs: TimeInputs) -> Likelihood:
        """log p(y | x') of all observed sites: Gaussian where all are, with errors that x' does not change.

        Raises:
            ValueError: a site whose elements are vectors and not Gaussian.
        """
        if not self.structure.general_names:
            return self.gaussian_likelihood(carry, inputs)

        taken_apart = {name: self._linear_predictor(name, carry, inputs) for name in self.structure.general_names}

        def observe(x: Array) -> list[GaussianObservation | GeneralObservation]:
            found: list[GaussianObservation | GeneralObservation] = []
            for name, site in self.sites(carry, inputs, x).observed.items():
                if (parts := taken_apart.get(name)) is not None:
                    found.append(
                        predicted_observation(site.fn, site.value, parts.predictor(x), parts.link, parts.components)
                    )
                elif name in self.structure.general_names:
                    found.append(general_observation(name, *site))
                else:
                    found.extend(gaussian_observations(name, *site))
            return found

        return GeneralLikelihood(observe)

    def _linear_predictor(self, name: str, carry: PyTree, inputs: TimeInputs) -> LinearPredictor | None:
        """The log-likelihood of a site's elements as a link of a linear predictor; None where it is not one."""

        def logs(x: Array) -> Array:
            return pointwise_log_likelihood(*self.sites(carry, inputs, x).observed[name]).reshape(-1)

        return find_linear_predictor(logs, self.structure.state_shape)

    def gaussian_likelihood(self, carry: PyTree, inputs: TimeInputs) -> GaussianLikelihood:
        """The same for Gaussian sites only, whose errors may change with x': the derivative of that is left out.

        Raises:
            ValueError: an observed site that is not Gaussian.
        """

        def observe(x: Array) -> list[GaussianObservation]:
            sites = self.sites(carry, inputs, x).observed
            return [seen for name, site in sites.items() for seen in gaussian_observations(name, *site)]

        return GaussianLikelihood(observe)

    def advance(self, x: Array, carry: PyTree, inputs: TimeInputs) -> PyTree:
        """The next carry, once the latent site has the value x."""
        new = self.sites(carry, inputs, x).carry
        # Weak types and Python numbers in a carry would make the second step differ from the first: compile twice.
        return jax.tree.map(lambda value, old: jnp.asarray(value, jnp.result_type(old)), new, carry)

    def record(self, rng_key: PRNGKeyArray, x: Array, carry: PyTree, inputs: TimeInputs) -> dict[str, Any]:
        """What the result keeps of one analysis particle.

        Returns:
            posterior (latent site and deterministic sites), posterior_predictive (a draw of each observed site),
            log_likelihood (elementwise where the site is independent; 0 where missing).
        """
        sites = self.sites(carry, inputs, x)
        predictive, log_likelihood = {}, {}
        for i, (name, site) in enumerate(sites.observed.items()):
            predictive[name] = site.fn.sample(jax.random.fold_in(rng_key, i))
            log_likelihood[name] = pointwise_log_likelihood(*site)
        posterior = {self.structure.latent_name: x, **sites.deterministic}
        return {"posterior": posterior, "posterior_predictive": predictive, "log_likelihood": log_likelihood}

    def observations(self, carry: PyTree, inputs: TimeInputs) -> dict[str, dict[str, Array]]:
        """Each observed site's value, its error's standard deviation, and what is observed, at one time.

        The error is NaN for a site that is not Gaussian; errors that depend on the state are those of this carry.
        """
        sites = self.sites(carry, inputs)
        return {
            name: {
                "value": value,
                "observed": ~jnp.isnan(value) & site_mask(fn),
                "error": observation_error(fn),
                "bad_error": non_positive_error(fn),
                "undefined": undefined_means(fn, value),
            }
            for name, (fn, value, _) in sites.observed.items()
        }

    def probe(self, inputs: TimeInputs) -> dict[str, Array]:
        """Means and errors of Gaussian sites, and deterministic sites, at one arbitrary state, by name.

        Two programs that differ in what they observe, how well, or what they derive, differ here.
        """
        call = self._scan()
        state = jax.random.normal(jax.random.key(0), self.structure.state_shape)
        sites = run_body(call, jax.random.key(0), call.init, inputs, state)[0]
        means = {f"mean of {name}": site_mean(fn) for name, (fn, *_) in sites.observed.items()}
        errors = {f"error of {name}": observation_error(fn) for name, (fn, *_) in sites.observed.items()}
        return {**means, **errors, **{name: jnp.asarray(value) for name, value in sites.deterministic.items()}}

    def look(self, at: Callable[[BodySites], Any]) -> Any:
        """Types and shapes of what `at` returns for the body's sites at the first time; nothing is computed.

        Raises:
            ValueError: raised by `at`.
        """

        def sites() -> Any:
            call = self._scan()
            return at(self.sites(call.init, call.first_inputs()))

        return abstractly(sites)
