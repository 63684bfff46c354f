r"""Particles that are sharded over devices, by JAX's own SPMD.

A kernel on a mesh runs inside `jax.shard_map` over the axis "particles": each of the D devices runs the same code on
its own N / D particles. What a kernel does with one particle then needs no communication. What it does with all of them
(to temper, to resample, to update an ensemble) it does on gathered arrays, on each device the same, so that sums over
particles have one order, whatever D is. Without a mesh the functions of this module return what they are given, and the
compiled step is that of one device.

- `own` takes a device's rows from arrays of all particles, and `whole` gathers the rows of all devices.
- `take_ancestors` brings each new particle's ancestor to its device. Ancestors that are there already do not move.
- `to_parts` and `from_parts` change between "all parts of some particles" and "some parts of all particles".

What moves is counted (`Traffic`): the collectives of the traced kernel by their sizes, and the rounds that
`take_ancestors` makes, which depend on the ancestors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from numpyro_diffusion_da.smc.rows import are_rows_apart, like, plain, take_rows, whole_rows

AXIS = "particles"
"""Name of the mesh's axis over which particles are sharded."""

PARTS_OF_A_SHARE = 64
"""Number of rounds in which a device could send all of its particles to one other device."""


class Traffic(NamedTuple):
    """Bytes that one step moved between devices, summed over them.

    A gather of b bytes from each of D devices counts D (D - 1) b, as each device receives what the others have.

    Attributes:
        moved: bytes of particles that resampling moved, with what fixed sizes of the collectives add.
        needed: bytes of ancestors without a copy on the device where a new particle has them: no exchange can move
            less. An ancestor counts once for each device that lacks it, and with blocks each block by itself.
        gathered: bytes of everything else: weights, predicted observations, and ensembles that are updated together.
    """

    moved: Float[Array, ""]
    needed: Float[Array, ""]
    gathered: Float[Array, ""] | float = 0.0

    def plus(self, other: Traffic) -> Traffic:
        """Sum of two records."""
        return Traffic(*map(jnp.add, self, other))


def added(one: Traffic | tuple[()], other: Traffic | tuple[()]) -> Traffic | tuple[()]:
    """Sum of two records, each of which may be ()."""
    if not isinstance(one, Traffic) or not isinstance(other, Traffic):
        return one or other
    return one.plus(other)


# --- where particles are ----------------------------------------------------------------------------------------------


def num_devices() -> int:
    """Number D of devices over which the particles of the current kernel are sharded; 1 outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return int(mesh.shape[AXIS]) if AXIS in mesh.manual_axes else 1


def _share(n: int) -> int:
    """Number of rows of each device, if n rows are divided and the last devices may have fewer."""
    return -(-n // num_devices())


def own(values: PyTree) -> PyTree:
    """Rows of this device, of arrays that hold those of all devices.

    If the number of rows is no multiple of the number of devices, the last row fills up the last shares.

    Args:
        values: arrays with a leading axis, the same on all devices.
    """
    if num_devices() == 1:
        return values

    def rows(x: Array) -> Array:
        size = _share(len(x))
        start = jax.lax.axis_index(AXIS) * size
        if len(x) == size * num_devices():
            return jax.lax.dynamic_slice_in_dim(x, start, size)
        return jnp.asarray(x)[jnp.minimum(start + jnp.arange(size), len(x) - 1)]

    return jax.tree.map(rows, values)


def whole(values: PyTree, n: int | None = None) -> PyTree:
    """Rows of all devices, in their order, on each device.

    Args:
        values: arrays whose leading axis is that of a device's rows.
        n: number of rows, if the last shares were filled up; None for all.
    """
    if num_devices() == 1:
        return values

    def gather(x: Array) -> Array:
        return jax.lax.all_gather(x, AXIS, tiled=True)[:n]

    return _on_plain(gather, values)


def together(values: PyTree) -> PyTree:
    """Rows of all particles in one place: on each device of a mesh, and in memory where rows are on disk.

    It is for what an analysis needs of all particles at once, such as their predictions of the observations.

    Args:
        values: arrays whose leading axis is that of a device's rows.
    """
    return whole_rows(whole(values))


def first(particles: PyTree) -> PyTree:
    """Particle 0, on each device.

    Args:
        particles: particles of a device, with a leading axis.
    """
    one = np.zeros(1, int)
    if num_devices() > 1:
        particles = _fetched(particles, one)
    elif are_rows_apart():
        particles = take_rows(particles, one)
    return jax.tree.map(lambda x: x[0], particles)


def rows_at(particles: PyTree, which: Int[np.ndarray, " m"]) -> PyTree:
    """Share of this device in some particles, for work that devices divide; `whole(..., m)` gathers the results.

    Args:
        particles: particles of a device, with a leading axis.
        which: indices among all particles, the same on all devices.
    """
    devices, size = num_devices(), len(jax.tree.leaves(particles)[0])
    if len(which) == devices * size:
        return particles
    if devices == 1:
        return take_rows(particles, which)
    if len(which) % devices == 0:
        by_device = which.reshape(devices, -1) - size * np.arange(devices)[:, None]
        if (by_device == by_device[:1]).all():  # every device has its share already, at the same places
            return jax.tree.map(lambda x: x[by_device[0]], particles)
    return own(_fetched(particles, which))


def _fetched(particles: PyTree, which: Int[np.ndarray, " m"]) -> PyTree:
    """Some particles, on each device: a sum over devices of which one has a value, as whole numbers and so exactly."""
    size = len(jax.tree.leaves(particles)[0])
    mine = which // size == jax.lax.axis_index(AXIS)

    def fetch(x: Array) -> Array:
        bits = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{8 * x.itemsize}")
        there = mine.reshape(-1, *[1] * (x.ndim - 1))
        total = jax.lax.psum(jnp.where(there, bits[which % size], 0), AXIS)
        return total.astype(bool) if x.dtype == bool else jax.lax.bitcast_convert_type(total, x.dtype)

    return _on_plain(fetch, particles)


def _on_plain(fn: Callable[[Array], Array], values: PyTree) -> PyTree:
    """Apply a function to arrays; random keys are given as their plain numbers."""
    return jax.tree.map(lambda x: like(x, fn(plain(x))), values)


def map_divided(fn: Callable[[Any], Any], values: PyTree, batch_size: int) -> PyTree:
    """Map a function over the leading axis of arrays, divided over the devices, in batches that bound the memory.

    Args:
        fn: function of one element.
        values: arrays with a leading axis, the same on all devices.
        batch_size: number of elements mapped at a time on each device.

    Returns:
        What `jax.lax.map` returns, on each device.
    """
    n = len(jax.tree.leaves(values)[0])
    mine = own(values)
    found = jax.lax.map(fn, mine, batch_size=min(batch_size, len(jax.tree.leaves(mine)[0])))
    return whole(found, n)


def to_parts(values: Float[Array, "n p ..."]) -> Float[Array, "N s ..."]:
    """Change from all parts of this device's particles to this device's parts of all particles.

    Args:
        values: array whose second axis is that of parts: places or blocks of the state. The last shares are filled up.
    """
    devices = num_devices()
    if devices == 1:
        return values
    missing = devices * _share(values.shape[1]) - values.shape[1]
    padded = jnp.pad(values, [(0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)])
    return jax.lax.all_to_all(padded, AXIS, split_axis=1, concat_axis=0, tiled=True)


def from_parts(values: Float[Array, "N s ..."], p: int) -> Float[Array, "n p ..."]:
    """Change back from this device's parts of all particles to all p parts of this device's particles.

    Args:
        values: array whose second axis is that of this device's parts.
        p: number of all parts.
    """
    if num_devices() == 1:
        return values
    return jax.lax.all_to_all(values, AXIS, split_axis=0, concat_axis=1, tiled=True)[:, :p]


# --- ancestors --------------------------------------------------------------------------------------------------------


def _round_size(n: int) -> int:
    """Number of particles that a device sends in one round, of n that it has."""
    return max(1, n // PARTS_OF_A_SHARE)


def _present(ancestors: Int[Array, " N"]) -> Bool[Array, "D N"]:
    """Whether a device has new particles of an ancestor, for each device and ancestor."""
    devices, n = num_devices(), len(ancestors) // num_devices()
    of_slot = jnp.arange(len(ancestors)) // n
    return jnp.zeros((devices, len(ancestors)), bool).at[of_slot, ancestors].set(True)


def _rounds(present: Bool[Array, "D N"]) -> Int[Array, " D"]:
    """Number of rounds in which each device sends to the device s further on, for each s from 0 on; none to itself."""
    devices, n = len(present), present.shape[1] // len(present)
    counts = jnp.sum(present.reshape(devices, devices, n), axis=2)  # by receiver and sender
    sender = np.arange(devices)
    by_shift = jnp.stack([counts[(sender + s) % devices, sender] for s in range(devices)])
    return jnp.where(np.arange(devices) > 0, -(-jnp.max(by_shift, axis=1) // _round_size(n)), 0)


def take_ancestors(particles: PyTree, ancestors: Int[Array, " N"]) -> PyTree:
    """Ancestor of each of this device's new particles.

    A device copies those that it has. For the others, each device sends to the device s further on, for s = 1, ...,
    D - 1, in rounds of a fixed number of particles, as many as the busiest of these pairs needs. Each ancestor is sent
    to a device at most once.

    Args:
        particles: particles of a device, with a leading axis of N / D.
        ancestors: index among all particles of each new particle's ancestor, the same on all devices.
    """
    devices = num_devices()
    if devices == 1:
        return take_rows(particles, ancestors)
    n, me = len(ancestors) // devices, jax.lax.axis_index(AXIS)
    present, size = _present(ancestors), _round_size(len(ancestors) // devices)
    rounds, mine = _rounds(present), own(ancestors)

    def exchanged(*leaves: Array) -> list[Array]:
        found = [x[jnp.where(mine // n == me, mine % n, 0)] for x in leaves]
        for shift in range(1, devices):
            to, sender = (me + shift) % devices, (me - shift) % devices
            wanted = jax.lax.dynamic_slice(present, (to, me * n), (1, n))[0]
            queue = jnp.argsort(~wanted, stable=True)  # those that `to` needs come first, in their order
            coming = jax.lax.dynamic_slice(present, (me, sender * n), (1, n))[0]
            turn = (jnp.cumsum(coming) - 1)[mine % n]
            pairs = [(i, (i + shift) % devices) for i in range(devices)]

            def a_round(
                carry: tuple[Array, list[Array]],
                queue: Array = queue,
                turn: Array = turn,
                sender: Array = sender,
                pairs: list[tuple[int, int]] = pairs,
            ) -> tuple[Array, list[Array]]:
                r, found = carry
                sent = jax.lax.dynamic_slice_in_dim(jnp.pad(queue, (0, size)), r * size, size)
                here = (mine // n == sender) & (turn // size == r)

                def received(old: Array, x: Array) -> Array:
                    got = jax.lax.ppermute(x[sent], AXIS, pairs)[turn % size]
                    return jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), got, old)

                return r + 1, [received(old, x) for old, x in zip(found, leaves, strict=True)]

            def is_left(carry: tuple[Array, list[Array]], last: Array = rounds[shift]) -> Array:
                return carry[0] < last

            _, found = jax.lax.while_loop(is_left, a_round, (jnp.zeros((), rounds.dtype), found))
        return found

    leaves, form = jax.tree.flatten(particles)
    found = exchanged(*map(plain, leaves))
    return jax.tree.unflatten(form, map(like, leaves, found))


def bytes_each(particles: PyTree) -> int:
    """Number of bytes of one particle, of particles with a leading axis."""
    found = 0
    for x in jax.tree.leaves(particles):
        numbers = jax.eval_shape(plain, x)
        found += int(np.prod(numbers.shape[1:], dtype=int)) * numbers.dtype.itemsize
    return found


def traffic_of(particles: PyTree, ancestors: Int[Array, " N"]) -> Traffic | tuple[()]:
    """Traffic of `take_ancestors` for the same arguments; () without a mesh."""
    if num_devices() == 1:
        return ()
    present, n = _present(ancestors), len(ancestors) // num_devices()
    each = float(bytes_each(particles))
    sent = jnp.sum(_rounds(present)) * num_devices() * _round_size(n)
    return Traffic(each * sent, each * _lacking(ancestors))


def block_traffic(size: float, ancestors: Int[Array, "N b"], shares: Float[np.ndarray, " b"]) -> Traffic | tuple[()]:
    """Bytes of ancestors' blocks that are needed where they have no copy; () without a mesh.

    What moves is in the collectives of the kernel, which have fixed sizes.

    Args:
        size: bytes of what a particle has in all blocks.
        ancestors: index of each particle's ancestor in each block.
        shares: share of each block in the places of the state.
    """
    if num_devices() == 1:
        return ()
    lacking = jax.lax.map(_lacking, ancestors.T)
    return Traffic(jnp.zeros(()), size * jnp.sum(lacking * jnp.asarray(shares, lacking.dtype)))


def _lacking(ancestors: Int[Array, " N"]) -> Float[Array, ""]:
    """Number of pairs of a device and an ancestor that new particles of this device have and another device holds."""
    present, n = _present(ancestors), len(ancestors) // num_devices()
    holds = np.arange(len(ancestors))[None] // n == np.arange(num_devices())[:, None]
    return jnp.sum(present & ~holds).astype(float)


# --- counts ------------------------------------------------------------------------------------------------


def collective_bytes(jaxpr: Any, devices: int) -> tuple[float, float]:
    """Bytes that the collectives of a traced function move between devices, summed over them.

    Those in a loop whose number of rounds is not known are left out: only `take_ancestors` has them.

    Args:
        jaxpr: traced function of one device.
        devices: number of devices D.

    Returns:
        (bytes of exchanges, in which each device has other parts afterwards; bytes of gathers and sums).
    """
    moved = gathered = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        size = sum(v.aval.size * v.aval.dtype.itemsize for v in eqn.invars if hasattr(v.aval, "dtype"))
        if name == "all_to_all":
            moved += size * (devices - 1)
        elif name == "all_gather":
            gathered += size * devices * (devices - 1)
        elif name.startswith("psum"):  # a ring passes each value around twice
            gathered += 2 * size * (devices - 1)
        elif name != "while":
            times = eqn.params["length"] if name == "scan" else 1
            for inner in _inner(eqn):
                parts = collective_bytes(inner, devices)
                moved, gathered = moved + times * parts[0], gathered + times * parts[1]
    return moved, gathered


def _inner(eqn: Any) -> Iterator[Any]:
    """Jaxprs in the parameters of an equation."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                yield getattr(part, "jaxpr", part)
