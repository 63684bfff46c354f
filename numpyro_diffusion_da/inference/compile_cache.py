"""Cache of compiled programs on disk, so that another process does not compile what one has compiled."""

from __future__ import annotations

import os
import pathlib

import jax

from numpyro_diffusion_da.arguments import require

SHORTEST = 0.2
"""Programs that compile in less time than this are not written, in seconds."""


def cache_compiled(directory: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Keep compiled programs on disk, for all that JAX compiles in this process from now on.

    The first step of a filter takes seconds to compile. A later process that runs the same program with the same
    shapes reads what this one has compiled, and only traces it. It is JAX's own cache: an entry is used by the same
    version of JAX on the same kind of device only, and old ones can be deleted at any time.

    Args:
        directory: directory of the cache; None for that of the environment variable `JAX_COMPILATION_CACHE_DIR` if it
            is set, else ``numpyro_diffusion_da`` in the user's cache directory (`XDG_CACHE_HOME`, else `~/.cache`).

    Returns:
        The directory.

    Raises:
        OSError: the directory cannot be made.
    """
    if directory is None:
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        directory = jax.config.values["jax_compilation_cache_dir"] or pathlib.Path(caches) / "numpyro_diffusion_da"
    require(directory, (str, os.PathLike), "cache_compiled", "directory", '"compiled"')
    path = pathlib.Path(directory).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    return path
