"""Comparison of units: files write 'm**2 s**-2', 'm2 s-2' and 'm^2/s^2' for the same unit."""

from __future__ import annotations

import re

SPELLINGS = {
    # A table and not a library of units: files spell some twenty units, and units are compared, never converted.
    "1": ("", "(0 - 1)", "0-1", "(0-1)", "dimensionless", "unitless", "none", "fraction", "proportion", "-", "~"),
    "%": ("percent",),
    "K": ("kelvin", "kelvins", "degk", "deg_k", "deg k", "degree_kelvin", "degrees_kelvin", "°k"),
    "degC": (
        "celsius",
        "degrees celsius",
        "degree celsius",
        "degree_celsius",
        "degrees_celsius",
        "degree_c",
        "degrees_c",
        "deg_c",
        "deg c",
        "°c",
        "℃",
        "c",
    ),
    "degF": ("fahrenheit", "degrees fahrenheit", "degree_fahrenheit", "deg_f", "deg f", "°f", "℉"),
    "m": (
        "meter",
        "meters",
        "metre",
        "metres",
        "gpm",
        "geopotential meter",
        "geopotential meters",
        "geopotential metre",
        "geopotential metres",
        "m of water equivalent",
        "m of water",
    ),
    "mm": ("millimeter", "millimeters", "millimetre", "millimetres"),
    "km": ("kilometer", "kilometers", "kilometre", "kilometres"),
    "s": ("second", "seconds", "sec"),
    "h": ("hour", "hours", "hr", "hrs"),
    "kg": ("kilogram", "kilograms"),
    "g": ("gram", "grams"),
    "Pa": ("pascal", "pascals"),
    "hPa": ("hectopascal", "hectopascals", "mbar", "mb", "mbars", "millibar", "millibars"),
    "knot": ("knots", "kt", "kts", "kn"),
    "J": ("joule", "joules"),
    "N": ("newton", "newtons"),
}
"""Other spellings of each unit, in lower case."""
CANONICAL = {
    other: unit for unit, others in SPELLINGS.items() for other in (*others, *(u for u in (unit,) if len(u) > 2))
}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
DERIVED = {"Pa": {"kg": 1, "m": -1, "s": -2}, "N": {"kg": 1, "m": 1, "s": -2}, "J": {"kg": 1, "m": 2, "s": -2}}


def same_unit(a: str, b: str) -> bool:
    """Whether two spellings mean the same unit.

    For example, 'm**2 s**-2', 'm^2/s^2', 'J kg-1' and 'm2 s-2' mean the same unit, and so do 'hPa' and 'millibar'.
    'hPa' and 'Pa' do not.
    """
    return _powers(str(a)) == _powers(str(b))


def _name(word: str) -> str:
    """Usual spelling of a unit; the word itself if it has none."""
    return CANONICAL.get(word.strip().lower(), word.strip())


def _powers(unit: str) -> dict[str, int]:
    """Exponent of each base unit in a unit; an unknown word counts as a base unit of its own."""
    unit = re.sub(r"\s+per\s+", "/", _name(unit.translate(SUPERSCRIPTS)))
    powers: dict[str, int] = {}
    for part, factors in enumerate(unit.replace("**", "^").split("/")):
        for factor in re.split(r"[\s.*·⋅]+", _name(factors).strip("() ")):
            match = re.fullmatch(r"([^\W\d]+)\^?\(?([-+]?\d+)?\)?", factor)
            name, exponent = (match[1], int(match[2] or 1)) if match else (factor, 1)
            for base, power in DERIVED.get(_name(name), {_name(name): 1}).items():
                # Every factor after the first slash is a divisor.
                powers[base] = powers.get(base, 0) + (-power if part else power) * exponent
    return {base: power for base, power in powers.items() if power and base != "1"}
