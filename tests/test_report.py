"""Findings and the page of a report, on feedback made up by numpy."""

import numpy as np
import pandas as pd

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.report import Findings

FIELDS = (  # name, unit, pressure in Pa, typical value, spread, error, type
    ("temperature", "K", 85000.0, 275.0, 0.9, 1.0, "sonde"),
    ("u_component_of_wind", "m s-1", 85000.0, 5.0, 1.8, 1.5, "sonde"),
    ("u_component_of_wind", "m s-1", 25000.0, 25.0, 2.8, 2.5, "sonde"),
    ("surface_pressure", "hPa", np.nan, 1005.0, 0.8, 1.0, "land"),
)


def feedback(seed=0, cycles=24, stations=20, shared=0.3):
    """Calibrated feedback; a part of the background's error is shared by all rows of a cycle."""
    rng = np.random.default_rng(seed)
    frames = []
    for name, unit, pressure, typical, p, r, kind in FIELDS:
        places = np.random.default_rng(1)
        n = cycles * stations
        cycle = np.repeat(np.arange(cycles), stations)
        error = p * (np.sqrt(shared) * rng.normal(size=cycles)[cycle] + np.sqrt(1 - shared) * rng.normal(size=n))
        truth = typical + 5 * rng.normal(size=n)
        value, background = truth + r * rng.normal(size=n), truth - error
        analysis = background + p**2 / (p**2 + r**2) * (value - background)
        frames.append(
            pd.DataFrame(
                {
                    "cycle": cycle,
                    "station": np.tile([f"{kind[0].upper()}{i:02d}" for i in range(stations)], cycles),
                    "lat": np.tile(np.degrees(np.arcsin(places.uniform(-1, 1, stations))), cycles),
                    "lon": np.tile(places.uniform(-180, 180, stations), cycles),
                    "value": value,
                    "background": background,
                    "analysis": analysis,
                }
            ).assign(
                name=name,
                unit=unit,
                pres=pressure,
                type=kind,
                error_used=r,
                background_spread=p,
                flag="used",
                analysis_spread=np.sqrt(p**2 * r**2 / (p**2 + r**2)),
            )
        )
    frame = pd.concat(frames, ignore_index=True)
    withheld = frame["station"].isin(["S00", "L00"])
    frame.loc[withheld, "flag"] = "withheld"
    frame.loc[withheld, "analysis"] = frame["background"]
    frame.loc[withheld, "analysis_spread"] = frame["background_spread"]
    return frame


def test_a_calibrated_run_is_called_so():
    found = Findings(feedback())
    assert found.calibrated
    assert found.sentence.startswith("Calibrated: 1920 observations in 24 cycles")


def test_a_page_from_a_frame_alone():
    page = ndda.report.html(feedback(cycles=3), title="A <run>")
    assert "A &lt;run&gt;" in page
    assert "Too few cycles" in page
