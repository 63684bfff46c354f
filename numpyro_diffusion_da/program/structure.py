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
import numpyro.distributions as dist
from jaxtyping import Array, PRNGKeyArray, PyTree
from numpyro import handlers
from numpyro.ops.provenance import eval_provenance

from numpyro_diffusion_da.diffusion.density import ProbabilityFlow
from numpyro_diffusion_da.diffusion.prior import DiffusionPrior, EmulatorPrior, OnePassPrior
from numpyro_diffusion_da.diffusion.sampler import Sampler
from numpyro_diffusion_da.observation.likelihood import GaussianLikelihood
from numpyro_diffusion_da.observation.linear_predictor import find_linear_predictor
from numpyro_diffusion_da.program.arrays import check_binds
from numpyro_diffusion_da.program.distribution import DiffusionTransition, EmulatorTransition, OnePassTransition
from numpyro_diffusion_da.program.scan import (
    BodySites,
    LatentValue,
    ScanCall,
    SkipScan,
    abstractly,
    placeholder,
    run_body,
    with_place,
)
from numpyro_diffusion_da.program.sites import (
    gaussian_observations,
    has_own_errors,
    independent_errors,
    is_discrete,
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
        is_discrete: whether its values are whole numbers, such as counts.
    """

    shape: tuple[int, ...]
    values_per_error: int
    is_discrete: bool = False


class CarryLeaf(NamedTuple):
    """One array of the scan's carry, and what a filter may do to it.

    A filter draws the latent site, and the body makes the next carry from it and from the carry before. What else is in
    a carry is resampled with its particle by every particle filter; an ensemble update and localized resampling treat
    each array by its kind (docs/numpyro.md has the table).

    Attributes:
        name: path of the array in the carry, such as "[1]"; empty if the carry is one array.
        is_real: whether it holds floating-point numbers. Integers, booleans and random keys are never averaged.
        is_used: whether, at a given value of the latent site, the next carry, an observed site or a deterministic site
            depends on it.
        is_unchanged: whether the body returns it as it is, like a parameter of the particle.
        is_shared: whether all particles have the same value, like a clock: it depends on no drawn value.
        has_places: whether its last axes are those of the state.
        sites: latent sites before the scan that its first value depends on.
    """

    name: str
    is_real: bool
    is_used: bool
    is_unchanged: bool
    is_shared: bool
    has_places: bool
    sites: tuple[str, ...]

    @property
    def moves_with_the_state(self) -> bool:
        """Whether an update of the latent site has to move this array too, by its regression on the observations."""
        return self.is_real and self.is_used and not self.is_shared


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


class OnePass(NamedTuple):
    """Parts of the transition of an emulator of one pass that do not change over time.

    Attributes:
        prior: the emulator.
        iterations: number of times that a guided draw linearizes it.
    """

    prior: OnePassPrior
    iterations: int


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """Sites, shapes and dependencies of a program, without any values.

    Attributes:
        name: name of the program.
        length: number of times that its scan runs over.
        latent_names: names of the latent sites of the scan's body, in the program's order. All filters but `Bootstrap`
            need a single one.
        latent_name: name of the latent site that is the state: the only one, or the first that is an emulator, or the
            first.
        state_shape: shape of its value.
        is_discrete: whether its values are whole numbers.
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
        no_derivative: why JAX cannot differentiate the means of the observed sites, such as for a callback; None if it
            can.
        observes_linearly: whether every observed site is Gaussian with a mean affine in the latent site and an error
            independent of it. False if this is not known.
        carry: each array of the carry, in the order of its leaves.
        carry_remembers: whether the next carry depends on the carry before, for a given value of the latent site.
        observations_remember: whether the observed sites depend on the carry, for a given value of the latent site.
        diffusion: parts of the diffusion transition; None for any other transition.
        one_pass: parts of the transition of an emulator of one pass; None for any other transition.
        shapes: shapes that a later trace of the same program can expect.
    """

    name: str
    length: int
    latent_names: tuple[str, ...]
    latent_name: str
    state_shape: tuple[int, ...]
    is_discrete: bool
    observed: dict[str, ObservedStructure]
    deterministic: dict[str, DeterministicStructure]
    needed_names: tuple[str, ...]
    global_names: tuple[str, ...]
    initial_names: tuple[str, ...]
    outside_names: tuple[str, ...]
    general_names: frozenset[str]
    scaled_names: tuple[str, ...]
    no_derivative: str | None
    observes_linearly: bool
    carry: tuple[CarryLeaf, ...]
    carry_remembers: bool
    observations_remember: bool
    diffusion: Diffusion | None
    one_pass: OnePass | None
    shapes: Shapes

    @property
    def observed_names(self) -> tuple[str, ...]:
        """Names of the observed sites of the body, in the program's order."""
        return tuple(self.observed)

    @property
    def metadata_names(self) -> tuple[str, ...]:
        """Names of the deterministic sites that depend on neither the state, the carry nor random draws."""
        return tuple(name for name, site in self.deterministic.items() if site.is_metadata)

    @property
    def emulator(self) -> EmulatorPrior | None:
        """Prior of the transition; None if the transition is that of no emulator."""
        emulator = self.diffusion or self.one_pass
        return None if emulator is None else emulator.prior

    @property
    def parameters_in_carry(self) -> dict[str, str]:
        """Name of each array of the carry that the body returns as it is and that comes from latent sites, and these.

        Such an array is a parameter. A particle filter selects among its first values and never makes new ones.
        """
        return {
            leaf.name: ", ".join(f"'{site}'" for site in leaf.sites)
            for leaf in self.carry
            if leaf.is_unchanged and leaf.is_real and leaf.sites
        }

    def same_as(self, other: Structure | None) -> bool:
        """Whether another structure has the same sites, shapes and dependencies; the priors may differ."""
        return other is not None and self._key() == other._key()

    def _key(self) -> tuple[Any, ...]:
        """All that two equal structures share, in a form that can be compared."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shapes = plain.pop("shapes")
        kinds = [plain.pop(kind) is not None for kind in ("diffusion", "one_pass")]
        return plain, kinds, jax.tree.structure(shapes), jax.tree.leaves(shapes)


class Shapes(NamedTuple):
    """Shapes and dtypes of the values that one run of a program's body depends on.

    Attributes:
        outside: latent sites outside the scan whose value no handler sets, by name.
        carry: first carry of the scan.
        state: value of each latent site, by name.
    """

    outside: dict[str, Any]
    carry: PyTree
    state: dict[str, Any]


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
            after the scan, the body has no latent site, or nothing is observed in it. The message names the site.
    """
    name = name_of(model)

    def program() -> None:
        try:
            model(*args, **kwargs)
        except TypeError as error:
            check_binds(model, args, kwargs, name, error)
            raise

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
        with_place(program)
    return skip


def _free(skip: SkipScan) -> dict[str, dict[str, Any]]:
    """Messages of the sites before the scan whose value no handler sets, by name."""
    return {name: site for name, site in skip.before.items() if name not in skip.given}


def _probe(program: Callable[[], None], name: str) -> Shapes:
    """Find the shapes of a program, and check its form.

    Raises:
        ValueError: the program does not have the form of a state-space model.
    """

    def run() -> tuple[Any, Any, Any]:
        skip, sites = _run(program), None
        if len(skip.scans) == 1:
            call = skip.scans[0]
            sites = run_body(call, jax.random.key(0), call.init, call.first_inputs())[0]
        _check_form(skip, sites, name)
        assert sites is not None
        outside = {n: s["value"] for n, s in _free(skip).items() if not s["is_observed"]}
        return outside, call.init, {name: placeholder(name, fn) for name, fn in sites.latent.items()}

    outside, carry, state = abstractly(run)
    return Shapes(outside, carry, state)


def _check_form(skip: SkipScan, sites: BodySites | None, name: str) -> None:
    """Check that a program has one scan, no sites after it, and a latent and an observed site in its body.

    Raises:
        ValueError: one of these does not hold.
    """
    if len(skip.scans) != 1 or sites is None:
        hidden = "" if skip.scans else " that it can see (handlers.block hides what is inside it)"
        raise ValueError(
            f"the program '{name}' has {len(skip.scans) or 'no'} numpyro.contrib.control_flow.scan{hidden}; "
            "a filter needs exactly one: write the time loop as scan(step, x0, observations)."
        )
    if skip.after:
        raise ValueError(
            f"the program '{name}' has site '{skip.after[0]}' after its scan, where a filter does not see it; "
            "move the site into the scan's body."
        )
    if not sites.latent:
        raise ValueError(
            f"the body of the scan of '{name}' has no latent site, so there is no state to filter; draw the next state "
            "in the body by numpyro.sample."
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
    leaves, form = jax.tree.flatten(shapes.carry)
    real = all(jnp.issubdtype(s.dtype, jnp.inexact) for s in shapes.state.values()) and len(shapes.state) == 1

    def look(
        state: dict[str, Array], direction: dict[str, Array], key: PRNGKeyArray, **inputs: Array
    ) -> dict[str, Any]:
        carry = jax.tree.unflatten(form, [inputs[_leaf(i)] for i in range(len(leaves))])

        def marked(site: str, value: Array) -> Array:
            if site not in shapes.outside or _described(value) != _described(shapes.outside[site]):
                raise _OtherShapesError
            # The result depends on the site's own input and on the sites that it was drawn from. So a dependence on a
            # site that acts through another site is found too.
            return jnp.where(True, value, inputs[_argument(site)])

        skip = _run(program, key, mark=marked)
        call = _expected(skip, shapes)
        # No value of this trace may outlive it, so only names are taken out.
        found["before"] = {n: s["is_observed"] for n, s in skip.before.items()}
        found["draws_keys"] = skip.draws_keys
        found.update(_facts(call, carry, state))
        return {
            **_outside_dependencies(skip, call, carry),
            **_body_dependencies(call, carry, state, direction if real else None, key, found),
        }

    inputs = {_argument(n): s for n, s in shapes.outside.items()}
    inputs |= {_leaf(i): leaf for i, leaf in enumerate(leaves)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    depends = abstractly(look, eval_provenance, state=shapes.state, direction=shapes.state, key=key, **inputs)
    before: dict[str, bool] = found["before"]
    names = _names(depends["body"])
    if found["draws_keys"] and "key" in names and not any(_argument(n) in names for n in shapes.outside):
        raise ValueError(
            f"the body of the scan of '{name}' uses random numbers that are drawn before the scan outside any site; "
            "draw them by numpyro.sample, so that a filter can give them a value."
        )
    used, measured = _globals(shapes, depends)
    global_names = tuple(n for n in before if n in {*used, *measured})
    changing = {n for n, on in depends["errors"].items() if _depends(on, "state")}
    bent = {n for n, on in depends["slopes"].items() if _depends(on, "state")}
    general = {n for n, gaussian in found["gaussian"].items() if not gaussian} | changing
    if real:
        general |= _with_linear_predictor(program, shapes, bent - general)
    name_of_state, shape = found["latent_name"], tuple(shapes.state[found["latent_name"]].shape)
    carry = _leaves(shapes, depends, found["unchanged"], shape)
    return Structure(
        name=name,
        length=found["length"],
        latent_names=found["latent_names"],
        latent_name=name_of_state,
        state_shape=shape,
        is_discrete=not jnp.issubdtype(shapes.state[name_of_state].dtype, jnp.inexact),
        observed=found["observed"],
        deterministic={
            n: form._replace(depends_on=_causes(depends["deterministic"][n], found["latent_name"]))
            for n, form in found["deterministic"].items()
        },
        needed_names=tuple(used),
        global_names=global_names,
        initial_names=tuple(n for n, observed in before.items() if not observed and n not in global_names),
        outside_names=tuple(n for n, observed in before.items() if observed),
        general_names=frozenset(general),
        scaled_names=found["scaled"],
        no_derivative=found["derivative"],
        observes_linearly=real
        and found["derivative"] is None
        and not general
        and not _depends(depends["linearity"], "state"),
        carry=carry,
        carry_remembers=any(_depends(depends["next carry"], _leaf(i)) for i in range(len(carry))),
        observations_remember=any(_depends(depends["observations"], _leaf(i)) for i in range(len(carry))),
        diffusion=found["diffusion"],
        one_pass=found["one_pass"],
        shapes=shapes,
    )


_CARRY = "carry "
"""Beginning of the names of the arguments that hold the arrays of the carry."""


def _leaf(index: int) -> str:
    """Name of the argument that holds one array of the carry."""
    return f"{_CARRY}{index}"


def _leaves(
    shapes: Shapes, depends: dict[str, Any], unchanged: list[bool], state_shape: tuple[int, ...]
) -> tuple[CarryLeaf, ...]:
    """Find what each array of the carry is.

    Args:
        shapes: shapes of the program.
        depends: provenance of the parts of the program.
        unchanged: whether the body returns each array as it is.
        state_shape: shape of the state.
    """
    given = jax.tree_util.tree_leaves_with_path(shapes.carry)
    first = [{n for n in shapes.outside if _argument(n) in on} for on in depends["first carry"]]
    own = [{i for i in range(len(given)) if _leaf(i) in on} for on in depends["next carry"]]
    # An array differs between particles if its first value, its next value, or an array that it is made from does.
    differs = {
        i for i, on in enumerate(depends["next carry"]) if "key" in depends["first carry"][i] or {"key", "state"} & on
    }
    while more := {i for i in range(len(given)) if i not in differs and own[i] & differs}:
        differs |= more
    read = [*depends["next carry"], *jax.tree.leaves(depends["observations"], is_leaf=_is_provenance)]
    read += jax.tree.leaves(depends["deterministic"], is_leaf=_is_provenance)
    size = len(state_shape)
    return tuple(
        CarryLeaf(
            name=jax.tree_util.keystr(path),
            is_real=bool(jnp.issubdtype(leaf.dtype, jnp.inexact)),
            is_used=any(_leaf(i) in on for on in read),
            is_unchanged=unchanged[i],
            is_shared=i not in differs,
            has_places=len(leaf.shape) >= size and leaf.shape[len(leaf.shape) - size :] == state_shape,
            sites=tuple(sorted(first[i])),
        )
        for i, (path, leaf) in enumerate(given)
    )


def _is_provenance(leaf: Any) -> bool:
    """Whether a leaf is the set of names that an output depends on."""
    return isinstance(leaf, frozenset)


def _argument(site: str) -> str:
    """Name of the argument that holds a latent site's value; a prefix, because a site may be called `state` too."""
    return f"site {site}"


def _names(provenance: PyTree) -> frozenset[str]:
    """Names of the inputs in any leaf of a provenance."""
    return frozenset().union(*jax.tree.leaves(provenance, is_leaf=_is_provenance))


def _depends(provenance: PyTree, name: str) -> bool:
    """Whether any leaf of a provenance contains the name of an input."""
    return name in _names(provenance)


def _causes(provenance: PyTree, latent_name: str) -> tuple[str, ...]:
    """Names of what a value of the body depends on, in words for messages.

    Inputs of the scan and arguments of the program are left out.
    """
    said = {"state": f"the latent site '{latent_name}'", "carry": "the carry of the scan", "key": "random draws"}
    names = {"carry" if name.startswith(_CARRY) else name for name in _names(provenance)}
    # A latent site before the scan depends on the key too. Its own name says more.
    outside = [
        f"the latent site '{name.removeprefix(_argument(''))}'"
        for name in sorted(names)
        if name.startswith(_argument(""))
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


def _facts(call: ScanCall, carry: PyTree, state: dict[str, Array]) -> dict[str, Any]:
    """Names, shapes and kinds of the body's sites, for `Structure`.

    Raises:
        _OtherShapesError: the body has other sites, or the state has another shape.
    """
    sites = run_body(call, jax.random.key(0), carry, call.first_inputs(), _expected_values(state))[0]
    if not sites.observed or set(sites.latent) != set(state):
        raise _OtherShapesError
    emulators = [n for n, fn in sites.latent.items() if isinstance(fn, EmulatorTransition)]
    latent_name = next(iter([*emulators, *sites.latent]))
    fn = sites.latent[latent_name]
    return {
        "length": call.length,
        "latent_names": tuple(sites.latent),
        "latent_name": latent_name,
        "observed": {
            n: ObservedStructure(tuple(fn.shape()), values_per_error(fn), is_discrete(fn))
            for n, (fn, *_) in sites.observed.items()
        },
        "deterministic": {n: _form(value) for n, value in sites.deterministic.items()},
        "gaussian": {n: is_gaussian(fn) for n, (fn, *_) in sites.observed.items()},
        "scaled": tuple(sites.scaled),
        "diffusion": Diffusion(fn.prior, fn.sampler, fn.density) if isinstance(fn, DiffusionTransition) else None,
        "one_pass": OnePass(fn.prior, fn.iterations) if isinstance(fn, OnePassTransition) else None,
    }


def _expected_values(state: dict[str, Array]) -> LatentValue:
    """Build the function that gives each latent site its value in `state`.

    Returns:
        Function (name, distribution) -> value, which raises `_OtherShapesError` for another site or another shape.
    """

    def value(name: str, fn: dist.Distribution) -> Array:
        if name not in state or _described(state[name]) != _described(placeholder(name, fn)):
            raise _OtherShapesError
        return state[name]

    return value


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
    call: ScanCall,
    carry: PyTree,
    state: dict[str, Array],
    direction: dict[str, Array] | None,
    key: PRNGKeyArray,
    found: dict[str, Any],
) -> dict[str, Any]:
    """Values that may depend on the latent sites' values, on the carry for given values of them, or on a random key.

    Args:
        call: arguments of the scan.
        carry: carry that the body takes.
        state: value of each latent site.
        direction: direction of the state, by name; None if the state is not a single array of real numbers.
        key: random key of the body's own draws.
        found: gets `unchanged`, whether the body returns each array of the carry as it is.

    Raises:
        _OtherShapesError: the latent sites have other names or shapes.
    """

    def at(x: dict[str, Array]) -> BodySites:
        return run_body(call, key, carry, call.first_inputs(), x)[0]

    def means(x: dict[str, Array]) -> dict[str, Array]:
        return {n: unmasked(fn)[0].mean for n, (fn, *_) in at(x).observed.items() if has_own_errors(fn)}

    sites = at(state)
    given, new = jax.tree.leaves(carry), jax.tree.leaves(sites.carry)
    found["unchanged"] = [after is before for before, after in zip(given, new, strict=True)]
    linearity: list[Array] = []
    slopes: dict[str, Array] = {}
    found["derivative"] = None
    if direction is not None:
        try:
            slopes = jax.jvp(means, (state,), (direction,))[1]
        except _OtherShapesError:
            raise
        except Exception as error:  # the means alone could be traced: a callback, or a derivative of the user's own
            found["derivative"] = str(error).splitlines()[0].split(". ")[0].rstrip(".")
            direction = None
    if direction is not None and all(is_gaussian(fn) for fn, *_ in sites.observed.values()):
        likelihood = GaussianLikelihood(
            lambda x: [part for n, site in at(x).observed.items() for part in gaussian_observations(n, *site)]  # type: ignore[arg-type]
        )
        # A residual that is affine in the state has a derivative that does not depend on it.
        linearity = [
            likelihood.log_normalizer(state),  # type: ignore[arg-type]
            jax.jvp(likelihood.residual, (state,), (direction,))[1],
        ]
    return {
        "errors": {n: independent_errors(fn) for n, (fn, *_) in sites.observed.items() if is_gaussian(fn)},
        "slopes": slopes,
        "linearity": linearity,
        "next carry": [jnp.asarray(leaf) for leaf in new],
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
    (state,) = shapes.state.values()

    def take_apart() -> None:
        call = _run(program).scans[0]

        def logs(name: str, x: Array) -> Array:
            sites = run_body(call, jax.random.key(0), call.init, call.first_inputs(), x)[0]
            return pointwise_log_likelihood(*sites.observed[name]).reshape(-1)

        found.update(n for n in names if find_linear_predictor(functools.partial(logs, n), state.shape))

    if names:
        abstractly(take_apart)
    return found
