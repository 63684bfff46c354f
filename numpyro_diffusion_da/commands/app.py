"""The command `ndda` with all its commands."""

from __future__ import annotations

import typer

from numpyro_diffusion_da.commands.assimilate import assimilate, forecast, report, verify
from numpyro_diffusion_da.commands.demo import demo
from numpyro_diffusion_da.commands.info import info
from numpyro_diffusion_da.commands.watch import watch

app = typer.Typer(
    help="Filter observations through a pretrained diffusion emulator, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (assimilate, forecast, verify, report, watch, demo, info):
    app.command()(command)
