"""Storage of a run on disk, step by step, from which an interrupted run continues.

    run.json                  settings of the run; a directory holds one run
    program.npz               means and errors of the program at an arbitrary state, see `StateSpaceModel.probe`
    chain0/step00012.npz      outputs of a step
    chain0/state.npz          particles after the last step, and the number of steps done

Every file is first written under another name and then renamed, so it is either complete or absent. The state is
written after the outputs of its step. If a run is interrupted between the two, it repeats that step with the same
outputs, because the random key of a step depends on its index alone.
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
    """Storage of one run in one directory.

    Args:
        directory: directory of the run; it is created if it does not exist.
        identity: settings that identify the run, as values that JSON can hold.

    Raises:
        ValueError: the directory holds a run with other settings; the message names the first that differs.
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
                    f"{os.fspath(directory)!r} holds a run with {name} = {found.get(name)!r}, but this run has "
                    f"{identity.get(name)!r}; give another directory, or empty this one."
                )

    def check_program(self, probe: dict[str, np.ndarray]) -> None:
        """Check that the program is the one with which the run began; the first call stores it.

        Args:
            probe: values that identify the program, by name, from `StateSpaceModel.probe`. They are compared up to
                rounding errors.

        Raises:
            ValueError: the program is another one; the message names the first value that differs.
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
                    f"{os.fspath(self.path)!r} holds a run of another program: {name} has changed; "
                    "give another directory, or empty this one."
                )

    def steps_done(self, chain: int) -> int:
        """Number of steps of a chain that are on disk, 0 if there are none."""
        path = self._state(chain)
        if not path.exists():
            return 0
        with np.load(path) as file:
            return int(file["steps_done"])

    def save(self, chain: int, step: int, inputs: PyTree, outputs: dict[str, Any], state: PyTree) -> None:
        """Write the outputs of a step with a checksum of its inputs, and then the state after it.

        Args:
            chain: index of the chain.
            step: index of the step.
            inputs: inputs of the step, a pytree of arrays.
            outputs: outputs of the step, nested dictionaries of arrays.
            state: state of the filter after the step, a pytree of arrays.
        """
        self._step(chain, step).parent.mkdir(exist_ok=True)
        _replace_arrays(self._step(chain, step), {**_flat(outputs), "inputs": np.asarray(checksum(inputs))})
        leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        _replace_arrays(self._state(chain), {**leaves, "steps_done": np.asarray(step + 1)})

    def state(self, chain: int, like: PyTree) -> PyTree:
        """Read the state of a chain after its last step, in the structure of `like`."""
        with np.load(self._state(chain)) as file:
            leaves = [file[f"leaf{i}"] for i in range(len(jax.tree.leaves(like)))]
        return jax.tree.unflatten(jax.tree.structure(like), [jax.numpy.asarray(leaf) for leaf in leaves])

    def outputs(self, chain: int, step: int, inputs: PyTree) -> dict[str, Any]:
        """Read the outputs of a step.

        Args:
            chain: index of the chain.
            step: index of the step.
            inputs: inputs of the step, which must be those that it was run with.

        Returns:
            Outputs of the step, nested dictionaries of numpy arrays.

        Raises:
            ValueError: the step was run with other inputs.
        """
        with np.load(self._step(chain, step)) as file:
            if str(file["inputs"]) != checksum(inputs):
                raise ValueError(
                    f"step {step} in {os.fspath(self.path)!r} was run with other observations or inputs than those "
                    "given now; give another directory, or empty this one."
                )
            return _nested(file)

    def _step(self, chain: int, step: int) -> pathlib.Path:
        """Path of the outputs of a step."""
        return self.path / f"chain{chain}" / f"step{step:05d}.npz"

    def _state(self, chain: int) -> pathlib.Path:
        """Path of the state of a chain."""
        return self.path / f"chain{chain}" / "state.npz"


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of the same shape are equal up to rounding errors."""
    if not np.issubdtype(a.dtype, np.inexact):
        return bool(np.array_equal(a, b))
    size = np.nanmax(np.abs(a), initial=0.0)
    return bool(np.allclose(a, b, rtol=1e-4, atol=1e-5 * size, equal_nan=True))


def _replace(path: pathlib.Path, content: bytes) -> None:
    """Write a file under another name, and then rename it, so that it is never incomplete."""
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_bytes(content)
    os.replace(beside, path)


def _replace_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to an npz file under another name, and then rename it, so that it is never incomplete."""
    beside = path.with_suffix(".part")
    with open(beside, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _flat(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """Flatten nested dictionaries to arrays named by their number, and an array `paths` with their keys.

    Names of sites may hold characters that names in an npz file may not.
    """
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    paths = [[entry.key for entry in path] for path, _ in found]
    return {"paths": np.asarray(json.dumps(paths)), **{str(i): np.asarray(x) for i, (_, x) in enumerate(found)}}


def _nested(file: Any) -> dict[str, Any]:
    """Restore nested dictionaries from the arrays that `_flat` made."""
    tree: dict[str, Any] = {}
    for i, (*parents, name) in enumerate(json.loads(str(file["paths"]))):
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = file[str(i)]
    return tree
