"""Bootstrap particle filter (Gordon, Salmond & Smith 1993): `guided_pf` with a draw that is not guided.

A comparison with it shows the benefit of guidance. The kernel needs two functions of a model:

- ``propose_fn(rng_key, particle, observation) -> (particle, record)``, a draw that ignores the observation,
- ``log_likelihood_fn(particle, record, observation) -> log p(y | x)`` of the new particle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import PRNGKeyArray, PyTree

from numpyro_diffusion_da.smc import guided_pf
from numpyro_diffusion_da.smc.base import Info, Kernel, Resampling, State, init, top_level_api

__all__ = ["Info", "State", "as_top_level_api", "build_kernel", "init"]


def build_kernel(
    propose_fn: Callable[[PRNGKeyArray, PyTree, PyTree], tuple[PyTree, PyTree]],
    log_likelihood_fn: Callable[[PyTree, PyTree, PyTree], Any],
    resampling_fn: Resampling | None = None,
    target_ess: float = 0.0,
    batch_size: int | None = None,
    resample_below: float = 1.0,
) -> Kernel:
    """Build the kernel of the bootstrap particle filter.

    Args:
        propose_fn: (rng_key, particle, observation) -> (new particle, record), for one particle.
        log_likelihood_fn: (new particle, record, observation) -> log p(y | x), for one particle.
        resampling_fn: resampling function from `blackjax.smc.resampling`; None for systematic resampling.
        target_ess: effective sample size that tempering aims at, as a fraction of N. The default 0 means no tempering,
            which keeps the estimate of the evidence unbiased.
        batch_size: number of particles mapped at a time, which bounds the memory; None maps all at once.
        resample_below: fraction of N, from 0 to 1, of the effective sample size below which particles are resampled;
            see `guided_pf.build_kernel`. The default 1 resamples at every step.

    Returns:
        kernel(rng_key, state, observation) -> (State, Info), pure and jit-able.

    Raises:
        ValueError: `target_ess` is outside [0, 1), `resample_below` is outside [0, 1], or weights are to be tempered
            and carried on.
    """

    def propose(rng_key: PRNGKeyArray, particle: PyTree, observation: PyTree) -> tuple[PyTree, Any, PyTree]:
        moved, record = propose_fn(rng_key, particle, observation)
        return moved, log_likelihood_fn(moved, record, observation), record

    return guided_pf.build_kernel(propose, resampling_fn, target_ess, batch_size, resample_below)


as_top_level_api = top_level_api(build_kernel)
"""Build the filter as a `blackjax.base.SamplingAlgorithm`, with the arguments of `build_kernel`."""
