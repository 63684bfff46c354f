"""Checksums of arrays, which identify a prior, an input or a file of parameters, and errors of damaged files."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,  # a flipped bit says that the file is encrypted, or of a kind that zipfile does not know
)
"""Errors of numpy and zipfile for files that are cut off, overwritten or no .npz files."""


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves of a pytree by their path in it, for instance 'mean_network.encode'."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}


def named_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """Arrays of a pytree by their path in it, for instance 'mean_network.encode'."""
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def arrays_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 in hexadecimal over the name, type, shape and bytes of each array, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def checksum(tree: PyTree) -> str:
    """SHA-256 in hexadecimal over the arrays of a pytree and their paths."""
    return arrays_checksum(named_arrays(tree))
