"""Checksums of arrays: what identifies a prior, an input or a file of parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import PyTree


def named_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """All arrays of a pytree by the path that leads to them, for instance 'mean_network.encode'."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path).lstrip("."): np.asarray(leaf) for path, leaf in leaves}


def arrays_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over name, type, shape and bytes of each array, in the order of their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def checksum(tree: PyTree) -> str:
    """SHA-256 over the arrays of a pytree and their paths, in hexadecimal."""
    return arrays_checksum(named_arrays(tree))
