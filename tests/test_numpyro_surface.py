"""Features of NumPyro programs x filters: every row of the table in docs/numpyro.md is run here.

By each filter, unless it is about data, which are converted before any filter sees them.

Each program with features stands beside a plain one that says the same; the filter must give the same particles for
both. Programs have several of the features at once, because every program of every filter is compiled. A feature that
a filter refuses must be refused with a sentence. The table is generated: the test fails where the page differs, and
prints the table to paste.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan

import numpyro_diffusion_da as ndda

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "numpyro.md"
KEY = jax.random.key(0)
D, STEPS = 4, 3
PRIOR = ndda.GaussianPrior(0.9 * np.eye(D), 0.25 * np.eye(D))
Y = np.random.default_rng(0).normal(size=(STEPS, D)).astype(np.float32)
FILTERS = {"FAAPF": ndda.FAAPF, "GuidedPF": ndda.GuidedPF, "Bootstrap": ndda.Bootstrap, "EnKF": ndda.EnKF}


def start():
    return numpyro.sample("x0", PRIOR.climatology())


closed_form = True  # most programs have their transition in closed form, which compiles faster


def transition(x):
    moved = dist.Normal(0.9 * x, 0.5).to_event(1) if closed_form else ndda.DiffusionTransition(PRIOR, x)
    return numpyro.sample("x", moved)


def observe(x, y_t, error=0.5):
    numpyro.sample("y", dist.Normal(x, error).to_event(1), obs=y_t)


def plain(y):
    def step(x, y_t):
        x = transition(x)
        observe(x, y_t)
        return x, None

    scan(step, start(), y)


def global_error(y):
    error = numpyro.sample("error", dist.LogNormal(0.0, 1.0))

    def step(x, y_t):
        x = transition(x)
        observe(x, y_t, error)
        return x, None

    scan(step, start(), y)


def static_field(y, where):
    def step(x, y_t):
        x = transition(x)
        numpyro.sample("y", dist.Normal(x[where], 0.5).to_event(1), obs=y_t[where])
        return x, None

    scan(step, start(), y)


def counts(y):
    def step(x, y_t):
        x = transition(x)
        numpyro.sample("n", dist.Poisson(jnp.exp(x)).to_event(1), obs=y_t)
        return x, None

    scan(step, start(), y)


def shares(y):
    def step(x, y_t):
        x = transition(x)
        numpyro.sample("y", dist.Dirichlet(jnp.exp(x)), obs=y_t)
        return x, None

    scan(step, start(), y)


def scaled_latent(y):
    def step(x, y_t):
        with handlers.scale(scale=0.5):
            x = transition(x)
        observe(x, y_t)
        return x, None

    scan(step, start(), y)


def student(y):
    def step(x, y_t):
        x = transition(x)
        numpyro.sample("y", dist.StudentT(4.0, x, 0.5).to_event(1), obs=y_t)
        return x, None

    scan(step, start(), y)


def unobserved():
    def step(x, _):
        x = transition(x)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1))
        return x, None

    scan(step, start(), None, length=STEPS + 2)


def factor(y):
    def step(x, y_t):
        x = transition(x)
        observe(x, y_t)
        numpyro.factor("small", -0.1 * x[0])
        return x, None

    scan(step, start(), y)


def any_likelihood(y):
    """Every likelihood that is not Gaussian, and a factor."""

    def step(x, y_t):
        x = transition(x)
        numpyro.sample("first", dist.StudentT(4.0, x[:1], 0.5).to_event(1), obs=y_t[:1])
        numpyro.sample("rest", dist.Poisson(jnp.exp(x[1:])).to_event(1), obs=jnp.abs(jnp.round(y_t[1:])))
        numpyro.factor("small", -0.1 * x[0])
        return x, None

    scan(step, start(), y)


def classes(y):
    def step(z, y_t):
        z = numpyro.sample("x", dist.Categorical(jnp.array([[0.9, 0.1], [0.2, 0.8]])[z]))
        observe(jnp.where(z == 0, -1.0, 1.0) * jnp.ones(D), y_t)
        return z, None

    scan(step, 0, y)


def switching(y):
    def step(carry, y_t):
        z = numpyro.sample("z", dist.Bernoulli(0.2 + 0.6 * carry[0]))
        x = numpyro.sample("x", dist.Normal(0.9 * carry[1], 0.5 + z).to_event(1))
        observe(x, y_t)
        return (z, x), None

    scan(step, (0, start()), y)


def with_obs_mask(y):
    def step(x, y_t):
        x = transition(x)
        with numpyro.plate("sensors", D):
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t, obs_mask=jnp.arange(D) < D - 1)
        return x, None

    scan(step, start(), y)


def own_key(y):
    def step(x, y_t):
        x = transition(x)
        observe(x + jax.random.normal(numpyro.prng_key(), (D,)), y_t)
        return x, None

    scan(step, start(), y)


def all_at_once(y, error):
    """Every feature that leaves the observations of the plain program as they are."""
    one = numpyro.sample("one", dist.LogNormal(0.0, 1.0))
    two = numpyro.sample("two", dist.LogNormal(0.0, 1.0))

    def step(carry, at):
        y_t, error_t = at
        x = transition(carry["x"])
        numpyro.deterministic("energy", 0.5 * jnp.sum(x**2))
        error_t = error_t * cond(jnp.asarray(True), lambda _: one, lambda _: 10.0, None)
        with handlers.scale(scale=4.0):
            numpyro.sample("first", dist.Normal(x[:1], 2.0 * error_t).to_event(1), obs=y_t[:1])
        numpyro.sample("second", dist.MultivariateNormal(x[1:2], two * error_t**2 * jnp.eye(1)), obs=y_t[1:2])
        with numpyro.plate("sensors", D - 2):
            numpyro.sample("rest", dist.Normal(x[2:], error_t), obs=y_t[2:])
        return {"x": x, "before": (carry["x"], carry["before"][0])}, None

    x0 = start()
    scan(step, {"x": x0, "before": (x0, x0)}, (y, error))


def masked_twice(y):
    def step(x, y_t):
        x = transition(x)
        with handlers.mask(mask=jnp.arange(2) < 1):
            numpyro.sample("first", dist.Normal(x[:2], 0.5), obs=y_t[:2])
        numpyro.sample("rest", dist.Normal(x[2:], 0.5).mask(jnp.arange(2) < 1).to_event(1), obs=y_t[2:])
        return x, None

    scan(step, start(), y)


NAN_LAST = Y.copy()
NAN_LAST[:, -1] = np.nan
NAN_TWICE = Y.copy()
NAN_TWICE[:, [1, 3]] = np.nan
NAN_TAIL = np.concatenate([Y, np.full((2, D), np.nan, np.float32)])
SOME = np.array([0, 2])
ONLY_SOME = np.full_like(Y, np.nan)
ONLY_SOME[:, SOME] = Y[:, SOME]

# feature -> name of the programs of `COMPARED` that have it
SAME = {
    "`numpyro.deterministic` in the step": "all at once",
    "several observed sites, `MultivariateNormal` among them": "all at once",
    "`numpyro.plate` in the step": "all at once",
    "`.mask(...)` on an observed site": "masked twice",
    "`handlers.mask` in the step": "masked twice",
    "inputs that vary in time, through `xs`": "all at once",
    "a pytree as carry": "all at once",
    "`handlers.condition` of a global site": "all at once",
    "`handlers.substitute` of a global site": "all at once",
    "`handlers.scale` around an observation": "all at once",
    "`cond` without latent sites": "all at once",
    "data by `handlers.condition`, of fewer times than the scan": "conditioned",
    "a pandas table as data": "a pandas table",
    "an `xarray.DataArray` as data": "an `xarray.DataArray`",
    "a masked array as data": "a masked array",
    "static fields as arguments": "static fields",
}
REFUSED = {
    "`handlers.scale` around the latent site": (scaled_latent, (Y,), "handlers.scale"),
    "`obs_mask=` (mask the distribution, or give NaN)": (with_obs_mask, (Y,), r"obs_mask=.*\.mask\(m\)"),
    "`numpyro.prng_key()` in the step": (own_key, (Y,), r"numpyro\.prng_key"),
    "an unobserved global site": (global_error, (Y,), "wrap the program in handlers.condition"),
}
COUNTS = np.abs(np.round(Y))
SHARES = np.exp(Y) / np.exp(Y).sum(1, keepdims=True)
# What a filter refuses, and others take.
PARTLY = {
    "`StudentT` observations": (student, (Y,), {"EnKF": "StudentT"}),
    "`Poisson` counts": (counts, (COUNTS,), {"EnKF": "Poisson"}),
    "counts as whole numbers": (counts, (COUNTS.astype(int),), {"EnKF": "Poisson"}),
    "`numpyro.factor`": (factor, (Y,), {"EnKF": "'small' is a numpyro.factor"}),
    "a discrete state": (
        classes,
        (Y,),
        {"FAAPF": "Categorical", "GuidedPF": "Categorical", "EnKF": "'x' is discrete"},
    ),
    "several latent sites, discrete and continuous": (
        switching,
        (Y,),
        dict.fromkeys(["FAAPF", "GuidedPF", "EnKF"], r"latent sites 'z', 'x'.*ndda\.Bootstrap"),
    ),
    "`Dirichlet` observations, whose elements are vectors": (
        shares,
        (SHARES,),
        {"FAAPF": "Dirichlet", "GuidedPF": "Dirichlet", "EnKF": "Dirichlet"},
    ),
}


def run(model, args, algorithm, diffusion=False):
    global closed_form
    closed_form = not diffusion
    filter = ndda.Filter(FILTERS[algorithm](model), num_particles=6, progress_bar=False)
    try:
        filter.run(KEY, *args)
    finally:
        closed_form = True
    return filter.result


@pytest.fixture(scope="module")
def plain_runs():
    """Runs of the plain program, made once for each filter, transition and argument."""
    made = {}

    def of(algorithm, y, diffusion=False):
        key = (algorithm, diffusion, y.tobytes())
        if key not in made:
            made[key] = run(plain, (y,), algorithm, diffusion)
        return made[key]

    return of


# name -> (program, its arguments, arguments of the plain program that says the same)
TOGETHER = {
    "masked twice": (masked_twice, (Y,), (NAN_TWICE,)),
    "all at once": (
        handlers.substitute(
            handlers.condition(all_at_once, {"one": jnp.asarray(1.0)}),
            {"two": jnp.asarray(1.0)},
        ),
        (Y, np.full(STEPS, 0.5, np.float32)),
        (Y,),
    ),
    "conditioned": (handlers.condition(unobserved, {"y": jnp.asarray(Y)}), (), (NAN_TAIL,)),
    "a pandas table": (plain, (pd.DataFrame(Y),), (Y,)),
    "an `xarray.DataArray`": (plain, (xr.DataArray(Y, dims=("time", "place")),), (Y,)),
    "a masked array": (plain, (np.ma.masked_invalid(NAN_LAST),), (NAN_LAST,)),
    "static fields": (static_field, (Y, SOME), (ONLY_SOME,)),
}
# Data are converted, and conditioned ones become data of the scan, before any filter sees them. Guided draws in closed
# form have a noise for each observation, missing ones too, so with static fields two filters can be compared.
COMPARED = [
    *((features, algorithm) for features in ("masked twice", "all at once") for algorithm in FILTERS),
    *((features, "Bootstrap") for features in TOGETHER if features not in ("masked twice", "all at once")),
    ("static fields", "FAAPF"),
]


def test_every_feature_is_in_a_program_that_is_compared():
    assert set(SAME.values()) == set(TOGETHER) == {features for features, _ in COMPARED}


@pytest.mark.parametrize(("features", "algorithm"), COMPARED)
def test_features_together_change_nothing(plain_runs, features, algorithm):
    model, args, (y,) = TOGETHER[features]
    diffusion = algorithm == "FAAPF"  # its guidance depends on the form of the observations
    result = run(model, args, algorithm, diffusion)
    np.testing.assert_allclose(result.posterior["x"], plain_runs(algorithm, y, diffusion).posterior["x"], atol=2e-5)


@pytest.mark.parametrize("algorithm", FILTERS)
@pytest.mark.parametrize("feature", REFUSED)
def test_a_feature_is_refused_with_a_sentence(feature, algorithm):
    model, args, message = REFUSED[feature]
    with pytest.raises(ValueError, match=message):
        run(model, args, algorithm)


@pytest.mark.parametrize(
    ("feature", "algorithm"), [(feature, algorithm) for feature in PARTLY for algorithm in PARTLY[feature][2]]
)
def test_some_filters_refuse(feature, algorithm):
    model, args, messages = PARTLY[feature]
    with pytest.raises(ValueError, match=messages[algorithm]):
        run(model, args, algorithm)


def assert_likelihoods(result, model, *args):
    """Compare the likelihood of each particle with the one that NumPyro itself finds in the program."""
    latent = {name: jnp.asarray(values[0]) for name, values in result.posterior.items()}
    expected = numpyro.infer.log_likelihood(model, {"x0": jnp.zeros((len(latent["x"]), D)), **latent}, *args)
    assert set(result.log_likelihood) == set(expected)
    for name, values in result.log_likelihood.items():
        of_sites = values[0].reshape(*expected[name].shape, -1).sum(-1)  # here of each component
        np.testing.assert_allclose(of_sites, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["FAAPF", "GuidedPF", "Bootstrap"])
def test_others_take_any_likelihood(algorithm):
    assert_likelihoods(run(any_likelihood, (Y,), algorithm, diffusion=algorithm == "FAAPF"), any_likelihood, Y)


@pytest.mark.parametrize(
    ("feature", "algorithm"),
    [
        ("counts as whole numbers", "FAAPF"),
        *((feature, "Bootstrap") for feature in list(PARTLY)[-3:]),
    ],
)
def test_others_take_what_some_refuse(feature, algorithm):
    model, args, messages = PARTLY[feature]
    assert algorithm not in messages
    assert_likelihoods(run(model, args, algorithm), model, *args)


@pytest.mark.parametrize("algorithm", FILTERS)
def test_forecasting_past_the_last_observation(plain_runs, algorithm):
    """NaN at the end: the analysis before is the same, and the spread then grows to that of the climate."""
    longer = plain_runs(algorithm, NAN_TAIL).posterior["x"]
    np.testing.assert_allclose(longer[:, :, :STEPS], plain_runs(algorithm, Y).posterior["x"], atol=2e-5)
    assert longer.shape[2] == STEPS + 2
    assert longer[0, :, -1].std(0).mean() > longer[0, :, STEPS - 1].std(0).mean()


WITHOUT_A_FILTER = {
    "`Predictive`, nothing observed": lambda: numpyro.infer.Predictive(plain, num_samples=3)(
        KEY, jnp.full_like(Y, jnp.nan)
    ),
    "`Predictive` at given trajectories": lambda: numpyro.infer.Predictive(
        plain, posterior_samples={"x": jnp.zeros((2, STEPS, D)), "x0": jnp.zeros((2, D))}
    )(KEY, jnp.asarray(Y)),
    "`log_likelihood` of given trajectories": lambda: numpyro.infer.log_likelihood(
        plain, {"x": jnp.zeros((2, STEPS, D)), "x0": jnp.zeros((2, D))}, jnp.asarray(Y)
    ),
    "`handlers.trace` and `handlers.seed`": lambda: {
        name: site["value"]
        for name, site in handlers.trace(handlers.seed(plain, KEY)).get_trace(jnp.asarray(Y)).items()
        if site["type"] == "sample"
    },
    "`handlers.replay` of a trace": lambda: {
        "x": handlers.trace(
            handlers.replay(
                handlers.seed(plain, KEY), handlers.trace(handlers.seed(plain, KEY)).get_trace(jnp.asarray(Y))
            )
        ).get_trace(jnp.asarray(Y))["x"]["value"]
    },
    "`handlers.block` of the observations": lambda: {
        name: jnp.asarray(site["value"])
        for name, site in handlers.trace(handlers.block(handlers.seed(plain, KEY), hide=["y"]))
        .get_trace(jnp.asarray(Y))
        .items()
        if site["type"] == "sample"
    },
}


@pytest.mark.parametrize("feature", WITHOUT_A_FILTER)
def test_the_program_is_an_ordinary_one(feature):
    values = WITHOUT_A_FILTER[feature]()
    assert values
    given_as_nan = {"y"} if "Predictive`, nothing" in feature else set()
    for name, value in values.items():
        assert name in given_as_nan or jnp.all(jnp.isfinite(value)), name
    if "block" in feature:
        assert "y" not in values


def table() -> str:
    rows = ["| in a program | " + " | ".join(FILTERS) + " |", "|---|" + "---|" * len(FILTERS)]
    same = [*SAME, "missing observations (NaN), and forecasting past the last one"]
    rows += [f"| {feature} |" + " yes |" * len(FILTERS) for feature in same]
    for feature, (_, _, messages) in PARTLY.items():
        rows.append(f"| {feature} | " + " | ".join("refused" if a in messages else "yes" for a in FILTERS) + " |")
    rows += [f"| {feature} |" + " refused |" * len(FILTERS) for feature in REFUSED]
    rows += ["", "| the same program without a filter | |", "|---|---|"]
    rows += [f"| {feature} | yes |" for feature in WITHOUT_A_FILTER]
    return "\n".join(rows)


def test_the_page_holds_this_table():
    assert table() in PAGE.read_text(), f"docs/numpyro.md should hold:\n\n{table()}"
