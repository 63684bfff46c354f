"""A user's program: that of the README with annotations, a predictive weight and a prior of the user's own.

`mypy --strict` accepts it against the installed wheel (tests/test_typing.py), and it runs.
"""

from __future__ import annotations

from typing import assert_type

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import xarray
from jaxtyping import Array, Float, PyTree
from numpyro.contrib.control_flow import scan

import numpyro_diffusion_da as ndda
from numpyro_diffusion_da.diffusion import Conditioning, KrylovSolve, Noise, WhiteNoise
from numpyro_diffusion_da.observation import Likelihood
from numpyro_diffusion_da.priors import RingEmulator
from numpyro_diffusion_da.results import fixed_lag, to_datatree
from numpyro_diffusion_da.smc import Info, State
from numpyro_diffusion_da.transition import Dynamics, PredictiveWeight, WeightRecord


class HalfDirac(PredictiveWeight):
    """Half the log-likelihood of the forecast mean."""

    def __call__(self, dynamics: Dynamics, likelihood: Likelihood) -> tuple[Float[Array, ""], WeightRecord]:
        moments = dynamics.moments()
        return 0.5 * likelihood.log_prob(moments.mean), WeightRecord(moments.passes, moments.mean)


class Persistence(ndda.DiffusionPrior):
    """x' = x + 0.5 z with z ~ N(0, I): the exact denoiser is z_s / (1 + s^2)."""

    noise: Noise = WhiteNoise()
    noise_range: tuple[float, float] = eqx.field(static=True, default=(0.02, 80.0))
    layout: ndda.Layout = eqx.field(static=True, default=ndda.Layout((40,), ("station",)))
    conditioning_passes: int = eqx.field(static=True, default=0)

    def condition(self, state: PyTree, inputs: PyTree = None) -> Conditioning:
        return self.only_state(state, inputs)

    def denoise(
        self, z_s: Float[Array, ...], noise_level: Float[Array, ""], conditioning: Conditioning
    ) -> Float[Array, ...]:
        return z_s / (1.0 + noise_level**2)

    def location(self, conditioning: Conditioning) -> Float[Array, ...]:
        return jnp.asarray(conditioning)

    def scale(self, conditioning: Conditioning) -> Float[Array, ...]:
        return jnp.asarray(0.5)

    def climatology(self) -> dist.Distribution:
        return dist.Normal(jnp.zeros(self.layout.shape), 1.0).to_event(1)


def assimilate(prior: ndda.DiffusionPrior, y: Float[Array, "time 10"], weight: PredictiveWeight) -> xarray.DataTree:
    """Filter the observations, and return the labeled result."""

    def model(y: Array) -> None:
        x0 = numpyro.sample("x0", prior.climatology())

        def step(x: Array, y_t: Array) -> tuple[Array, None]:
            x = numpyro.sample("x", ndda.DiffusionTransition(prior, x))
            numpyro.sample("y", dist.Normal(x[::4], 0.5).to_event(1), obs=y_t)
            return x, None

        scan(step, x0, y)

    algorithm = ndda.FAAPF(
        model,
        weight=weight,
        guidance=ndda.MMPS(solver=KrylovSolve(products=2)),
        sampler=ndda.Sampler(ndda.DPMSolverPP2M(), ndda.KarrasSchedule(4)),
        inflation=(ndda.Multiplicative(1.02),),
    )
    filter = ndda.Filter(algorithm, num_particles=8, num_chains=2, progress_bar=False)
    filter.run(jax.random.key(0), y)
    filter.print_summary()
    assert_type(filter.result, ndda.FilterResult)
    assert_type(to_datatree(fixed_lag(filter.result, 1)), xarray.DataTree)

    online = ndda.OnlineFilter(algorithm, num_particles=8)
    state = online.init(jax.random.key(0), y[:1])
    state, info = online.step(jax.random.key(1), state, y[:1])
    assert_type(state, State)
    assert_type(info, Info)
    return filter.to_datatree(lag=1)


def main() -> None:
    """Filter three steps with each prior."""
    emulator = ndda.load_prior("lorenz96")
    assert_type(emulator, RingEmulator)
    y = jnp.zeros((3, 10))
    for prior, weight in ((emulator, ndda.Dirac()), (Persistence(), HalfDirac())):
        tree = assimilate(prior, y, weight)
        assert tree["posterior"]["x"].shape == (2, 8, 3, 40)


if __name__ == "__main__":
    main()
