"""Handlers that split a NumPyro program at its scan over time.

`numpyro.contrib.control_flow.scan` sends a message of type "control_flow" through the stack of handlers. The message
contains the body, the first carry and the inputs, so a handler finds all of them in an unchanged program. The module
`state_space` gives these parts their meaning for a filter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Int, PRNGKeyArray, PyTree
from numpyro import handlers
from numpyro.contrib.control_flow.scan import PytreeTrace, _subs_wrapper
from numpyro.primitives import Messenger


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
    """

    body: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    init: PyTree
    xs: PyTree
    length: int
    substitutions: list[tuple[str, Any]]

    def first_inputs(self) -> TimeInputs:
        """Inputs of the body at the first time."""
        return TimeInputs(jnp.asarray(0), jax.tree.map(lambda x: x[0], self.xs))


class ObservedSite(NamedTuple):
    """Observed site of the scan's body at one time.

    Attributes:
        fn: distribution of the site.
        value: observed value, broadcast to the shape of the distribution; NaN where missing.
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

    traced = trace(caught, **inputs)
    if problems:
        raise problems[0]
    return traced


def _scan_call(msg: dict[str, Any]) -> ScanCall:
    """Read the arguments of a scan from its message.

    Raises:
        ValueError: the scan runs backwards, has no length, or has inputs of different lengths.
    """
    body, init, xs, length, reverse = msg["args"]
    if reverse:
        raise ValueError(
            "the program's scan has reverse=True, but a filter runs forward in time; reverse the data instead."
        )
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(xs)} | ({(length,)} if length is not None else set())
    if not lengths:
        raise ValueError("the program's scan has neither xs nor length; give it length=<number of times>.")
    if len(lengths) > 1 or () in lengths:
        raise ValueError(
            f"the inputs of the program's scan have leading axes of lengths {sorted(lengths)}; "
            "give all of them a leading time axis of the same length."
        )
    ((length,),) = lengths
    return ScanCall(body, jax.tree.map(jnp.asarray, init), xs, length, list(msg["kwargs"]["substitute_stack"]))


class _StopAtScan(Messenger):
    """Handler that stops the program at its scan."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """Raise `_ReachedScan` at the message of the scan."""
        if msg["type"] == "control_flow":
            raise _ReachedScan(_scan_call(msg))


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
    """

    def __init__(self, mark: Callable[[str, Array], Array] = lambda name, value: value) -> None:
        super().__init__()
        self.mark = mark
        self.scans: list[ScanCall] = []
        self.before: dict[str, dict[str, Any]] = {}
        self.after: list[str] = []
        self.given: set[str] = set()

    def process_message(self, msg: dict[str, Any]) -> None:
        """Replace the scan, and note the sites whose value another handler sets.

        Raises:
            ValueError: the arguments of the scan are not valid, or its body cannot be run or returns another carry than
                it takes.
        """
        if msg["type"] == "sample" and msg["value"] is not None and not msg["is_observed"]:
            self.given.add(msg["name"])  # handlers.substitute sets the value, but does not make the site observed
        if msg["type"] != "control_flow":
            return
        call = _scan_call(msg)
        self.scans.append(call)
        key = jax.random.key(0)
        with handlers.block():
            carry, output = abstractly(lambda: run_body(call, key, call.init, call.first_inputs())[1])
        _check_carry(call.init, carry)
        stacked = jax.tree.map(lambda s: jnp.zeros((call.length, *s.shape), s.dtype), output)
        msg["value"] = ((call.length, None, call.init), (PytreeTrace({}), stacked))

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Record a site after it has its value."""
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
        latent_value: value of the latent site; None for zeros.
    """

    def __init__(self, latent_value: Array | None) -> None:
        super().__init__()
        self.latent_value = latent_value
        self.latent: dict[str, dist.Distribution] = {}
        self.observed: dict[str, ObservedSite] = {}
        self.scaled: list[str] = []
        self.deterministic: dict[str, Array] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Record a sample site, and give it a value if it is latent.

        Raises:
            ValueError: a scan inside the body, or an observed value whose shape does not fit its distribution.
        """
        if msg["type"] == "control_flow":
            raise ValueError(
                "the program has a scan inside the body of its scan; a filter needs a single scan over time: "
                "write an inner loop without sites as jax.lax.scan."
            )
        if msg["type"] != "sample":
            return
        if msg["is_observed"]:
            shape, value = msg["fn"].shape(), jnp.asarray(msg["value"])
            pairs = zip(value.shape[::-1], shape[::-1], strict=False)
            if value.ndim > len(shape) or any(got not in (1, expected) for got, expected in pairs):
                raise ValueError(
                    f"site '{msg['name']}' observes an array of shape {value.shape}, but its distribution has shape "
                    f"{shape}; give obs= an array of the distribution's shape."
                )
            power = 1.0 if msg["scale"] is None else msg["scale"]
            self.observed[msg["name"]] = ObservedSite(msg["fn"], jnp.broadcast_to(value, shape), power)
        else:
            self.latent[msg["name"]] = msg["fn"]
            # Zeros are a placeholder: a caller who gives no value reads nothing that depends on it.
            msg["value"] = jnp.zeros(msg["fn"].shape()) if self.latent_value is None else self.latent_value
            if msg["scale"] is not None:
                self.scaled.append(msg["name"])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Record the value of a deterministic site."""
        if msg["type"] == "deterministic":
            self.deterministic[msg["name"]] = msg["value"]


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


def run_body(
    call: ScanCall, rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs, latent_value: Array | None = None
) -> tuple[BodySites, tuple[PyTree, PyTree]]:
    """Run the scan's body once, as NumPyro's scan would run it at this time.

    Args:
        call: arguments of the scan.
        rng_key: random key of the body's own draws.
        carry: carry that the body takes.
        inputs: inputs of the time.
        latent_value: value of the latent site; None for zeros.

    Returns:
        (sites of the run, (next carry, output of the body)).

    Raises:
        ValueError: the body contains a scan, an observed value does not fit its distribution, or a handler around the
            scan is neither `handlers.condition` nor `handlers.substitute`.
    """
    body = handlers.seed(call.body, rng_key)
    for kind, values in call.substitutions:
        # Handlers around the scan hold values of all times; NumPyro's own function takes the slice of this time.
        at_time = partial(_subs_wrapper, values, inputs.step, call.length)
        if kind == "condition":
            body = handlers.condition(body, condition_fn=at_time)
        elif kind == "substitute":
            body = handlers.substitute(body, substitute_fn=at_time)
        else:
            raise ValueError(f"a filter cannot run a scan inside handlers.{kind}; use handlers.condition instead.")
    recorder = _BodyRecorder(latent_value)
    with handlers.block(), recorder:
        new_carry, output = body(carry, inputs.xs)
    sites = BodySites(recorder.latent, recorder.observed, recorder.scaled, recorder.deterministic, new_carry)
    return sites, (new_carry, output)
