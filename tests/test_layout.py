import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.fields import Undefined, Variable

LAND = np.array([[True, False, False], [False, True, False]])


def gridded(land=LAND):
    return ndda.Layout(
        (2, 3, 4),
        ("latitude", "longitude", "channel"),
        (("latitude", (-45.0, 45.0)), ("longitude", (0.0, 120.0, 240.0))),
        variables=(
            Variable("2m_temperature", "K"),
            Variable("sea_surface_temperature", "K", undefined=Undefined(land)),
            Variable("temperature", "K", (500, 850)),
        ),
    )


def states(*lead):
    return np.arange(np.prod((*lead, 2, 3, 4)), dtype=np.float32).reshape(*lead, 2, 3, 4)


def test_the_channels_of_a_variable():
    layout = gridded()
    assert layout.size == 24
    assert [layout.channels(v.name) for v in layout.variables] == [slice(0, 1), slice(1, 2), slice(2, 4)]
    assert layout.variable("temperature").num_channels == 2
    assert layout.coords()["longitude"].tolist() == [0.0, 120.0, 240.0]


@pytest.mark.parametrize("lead", [(), (5,), (2, 5)])
def test_select(lead):
    layout, x = gridded(), states(*lead)
    np.testing.assert_array_equal(layout.select(x, "2m_temperature"), x[..., 0])
    np.testing.assert_array_equal(layout.select(x, "temperature"), x[..., 2:])
    np.testing.assert_array_equal(layout.select(x, "temperature", 850), x[..., 3])
    sea = np.asarray(layout.select(x, "sea_surface_temperature"))
    assert sea.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(sea), np.broadcast_to(LAND, x.shape[:-1]))
    np.testing.assert_array_equal(sea[..., ~LAND], x[..., 1][..., ~LAND])


def test_select_of_levels_that_are_undefined():
    variable = Variable("temperature", "K", (500, 850), Undefined(LAND))
    layout = ndda.Layout((2, 3, 2), ("latitude", "longitude", "channel"), variables=(variable,))
    x = np.ones((5, 2, 3, 2), np.float32)
    np.testing.assert_array_equal(np.isnan(layout.select(x, "temperature")[0]), np.stack([LAND, LAND], -1))
    np.testing.assert_array_equal(np.isnan(layout.select(x, "temperature", 500)[3]), LAND)
    np.testing.assert_array_equal(np.isnan(layout.split(x)["temperature"][1][0]), np.stack([LAND, LAND]))


def test_select_is_traced_and_differentiated():
    layout, x = gridded(), jnp.asarray(states())
    select = jax.jit(lambda v: layout.select(v, "sea_surface_temperature"))
    np.testing.assert_array_equal(select(x), layout.select(x, "sea_surface_temperature"))
    gradient = jax.grad(lambda v: jnp.nansum(layout.select(v, "sea_surface_temperature") ** 2))(x)
    np.testing.assert_array_equal(gradient[..., 1], np.where(LAND, 0.0, 2 * x[..., 1]))
    assert not np.asarray(gradient[..., [0, 2, 3]]).any()


def test_split():
    layout, x = gridded(), states(2, 5)
    parts = layout.split(x)
    assert {name: (dims, units) for name, (dims, _, units) in parts.items()} == {
        "2m_temperature": (("latitude", "longitude"), "K"),
        "sea_surface_temperature": (("latitude", "longitude"), "K"),
        "temperature": (("level", "latitude", "longitude"), "K"),
    }
    np.testing.assert_array_equal(parts["temperature"][1], np.moveaxis(x[..., 2:], -1, 2))
    assert np.shares_memory(parts["temperature"][1], x)
    sea = parts["sea_surface_temperature"][1]
    assert sea.dtype == np.float32
    np.testing.assert_array_equal(sea, np.where(LAND, np.nan, x[..., 1]))
    assert ndda.Layout((3,), ("component",)).split(np.ones(3)) == {}


def test_undefined_keeps_its_mask():
    for shape in ((2, 3), (7, 5), (4, 4), (1, 1)):  # of whole bytes and not
        mask = np.random.default_rng(0).random(shape) < 0.5
        np.testing.assert_array_equal(Undefined(mask).mask(), mask)
        assert Undefined(mask).mask().dtype == bool


def test_layouts_are_hashable_and_compare_by_value():
    assert hash(gridded()) == hash(gridded())
    assert gridded() == gridded()
    assert gridded() != gridded(~LAND)
    assert len({gridded(), gridded(), gridded(~LAND)}) == 2
    traced = []

    @jax.jit
    def zeros(layout):
        traced.append(layout)
        return jnp.zeros(layout.shape)

    assert zeros(gridded()).shape == (2, 3, 4)
    zeros(gridded())
    assert len(traced) == 1  # an equal layout does not compile again
    zeros(gridded(~LAND))
    assert len(traced) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda g, x: g.variable("snow"),
            "no variable 'snow'; it has '2m_temperature', 'sea_surface_temperature', 'temp",
        ),
        (lambda g, x: g.channels("snow"), "no variable 'snow'"),
        (lambda g, x: ndda.Layout((3,), ("i",)).select(x, "snow"), "none: the state is a single quantity"),
        (
            lambda g, x: g.select(x, "temperature", 700),
            r"'temperature' has the levels \(500, 850\) hPa, but got level=700",
        ),
        (
            lambda g, x: g.select(x, "2m_temperature", 500),
            "'2m_temperature' has no levels, but got level=500; leave level out",
        ),
        (
            lambda g, x: g.select(x[..., :3], "temperature"),
            r"shape \(2, 3, 3\), expected states of shape \(..., 2, 3, 4\)",
        ),
        (lambda g, x: ndda.Layout((2, 3), ("i",)), "1 names .* give one name for each axis"),
        (lambda g, x: ndda.Layout((2,), ("i",), (("j", (1.0, 2.0)),)), "a coordinate 'j'"),
        (lambda g, x: ndda.Layout((2,), ("i",), (("i", (1.0,)),)), "coordinate 'i' has 1 values"),
        (
            lambda g, x: ndda.Layout((2,), ("i",), variables=(Variable("t", "K", (1, 2, 3)),)),
            "take 3 channels, .* has 2; give",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(gridded(), states())
