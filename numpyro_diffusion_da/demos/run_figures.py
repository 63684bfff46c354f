"""Figure of a run in progress for `ndda watch`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos.run_watching import rows


def run_figure(run: ndda.inference.RunProgress) -> Figure:
    """Figure of a run: its diagnostics over the steps, one line for each chain.

    Args:
        run: progress of a run with at least one step.
    """
    shown = [*rows(run), ("seconds of a step", "seconds", 0.0, 0.0)]
    figure = Figure(figsize=(8, 1.7 * len(shown)), layout="constrained")
    for axes, (label, name, _, highest) in zip(figure.subplots(len(shown), 1, sharex=True), shown, strict=True):
        for values in run.series(name):
            axes.plot(np.arange(len(values)), values, linewidth=1)
        axes.set_ylabel(label)
        axes.set_xlim(0, max(run.steps - 1, 1))
        if name == "seconds":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if name.startswith("departure_ratio"):
            axes.axhline(1.0, color="0.6", linewidth=0.8)
        elif highest:
            axes.set_ylim(0, 1.05 * highest)
    axes.set_xlabel("step")
    figure.suptitle(f"{run.directory.name}: {run.done} of {run.chains * run.steps} steps")
    return figure
