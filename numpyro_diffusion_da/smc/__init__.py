"""Filter kernels in BlackJAX style: `init`, `build_kernel`, `as_top_level_api`; nothing here knows of diffusion."""

from numpyro_diffusion_da.smc import (
    bootstrap,
    enkf,
    ensemble_update,
    fa_apf,
    guided_pf,
    local_ancestors,
    localization,
    pmmh,
    smc2,
    tempering,
)

__all__ = [
    "bootstrap",
    "enkf",
    "ensemble_update",
    "fa_apf",
    "guided_pf",
    "local_ancestors",
    "localization",
    "pmmh",
    "smc2",
    "tempering",
]
