"""Observations that move: a taper with the places of each step, and metadata of each step in results."""

from __future__ import annotations

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import compilations
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.inference import keeping, records
from numpyro_diffusion_da.smc import Boxcar, Correlation, GaspariCohn, moving_search

D, T = 12, 3
SITES = np.arange(D)
RING = ndda.Ring(D)


def model(at):
    """Three values of ships, two of moorings, and a pair of the first ship whose errors are correlated."""
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(D), 1.0).to_event(1))

    def step(x, at):
        x = numpyro.sample("x", dist.Normal(0.9 * jnp.roll(x, 1), 0.5).to_event(1))
        place = numpyro.deterministic("y_place", at["place"])
        numpyro.deterministic("pair_place", place[:1])
        numpyro.deterministic("station", at["station"])
        numpyro.deterministic("size", jnp.abs(x).mean())
        here = jnp.nan_to_num(place).astype(int)
        numpyro.sample("y", dist.Normal(x[here], at["error"]).to_event(1), obs=at["y"])
        numpyro.sample("z", dist.Normal(x[jnp.array([1, 7])], 0.5).to_event(1), obs=at["z"])
        pair = jnp.stack([x[here[0]], 2.0 * x[here[0]]])
        numpyro.sample("pair", dist.MultivariateNormal(pair, jnp.array([[1.0, 0.5], [0.5, 1.0]])), obs=at["pair"])
        return x, None

    scan(step, x0, at)


def inputs():
    """Places that are not whole numbers; a missing value without a place, and a step at which nothing is seen."""
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(T, n)).astype(np.float32) for name, n in (("y", 3), ("z", 2), ("pair", 2))}
    place = np.array([[0.0, 4.5, 8.0], [11.25, 3.0, np.nan], [5.0, np.nan, 9.0]], np.float32)
    values["y"][1, 2] = np.nan
    for value in values.values():
        value[2] = np.nan
    error = np.array([[0.5], [0.3], [0.4]], np.float32) * np.ones(3, np.float32)
    return {**values, "place": place, "station": np.arange(3 * T).reshape(T, 3), "error": error}


AT = inputs()
RADII = {"y": 1.5, "z": 1.0, "pair": 2.0}


def taper(y="y_place", pair="pair_place", **settings):
    return ndda.Taper(RADII, RING, {"y": y, "z": [1, 7], "pair": pair}, state=SITES, **settings)


def moment(taper, **settings):
    return ndda.FAAPF(model, taper=taper, target_ess=0.5, **settings)


FILTERS = {
    "EnKF, perturbed": lambda taper: ndda.EnKF(model, taper=taper),
    "EnKF, square root, checked": lambda taper: ndda.GrossErrorCheck(
        ndda.EnKF(model, taper=taper, update=ndda.smc.SquareRoot()), threshold=2.0
    ),
    "FAAPF, blocks": lambda taper: moment(taper, block_radius=1.0),
    "FAAPF, likelihood tempering, checked": lambda taper: ndda.GrossErrorCheck(
        moment(taper, tempering=ndda.smc.LikelihoodTempering())
    ),
}


QUICK = ("EnKF, perturbed",)


def filtered(name, **settings):
    run = ndda.Filter(FILTERS[name](taper()), num_particles=16, progress_bar=False, **settings)
    run.run(jax.random.key(0), AT)
    return run


def at_time(t, at=AT):
    return {name: value[t : t + 1] for name, value in at.items()}


@pytest.fixture(scope="module")
def moved():
    """A filter that has run."""
    return filtered("EnKF, perturbed", keep=["x", "station"])


# --- positions --------------------------------------------------------------------------------------------------------


class Askey(Correlation):
    """A correlation function written for numpy alone."""

    def __call__(self, ratio):
        return np.maximum(1.0 - 0.5 * np.asarray(ratio), 0.0) ** 2


def both(radius, distance, correlation, sites, state, moving):
    """(constant placed taper, the same with sites in `moving` traced, its arrays as a compiled function has them)."""
    places = {name: np.asarray(rows, np.float64) for name, (rows, _) in sites.items()}
    observed = {name: form for name, (_, form) in sites.items()}
    fixed = ndda.Taper(radius, distance, places, state=state, correlation=correlation).place(state.shape[:1], observed)
    named = {name: f"{name} place" if name in moving else rows for name, rows in places.items()}
    taper = ndda.Taper(radius, distance, named, state=state, correlation=correlation)

    def arrays(given):
        placed = taper.place(state.shape[:1], observed, places=given)
        near = placed.neighborhoods()
        np.testing.assert_array_equal(near.which, np.tile(np.arange(len(placed.radii)), (len(placed.points), 1)))
        return near.weights, placed.between_observations(), placed.placed()

    return fixed, jax.jit(arrays)({f"{name} place": np.float32(places[name]) for name in moving})


GLOBE = np.stack([np.repeat([-60.0, 0.0, 45.0, 89.0], 5), np.tile([0.0, 90.0, 179.0, 200.0, 350.0], 4)], -1)
HIGH = np.concatenate([GLOBE, np.tile([0.0, 1.0, 2.0, 3.0], 5)[:, None]], -1)
Y = ((6,), 1)


@pytest.mark.parametrize(
    ("radius", "distance", "correlation", "sites", "state", "moving"),
    [
        (1.3, RING, GaspariCohn(), {"y": (SITES[::2] + 0.25, Y)}, SITES, ["y"]),
        ({"y": 1.3, "z": 2.1}, RING, Boxcar(), {"y": (SITES[::2], Y), "z": ([3, 5], ((2, 3), 3))}, SITES, ["z"]),
        ({"y": 1.3, "z": 9.0}, RING, GaspariCohn(), {"y": (25.0, ((), 1)), "z": ([2], ((3,), 3))}, SITES, ["z", "y"]),
        (0.7, ndda.Euclidean(), GaspariCohn(), {"y": (HIGH[:3] / 50, ((3, 2), 2))}, HIGH / 50, ["y"]),
        (2500.0, ndda.GreatCircle(), GaspariCohn(), {"y": (GLOBE[::3] * 0.9 + 7, ((7,), 1))}, GLOBE, ["y"]),
        (2500.0, ndda.GreatCircle(), GaspariCohn(), {"y": ([44.0, 170.0], ((), 1))}, GLOBE, ["y"]),
        (3e3, ndda.smc.WithHeight(ndda.GreatCircle(), 900), GaspariCohn(), {"y": (HIGH[::3], ((7,), 1))}, HIGH, ["y"]),
    ],
)
def test_positions_in_a_compiled_function_are_those_of_numpy(radius, distance, correlation, sites, state, moving):
    fixed, (weights, between, placed) = both(radius, distance, correlation, sites, state, moving)
    dense = fixed.taper(fixed.points)
    assert 0 < np.count_nonzero(dense) < dense.size
    np.testing.assert_allclose(weights, dense, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(weights) > 0, dense > 0)
    np.testing.assert_allclose(between, fixed.between_observations(), atol=2e-6)
    assert np.all(placed)


def test_a_place_that_is_not_finite_has_no_weight():
    rows = np.array([[0.0, 0.0], [np.nan, 0.0], [0.0, np.inf]], np.float32)
    taper = ndda.Taper(2.0, ndda.Euclidean(), {"y": "at"}, state=np.zeros((2, 2)))

    def arrays(rows):
        placed = taper.place((2,), {"y": ((3,), 1)}, places={"at": rows})
        return placed.placed(), placed.neighborhoods().weights, placed.between_observations()

    with jax.debug_nans(True):
        placed, weights, between = jax.jit(arrays)(rows)
    np.testing.assert_array_equal(placed, [True, False, False])
    np.testing.assert_array_equal(weights, [[1, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(between, np.diag([1, 0, 0]))


def test_functions_of_numpy_alone_are_refused_for_places_that_move():
    taper = ndda.Taper(2.0, RING, {"y": "at"}, state=SITES, correlation=Askey())
    with pytest.raises(TypeError, match=r"Ring or Askey is written for numpy arrays .*; write both with jax.numpy"):
        jax.jit(lambda at: taper.place((D,), {"y": Y}, places={"at": at}).taper(SITES[:, None]))(jnp.zeros(6))


def search_with_room(room):
    """A taper whose six places of observations move, too many for all pairs to be held, and its neighborhoods."""
    taper = ndda.Taper(2.0, RING, {"y": "at"}, state=SITES, most_near=room)
    return jax.jit(lambda at: taper.place((D,), {"y": Y}, places={"at": at}).neighborhoods())


def scattered(seed):
    return np.random.default_rng(seed).normal(size=(45, 2))


EDGES = np.concatenate([GLOBE * [0.98, 1.01], [[90, 10], [-90, 3], [0, 180], [0, -180]]])


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize(
    ("distance", "radius", "state", "rows"),
    [
        (RING, 0.6, np.linspace(-5, 30, 40)[:, None], np.linspace(0, 11.9, 50)[:, None]),
        (ndda.Euclidean(), 0.3, scattered(0), scattered(1)),
        (ndda.GreatCircle(), 800.0, GLOBE, EDGES),
        (ndda.GreatCircle(1.0), 0.6, GLOBE, np.tile(GLOBE[:5], (4, 1))),  # copies, and a reach beyond a quarter
        (
            ndda.smc.WithHeight(ndda.GreatCircle(), 900),
            1500.0,
            HIGH,
            np.tile(HIGH + np.array([[1.0, 2.0, 0.3]]), (2, 1)),
        ),
    ],
)
def test_a_search_in_the_step_finds_what_is_near(monkeypatch, embedded, distance, radius, state, rows):
    """Against fixed places: small chunks, places that are not finite, and all pairs; two tapers, just enough room."""
    monkeypatch.setattr(moving_search, "CHUNK", 4)
    if not embedded:
        distance = type("AllPairs", (type(distance),), {"embedded": lambda self, at: None})(**vars(distance))
    m, form = len(rows), {"y": ((len(rows),), 1)}
    rows, lost = np.float32(rows), np.arange(m) % 5 == 1
    fixed = ndda.Taper(radius, distance, {"y": rows}, state=state).place(state.shape[:1], form)
    apart = distance(fixed.points, rows)
    room = int(np.sum(apart[:, ~lost] <= 2.0 * radius * 1.001, axis=1).max())
    taper = ndda.Taper(radius, distance, {"y": "at"}, state=state, most_near=room)

    def found(at):
        wide, small = (
            t.place(state.shape[:1], form, places={"at": at}) for t in (taper, taper.with_radius(0.5 * radius))
        )
        assert wide.width() == room < m
        return wide.neighborhoods_with(state, small)

    which, *values = jax.jit(found)(np.where(lost[:, None], np.nan, rows))
    assert which.shape == (len(state), room)
    for weights, c in zip(values, (radius, 0.5 * radius), strict=True):
        rebuilt = np.zeros(apart.shape)
        np.add.at(rebuilt, (np.arange(len(state))[:, None], which), weights)
        np.testing.assert_allclose(rebuilt, np.where(lost, 0.0, fixed.correlation(apart / c)), atol=1e-5)


@pytest.mark.slow
def test_observations_without_room_are_an_error():
    """Never left out in silence: the number that is needed is named, under vmap too."""
    near = np.full((2, 6), 3.0, np.float32)
    near[1, :4] = 9.0
    np.testing.assert_array_equal(np.sum(search_with_room(6)(near[0]).weights > 0, 1), 6 * (abs(SITES - 3.0) < 4))
    with pytest.raises(Exception, match=r"6 observations are near one place, and the step has room for 5; give Taper"):
        jax.block_until_ready(search_with_room(5)(near[0]))
    with pytest.raises(Exception, match=r"6 observations are near one place, and the step has room for 4"):
        jax.block_until_ready(jax.vmap(search_with_room(4))(near))
    for wrong, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="Taper got most_near="):
            ndda.Taper(2.0, RING, {"y": "at"}, most_near=wrong)


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in FILTERS if n not in QUICK)]
)
def test_a_constant_taper_at_each_step_is_the_same(name, request):
    """Another taper at each step of an `OnlineFilter` gives the second step of the run, padding at any place."""
    run = request.getfixturevalue("moved") if name in QUICK else filtered(name)
    place = np.nan_to_num(AT["place"], nan=2.0)
    _, run_key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))
    x = run.result.posterior["x"][0]
    online = ndda.OnlineFilter(FILTERS[name](taper(place[1], place[1, :1])), num_particles=16)
    state, _ = online.step(jax.random.fold_in(run_key, 1), ndda.smc.init(jnp.asarray(x[:, 0])), at_time(1))
    np.testing.assert_allclose(x[:, 1], state.particles, atol=2e-5)
    assert np.isfinite(x).all()


@pytest.mark.slow
def test_steps_made_online_take_the_places_of_their_inputs(moved):
    """All steps are those of the run, the last one, where nothing is seen, included."""
    init_key, run_key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))
    online = ndda.OnlineFilter(FILTERS["EnKF, perturbed"](taper()), num_particles=16)
    state = online.init(init_key, at_time(0))
    for t in range(T):
        state, _ = online.step(jax.random.fold_in(run_key, t), state, at_time(t))
        np.testing.assert_allclose(moved.result.posterior["x"][0, :, t], state.particles, atol=2e-5)
    lost = at_time(0) | {"place": AT["place"][1:2]}
    with pytest.raises(ValueError, match=r"site 'y' has 1 observed value whose place in the site 'y_place' is not"):
        online.step(jax.random.key(0), state, lost)


@pytest.mark.slow
def test_kernels_take_a_function_of_the_observation():
    """Toy kernels: the observation is (values, places); a function of it is what a constant at its places is."""
    x = np.random.default_rng(0).normal(size=(8, D)).astype(np.float32)
    state, observation = ndda.smc.init(jnp.asarray(x)), (jnp.array([0.5, -1.0]), jnp.array([3.0, 8.5]))
    named = ndda.Taper(1.5, RING, {"y": "at"}, state=SITES)
    fixed = ndda.Taper(1.5, RING, {"y": [3.0, 8.5]}, state=SITES).place((D,), {"y": ((2,), 1)})

    searched = dataclasses.replace(named, most_near=1)  # no place is near both

    def moving(taper, observation):
        return taper.place((D,), {"y": ((2,), 1)}, places={"at": observation[1]})

    def log_predictive(x, observation):
        return -0.5 * (observation[0] - x[:2]) ** 2, ()

    def at(placed):
        return ndda.smc.LocalAncestors.at(placed, (D,), 1.0)

    def step(kernel):
        return jax.jit(kernel)(jax.random.key(0), state, observation)[0].particles

    kernels = [
        ndda.smc.fa_apf.build_kernel(log_predictive, lambda key, x, y: (x, ()), local=local)
        for local in (
            at(fixed),
            lambda observation: at(moving(named, observation)),
            lambda observation: at(moving(searched, observation)),
        )
    ]
    found = [step(kernel) for kernel in kernels]
    np.testing.assert_array_equal(*found[:2])
    np.testing.assert_array_equal(*found[1:])
    assert np.any(found[0] != x)


@pytest.mark.slow
def test_places_compile_nothing_anew(moved):
    other = {**AT, "place": (AT["place"] + 3.3).astype(np.float32)}
    again = copy.copy(moved)
    with compilations() as compiled:
        again.run(jax.random.key(0), other)
    assert not compiled
    np.testing.assert_array_equal(again.result.metadata["y_place"], other["place"])
    assert np.abs(again.result.posterior["x"] - moved.result.posterior["x"])[:, :, 1:].max() > 0.01


def test_an_observed_value_without_a_place_is_refused(moved):
    again = copy.copy(moved)
    for step, place in ((0, np.nan), (1, np.inf)):
        other = {**AT, "place": AT["place"].copy()}
        other["place"][step, 1] = place
        sentence = rf"site 'y' has 1 observed value at step {step} whose place in the site 'y_place' is not finite"
        with pytest.raises(ValueError, match=sentence):
            again.run(jax.random.key(0), other)


def sources(y):
    """A program with deterministic sites of every kind."""
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(D), 1.0).to_event(1))

    def step(carry, at):
        y, place = at
        clock, x = carry
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x[:4].reshape(2, 2), 0.5).to_event(2), obs=y)
        error = jnp.array([[1.0, 0.5], [0.5, 1.0]])
        numpyro.sample("pair", dist.MultivariateNormal(x[:4].reshape(2, 2), error).to_event(1), obs=y)
        for name, value in (
            ("good", place),
            ("of the state", 0.0 * x[:4]),
            ("of the carry", jnp.arange(4) + clock),
            ("of the first state", x0[:4]),
            ("flags", place > 1),
            ("words", {"a": place}),
            ("three", place[:3]),
            ("pairs", jnp.stack([place, place], -1)),
        ):
            numpyro.deterministic(name, value)
        return (clock + 1, x), None

    scan(step, (jnp.zeros((), int), x0), y)


@pytest.fixture(scope="module")
def structure():
    return ndda.program.StateSpaceModel(sources, ((np.zeros((T, 2, 2)), np.zeros((T, 4))),))


@pytest.mark.parametrize(
    ("observations", "sentence"),
    [
        (
            {"y": "godo"},
            r"places of 'y' from .* 'godo', but the body .* has the deterministic sites 'good', 'of the st",
        ),
        ({"y": "of the state"}, "from the deterministic site 'of the state', which depends on the latent site 'x'; co"),
        ({"y": "of the carry"}, "'of the carry', which depends on the carry of the scan; compute places from the inpu"),
        ({"y": "of the first state"}, "'of the first state', which depends on the latent site 'x0'; compute places"),
        ({"y": "flags"}, "'flags', which holds values of type bool; give one array of real positions"),
        ({"y": "words"}, "'words', which holds no array; give one array of real positions"),
        ({"y": "three"}, r"3 positions of site 'y' \(from the deterministic site 'three'\), .* \(2, 2\); give 4"),
        ({"y": "pairs"}, r"shape \(4, 2\) for site 'y' \(from .* 'pairs'\); a position of Ring is one number"),
        ({"y": "good"}, r"no positions of the observed site 'pair'"),
        (
            {"y": "good", "pair": "good"},
            "'pair' has correlated errors between 2 values, but .* 'good' gives each of th",
        ),
    ],
)
def test_sites_that_hold_no_places_are_refused(structure, observations, sentence):
    taper = ndda.Taper(1.5, RING, observations, state=SITES)
    with pytest.raises(ValueError, match=sentence):
        ndda.EnKF(sources, taper=taper).kernel(structure)


def test_metadata_are_what_all_particles_share(structure):
    """Found by what a value depends on; `words` is no array."""
    assert structure.structure.metadata_names == ("good", "flags", "three", "pairs")


def test_a_taper_in_attributes_names_its_site():
    assert "y=positions in the site 'y_place', z=[2 positions, " in repr(taper())
    assert taper().moving == {"y": "y_place", "pair": "pair_place"}


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_results_hold_metadata_and_errors_of_each_step(moved, tmp_path):
    result = moved.result
    assert list(result.posterior) == ["x"]  # as `keep` says; metadata are kept in any case
    assert set(result.metadata) == {"y_place", "pair_place", "station"}
    np.testing.assert_array_equal(result.metadata["y_place"], AT["place"])
    np.testing.assert_array_equal(result.metadata["station"], AT["station"])
    assert result.metadata["station"].dtype.kind == "i"
    np.testing.assert_array_equal(result.observed_error["y"], AT["error"])
    tree = moved.to_datatree(dims={"station": ["ship"], "y": ["ship"]}, coords={"ship": ["a", "b", "c"]})
    np.testing.assert_array_equal(tree["constant_data/y_place"], AT["place"])
    np.testing.assert_array_equal(tree["constant_data/y_error"], AT["error"])
    assert tree["constant_data/station"].dims == ("time", "ship")
    assert "y_place" not in tree["posterior"]
    for _ in range(2):  # the second one reads all steps
        stored = copy.copy(moved)
        stored.directory = tmp_path
        stored.run(jax.random.key(0), AT)
        jax.tree.map(np.testing.assert_array_equal, stored.result.metadata, result.metadata)


def test_names_of_sites_to_keep_and_of_metadata_are_checked(structure):
    keep = keeping.Keep({"good": ndda.inference.Kept()}, True, False, structure.structure.metadata_names)
    with pytest.raises(ValueError, match=r"keep names \['good'\] only, .* a site that particles have, one of \['x'\]"):
        keep.of({"posterior": {"x": jnp.zeros(2)}})
    with pytest.raises(ValueError, match=r"keep names \['bad'\], but .* sites are \['flags', 'good', 'pairs', "):
        keep._replace(sites=("x", "bad")).of({"posterior": {"x": jnp.zeros(2)}})
    form = structure.structure.deterministic["good"]
    taken = dataclasses.replace(structure.structure, deterministic={"pair_error": form})
    with pytest.raises(ValueError, match="'pair_error' has the name under which results hold the standard deviations"):
        records.check_metadata_names(taken)
