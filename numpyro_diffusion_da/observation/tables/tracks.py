"""Quality control of the positions of stations that move."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from numpyro_diffusion_da.arguments import require, require_number
from numpyro_diffusion_da.observation.tables.checks import Context, QualityCheck, on_sphere
from numpyro_diffusion_da.observation.tables.flags import Flag
from numpyro_diffusion_da.observation.tables.geometry import distances
from numpyro_diffusion_da.spelling import spelled

if TYPE_CHECKING:
    import pandas

SPEEDS: Mapping[str, float] = {"ship": 75.0}
"""Largest speed of stations by their type, km/h: 40 knots for ships."""

TOLERANCE = 50.0
"""Distance in km that two reports may be further apart than the speed says, because times and places are rounded."""

STILL = 48.0
"""Time in hours after which a station that does not move is worth a remark."""

MEETINGS = 3
"""Number of times with reports that do not fit each other, from which on a name stands for several stations."""

SAME_PLACE = 1.0
"""Largest distance in km of two reports from one place."""


@dataclasses.dataclass(frozen=True)
class Tracks(QualityCheck):
    """Reports of moving stations whose positions do not fit together.

    Of the reports of a station, in the order of their times, the largest number is kept that can follow each other
    without a speed above the largest one. The others are set aside, whichever they are; the first one is not trusted
    more than others. Of several such tracks the one with the slowest ways counts. Nothing is set aside if those that
    fit are no more than half, or if others are at the same times as they are three times or more: then the name stands
    for several stations, as "SHIP" does, or of two reports none can be told to be wrong. Of two stations of one name
    that never report at the same time, only the one with more reports stays.

    A wrong position is found only if it is further away than a station moves between reports: at 75 km/h and every six
    hours, 500 km.

    With `still`, a station that reports one and the same position for that time or longer is set aside for this time,
    as one whose position is not updated. So is a ship at anchor.

    Args:
        max_speed: largest speed in km/h by the text in the column `type`, upper or lower case. Stations of other types
            are not checked, nor rows without a station.
        still: time in hours; None for no such check.

    Raises:
        TypeError: `max_speed` is not a mapping, or a number is none.
        ValueError: a number is not positive.
    """

    max_speed: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(SPEEDS))
    still: float | None = None
    flag = Flag.OFF_TRACK

    def __post_init__(self) -> None:
        require(self.max_speed, Mapping, self, "max_speed", '{"ship": 75.0}')
        speeds = {}
        for kind, given in self.max_speed.items():
            name = f"max_speed[{kind!r}]"
            speeds[str(kind).casefold()] = require_number(given, self, name, "give a speed in km/h.", above=0.0)
        object.__setattr__(self, "max_speed", speeds)
        if self.still is not None:
            still = require_number(self.still, self, "still", "give a positive number of hours.", above=0.0)
            object.__setattr__(self, "still", still)

    def rejects(self, rows: pandas.DataFrame, context: Context) -> Bool[np.ndarray, " row"]:
        """Rows of reports that are off the track of their station."""
        wrong = np.zeros(len(rows), bool)
        for (kind, _), (at, hours, places) in self._reports(rows):
            off = off_track(hours, places, self.max_speed[kind])
            if self.still is not None:
                off |= standing(hours, places, self.still)
            for some, is_off in zip(at, off, strict=True):
                wrong[some] = is_off
        return wrong

    def remarks(self, rows: pandas.DataFrame) -> list[str]:
        """Stations that do not move for a long time, if they are not set aside."""
        if self.still is not None:
            return []
        used = rows[rows["flag"].isin([Flag.USED, Flag.WITHHELD])]
        tracks = self._reports(used)
        still = [name for (_, name), (_, hours, places) in tracks if standing(hours, places, STILL).any()]
        if not still:
            return []
        names = ", ".join(map(repr, still[:5])) + (f" and {len(still) - 5} more" if len(still) > 5 else "")
        return [
            f"{names} should move, but gave one position for {STILL:g} hours or longer: it is at anchor, or its "
            f"position is not updated; {spelled('still', STILL)} sets such rows aside."
        ]

    def _reports(self, rows: pandas.DataFrame) -> Iterator[tuple[tuple[str, str], Any]]:
        """Yield type and name of each station that moves, with the rows, hours and places of its reports in order."""
        if "station" not in rows or "type" not in rows:
            return
        kinds = rows["type"].astype(str).str.casefold()
        moving = rows.assign(_kind=kinds, _at=np.arange(len(rows)))
        moving = moving[kinds.isin(self.max_speed) & rows["station"].notna()]
        for key, mine in moving.groupby(["_kind", "station"], sort=False):
            reports = mine.groupby(["time", "lat", "lon"], sort=True)
            first = reports.head(1).sort_values(["time", "lat", "lon"])
            hours = (first["time"] - first["time"].iloc[0]).to_numpy() / np.timedelta64(1, "h")
            at = [mine["_at"].to_numpy()[found] for found in reports.indices.values()]
            yield key, (at, hours, np.stack(on_sphere(first), axis=-1))


def off_track(
    hours: Float[np.ndarray, " report"], places: Float[np.ndarray, "report 3"], speed: float
) -> Bool[np.ndarray, " report"]:
    """Reports outside the longest track; none if it holds no more than half of them, or several stations report.

    Args:
        hours: time of each report, not decreasing.
        places: place of each report on the unit sphere.
        speed: largest speed, km/h.
    """
    count = len(hours)
    length, before, effort = np.ones(count, int), np.full(count, -1), np.zeros(count)
    for i in range(1, count):
        reach = speed * (hours[i] - hours[:i]) + TOLERANCE
        distance = distances(places[:i], places[i])
        fits = np.flatnonzero(distance <= reach)
        if fits.size:
            longest = fits[length[fits] == length[fits].max()]
            # A wrong report may fit those two before or after it. Such a track is as long as the right one, and faster.
            efforts = effort[longest] + distance[longest] ** 2 / reach[longest]
            best = int(np.argmin(efforts))
            length[i], before[i], effort[i] = length[longest[best]] + 1, longest[best], efforts[best]
    longest = np.flatnonzero(length == length.max())
    at = int(longest[np.argmin(effort[longest])])
    if 2 * length[at] <= count:
        return np.zeros(count, bool)
    off = np.ones(count, bool)
    while at >= 0:
        off[at], at = False, before[at]
    # One station is not at two places at one time, so several names are one, if that happens again and again.
    if len(np.intersect1d(hours[off], hours[~off])) >= MEETINGS:
        return np.zeros(count, bool)
    return off


def standing(
    hours: Float[np.ndarray, " report"], places: Float[np.ndarray, "report 3"], still: float
) -> Bool[np.ndarray, " report"]:
    """Reports of stretches of time over which the position is the same.

    Args:
        hours: time of each report, not decreasing.
        places: place of each report on the unit sphere.
        still: shortest time of a stretch, hours.
    """
    found = np.zeros(len(hours), bool)
    start = 0
    for i in range(1, len(hours) + 1):
        if i < len(hours) and distances(places[i], places[start]) <= SAME_PLACE:
            continue
        if hours[i - 1] - hours[start] >= still:
            found[start:i] = True
        start = i
    return found
