"""Comparison of units: files write 'm**2 s**-2', 'm2 s-2' and 'm^2/s^2' for the same unit."""

from __future__ import annotations

import re

SPELLINGS = {
    "": "1",
    "(0 - 1)": "1",
    "0-1": "1",
    "dimensionless": "1",
    "m of water equivalent": "m",
    "kelvin": "K",
    "degk": "K",
    "deg_k": "K",
    "meter": "m",
    "meters": "m",
    "metre": "m",
    "metres": "m",
    "pascal": "Pa",
    "pascals": "Pa",
}
DERIVED = {"Pa": {"kg": 1, "m": -1, "s": -2}, "N": {"kg": 1, "m": 1, "s": -2}, "J": {"kg": 1, "m": 2, "s": -2}}


def same_unit(a: str, b: str) -> bool:
    """Whether two spellings mean the same unit.

    For example, 'm**2 s**-2', 'm^2/s^2', 'J kg-1' and 'm2 s-2' mean the same unit, and 'hPa' and 'Pa' do not.
    """
    return _powers(a) == _powers(b)


def _powers(unit: str) -> dict[str, int]:
    """Exponent of each base unit in a unit; an unknown word counts as a base unit of its own."""
    unit = SPELLINGS.get(unit.strip().lower(), unit.strip())
    powers: dict[str, int] = {}
    for part, factors in enumerate(unit.replace("**", "^").split("/")):
        for factor in re.split(r"[\s.*·]+", factors.strip()):
            match = re.fullmatch(r"([^\W\d]+)\^?([-+]?\d+)?", factor)
            name, exponent = (match[1], int(match[2] or 1)) if match else (factor, 1)
            name = SPELLINGS.get(name.lower(), name)
            for base, power in DERIVED.get(name, {name: 1}).items():
                # Every factor after the first slash is a divisor.
                powers[base] = powers.get(base, 0) + (-power if part else power) * exponent
    return {base: power for base, power in powers.items() if power and base != "1"}
