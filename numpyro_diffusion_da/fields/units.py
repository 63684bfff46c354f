"""Comparison and conversion of units: files write 'm**2 s**-2', 'm2 s-2' and 'm^2/s^2' for the same unit."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

SPELLINGS = {
    # A table and not a library of units: files spell some thirty units. Pint does not read the 'm s-1' of the CF
    # conventions, and cf-units brings a C library.
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
    "kPa": ("kilopascal", "kilopascals"),
    "inHg": ("inches of mercury", "in_hg", "inhg"),
    "mmHg": ("millimeters of mercury", "mmhg"),
    "cm": ("centimeter", "centimeters", "centimetre", "centimetres"),
    "ft": ("foot", "feet"),
    "min": ("minute", "minutes"),
    "day": ("days",),
    "mg": ("milligram", "milligrams"),
    "mph": ("miles per hour",),
    "degree": ("degrees", "deg", "°", "degrees true", "degree_true", "degrees_true"),
    "radian": ("radians", "rad"),
    "knot": ("knots", "kt", "kts", "kn"),
    "J": ("joule", "joules"),
    "N": ("newton", "newtons"),
}
"""Other spellings of each unit, in lower case."""
CANONICAL = {other: unit for unit, others in SPELLINGS.items() for other in (*others, unit.lower())}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
DERIVED = {"Pa": {"kg": 1, "m": -1, "s": -2}, "N": {"kg": 1, "m": 1, "s": -2}, "J": {"kg": 1, "m": 2, "s": -2}}
SCALES = {
    # How many of the second unit the first one is.
    "hPa": (100.0, "Pa"),
    "kPa": (1000.0, "Pa"),
    "inHg": (3386.389, "Pa"),
    "mmHg": (133.322387415, "Pa"),
    "mm": (1e-3, "m"),
    "cm": (1e-2, "m"),
    "km": (1e3, "m"),
    "ft": (0.3048, "m"),
    "min": (60.0, "s"),
    "h": (3600.0, "s"),
    "day": (86400.0, "s"),
    "g": (1e-3, "kg"),
    "mg": (1e-6, "kg"),
    "knot": (1852.0 / 3600.0, "m s-1"),
    "mph": (0.44704, "m s-1"),
    "%": (0.01, "1"),
    "degC": (1.0, "K"),
    "degF": (5.0 / 9.0, "K"),
    "degree": (math.pi / 180.0, "radian"),
}
ZEROS = {"degC": 273.15, "degF": 459.67 * 5.0 / 9.0}
"""Zero of a scale of temperature in kelvins."""


class Conversion(NamedTuple):
    """Conversion of values to another unit: factor * value + offset.

    Attributes:
        factor: factor of values, and of their errors.
        offset: offset of values, in the new unit; errors have none.
    """

    factor: float
    offset: float


def conversion(a: str, b: str) -> Conversion | None:
    """Find how values in one unit become values in another unit.

    For example, from 'degC' to 'K' the factor is 1 and the offset 273.15, and from 'g/kg' to 'kg kg-1' the factor is
    0.001.

    Args:
        a: unit of the given values.
        b: wanted unit.

    Returns:
        The conversion; None if the units measure different things, or one of them is not known.
    """
    (scale, zero, powers), (wanted, wanted_zero, wanted_powers) = _basic(str(a)), _basic(str(b))
    if powers != wanted_powers:
        return None
    return Conversion(scale / wanted, (zero - wanted_zero) / wanted)


def _basic(unit: str) -> tuple[float, float, dict[str, int]]:
    """(how many basic units a unit is, its zero in basic units, powers of the basic units)."""
    given = _powers(unit)
    factor, powers = 1.0, dict[str, int]()
    for name, power in given.items():
        scale, basic = SCALES.get(name, (1.0, name))
        factor *= scale**power
        for base, exponent in _powers(basic).items():
            powers[base] = powers.get(base, 0) + exponent * power
    # Only a temperature by itself has a zero of its own: K m-1 and degC m-1 are the same.
    zero = next((ZEROS[name] for name, power in given.items() if name in ZEROS and given == {name: 1}), 0.0)
    return factor, zero, {base: power for base, power in powers.items() if power}


def same_unit(a: str, b: str) -> bool:
    """Whether two spellings mean the same unit.

    For example, 'm**2 s**-2', 'm^2/s^2', 'J kg-1' and 'm2 s-2' mean the same unit, and so do 'hPa' and 'millibar'.
    'hPa' and 'Pa' do not.
    """
    return _powers(str(a)) == _powers(str(b))


def _name(word: str) -> str:
    """Usual spelling of a unit in any case; the word itself if it has none."""
    word = word.strip()
    # Prefixes differ by case only: Mg is not mg, but MG is.
    mixed = len(word) == 2 and not (word.islower() or word.isupper())
    return word if word in SPELLINGS or mixed else CANONICAL.get(word.lower(), word)


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
