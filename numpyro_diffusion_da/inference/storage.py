"""Storage of a run on disk, step by step, from which an interrupted run continues.

    run.json                  settings of the run; a directory holds one run
    program.json              checksums of the computation, its constants and its arguments, see `identity`
    chain0/step00012.npz      outputs of a step
    chain0/state.npz          particles after the last step, and the number of steps done
    lock                      held by the process that writes; the system releases it when the process ends

Every file is first written under another name and then renamed, so it is either complete or absent. The state is
written after the outputs of its step. If a run is interrupted between the two, it repeats that step with the same
outputs, because the random key of a step depends on its index alone.
"""

from __future__ import annotations

import json
import os
import pathlib
from types import TracebackType
from typing import Any

import filelock
import jax
import numpy as np
from jaxtyping import PyTree

from numpyro_diffusion_da.checksums import DAMAGE, checksum


class RunStore:
    """Storage of one run in one directory.

    Args:
        directory: directory of the run; it is created if it does not exist.
        identity: settings that identify the run, as values that JSON can hold.

    A store is a context manager. Inside it, no other store can write into the directory.

    Raises:
        ValueError: the directory holds a run with other settings (the message names the first that differs), is in use
            by another run, or a file in it is damaged (the message names the file).
    """

    def __init__(self, directory: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path = pathlib.Path(directory)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.path / "lock")
        self._identity = json.loads(json.dumps(identity, default=_plain))

    def __enter__(self) -> RunStore:
        """Take the directory, and compare the settings of the run in it with those of this run."""
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(
                f"{os.fspath(self.path)!r} is in use by another run; wait until that one ends, or give another "
                "directory."
            ) from None
        try:
            self._check_identity()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the directory."""
        self._lock.release()

    def _check_identity(self) -> None:
        """Check that the run in the directory has the settings of this one; write them if it is the first.

        Raises:
            ValueError: a setting differs, or the file of the settings is damaged.
        """
        described, identity = self.path / "run.json", self._identity
        if not described.exists():
            _replace(described, json.dumps(identity, indent=1).encode())
            return
        found = _read_json(described)
        for name in sorted({*found, *identity}):
            if found.get(name) != identity.get(name):
                raise ValueError(
                    f"{os.fspath(self.path)!r} holds a run with {name} = {found.get(name)!r}, but this run has "
                    f"{identity.get(name)!r}; give another directory, or empty this one."
                )

    def check_computation(self, found: dict[str, str]) -> None:
        """Check that the computation is the one with which the run began; the first call stores it.

        Args:
            found: checksums by name, from `identity.computation`.

        Raises:
            ValueError: it is another one (the message names the first part that differs), or the file of the checksums
                is damaged.
        """
        path = self.path / "program.json"
        if not path.exists():
            _replace(path, json.dumps(found, indent=1).encode())
            return
        before = _read_json(path)
        # Versions and arguments come first: if one of them differs, the operations often do too.
        names = sorted(
            {*before, *found}, key=lambda name: (not name.startswith(("version", "the precision", "argument")), name)
        )
        for name in names:
            if before.get(name) != found.get(name):
                raise ValueError(
                    f"{os.fspath(self.path)!r} holds a run of another program: {name} has changed; "
                    "give another directory, or empty this one."
                )

    def steps_done(self, chain: int) -> int:
        """Number of steps of a chain that are on disk, 0 if there are none."""
        return int(self._owned(self._state(chain), chain, None)["steps_done"]) if self._state(chain).exists() else 0

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
        own = {"inputs": np.asarray(checksum(inputs)), "belongs": np.asarray(self._mark(chain, step))}
        _replace_arrays(self._step(chain, step), {**_flat(outputs), **own})
        leaves = {f"leaf{i}": _raw(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        own = {"steps_done": np.asarray(step + 1), "belongs": np.asarray(self._mark(chain, None))}
        _replace_arrays(self._state(chain), {**leaves, **own})

    def _mark(self, chain: int, step: int | None) -> str:
        """Checksum of the run, chain and step that a file belongs to."""
        whose = json.dumps([self._identity, chain, step], sort_keys=True)
        return checksum({"whose": np.frombuffer(whose.encode(), np.uint8)})

    def _owned(self, path: pathlib.Path, chain: int, step: int | None) -> dict[str, np.ndarray]:
        """Read the arrays of a file, and check that this run wrote it for this chain and step.

        Args:
            path: path of the file.
            chain: index of the chain.
            step: index of the step; None for the state of the chain.

        Raises:
            ValueError: the file is missing, damaged, or a copy of a file of another run, chain or step.
        """
        arrays = _read_arrays(path)
        if str(arrays.get("belongs")) != self._mark(chain, step):
            raise ValueError(
                f"{os.fspath(path)!r} belongs to another run, chain or step; put the right file back, or {_AGAIN}."
            )
        return arrays

    def state(self, chain: int, like: PyTree) -> PyTree:
        """Read the state of a chain after its last step, in the structure of `like`."""
        arrays = self._owned(self._state(chain), chain, None)
        known, form = jax.tree.flatten(like)
        return jax.tree.unflatten(form, [_as(leaf, arrays[f"leaf{i}"]) for i, leaf in enumerate(known)])

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
        arrays = self._owned(self._step(chain, step), chain, step)
        if str(arrays["inputs"]) != checksum(inputs):
            raise ValueError(
                f"step {step} in {os.fspath(self.path)!r} was run with other observations or inputs than those "
                "given now; give another directory, or empty this one."
            )
        return _nested(arrays)

    def _step(self, chain: int, step: int) -> pathlib.Path:
        """Path of the outputs of a step."""
        return self.path / f"chain{chain}" / f"step{step:05d}.npz"

    def _state(self, chain: int) -> pathlib.Path:
        """Path of the state of a chain."""
        return self.path / f"chain{chain}" / "state.npz"


_AGAIN = "delete the folder of the chain, which is then computed again with the same result"
"""What to do about a damaged file of a chain."""


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read all arrays of an npz file of a chain, by name.

    Raises:
        ValueError: the file is missing or damaged. The message names it.
    """
    try:
        # np.load leaves a damaged file open, so it gets an open one.
        with open(path, "rb") as opened, np.load(opened) as file:
            return dict(file)
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(path)!r} is missing; {_AGAIN}.") from None
    except DAMAGE:
        raise ValueError(f"{os.fspath(path)!r} is damaged; {_AGAIN}.") from None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON file that holds a dictionary.

    Raises:
        ValueError: the file is damaged. The message names it.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{os.fspath(path)!r} is damaged; empty the directory and run again.") from None


def _plain(value: Any) -> Any:
    """Convert a NumPy or JAX number to one that JSON can hold; text for anything else."""
    is_number = isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.ndim(value) == 0
    return value.item() if is_number else str(value)


def _raw(leaf: Any) -> np.ndarray:
    """Array of a leaf; a random key by its numbers."""
    return np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def _as(like: Any, raw: np.ndarray) -> Any:
    """Leaf of the kind of `like`, from an array that `_raw` made."""
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jax.numpy.asarray(raw), impl=jax.random.key_impl(like))
    return jax.numpy.asarray(raw)


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
    named = {"paths": np.asarray(json.dumps(paths)), "empty": np.asarray(json.dumps(_empty(tree)))}
    return {**named, **{str(i): np.asarray(x) for i, (_, x) in enumerate(found)}}


def _empty(tree: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of the dictionaries in nested dictionaries that hold nothing."""
    below = [path for name, part in tree.items() if isinstance(part, dict) for path in _empty(part, (*above, name))]
    return below if tree else [above]


def _nested(file: Any) -> dict[str, Any]:
    """Restore nested dictionaries from the arrays that `_flat` made."""
    tree: dict[str, Any] = {}
    for path in json.loads(str(file["empty"])):
        node = tree
        for name in path:
            node = node.setdefault(name, {})
    for i, (*parents, name) in enumerate(json.loads(str(file["paths"]))):
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = file[str(i)]
    return tree
