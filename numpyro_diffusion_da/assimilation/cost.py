"""What a run will cost, before it is made: network passes, memory and disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numpyro_diffusion_da.diffusion.prior import DiffusionPrior
from numpyro_diffusion_da.fields.times import hours

if TYPE_CHECKING:
    from numpyro_diffusion_da.assimilation.config import RunConfig
    from numpyro_diffusion_da.assimilation.emulator import Emulator
    from numpyro_diffusion_da.assimilation.prepared import PreparedRun

PRODUCTS = {"cheap": 2, "accurate": 4}
"""Products of the guidance's solver at each noise level; of the accurate one an estimate (docs/method.md)."""

CHECKED = 64
"""Largest number of particles of which the background check draws a forecast."""


def passes_of(config: RunConfig, emulator: Emulator) -> float:
    """Estimated network passes per particle and step, those of the conditioning network not counted.

    Args:
        config: the configuration.
        emulator: the prior.
    """
    prior, settings = emulator.prior, config.filter
    if isinstance(prior, DiffusionPrior):
        assert emulator.sampler is not None
        free = emulator.sampler.draw_evaluations(prior.noise_range)
    else:
        free = prior.generator_passes  # type: ignore[attr-defined]
    if settings.method in ("enkf", "bootstrap"):
        return free
    products = PRODUCTS[settings.guidance or "cheap"] if isinstance(prior, DiffusionPrior) else 6
    guided = free * (1 + products)
    checked = free * min(1.0, CHECKED / settings.particles) if config.quality.background_check is not False else 0.0
    weights = 2 * (1 + products) if settings.method == "fa_apf" else 0
    return guided + weights + checked


def cost_of(run: PreparedRun) -> list[str]:
    """Lines that say what a run will cost.

    Args:
        run: the prepared run.
    """
    config, emulator, steps = run.config, run.emulator, len(run.times)
    particles = config.filter.particles
    state = 4 * emulator.prior.layout.size
    members = config.output.members or particles
    disk = state * steps * (particles + members + 2)
    if config.output.background:
        disk += state * (steps - 1) * (members + 2 + (particles if emulator.frames > 1 else 0))
    passes = passes_of(config, emulator)
    # Moved ancestors have another conditioning than before.
    moves = config.filter.method == "fa_apf" and config.filter.taper_km is not False
    conditioning = (2 if moves else 1) * emulator.prior.conditioning_passes
    plus = f", and {conditioning} of the conditioning network" if conditioning else ""
    return [
        f"{steps} step{'s' * (steps != 1)} of {hours(emulator.step)}, from {run.times[0]} to {run.times[-1]}, with "
        f"{particles} particles.",
        f"About {passes:.0f} network passes per particle and step{plus}: "
        f"{(passes + conditioning) * particles * steps:,.0f} in all.",
        f"The ensemble takes {_bytes(state * particles * emulator.frames)} of memory, and the folder up to "
        f"{_bytes(disk)} of disk.",
    ]


def _bytes(count: float) -> str:
    """Number of bytes with a unit that a person reads."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
