"""From a NumPyro program to a state-space model.

The program is an ordinary one: initial state outside, then `numpyro.contrib.control_flow.scan` over time, with one
latent site and any number of observed sites in its body.

The program is run again, up to the scan, wherever a part of it is needed: its body may close over arrays that exist
only inside the current JAX trace. That costs tracing time, once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree
from numpyro import handlers

from numpyro_diffusion_da.diffusion.denoiser import NetworkPasses
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.observation.dependence import depends_on_first
from numpyro_diffusion_da.observation.likelihood import (
    GaussianLikelihood,
    GaussianObservation,
    GeneralLikelihood,
    GeneralObservation,
    Likelihood,
)
from numpyro_diffusion_da.observation.linear_predictor import LinearPredictor, find_linear_predictor
from numpyro_diffusion_da.program.distribution import DiffusionTransition
from numpyro_diffusion_da.program.scan import (
    BodySites,
    ScanCall,
    SkipScan,
    TimeInputs,
    abstractly,
    run_body,
    run_to_scan,
)
from numpyro_diffusion_da.program.sites import (
    gaussian_observations,
    general_observation,
    has_own_errors,
    independent_errors,
    is_gaussian,
    non_positive_error,
    observation_error,
    one_step,
    pointwise_log_likelihood,
    predicted_observation,
    site_mask,
    site_mean,
    undefined_means,
    unmasked,
    values_per_error,
)
from numpyro_diffusion_da.transition.base import DrawRecord, Dynamics


def _name_of(model: Callable[..., Any]) -> str:
    return getattr(inspect.unwrap(model), "__name__", type(model).__name__)


class StateSpaceModel:
    """The state-space model inside a NumPyro program, at given arguments.

    Building one checks the program's structure; nothing is computed. Latent sites outside the scan are of two kinds:
    `global_names`, which its body depends on (`needed_names`) or something is observed of beside the scan, and
    `initial_names`, which shape its first carry and nothing else. Observed ones are `outside_names`.

    Args:
        model: the program.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: no scan or several, an observation of the initial state outside the scan, sites after the scan, or
            not exactly one latent site in the body. The sentence names the site.
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None):
        self.model, self.args, self.kwargs = model, args, kwargs or {}
        self._left_out: dict[str, Array] = {}
        self.name = _name_of(model)
        probe, sites = self._probe()
        self.length = probe.scans[0].length
        (self.latent_name,) = sites.latent
        self.observed_names = tuple(sites.observed)
        used, measured = self._find_globals({n: s for n, s in probe.before.items() if n not in probe.given})
        self.needed_names = tuple(used)
        self.global_names = tuple(n for n in probe.before if n in {*used, *measured})
        latent = tuple(n for n, s in probe.before.items() if not s["is_observed"])
        self.initial_names = tuple(n for n in latent if n not in self.global_names)
        self.outside_names = tuple(n for n, s in probe.before.items() if s["is_observed"])
        self.state_shape = tuple(sites.latent[self.latent_name].shape())
        self.general_names = self._general_names()

    def at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StateSpaceModel:
        """The same structure at other arguments (tracers, say), without checking it again."""
        other = object.__new__(StateSpaceModel)
        other.__dict__.update(self.__dict__)
        other.args, other.kwargs = args, kwargs
        return other

    def given(self, values: dict[str, Array]) -> StateSpaceModel:
        """The same program with its global sites at these values: what a filter can run."""
        other = self.at(self.args, self.kwargs)
        other.model = handlers.substitute(self.model, data=values)
        other.needed_names, other.global_names = (), ()
        return other

    def without(self, left_out: dict[str, Array]) -> StateSpaceModel:
        """The same program with observed values missing where True, by site, at the shape of the value (or tracers)."""
        other = self.at(self.args, self.kwargs)
        other._left_out = left_out
        return other

    # --- the parts a filter needs -------------------------------------------------------------------------------

    def call(self, rng_key: PRNGKeyArray) -> ScanCall:
        """Run the program up to its scan."""
        call = run_to_scan(lambda: self.model(*self.args, **self.kwargs), rng_key)
        if call is None:
            raise ValueError(
                f"the program '{self.name}' has no numpyro.contrib.control_flow.scan; "
                "write its time loop as scan(step, x0, observations)."
            )
        return call

    def initial(self, rng_key: PRNGKeyArray) -> PyTree:
        """A draw of the scan's first carry."""
        return self.call(rng_key).init

    def inputs(self) -> PyTree:
        """The scan's `xs`, observations included; leading axis time."""
        return self.call(jax.random.key(0)).xs

    def time_inputs(self) -> TimeInputs:
        """The inputs of all times; leading axis time."""
        return TimeInputs(jnp.arange(self.length), jax.tree.map(jnp.asarray, self.inputs()))

    def sites(self, carry: PyTree, inputs: TimeInputs, x: Array | None = None) -> BodySites:
        """The sites of the body at a given carry and, where given, value of the latent site."""
        key = jax.random.key(0)  # never used: the one latent site is given its value
        sites = run_body(self.call(key), key, carry, inputs, x)[0]
        for name, left_out in self._left_out.items():
            site = sites.observed[name]
            sites.observed[name] = site._replace(value=jnp.where(left_out, jnp.nan, site.value))
        return sites

    def transition(self, carry: PyTree, inputs: TimeInputs, sampler: Sampler | None = None) -> Dynamics:
        """p(x' | c); `sampler` replaces the transition's own where given.

        Raises:
            ValueError: the latent site's distribution is neither a diffusion nor Gaussian.
        """
        fn = self.sites(carry, inputs).latent[self.latent_name]
        return one_step(self.latent_name, fn, sampler)

    def draw(
        self, rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs, sampler: Sampler | None = None
    ) -> tuple[Array, DrawRecord]:
        """x' ~ p(x' | c), for any distribution that can be sampled."""
        fn = self.sites(carry, inputs).latent[self.latent_name]
        if isinstance(fn, DiffusionTransition):
            return one_step(self.latent_name, fn, sampler).draw(rng_key)
        return fn.sample(rng_key), DrawRecord(NetworkPasses.of(), jnp.zeros(()))

    def diffusion(self) -> DiffusionTransition | None:
        """The diffusion transition, for its prior and sampler (its arrays are tracers); None for any other."""
        found: list[DiffusionTransition] = []

        def look() -> None:
            call = self.call(jax.random.key(0))
            fn = self.sites(call.init, call.first_inputs()).latent[self.latent_name]
            if isinstance(fn, DiffusionTransition):
                found.append(fn)

        jax.eval_shape(look)
        return found[0] if found else None

    def shapes(self) -> tuple[tuple[int, ...], dict[str, tuple[tuple[int, ...], int]]]:
        """The state's shape; for each observed site its shape and `values_per_error`, in the order of `likelihood`."""
        found: list[Any] = []

        def look() -> None:
            call = self.call(jax.random.key(0))
            sites = self.sites(call.init, call.first_inputs())
            observed = {name: (fn.shape(), values_per_error(fn)) for name, (fn, *_) in sites.observed.items()}
            found.extend([sites.latent[self.latent_name].shape(), observed])

        jax.eval_shape(look)
        state, observed = found
        return state, observed

    def working_bytes(self) -> int:
        """About how many bytes it takes to move one particle: see `DiffusionDynamics.working_bytes`; 0 in closed form."""
        found: list[int] = []

        def look() -> None:
            call = self.call(jax.random.key(0))
            fn = self.sites(call.init, call.first_inputs()).latent[self.latent_name]
            if isinstance(fn, DiffusionTransition):
                found.append(fn.only_step().working_bytes())

        jax.eval_shape(look)
        return sum(found)

    def check(self, one_step: bool, gaussian_errors: bool = False) -> None:
        """Refuse what a filter cannot run, before anything is compiled.

        Args:
            one_step: whether the filter needs the transition as a `Dynamics`, and the likelihood as one of a guidance.
            gaussian_errors: whether it needs Gaussian observations.

        Raises:
            ValueError: one sentence naming the site: a global site that is not known, among others.
        """
        for name in self.needed_names:
            raise ValueError(
                f"the scan of '{self.name}' uses the unobserved site '{name}', which is outside it; a filter needs "
                f"it known: wrap the program in handlers.condition(model, {{'{name}': value}}), or infer it with "
                "ndda.PMMH."
            )

        def look() -> None:
            call = self.call(jax.random.key(0))
            sites = self.sites(call.init, call.first_inputs())
            if sites.scaled:
                raise ValueError(
                    f"site '{sites.scaled[0]}' is under handlers.scale, which a filter cannot take "
                    "for a latent site; scale observed sites only."
                )
            given = call.init, call.first_inputs()
            if one_step:
                self.likelihood(*given).log_prob(self.transition(*given).moments().mean)
            if gaussian_errors:
                self.gaussian_likelihood(*given).log_prob(jnp.zeros(sites.latent[self.latent_name].shape()))

        abstractly(look)

    def likelihood(self, carry: PyTree, inputs: TimeInputs) -> Likelihood:
        """log p(y | x') of all observed sites: Gaussian where all are, with errors that x' does not change.

        Raises:
            ValueError: a site whose elements are vectors and not Gaussian.
        """
        if not self.general_names:
            return self.gaussian_likelihood(carry, inputs)

        taken_apart = {name: self._linear_predictor(name, carry, inputs) for name in self.general_names}

        def observe(x: Array) -> list[GaussianObservation | GeneralObservation]:
            found: list[GaussianObservation | GeneralObservation] = []
            for name, site in self.sites(carry, inputs, x).observed.items():
                if (parts := taken_apart.get(name)) is not None:
                    found.append(
                        predicted_observation(site.fn, site.value, parts.predictor(x), parts.link, parts.components)
                    )
                elif name in self.general_names:
                    found.append(general_observation(name, *site))
                else:
                    found.extend(gaussian_observations(name, *site))
            return found

        return GeneralLikelihood(observe)

    def _linear_predictor(self, name: str, carry: PyTree, inputs: TimeInputs) -> LinearPredictor | None:
        """The log-likelihood of a site's elements as a link of a linear predictor; None where it is not one."""

        def logs(x: Array) -> Array:
            return pointwise_log_likelihood(*self.sites(carry, inputs, x).observed[name]).reshape(-1)

        return find_linear_predictor(logs, self.state_shape)

    def gaussian_likelihood(self, carry: PyTree, inputs: TimeInputs) -> GaussianLikelihood:
        """The same for Gaussian sites only, whose errors may change with x': the derivative of that is left out.

        Raises:
            ValueError: an observed site that is not Gaussian.
        """

        def observe(x: Array) -> list[GaussianObservation]:
            sites = self.sites(carry, inputs, x).observed
            return [seen for name, site in sites.items() for seen in gaussian_observations(name, *site)]

        return GaussianLikelihood(observe)

    def observes_linearly(self) -> bool:
        """Whether every observed site is Gaussian with a mean affine in the latent site and an error free of it.

        Read off the first step, and cautious: False where it cannot be seen.
        """
        if self.general_names:
            return False
        x, carry, inputs = self._shapes()

        def slope(x: Array, v: Array, carry: PyTree, inputs: TimeInputs) -> tuple[Array, Array]:
            likelihood = self.gaussian_likelihood(carry, inputs)
            return likelihood.log_normalizer(x), jax.jvp(likelihood.residual, (x,), (v,))[1]

        return not any(depends_on_first(slope, x, x, carry, inputs))

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
        posterior = {self.latent_name: x, **sites.deterministic}
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
        """What the program says of one arbitrary state: means and errors of Gaussian sites, deterministic sites.

        Two programs that differ in what they observe, how well, or what they derive, differ here.
        """
        carry = self.initial(jax.random.key(0))
        shape = self.sites(carry, inputs).latent[self.latent_name].shape()
        sites = self.sites(carry, inputs, jax.random.normal(jax.random.key(0), shape))
        means = {f"mean of {name}": site_mean(fn) for name, (fn, *_) in sites.observed.items()}
        errors = {f"error of {name}": observation_error(fn) for name, (fn, *_) in sites.observed.items()}
        return {**means, **errors, **{name: jnp.asarray(value) for name, value in sites.deterministic.items()}}

    def look(self, at: Callable[[BodySites], Any]) -> Any:
        """What `at` gives of the body's sites at the first time, nothing computed: for types and shapes.

        Raises:
            ValueError: raised by `at`.
        """

        def sites() -> Any:
            call = self.call(jax.random.key(0))
            return at(self.sites(call.init, call.first_inputs()))

        return abstractly(sites)

    def remembers(self, part: Callable[[BodySites], PyTree]) -> bool:
        """Whether a part of the body's sites depends on the carry that came in, once the latent site has a value.

        Read off a jaxpr: functions of the carry and the latent site that are compiled as one count as a dependence.
        """
        x, carry, inputs = self._shapes()

        def parts(carry: PyTree, x: Array, inputs: TimeInputs) -> list[Array]:
            return [jnp.asarray(value) for value in jax.tree.leaves(part(self.sites(carry, inputs, x)))]

        return any(depends_on_first(parts, carry, x, inputs))

    def _shapes(self) -> tuple[Array, PyTree, TimeInputs]:
        """Shapes of the latent site, the carry and the inputs of one time."""
        x = jax.eval_shape(lambda: jnp.zeros(self.state_shape))

        def given() -> tuple[PyTree, TimeInputs]:
            call = self.call(jax.random.key(0))
            return call.init, call.first_inputs()

        return x, *jax.eval_shape(given)

    # --- structure ----------------------------------------------------------------------------------------------

    def _probe(self) -> tuple[SkipScan, BodySites]:
        found: dict[str, Any] = {}

        def run() -> None:
            skip = SkipScan()
            key = jax.random.key(0)
            with skip, handlers.seed(rng_seed=key):
                self.model(*self.args, **self.kwargs)
            found["skip"] = skip
            if skip.scans:
                call = skip.scans[0]
                found["sites"] = run_body(call, key, call.init, call.first_inputs())[0]

        abstractly(run)
        skip = found["skip"]
        if len(skip.scans) != 1:
            raise ValueError(
                f"the program '{self.name}' has {len(skip.scans) or 'no'} numpyro.contrib.control_flow.scan; "
                "a filter needs exactly one: write the time loop as scan(step, x0, observations)."
            )
        if skip.after:
            raise ValueError(
                f"the program '{self.name}' has the site '{skip.after[0]}' after its scan, which no filter step would "
                "see; move it into the scan's body."
            )
        sites = found["sites"]
        if len(sites.latent) != 1:
            names = ", ".join(f"'{n}'" for n in sites.latent) or "none"
            raise ValueError(
                f"the scan of '{self.name}' must have exactly one latent site in its body, but it has {names}; "
                "join several states into one array."
            )
        if not sites.observed:
            raise ValueError(
                f"nothing is observed in the scan of '{self.name}': give a site obs=...; for a step without "
                "observations use NaN values."
            )
        return skip, sites

    def _general_names(self) -> frozenset[str]:
        """Observed sites that are not Gaussian, or that look at the state in a way that is not linear.

        Errors that change with it, or a mean that is not linear in it but in its linear predictor.
        """
        general: list[str] = []
        curved: list[str] = []

        def errors(latent: Array) -> dict[str, Array]:
            call = self.call(jax.random.key(0))
            observed = self.sites(call.init, call.first_inputs(), latent).observed
            general.extend(name for name, (fn, *_) in observed.items() if not is_gaussian(fn))
            return {name: independent_errors(fn) for name, (fn, *_) in observed.items() if is_gaussian(fn)}

        def slopes(latent: Array, v: Array) -> dict[str, Array]:
            call = self.call(jax.random.key(0))

            def means(x: Array) -> dict[str, Array]:
                observed = self.sites(call.init, call.first_inputs(), x).observed
                return {name: unmasked(fn)[0].mean for name, (fn, *_) in observed.items() if has_own_errors(fn)}

            return jax.jvp(means, (latent,), (v,))[1]

        def take_apart() -> None:
            call = self.call(jax.random.key(0))
            given = call.init, call.first_inputs()
            curved.extend(name for name in bent if self._linear_predictor(name, *given) is not None)

        latent = jnp.zeros(self.state_shape)
        changing = [name for name, changes in depends_on_first(errors, latent).items() if changes]
        bent = [name for name, bends in depends_on_first(slopes, latent, latent).items() if bends]
        jax.eval_shape(take_apart)
        return frozenset([*general, *changing, *curved])

    def _find_globals(self, before: dict[str, dict[str, Any]]) -> tuple[list[str], list[str]]:
        """Latent sites outside the scan that its body depends on, and those that something is observed of besides.

        Raises:
            ValueError: an observation, before the scan, of what shapes the initial carry only.
        """
        latent = {
            n: jax.eval_shape(s["fn"].sample, jax.random.key(0)) for n, s in before.items() if not s["is_observed"]
        }
        observed = [n for n, s in before.items() if s["is_observed"]]
        used, measured = [], []
        for name, shape in latent.items():

            def parts(value: Array, carry: PyTree, name: str = name) -> Any:
                probe = SkipScan()
                with probe, handlers.seed(rng_seed=jax.random.key(0)), handlers.substitute(data={name: value}):
                    self.model(*self.args, **self.kwargs)
                call = probe.scans[0]
                sites, outputs = run_body(call, jax.random.key(0), carry, call.first_inputs())
                in_body = jax.tree.leaves((sites.latent, sites.observed, sites.deterministic, outputs, call.xs))
                return in_body, jax.tree.leaves(call.init), [jax.tree.leaves(probe.before[n]["fn"]) for n in observed]

            carry = jax.eval_shape(self.initial, jax.random.key(0))
            in_body, in_carry, fns = depends_on_first(parts, shape, carry)
            by = [other for other, leaves in zip(observed, fns, strict=True) if any(leaves)]
            if any(in_body):
                used.append(name)
            elif by and any(in_carry):
                raise ValueError(
                    f"site '{by[0]}' observes '{name}' before the scan; a filter weighs observations inside it: "
                    "move the site into the scan's body."
                )
            elif by:
                measured.append(name)
        return used, measured
