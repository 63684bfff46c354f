"""A NumPyro program as a state-space model: initial state, transition, likelihood, next carry.

The program draws its initial state and then runs `numpyro.contrib.control_flow.scan` over time. The scan's body has one
latent site and any number of observed sites.

The scan's body may close over arrays that exist only inside the current JAX trace. The program is therefore run up to
its scan wherever its parts are needed. `StateSpaceModel.at` runs it once for all uses inside one compiled function.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Key, PRNGKeyArray, PyTree
from numpyro import handlers

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.prior import Conditioning
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.diffusion.steps import Step
from numpyro_diffusion_da.observation.likelihood import (
    GaussianLikelihood,
    GaussianObservation,
    GeneralLikelihood,
    GeneralObservation,
    Likelihood,
)
from numpyro_diffusion_da.observation.linear_predictor import LinearPredictor, find_linear_predictor
from numpyro_diffusion_da.program.arrays import as_arguments
from numpyro_diffusion_da.program.distribution import EmulatorTransition
from numpyro_diffusion_da.program.scan import (
    BodySites,
    ScanCall,
    TimeInputs,
    abstractly,
    run_body,
    run_to_scan,
)
from numpyro_diffusion_da.program.sites import (
    dynamics_of,
    gaussian_observations,
    general_observation,
    is_factor,
    non_positive_error,
    observation_error,
    observed_elements,
    pointwise_log_likelihood,
    predicted_observation,
    undefined_means,
)
from numpyro_diffusion_da.program.structure import Structure, name_of, trace_structure
from numpyro_diffusion_da.transition.base import Centering, DrawRecord, Dynamics


class StateSpaceModel:
    """State-space model inside a NumPyro program, at given arguments of the program.

    The constructor traces the program and checks its form; it computes nothing.

    Args:
        model: NumPyro program with one scan over time.
        args: positional arguments of the program.
        kwargs: keyword arguments of the program.
        like: structure that the program probably has, from an earlier trace. If it fits, the program is traced once
            and not twice.

    Attributes:
        model: the program.
        args: positional arguments of the program, with arrays and tables as JAX arrays.
        kwargs: keyword arguments of the program, likewise.
        structure: sites, shapes and dependencies found in the program, see `program.structure.Structure`.

    Raises:
        ValueError: the program has no scan or several, the initial state is observed outside the scan, there are sites
            after the scan, the body does not have exactly one latent site or has no observed site, or shapes do not
            fit each other. The message names the site.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        like: Structure | None = None,
    ) -> None:
        self.model = model
        self.args, self.kwargs = as_arguments(model, args, kwargs or {}, name_of(model))
        self.structure = trace_structure(self.model, self.args, self.kwargs, like)
        self._call: ScanCall | None = None
        self._left_out: dict[str, Array] = {}

    def at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StateSpaceModel:
        """Run the program up to its scan at other arguments, and return the model at these arguments.

        The structure stays the same. Arguments may be tracers. Then the returned model belongs to the current JAX
        trace, and must be used inside the function that is being compiled.

        Args:
            args: positional arguments of the program, of the same shapes.
            kwargs: keyword arguments of the program, of the same shapes.
        """
        other = copy.copy(self)
        other.args, other.kwargs = args, kwargs
        return other._run()

    def given(self, values: dict[str, Array]) -> StateSpaceModel:
        """Return the model with its global sites fixed at given values, which a filter can run.

        Args:
            values: value of each global site, by name.
        """
        other = copy.copy(self)
        other.model = handlers.substitute(self.model, data=values)
        other.structure = dataclasses.replace(self.structure, needed_names=(), global_names=())
        return other._run()

    def without(self, left_out: dict[str, Array]) -> StateSpaceModel:
        """Return the model with some of its observed values marked as missing.

        Args:
            left_out: for each affected site a mask in the shape of its value at one time, True where the value is to be
                missing. Masks may be tracers.
        """
        other = copy.copy(self)
        other._left_out = left_out
        return other

    def _run(self) -> StateSpaceModel:
        """Run the program up to its scan, and keep the arguments of the scan."""
        self._call = None
        self._call = self.call(jax.random.key(0))
        return self

    # --- the parts a filter needs -------------------------------------------------------------------------------

    def call(self, rng_key: PRNGKeyArray) -> ScanCall:
        """Run the program up to its scan, and return the scan's arguments.

        Args:
            rng_key: random key of the draws before the scan.

        Raises:
            ValueError: the program has no scan.
        """
        call = run_to_scan(lambda: self.model(*self.args, **self.kwargs), rng_key)
        if call is None:
            raise ValueError(
                f"the program '{self.structure.name}' has no numpyro.contrib.control_flow.scan; "
                "write its time loop as scan(step, x0, observations)."
            )
        return call.with_carry_of(self.structure.shapes.carry)

    def _scan(self) -> ScanCall:
        """Arguments of the scan, with an arbitrary draw of the first carry; from `at`, else from a new run."""
        return self.call(jax.random.key(0)) if self._call is None else self._call

    def initial(self, rng_key: PRNGKeyArray) -> PyTree:
        """Draw the scan's first carry."""
        return self.call(rng_key).init

    def inputs(self) -> PyTree:
        """Inputs `xs` of the scan, observations included, with a leading axis of time."""
        return self._scan().xs

    def time_inputs(self) -> TimeInputs:
        """Inputs of all times as `TimeInputs`, with a leading axis of time."""
        return TimeInputs(jnp.arange(self.structure.length), self.inputs())

    def sites(self, carry: PyTree, inputs: TimeInputs, x: Array | None = None) -> BodySites:
        """Sites of the scan's body at one time.

        Args:
            carry: carry that the body takes.
            inputs: inputs of the time.
            x: value of the latent site; None if nothing that depends on it is read.
        """
        key = jax.random.key(0)  # has no effect, because the only latent site gets its value
        sites = run_body(self._scan(), key, carry, inputs, x)[0]
        for name, left_out in self._left_out.items():
            site = sites.observed[name]
            sites.observed[name] = site._replace(value=jnp.where(left_out, jnp.nan, site.value))
        return sites

    def _latent(self, carry: PyTree, inputs: TimeInputs) -> Any:
        """Distribution of the latent site at one time."""
        return self.sites(carry, inputs).latent[self.structure.latent_name]

    def conditioning(self, carry: PyTree, inputs: TimeInputs) -> Conditioning | None:
        """Conditioning of the emulator whose transition the latent site has; None for any other transition.

        Args:
            carry: carry that the body takes.
            inputs: inputs of the time.

        Raises:
            ValueError: the transition has batch axes.
        """
        fn = self._latent(carry, inputs)
        return fn.conditioning() if isinstance(fn, EmulatorTransition) else None

    def conditioning_shape(self) -> PyTree | None:
        """Shapes and dtypes of `conditioning`; None if the transition is not that of an emulator."""
        return jax.eval_shape(lambda: self.conditioning(self._scan().init, self._scan().first_inputs()))

    @property
    def conditioning_passes(self) -> NetworkPasses:
        """Network passes of `conditioning`."""
        emulator = self.structure.emulator
        return NetworkPasses.of(conditioning=0 if emulator is None else emulator.conditioning_passes)

    def transition(
        self,
        carry: PyTree,
        inputs: TimeInputs,
        sampler: Sampler | Step | None = None,
        conditioning: Conditioning | None = None,
    ) -> Dynamics:
        """Transition p(x' | c) of the latent site.

        Args:
            carry: carry c that the body takes.
            inputs: inputs of the time.
            sampler: sampler, or a bare step, that replaces the sampler of a diffusion; None keeps it.
            conditioning: return value of `conditioning` for this carry, if it is known; None computes it.

        Raises:
            ValueError: the latent site is neither the transition of an emulator, without batch axes, nor Gaussian.
            TypeError: `sampler` is neither a sampler nor a step.
        """
        return dynamics_of(self.structure.latent_name, self._latent(carry, inputs), sampler, conditioning)

    def draw(
        self,
        rng_key: PRNGKeyArray,
        carry: PyTree,
        inputs: TimeInputs,
        sampler: Sampler | Step | None = None,
        centering: Centering | None = None,
        conditioning: Conditioning | None = None,
    ) -> tuple[Any, DrawRecord]:
        """Draw x' ~ p(x' | c), for any distribution that can be sampled.

        Args:
            rng_key: random key.
            carry: carry c that the body takes.
            inputs: inputs of the time.
            sampler: sampler, or a bare step, that replaces the sampler of a diffusion; None keeps it.
            centering: change of the random numbers, see `random_numbers`; None for none.
            conditioning: return value of `conditioning` for this carry, if it is known; None computes it.

        Returns:
            (x', in the shape of the state, or the values of several latent sites by name; record of the draw).

        Raises:
            ValueError: the latent site is the transition of an emulator with batch axes.
            TypeError: `sampler` is neither a sampler nor a step.
        """
        if len(self.structure.latent_names) == 1:
            name = self.structure.latent_name
            return _draw(rng_key, name, self._latent(carry, inputs), sampler, centering, conditioning)
        values: dict[str, Array] = {}
        records: list[DrawRecord] = []

        def in_turn(name: str, fn: dist.Distribution) -> Array:
            # A later site of the body may depend on an earlier one, so each gets its value before the next is reached.
            key = jax.random.fold_in(rng_key, len(values))
            values[name], record = _draw(key, name, fn, sampler)
            records.append(record)
            return values[name]

        run_body(self._scan(), jax.random.key(0), carry, inputs, in_turn)
        residual = jnp.max(jnp.stack([record.solver_residual for record in records]))
        passes = jax.tree.map(lambda *each: sum(each), *[record.passes for record in records])
        return values, DrawRecord(passes, residual)

    def random_numbers(
        self,
        rng_key: PRNGKeyArray,
        carry: PyTree,
        inputs: TimeInputs,
        sampler: Sampler | Step | None = None,
        conditional: bool = False,
    ) -> PyTree | None:
        """Normal random numbers of a draw of the latent site with this key, which `Centering` centers.

        Args:
            rng_key: random key of the draw.
            carry: carry that the body takes; the numbers do not depend on it.
            inputs: inputs of the time.
            sampler: sampler, or a bare step, that replaces the sampler of a diffusion; None keeps it.
            conditional: whether the draw is one given the observations.

        Returns:
            The numbers; None if the latent site is neither an emulator nor Gaussian, or if there are several.
        """
        if len(self.structure.latent_names) != 1:
            return None
        try:
            dynamics = self.transition(carry, inputs, sampler)
        except ValueError:
            return None
        return dynamics.random_numbers(rng_key, self.likelihood(carry, inputs) if conditional else None)

    def centering(
        self,
        rng_keys: Key[Array, " n"],
        carry: PyTree,
        inputs: TimeInputs,
        sampler: Sampler | Step | None = None,
        conditional: bool = False,
    ) -> Centering | None:
        """Centering of the random numbers of an ensemble's draws of the latent site.

        Args:
            rng_keys: random keys of the draws.
            carry: carry that the body takes; the numbers do not depend on it.
            inputs: inputs of the time.
            sampler: sampler, or a bare step, that replaces the sampler of a diffusion; None keeps it.
            conditional: whether the draws are those given the observations.

        Returns:
            The centering; None for a single draw, or where `random_numbers` gives none.
        """

        def numbers(rng_key: PRNGKeyArray) -> PyTree:
            return self.random_numbers(rng_key, carry, inputs, sampler, conditional)

        if len(rng_keys) < 2 or jax.eval_shape(numbers, rng_keys[0]) is None:
            return None
        return Centering.over(numbers, rng_keys)

    def latent_values(self, x: PyTree) -> dict[str, Array]:
        """Values of the latent sites by name.

        Args:
            x: value of the latent site, or values of several latent sites by name.
        """
        return x if len(self.structure.latent_names) > 1 else {self.structure.latent_name: x}

    def working_bytes(self) -> int:
        """Estimate how many bytes it takes to move one particle; 0 for a transition in closed form."""
        found: list[int] = []

        def look() -> None:
            call = self._scan()
            sites = self.sites(call.init, call.first_inputs())
            fn = sites.latent[self.structure.latent_name]
            if isinstance(fn, EmulatorTransition):
                observations = sum(jnp.size(site.value) for site in sites.observed.values())
                found.append(fn.dynamics().working_bytes(observations))

        jax.eval_shape(look)
        return sum(found)

    def check(self, needs_dynamics: bool, gaussian_errors: bool = False) -> None:
        """Check that a filter can run the program, before anything is compiled.

        Args:
            needs_dynamics: whether the filter needs the transition as `Dynamics`, and a likelihood that can guide.
            gaussian_errors: whether the filter needs Gaussian observations.

        Raises:
            ValueError: the scan uses an unobserved site outside it, the latent site is under `handlers.scale`, or the
                transition or an observed site is not of the kind that the filter needs. The message names the site.
        """
        for name in self.structure.needed_names:
            raise ValueError(
                f"the scan of '{self.structure.name}' uses the unobserved site '{name}', which is outside it, and a "
                f"filter needs its value; wrap the program in handlers.condition(model, {{'{name}': value}}), or infer "
                "it with ndda.PMMH."
            )
        for name in self.structure.scaled_names:
            raise ValueError(
                f"site '{name}' is under handlers.scale, but a filter cannot scale a latent site; "
                "scale observed sites only."
            )

        structure = self.structure
        if (needs_dynamics or gaussian_errors) and len(structure.latent_names) > 1:
            names = ", ".join(f"'{name}'" for name in structure.latent_names)
            raise ValueError(
                f"the body of the scan of '{structure.name}' has the latent sites {names}, and this filter takes one; "
                "join them into one array, or use ndda.Bootstrap(model), which takes several."
            )
        if gaussian_errors and structure.is_discrete:
            raise ValueError(
                f"site '{structure.latent_name}' is discrete, and an ensemble update would give it values between its "
                "classes; use ndda.Bootstrap(model)."
            )

        if needs_dynamics and structure.no_derivative is not None:
            raise ValueError(
                f"the observed sites of '{structure.name}' have no derivative in site '{structure.latent_name}' "
                f"({structure.no_derivative}), and this filter needs it; write them with jax.numpy, or use "
                "ndda.Bootstrap(model), which needs none."
            )

        def look() -> None:
            # The arguments of the scan belong to one JAX trace, so this trace runs the program again.
            here = copy.copy(self)._run()
            call = here._scan()
            given = call.init, call.first_inputs()
            if needs_dynamics:
                here.likelihood(*given).log_prob(here.transition(*given).moments().mean)
            if gaussian_errors:
                here.gaussian_likelihood(*given).log_prob(jnp.zeros(self.structure.state_shape))

        abstractly(look)

    def likelihood(self, carry: PyTree, inputs: TimeInputs) -> Likelihood:
        """Likelihood log p(y | x') of all observed sites at one time.

        Args:
            carry: carry that the body takes.
            inputs: inputs of the time.

        Returns:
            A `GaussianLikelihood` if all sites are Gaussian with errors that do not depend on x', and no mean is a
            nonlinear function of a linear predictor; otherwise a `GeneralLikelihood`.

        Raises:
            ValueError: a site is not Gaussian, and its elements are vectors or its parameters cannot be found.
        """
        if not self.structure.general_names:
            return self.gaussian_likelihood(carry, inputs)

        taken_apart = {name: self._linear_predictor(name, carry, inputs) for name in self.structure.general_names}

        def observe(x: Array) -> list[GaussianObservation | GeneralObservation]:
            found: list[GaussianObservation | GeneralObservation] = []
            for name, site in self.sites(carry, inputs, x).observed.items():
                if (parts := taken_apart.get(name)) is not None:
                    found.append(
                        predicted_observation(
                            site.fn, site.value, parts.predictor(x), parts.link, parts.components, site.power
                        )
                    )
                elif name in self.structure.general_names:
                    found.append(general_observation(name, *site))
                else:
                    found.extend(gaussian_observations(name, *site))
            return found

        return GeneralLikelihood(observe)

    def _linear_predictor(self, name: str, carry: PyTree, inputs: TimeInputs) -> LinearPredictor | None:
        """Split a site's log-likelihood into a linear predictor and a link; None if it does not have this form."""

        def logs(x: Array) -> Array:
            return pointwise_log_likelihood(*self.sites(carry, inputs, x).observed[name]).reshape(-1)

        return find_linear_predictor(logs, self.structure.state_shape)

    def gaussian_likelihood(self, carry: PyTree, inputs: TimeInputs) -> GaussianLikelihood:
        """Likelihood log p(y | x') of observed sites that are all Gaussian.

        Errors may depend on x'; their derivative is ignored.

        Args:
            carry: carry that the body takes.
            inputs: inputs of the time.

        Raises:
            ValueError: an observed site is not Gaussian.
        """

        def observe(x: Array) -> list[GaussianObservation]:
            sites = self.sites(carry, inputs, x).observed
            return [seen for name, site in sites.items() for seen in gaussian_observations(name, *site)]

        return GaussianLikelihood(observe)

    def advance(self, x: Array, carry: PyTree, inputs: TimeInputs) -> PyTree:
        """Next carry of the scan if the latent site has the value x.

        Args:
            x: value of the latent site.
            carry: carry that the body takes.
            inputs: inputs of the time.
        """
        new = self.sites(carry, inputs, x).carry
        # With weak types or Python numbers in a carry, the second step would have other types and compile again.
        return jax.tree.map(lambda value, old: jnp.asarray(value, jnp.result_type(old)), new, carry)

    def record(self, rng_key: PRNGKeyArray, x: Array, carry: PyTree, inputs: TimeInputs) -> dict[str, Any]:
        """Values of the sites at one new particle, as a result keeps them.

        Args:
            rng_key: random key of the predictive draws.
            x: value of the latent site.
            carry: carry that the body takes.
            inputs: inputs of the time.

        Returns:
            Values by group and site: ``posterior`` (the latent site and the deterministic sites that can differ between
            particles), ``posterior_predictive`` (a draw of each observed site), and ``log_likelihood`` (see
            `pointwise_log_likelihood`; 0 where missing).
        """
        sites = self.sites(carry, inputs, x)
        predictive, log_likelihood = {}, {}
        for i, (name, site) in enumerate(sites.observed.items()):
            if not is_factor(site.fn):  # it observes nothing, so there is nothing to draw
                predictive[name] = site.fn.sample(jax.random.fold_in(rng_key, i))
            log_likelihood[name] = pointwise_log_likelihood(*site)
        shared = self.structure.metadata_names
        own = {name: value for name, value in sites.deterministic.items() if name not in shared}
        posterior = {**self.latent_values(x), **own}
        return {"posterior": posterior, "posterior_predictive": predictive, "log_likelihood": log_likelihood}

    def metadata(self, inputs: TimeInputs) -> dict[str, Array]:
        """Values of the deterministic sites that depend on neither the state, the carry nor random draws, by name.

        Args:
            inputs: inputs of the time.
        """
        # Any carry will do, because the values do not depend on it.
        found = self.sites(self._scan().init, inputs).deterministic
        return {name: jnp.asarray(found[name]) for name in self.structure.metadata_names}

    def observations(self, carry: PyTree, inputs: TimeInputs) -> dict[str, dict[str, Array]]:
        """Observed values of one time, their masks and errors, and checks of them.

        Args:
            carry: carry that the body takes. An error that depends on the state is evaluated at this carry, with zeros
                for the latent site.
            inputs: inputs of the time.

        Returns:
            For each observed site a dictionary: ``value``, ``observed`` (False where missing) and ``error`` (standard
            deviation, NaN for a site that is not Gaussian), in the shape of the value; ``bad_error``, whether a
            standard deviation is not positive and finite; ``undefined``, the number of observed values whose mean is
            NaN.
        """
        sites = self.sites(carry, inputs)
        return {
            name: {
                "value": value,
                "observed": observed_elements(fn, value),
                "error": observation_error(fn),
                "bad_error": non_positive_error(fn, value),
                "undefined": undefined_means(fn, value),
            }
            for name, (fn, value, _) in sites.observed.items()
            if not is_factor(fn)
        }

    def look(self, at: Callable[[BodySites], Any]) -> Any:
        """Return the shapes and dtypes of a function of the body's sites at the first time; nothing is computed.

        Args:
            at: function of the sites.

        Raises:
            ValueError: raised by `at`.
        """

        def sites() -> Any:
            call = self._scan()
            return at(self.sites(call.init, call.first_inputs()))

        return abstractly(sites)


def _draw(
    rng_key: PRNGKeyArray,
    name: str,
    fn: dist.Distribution,
    sampler: Sampler | Step | None,
    centering: Centering | None = None,
    conditioning: Conditioning | None = None,
) -> tuple[Array, DrawRecord]:
    """Draw the value of one latent site, and record the draw."""
    if isinstance(fn, EmulatorTransition):
        x, record = dynamics_of(name, fn, sampler, conditioning).draw(rng_key, centering)
        if conditioning is None:
            record = record._replace(passes=record.passes.plus(fn.conditioning_passes()))
        return x, record
    if centering is not None:
        return dynamics_of(name, fn, sampler).draw(rng_key, centering)
    return fn.sample(rng_key), DrawRecord(NetworkPasses.of(), jnp.zeros(()))
