"""A NumPyro program taken apart at its scan.

`numpyro.contrib.control_flow.scan` sends a message of type "control_flow" with the body, the carry and the inputs
through the handler stack: a messenger that takes it finds everything, in an unchanged program. What the parts mean to a
filter is for `state_space`.
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
    """What the scan's body is given at one time: the "observation" of the filter kernels.

    Attributes:
        step: position in time, from 0.
        xs: this time's slice of the scan's `xs`, observations included.
    """

    step: Int[Array, ""]
    xs: PyTree


class ScanCall(NamedTuple):
    """The arguments of the program's scan."""

    body: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    init: PyTree
    xs: PyTree
    length: int
    substitutions: list[tuple[str, Any]]

    def first_inputs(self) -> TimeInputs:
        """The inputs of the first step."""
        return TimeInputs(jnp.asarray(0), jax.tree.map(lambda x: x[0], self.xs))


class ObservedSite(NamedTuple):
    """An observed site: its distribution, value, and the power of its likelihood (`handlers.scale`)."""

    fn: dist.Distribution
    value: Array
    power: Array | float


class BodySites(NamedTuple):
    """One run of the scan's body; `scaled` are latent sites under `handlers.scale`."""

    latent: dict[str, dist.Distribution]
    observed: dict[str, ObservedSite]
    scaled: list[str]
    deterministic: dict[str, Array]
    carry: PyTree


class _ReachedScan(Exception):  # noqa: N818 - it is control flow, not an error
    def __init__(self, call: ScanCall) -> None:
        self.call = call


def abstractly(fn: Callable[[], Any]) -> Any:
    """The shapes `fn()` gives, nothing computed; a ValueError comes without JAX's remarks on tracebacks."""
    problems: list[ValueError] = []

    def caught() -> Any:
        try:
            return fn()
        except ValueError as error:
            problems.append(error)
            return None

    shapes = jax.eval_shape(caught)
    if problems:
        raise problems[0]
    return shapes


def _scan_call(msg: dict[str, Any]) -> ScanCall:
    body, init, xs, length, reverse = msg["args"]
    if reverse:
        raise ValueError(
            "the program scans with reverse=True; a filter runs forward in time: reverse the data instead."
        )
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(xs)} | ({(length,)} if length is not None else set())
    if not lengths:
        raise ValueError("the program's scan has neither xs nor length; give it length=number of time steps.")
    if len(lengths) > 1 or () in lengths:
        raise ValueError(
            f"the program's scan runs over inputs of the lengths {sorted(lengths)}; "
            "give all of them one leading time axis."
        )
    ((length,),) = lengths
    return ScanCall(body, jax.tree.map(jnp.asarray, init), xs, length, list(msg["kwargs"]["substitute_stack"]))


class _StopAtScan(Messenger):
    """Unwinds the program when it reaches its scan."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "control_flow":
            raise _ReachedScan(_scan_call(msg))


def run_to_scan(program: Callable[[], Any], rng_key: PRNGKeyArray) -> ScanCall | None:
    """Run a program up to its scan, and no further; None where it has none."""
    try:
        with _StopAtScan(), handlers.seed(rng_seed=rng_key):
            program()
    except _ReachedScan as reached:
        return reached.call
    return None


class SkipScan(Messenger):
    """Replaces the scan by a result of the right shape, and records which sites come before and after it.

    Args:
        mark: (site, drawn value) -> value, for latent sites before the scan that no other handler gives a value.
    """

    def __init__(self, mark: Callable[[str, Array], Array] = lambda name, value: value) -> None:
        super().__init__()
        self.mark = mark
        self.scans: list[ScanCall] = []
        self.before: dict[str, dict[str, Any]] = {}
        self.after: list[str] = []
        self.given: set[str] = set()

    def process_message(self, msg: dict[str, Any]) -> None:
        """Before the message's own effect."""
        if msg["type"] == "sample" and msg["value"] is not None and not msg["is_observed"]:
            self.given.add(msg["name"])  # by handlers.substitute: known, though not observed
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
        """After it."""
        if msg["type"] == "sample":
            if self.scans:
                self.after.append(msg["name"])
            else:
                if not msg["is_observed"] and msg["name"] not in self.given:
                    msg["value"] = self.mark(msg["name"], msg["value"])
                self.before[msg["name"]] = msg.copy()


class _BodyRecorder(Messenger):
    """Records the sites of one run of the body; gives the latent site a value."""

    def __init__(self, latent_value: Array | None) -> None:
        super().__init__()
        self.latent_value = latent_value
        self.latent: dict[str, dist.Distribution] = {}
        self.observed: dict[str, ObservedSite] = {}
        self.scaled: list[str] = []
        self.deterministic: dict[str, Array] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "control_flow":
            raise ValueError("the program has a scan inside the body of its scan; a filter needs one scan over time.")
        if msg["type"] != "sample":
            return
        if msg["is_observed"]:
            shape, value = msg["fn"].shape(), jnp.asarray(msg["value"])
            pairs = zip(value.shape[::-1], shape[::-1], strict=False)
            if value.ndim > len(shape) or any(got not in (1, expected) for got, expected in pairs):
                raise ValueError(
                    f"site '{msg['name']}' observes an array of shape {value.shape}, but its distribution has the "
                    f"shape {shape}; make the observation and what it is compared with the same size."
                )
            power = 1.0 if msg["scale"] is None else msg["scale"]
            self.observed[msg["name"]] = ObservedSite(msg["fn"], jnp.broadcast_to(value, shape), power)
        else:
            self.latent[msg["name"]] = msg["fn"]
            # A placeholder, where no value is given: what depends on it is not looked at.
            msg["value"] = jnp.zeros(msg["fn"].shape()) if self.latent_value is None else self.latent_value
            if msg["scale"] is not None:
                self.scaled.append(msg["name"])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "deterministic":
            self.deterministic[msg["name"]] = msg["value"]


def _check_carry(before: PyTree, after: PyTree) -> None:
    """Refuse a body whose carry changes its structure or shapes."""
    shapes = [jax.tree.map(jnp.shape, before), jax.tree.map(lambda leaf: leaf.shape, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the body of the scan is given a carry of shapes {shapes[0]} and returns {shapes[1]}; "
            "return the next state in the form that the first one has."
        )


def run_body(
    call: ScanCall, rng_key: PRNGKeyArray, carry: PyTree, inputs: TimeInputs, latent_value: Array | None = None
) -> tuple[BodySites, tuple[PyTree, PyTree]]:
    """One run of the body, as NumPyro's scan would run it at this time; returns (sites, (carry, output))."""
    body = handlers.seed(call.body, rng_key)
    for kind, values in call.substitutions:
        # Values given to whole series (handlers.condition, .substitute) are cut to this time by NumPyro's own rule.
        at_time = partial(_subs_wrapper, values, inputs.step, call.length)
        if kind == "condition":
            body = handlers.condition(body, condition_fn=at_time)
        elif kind == "substitute":
            body = handlers.substitute(body, substitute_fn=at_time)
        else:
            raise ValueError(f"handlers.{kind} around a scan cannot be filtered; use handlers.condition.")
    recorder = _BodyRecorder(latent_value)
    with handlers.block(), recorder:
        new_carry, output = body(carry, inputs.xs)
    sites = BodySites(recorder.latent, recorder.observed, recorder.scaled, recorder.deterministic, new_carry)
    return sites, (new_carry, output)
