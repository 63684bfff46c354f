"""Structure of a state-space program: its sites, shapes and dependencies, found by tracing; nothing is computed.

The first trace of a program finds its sites and shapes, and a second one finds which values depend on which. If the
structure is expected (`like`), one trace is enough.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree
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
        values_per_error: number of consecutive values that share a correlated error; 1 if errors are independent.
    """

    shape: tuple[int, ...]
    values_per_error: int


class DeterministicStructure(NamedTuple):
    """Shape of one deterministic site of the body, and what its value depends on.

    Attributes:
        shape: shape of the site's value at one time; None if it is no single array.
        dtype: name of its dtype; "" if it is no single array.
        depends_on: names of what its value depends on, apart from the scan's inputs and arguments of the program.
    """

    shape: tuple[int, ...] | None
    dtype: str
    depends_on: tuple[str, ...]

    @property
    def is_metadata(self) -> bool:
        """Whether its value is an array that is the same for all particles of a time."""
        return self.shape is not None and not self.depends_on


class Diffusion(NamedTuple):
    """Parts of a diffusion transition that do not change over time.

    Attributes:
        prior: diffusion prior.
        sampler: sampler of the draws.
        density: computation of `log_prob`; None if the transition has none.
    """

    prior: DiffusionPrior
    sampler: Sampler
    density: ProbabilityFlow | None


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """Sites, shapes and dependencies of a program, without any values.

    Attributes:
        name: name of the program.
        length: number of times that its scan runs over.
        latent_name: name of the latent site of the scan's body.
        state_shape: shape of the latent site's value.
        observed: observed sites of the body, by name, in the program's order.
        deterministic: deterministic sites of the body, by name, in the program's order.
        needed_names: unobserved sites outside the scan that its body depends on.
        global_names: the sites of `needed_names`, and the unobserved sites that only observed sites outside the scan
            depend on.
        initial_names: all other latent sites outside the scan, which affect its first carry and nothing else.
        outside_names: observed sites outside the scan.
        general_names: observed sites that are not Gaussian, whose error changes with the state, or whose mean is a
            nonlinear function of a linear predictor.
        scaled_names: latent sites of the body under `handlers.scale`.
        observes_linearly: whether every observed site is Gaussian with a mean affine in the latent site and an error
            independent of it. False if this is not known.
        carry_remembers: whether the next carry depends on the carry before, for a given value of the latent site.
        observations_remember: whether the observed sites depend on the carry, for a given value of the latent site.
        diffusion: parts of the diffusion transition; None for any other transition.
        shapes: shapes that a later trace of the same program can expect.
    """

    name: str
    length: int
    latent_name: str
    state_shape: tuple[int, ...]
    observed: dict[str, ObservedStructure]
    deterministic: dict[str, DeterministicStructure]
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

    @property
    def metadata_names(self) -> tuple[str, ...]:
        """Names of the deterministic sites that depend on neither the state, the carry nor random draws."""
        return tuple(name for name, site in self.deterministic.items() if site.is_metadata)

    def same_as(self, other: Structure | None) -> bool:
        """Whether another structure has the same sites, shapes and dependencies; the priors may differ."""
        return other is not None and self._key() == other._key()

    def _key(self) -> tuple[Any, ...]:
        """All that two equal structures share, in a form that can be compared."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        diffusion, shapes = plain.pop("diffusion"), plain.pop("shapes")
        return plain, diffusion is None, jax.tree.structure(shapes), jax.tree.leaves(shapes)


class Shapes(NamedTuple):
    """Shapes and dtypes of the values that one run of a program's body depends on.

    Attributes:
        outside: latent sites outside the scan whose value no handler sets, by name.
        carry: first carry of the scan.
        state: value of the latent site.
    """

    outside: dict[str, Any]
    carry: PyTree
    state: Any


class _OtherShapesError(ValueError):
    """Raised if a program does not have the shapes that were expected of it."""


def trace_structure(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], like: Structure | None = None
) -> Structure:
    """Find the structure of a program at given arguments.

    Args:
        model: NumPyro program.
        args: positional arguments of the program.
        kwargs: keyword arguments of the program.
        like: structure that the program probably has. If it fits, the program is traced once and not twice.

    Raises:
        ValueError: the program has no scan or several, the initial state is observed outside the scan, sites follow
            after the scan, the body does not have exactly one latent site, or nothing is observed in it. The message
            names the site.
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
    """Name of a program for messages and results."""
    return getattr(inspect.unwrap(model), "__name__", type(model).__name__)


def _run(program: Callable[[], None], rng_key: PRNGKeyArray | None = None, **settings: Any) -> SkipScan:
    """Run a program without its scan.

    Args:
        program: the program, without arguments.
        rng_key: random key of the draws before the scan; None for an arbitrary one.
        **settings: arguments of `SkipScan`.

    Returns:
        The handler with the sites that it recorded.
    """
    skip = SkipScan(**settings)
    with skip, handlers.seed(rng_seed=jax.random.key(0) if rng_key is None else rng_key):
        program()
    return skip


def _free(skip: SkipScan) -> dict[str, dict[str, Any]]:
    """Messages of the sites before the scan whose value no handler sets, by name."""
    return {name: site for name, site in skip.before.items() if name not in skip.given}


def _probe(program: Callable[[], None], name: str) -> Shapes:
    """Find the shapes of a program, and check its form.

    Raises:
        ValueError: the program does not have the form of a state-space model.
    """
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
    """Check that a program has one scan, no sites after it, one latent site and an observed site in its body.

    Raises:
        ValueError: one of these does not hold.
    """
    if len(skip.scans) != 1 or sites is None:
        raise ValueError(
            f"the program '{name}' has {len(skip.scans) or 'no'} numpyro.contrib.control_flow.scan; "
            "a filter needs exactly one: write the time loop as scan(step, x0, observations)."
        )
    if skip.after:
        raise ValueError(
            f"the program '{name}' has site '{skip.after[0]}' after its scan, where a filter does not see it; "
            "move the site into the scan's body."
        )
    if len(sites.latent) != 1:
        names = ", ".join(f"'{n}'" for n in sites.latent) or "none"
        raise ValueError(
            f"the body of the scan of '{name}' must have exactly one latent site, but has {names}; "
            "join several states into one array."
        )
    if not sites.observed:
        raise ValueError(
            f"nothing is observed in the scan of '{name}'; give a site of its body obs=... (NaN values for times "
            "without observations)."
        )


def _examine(program: Callable[[], None], name: str, shapes: Shapes) -> Structure:
    """Find the structure of a program whose shapes are known.

    Raises:
        _OtherShapesError: the program has other shapes.
        ValueError: a site before the scan observes a site that affects the first carry only.
    """
    found: dict[str, Any] = {}

    def look(state: Array, direction: Array, carry: PyTree, key: PRNGKeyArray, **outside: Array) -> dict[str, Any]:
        def marked(site: str, value: Array) -> Array:
            if site not in shapes.outside or value.shape != shapes.outside[site].shape:
                raise _OtherShapesError
            # The result depends on the site's own input and on the sites that it was drawn from. So a dependence on a
            # site that acts through another site is found too.
            return jnp.where(True, value, outside[_argument(site)])

        skip = found["skip"] = _run(program, key, mark=marked)
        call = _expected(skip, shapes)
        found.update(_facts(call, carry, state))
        return {
            **_outside_dependencies(skip, call, carry),
            **_body_dependencies(call, carry, state, direction, key),
        }

    inputs = {_argument(n): s for n, s in shapes.outside.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    depends = abstractly(
        look, eval_provenance, state=shapes.state, direction=shapes.state, carry=shapes.carry, key=key, **inputs
    )
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
        deterministic={
            n: form._replace(depends_on=_causes(depends["deterministic"][n], found["latent_name"]))
            for n, form in found["deterministic"].items()
        },
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
    """Name of the argument that holds a latent site's value; a prefix, because a site may be called `state` too."""
    return f"site {site}"


def _names(provenance: PyTree) -> frozenset[str]:
    """Names of the inputs in any leaf of a provenance."""
    return frozenset().union(*jax.tree.leaves(provenance, is_leaf=lambda leaf: isinstance(leaf, frozenset)))


def _depends(provenance: PyTree, name: str) -> bool:
    """Whether any leaf of a provenance contains the name of an input."""
    return name in _names(provenance)


def _causes(provenance: PyTree, latent_name: str) -> tuple[str, ...]:
    """What a value of the body depends on, apart from the scan's inputs and arguments of the program, for messages."""
    said = {"state": f"the latent site '{latent_name}'", "carry": "the carry of the scan", "key": "random draws"}
    names = sorted(_names(provenance))
    # A latent site before the scan depends on the key too. Its own name says more.
    outside = [
        f"the latent site '{name.removeprefix(_argument(''))}'" for name in names if name.startswith(_argument(""))
    ]
    inside = [said[name] for name in said if name in names and not (name == "key" and outside)]
    return (*inside, *outside)


def _expected(skip: SkipScan, shapes: Shapes) -> ScanCall:
    """Arguments of the scan, if the sites before it and the first carry have the expected shapes.

    Raises:
        _OtherShapesError: they have other shapes.
    """
    latent = {n for n, s in _free(skip).items() if not s["is_observed"]}
    if latent != set(shapes.outside) or len(skip.scans) != 1 or skip.after:
        raise _OtherShapesError
    call = skip.scans[0]
    if _described(call.init) != _described(shapes.carry):
        raise _OtherShapesError
    return call


def _described(tree: PyTree) -> tuple[str, list[Any]]:
    """The form of a pytree and the shapes and dtypes of its arrays."""
    leaves, form = jax.tree.flatten(tree)
    return str(form), [(leaf.shape, leaf.dtype) for leaf in leaves]


def _facts(call: ScanCall, carry: PyTree, state: Array) -> dict[str, Any]:
    """Names, shapes and kinds of the body's sites, for `Structure`.

    Raises:
        _OtherShapesError: the body has other sites, or the state has another shape.
    """
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
        "deterministic": {n: _form(value) for n, value in sites.deterministic.items()},
        "gaussian": {n: is_gaussian(fn) for n, (fn, *_) in sites.observed.items()},
        "scaled": tuple(sites.scaled),
        "diffusion": diffusion,
    }


def _form(value: Any) -> DeterministicStructure:
    """Shape and dtype of the value of a deterministic site; its dependencies are filled in later."""
    if not jax.tree_util.all_leaves([value]):
        return DeterministicStructure(None, "", ())
    return DeterministicStructure(jnp.shape(value), str(jnp.result_type(value)), ())


def _outside_dependencies(skip: SkipScan, call: ScanCall, carry: PyTree) -> dict[str, Any]:
    """Values that may depend on sites outside the scan: in its body, its first carry, and observed sites before it."""
    sites, outputs = run_body(call, jax.random.key(0), carry, call.first_inputs())
    in_body = (sites.latent, sites.observed, sites.deterministic, outputs, call.xs)
    observed = {n: s["fn"] for n, s in _free(skip).items() if s["is_observed"]}
    return {
        "body": jax.tree.leaves(in_body),
        "first carry": jax.tree.leaves(call.init),
        "observed outside": {n: jax.tree.leaves(fn) for n, fn in observed.items()},
    }


def _body_dependencies(
    call: ScanCall, carry: PyTree, state: Array, direction: Array, key: PRNGKeyArray
) -> dict[str, Any]:
    """Values that may depend on the latent site's value, on the carry for a given value of it, or on a random key."""

    def at(x: Array) -> BodySites:
        return run_body(call, key, carry, call.first_inputs(), x)[0]

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
        "deterministic": {
            n: [jnp.asarray(leaf) for leaf in jax.tree.leaves(value)] for n, value in sites.deterministic.items()
        },
    }


def _globals(shapes: Shapes, depends: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Sort the latent sites outside the scan by what depends on them.

    Returns:
        (names of the sites that the scan's body depends on; names of the sites that only observed sites before the scan
        depend on).

    Raises:
        ValueError: a site before the scan observes a site that affects the first carry only.
    """
    used, measured = [], []
    for name in shapes.outside:
        argument = _argument(name)
        by = [other for other, on in depends["observed outside"].items() if _depends(on, argument)]
        if _depends(depends["body"], argument):
            used.append(name)
        elif by and _depends(depends["first carry"], argument):
            raise ValueError(
                f"site '{by[0]}' observes '{name}' before the scan, but a filter uses the observations inside the scan "
                "only; move the site into the scan's body."
            )
        elif by:
            measured.append(name)
    return used, measured


def _with_linear_predictor(program: Callable[[], None], shapes: Shapes, names: set[str]) -> set[str]:
    """Names of the sites whose log-likelihood is an elementwise function of a linear predictor."""
    found: set[str] = set()

    def take_apart() -> None:
        call = _run(program).scans[0]

        def logs(name: str, x: Array) -> Array:
            sites = run_body(call, jax.random.key(0), call.init, call.first_inputs(), x)[0]
            return pointwise_log_likelihood(*sites.observed[name]).reshape(-1)

        found.update(n for n in names if find_linear_predictor(functools.partial(logs, n), shapes.state.shape))

    if names:
        abstractly(take_apart)
    return found
