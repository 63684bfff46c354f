"""A diffusion prior as the state evolution of a dynestyx model, filtered by dynestyx and by FA-APF.

dynestyx (Python 3.12 and 3.13: pip install dynestyx) describes a dynamical system by callables that return NumPyro
distributions. `ndda.DiffusionTransition` is such a distribution, so an emulator can be the state evolution without any
adapter. Simulators, ensemble Kalman filters and bootstrap particle filters only need to draw from it.

What to expect: dynestyx's bootstrap filter loses the truth. It weights particles only after they have moved, and twenty
accurate observations leave one particle alive. dynestyx's ensemble Kalman filter follows the truth (RMSE 0.9). FA-APF
does too, with the same two callables in a NumPyro program. The table shows no evidence for FA-APF: it needs tempering
here, and tempered weights do not estimate the evidence.

    python examples/dynestyx_filter.py --particles 256 --steps 30
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import typer
from numpyro.contrib.control_flow import scan
from rich.console import Console
from rich.table import Table

import numpyro_diffusion_da as ndda

prior = ndda.load_prior("lorenz96")


def state_evolution(x, u, t_now, t_next):
    """Distribution of the next state: one step of the emulator."""
    return ndda.DiffusionTransition(prior, x)


def observation(x, u, t):
    """Distribution of the observations: every second site, with an error of 0.3."""
    return dist.Normal(x[::2], 0.3).to_event(1)


def program(y):
    """The same model as a NumPyro program, for FA-APF.

    Here `x0` is one step before the first observation; in dynestyx it is at the first observation.
    """
    x0 = numpyro.sample("x0", prior.climatology())

    def step(x, y_t):
        x = numpyro.sample("x", state_evolution(x, None, None, None))
        numpyro.sample("y", observation(x, None, None), obs=y_t)
        return x, None

    scan(step, x0, y)


def main(
    particles: Annotated[int, typer.Option(help="Particles of each filter.", min=2)] = 256,
    steps: Annotated[int, typer.Option(help="Number of observation times.", min=2)] = 30,
    seed: Annotated[int, typer.Option(help="Seed of truth, observations and filters.")] = 0,
) -> None:
    """Simulate a truth with dynestyx, then run three filters."""
    try:
        import dynestyx as dsx
        from dynestyx.inference.configs.filter import EnKFConfig, PFConfig
    except ModuleNotFoundError:
        raise SystemExit("this example needs dynestyx (Python 3.12 or 3.13): pip install dynestyx") from None

    truth_key, run_key = jax.random.split(jax.random.key(seed))
    dynamics = dsx.DynamicalModel(prior.climatology(), state_evolution, observation)
    times = jnp.arange(float(steps))
    simulated = dsx.simulate(dynamics, rng_key=truth_key, predict_times=times)
    truth, y = np.asarray(simulated.states[0]), simulated.observations[0]

    table = Table(title=f"Lorenz-96 emulator, {steps} steps, N = {particles}")
    for column in ("filter", "RMSE", "observed", "unobserved", "log-evidence"):
        table.add_column(column, justify="left" if column == "filter" else "right")

    def add(name, mean, log_evidence):
        scored = [slice(None), slice(None, None, 2), slice(1, None, 2)]
        scores = [ndda.diagnostics.rmse(mean[None, steps // 3 :, at], truth[steps // 3 :, at]) for at in scored]
        table.add_row(name, *(f"{score:.2f}" for score in scores), log_evidence)

    configs = {
        "dynestyx, bootstrap": PFConfig(n_particles=particles),
        "dynestyx, ensemble Kalman": EnKFConfig(n_particles=particles),
    }
    for name, config in configs.items():
        filter = dsx.Filter(filter_config=config)
        with numpyro.handlers.seed(rng_seed=run_key), filter:
            dsx.sample("x", dynamics, obs_times=times, obs_values=y)
        states = filter.filtered_states
        if isinstance(config, PFConfig):
            mean = jnp.einsum("tn,tnd->td", jax.nn.softmax(states.log_weights, axis=-1), states.particles)
        else:
            mean = states.mean
        add(name, np.asarray(mean), f"{filter.marginal_loglik:.0f}")

    adapted = ndda.Filter(ndda.FAAPF(program), num_particles=particles)
    adapted.run(run_key, y)
    add("FA-APF", adapted.result.posterior["x"][0].mean(0), "-")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
