"""`ndda info`: versions, devices, and the priors in the package."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table


def info() -> None:
    """Print versions, devices, and the priors in the package with their data cards."""
    import jax

    import numpyro_diffusion_da as ndda

    console = Console()
    table = Table("package", "version", header_style="bold")
    table.add_row("python", platform.python_version())
    for name in ("numpyro-diffusion-da", "jax", "numpyro", "blackjax", "xarray", "arviz", "weathernext"):
        try:
            table.add_row(name, version(name))
        except PackageNotFoundError:
            table.add_row(name, "not installed")
    console.print(table)
    console.print(f"devices: {', '.join(str(d) for d in jax.devices())}")
    for name in ndda.priors.SHIPPED:
        console.print(f"[bold]{name}[/bold]")
        console.print_json(json.dumps(ndda.load_prior(name).card))
