"""`ndda info`: versions, devices, and the priors in the package."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import numpyro_diffusion_da as ndda

SYSTEMS = {
    "lorenz96": "stochastic Lorenz-96, forcing 8, steps of 0.1 time units",
    "lorenz96_one_pass": "the same system, drawn in one pass of the network",
    "held_suarez": "weather of a dry atmosphere (Held-Suarez), steps of 12 h",
}
"""What each prior that ships with the package forecasts."""


def info(
    name: Annotated[str | None, typer.Argument(help="Prior whose whole data card to print, as JSON.")] = None,
) -> None:
    """Print versions, devices, and the priors in the package; with a name, the data card of this prior."""
    import numpyro_diffusion_da as ndda

    console = Console()
    if name is not None:
        try:
            prior = ndda.load_prior(name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        typer.echo(json.dumps(prior.card, indent=2))
        return
    _print_versions(console)
    for name in ndda.priors.SHIPPED:
        console.print(f"\n[bold]{name}[/bold]: {SYSTEMS[name]}")
        for line in _lines(ndda.load_prior(name)):
            console.print(f"  {escape(line)}", soft_wrap=True, highlight=False)
    console.print("\nThe whole data card of a prior: ndda info NAME.")


def _print_versions(console: Console) -> None:
    """Print versions and devices."""
    import jax

    table = Table("package", "version", header_style="bold")
    table.add_row("python", platform.python_version())
    for name in ("numpyro-diffusion-da", "jax", "numpyro", "blackjax", "xarray", "arviz", "weathernext"):
        try:
            table.add_row(name, version(name))
        except PackageNotFoundError:
            table.add_row(name, "not installed")
    console.print(table)
    console.print(f"devices: {', '.join(str(d) for d in jax.devices())}")


def _lines(prior: Any) -> list[str]:
    """Lines about a prior: its state, its noise levels, and how good one step is."""
    card = prior.card
    found = [*_state(prior.layout)]
    if "noise_range" in card:
        low, high = card["noise_range"]
        found.append(f"noise levels: {low:g} to {high:g}")
    # Cards of the sphere have a score for each channel, and test states beside those of the training.
    scores = card["one_step"] if "one_step" in card else card["validation"]["one_step"]
    error = scores.get("mean_error_relative_to_persistence", scores.get("mean_error_over_persistence"))
    found.append(f"error of the mean of one step: {_range(error)} of that of persistence")
    if "crps_ratio" in scores:
        found.append(f"CRPS of one step: {scores['crps_ratio']:.4f} times that of the true system")
    else:
        found.append(f"CRPS of one step: {_range(scores['crps_over_persistence'])} of that of persistence")
    return found


def _state(layout: ndda.Layout) -> list[str]:
    """Lines about the shape of a state and its variables."""
    sizes = " x ".join(
        f"{size} {dim}s" for size, dim in zip(layout.shape, layout.dims, strict=True) if dim != "channel"
    )
    found = [f"state: {sizes}"]
    for variable in layout.variables:
        levels = f" at {', '.join(map(str, variable.levels))} hPa" if variable.levels else ""
        found.append(f"  {variable.name} [{variable.units}]{levels}")
    return found


def _range(values: Any) -> str:
    """Number with two digits, or the smallest and the largest of several."""
    several = values if isinstance(values, list) else [values]
    texts = dict.fromkeys(f"{value:.2g}" for value in (min(several), max(several)))
    return " to ".join(texts)
