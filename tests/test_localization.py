"""Tapers, distances and positions: numpy against known answers; nothing is compiled."""

from __future__ import annotations

import pickle

import equinox as eqx
import numpy as np
import pytest

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.filters import placement
from numpyro_diffusion_da.smc import Boxcar, Correlation, GaspariCohn, gaspari_cohn, neighbor_search

RING = np.arange(12.0)
SPHERE = np.stack([np.repeat([-60.0, 0.0, 45.0, 89.0], 5), np.tile([0.0, 90.0, 179.0, 200.0, 350.0], 4)], -1)


def convolution(ratio: float) -> float:
    """What eq. 4.10 is: the correlation of the tent 1 - r on the unit ball of R^3 with itself, by quadrature."""
    step = 0.01
    along, off = np.arange(-1 + step / 2, 2 + ratio, step), np.arange(step / 2, 1, step)
    z, r = np.meshgrid(along, off)

    def tent(z):
        return np.maximum(1.0 - np.hypot(z, r), 0.0)

    return float(np.sum(r * tent(z) * tent(z - ratio)) / np.sum(r * tent(z) ** 2))


def test_gaspari_cohn():
    ratios = np.array([0.0, 0.3, 0.7, 1.0, 1.4, 1.9, 2.0, 50.0])
    values = gaspari_cohn(ratios)
    np.testing.assert_allclose(values, [convolution(z) for z in ratios], atol=2e-4)
    np.testing.assert_allclose(values[[0, 3, 6, 7]], [1.0, 5 / 24, 0.0, 0.0], atol=1e-12)
    fine = gaspari_cohn(np.linspace(0.0, 3.0, 3001))
    assert np.all(np.diff(fine) <= 0)
    assert np.all(fine >= 0)
    assert np.max(np.abs(np.diff(fine, 2))) < 4e-6  # the second derivative has no jump: at most 10/3 times 1e-6


class Askey(Correlation):
    """(1 - r / 2)^power, a correlation function that the library does not have."""

    power: float = eqx.field(static=True, default=2.0)

    def __call__(self, ratio):
        return np.maximum(1.0 - 0.5 * np.asarray(ratio), 0.0) ** self.power


def test_correlation_functions_of_a_taper():
    """Positions on a ring of 12, a half-width of 1.5: by hand. What a taper takes, neighborhoods take."""
    observed = {"y": ((2,), 1)}
    for given, expected in (
        ({"correlation": Boxcar()}, [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]),  # nearer than 3 = 2 x 1.5
        ({"correlation": Askey()}, [1, 4 / 9, 1 / 9, 0, 0, 0, 0, 0, 0, 0, 1 / 9, 4 / 9]),
        ({"correlation": GaspariCohn()}, gaspari_cohn(np.minimum(RING, 12 - RING) / 1.5)),
        ({}, gaspari_cohn(np.minimum(RING, 12 - RING) / 1.5)),
    ):
        placed = ndda.Taper(1.5, ndda.Ring(12), {"y": [0, 1]}, state=RING, **given).place((12,), observed)
        np.testing.assert_allclose(placed.taper(placed.points)[:, 0], expected, rtol=1e-15, atol=1e-15)
        np.testing.assert_allclose(placed.between_observations()[0], expected[:2], rtol=1e-15)
        near = placed.neighborhoods()
        rebuilt = np.zeros((12, 2))
        np.add.at(rebuilt, (np.arange(12)[:, None], near.which), near.weights)
        np.testing.assert_allclose(rebuilt[:, 0], expected, atol=1e-7)


def test_a_cutoff_is_no_covariance():
    """The matrix of a boxcar has negative eigenvalues: covariances must not be multiplied by it."""
    taper = ndda.Taper(1.0, ndda.Ring(12), {"y": RING}, state=RING, correlation=Boxcar())
    placed = taper.place((12,), {"y": ((12,), 1)})
    assert np.linalg.eigvalsh(placed.between_observations()).min() < -0.5
    assert not placed.correlation.is_positive_definite
    assert GaspariCohn().is_positive_definite
    members = np.zeros((2, 12), np.float32)
    with pytest.raises(ValueError, match=r"correlation=Boxcar\(\), .* give correlation=ndda.smc.GaspariCohn\(\), or"):
        ndda.smc.PerturbedObservations()(None, members, members, placed)


def test_distances():
    ring = ndda.Ring(12)(RING[:, None], RING[:, None])
    np.testing.assert_array_equal(ring[0], [0, 1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1])
    np.testing.assert_array_equal(ring, ring.T)
    np.testing.assert_array_equal(ndda.Ring(12)(np.array([[-1.0]]), np.array([[13.0]])), 2.0)  # numbers go on around
    straight = ndda.Euclidean()(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0], [1.0, 0.0]]))
    np.testing.assert_allclose(straight, [[5.0, 1.0]])
    paris, new_york, opposite = [48.8566, 2.3522], [40.7128, -74.0060], [-48.8566, -177.6478]
    apart = ndda.GreatCircle()(np.array([paris]), np.array([new_york, opposite, paris]))
    np.testing.assert_allclose(apart, [[5837.2, np.pi * 6371.0, 0.0]], rtol=1e-4)
    near = ndda.GreatCircle(1.0)(np.array([[0.0, 0.0]]), np.array([[0.0, 1e-5]]))
    np.testing.assert_allclose(near, np.radians(1e-5), rtol=1e-6)


@pytest.mark.parametrize(
    ("distance", "positions", "quarter"),
    [
        (ndda.Ring(12), RING[:, None], 3.0),
        (ndda.GreatCircle(1.0), SPHERE, np.pi / 2),
        (ndda.Euclidean(), np.random.default_rng(0).normal(size=(30, 3)), 3.0),
    ],
)
def test_a_taper_is_a_covariance(distance, positions, quarter):
    """Up to a quarter of the circle, as `Taper` says."""
    for radius in (0.1 * quarter, 0.5 * quarter, quarter):
        values = np.linalg.eigvalsh(gaspari_cohn(distance(positions, positions) / radius))
        assert values.min() > -1e-10


def test_neighborhoods_are_the_taper(monkeypatch):
    """Every pair within reach once, whatever the size of the blocks; rows of different lengths."""
    rng = np.random.default_rng(0)
    taper = ndda.Taper(0.2, ndda.Euclidean(), {"y": rng.uniform(size=(20, 2))}, state=rng.uniform(size=(30, 2)))
    placed = taper.place((30,), {"y": ((20,), 1)})
    dense = placed.taper(placed.points)
    reached = (dense > 0).sum(1)
    assert 0 <= reached.min() < reached.max() < 20
    for block in (2**22, 100, 1):
        monkeypatch.setattr(neighbor_search, "LARGEST_BATCH", block)
        placed._found.clear()
        near = placed.neighborhoods()
        assert near.which.shape == near.weights.shape == (30, reached.max())
        rebuilt = np.zeros((30, 20))
        for row, which, weights in zip(rebuilt, near.which, near.weights, strict=True):
            np.add.at(row, which, weights)
        np.testing.assert_allclose(rebuilt, dense, atol=1e-7)
    alone = ndda.Taper(0.1, ndda.Euclidean(), {"y": [9.0]}, state=[0.0, 1.0]).place((2,), {"y": ((1,), 1)})
    np.testing.assert_array_equal(alone.neighborhoods().weights, [[0.0], [0.0]])  # nobody near


def test_positions_of_the_state():
    """Given, or the coordinates of a layout; channels share the place of their point."""
    y = {"y": ((1,), 1)}
    prior = ndda.load_prior("lorenz96")
    ring = ndda.Taper(3.0, ndda.Ring(40), {"y": [7]})
    np.testing.assert_array_equal(ring.place((40,), y, placement.grid_axes(prior.layout)).points[:, 0], np.arange(40))
    grid = ndda.Layout(
        (2, 3, 4), ("lon", "lat", "channel"), (("lon", (0, 180)), ("lat", (-30, 0, 30)), ("channel", tuple("abcd")))
    )
    sphere = ndda.Taper(1000.0, ndda.GreatCircle(), {"y": [[30.0, 180.0]]}).place(
        grid.shape, y, placement.grid_axes(grid)
    )
    np.testing.assert_array_equal(sphere.points, [[-30, 0], [0, 0], [30, 0], [-30, 180], [0, 180], [30, 180]])
    np.testing.assert_array_equal(sphere.neighborhoods().weights[:, 0], [0, 0, 0, 0, 0, 1])
    given = ndda.Taper(1.0, ndda.Euclidean(), {"y": np.zeros((1, 1, 2))}, state=np.zeros((2, 3, 2)))
    assert given.place(grid.shape, y).points.shape == (6, 2)


def test_positions_of_observations():
    """In the order of the residuals; stations with several values, and events with a correlated error."""
    taper = ndda.Taper(2.0, ndda.Ring(12), {"wind": [4, 5], "t": RING[::6]}, state=RING)
    placed = taper.place((12,), {"t": ((2,), 1), "wind": ((2, 3), 3)})
    np.testing.assert_array_equal(placed.observations[:, 0], [0, 6, 4, 4, 4, 5, 5, 5])
    between = placed.between_observations()
    np.testing.assert_array_equal(between[2, 2:5], 1.0)
    np.testing.assert_allclose(between, between.T)


PLACES = {"y": RING[::2]}
ONE_SITE = {"y": ((6,), 1)}


@pytest.mark.parametrize(
    ("given", "site", "layout", "sentence"),
    [
        ({"state": RING, "observations": {}}, ONE_SITE, None, r"no positions of the observed site 'y'"),
        (
            {"state": RING, "observations": {**PLACES, "z": [1]}},
            ONE_SITE,
            None,
            r"positions of \['z'\], .* \['y'\]",
        ),
        ({"state": RING, "observations": {"y": [1, 2]}}, ONE_SITE, None, r"2 positions of site 'y', .* \(6,\); give 6"),
        ({"state": RING[:5], "observations": PLACES}, ONE_SITE, None, r"5 positions of the state, .* \(12,\); give 12"),
        ({"state": RING, "observations": PLACES}, {"y": ((6,), 6)}, None, r"site 'y' has correlated errors"),
        ({"observations": PLACES}, ONE_SITE, None, r"no positions of the state, and the transition has no prior"),
        ({"observations": PLACES}, ONE_SITE, ndda.Layout((12,), ("site",)), r"no numeric coordinates of 'site'"),
    ],
)
def test_places_are_refused(given, site, layout, sentence):
    with pytest.raises(ValueError, match=sentence):
        ndda.Taper(2.0, ndda.Ring(12), **given).place(
            (12,), site, None if "state" in given else placement.grid_axes(layout)
        )


def test_settings_are_refused():
    for radius in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="give a positive half-width"):
            ndda.Taper(radius, ndda.Ring(12), PLACES)
    with pytest.raises(TypeError, match=r"give ndda.Ring\(length\)"):
        ndda.Taper(1.0, 12, PLACES)
    for wrong in (gaspari_cohn, Boxcar, "boxcar"):
        with pytest.raises(TypeError, match=r"Taper got correlation=.*; expected a Correlation: write correlation="):
            ndda.Taper(1.0, ndda.Ring(12), PLACES, correlation=wrong)
    with pytest.raises(ValueError, match=r"shape \(6,\) for site 'y'; .* GreatCircle is \(latitude, longitude\)"):
        ndda.Taper(1.0, ndda.GreatCircle(), PLACES)
    with pytest.raises(ValueError, match="a position of Ring is one number"):
        ndda.Taper(1.0, ndda.Ring(12), {"y": np.zeros((3, 2))})
    with pytest.raises(ValueError, match="Taper got state with non-finite values, 1 of 1"):
        ndda.Taper(1.0, ndda.Ring(12), PLACES, state=[np.nan])
    with pytest.raises(ValueError, match="the same coordinates to all"):
        ndda.Taper(1.0, ndda.Euclidean(), PLACES, state=np.zeros((12, 2))).place((12,), ONE_SITE)
    with pytest.raises(ValueError, match="without latitude and longitude"):
        ndda.Taper(1.0, ndda.GreatCircle(), {"y": [[0, 0]]}).place((2,), {"y": ((1,), 1)}, {"x": np.array([0, 1])})
    swapped = {"y": [[45.0, 10.0], [120.0, 45.0]]}
    with pytest.raises(ValueError, match=r"position \[120.0, 45.0\] of site 'y', number 1, which is beyond the poles"):
        ndda.Taper(1.0, ndda.GreatCircle(), swapped)
    high = {"y": np.pad(swapped["y"], ((0, 0), (0, 1)))}
    with pytest.raises(ValueError, match="beyond the poles"):
        ndda.Taper(1.0, ndda.smc.WithHeight(ndda.GreatCircle(), 1.0), high)
    for wrong in (0.0, np.inf):
        with pytest.raises(ValueError, match="give its circumference"):
            ndda.Ring(wrong)
        with pytest.raises(ValueError, match="sphere_radius"):
            ndda.GreatCircle(wrong)


def test_a_taper_in_a_results_attributes():
    """In full: other positions are another text."""
    texts = [repr(ndda.Taper(2.0, ndda.Ring(12), {"y": RING[::2] + shift})) for shift in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(
        "Taper(radius=2, distance=Ring(length=12.0), correlation=GaspariCohn(), y=[6 positions, "
    )
    assert texts[0].endswith("state=layout)")
    for correlation, text in ((Boxcar(), "Boxcar()"), (Askey(), "Askey(power=2.0)"), (Askey(3.0), "Askey(power=3.0)")):
        assert f"correlation={text}, " in repr(ndda.Taper(2.0, ndda.Ring(12), PLACES, correlation=correlation))


@pytest.mark.parametrize("turn", [0.0, 360.0, -360.0])
def test_great_circles_know_every_convention_of_longitudes(turn):
    layout = ndda.Layout((3, 3), ("latitude", "longitude"), {"latitude": (80, 0, -80), "longitude": (-180, -10, 170)})
    taper = ndda.Taper(1000.0, ndda.GreatCircle(), {"y": [[80.0, 179.0 + turn]]})
    placed = taper.place((3, 3), {"y": ((1,), 1)}, layout.coords())
    near = placed.taper(placed.points).reshape(3, 3)
    one = ndda.Taper(1000.0, ndda.GreatCircle(), {"y": [[80.0, 179.0]]}).place(
        (3, 3), {"y": ((1,), 1)}, layout.coords()
    )
    np.testing.assert_allclose(near, one.taper(one.points).reshape(3, 3), atol=1e-9)
    assert near[0, 0] > 0.9  # across the date line
    assert near[0, 1] == near[1, 0] == 0.0


# --- searches by a tree -----------------------------------------------------------------------------------------------


def all_pairs(distance):
    """The same distance without embedded coordinates: all pairs are compared."""
    return type("AllPairs", (type(distance),), {"embedded": lambda self, positions: None})(**vars(distance))


def scattered(seed, count, kind):
    """Positions with copies of each other, at the poles and on both sides of the date line."""
    rng = np.random.default_rng(seed)
    if kind == "ring":
        rows = np.concatenate([rng.uniform(-20, 40, count), [0.0, 12.0, -12.0, 6.0]])[:, None]
    elif kind == "plane":
        rows = np.concatenate([rng.normal(size=(count, 2)), np.zeros((3, 2))])
    else:
        rows = np.stack([np.degrees(np.arcsin(rng.uniform(-1, 1, count))), rng.uniform(-180, 360, count)], -1)
        edges = [[90.0, 0.0], [90.0, 77.0], [-90.0, 5.0], [0.0, 180.0], [0.0, -180.0], [0.0, 179.9], [40.0, 360.0]]
        rows = np.concatenate([rows, edges])
    rows = np.concatenate([rows, rows[:5]])
    return np.concatenate([rows, rng.choice([0.0, 1.0, 2.5], (len(rows), 1))], -1) if kind == "air" else rows


@pytest.mark.parametrize(
    ("kind", "distance", "radius"),
    [
        ("ring", ndda.Ring(12), 0.4),
        ("plane", ndda.Euclidean(), 0.15),
        ("globe", ndda.GreatCircle(), 500.0),
        ("globe", ndda.GreatCircle(1.0), 0.7),  # reaches further than a quarter of the circle
        ("air", ndda.smc.WithHeight(ndda.GreatCircle(), 900.0), 500.0),
    ],
)
def test_a_tree_finds_what_all_pairs_find(monkeypatch, kind, distance, radius):
    """Neighborhoods, with two tapers and radii by site, blocks and classes are the same to the last bit."""
    state, y = scattered(0, 150, kind), scattered(1, 200, kind)
    half = len(y) // 2
    found = []
    monkeypatch.setattr(neighbor_search, "LARGEST_BATCH", 1000)
    monkeypatch.setattr(neighbor_search, "PLACED_AT_A_TIME", 16)
    for way in (distance, all_pairs(distance)):
        sites, shapes = {"y": y[:half], "z": y[half:]}, {"y": ((half,), 1), "z": ((len(y) - half,), 1)}
        taper = ndda.Taper({"y": radius, "z": 0.3 * radius}, way, sites, state=state)
        placed = taper.place((len(state),), shapes)
        wide = taper.with_radius(2.0 * radius).place((len(state),), shapes)
        blocks = placed.blocks(radius)
        found.append(
            [*placed.neighborhoods(), *wide.neighborhoods_with(blocks.centers, placed), *blocks, placed.classes(7)]
        )
    for tree, pairs in zip(*found, strict=True):
        np.testing.assert_array_equal(tree, pairs)
    dense = placed.taper(placed.points)
    which, weights = found[0][:2]
    assert 1 < which.shape[1] < len(y)
    np.testing.assert_array_equal(np.sum(weights > 0, axis=1), np.sum(np.float32(dense) > 0, axis=1))
    np.testing.assert_allclose(weights, np.where(weights > 0, np.take_along_axis(dense, which, 1), 0.0), rtol=1e-6)


def test_blocks_at_a_pole_are_divided():
    """On a regular grid the block at a pole has the places of whole circles; its parts have one center."""
    latitude, longitude = np.linspace(-90, 90, 31), np.arange(0.0, 360.0, 6.0)
    grid = np.stack([np.repeat(latitude, 60), np.tile(longitude, 31)], -1)
    taper = ndda.Taper(1000.0, ndda.GreatCircle(), {"y": [[0.0, 0.0]]}, state=grid)
    blocks = taper.place((len(grid),), {"y": ((1,), 1)}).blocks(1000.0)
    counts = np.bincount(blocks.of_point, minlength=len(blocks.centers))
    assert 0 < counts.min() <= counts.max() <= 3 * len(grid) / len(np.unique(blocks.centers, axis=0)) + 1
    assert len(np.unique(blocks.centers, axis=0)) < len(blocks.centers)
    own = ndda.GreatCircle().between(*(ndda.GreatCircle().prepared(x) for x in (grid, blocks.centers[blocks.of_point])))
    assert own.max() <= 1000.0


def test_a_taper_is_placed_and_searched_once():
    """Each trace of a filter asks again. Copies and pickles do not carry what was found."""
    taper = ndda.Taper(1.0, ndda.Ring(12), PLACES, state=RING)
    placed = taper.place((12,), ONE_SITE)
    assert taper.place((12,), ONE_SITE) is placed
    assert placed.neighborhoods().which is placed.neighborhoods().which
    assert taper.with_radius(2.0) is taper.with_radius(2.0)
    assert taper.with_radius(2.0).place((12,), ONE_SITE).radii[0] == 2.0
    assert pickle.loads(pickle.dumps(taper))._made == {}
