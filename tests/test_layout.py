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


def sphere(latitude, longitude, variable=None):
    """A layout whose only fault may be in its coordinates."""
    axes = (("latitude", latitude), ("longitude", longitude))
    variable = Variable("t", "K") if variable is None else variable
    shape = (len(latitude), len(longitude), variable.num_channels)
    return ndda.Layout(shape, ("latitude", "longitude", "channel"), axes, variables=(variable,))


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
        (lambda g, x: ndda.Layout("3", ("i",)), "shape='3'; give one positive whole number"),
        (lambda g, x: ndda.Layout(3, ("i",)), r"shape=3; .* as in \(40,\)"),
        (lambda g, x: ndda.Layout((2.5,), ("i",)), r"shape=\(2.5,\); give one positive whole number"),
        (lambda g, x: ndda.Layout((0,), ("i",)), r"shape=\(0,\)"),
        (lambda g, x: ndda.Layout((3,), "i"), r"dims='i'; give a tuple of names, as in \(\"site\",\)"),
        (lambda g, x: ndda.Layout((3, 3), ("i", "i")), "dims 'i', 'i'; give 'i' once"),
        (lambda g, x: ndda.Layout((2,), ("i",), (("i", "ab"),)), "give pairs"),
        (lambda g, x: ndda.Layout((2,), ("i",), ("i",)), "give pairs"),
        (lambda g, x: ndda.Layout((2,), ("i",), 3), "give pairs"),
        (lambda g, x: ndda.Layout((2,), ("i",), (("i", (0.0, np.nan)),)), "'i' of a layout has the value nan at pos"),
        (
            lambda g, x: ndda.Layout((1,), ("i",), (("i", np.array(["2020"], "M8[ns]")),)),
            "give finite numbers or strings",
        ),
        (lambda g, x: ndda.Layout((2,), ("i",), {"i": (0, 1)}, units=1), 'units=1; expected a str: write units="K"'),
        (lambda g, x: sphere((0.0, 91.0), (0.0, 1.0)), "layout's latitudes have the value 91.0 at position 1; give"),
        (lambda g, x: sphere((0.0, 0.0), (0.0, 1.0)), "layout's latitudes go from 0 to 0"),
        (lambda g, x: sphere((0.0, 2.0, 1.0), (0.0, 1.0)), "layout's latitudes go from 2 to 1 at position 1"),
        (lambda g, x: sphere(("N", "S"), (0.0, 1.0)), "layout's latitudes have the value N"),
        (lambda g, x: sphere((0.0, 1.0), (0.0, 5e3)), "layout's longitudes have the value 5000"),
        (lambda g, x: sphere((0.0, 1.0), (0.0, 90.0, 45.0)), "layout's longitudes go from 90 to 45"),
        (lambda g, x: sphere((0.0, 1.0), tuple(np.arange(0.0, 541.0, 90.0))), "more than once around"),
        (lambda g, x: ndda.Layout((2,), ("i",), variables=("t", "z")), r"variables='t'; expected a Variable"),
        (
            lambda g, x: ndda.Layout((2,), ("i",), variables=(Variable("t", "K"), Variable("t", "K"))),
            "variable 't' twice; give one with all its levels",
        ),
        (
            lambda g, x: ndda.Layout((2, 4, 1), ("a", "b", "c"), variables=(Variable("t", undefined=Undefined(LAND)),)),
            r"undefined points of 't' have the shape \(2, 3\), but the state has \(2, 4\)",
        ),
        (lambda g, x: Variable(3), "name=3"),
        (lambda g, x: Variable(""), "empty name"),
        (lambda g, x: Variable("t", None), "units=None"),
        (lambda g, x: Variable("t", "K", 500), "levels=500; give a tuple of pressure levels in hPa"),
        (lambda g, x: Variable("t", "K", "500"), "levels='500'"),
        (lambda g, x: Variable("t", "K", (500, "850")), "give positive pressure levels"),
        (lambda g, x: Variable("t", "K", (500, np.nan)), "give positive pressure levels"),
        (lambda g, x: Variable("t", "K", (500, 500)), "give each level once"),
        (lambda g, x: Variable("t", "K", undefined="land"), r"write undefined=Undefined\(mask\)"),
        (lambda g, x: Undefined(np.array([0.3, 1.0])), "values other than 0 and 1"),
        (lambda g, x: Undefined(np.array([np.nan, 1.0])), "values other than 0 and 1"),
        (lambda g, x: Undefined("land"), "values other than 0 and 1"),
        (
            lambda g, x: ndda.Layout((2,), ("i",), variables=(Variable("t", "K", (1, 2, 3)),)),
            "take 3 channels, .* has 2; give",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(gridded(), states())


def test_layouts_take_lists_mappings_and_numpy_numbers():
    axes = {"latitude": np.array([45.0, -45.0]), "longitude": [-180, 0, 180]}
    variables = [Variable("t", "K", np.array([500.0, 850.0]))]
    layout = ndda.Layout([np.int64(2), 3, 2], ["latitude", "longitude", "channel"], axes, variables=tuple(variables))
    assert layout == sphere((45.0, -45.0), (-180, 0, 180), Variable("t", "K", (500, 850)))
    assert hash(layout)
    assert Variable("t", undefined=LAND) == Variable("t", undefined=Undefined(LAND))
