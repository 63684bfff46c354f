"""Fuzzed input: a right result, or one sentence of this library that names the argument, site, file or step.

`python -m pytest tests/test_fuzz.py -m slow -s` prints how many examples each family had, and how they ended.
`fuzzing.py` says how to draw more.
"""

import collections
import json
import linecache
import math
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas
import pytest
import xarray
from fuzzing import fuzz
from hypothesis import assume, given
from hypothesis import strategies as st
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy import special, stats

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da import diagnostics, diffusion, fields, inference, observation, results, smc, transition
from numpyro_diffusion_da.arguments import require_key
from numpyro_diffusion_da.priors import parametrization, read_stored, write_stored
from numpyro_diffusion_da.program import StateSpaceModel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LIBRARY = str(Path(ndda.__file__).parent)
COUNTS = collections.defaultdict(collections.Counter)


@pytest.fixture(scope="module", autouse=True)
def counts():
    yield
    if COUNTS:
        rows = [(family, sum(n.values()), n["right"], n["refused"]) for family, n in COUNTS.items()]
        rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
        print(f"\n{'family':24}{'examples':>10}{'right':>10}{'refused':>10}", file=sys.stderr)
        for family, *numbers in rows:
            print(f"{family:24}" + "".join(f"{n:10}" for n in numbers), file=sys.stderr)


def complaint(error, names):
    """What is wrong with the refusal of an input; None if it is one sentence of this library with one of the names."""
    last, text = traceback.extract_tb(error.__traceback__)[-1], str(error)
    here = f"{last.filename}:{last.lineno}: {type(error).__name__}: {text}"
    if not last.filename.startswith(LIBRARY) or "raise" not in linecache.getline(last.filename, last.lineno):
        return f"not raised by this library: {here}"
    if not isinstance(error, (ValueError, TypeError, FloatingPointError, RuntimeError, OSError)):
        return f"of another kind: {here}"
    if "\n" in text or not text.endswith((".", ".'", '."')) or len(text) > 700:
        return f"not one sentence: {here}"
    return None if any(name in text for name in names) else f"names none of {names}: {here}"


def outcome(family, call, names):
    """Result of `call`, or None if it refuses its input in one sentence."""
    try:
        found = call()
    except Exception as error:
        wrong = complaint(error, names)
        assert wrong is None, wrong
        COUNTS[family]["refused"] += 1
        return None
    COUNTS[family]["right"] += 1  # the test fails if it is not
    return found


# --- settings: accepted exactly where an independent rule says so ----------------------------------------------------


def model(y):
    """A program that is never run: settings are checked before."""


BASE = ndda.Bootstrap(model)
RING, ODD = ndda.Ring(40), {"y": np.arange(4)}
KEY = jax.random.key(0)


def is_real(value):
    if isinstance(value, (bool, np.bool_)) or value is np.ma.masked:
        return False
    if isinstance(value, (np.ndarray, jax.Array)):
        return value.ndim == 0 and getattr(value.dtype, "kind", "key") in "iuf"
    return isinstance(value, (int, float, np.number)) and not isinstance(value, np.complexfloating)


def real(low, high, *, open_low=False, open_high=False, infinite=False):
    def rule(value):
        if not is_real(value):
            return False
        try:
            value = float(value)
        except OverflowError:
            return False
        inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
        return inside and (infinite or math.isfinite(value))

    return rule


def whole(least, most=2**31 - 1):
    return lambda value: isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value <= most


def either(rule):
    return lambda value: value is None or rule(value)


def by_name(rule):
    return lambda value: set(value) == {"y"} and rule(value["y"]) if isinstance(value, dict) else rule(value)


def flag(value):
    return isinstance(value, (bool, np.bool_))


def nothing(value):
    return value is None


def never(value):
    return False


POSITIVE = real(0, math.inf, open_low=True)
FRACTION = real(0, 1, open_high=True)
INF = math.inf


def each(owner, make, fixed, **rules):
    return {f"{owner}.{name}": (lambda v, n=name: make(**{**fixed, n: v}), rule) for name, rule in rules.items()}


def tune(**changed):
    given = {"between": (0.0, 1.0), "num_particles": 4, **changed}
    return inference.tune_spread(lambda amount: ndda.EnKF(model, inflation=(ndda.RTPS(amount),)), KEY, **given)


SETTINGS = {
    **each(
        "Filter",
        lambda **k: ndda.Filter(BASE, **k),
        {"num_particles": 4},
        num_particles=whole(1),
        num_chains=whole(1),
        batch_size=either(whole(1, INF)),
        progress_bar=flag,
        keep_observed=flag,
        keep_forecasts=flag,
    ),
    **each(
        "OnlineFilter",
        lambda **k: ndda.OnlineFilter(BASE, **k),
        {"num_particles": 4},
        num_particles=whole(1),
        batch_size=either(whole(1, INF)),
    ),
    **each(
        "PMMH",
        lambda **k: ndda.PMMH(BASE, **k),
        {"num_particles": 4, "num_warmup": 1, "num_samples": 1},
        num_particles=whole(1),
        num_warmup=whole(0),
        num_samples=whole(1),
        num_chains=whole(1),
        batch_size=either(whole(1, INF)),
    ),
    **each(
        "SMC2",
        lambda **k: ndda.SMC2(BASE, **k),
        {"num_particles": 4, "num_parameter_particles": 4},
        num_parameter_particles=whole(1),
        num_moves=whole(1),
        target_ess=real(0, 1),
    ),
    **each(
        "FAAPF",
        lambda **k: ndda.FAAPF(model, **k),
        {"taper": ndda.Taper(2.0, RING, ODD)},
        target_ess=either(FRACTION),
        move=either(flag),
        block_radius=real(0, INF),
        weight=nothing,
        guidance=never,
        sampler=nothing,
        tempering=never,
    ),
    **each(
        "Bootstrap",
        lambda **k: ndda.Bootstrap(model, **k),
        {},
        target_ess=FRACTION,
        resample_below=real(0, 1),
        sampler=nothing,
    ),
    **each("GuidedPF", lambda **k: ndda.GuidedPF(model, **k), {}, target_ess=FRACTION, resample_below=real(0, 1)),
    **each("EnKF", lambda **k: ndda.EnKF(model, **k), {}, update=never, taper=nothing, transition_covariance=flag),
    **each(
        "KalmanMove",
        ndda.KalmanMove,
        {},
        selection_share=either(real(0, 1)),
        radius=either(by_name(real(0, INF, open_low=True, infinite=True))),
        noise_level=either(POSITIVE),
        most_products=whole(0),
    ),
    **each(
        "GrossErrorCheck",
        lambda **k: ndda.GrossErrorCheck(BASE, **k),
        {},
        threshold=by_name(real(0, INF, open_low=True, infinite=True)),
        members=whole(2),
    ),
    **each("RTPS", smc.RTPS, {}, alpha=real(0, 1)),
    **each("RTPP", smc.RTPP, {}, alpha=real(0, 1)),
    **each("Multiplicative", smc.Multiplicative, {}, factor=real(1, INF)),
    **each("ForecastMultiplicative", smc.ForecastMultiplicative, {}, factor=real(1, INF)),
    **each(
        "Taper",
        ndda.Taper,
        {"radius": 2.0, "distance": RING, "observations": ODD},
        radius=by_name(real(0, INF, open_low=True, infinite=True)),
        distance=never,
    ),
    **each("Ring", ndda.Ring, {}, length=POSITIVE),
    **each("GreatCircle", ndda.GreatCircle, {}, sphere_radius=POSITIVE),
    **each("WithHeight", smc.WithHeight, {"horizontal": RING}, scale=POSITIVE),
    **each("Moment", transition.Moment, {}, noise_level=either(POSITIVE), probes=either(whole(1))),
    **each(
        "tune_spread",
        tune,
        {},
        between=never,
        num_particles=never,
        tolerance=never,
        max_runs=never,
        discard=never,
        batch_size=never,
        block=never,
    ),
    **each(
        "Swath",
        observation.Swath,
        {"errors": {"a": 1.0}},
        width=real(0, 360, open_low=True),
        advance=real(-INF, INF),
        thinning=whole(1),
        errors=lambda v: isinstance(v, dict) and by_name(POSITIVE)(v),
    ),
    **each("Stations", observation.Stations, {"errors": {"a": 1.0}}, count=either(whole(1)), seed=whole(0)),
    **each("BlockMeans", observation.BlockMeans, {"errors": {"a": 1.0}}, size=whole(1)),
    **each(
        "KarrasSchedule",
        diffusion.KarrasSchedule,
        {},
        num_levels=whole(2),
        rho=POSITIVE,
        lowest=either(POSITIVE),
        highest=either(POSITIVE),
    ),
    **each("GeometricSchedule", diffusion.GeometricSchedule, {}, factor=real(1, INF, open_low=True)),
    **each(
        "Churn",
        diffusion.Churn,
        {},
        rate=real(0, INF),
        lowest=real(0, INF),
        highest=real(0, INF, infinite=True),
        noise_scale=real(0, INF),
    ),
    **each(
        "LangevinCorrector",
        diffusion.LangevinCorrector,
        {},
        steps=whole(1),
        tau=real(0, 1, open_low=True, open_high=True),
    ),
    **each("DDIM", diffusion.DDIM, {}, eta=real(0, 1)),
    **each("AdamsBashforth", diffusion.AdamsBashforth, {}, order=whole(1, 4)),
    **each("DPS", diffusion.DPS, {}, zeta=either(POSITIVE)),
    **each("JFPS", diffusion.JFPS, {}, solver=never),
    **each("Piecewise", diffusion.Piecewise, {"guidance": (), "levels": (1.0,)}, guidance=never),
    **each(
        "KrylovSolve",
        diffusion.KrylovSolve,
        {},
        products=either(whole(1)),
        warm_start=flag,
        tolerance=POSITIVE,
        max_products=whole(1),
    ),
    **each("Hutchinson", diffusion.Hutchinson, {"rng_key": KEY}, probes=whole(1)),
    **each("ProbabilityFlow", diffusion.ProbabilityFlow, {}, num_levels=whole(2), trace=never),
    **each("Sampler", ndda.Sampler, {}, step=never, schedule=never, churn=nothing, corrector=nothing),
    **each("ProbabilityFlow levels", diffusion.ProbabilityFlow, {}, lowest=either(POSITIVE), highest=either(POSITIVE)),
    **each(
        "Preconditioned", parametrization.Preconditioned, {"sigma_data": 1.0}, sigma_data=POSITIVE, noise_index=never
    ),
    **each("LogLevel", parametrization.LogLevel, {}, factor=lambda v: real(-INF, INF)(v) and float(v) != 0),
    **each(
        "LinearBeta",
        parametrization.LinearBeta,
        {},
        beta_min=real(0, 20, open_low=True, open_high=True),
        beta_max=real(0.1, INF, open_low=True),
    ),
    **each("FlowMatching", parametrization.FlowMatching, {}, data_at=whole(0, 1)),
    **each("load_prior", ndda.load_prior, {"name": "lorenz96"}, name=never),
    **each("Variable", ndda.Variable, {"name": "a"}, name=lambda v: isinstance(v, str) and v != ""),
}
ODDITIES = [
    *(0, 1, -1, 2, 2.5, 0.5, -0.5, math.nan, INF, -INF, None, True, False, "many", "", b"x", 1j, 1e30, 1e-30, 10**400),
    *(np.float32(0.5), np.float64("nan"), np.int64(3), np.int32(0), np.uint8(2), np.bool_(True), np.ma.masked),
    *(np.array(0.5), np.array(3), np.array([1.0, 2.0]), np.array([]), np.array(["a"]), np.array([1], object)),
    *(jnp.asarray(0.5), jnp.asarray(3), jnp.asarray(jnp.nan), jax.random.key(1), np.datetime64("2020-01-01")),
    *([1], (1, 2), (1.0, 0.1), (math.nan, 1.0), [None], ["a"], [1, "a"], [[1], [1, 2]], {}, {"y": 1.0}, {"y": "a"}),
    *({"y": math.nan}, {1: 2.0}, {"y": None}, object(), slice(1), int, abs),
]
VALUES = st.sampled_from(ODDITIES) | st.floats() | st.integers() | st.text(max_size=3) | st.none()


def settings_hold(name, value):
    make, rule = SETTINGS[name]
    argument = name.split(".")[1]
    assume(not (name.startswith("tune_spread") and rules_of_tune(argument, value)))
    found = outcome("settings", lambda: make(value), (argument, repr(value)))
    assert (found is not None) == bool(rule(value)), f"{name}={value!r} was {'accepted' if found else 'refused'}"


def rules_of_tune(argument, value):
    """Whether `tune_spread` would take the setting, and then run the filter."""
    least = {"num_particles": 1, "max_runs": 2, "discard": 0, "block": 1}
    if argument == "batch_size":
        return either(whole(1, INF))(value)
    if argument == "between":
        return isinstance(value, tuple) and value == (1, 2)
    return POSITIVE(value) if argument == "tolerance" else whole(least[argument])(value)


@fuzz(75)
@given(st.sampled_from(sorted(SETTINGS)), VALUES)
def test_some_settings(name, value):
    settings_hold(name, value)


@pytest.mark.slow
@fuzz(1500)
@given(st.sampled_from(sorted(SETTINGS)), VALUES)
def test_settings(name, value):
    settings_hold(name, value)


# --- programs: log-likelihoods, transitions and carries against NumPy and SciPy --------------------------------------

COUNT, SOME = st.integers(0, 3).map(float), st.floats(-2, 2, width=32)
ABOVE = st.floats(0.125, 4, width=32)
# name: (distribution, values, log-density of SciPy). The error is .5 wherever there is one.
LIKELIHOODS = {
    "Normal": (lambda x: dist.Normal(x, 0.5), SOME, lambda y, x: stats.norm.logpdf(y, x, 0.5)),
    "StudentT": (lambda x: dist.StudentT(4.0, x, 0.5), SOME, lambda y, x: stats.t.logpdf(y, 4, x, 0.5)),
    "Laplace": (lambda x: dist.Laplace(x, 0.5), SOME, lambda y, x: stats.laplace.logpdf(y, x, 0.5)),
    "Cauchy": (lambda x: dist.Cauchy(x, 0.5), SOME, lambda y, x: stats.cauchy.logpdf(y, x, 0.5)),
    "Huber": (lambda x: ndda.Huber(x, 0.5, 1.5), SOME, lambda y, x: huber(y, x)),
    "arctan": (lambda x: dist.Normal(jnp.arctan(x), 0.5), SOME, lambda y, x: stats.norm.logpdf(y, np.arctan(x), 0.5)),
    "scale": (lambda x: dist.Normal(0.0, jnp.exp(x)), SOME, lambda y, x: stats.norm.logpdf(y, 0, np.exp(x))),
    "Uniform": (lambda x: dist.Uniform(x - 1.5, x + 1.5), SOME, lambda y, x: stats.uniform.logpdf(y, x - 1.5, 3.0)),
    "LogNormal": (lambda x: dist.LogNormal(x, 0.5), ABOVE, lambda y, x: stats.lognorm.logpdf(y, 0.5, scale=np.exp(x))),
    "Gamma": (lambda x: dist.Gamma(2.0, jnp.exp(x)), ABOVE, lambda y, x: stats.gamma.logpdf(y, 2, scale=np.exp(-x))),
    "Exponential": (lambda x: dist.Exponential(jnp.exp(x)), ABOVE, lambda y, x: x - y * np.exp(x)),
    "TruncatedNormal": (
        lambda x: dist.TruncatedNormal(x, 0.5, low=0.0),
        ABOVE,
        lambda y, x: stats.norm.logpdf(y, x, 0.5) - stats.norm.logsf(0, x, 0.5),
    ),
    "Poisson": (lambda x: dist.Poisson(jnp.exp(x)), COUNT, lambda y, x: stats.poisson.logpmf(y, np.exp(x))),
    "NegativeBinomial": (
        lambda x: dist.NegativeBinomial2(jnp.exp(x), 2.0),
        COUNT,
        lambda y, x: stats.nbinom.logpmf(y, 2, 2 / (2 + np.exp(x))),
    ),
    "Binomial": (lambda x: dist.Binomial(3, logits=x), COUNT, lambda y, x: stats.binom.logpmf(y, 3, special.expit(x))),
    "Bernoulli": (
        lambda x: dist.Bernoulli(logits=x),
        st.sampled_from([0.0, 1.0]),
        lambda y, x: stats.bernoulli.logpmf(y, special.expit(x)),
    ),
    "Categorical": (
        lambda x: dist.Categorical(logits=jnp.stack([jnp.zeros_like(x), x], -1)),
        st.sampled_from([0.0, 1.0]),
        lambda y, x: stats.bernoulli.logpmf(y, special.expit(x)),
    ),
    "Mixture": (
        lambda x: dist.MixtureSameFamily(
            dist.Categorical(jnp.array([0.25, 0.75])), dist.Normal(jnp.stack([x, x + 1.0], -1), 0.5)
        ),
        SOME,
        lambda y, x: np.logaddexp(
            np.log(0.25) + stats.norm.logpdf(y, x, 0.5), np.log(0.75) + stats.norm.logpdf(y, x + 1, 0.5)
        ),
    ),
}


def huber(y, x, k=1.5):
    r = np.abs(y - x) / 0.5
    total = np.sqrt(2 * np.pi) * (1 - 2 * stats.norm.cdf(-k)) + 2 * np.exp(-(k**2) / 2) / k
    return np.where(r <= k, -(r**2) / 2, -k * r + k**2 / 2) - np.log(0.5 * total)


Named = collections.namedtuple("Named", "x n")
# name: (first carry, state of it, next carry from a new state, what of it is known after some states)
CARRIES = {
    "float": (1.0, lambda c: c, lambda c, x: x),
    "integer": (1, lambda c: c, lambda c, x: x),
    "NumPy float": (np.float64(1.0), lambda c: c, lambda c, x: x),
    "NumPy float32": (np.float32(1.0), lambda c: c, lambda c, x: x),
    "0-d array": (np.array(1.0), lambda c: c, lambda c, x: x),
    "JAX array": (jnp.asarray(1.0), lambda c: c, lambda c, x: x),
    "two frames": ((1.0, 1.0), lambda c: c[0], lambda c, x: (x, c[0])),
    "counter": ((1.0, 0), lambda c: c[0], lambda c, x: (x, c[1] + 1)),
    "clock": ((1.0, jnp.float32(0.0)), lambda c: c[0], lambda c, x: (x, c[1] + 1)),
    "dict": ({"x": 1.0, "n": 0}, lambda c: c["x"], lambda c, x: {"x": x, "n": c["n"] + 1}),
    "namedtuple": (Named(1.0, 0), lambda c: c.x, lambda c, x: Named(x, c.n + 1)),
    "list": ([1.0, 0], lambda c: c[0], lambda c, x: [x, c[1] + 1]),
    "key": ((1.0, KEY), lambda c: c[0], lambda c, x: (x, jax.random.fold_in(c[1], 1))),
    "None beside": ((1.0, None), lambda c: c[0], lambda c, x: (x, None)),
    # Refused, as `jax.lax.scan` refuses them, or because they are no numbers.
    "NumPy integer": (np.int32(1), lambda c: c, lambda c, x: x),
    "integer array": (jnp.ones((), int), lambda c: c, lambda c, x: x),
    "boolean array": (np.array(True), lambda c: c, lambda c, x: x),
    "half precision": (jnp.ones((), jnp.float16), lambda c: c, lambda c, x: x),
    "text": ((1.0, "a"), lambda c: c[0], lambda c, x: (x, c[1])),
    "date": ((1.0, np.datetime64("2020")), lambda c: c[0], lambda c, x: (x, c[1])),
    "grows": (1.0, lambda c: c, lambda c, x: (x, x)),
    "changes shape": (1.0, lambda c: c, lambda c, x: jnp.stack([x, x])),
}
REFUSED_CARRIES = list(CARRIES)[14:]
WAYS = ["obs", "obs", "mask", "handler", "scale", "plate", "event", "condition", "outer scale"]
STATES = np.array([-0.9, 0.1, 0.6, 1.4])
MISSING = st.just(math.nan)


@st.composite
def programs(draw):
    likelihood = draw(st.sampled_from(sorted(LIKELIHOODS)))
    values = LIKELIHOODS[likelihood][1]
    y = draw(st.lists(values | MISSING, min_size=1, max_size=3))
    how = draw(st.sampled_from(WAYS))
    return likelihood, y, how, draw(st.sampled_from(sorted(CARRIES))), draw(st.integers(0, 2))


def written(likelihood, y, how, carry, extra):
    """NumPyro program of a drawn description, with its observations."""
    make = LIKELIHOODS[likelihood][0]
    first, state_of, next_carry = CARRIES[carry]

    def program(y=None):
        def step(c, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * state_of(c), 0.5))
            fn = make(x)
            if how == "mask":
                numpyro.sample("y", fn.mask(~jnp.isnan(y_t)), obs=jnp.where(jnp.isnan(y_t), 1.0, y_t))
            elif how == "handler":
                with handlers.mask(mask=~jnp.isnan(y_t)):
                    numpyro.sample("y", fn, obs=jnp.where(jnp.isnan(y_t), 1.0, y_t))
            elif how == "scale":
                with handlers.scale(scale=0.5):
                    numpyro.sample("y", fn, obs=y_t)
            elif how == "plate":
                with numpyro.plate("places", 1):
                    numpyro.sample("y", fn, obs=y_t[None])
            elif how == "event":
                numpyro.sample("y", fn.expand((1,)).to_event(1), obs=y_t[None])
            else:
                numpyro.sample("y", fn, obs=y_t)
            return next_carry(c, x), None

        scan(step, first, y, length=len(data) + extra if y is None else None)

    data = np.array(y, np.float32)
    if how == "condition":
        return handlers.condition(program, {"y": data}), ()
    return (handlers.scale(program, 1.0) if how == "outer scale" else program), (data,)


@pytest.mark.slow
@fuzz(40)
@given(programs())
def test_programs(drawn):
    with jax.numpy_rank_promotion("allow"):  # NumPyro's mixtures promote ranks
        program_holds(drawn)


def program_holds(drawn):
    likelihood, y, how, carry, extra = drawn
    program, data = written(*drawn)
    found = outcome("programs", lambda: StateSpaceModel(program, data), ("site 'y'", "site 'x'", "carry"))
    if found is None:
        assert carry in REFUSED_CARRIES or how == "outer scale", drawn
        return
    assert carry not in REFUSED_CARRIES, drawn
    steps = len(y) + (extra if how == "condition" else 0)
    assert found.structure.length == steps
    power, right = (0.5 if how == "scale" else 1.0), LIKELIHOODS[likelihood][2]
    state, inputs = found.initial(KEY), found.time_inputs()
    before = 1.0
    for t in range(steps):
        at = jax.tree.map(lambda leaf, t=t: leaf[t], inputs)
        moments = found.transition(state, at).moments()
        np.testing.assert_allclose(moments.mean, 0.9 * before, rtol=1e-6)
        logs = jax.vmap(lambda x, s=state, at=at: found.record(KEY, x, s, at)["log_likelihood"]["y"])(
            jnp.asarray(STATES, jnp.float32)
        )
        known = t < len(y) and not math.isnan(y[t])
        expected = power * right(y[t], STATES) if known else np.zeros(len(STATES))
        np.testing.assert_allclose(np.reshape(logs, -1), expected, rtol=2e-4, atol=2e-5, err_msg=str(drawn))
        before = np.float32(0.3 * t)
        state = found.advance(jnp.asarray(before), state, at)
    if carry in ("counter", "clock", "dict", "namedtuple", "list"):
        assert steps in [float(leaf) for leaf in jax.tree.leaves(state)]


# --- runs of filters against filters in double precision -------------------------------------------------------------

GRID = np.linspace(-6, 6, 1201)
REFUSED_RUNS = [
    (likelihood, name) for likelihood in LIKELIHOODS for name in ("GuidedPF", "EnKF") if likelihood != "Normal"
]
RUNS = {
    "Bootstrap": lambda model: ndda.Bootstrap(model),
    "GuidedPF": lambda model: ndda.GuidedPF(model),
    "FAAPF": lambda model: ndda.FAAPF(model, target_ess=0.0),
    "EnKF": lambda model: ndda.EnKF(model),
    "GrossErrorCheck": lambda model: ndda.GrossErrorCheck(ndda.Bootstrap(model), threshold=1e3),
}


def on_grid(likelihood, y):
    """(log-evidence, mean and deviation of the last state) by integration over a grid, in double precision."""
    log_density, width, total = LIKELIHOODS[likelihood][2], GRID[1] - GRID[0], 0.0
    moves = stats.norm.pdf(GRID[:, None], 0.9 * GRID[None], 0.5) * width
    density = stats.norm.pdf(GRID, 0.9, 0.5)
    for t, value in enumerate(y):
        density = moves @ density if t else density
        density = density if math.isnan(value) else density * np.exp(log_density(value, GRID))
        mass = density.sum() * width
        total, density = total + np.log(mass), density / mass
    mean = (GRID * density).sum() * width
    return total, mean, np.sqrt((GRID**2 * density).sum() * width - mean**2)


def ran(algorithm, *data, particles=2000):
    runner = ndda.Filter(algorithm, num_particles=particles, progress_bar=False)
    runner.run(KEY, *data)
    return runner.result


@pytest.mark.slow
@fuzz(4)
@given(st.sampled_from(sorted(RUNS)), st.sampled_from(["Normal", "Poisson", "Categorical", "StudentT"]), st.data())
def test_runs(name, likelihood, data):
    y = data.draw(st.lists(st.sampled_from([0.0, 1.0, math.nan]), min_size=2, max_size=2))
    program, given_data = written(likelihood, y, "obs", data.draw(st.sampled_from(["integer", "dict"])), 0)
    result = outcome("runs", lambda: ran(RUNS[name](program), *given_data), ("site 'y'",))
    if result is None:
        assert (likelihood, name) in REFUSED_RUNS
        return
    evidence, mean, deviation = on_grid(likelihood, y)
    assert abs(result.posterior["x"][0, :, -1].mean() - mean) < 0.15 * deviation
    if name != "EnKF":
        assert abs(result.sample_stats["log_evidence_increment"].sum() - evidence) < 0.1


# --- observations: any container gives what the plain array gives, or a sentence that names the argument ------------


def linear(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def nullable(values):
    return [None if math.isnan(v) else v for v in values]


def small(values):
    return np.abs(values) < 1e6


CONTAINERS = {
    "float64": lambda v: np.array(v),
    "float32": lambda v: np.array(v, np.float32),
    "float16": lambda v: np.array(v, np.float16),
    "JAX": lambda v: jnp.asarray(v, jnp.float32),
    "masked": lambda v: np.ma.masked_invalid(np.array(v)),
    "masked integers": lambda v: np.ma.array(np.where(small(v), v, 0).astype(int), mask=~small(v)),
    "Series": lambda v: pandas.Series(v),
    "dates": lambda v: pandas.Series(v, pandas.date_range("2020", periods=len(v))),
    "nullable": lambda v: pandas.Series(nullable(v), dtype="Float64"),
    "pandas array": lambda v: pandas.array(nullable(v), dtype="Float64"),
    "category": lambda v: pandas.Series(v).astype("category"),
    "DataArray": lambda v: xarray.DataArray(np.array(v), dims="time"),
    "Variable": lambda v: xarray.Variable("time", np.array(v)),
    "read-only": lambda v: np.broadcast_to(np.array(v), (len(v),)),
    "reversed twice": lambda v: np.array(v)[::-1][::-1],
    "big endian": lambda v: np.array(v, ">f8"),
    # Refused.
    "Dataset": lambda v: xarray.Dataset({"a": ("time", v)}),
    "list": list,
    "tuple": tuple,
    "objects": lambda v: np.array([*nullable(v), "x"], object)[:-1],
    "text": lambda v: np.array([str(x) for x in v]),
    "times": lambda v: np.array(["2020-01-01"] * len(v), "M8[D]"),
    "frame": lambda v: pandas.DataFrame({"a": v}),
    "column": lambda v: np.array(v)[:, None],
    "number": lambda v: v[0],
    "none": lambda v: None,
    "nothing": lambda v: np.zeros(0),
    "complex": lambda v: np.array(v) + 1j,
    "ragged": lambda v: [[x] for x in v[:-1]] + [[1.0, 2.0]],
    "string": lambda v: "0.1 0.2 0.3",
    "dict": lambda v: {"a": v},
    "set": set,
}
REFUSED_CONTAINERS = list(CONTAINERS)[16:]
LINEAR = ndda.Filter(ndda.Bootstrap(linear), num_particles=2000, progress_bar=False)
NUMBERS = st.sampled_from([0.3, -0.2, 0.5, math.nan, -1.0, 2.0, 1e30, -999.0, INF])


def kalman(y):
    mean, variance, total = 0.0, 0.0, 0.0
    for value in y:
        mean, variance = 0.9 * mean, 0.81 * variance + 0.25
        if not math.isnan(value):
            total += stats.norm.logpdf(value, mean, np.sqrt(variance + 0.09))
            gain = variance / (variance + 0.09)
            mean, variance = mean + gain * (value - mean), (1 - gain) * variance
    return total


def evidence_of(y):
    LINEAR.run(KEY, y)
    return float(LINEAR.result.sample_stats["log_evidence_increment"].sum())


@pytest.mark.slow
@fuzz(40)
@given(st.sampled_from(sorted(CONTAINERS)), st.lists(NUMBERS, min_size=3, max_size=3))
def test_observations(name, values):
    names = ("argument 'y'", "site 'y'", "input xs", "step", "the program's scan")
    data = CONTAINERS[name](values)
    found = outcome("observations", lambda: evidence_of(data), names)
    if name in REFUSED_CONTAINERS:
        assert found is None, f"{name} was accepted"
        return
    if found is None:
        assert any(abs(v) > 100 for v in values), (name, values)  # impossible values, or values that are not finite
        return
    assert not any(math.isinf(v) for v in values) or name in ("masked", "masked integers"), (name, values)
    plain = [math.nan if math.isinf(v) else v for v in values]
    if name == "masked integers":
        plain = [float(int(v)) if small(v) else math.nan for v in plain]
    if all(abs(v) < 1.5 or math.isnan(v) for v in plain):
        assert abs(found - kalman(plain)) < 0.5, (name, values)
    assert found == evidence_of(np.array(plain, np.float16 if name == "float16" else np.float32)), (name, values)


# --- files: of a stored prior, and of a run --------------------------------------------------------------------------


JSON = ["[]", "{}", "1", "null", '"a"', "[1]", '[["a", 1]]', '{"sha256": 1}', '{"sha256": null}', '{"a": {"b": 1}}']


def damage(draw, path):
    """Damage a file in one of several ways; returns which."""
    content = path.read_bytes()
    way = draw(st.sampled_from(["truncated", "flipped", "deleted", "emptied", "text", "appended", "arrays", "json"]))
    at = draw(st.integers(0, len(content) - 1))
    if way == "truncated":
        path.write_bytes(content[:at])
    elif way == "flipped":
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :])
    elif way == "deleted":
        path.unlink()
    elif way == "emptied":
        path.write_bytes(b"")
    elif way == "text":
        path.write_text("this is another file")
    elif way == "appended":
        path.write_bytes(content + b"more")
    elif way == "arrays":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(2), belongs=np.zeros(3))
    else:
        path.write_text(draw(st.sampled_from(JSON)))
    return way


@pytest.mark.slow
@fuzz(150)
@given(st.data())
def test_stored_priors(data):
    arrays = {"weights": np.arange(6.0).reshape(2, 3), "bias": np.array(0.5, np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_stored(arrays, {"noise_range": [0.02, 80.0]}, folder, "mine")
        path = folder / data.draw(st.sampled_from(["mine.npz", "mine.json"]))
        before = json.loads((folder / "mine.json").read_text())
        damage(data.draw, path)
        found = outcome("stored priors", lambda: read_stored(folder, "mine", "train.py"), ("mine",))
        if found is not None:
            read, card = found
            assert json.loads(card) == before
            assert set(read) == set(arrays)
            for name, array in arrays.items():
                np.testing.assert_array_equal(read[name], array, strict=True)


@pytest.fixture(scope="module")
def stored_run(tmp_path_factory):
    """A filter, the directory of its run, and the result, in a list, which Hypothesis does not print."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    runner = ndda.Filter(ndda.Bootstrap(linear), num_particles=16, num_chains=2, progress_bar=False, directory=folder)
    runner.run(KEY, Y)
    return runner, folder, runner.result


Y = np.array([0.3, -0.2, 0.5], np.float32)


@pytest.mark.slow
@fuzz(30)
@given(st.data())
def test_stores_of_runs(stored_run, data):
    runner, whole_run, result = stored_run
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        shutil.copytree(whole_run, folder)
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "lock")
        name = data.draw(st.sampled_from(files))
        if data.draw(st.integers(0, 3)) == 0:
            (folder / name).write_bytes((folder / data.draw(st.sampled_from(files))).read_bytes())
        else:
            damage(data.draw, folder / name)
        runner.directory = folder
        found = outcome("stores of runs", lambda: (runner.run(KEY, Y), runner.result)[1], (folder.name, name))
        if found is not None:
            for group in ("posterior", "sample_stats"):
                for site, values in getattr(result, group).items():
                    np.testing.assert_array_equal(getattr(found, group)[site], values)


# --- datasets: another form of the same fields gives the same states -------------------------------------------------

LATITUDE, LONGITUDE, LEVELS = np.array([-60.0, 0.0, 60.0]), np.array([0.0, 90.0, 180.0, 270.0]), (500, 850)
TIMES = np.datetime64("2019-03-29T00", "ns") + np.arange(3) * np.timedelta64(6, "h")
LAYOUT = ndda.Layout(
    (3, 4, 3),
    ("latitude", "longitude", "channel"),
    (("latitude", tuple(LATITUDE.tolist())), ("longitude", tuple(LONGITUDE.tolist()))),
    variables=(ndda.Variable("temperature", "K", LEVELS), ndda.Variable("2m_temperature", "K")),
)


def dataset():
    rng = np.random.default_rng(0)
    coords = {"time": TIMES, "level": list(LEVELS), "latitude": LATITUDE, "longitude": LONGITUDE}
    upper, lower = rng.normal(270, 5, (3, 2, 3, 4)), rng.normal(280, 5, (3, 3, 4))
    variables = {
        "temperature": (tuple(coords), upper, {"units": "K"}),
        "2m_temperature": (("time", "latitude", "longitude"), lower, {"units": "K"}),
    }
    return xarray.Dataset(variables, coords)


def with_value(d, name, value):
    """Fields with a value at one point, at all times."""
    there = (d.latitude == 0.0) & (d.longitude == 90.0)
    return d.assign({name: xarray.where(there, value, d[name]).assign_attrs(d[name].attrs)})


def with_coordinate(d, name, values):
    return d.assign_coords({name: (d[name].dims, values)})


def changed_unit(d, units):
    return d.assign(temperature=d.temperature.assign_attrs(units=units))


SAME = {
    "none": lambda d: d,
    "transposed": lambda d: d.transpose("longitude", "latitude", "level", "time"),
    "north first": lambda d: d.isel(latitude=slice(None, None, -1)),
    "levels reversed": lambda d: d.isel(level=slice(None, None, -1)),
    "from -180": lambda d: d.assign_coords(longitude=(d.longitude + 180) % 360 - 180).sortby("longitude"),
    "longitudes rolled": lambda d: d.roll(longitude=1, roll_coords=True),
    "times shuffled": lambda d: d.isel(time=[2, 0, 1]),
    "short names": lambda d: d.rename({"temperature": "t", "2m_temperature": "t2m"}),
    "lat and lon": lambda d: d.rename(latitude="lat", longitude="lon"),
    "valid_time": lambda d: d.rename(time="valid_time"),
    "pressure_level": lambda d: d.rename(level="pressure_level"),
    "float32": lambda d: d.astype(np.float32),
    "kelvin": lambda d: changed_unit(d, "kelvin"),
    "no units": lambda d: d.assign(temperature=d.temperature.drop_attrs()),
    "float32 coordinates": lambda d: d.assign_coords(latitude=d.latitude.astype(np.float32)),
    "float levels": lambda d: d.assign_coords(level=d.level.astype(float)),
    "more variables": lambda d: d.assign(other=("x", [1.0])),
    "one member": lambda d: d.expand_dims(number=1),
    "meridian twice": lambda d: xarray.concat(
        [d, d.sel(longitude=[0.0]).assign_coords(longitude=[360.0])], "longitude"
    ),
}
BROKEN = {
    "a latitude is NaN": lambda d: with_coordinate(d, "latitude", [-60.0, math.nan, 60.0]),
    "a longitude is infinite": lambda d: with_coordinate(d, "longitude", [0.0, 90.0, 180.0, INF]),
    "latitudes are no numbers": lambda d: with_coordinate(d, "latitude", ["a", "b", "c"]),
    "levels are no numbers": lambda d: with_coordinate(d, "level", ["a", "b"]),
    "levels in Pa": lambda d: with_coordinate(d, "level", [50000, 85000]),
    "a level is NaN": lambda d: with_coordinate(d, "level", [500, math.nan]),
    "a level twice": lambda d: with_coordinate(d, "level", [500, 500]),
    "other latitudes": lambda d: with_coordinate(d, "latitude", [-50.0, 0.0, 50.0]),
    "latitudes in radians": lambda d: with_coordinate(d, "latitude", np.radians(LATITUDE)),
    "no latitude": lambda d: d.drop_vars("latitude"),
    "no longitude": lambda d: d.isel(longitude=0),
    "no levels": lambda d: d.isel(level=0, drop=True),
    "no times": lambda d: d.drop_vars("time"),
    "times are numbers": lambda d: d.assign_coords(time=[0, 6, 12]),
    "a time is missing": lambda d: d.assign_coords(time=[TIMES[0], np.datetime64("NaT"), TIMES[2]]),
    "a needed time is missing": lambda d: d.isel(time=[0, 1]),
    "a needed time twice": lambda d: d.assign_coords(time=[TIMES[0], TIMES[2], TIMES[2]]),
    "members": lambda d: xarray.concat([d, d], "number"),
    "no variable": lambda d: d.drop_vars("2m_temperature"),
    "unit": lambda d: changed_unit(d, "degC"),
    "unit is a number": lambda d: changed_unit(d, 1.0),
    "a value is NaN": lambda d: with_value(d, "temperature", math.nan),
    "a value is infinite": lambda d: with_value(d, "2m_temperature", INF),
    "a fill value": lambda d: with_value(d, "temperature", 9.96921e36),
    "in Celsius": lambda d: d.assign({"2m_temperature": d["2m_temperature"] - 273.15}),
    "text": lambda d: d.assign(temperature=d.temperature.astype(str)),
    "complex": lambda d: d.assign(temperature=d.temperature + 1j),
    "dates": lambda d: d.assign(temperature=d.temperature.astype("M8[ns]")),
    "objects": lambda d: d.assign(temperature=d.temperature.astype(object)),
    "empty": lambda d: d.isel(time=[]),
    "no dataset": lambda d: d["temperature"],
    "arrays": lambda d: d["temperature"].values,
    "nothing": lambda d: None,
    "two-dimensional latitudes": lambda d: d.drop_vars("latitude").assign_coords(
        latitude=(("latitude", "longitude"), np.zeros((3, 4)))
    ),
}
NAMES = ("'t'", "latitude", "longitude", "level", "time", "temperature", "dataset", "Dataset")


@pytest.mark.slow
@fuzz(100)
@given(st.lists(st.sampled_from(sorted(SAME)), max_size=2, unique=True), st.none() | st.sampled_from(sorted(BROKEN)))
def test_datasets(same, broken):
    given_dataset = dataset()
    right = fields.read_states(given_dataset, LAYOUT, TIMES[[2, 0]])
    assume("meridian twice" not in same[1:])  # longitudes are in order then
    try:
        for change in same:
            given_dataset = SAME[change](given_dataset)
        if broken is not None:
            given_dataset = BROKEN[broken](given_dataset)
    except Exception:
        assume(False)  # the two changes do not go together
    found = outcome("datasets", lambda: fields.read_states(given_dataset, LAYOUT, TIMES[[2, 0]]), NAMES)
    assert (found is None) == (broken is not None), (same, broken)
    if found is not None:
        np.testing.assert_array_equal(found, right, err_msg=str(same))


# --- diagnostics: the same score for every container of the same numbers, or a sentence -----------------------------

ENSEMBLE = np.array([[1.0, 2.0, 4.0], [2.0, 2.5, 1.0], [0.5, 3.0, 2.0], [1.5, 0.0, 3.0]])
TRUTH = np.array([1.0, 2.0, 3.0])
SAME_ARRAYS = [np.array, jnp.asarray, pandas.DataFrame, np.ndarray.tolist, np.asfortranarray, np.ma.array]
ODD_ARRAYS = [
    *(None, "a", object(), {}, {"a": 1}, [[1], [1, 2]], [None], ["a"], np.zeros((4, 3)) + 1j, np.zeros((4, 3), str)),
    *(np.zeros((4, 3), object), np.zeros(3, "M8[D]"), xarray.Dataset(), xarray.DataArray(TRUTH), np.zeros((2, 2, 2))),
    *(np.zeros((0, 3)), np.zeros(5), 1j, b"a", pandas.Series(["a", "b"])),
]
ODD_AXES = [7, -5, "x", 1.5, (0, 0), [None], [[0]], True, object(), {0: 1}]
ODD_WEIGHTS = [*ODD_ARRAYS[1:], -np.ones(3), np.array([1.0, math.nan, 1.0]), np.ones(2)]
SCORES = {
    "rmse": lambda e, t, **k: diagnostics.rmse(e, t, **k),
    "spread": lambda e, t, **k: diagnostics.spread(e, **k),
    "spread_skill": lambda e, t, **k: diagnostics.spread_skill(e, t, **k),
    "crps": lambda e, t, **k: diagnostics.crps(e, t, **k),
    "energy_score": lambda e, t, **k: diagnostics.energy_score(e, t, vector=0, **{**k, "axis": k.get("axis", ())}),
    "power_spectrum": lambda e, t, member=0, axis=0, weights=None: diagnostics.power_spectrum(
        e, axis=member, average=axis if axis != 0 else 1, weights=weights
    ),
    "consistency": lambda e, t, member=0, axis=(), weights=1.0: diagnostics.consistency(
        t, e, weights, member=member, axis=axis
    ),
}


@pytest.mark.slow
@fuzz(300)
@given(st.sampled_from(sorted(SCORES)), st.sampled_from(SAME_ARRAYS), st.data())
def test_diagnostics(name, same, data):
    wrong = data.draw(st.sampled_from([None, "ensemble", "truth", "member", "axis", "weights"]))
    arrays, settings_given = [same(ENSEMBLE), TRUTH], {}
    if wrong == "ensemble":
        arrays[0] = data.draw(st.sampled_from(ODD_ARRAYS))
    elif wrong == "truth":
        arrays[1] = data.draw(st.sampled_from(ODD_ARRAYS))
    elif wrong is not None:
        odd = {"member": [None, *ODD_AXES], "axis": ODD_AXES, "weights": ODD_WEIGHTS}[wrong]
        settings_given[wrong] = data.draw(st.sampled_from(odd))
    names = ("ensemble", "truth", "observations", "members", "member", "axis", "weights", "field", "error", "vector")
    found = outcome("diagnostics", lambda: SCORES[name](*arrays, **settings_given), names)
    if wrong is None:
        parts = zip(jax.tree.leaves(found), jax.tree.leaves(SCORES[name](ENSEMBLE, TRUTH)), strict=True)
        for part, right in parts:
            np.testing.assert_allclose(part, right, rtol=1e-6)
    elif wrong == "truth":
        assert (found is not None) == (name in ("spread", "power_spectrum")), arrays
    elif wrong == "axis" and name == "energy_score":
        assert found is None
    elif wrong == "member":
        assert found is None, settings_given


# --- keys, and arguments of conversions -----------------------------------------------------------------------------

KEYS = {
    "new": (lambda: jax.random.key(0), True),
    "old": (lambda: jax.random.PRNGKey(0), True),
    "NumPy": (lambda: np.array([0, 0], np.uint32), True),
    "number": (lambda: 0, False),
    "NumPy number": (lambda: np.int64(0), False),
    "none": (lambda: None, False),
    "text": (lambda: "a", False),
    "flag": (lambda: True, False),
    "list": (lambda: [0, 0], False),
    "integers": (lambda: jnp.zeros(2, int), False),
    "three": (lambda: np.zeros(3, np.uint32), False),
    "several": (lambda: jax.random.split(jax.random.key(0)), False),
    "several old": (lambda: jax.random.split(jax.random.PRNGKey(0)), False),
    "function": (lambda: jax.random.key, False),
    "observations": (lambda: Y, False),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys(name):
    make, right = KEYS[name]
    found = outcome("keys", lambda: require_key(make(), "Filter") is None, ("rng_key",))
    assert (found is not None) == right


ONLINE = ndda.OnlineFilter(ndda.Bootstrap(linear), num_particles=4)
HELD = ndda.SMC2(ndda.Bootstrap(linear), num_particles=4, num_parameter_particles=4)
CHAIN = ndda.PMMH(ndda.Bootstrap(linear), num_particles=4, num_warmup=1, num_samples=1)
RUNNERS = {
    "Filter": lambda *a, **k: LINEAR.run(*a, **k),
    "OnlineFilter.init": lambda *a, **k: ONLINE.init(*a, **k),
    "OnlineFilter.step": lambda key, *a, **k: ONLINE.step(key, None, *a, **k),
    "PMMH": lambda *a, **k: CHAIN.run(*a, **k),
    "SMC2": lambda *a, **k: HELD.run(*a, **k),
}


@pytest.mark.parametrize("name", RUNNERS)
def test_runs_name_the_argument_that_is_wrong(name):
    """A key, a state, or arguments that the program does not take; nothing is compiled."""
    first = Y[:1]
    for args, kwargs, words in [((0, first), {}, "rng_key=0"), ((first, KEY), {}, "rng_key=an array of shape")]:
        with pytest.raises(TypeError, match=words):
            RUNNERS[name](*args, **kwargs)
    if name == "OnlineFilter.step":
        with pytest.raises(TypeError, match="state=None"):
            RUNNERS[name](KEY, first)
        return
    for args, kwargs in [((KEY,), {}), ((KEY, first, first), {}), ((KEY, first), {"z": 1})]:
        with pytest.raises(ValueError, match=r"the program 'linear' takes the arguments \(y\) and got"):
            RUNNERS[name](*args, **kwargs)


ODD_COORDINATES = [None, 3, "ab", b"ab", {1, 2}, {1: 2}, [[1], [1, 2]], np.zeros((2, 2)), len, np.array(1), [1], 1.5]
STATES_OF_FIELDS = np.zeros((3, 3, 4, 3), np.float32)


@pytest.mark.parametrize("values", ODD_COORDINATES, ids=lambda v: repr(v)[:20].replace("\n", ""))
def test_values_of_an_axis(values):
    """Coordinates of a result and of a dataset are values along one axis, of the right number."""
    names = ("'station'", "'number'")
    result = results.FilterResult(
        {"x": np.zeros((1, 4, 3, 2))}, {}, {}, {}, {}, {}, None, {}, {}, "x", None, {"algorithm": "a"}
    )
    given = {"dims": {"x": ["station"]}, "coords": {"station": values}}
    assert outcome("axes", lambda: results.to_datatree(result, **given), names) is None
    assert outcome("axes", lambda: fields.to_dataset(STATES_OF_FIELDS, LAYOUT, {"number": values}), names) is None
    assert outcome("axes", lambda: results.to_datatree(result, dims={"x": values}), ("dims",)) is None


# --- cases that fuzzing found ----------------------------------------------------------------------------------------


def by_callback(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        mean = jax.pure_callback(np.asarray, jax.ShapeDtypeStruct((), jnp.float32), x, vmap_method="sequential")
        numpyro.sample("y", dist.Normal(mean, 0.3), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def with_factor(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        numpyro.factor("f", -(x**2))
        return x, None

    scan(step, 0.0, y)


def with_parameter(y):
    a = numpyro.sample("a", dist.Normal())
    linear(a * jnp.asarray(y))


def test_observations_without_a_derivative():
    """A callback from the state to an observation runs where no derivative is needed, and is named elsewhere."""
    for algorithm, runs in ((ndda.Bootstrap, True), (ndda.EnKF, True), (ndda.FAAPF, False), (ndda.GuidedPF, False)):
        made = algorithm(by_callback)
        program = StateSpaceModel(by_callback, (Y,))
        names = ("Pure callbacks do not support JVP",)
        check = lambda made=made, p=program: p.check(made.needs_gaussian, made.needs_gaussian_errors) is None  # noqa: E731
        assert (outcome("callbacks", check, names) is not None) == runs
    inputs = jax.tree.map(lambda leaf: leaf[0], program.time_inputs())
    log = program.record(KEY, jnp.float32(0.1), program.initial(KEY), inputs)["log_likelihood"]["y"]
    np.testing.assert_allclose(log, stats.norm.logpdf(Y[0], 0.1, 0.3), rtol=1e-5)


def test_a_check_with_one_threshold_leaves_a_factor_out():
    program = StateSpaceModel(with_factor, (Y,))
    assert ndda.GrossErrorCheck(ndda.Bootstrap(with_factor), threshold=4.0)._thresholds(program) == {"y": 4.0}


REFUSED_PROGRAMS = {
    "block": (lambda: handlers.block(linear), Y, r"no .*scan that it can see \(handlers.block hides"),
    "list": (lambda: linear, [0.1, 0.2, 0.3], "inputs xs of the program's scan are a list of 3 numbers"),
    "tuple": (lambda: linear, (np.float32(0.1), 0.2), "inputs xs of the program's scan are a tuple of 2 numbers"),
    "scale": (lambda: handlers.scale(linear, np.ones(3)), Y, r"site 'y' powers of shape \(3,\)"),
    "text": (lambda: handlers.condition(with_parameter, {"a": "b"}), Y, "the value of site 'a' is 'b'"),
}


@pytest.mark.parametrize("name", REFUSED_PROGRAMS)
def test_refused_programs(name):
    make, y, words = REFUSED_PROGRAMS[name]
    with pytest.raises(ValueError, match=words):
        StateSpaceModel(make(), (y,))


def test_levels_that_coincide_and_thresholds_that_are_none():
    for rho in (1e30, 1e-30, 1e300, 1e-3):
        assert outcome("levels", lambda: diffusion.KarrasSchedule(rho=rho).levels((0.02, 80.0)), ("rho",)) is None  # noqa: B023
    levels = diffusion.KarrasSchedule(3, rho=2.0).levels((1.0, 4.0))
    np.testing.assert_allclose(levels, [4.0, 2.25, 1.0])
    for name, value in (("threshold", 0), ("scale", -1.0), ("threshold", [1.0, math.nan]), ("loc", "a")):
        assert outcome("Huber", lambda: ndda.Huber(**{name: value}), (name,)) is None  # noqa: B023
