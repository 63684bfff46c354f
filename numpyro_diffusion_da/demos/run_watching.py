"""Views of a run in progress for `ndda watch` in the terminal."""

from __future__ import annotations

import datetime

import numpy as np
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import numpyro_diffusion_da as ndda

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 48


def sparkline(values: np.ndarray, lowest: float, highest: float) -> str:
    """Line of block characters for a series, shortened to medians of neighbors if it is long.

    Args:
        values: the series; NaN is a gap.
        lowest: value of the lowest character.
        highest: value of the highest one.
    """
    parts = np.array_split(values, min(WIDTH, max(len(values), 1)))
    medians = [float(np.median(p[np.isfinite(p)])) if np.isfinite(p).any() else float("nan") for p in parts]
    scale = max(highest - lowest, 1e-12)
    places = [len(BARS) * (value - lowest) / scale for value in medians]
    return "".join(" " if np.isnan(at) else BARS[int(np.clip(at, 0, len(BARS) - 1))] for at in places)


def rows(run: ndda.inference.RunProgress) -> list[tuple[str, str, float, float]]:
    """Quantities of a run to show: (label, name in the notes, value at the bottom, value at the top)."""
    particles = float(run.settings.get("num_particles", 1))
    sites = list(run.notes[-1][-1]["departure_ratio"]) if run.notes else []
    return [
        ("ESS", "ess", 0.0, particles),
        ("tempering", "tempering", 0.0, 1.0),
        *(
            (f"(O-B)²/(P+R) {site if len(sites) > 1 else ''}".rstrip(), f"departure_ratio.{site}", 0.0, 2.0)
            for site in sites
        ),
    ]


def run_panel(run: ndda.inference.RunProgress) -> RenderableType:
    """View of a run for the terminal.

    Args:
        run: progress of the run.
    """
    total = run.chains * run.steps
    particles = int(run.settings.get("num_particles", 0))
    what = f"{run.settings.get('algorithm', 'filter')} of '{run.settings.get('model', '?')}', {particles} particles"
    bar = Table.grid()  # a bar by itself does not end its line
    bar.add_row(ProgressBar(total=total, completed=run.done, width=60))
    lines: list[RenderableType] = [
        Text(f"{run.directory}: {what}, {run.chains} chain{'s' if run.chains > 1 else ''} of {run.steps} steps"),
        bar,
    ]
    if not run.notes:
        return Group(*lines, Text("no step yet"))
    last = run.notes[-1][-1]
    speed = last["particles_per_second"]
    state = f"{run.done} of {total} steps, {speed:,.0f} particles per second"
    if run.done < total:
        left = datetime.timedelta(seconds=round(run.left)) if np.isfinite(run.left) else "?"
        state += f", {left} left; the last step was written {run.age:.0f} s ago"
    table = Table("", "now", f"chain {len(run.notes) - 1} over its steps", header_style="bold", box=None)
    for label, name, lowest, highest in rows(run):
        values = run.series(name)[-1]
        table.add_row(label, f"{values[-1]:.3g}", sparkline(values, lowest, highest))
    passes = ", ".join(f"{count:.4g} {name}" for name, count in last["passes"].items())
    memory = ", ".join(f"{number / 2**30:.2f} GB {name}" for name, number in last["peak_memory"].items())
    table.add_row("log-evidence", f"{run.series('log_evidence_increment')[-1].sum():.5g}", "sum so far")
    lines += [Text(state), table, Text(f"network passes per particle and step: {passes}. Peak memory: {memory}.")]
    return Group(*lines)
