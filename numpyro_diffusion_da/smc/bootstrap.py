"""The bootstrap particle filter (Gordon, Salmond & Smith 1993): `guided_pf` with a draw that is not guided.

The control that shows what guidance buys. The kernel asks of a model

- ``propose_fn(rng_key, particle, observation) -> (particle, record)``, a draw that does not look at the observation,
- ``log_likelihood_fn(particle, record, observation) -> log p(y | x)`` of the new particle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import PRNGKeyArray, PyTree

from numpyro_diffusion_da.smc import guided_pf
from numpyro_diffusion_da.smc.base import Info, Kernel, Resampling, State, init

__all__ = ["Info", "State", "as_top_level_api", "build_kernel", "init"]


def build_kernel(
    propose_fn: Callable[[PRNGKeyArray, PyTree, PyTree], tuple[PyTree, PyTree]],
    log_likelihood_fn: Callable[[PyTree, PyTree, PyTree], Any],
    resampling_fn: Resampling | None = None,
    target_ess: float = 0.0,
    batch_size: int | None = None,
) -> Kernel:
    """Build the kernel; arguments as `guided_pf.build_kernel`.

    Raises:
        ValueError: target_ess outside [0, 1).
    """

    def propose(rng_key: PRNGKeyArray, particle: PyTree, observation: PyTree) -> tuple[PyTree, Any, PyTree]:
        moved, record = propose_fn(rng_key, particle, observation)
        return moved, log_likelihood_fn(moved, record, observation), record

    return guided_pf.build_kernel(propose, resampling_fn, target_ess, batch_size)


def as_top_level_api(
    propose_fn: Callable[[PRNGKeyArray, PyTree, PyTree], tuple[PyTree, PyTree]],
    log_likelihood_fn: Callable[[PyTree, PyTree, PyTree], Any],
    resampling_fn: Resampling | None = None,
    target_ess: float = 0.0,
    batch_size: int | None = None,
) -> Any:
    """The filter as a `blackjax.base.SamplingAlgorithm`; arguments as `build_kernel`."""
    from blackjax.base import SamplingAlgorithm

    kernel = build_kernel(propose_fn, log_likelihood_fn, resampling_fn, target_ess, batch_size)
    return SamplingAlgorithm(init, kernel)
