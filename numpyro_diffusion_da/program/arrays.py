"""Conversion of what a user gives to JAX arrays: arguments of a program, inputs of its scan, and observed values.

NumPyro's scan hands JAX arrays to its body, whatever the user gave. A filter does the same. Tables and labeled arrays
(pandas, xarray) and masked arrays become arrays, with NaN for what is missing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffusion_da.arguments import shown

NUMBERS = "biufc"
"""NumPy's kinds of arrays that hold numbers."""


def as_array(value: Any, what: str) -> Any:
    """Convert one array, table or labeled array to a JAX array; return any other value unchanged.

    Args:
        value: NumPy array, masked array, pandas Series or DataFrame, `xarray.DataArray`, or anything else.
        what: what the value is, for the message, such as "argument 'y' of the program 'model'".

    Returns:
        JAX array for arrays of numbers. Masked values and missing values of a table become NaN.

    Raises:
        ValueError: the value is an array of something else than numbers (text, dates, Python objects), or a Dataset.
    """
    library = type(value).__module__.split(".")[0]
    if library == "xarray" and type(value).__name__ == "Dataset":
        raise ValueError(f"{what} is an xarray.Dataset; give one of its variables, such as dataset['t2m'].")
    if library in ("pandas", "xarray") and hasattr(value, "to_numpy"):
        value = _of_table(value)
    if isinstance(value, np.ma.MaskedArray):
        filled = value.filled(0) if value.dtype.kind in NUMBERS else value.filled()
        mask = np.ma.getmaskarray(value)
        value = np.where(mask, np.nan, filled) if mask.any() else filled
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    if value.dtype.kind not in NUMBERS:
        kind = {"O": "Python objects", "M": "dates", "m": "time differences"}.get(value.dtype.kind, "text")
        raise ValueError(
            f"{what} is an array of {kind} ({value.dtype}), but a filter computes with numbers; convert it to an array "
            "of numbers, with NaN for what is missing, before the program gets it."
        )
    return jax.device_put(value)  # unlike jnp.asarray, it compiles nothing


def number_array(value: Any, what: str) -> jax.Array:
    """Convert a value to a JAX array of numbers, see `as_array`; numbers and lists of numbers become arrays too.

    Args:
        value: the value.
        what: what the value is, for the message.

    Raises:
        ValueError: the value is no array of numbers.
    """
    value = as_array(value, what)
    try:
        if isinstance(value, (str, bytes)):  # JAX would take it for the name of a dtype
            raise TypeError
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{what} is {shown(value)}, which is no array of numbers; give numbers.") from None


def _of_table(value: Any) -> np.ndarray:
    """Values of a pandas or xarray object; missing values of pandas' nullable numbers become NaN."""
    array = value.to_numpy()
    if array.dtype.kind != "O" or type(value).__module__.split(".")[0] != "pandas":
        return np.asarray(array)
    try:
        return np.asarray(value.to_numpy(dtype=float, na_value=np.nan))
    except (TypeError, ValueError):
        return np.asarray(array)


def as_arguments(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], program: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert the arrays among the arguments of a program, see `as_array`.

    Args:
        model: NumPyro program.
        args: positional arguments of the program.
        kwargs: keyword arguments of the program.
        program: name of the program, for messages.

    Raises:
        ValueError: an argument is an array of something else than numbers; the message names the argument.
    """

    def converted(name: str, value: Any) -> Any:
        def leaf(path: Any, item: Any) -> Any:
            return as_array(item, f"argument {name!r}{jax.tree_util.keystr(path)} of the program '{program}'")

        return jax.tree_util.tree_map_with_path(leaf, value)

    named = zip(argument_names(model, args), args, strict=True)
    return tuple(converted(n, value) for n, value in named), {n: converted(n, v) for n, v in kwargs.items()}


def check_binds(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], program: str, error: TypeError
) -> None:
    """Raise an error in plain words if a program has refused the number or the names of its arguments.

    Args:
        model: NumPyro program.
        args: positional arguments of the program.
        kwargs: keyword arguments of the program.
        program: name of the program, for messages.
        error: error that a call of the program has raised.

    Raises:
        ValueError: the arguments are not those of the program.
    """
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):  # a callable without a signature
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as why:
        given = ", ".join([f"{len(args)} without a name", *(f"{name}=" for name in kwargs)])
        raise ValueError(
            f"the program '{program}' takes the arguments {signature} and got {given}: {why}; give it these "
            "arguments, after the random key."
        ) from error


def argument_names(model: Callable[..., Any], args: tuple[Any, ...]) -> list[str]:
    """Names of the positional arguments of a program; numbers in place of names that are not known.

    Args:
        model: NumPyro program.
        args: positional arguments of the program.
    """
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        parameters = []  # type: ignore[assignment]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[i] if i < len(names) else str(i) for i in range(len(args))]
