"""The global parameters of a program: which they are, their prior, and what a filter says of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.program import GlobalParameters, StateSpaceModel

KEY = jax.random.key(0)
Y = np.zeros((4, 3), np.float32)


def steps(x0, y, error=0.5, drift=0.0):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x + drift, 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x, error).to_event(1), obs=y_t)
        return x, None

    scan(step, x0, y)


def everything(y, measured=0.7):
    """A hierarchy, a simplex, a vector, an interval whose end is a parameter, and what is no parameter."""
    width = numpyro.sample("width", dist.HalfNormal(1.0))
    spread = numpyro.sample("spread", dist.Gamma(2.0, 1.0))
    with numpyro.plate("components", 3):
        error = numpyro.sample("error", dist.LogNormal(0.0, spread))
    end = numpyro.sample("end", dist.Exponential(1.0))
    inside = numpyro.sample("inside", dist.Uniform(-end, end))
    mix = numpyro.sample("mix", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    numpyro.sample("gauge", dist.Normal(inside, 0.1), obs=measured)
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(3), width).to_event(1))
    steps(x0, y, error, inside * mix)


def test_which_sites_are_parameters():
    program = StateSpaceModel(everything, (Y,))
    assert program.structure.global_names == ("spread", "error", "end", "inside", "mix")
    assert program.structure.initial_names == ("width", "x0")
    assert program.structure.outside_names == ("gauge",)
    assert GlobalParameters(program).size == 1 + 3 + 1 + 1 + 2
    known = handlers.condition(everything, {"error": jnp.ones(3)})
    program = StateSpaceModel(known, (Y,))
    assert (program.structure.global_names, program.structure.needed_names) == (
        ("spread", "end", "inside", "mix"),
        ("end", "inside", "mix"),
    )
    # All that the scan needs is known: what the spread was drawn from does not matter to a filter.
    known = handlers.condition(known, {"inside": 0.0, "mix": jnp.ones(3) / 3})
    StateSpaceModel(known, (Y,)).check(needs_dynamics=True)


def test_prior_and_transforms():
    parameters = GlobalParameters(StateSpaceModel(everything, (Y,)))

    @jax.jit
    def at(key):
        """What the code says, and the same by hand: each density, and the derivative of each transform."""
        position = parameters.draw(key)
        values = parameters.values(position)
        gauge = dist.Normal(values["inside"], 0.1)
        expected = (
            gauge.log_prob(0.7)
            + dist.Gamma(2.0, 1.0).log_prob(values["spread"])
            + jnp.sum(dist.LogNormal(0.0, values["spread"]).log_prob(values["error"]))
            + dist.Exponential(1.0).log_prob(values["end"])
            + dist.Uniform(-values["end"], values["end"]).log_prob(values["inside"])
            + dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])).log_prob(values["mix"])
        )
        share = (values["inside"] + values["end"]) / (2 * values["end"])
        stick = dist.biject_to(dist.constraints.simplex)
        expected += jnp.log(values["spread"]) + jnp.sum(jnp.log(values["error"])) + jnp.log(values["end"])
        expected += jnp.log(2 * values["end"] * share * (1 - share))
        expected += stick.log_abs_det_jacobian(stick.inv(values["mix"]), values["mix"])
        other = parameters.at((Y,), {"measured": 0.2})
        pairs = {
            "prior": (parameters.log_prior(position), expected),
            "outside": (parameters.log_outside(position), gauge.log_prob(0.7)),
            "other arguments": (other.log_outside(position), gauge.log_prob(0.2)),
        }
        return values, pairs

    values, pairs = jax.device_get(at(KEY))
    assert values["mix"].sum() == pytest.approx(1.0)
    assert abs(values["inside"]) < values["end"]
    for name, (got, expected) in pairs.items():
        np.testing.assert_allclose(got, expected, rtol=1e-4, err_msg=name)


def test_filters_refuse_and_say_what_to_do():
    def model(y):
        error = numpyro.sample("error", dist.HalfNormal(1.0))
        steps(numpyro.sample("x0", dist.Normal(jnp.zeros(3), 1.0).to_event(1)), y, error)

    for filter in (
        ndda.Filter(ndda.Bootstrap(model), num_particles=2),
        ndda.OnlineFilter(ndda.Bootstrap(model), num_particles=2),
    ):
        with pytest.raises(ValueError, match=r"'error'.*handlers\.condition.*or infer it with ndda\.PMMH"):
            getattr(filter, "run", getattr(filter, "init", None))(KEY, Y)


def test_no_parameters_and_discrete_ones():
    def without(y):
        steps(numpyro.sample("x0", dist.Normal(jnp.zeros(3), 1.0).to_event(1)), y)

    with pytest.raises(ValueError, match="no parameter to infer"):
        GlobalParameters(StateSpaceModel(without, (Y,)))

    def discrete(y):
        regime = numpyro.sample("regime", dist.Bernoulli(0.5))
        steps(numpyro.sample("x0", dist.Normal(jnp.zeros(3), 1.0).to_event(1)), y, 0.5 + regime)

    with pytest.raises(ValueError, match="'regime' of 'discrete' is discrete"):
        GlobalParameters(StateSpaceModel(discrete, (Y,)))


def test_linear_observations_are_recognized():
    def model(y, observe):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(jnp.sin(x), 0.5).to_event(1))
            observe(x, y_t)
            return x, None

        scan(step, numpyro.sample("x0", dist.Normal(jnp.zeros(3), 1.0).to_event(1)), y)

    def site(mean, error=0.5):
        def observe(x, y_t):
            numpyro.sample("y", dist.Normal(mean(x), error(x) if callable(error) else error).to_event(1), obs=y_t)

        return observe

    shift = 2.0 * jnp.eye(3)
    for observe, linear in (
        (site(lambda x: x), True),
        (site(lambda x: shift @ jnp.where(jnp.arange(3) > 0, x, 0.0) + 1.0), True),
        (site(lambda x: jnp.roll(x, 1)), True),
        (site(lambda x: x**2), False),
        (site(lambda x: x, lambda x: 0.1 + jnp.abs(x)), False),
    ):
        assert StateSpaceModel(model, (Y, observe)).structure.observes_linearly is linear
