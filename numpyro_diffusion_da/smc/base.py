"""Parts that all filters share: state, info, tempering, resampling, mapping over particles, and the BlackJAX API."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from numpyro_diffusion_da.arguments import require_fraction, require_number
from numpyro_diffusion_da.smc.rows import are_rows_apart, map_rows
from numpyro_diffusion_da.smc.sharding import num_devices, take_ancestors, traffic_of, whole

if TYPE_CHECKING:
    from blackjax.base import SamplingAlgorithm

Arguments = ParamSpec("Arguments")

Resampling = Callable[[PRNGKeyArray, Float[Array, " n"], int], Int[Array, " n"]]
"""Resampling function (rng_key, normalized weights, number) -> ancestors, as in `blackjax.smc.resampling`."""

Kernel = Callable[[PRNGKeyArray, Any, Any], tuple[Any, Any]]
"""One step of a filter: (rng_key, state, observation) -> (state, info)."""


class State(NamedTuple):
    """State of a filter: all that the next step needs.

    Attributes:
        particles: particles, a pytree with a leading axis of N.
        log_evidence: estimate of log p(y_{1:k}) for the k observations so far.
        log_weights: log-weights of the particles, shape (N,), with weights of mean 1; () if all are equal, as with
            every filter that resamples at each step.
        past: last L states on the line of each particle, shape (N, L, ...); () for a filter that keeps none. The
            kernels of `smc` keep none: a filter of a program that does makes them a part of its particles.
    """

    particles: PyTree
    log_evidence: Float[Array, ""]
    log_weights: Any = ()
    past: Any = ()


class Info(NamedTuple):
    """Diagnostics of one step. With localized resampling, weight diagnostics have a trailing block axis.

    Attributes:
        log_weights: log-weights before tempering, by the particle before resampling, shape (N,). A non-finite weight is
            given as -inf.
        ancestors: index of each new particle's ancestor, shape (N,).
        ess: effective sample size of the weights before tempering.
        tempering: exponent alpha in (0, 1]. The module `smc.tempering` defines what it acts on.
        log_evidence_increment: log mean exp(log w), or 0 with localized resampling. Its exponential is an unbiased
            estimate of p(y_k | y_{1:k-1}) only for exact weights and alpha = 1.
        distinct_ancestors: number of different ancestors.
        log_weight_std: standard deviation of the finite log-weights. Weights collapse near sqrt(2 log N).
        nonfinite_weights: number of particles whose log-weight was not finite.
        nonfinite_particles: number of new particles that hold a non-finite value.
        weighing: records of the weight function, by the particle before resampling, leading axis N.
        proposal: records of the draw, by the new particle, leading axis N.
        forecast: records of the forecasts drawn for inflation, by the particle before resampling; () if there are none.
        check: record of a check of the observations before the step, one for all particles; () if there was none.
        background: record of the prediction of the observations before the step, one for all particles; () if the
            kernel makes none.
        move: record of the moves of the ancestors; () if there were none.
        resampled: whether the particles of the state were resampled; () for a filter that resamples at each step. If
            they were not, `ancestors` are those of the draws that represent them, and of the records of these draws.
        traffic: `Traffic` between devices, if the particles are sharded over a mesh; () if they are not.
        solver_residual: relative residual of the linear solve of an ensemble update; () if there is none.
    """

    log_weights: Float[Array, " n"]
    ancestors: Int[Array, " n"]
    ess: Float[Array, ""]
    tempering: Float[Array, ""]
    log_evidence_increment: Float[Array, ""]
    distinct_ancestors: Int[Array, ""]
    log_weight_std: Float[Array, ""]
    nonfinite_weights: Int[Array, ""]
    nonfinite_particles: Int[Array, ""]
    weighing: PyTree
    proposal: PyTree
    forecast: PyTree = ()
    check: PyTree = ()
    background: PyTree = ()
    move: PyTree = ()
    resampled: PyTree = ()
    traffic: PyTree = ()
    solver_residual: PyTree = ()


def load_blackjax() -> None:
    """Import BlackJAX outside any JAX trace: its modules compute values at import, which must not belong to a trace."""
    with jax.ensure_compile_time_eval():
        import blackjax  # noqa: F401


def init(particles: PyTree, resample_below: float = 1.0) -> State:
    """State before the first observation, from N equally weighted initial particles (leading axis N).

    Args:
        particles: initial particles.
        resample_below: that of the kernel, if it has one; below 1 the state holds weights.
    """
    log_weights = jnp.zeros(total_particles(particles)) if resample_below < 1.0 else ()
    return State(particles, jnp.zeros(()), log_weights)


def num_particles(particles: PyTree) -> int:
    """Number of particles, the length of the leading axis of all arrays.

    Raises:
        ValueError: there are no arrays, or their leading axes differ.
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(particles)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(f"particles have leading axes {sorted(lengths)}; give a pytree with one leading axis of N.")
    return int(lengths.pop()[0])


def total_particles(particles: PyTree) -> int:
    """Number N of particles on all devices, from those of this device.

    Args:
        particles: particles, the length of whose leading axis is N without a mesh and N / D on each of its D devices.
    """
    return num_particles(particles) * num_devices()


def particle_keys(rng_key: PRNGKeyArray, n: int) -> Key[Array, " n"]:
    """Random key fold_in(rng_key, i) of each particle i, shape (n,).

    The draw of a particle then depends neither on batching nor on the other particles.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(rng_key, jnp.arange(n))


def map_particles(fn: Callable[..., Any], batch_size: int | None = None) -> Callable[..., Any]:
    """Map a function of one particle over the leading axis of its arguments.

    Args:
        fn: a function of one particle.
        batch_size: number of particles mapped at a time, which bounds the memory; None maps all at once. Inside
            `rows.rows_apart` it has no effect, because whoever makes the map then makes the batches.

    Returns:
        Function of the same arguments, each with a leading axis of particles.
    """
    if are_rows_apart():
        return functools.partial(map_rows, fn)
    load_blackjax()
    from blackjax.smc.base import map_kernel

    return jax.vmap(fn) if batch_size is None else _without_empty_leaves(fn, lambda f: map_kernel(f, batch_size))


def _without_empty_leaves(fn: Callable[..., Any], mapped: Callable[..., Any]) -> Callable[..., Any]:
    """Map a function of one particle by `mapped`, which gets no empty array: JAX cannot divide one in batches.

    Args:
        fn: a function of one particle.
        mapped: map of a function of one particle over the leading axis of its arguments, which are not empty.
    """

    def over_particles(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        outputs: list[Any] = []

        def of_one(*full: Array) -> list[Array]:
            rest = iter(full)
            whole = [next(rest) if x.size else jnp.zeros(x.shape[1:], x.dtype) for x in leaves]
            out = fn(*jax.tree.unflatten(structure, whole))
            outputs.append(jax.tree.map(jax.typeof, out))
            return [x for x in jax.tree.leaves(out) if jnp.size(x)]

        found = iter(mapped(of_one)(*(x for x in leaves if x.size)))
        n = len(leaves[0])
        return jax.tree.map(lambda x: next(found) if x.size else jnp.zeros((n, *x.shape), x.dtype), outputs[-1])

    return over_particles


def relative_to_highest(log_weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """Log-weights minus the highest of them; -inf where not finite.

    Many observations give log-weights of 1e5 and more. In float32, quantities computed from them (2 log w, alpha log w)
    lose the differences between particles, and selection depends on these differences alone.
    """
    finite = jnp.isfinite(log_weights)
    highest = jnp.max(jnp.where(finite, log_weights, -jnp.inf))
    return jnp.where(finite, log_weights - jnp.where(jnp.isfinite(highest), highest, 0.0), -jnp.inf)


def tempering_exponent(log_weights: Float[Array, " n"], target_ess: float) -> Float[Array, ""]:
    """Largest alpha in (0, 1] with ESS(alpha log w) >= target_ess N, by bisection on log alpha.

    Log-weights of the type `Dirac` are linear in 1/R. For these, the exponent alpha is the tempering R -> R / alpha of
    the published filter (Savary et al. 2026, Sec. 3) at no extra cost.

    Args:
        log_weights: log-weights, shape (N,); -inf for particles that cannot be selected.
        target_ess: effective sample size to reach, as a fraction of N; 0 for no tempering.
    """
    finite = jnp.isfinite(log_weights)
    shifted = relative_to_highest(log_weights)
    spread = -jnp.min(jnp.where(finite, shifted, 0.0))
    return largest_alpha(lambda alpha: alpha * shifted, finite, spread, target_ess)


def largest_alpha(
    log_weights_at: Callable[[Float[Array, ""]], Float[Array, " n"]],
    finite: Bool[Array, " n"],
    spread: Float[Array, ""],
    target_ess: float,
) -> Float[Array, ""]:
    """Tempering exponent alpha in (0, 1] at which the ESS is target_ess N, by bisection on log alpha.

    It is 1 if the ESS at 1 exceeds the target. If the ESS is not monotone in alpha, there may be several solutions, and
    one of them is returned.

    Args:
        log_weights_at: function from alpha to log-weights, shape (N,), the highest of which is not far from 0.
        finite: which particles can be selected.
        spread: upper bound: log-weights at alpha differ by at most alpha times this value.
        target_ess: effective sample size to reach, as a fraction of N; 0 for no tempering.
    """
    load_blackjax()
    from blackjax.smc.ess import log_ess
    from blackjax.smc.solver import dichotomy

    if target_ess == 0.0:
        return jnp.ones((), spread.dtype)
    # As alpha -> 0 the ESS tends to the number of finite weights, so the target must lie below that number.
    target = jnp.minimum(target_ess * len(finite), 0.999 * jnp.maximum(jnp.sum(finite), 1))

    def excess(log_alpha: Array) -> Array:
        return log_ess(jnp.where(finite, log_weights_at(jnp.exp(log_alpha)), -jnp.inf)) - jnp.log(target)

    # The bisection returns the lower end of its bracket. The ESS there is at least the target, as it is at this start.
    lowest = jnp.log(1e-3 / (1e-3 + spread))
    alpha = jnp.exp(dichotomy(excess, lowest, jnp.zeros_like(lowest)))
    return jnp.where(jnp.isfinite(alpha), alpha, 1.0)


def guarded(resampling_fn: Resampling | None) -> Resampling:
    """Resampling function that never selects a particle of zero weight.

    In float32 a cumulative sum of weights can end below 1. A search in it can then end at a particle of zero weight.

    Args:
        resampling_fn: resampling function to guard; None for systematic resampling.
    """
    load_blackjax()
    from blackjax.smc.resampling import systematic

    draw = systematic if resampling_fn is None else resampling_fn

    def resample(rng_key: PRNGKeyArray, weights: Array, number: int) -> Array:
        chosen = draw(rng_key, weights, number)
        positive = weights > 0
        last_positive = jax.lax.cummax(jnp.where(positive, jnp.arange(len(weights)), -1))
        before = last_positive[chosen]
        return jnp.where(before >= 0, before, jnp.argmax(positive))

    return resample


def select(
    rng_key: PRNGKeyArray, log_weights: Float[Array, " n"], resampling_fn: Resampling | None, target_ess: float
) -> tuple[Int[Array, " n"], Float[Array, ""]]:
    """Temper the weights, then resample.

    Returns:
        (ancestors, tempering exponent alpha). If all weights are equal, every particle is its own ancestor.
    """
    alpha = tempering_exponent(log_weights, target_ess)
    return resampled(rng_key, alpha * relative_to_highest(log_weights), resampling_fn), alpha


def resampled(
    rng_key: PRNGKeyArray, tempered: Float[Array, " n"], resampling_fn: Resampling | None
) -> Int[Array, " n"]:
    """Ancestors drawn by tempered log-weights.

    Every particle is its own ancestor if the log-weights are all equal or none is finite.
    """
    n = len(tempered)
    usable = jnp.any(jnp.isfinite(tempered))
    weights = jax.nn.softmax(jnp.where(usable, tempered, 0.0))
    chosen = guarded(resampling_fn)(rng_key, weights, n)
    equal = jnp.all(tempered == tempered[0])
    return jnp.where(equal | ~usable, jnp.arange(n), chosen)


def finite_leaves(particle: PyTree) -> Bool[Array, ""]:
    """Whether every floating-point value of one particle is finite."""
    leaves = [x for x in jax.tree.leaves(particle) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])) if leaves else jnp.asarray(True)


def make_info(
    log_weights: Float[Array, " n"] | Float[Array, "n b"],
    ancestors: Int[Array, " n"] | Int[Array, "n b"],
    tempering: Float[Array, ""] | Float[Array, " b"],
    particles: PyTree,
    weighing: PyTree,
    proposal: PyTree,
    forecast: PyTree = (),
    traffic: PyTree = (),
) -> Info:
    """Diagnostics of a step.

    Args:
        log_weights: log-weights before tempering, shape (N,), or (N, b) for b blocks; -inf where not finite.
        ancestors: index of each new particle's ancestor, of the same shape.
        tempering: exponent alpha, or one for each block.
        particles: new particles, leading axis N; on a mesh those of this device, and so the records.
        weighing: records of the weight function.
        proposal: records of the draw.
        forecast: records of the forecasts drawn for inflation; () if there are none.
        traffic: what resampling moved between devices; () without a mesh.

    Returns:
        The diagnostics. The weights of blocks do not estimate the evidence, so its increment is then 0.
    """
    local = log_weights.ndim > 1
    per_block = jax.vmap(_weight_diagnostics, in_axes=1, out_axes=0) if local else _weight_diagnostics
    ess, increment, distinct, spread, nonfinite = per_block(log_weights, ancestors)
    return Info(
        log_weights=log_weights,
        ancestors=ancestors,
        ess=ess,
        tempering=tempering,
        log_evidence_increment=jnp.zeros(()) if local else increment,
        distinct_ancestors=distinct,
        log_weight_std=spread,
        nonfinite_weights=jnp.max(nonfinite) if local else nonfinite,
        nonfinite_particles=jnp.sum(~whole(map_particles(finite_leaves)(particles))),
        weighing=weighing,
        proposal=proposal,
        forecast=forecast,
        traffic=traffic,
    )


def _weight_diagnostics(
    log_weights: Float[Array, " n"], ancestors: Int[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, ""], Int[Array, ""], Float[Array, ""], Int[Array, ""]]:
    """Diagnostics of one set of weights.

    Returns:
        (ESS, log mean weight, number of distinct ancestors, standard deviation of the finite log-weights, number of
        log-weights that are not finite).
    """
    load_blackjax()
    from blackjax.smc.ess import ess

    n = len(log_weights)
    finite = jnp.isfinite(log_weights)
    usable = jnp.any(finite)
    count = jnp.maximum(jnp.sum(finite), 1)
    mean = jnp.sum(jnp.where(finite, log_weights, 0.0)) / count
    variance = jnp.sum(jnp.where(finite, (log_weights - mean) ** 2, 0.0)) / count
    return (
        jnp.where(usable, ess(jnp.where(usable, relative_to_highest(log_weights), 0.0)), 0.0),
        jax.nn.logsumexp(log_weights) - jnp.log(n),
        jnp.sum(jnp.bincount(ancestors, length=n) > 0),
        jnp.sqrt(variance),
        n - jnp.sum(finite),
    )


def check_target_ess(target_ess: Any, owner: str) -> float:
    """Return a target of the effective sample size as a Python number, after a check that it is a fraction.

    A NumPy number would be traced to other operations, and so be another run.

    Args:
        target_ess: the argument.
        owner: name of the filter or kernel that got it.

    Raises:
        TypeError: `target_ess` is not a number.
        ValueError: `target_ess` is outside [0, 1).
    """
    advice = (
        "give a fraction of the particles from 0 (no tempering) to below 1: 0.2 is an ESS of 51 among 256 particles."
    )
    return require_fraction(target_ess, owner, "target_ess", advice)


def check_resample_below(resample_below: Any, target_ess: float, owner: str) -> float:
    """Return the effective sample size below which particles are resampled as a Python number, after a check.

    Args:
        resample_below: the argument, a fraction of the particles from 0 to 1.
        target_ess: target of the tempering.
        owner: name of the filter or kernel that got it.

    Raises:
        TypeError: `resample_below` is not a number.
        ValueError: it is outside [0, 1], or below 1 with tempering.
    """
    advice = "give a fraction of the particles from 0 to 1; 1 resamples at every step."
    below = require_number(resample_below, owner, "resample_below", advice, least=0.0, most=1.0)
    if below < 1.0 and target_ess > 0.0:
        raise ValueError(
            f"{owner} got resample_below={below:g} and target_ess={target_ess:g}; carry weights on or temper them, not "
            "both: leave one of the two out."
        )
    return below


def represented(rng_key: PRNGKeyArray, state: State) -> tuple[PyTree, PyTree]:
    """Equally weighted particles of a state: its own, or resampled ones if it holds weights.

    Args:
        rng_key: random key of the resampling.
        state: state of a filter.

    Returns:
        (particles, `Traffic` of the resampling; () if there is none).
    """
    if isinstance(state.log_weights, tuple):
        return state.particles, ()
    chosen = resampled(rng_key, relative_to_highest(state.log_weights), None)
    return take_ancestors(state.particles, chosen), traffic_of(state.particles, chosen)


def top_level_api(build_kernel: Callable[Arguments, Kernel]) -> Callable[Arguments, SamplingAlgorithm]:
    """Make the function `as_top_level_api` of a kernel module from its `build_kernel`.

    Args:
        build_kernel: function that builds the kernel of a filter, with a docstring in sections.

    Returns:
        Function with the arguments of `build_kernel` that returns the filter as a `blackjax.base.SamplingAlgorithm`:
        ``init(particles)`` and ``step(rng_key, state, observation)``. Its signature and docstring name the arguments.
    """

    @functools.wraps(build_kernel)
    def as_top_level_api(*args: Arguments.args, **kwargs: Arguments.kwargs) -> SamplingAlgorithm:
        load_blackjax()
        from blackjax.base import SamplingAlgorithm

        return SamplingAlgorithm(init, build_kernel(*args, **kwargs))

    sections = {text.split("\n")[0]: text for text in (inspect.getdoc(build_kernel) or "").split("\n\n")}
    returns = "Returns:\n    ``SamplingAlgorithm(init, step)`` with ``init(particles)`` and the kernel as ``step``."
    summary = "Build the filter as a `blackjax.base.SamplingAlgorithm`."
    as_top_level_api.__doc__ = "\n\n".join(
        part for part in (summary, sections.get("Args:"), returns, sections.get("Raises:")) if part
    )
    as_top_level_api.__name__ = as_top_level_api.__qualname__ = "as_top_level_api"
    as_top_level_api.__annotations__ = {**build_kernel.__annotations__, "return": Any}
    signature = inspect.signature(build_kernel).replace(return_annotation="blackjax.base.SamplingAlgorithm")
    as_top_level_api.__dict__["__signature__"] = signature
    return as_top_level_api
