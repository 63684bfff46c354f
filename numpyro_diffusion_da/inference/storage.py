"""A run on disk, step by step: what a filter made, and the state it goes on from.

    run.json                  what was run; a directory belongs to one run
    program.npz               what its program says of an arbitrary state, see `StateSpaceModel.probe`
    chain0/step00012.npz      the outputs of a step
    chain0/state.npz          the particles after the last step, and how many steps were made

Every file is written beside its place and then moved there, so that a file is whole or not there. The state is written
after the step's outputs: a run that dies between the two makes that step again, and gets the same, because keys depend
on the step alone.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from numpyro_diffusion_da.checksums import checksum


class RunStore:
    """One run in one directory.

    Args:
        directory: where; made if it is not there.
        identity: plain values that say what is run. A directory that holds another run is refused.

    Raises:
        ValueError: the directory holds a run with other settings; names the first that differs.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path = pathlib.Path(directory)
        self.path.mkdir(parents=True, exist_ok=True)
        described = self.path / "run.json"
        identity = json.loads(json.dumps(identity))
        if not described.exists():
            _replace(described, json.dumps(identity, indent=1).encode())
            return
        found = json.loads(described.read_text())
        for name in sorted({*found, *identity}):
            if found.get(name) != identity.get(name):
                raise ValueError(
                    f"{os.fspath(directory)!r} holds a run with {name} = {found.get(name)!r}, but this one has "
                    f"{identity.get(name)!r}: give another directory, or empty this one."
                )

    def check_program(self, probe: dict[str, np.ndarray]) -> None:
        """Refuse a program that observes or derives something else than the one that began.

        Args:
            probe: name -> values; equal but for rounding where the program is the same.

        Raises:
            ValueError: another program; names what differs.
        """
        path = self.path / "program.npz"
        if not path.exists():
            _replace_arrays(path, _flat(probe))
            return
        with np.load(path) as file:
            found = _nested(file)
        for name in sorted({*found, *probe}):
            before, now = found.get(name), probe.get(name)
            if before is None or now is None or before.shape != now.shape or not _same(before, now):
                raise ValueError(
                    f"{os.fspath(self.path)!r} holds a run of another program: {name} is not what it was; "
                    "give another directory, or empty this one."
                )

    def steps_done(self, chain: int) -> int:
        """Steps after which this chain can go on."""
        path = self._state(chain)
        if not path.exists():
            return 0
        with np.load(path) as file:
            return int(file["steps_done"])

    def save(self, chain: int, step: int, inputs: PyTree, outputs: dict[str, Any], state: PyTree) -> None:
        """Keep a step: its outputs (nested dictionaries of arrays) and what it was given, then the state after it."""
        self._step(chain, step).parent.mkdir(exist_ok=True)
        _replace_arrays(self._step(chain, step), {**_flat(outputs), "inputs": np.asarray(checksum(inputs))})
        leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        _replace_arrays(self._state(chain), {**leaves, "steps_done": np.asarray(step + 1)})

    def state(self, chain: int, like: PyTree) -> PyTree:
        """The state to go on from, in the structure of `like`."""
        with np.load(self._state(chain)) as file:
            leaves = [file[f"leaf{i}"] for i in range(len(jax.tree.leaves(like)))]
        return jax.tree.unflatten(jax.tree.structure(like), [jax.numpy.asarray(leaf) for leaf in leaves])

    def outputs(self, chain: int, step: int, inputs: PyTree) -> dict[str, Any]:
        """The outputs of a step that was given these inputs.

        Raises:
            ValueError: it was given others.
        """
        with np.load(self._step(chain, step)) as file:
            if str(file["inputs"]) != checksum(inputs):
                raise ValueError(
                    f"step {step} in {os.fspath(self.path)!r} was made with other observations or inputs than those "
                    "given now: give another directory, or empty this one."
                )
            return _nested(file)

    def _step(self, chain: int, step: int) -> pathlib.Path:
        return self.path / f"chain{chain}" / f"step{step:05d}.npz"

    def _state(self, chain: int) -> pathlib.Path:
        return self.path / f"chain{chain}" / "state.npz"


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for rounding."""
    if not np.issubdtype(a.dtype, np.inexact):
        return bool(np.array_equal(a, b))
    size = np.nanmax(np.abs(a), initial=0.0)
    return bool(np.allclose(a, b, rtol=1e-4, atol=1e-5 * size, equal_nan=True))


def _replace(path: pathlib.Path, content: bytes) -> None:
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_bytes(content)
    os.replace(beside, path)


def _replace_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    beside = path.with_suffix(".part")
    with open(beside, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _flat(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by number, and their paths: a site's name may hold any character, a file's may not."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    paths = [[entry.key for entry in path] for path, _ in found]
    return {"paths": np.asarray(json.dumps(paths)), **{str(i): np.asarray(x) for i, (_, x) in enumerate(found)}}


def _nested(file: Any) -> dict[str, Any]:
    """The inverse of `_flat`."""
    tree: dict[str, Any] = {}
    for i, (*parents, name) in enumerate(json.loads(str(file["paths"]))):
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = file[str(i)]
    return tree
