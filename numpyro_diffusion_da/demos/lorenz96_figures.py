"""Figure of the Lorenz-96 demo; matplotlib is imported when the figure is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


import numpy as np

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.demos.lorenz96_demo import (
    BOOTSTRAP,
    ENKF,
    FREE,
    GLOBAL,
    GUIDED,
    MAIN,
    ONE_PASS,
    TwinExperiment,
    TwinResult,
)

COLORS = {
    FREE: "#999999",
    BOOTSTRAP: "#E69F00",
    GUIDED: "#56B4E9",
    GLOBAL: "#CC79A7",
    MAIN: "#D55E00",
    ENKF: "#000000",
    ONE_PASS: "#009E73",
}


def twin_figure(experiment: TwinExperiment, result: TwinResult) -> Figure:
    """Figure of the first truth and its analysis, of errors over time, and of the weights of the main filter.

    The upper panels show truth, observations, analysis and free ensemble by site and cycle. The lower panels show the
    error of each filter over time, one unobserved site, the effective number of particles, and the tempering exponent.

    Args:
        experiment: the experiment that was run.
        result: scores of all filters, and their runs on the first truth.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    rows = figure.add_gridspec(2, 1, height_ratios=[1.1, 1.6])
    upper, lower = figure.add_subfigure(rows[0]), figure.add_subfigure(rows[1])
    mean = {name: run.posterior["x"][0].mean(0) for name, run in result.runs.items()}
    observations = np.full_like(result.states, np.nan)
    observations[:, :: experiment.every] = result.runs[MAIN].observed_data["y"]
    fields = {
        "truth": result.states,
        "observations": observations,
        f"{MAIN}, mean": mean[MAIN],
        f"{FREE}, mean": mean[FREE],
    }
    limit = float(np.abs(result.states).max())
    panels = upper.subplots(1, 4, sharey=True)
    for axes, (title, field) in zip(panels, fields.items(), strict=True):
        image = axes.imshow(field, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_facecolor("#dddddd")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("site")
    panels[0].set_ylabel("cycle")
    upper.colorbar(image, ax=panels, label="x", pad=0.01)

    grid = lower.add_gridspec(2, 2, height_ratios=[1, 0.7])
    axes = lower.add_subplot(grid[0, 0])
    for name, errors in result.rmse_by_time.items():
        axes.plot(errors.mean(0), color=COLORS[name], label=name, lw=2.2 if name == MAIN else 1.3)
        if len(errors) > 1:
            error = errors.std(0, ddof=1) / np.sqrt(len(errors))
            axes.fill_between(
                np.arange(errors.shape[1]),
                errors.mean(0) - error,
                errors.mean(0) + error,
                color=COLORS[name],
                alpha=0.2,
                lw=0,
            )
    axes.axvline(experiment.spin_up, color="k", lw=0.7, ls=":")
    axes.set_ylim(0)
    axes.set_xlabel("cycle (scores start at the dotted line)")
    axes.set_ylabel("RMSE")
    axes.set_title(f"error of the ensemble mean, all sites, mean over {len(errors)} truths", fontsize=10)
    axes.legend(fontsize=8, ncols=3, frameon=False)

    axes = lower.add_subplot(grid[0, 1])
    site = 1  # not observed, because the observed sites are the multiples of `experiment.every`
    for name in (FREE, MAIN):
        low, high = np.quantile(result.runs[name].posterior["x"][0, :, :, site], [0.05, 0.95], axis=0)
        axes.fill_between(
            np.arange(len(low)), low, high, color=COLORS[name], alpha=0.35, lw=0, label=f"{name}, 90 % interval"
        )
    axes.plot(mean[MAIN][:, site], color=COLORS[MAIN], lw=1.2)
    axes.plot(result.states[:, site], color="k", lw=1.2, label="truth")
    axes.set_xlabel("cycle")
    axes.set_ylabel("x")
    axes.set_title(f"site {site} (not observed)", fontsize=10)
    axes.legend(fontsize=8, ncols=3, frameon=False, loc="upper left")

    stats = result.runs[MAIN].sample_stats
    axes = lower.add_subplot(grid[1, 0])
    axes.plot(
        ndda.diagnostics.median_over_blocks(stats["distinct_ancestors"][0]),
        color=COLORS[MAIN],
        label="distinct ancestors (with tempering)",
    )
    axes.plot(
        ndda.diagnostics.median_over_blocks(stats["ess"][0]),
        color=COLORS[MAIN],
        ls=":",
        label="ESS of the weights (before tempering)",
    )
    axes.set_yscale("log")
    axes.set_ylim(0.9, 1.1 * len(stats["log_weights"][0]))
    axes.set_xlabel("cycle")
    axes.set_title(f"{MAIN}: effective particles, median over sites", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes = lower.add_subplot(grid[1, 1])
    axes.plot(ndda.diagnostics.median_over_blocks(stats["tempering"][0]), color=COLORS[MAIN])
    axes.set_yscale("log")
    axes.set_xlabel("cycle")
    axes.set_ylabel("alpha")
    axes.set_title(f"{MAIN}: tempering exponent (1 = none), median over sites", fontsize=10)
    return figure
