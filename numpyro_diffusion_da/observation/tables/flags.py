"""Flags of the rows of a table: a closed set of reasons."""

from __future__ import annotations

import enum


class Flag(enum.StrEnum):
    """Reason why a row of a table of observations is used or not. Each row has exactly one flag, the first to apply.

    A flag is its text: ``frame[frame["flag"] == "used"]``.

    Attributes:
        USED: the row is assimilated.
        MISSING: its value, time, place or level is missing, or holds a code for a missing value.
        NOT_IN_MODEL: the model has no such variable, or the map of variables leaves it out.
        OFF_WINDOW: its time is in no window.
        OUTSIDE_GRID: its place, or a part of its footprint, is outside the grid of a region.
        ABOVE_MODEL: its pressure is lower than that of the model's highest level.
        BELOW_MODEL: its pressure is higher than that of the model's lowest level.
        MISSING_SURFACE: the model has no value there, such as the sea surface temperature over land.
        BAD_QUALITY: the table's own column `quality` rejects it.
        BLACKLISTED: it is on a list of rows that are not to be used.
        OUT_OF_BOUNDS: its value is impossible, or far from the climate.
        OFF_TRACK: its place does not fit the other reports of its station, which moves.
        HEIGHT_DIFFERENCE: its station is much higher or lower than the model's surface.
        DUPLICATE: an earlier row is the same observation.
        REPEATED_REPORT: another report of the station in this window is nearer to the time of the analysis.
        THINNED: another row nearby is used in its place.
        SUPEROBBED: it is a part of a mean over several rows, which is a row of its own.
        WITHHELD: it is compared with the analysis, and not assimilated.
        FAR_FROM_BACKGROUND: a filter's gross-error check rejected it.
        WITHHELD_FAR: it is withheld, and the check would have rejected it; it is no measure of the analysis.
    """

    USED = "used"
    MISSING = "missing"
    NOT_IN_MODEL = "not in model"
    OFF_WINDOW = "off window"
    OUTSIDE_GRID = "outside grid"
    ABOVE_MODEL = "above model"
    BELOW_MODEL = "below model"
    MISSING_SURFACE = "missing surface"
    BAD_QUALITY = "bad quality"
    BLACKLISTED = "blacklisted"
    OUT_OF_BOUNDS = "out of bounds"
    OFF_TRACK = "off track"
    HEIGHT_DIFFERENCE = "height difference"
    DUPLICATE = "duplicate"
    REPEATED_REPORT = "repeated report"
    THINNED = "thinned"
    SUPEROBBED = "superobbed"
    WITHHELD = "withheld"
    FAR_FROM_BACKGROUND = "far from background"
    WITHHELD_FAR = "withheld, far from background"
