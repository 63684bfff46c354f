"""The structure of a state-space program: its sites, shapes and dependences, found by tracing it; nothing is computed.

A first look runs the program once to find its sites and shapes, and once more to see what depends on what. A look at a
program whose structure is expected (`like`) runs it once.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
from numpyro import handlers
from numpyro.ops.provenance import eval_provenance

from numpyro_diffusion_da.diffusion.density import ProbabilityFlow
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.observation.likelihood import GaussianLikelihood
from numpyro_diffusion_da.observation.linear_predictor import find_linear_predictor
from numpyro_diffusion_da.program.distribution import DiffusionTransition
from numpyro_diffusion_da.program.scan import BodySites, ScanCall, SkipScan, abstractly, run_body
from numpyro_diffusion_da.program.sites import (
    gaussian_observations,
    has_own_errors,
    independent_errors,
    is_gaussian,
    pointwise_log_likelihood,
    unmasked,
    values_per_error,
)


class ObservedStructure(NamedTuple):
    """Shape of one observed site.

    Attributes:
        shape: shape of the site's value at one time.
        values_per_error: consecutive values that share a correlated error; 1 where errors are independent.
    """

    shape: tuple[int, ...]
    values_per_error: int


class Diffusion(NamedTuple):
    """The parts of a diffusion transition that do not change over time."""

    prior: DiffusionPrior
    sampler: Sampler
    density: ProbabilityFlow | None


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What is known of a program before any value is.

    Attributes:
        name: name of the program.
        length: number of times its scan runs over.
        latent_name: the latent site of the scan's body.
        state_shape: shape of the latent site's value.
        observed: the observed sites of the body, in the program's order.
        needed_names: unobserved sites outside the scan that its body depends on.
        global_names: the needed ones, and those that something beside the scan observes.
        initial_names: all other latent sites outside the scan: they shape its first carry and nothing else.
        outside_names: observed sites outside the scan.
        general_names: observed sites that are not Gaussian, whose error changes with the state, or whose mean is a
            nonlinear function of a linear predictor.
        scaled_names: latent sites of the body under `handlers.scale`.
        observes_linearly: whether every observed site is Gaussian with a mean affine in the latent site and an error
            independent of it. False where that cannot be seen.
        carry_remembers: whether the next carry depends on the carry before, once the latent site has a value.
        observations_remember: whether the observed sites depend on the carry, once the latent site has a value.
        diffusion: the diffusion transition; None for any other.
        shapes: shapes that a later look at the same program may expect.
    """

    name: str
    length: int
    latent_name: str
    state_shape: tuple[int, ...]
    observed: dict[str, ObservedStructure]
    needed_names: tuple[str, ...]
    global_names: tuple[str, ...]
    initial_names: tuple[str, ...]
    outside_names: tuple[str, ...]
    general_names: frozenset[str]
    scaled_names: tuple[str, ...]
    observes_linearly: bool
    carry_remembers: bool
    observations_remember: bool
    diffusion: Diffusion | None
    shapes: Shapes

    @property
    def observed_names(self) -> tuple[str, ...]:
        """Names of the observed sites of the body, in the program's order."""
        return tuple(self.observed)

    def same_as(self, other: Structure | None) -> bool:
        """Whether the other structure has the same sites, shapes and dependences; its prior may be another."""
        return other is not None and self._key() == other._key()

    def _key(self) -> tuple[Any, ...]:
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        diffusion, shapes = plain.pop("diffusion"), plain.pop("shapes")
        return plain, diffusion is None, jax.tree.structure(shapes), jax.tree.leaves(shapes)


class Shapes(NamedTuple):
    """Shapes and dtypes of a program's inputs to one run of its body.

    Attributes:
        outside: latent sites outside the scan that are not given a value, by name.
        carry: the scan's first carry.
        state: the latent site's value.
    """

    outside: dict[str, Any]
    carry: PyTree
    state: Any


class _OtherShapesError(Exception):
    """The program has not the shapes that were expected of it."""


def trace_structure(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], like: Structure | None = None
) -> Structure:
    """The structure of a program at given arguments.

    Args:
        model: the program.
        args: its positional arguments.
        kwargs: its keyword arguments.
        like: the structure that it probably has, which saves one run of the program.

    Raises:
        ValueError: no scan or several, an observation of the initial state outside the scan, sites after the scan, or
            not exactly one latent site in the body. The sentence names the site.
    """

    def program() -> None:
        model(*args, **kwargs)

    name = name_of(model)
    if like is not None:
        try:
            return _examine(program, name, like.shapes)
        except _OtherShapesError:
            pass
    return _examine(program, name, _probe(program, name))


def name_of(model: Callable[..., Any]) -> str:
    """The name of a program, as messages and results call it."""
    return getattr(inspect.unwrap(model), "__name__", type(model).__name__)


def _run(program: Callable[[], None], **settings: Any) -> SkipScan:
    """Run a program with its scan skipped; settings are those of `SkipScan`."""
    skip = SkipScan(**settings)
    with skip, handlers.seed(rng_seed=jax.random.key(0)):
        program()
    return skip


def _free(skip: SkipScan) -> dict[str, dict[str, Any]]:
    """The sites before the scan that no handler gave a value."""
    return {name: site for name, site in skip.before.items() if name not in skip.given}


def _probe(program: Callable[[], None], name: str) -> Shapes:
    """Shapes of a program, and the checks of its form."""
    found: dict[str, Any] = {}

    def run() -> tuple[Any, Any, Any]:
        skip = found["skip"] = _run(program)
        if len(skip.scans) != 1:
            return None, None, None
        call = skip.scans[0]
        sites = found["sites"] = run_body(call, jax.random.key(0), call.init, call.first_inputs())[0]
        outside = {n: s["value"] for n, s in _free(skip).items() if not s["is_observed"]}
        return outside, call.init, [jnp.zeros(fn.shape()) for fn in sites.latent.values()]

    outside, carry, states = abstractly(run)
    _check_form(found["skip"], found.get("sites"), name)
    return Shapes(outside, carry, states[0])


def _check_form(skip: SkipScan, sites: BodySites | None, name: str) -> None:
    if len(skip.scans) != 1 or sites is None:
        raise ValueError(
            f"the program '{name}' has {len(skip.scans) or 'no'} numpyro.contrib.control_flow.scan; "
            "a filter needs exactly one: write the time loop as scan(step, x0, observations)."
        )
    if skip.after:
        raise ValueError(
            f"the program '{name}' has the site '{skip.after[0]}' after its scan, where no filter step sees it; "
            "move it into the scan's body."
        )
    if len(sites.latent) != 1:
        names = ", ".join(f"'{n}'" for n in sites.latent) or "none"
        raise ValueError(
            f"the scan of '{name}' must have exactly one latent site in its body, but it has {names}; "
            "join several states into one array."
        )
    if not sites.observed:
        raise ValueError(
            f"nothing is observed in the scan of '{name}': give a site obs=...; for a step without "
            "observations use NaN values."
        )


def _examine(program: Callable[[], None], name: str, shapes: Shapes) -> Structure:
    """The structure of a program that has these shapes.

    Raises:
        _OtherShapesError: it has others.
        ValueError: an observation, before the scan, of what shapes the initial carry only.
    """
    found: dict[str, Any] = {}

    def look(state: Array, direction: Array, carry: PyTree, **outside: Array) -> dict[str, Any]:
        def marked(site: str, value: Array) -> Array:
            if site not in shapes.outside or value.shape != shapes.outside[site].shape:
                raise _OtherShapesError
            # Of its own input and of what it was drawn from: a site may depend on another through a third.
            return jnp.where(True, value, outside[_argument(site)])

        skip = found["skip"] = _run(program, mark=marked)
        call = _expected(skip, shapes)
        found.update(_facts(call, carry, state))
        return {
            **_outside_dependences(skip, call, carry),
            **_body_dependences(call, carry, state, direction),
        }

    inputs = {_argument(n): s for n, s in shapes.outside.items()}
    depends = _provenance(look, state=shapes.state, direction=shapes.state, carry=shapes.carry, **inputs)
    skip: SkipScan = found["skip"]
    used, measured = _globals(shapes, depends)
    global_names = tuple(n for n in skip.before if n in {*used, *measured})
    changing = {n for n, on in depends["errors"].items() if _depends(on, "state")}
    bent = {n for n, on in depends["slopes"].items() if _depends(on, "state")}
    general = {n for n, gaussian in found["gaussian"].items() if not gaussian} | changing
    general |= _with_linear_predictor(program, shapes, bent - general)
    return Structure(
        name=name,
        length=found["length"],
        latent_name=found["latent_name"],
        state_shape=tuple(shapes.state.shape),
        observed=found["observed"],
        needed_names=tuple(used),
        global_names=global_names,
        initial_names=tuple(n for n, s in skip.before.items() if not s["is_observed"] and n not in global_names),
        outside_names=tuple(n for n, s in skip.before.items() if s["is_observed"]),
        general_names=frozenset(general),
        scaled_names=found["scaled"],
        observes_linearly=not general and not _depends(depends["linearity"], "state"),
        carry_remembers=_depends(depends["next carry"], "carry"),
        observations_remember=_depends(depends["observations"], "carry"),
        diffusion=found["diffusion"],
        shapes=shapes,
    )


def _argument(site: str) -> str:
    """The name under which a latent site's value is an argument: a site may be called `state` too."""
    return f"site {site}"


def _provenance(look: Callable[..., Any], **inputs: Any) -> Any:
    """`eval_provenance`; a ValueError comes without JAX's remarks on tracebacks."""
    problems: list[Exception] = []

    def caught(**given: Any) -> Any:
        try:
            return look(**given)
        except (ValueError, _OtherShapesError) as error:
            problems.append(error)
            return None

    depends = eval_provenance(caught, **inputs)
    if problems:
        raise problems[0]
    return depends


def _depends(provenance: PyTree, name: str) -> bool:
    """Whether any leaf of a provenance names this input."""
    leaves = jax.tree.leaves(provenance, is_leaf=lambda leaf: isinstance(leaf, frozenset))
    return any(name in leaf for leaf in leaves)


def _expected(skip: SkipScan, shapes: Shapes) -> ScanCall:
    """The call of the scan, if the program has the expected shapes so far."""
    latent = {n for n, s in _free(skip).items() if not s["is_observed"]}
    if latent != set(shapes.outside) or len(skip.scans) != 1 or skip.after:
        raise _OtherShapesError
    call = skip.scans[0]
    of_carry = jax.eval_shape(lambda: call.init)
    if jax.tree.structure(of_carry) != jax.tree.structure(shapes.carry) or any(
        (a.shape, a.dtype) != (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(of_carry), jax.tree.leaves(shapes.carry), strict=True)
    ):
        raise _OtherShapesError
    return call


def _facts(call: ScanCall, carry: PyTree, state: Array) -> dict[str, Any]:
    """What the body's sites are, once the latent site has a value."""
    sites = run_body(call, jax.random.key(0), carry, call.first_inputs(), state)[0]
    if len(sites.latent) != 1 or not sites.observed:
        raise _OtherShapesError
    ((latent_name, fn),) = sites.latent.items()
    if tuple(fn.shape()) != tuple(state.shape):
        raise _OtherShapesError
    diffusion = Diffusion(fn.prior, fn.sampler, fn.density) if isinstance(fn, DiffusionTransition) else None
    return {
        "length": call.length,
        "latent_name": latent_name,
        "observed": {
            n: ObservedStructure(tuple(fn.shape()), values_per_error(fn)) for n, (fn, *_) in sites.observed.items()
        },
        "gaussian": {n: is_gaussian(fn) for n, (fn, *_) in sites.observed.items()},
        "scaled": tuple(sites.scaled),
        "diffusion": diffusion,
    }


def _outside_dependences(skip: SkipScan, call: ScanCall, carry: PyTree) -> dict[str, Any]:
    """What may depend on the sites outside the scan: its body, its first carry, the observed sites before it."""
    sites, outputs = run_body(call, jax.random.key(0), carry, call.first_inputs())
    in_body = (sites.latent, sites.observed, sites.deterministic, outputs, call.xs)
    observed = {n: s["fn"] for n, s in _free(skip).items() if s["is_observed"]}
    return {
        "body": jax.tree.leaves(in_body),
        "first carry": jax.tree.leaves(call.init),
        "observed outside": {n: jax.tree.leaves(fn) for n, fn in observed.items()},
    }


def _body_dependences(call: ScanCall, carry: PyTree, state: Array, direction: Array) -> dict[str, Any]:
    """What may depend on the latent site's value, or on the carry once that site has a value."""

    def at(x: Array) -> BodySites:
        return run_body(call, jax.random.key(0), carry, call.first_inputs(), x)[0]

    def means(x: Array) -> dict[str, Array]:
        return {n: unmasked(fn)[0].mean for n, (fn, *_) in at(x).observed.items() if has_own_errors(fn)}

    sites = at(state)
    linearity: list[Array] = []
    if all(is_gaussian(fn) for fn, *_ in sites.observed.values()):
        likelihood = GaussianLikelihood(
            lambda x: [part for n, site in at(x).observed.items() for part in gaussian_observations(n, *site)]
        )
        # A residual that is affine in the state has a derivative that does not depend on it.
        linearity = [
            likelihood.log_normalizer(state),
            jax.jvp(likelihood.residual, (state,), (direction,))[1],
        ]
    return {
        "errors": {n: independent_errors(fn) for n, (fn, *_) in sites.observed.items() if is_gaussian(fn)},
        "slopes": jax.jvp(means, (state,), (direction,))[1],
        "linearity": linearity,
        "next carry": [jnp.asarray(leaf) for leaf in jax.tree.leaves(sites.carry)],
        "observations": [jnp.asarray(leaf) for leaf in jax.tree.leaves(sites.observed)],
    }


def _globals(shapes: Shapes, depends: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Latent sites outside the scan that its body depends on, and those that something beside the scan observes."""
    used, measured = [], []
    for name in shapes.outside:
        argument = _argument(name)
        by = [other for other, on in depends["observed outside"].items() if _depends(on, argument)]
        if _depends(depends["body"], argument):
            used.append(name)
        elif by and _depends(depends["first carry"], argument):
            raise ValueError(
                f"site '{by[0]}' observes '{name}' before the scan; a filter weighs observations inside it: "
                "move the site into the scan's body."
            )
        elif by:
            measured.append(name)
    return used, measured


def _with_linear_predictor(program: Callable[[], None], shapes: Shapes, names: set[str]) -> set[str]:
    """The sites whose log-likelihood is an elementwise function of a linear predictor."""
    found: set[str] = set()

    def take_apart() -> None:
        call = _run(program).scans[0]

        def logs(x: Array, name: str) -> Array:
            sites = run_body(call, jax.random.key(0), call.init, call.first_inputs(), x)[0]
            return pointwise_log_likelihood(*sites.observed[name]).reshape(-1)

        found.update(n for n in names if find_linear_predictor(lambda x, n=n: logs(x, n), shapes.state.shape))

    if names:
        abstractly(take_apart)
    return found
