"""What each filter does to each array of a carry; the table in docs/numpyro.md is generated here.

A linear-Gaussian program on a ring of four points, with everything a carry may hold, is filtered by every filter. What
happened to an array is read off the particles.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda

KEY = jax.random.key(0)
PAGE = Path(__file__).parent.parent / "docs" / "numpyro.md"
D = 4
Y = np.full((1, D), 2.0, np.float32)
N = 64
TAPER = ndda.Taper(0.6, ndda.Ring(D), {"y": np.arange(D)}, state=np.arange(D))


def program(**held):
    """Program whose carry holds the state and the given parts, and whose observations depend on the parameters."""

    def model(y):
        x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        first = {"state": x0}
        if "frames" in held:
            first["before"] = numpyro.sample("x_before", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        if "parameter" in held:
            first["bias"] = numpyro.sample("bias", dist.Normal(0.0, 3.0))
        if "clock" in held:
            first["clock"] = jnp.asarray(0.5)
        if "key" in held:
            first["key"] = jax.random.key(1)
        if "count" in held:
            first["count"] = (x0[0] > 0).astype(int)

        def step(carry, y_t):
            before = carry.get("before", 0.0)
            x = numpyro.sample("x", dist.Normal(0.9 * carry["state"] + 0.05 * before, 0.5).to_event(1))
            mean = x + carry.get("bias", 0.0) + 0.0 * carry.get("clock", 0.0)
            numpyro.sample("y", dist.Normal(mean, 0.3).to_event(1), obs=y_t)
            new = {**carry, "state": x}
            if "before" in carry:
                new["before"] = carry["state"]
            if "clock" in carry:
                new["clock"] = carry["clock"] + 1.0
            if "count" in carry:
                new["count"] = carry["count"] + 1
            return new, None

        scan(step, first, y)

    return model


FILTERS = {
    "Bootstrap": lambda model: ndda.Bootstrap(model),
    "GuidedPF": lambda model: ndda.GuidedPF(model),
    "FAAPF": lambda model: ndda.FAAPF(model, target_ess=0.0),
    "FAAPF, taper": lambda model: ndda.FAAPF(model, target_ess=0.0, taper=TAPER),
    "EnKF": lambda model: ndda.EnKF(model, update=ndda.smc.SquareRoot()),
    "EnKF, taper": lambda model: ndda.EnKF(model, update=ndda.smc.SquareRoot(), taper=TAPER),
}
PARTS = {
    "state": ("the state", {}),
    "before": ("an earlier state (two frames)", {"frames": 1}),
    "bias": ("a parameter", {"parameter": 1}),
    "clock": ("a clock, the same for all", {"clock": 1}),
    "key": ("a random key", {"key": 1}),
    "count": ("a whole number that differs", {"count": 1}),
}
EVERYTHING = {key: 1 for _, held in PARTS.values() for key in held}


def step(make, held):
    online = ndda.OnlineFilter(make(program(**held)), num_particles=N)
    before = online.init(KEY, Y)
    after, info = online.step(KEY, before, Y)
    return before.particles, after.particles, info


def raw(leaf):
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def word(part, before, after, info):
    """What a filter did to one part of the carry."""
    if part == "state":
        return "drawn" if np.ptp(info.log_weights) > 0 else "moved"
    source = before["state"] if part == "before" else before[part]  # where its next value comes from
    grown = {"clock": 1.0, "count": 1}.get(part, 0)
    old, new = raw(source) + (grown if part != "key" else 0), raw(after[part])
    ancestors = np.asarray(info.ancestors)
    if part == "clock":
        np.testing.assert_allclose(new, old)
        return "the same"
    if ancestors.ndim == 1 and np.array_equal(new, old[ancestors]):
        return "selected" if np.any(ancestors != np.arange(N)) else "kept"
    if ancestors.ndim == 2 and new.shape[1:] == (D,) and np.array_equal(new, old[ancestors, np.arange(D)]):
        return "glued"
    return "kept" if np.array_equal(new, old) else "moved"


@pytest.fixture(scope="module")
def cells():
    found = {}
    for name, make in FILTERS.items():
        local = "taper" in name
        held = {k: v for k, v in EVERYTHING.items() if not (local and k == "parameter")}
        before, after, info = step(make, held)
        found[name] = {part: word(part, before, after, info) for part in PARTS if part in before}
        if local:
            with pytest.raises(ValueError, match=r"with a taper, .* carry\['bias'\]"):
                step(make, {"parameter": 1})
            found[name]["bias"] = "refused"
    return found


@pytest.mark.slow
def test_the_page_holds_this_table(cells):
    rows = ["| in the carry | " + " | ".join(FILTERS) + " |", "|---|" + "---|" * len(FILTERS)]
    rows += [f"| {title} | " + " | ".join(cells[f][part] for f in FILTERS) + " |" for part, (title, _) in PARTS.items()]
    table = "\n".join(rows)
    assert table in PAGE.read_text(), f"docs/numpyro.md should hold:\n\n{table}"


def posterior(y, prior, transition, observation, q, r):
    """Mean and covariance after one observation, for z' = transition z + noise q and y = observation z' + noise r."""
    p = transition @ prior @ transition.T + q
    gain = p @ observation.T @ np.linalg.inv(observation @ p @ observation.T + r)
    return gain @ y, p - gain @ observation @ p


@pytest.mark.parametrize("update", [ndda.smc.PerturbedObservations(), ndda.smc.SquareRoot()])
def test_an_ensemble_update_moves_a_parameter_and_an_earlier_state_as_a_kalman_filter(update):
    """(x, earlier x, bias) of one point, four times over: exact joint analysis at the first step."""
    model = program(frames=1, parameter=1)
    online = ndda.OnlineFilter(ndda.EnKF(model, update=update), num_particles=4000)
    state, _ = online.step(KEY, online.init(KEY, Y), Y)
    # Joint vector: x (4), the state before (4), the one before that (4), bias.
    prior = np.diag([0.0] * 4 + [1.0] * 8 + [9.0])
    eye, zero = np.eye(4), np.zeros((4, 4))
    column = np.zeros((4, 1))
    transition = np.block(
        [
            [zero, 0.9 * eye, 0.05 * eye, column],
            [zero, eye, zero, column],
            [zero, zero, eye, column],
            [column.T, column.T, column.T, np.ones((1, 1))],
        ]
    )
    noise = np.diag([0.25] * 4 + [0.0] * 9)
    observation = np.hstack([eye, zero, zero, np.ones((4, 1))])
    mean, cov = posterior(Y[0], prior, transition, observation, noise, 0.09 * np.eye(4))
    got = {name: np.asarray(leaf) for name, leaf in state.particles.items()}
    np.testing.assert_allclose(got["state"].mean(0), mean[:4], atol=0.06)
    np.testing.assert_allclose(got["before"].mean(0), mean[4:8], atol=0.06)
    assert got["bias"].mean() == pytest.approx(mean[12], abs=0.06)
    assert got["bias"].std() == pytest.approx(np.sqrt(cov[12, 12]), rel=0.1)
    np.testing.assert_allclose(got["before"].std(0), np.sqrt(np.diag(cov)[4:8]), rtol=0.1)


@pytest.mark.slow
def test_a_bias_in_the_carry_is_estimated_by_an_ensemble():
    """Twenty observations of 4 with a prior N(0, 3) of the bias: exact mean 3.89 and standard deviation .49."""

    def model(y):
        b = numpyro.sample("b", dist.Normal(0.0, 3.0))

        def step(carry, y_t):
            x, b = carry
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x + b, 0.3), obs=y_t)
            numpyro.deterministic("bias", b)
            return (x, b), None

        scan(step, (0.0, b), y)

    y = np.full(20, 4.0, np.float32)
    filter = ndda.Filter(ndda.EnKF(model), num_particles=2000, progress_bar=False)
    filter.run(KEY, y)
    transition, observation = np.diag([0.9, 1.0]), np.array([[1.0, 1.0]])
    m, p = np.zeros(2), np.diag([0.0, 9.0])
    for value in y:
        m, p = transition @ m, transition @ p @ transition.T + np.diag([0.25, 0.0])
        gain = p @ observation.T / (observation @ p @ observation.T + 0.09)
        m, p = m + gain[:, 0] * (value - observation[0] @ m), p - gain @ observation @ p
    bias = filter.result.posterior["bias"][0, :, -1]
    assert bias.mean() == pytest.approx(m[1], abs=0.1)
    assert bias.std() == pytest.approx(np.sqrt(p[1, 1]), rel=0.1)
    # A particle filter cannot move it, and says so; the inference of parameters says what to write.
    with pytest.warns(UserWarning, match=r"carries 'b' unchanged as carry\[1\].*PMMH"):
        ndda.Filter(ndda.Bootstrap(model), num_particles=8, progress_bar=False).run(KEY, y[:1])
    with pytest.raises(ValueError, match=r"carries 'b' unchanged as carry\[1\].*leave it out of the carry"):
        ndda.PMMH(ndda.Bootstrap(model), num_particles=8, num_warmup=1, num_samples=1).run(KEY, y)
