"""Handlers that split a NumPyro program at its scan over time.

`numpyro.contrib.control_flow.scan` sends a message of type "control_flow" through the stack of handlers. The message
contains the body, the first carry and the inputs, so a handler finds all of them in an unchanged program. The module
`state_space` gives these parts their meaning for a filter.
"""

from __future__ import annotations

import copy
import linecache
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Int, PRNGKeyArray, PyTree
from numpyro import handlers
from numpyro.contrib.control_flow.cond import cond_wrapper
from numpyro.contrib.control_flow.scan import PytreeTrace
from numpyro.primitives import _PYRO_STACK, Messenger

from numpyro_diffusion_da.arguments import broadcasts, is_number, shown
from numpyro_diffusion_da.program.arrays import as_array, number_array
from numpyro_diffusion_da.program.sites import is_discrete

LatentValue = Callable[[str, dist.Distribution], Array]
"""Value of a latent site of the body, from its name and distribution."""


class TimeInputs(NamedTuple):
    """Inputs of the scan's body at one time; filter kernels take them as their "observation".

    Attributes:
        step: index of the time, from 0, shape (). Inputs of all times have a leading axis of time.
        xs: slice of the scan's `xs` at this time, observations included.
    """

    step: Int[Array, ""]
    xs: PyTree


class ScanCall(NamedTuple):
    """Arguments of the program's scan.

    Attributes:
        body: function (carry, inputs) -> (next carry, output).
        init: first carry, as arrays.
        xs: inputs of all times, leading axis time.
        length: number of times.
        substitutions: pairs ("condition" or "substitute", values) of the handlers around the scan.
        handlers: the handlers `scale` and `mask` around the scan, the outermost first.
    """

    body: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    init: PyTree
    xs: PyTree
    length: int
    substitutions: list[tuple[str, Any]]
    handlers: list[Any]

    def first_inputs(self) -> TimeInputs:
        """Inputs of the body at the first time."""
        return TimeInputs(jnp.asarray(0), jax.tree.map(lambda x: x[0], self.xs))

    def with_carry_of(self, shapes: PyTree) -> ScanCall:
        """Return the same call with its first carry converted to the dtypes of `shapes`."""
        return self._replace(
            init=jax.tree.map(
                lambda leaf, s: leaf if leaf.dtype == s.dtype else leaf.astype(s.dtype), self.init, shapes
            )
        )


class ObservedSite(NamedTuple):
    """Observed site of the scan's body at one time.

    Attributes:
        fn: distribution of the site; masked at times for which a handler around the scan has no value.
        value: observed value, in the shape of the distribution; NaN where missing. It is empty for `numpyro.factor`.
        power: exponent of the likelihood, as set by `handlers.scale`; 1.0 without it.
    """

    fn: dist.Distribution
    value: Array
    power: Array | float


class BodySites(NamedTuple):
    """Sites found in one run of the scan's body.

    Attributes:
        latent: distribution of each latent site, by name.
        observed: each observed site, by name, in the program's order.
        scaled: names of the latent sites under `handlers.scale`.
        deterministic: value of each deterministic site, by name.
        carry: next carry.
    """

    latent: dict[str, dist.Distribution]
    observed: dict[str, ObservedSite]
    scaled: list[str]
    deterministic: dict[str, Array]
    carry: PyTree


class _ReachedScan(Exception):  # noqa: N818 - it is control flow, not an error
    """Exception that carries the arguments of the scan out of the program."""

    def __init__(self, call: ScanCall) -> None:
        self.call = call


def abstractly(fn: Callable[..., Any], trace: Callable[..., Any] = jax.eval_shape, **inputs: Any) -> Any:
    """Trace a function without computing it; by default, return the shapes and dtypes of its result.

    Args:
        fn: function of the inputs.
        trace: `jax.eval_shape`, or `numpyro.ops.provenance.eval_provenance` for the names of the inputs that each
            output depends on.
        **inputs: shapes and dtypes of the inputs.

    Raises:
        ValueError: `fn` raised it. It reaches the user without the note that JAX adds to an exception in traced code.
    """
    problems: list[ValueError] = []

    def caught(**given: Any) -> Any:
        try:
            return fn(**given)
        except ValueError as error:
            problems.append(error)
            return None

    with jax.debug_key_reuse(False):  # nothing is drawn here, so a key may serve several looks at the program
        traced = trace(caught, **inputs)
    if problems:
        raise problems[0]
    return traced


def _scan_call(msg: dict[str, Any], around: Messenger) -> ScanCall:
    """Read the arguments of a scan from its message.

    Args:
        msg: message of the scan.
        around: our own handler, outside which no handler matters.

    Raises:
        ValueError: the scan runs backwards, has no length, has no times, has inputs that are no arrays or of different
            lengths, or is inside a handler that a filter cannot apply.
    """
    body, init, xs, length, reverse = msg["args"]
    if reverse:
        raise ValueError(
            "the program's scan has reverse=True, but a filter runs forward in time; reverse the data instead."
        )

    def converted(path: Any, leaf: Any) -> Any:
        what = f"input xs{jax.tree_util.keystr(path)} of the program's scan"
        leaf = as_array(leaf, what)
        if not (leaf.shape if isinstance(leaf, jax.Array) else np.shape(leaf)):
            raise ValueError(
                f"{what} is {shown(leaf)}, which has no time axis; give arrays with a leading axis of time (a list of "
                "numbers becomes one by jnp.asarray)."
            )
        return leaf

    if isinstance(xs, (list, tuple)) and xs and all(map(is_number, xs)):
        raise ValueError(
            f"the inputs xs of the program's scan are a {type(xs).__name__} of {len(xs)} numbers; give an array with a "
            "leading axis of time, jnp.asarray(xs)."
        )
    xs = jax.tree_util.tree_map_with_path(converted, xs)
    lengths = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(xs)} | ({length} if length is not None else set())
    if not lengths:
        raise ValueError("the program's scan has neither xs nor length; give it length=<number of times>.")
    if len(lengths) > 1:
        raise ValueError(
            f"the inputs of the program's scan have leading axes of lengths {sorted(lengths)}; "
            "give all of them a leading time axis of the same length."
        )
    (length,) = lengths
    if length < 1:
        raise ValueError("the program's scan runs over 0 times; give data of one time or more.")
    init = jax.tree_util.tree_map_with_path(
        lambda path, leaf: number_array(leaf, f"the first carry{jax.tree_util.keystr(path)} of the program's scan"),
        init,
    )
    return ScanCall(body, init, xs, length, list(msg["kwargs"]["substitute_stack"]), _around(around))


APPLIED = (handlers.scale, handlers.mask)
"""Handlers around a scan that act on the sites of its body, and that a filter applies there."""

HARMLESS = (handlers.condition, handlers.substitute, handlers.seed, handlers.trace, handlers.block)
"""Handlers around a scan that change nothing in its body, or whose values come with the message of the scan."""


def _around(own: Messenger) -> list[Any]:
    """Handlers `scale` and `mask` around the scan and inside our own handler, the outermost first.

    Raises:
        ValueError: there is another handler, which a filter would leave out.
    """
    inside = _PYRO_STACK[_PYRO_STACK.index(own) + 1 :]
    for handler in inside:
        if not isinstance(handler, APPLIED + HARMLESS):
            name = type(handler).__name__
            where = "numpyro.plate" if isinstance(handler, numpyro.plate) else f"the handler {name}"
            raise ValueError(
                f"the program's scan is inside {where}, which a filter cannot apply to it; put it into the body of the "
                "scan, or leave it out (handlers.condition, substitute, scale and mask may be around a scan)."
            )
    return [handler for handler in inside if isinstance(handler, APPLIED)]


def _is_cond(msg: dict[str, Any]) -> bool:
    """Whether a message of type "control_flow" comes from `numpyro.contrib.control_flow.cond`, and not from `scan`."""
    return msg["fn"] is cond_wrapper


def _check_cond(msg: dict[str, Any]) -> None:
    """Check that no latent site is inside a `cond`, where a filter could not give it a value.

    Raises:
        ValueError: there is one; the message names it.
    """
    for name, site in msg["value"][1].trace.items():
        if site["type"] == "sample" and not site["is_observed"]:
            raise ValueError(
                f"site '{name}' is inside numpyro.contrib.control_flow.cond, where a filter cannot give it a value; "
                "draw it outside, and let cond choose its parameters."
            )


def _as_numbers(msg: dict[str, Any]) -> None:
    """Convert the value that a handler or `obs=` gives to a site before the scan to an array.

    Raises:
        ValueError: the value holds no numbers; the message names the site.
    """
    if msg["type"] == "sample" and msg["value"] is not None:
        msg["value"] = number_array(msg["value"], f"the value of site '{msg['name']}'")


class _StopAtScan(Messenger):
    """Handler that stops the program at its scan."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """Raise `_ReachedScan` at the message of the scan."""
        _as_numbers(msg)
        if msg["type"] == "control_flow" and not _is_cond(msg):
            raise _ReachedScan(_scan_call(msg, self))


def run_to_scan(program: Callable[[], Any], rng_key: PRNGKeyArray) -> ScanCall | None:
    """Run a program up to its scan and return the scan's arguments; None if the program has no scan.

    Args:
        program: NumPyro program, a function without arguments.
        rng_key: random key of the draws before the scan.

    Raises:
        ValueError: the scan runs backwards, has no length, or has inputs of different lengths.
    """
    try:
        with _StopAtScan(), handlers.seed(rng_seed=rng_key):
            program()
    except _ReachedScan as reached:
        return reached.call
    return None


class SkipScan(Messenger):
    """Handler that replaces the scan by zeros of the right shape and records the sites before and after the scan.

    Args:
        mark: function (name, drawn value) -> value. It is called for each latent site before the scan whose value no
            other handler sets.

    Attributes:
        scans: arguments of the scans found.
        before: message of each site before the scan, by name.
        after: names of the sites after the scan.
        given: names of the unobserved sites whose value another handler sets.
        draws_keys: whether the program takes a random key outside its sites (`numpyro.prng_key`) before the scan.
    """

    def __init__(self, mark: Callable[[str, Array], Array] = lambda name, value: value) -> None:
        super().__init__()
        self.mark = mark
        self.scans: list[ScanCall] = []
        self.before: dict[str, dict[str, Any]] = {}
        self.after: list[str] = []
        self.given: set[str] = set()
        self.draws_keys = False

    def process_message(self, msg: dict[str, Any]) -> None:
        """Replace the scan, and note the sites whose value another handler sets.

        Raises:
            ValueError: the arguments of the scan are not valid, or its body cannot be run or returns another carry than
                it takes.
        """
        if msg["type"] == "sample" and msg["value"] is not None and not msg["is_observed"]:
            self.given.add(msg["name"])  # handlers.substitute sets the value, but does not make the site observed
        _as_numbers(msg)
        if msg["type"] == "prng_key":
            self.draws_keys = True
        if msg["type"] != "control_flow" or _is_cond(msg):
            return
        with handlers.block():
            call, output = _with_promoted_carry(_scan_call(msg, self))
        self.scans.append(call)
        stacked = jax.tree.map(lambda s: jnp.zeros((call.length, *s.shape), s.dtype), output)
        msg["value"] = ((call.length, None, call.init), (PytreeTrace({}), stacked))

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Record a site after it has its value.

        Raises:
            ValueError: a latent site is inside a `cond`.
        """
        if msg["type"] == "control_flow" and _is_cond(msg):
            _check_cond(msg)
        if msg["type"] == "sample":
            if self.scans:
                self.after.append(msg["name"])
            else:
                if not msg["is_observed"] and msg["name"] not in self.given:
                    msg["value"] = self.mark(msg["name"], msg["value"])
                self.before[msg["name"]] = msg.copy()


class _BodyRecorder(Messenger):
    """Handler that records the sites of one run of the body, and gives latent sites a value.

    Args:
        latent_value: function from name and distribution of a latent site to its value.
        beyond: names of the observed sites for which a handler around the scan may have no value at this time, with
            whether it has one.
    """

    def __init__(self, latent_value: LatentValue, beyond: dict[str, Array]) -> None:
        super().__init__()
        self.latent_value = latent_value
        self.beyond = beyond
        self.latent: dict[str, dist.Distribution] = {}
        self.observed: dict[str, ObservedSite] = {}
        self.scaled: list[str] = []
        self.deterministic: dict[str, Array] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Record a sample site, and give it a value if it is latent.

        Raises:
            ValueError: a scan inside the body, an observed value whose shape is not that of its distribution or that
                holds no numbers, or an observed site with `obs_mask=`.
        """
        if msg["type"] == "control_flow" and not _is_cond(msg):
            raise ValueError(
                "the program has a scan inside the body of its scan; a filter needs a single scan over time: "
                "write an inner loop without sites as jax.lax.scan."
            )
        if msg["type"] == "prng_key":
            raise ValueError(
                "the body of the program's scan takes numpyro.prng_key(), but a filter draws the latent sites only, so "
                "this randomness would be the same at every step; draw it by numpyro.sample in the latent site."
            )
        if msg["type"] != "sample":
            return
        name, fn = msg["name"], msg["fn"]
        if msg["is_observed"]:
            value = _observed_value(name, fn, msg["value"])
            if name in self.beyond:
                fn = fn.mask(self.beyond[name])
            power = 1.0 if msg["scale"] is None else msg["scale"]
            if not broadcasts(jnp.shape(power), fn.batch_shape):
                raise ValueError(
                    f"handlers.scale gives site '{name}' powers of shape {jnp.shape(power)}, but the site has the "
                    f"batch shape {fn.batch_shape} at one time; put powers that change over time "
                    "into the inputs of the scan."
                )
            self.observed[name] = ObservedSite(fn, value, power)
            return
        if name.endswith("_unobserved") and name.removesuffix("_unobserved") + "_observed" in self.observed:
            raise ValueError(
                f"site '{name.removesuffix('_unobserved')}' has obs_mask=, for which NumPyro makes a latent site of "
                "the missing values; mask the distribution instead, dist.Normal(...).mask(m), or give NaN in the "
                "observation where it is missing."
            )
        if msg["value"] is not None:
            raise ValueError(
                f"site '{name}' of the scan's body gets its value from handlers.substitute, but a filter draws it; "
                "leave it out of the handler, or observe it by handlers.condition."
            )
        self.latent[name] = fn
        msg["value"] = self.latent_value(name, fn)
        if msg["scale"] is not None:
            self.scaled.append(name)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Record the value of a deterministic site.

        Raises:
            ValueError: a latent site is inside a `cond`.
        """
        if msg["type"] == "control_flow":
            _check_cond(msg)
        if msg["type"] == "deterministic":
            self.deterministic[msg["name"]] = msg["value"]


def _observed_value(name: str, fn: dist.Distribution, value: Any) -> Array:
    """Observed value of a site as an array of the distribution's shape.

    Raises:
        ValueError: the value has another shape, or holds no numbers. NumPyro would broadcast it, and so count an
            observation twice.
    """
    value = number_array(value, f"the observation of site '{name}'")
    if jnp.iscomplexobj(value):
        raise ValueError(f"the observation of site '{name}' is complex; give real numbers, such as its two parts.")
    if value.shape != fn.shape():
        raise ValueError(
            f"site '{name}' observes an array of shape {value.shape} at one time, but its distribution has shape "
            f"{fn.shape()}; give obs= an array of the distribution's shape (and data with a leading axis of time)."
        )
    return value


def placeholder(name: str, fn: dist.Distribution) -> Array:
    """Zeros of the shape and dtype of a site's draws; a caller who uses them reads nothing that depends on them."""
    if not is_discrete(fn):
        return jnp.zeros(fn.shape())
    drawn = jax.eval_shape(fn.sample, jax.random.key(0))
    return jnp.zeros(drawn.shape, drawn.dtype)


def _with_promoted_carry(call: ScanCall) -> tuple[ScanCall, PyTree]:
    """Give the first carry the dtypes that `jax.lax.scan` gives it: Python numbers take those of the next carry.

    Returns:
        (call with the converted first carry, shapes and dtypes of the body's output).

    Raises:
        ValueError: the body returns a carry of another structure, shape or dtype than it takes.
    """
    for promoted in (False, True):
        carry, output = abstractly(
            lambda call=call: run_body(call, jax.random.key(0), call.init, call.first_inputs())[1]
        )
        _check_carry(call.init, carry)
        differ = [
            (jax.tree_util.keystr(path), before, after)
            for (path, before), after in zip(
                jax.tree_util.tree_leaves_with_path(call.init), jax.tree.leaves(carry), strict=True
            )
            if before.dtype != after.dtype
        ]
        if not differ:
            return call, output
        if promoted or not any(before.weak_type for _, before, _ in differ):
            break
        call = call.with_carry_of(
            jax.tree.map(
                lambda old, new: jax.ShapeDtypeStruct(
                    old.shape, jnp.promote_types(old.dtype, new.dtype) if old.weak_type else old.dtype
                ),
                call.init,
                carry,
            )
        )
    where, before, after = differ[0]
    raise ValueError(
        f"the body of the scan takes a carry{where} of type {before.dtype} and returns one of type {after.dtype}, "
        "which jax.lax.scan refuses; give the first carry the type that the body returns: jnp.asarray(x0, "
        f"jnp.{after.dtype})."
    )


def _check_carry(before: PyTree, after: PyTree) -> None:
    """Check that the body returns a carry of the same structure and shapes as it takes.

    Raises:
        ValueError: the structures or shapes differ.
    """
    shapes = [jax.tree.map(jnp.shape, before), jax.tree.map(lambda leaf: leaf.shape, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the body of the scan takes a carry of shapes {shapes[0]} and returns {shapes[1]}; "
            "return a carry of the same structure and shapes as the first one."
        )


class _Values:
    """Values that a handler around the scan gives to the sites of its body at one time.

    Args:
        given: values by site, or a function of a site's message.
        step: index of the time.
        length: number of times.
        beyond: dictionary that gets, for each site with fewer values than times, whether it has one at this time.
    """

    def __init__(self, given: Any, step: Int[Array, ""], length: int, beyond: dict[str, Array]) -> None:
        self.given, self.step, self.length, self.beyond = given, step, length, beyond

    def __call__(self, site: dict[str, Any]) -> Any:
        """Value of a site at this time; None if the handler has none.

        Raises:
            ValueError: there are more values than times.
        """
        if site["type"] != "sample":
            return None
        value = self.given.get(site["name"]) if isinstance(self.given, dict) else self.given(site)
        if value is None:
            return None
        value = as_array(value, f"the value of site '{site['name']}' in a handler around the scan")
        shape = (*site["kwargs"].get("sample_shape", ()), *site["fn"].shape())
        if jnp.ndim(value) != len(shape) + 1:
            return value  # one value for all times; the recorder checks its shape
        value = jnp.asarray(value)
        number = len(value)
        if number > self.length:
            raise ValueError(
                f"site '{site['name']}' gets {number} values from a handler around the scan, which has {self.length} "
                "times; give one value for each time or fewer."
            )
        if number < self.length:
            # NumPyro draws the values of later times. For a filter they are missing, and the run is a forecast.
            self.beyond[site["name"]] = self.step < number
        return value[jnp.minimum(self.step, number - 1)]


def run_body(
    call: ScanCall,
    rng_key: PRNGKeyArray,
    carry: PyTree,
    inputs: TimeInputs,
    latent_value: PyTree | LatentValue = None,
) -> tuple[BodySites, tuple[PyTree, PyTree]]:
    """Run the scan's body once, as NumPyro's scan would run it at this time.

    Args:
        call: arguments of the scan.
        rng_key: random key of the body's own draws.
        carry: carry that the body takes.
        inputs: inputs of the time.
        latent_value: value of the latent site, values of several latent sites by name, or a function from a site's name
            and distribution to its value; None for zeros.

    Returns:
        (sites of the run, (next carry, output of the body)).

    Raises:
        ValueError: the body contains a scan, an observed value does not fit its distribution, a distribution gets an
            invalid parameter, or a handler around the scan is neither `handlers.condition` nor `handlers.substitute`.
    """
    body = handlers.seed(call.body, rng_key)
    beyond: dict[str, Array] = {}
    for kind, values in call.substitutions:
        at_time = _Values(values, inputs.step, call.length, beyond)
        if kind == "condition":
            body = handlers.condition(body, condition_fn=at_time)
        elif kind == "substitute":
            body = handlers.substitute(body, substitute_fn=at_time)
        else:
            raise ValueError(f"a filter cannot run a scan inside handlers.{kind}; use handlers.condition instead.")
    recorder = _BodyRecorder(_value_of(latent_value), beyond)
    with ExitStack() as stack:
        stack.enter_context(handlers.block())
        stack.enter_context(recorder)
        for handler in call.handlers:
            stack.enter_context(copy.copy(handler))  # a handler that is active cannot be entered again
        new_carry, output = with_place(body, carry, inputs.xs)
    sites = BodySites(recorder.latent, recorder.observed, recorder.scaled, recorder.deterministic, new_carry)
    return sites, (new_carry, output)


def _value_of(latent_value: Any) -> LatentValue:
    """Function from a latent site's name and distribution to its value."""
    if latent_value is None:
        return placeholder
    if callable(latent_value):
        return latent_value
    if isinstance(latent_value, dict):
        return lambda name, fn: latent_value[name]
    return lambda name, fn: latent_value


def with_place(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of the user, and name the line of the program where NumPyro refuses a distribution's parameter.

    Raises:
        ValueError: a distribution of the program gets an invalid parameter.
    """
    try:
        return fn(*args, **kwargs)
    except ValueError as error:
        if "distribution got invalid" not in str(error):
            raise
        own = [f for f in traceback.extract_tb(error.__traceback__) if not _of_a_library(f.filename)]
        if not own:
            raise
        where, line = own[-1].filename, own[-1].lineno or 0
        source = linecache.getline(where, line).strip() or "its source is not available"
        raise ValueError(
            f"{str(error).rstrip('.')} at line {line} of {Path(where).name}: {source}. Give it a valid value: the "
            "scale of an error, for example, is above zero."
        ) from None


def _of_a_library(filename: str) -> bool:
    """Whether a file belongs to NumPyro, JAX, another installed library, or to this one."""
    parts = Path(filename).parts
    own = Path(__file__).parent.parent
    return "site-packages" in parts or filename.startswith("<frozen") or own in Path(filename).parents
