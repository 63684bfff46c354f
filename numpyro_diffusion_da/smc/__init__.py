"""Filter kernels in BlackJAX style: `init`, `build_kernel`, `as_top_level_api`; nothing here knows of diffusion."""

from numpyro_diffusion_da.smc import bootstrap, enkf, fa_apf, guided_pf

__all__ = ["bootstrap", "enkf", "fa_apf", "guided_pf"]
