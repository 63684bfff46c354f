"""`PMMH`: draw the global parameters of a program by a Markov chain on the evidence estimated by a particle filter."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_diffusion_da.arguments import require_key
from numpyro_diffusion_da.filters.base import FilterAlgorithm, takes_algorithm
from numpyro_diffusion_da.inference.base import BATCH, ParameterInference
from numpyro_diffusion_da.inference.devices import agreed, to_host
from numpyro_diffusion_da.inference.progress import progress
from numpyro_diffusion_da.inference.threads import lapack_on_one_thread
from numpyro_diffusion_da.program.parameters import GlobalParameters
from numpyro_diffusion_da.results.result import ParameterResult
from numpyro_diffusion_da.smc import pmmh
from numpyro_diffusion_da.smc.base import map_particles

CHUNK = 64
"""Largest number of iterations in one call of the compiled function, after which the progress bar is updated."""

CLOUD = 512
"""Number of prior draws that estimate the prior's covariance; a chain starts from one of the first `BATCH` of them."""


class PMMH(ParameterInference):
    """Particle-marginal Metropolis-Hastings over a NumPyro program, with the interface of `numpyro.infer.MCMC`.

    It draws the global parameters given all observations. Global parameters are the unobserved sites outside the scan
    that its body uses; sites that only give the initial state are drawn by the filter. Every proposal runs the filter
    once over the whole series.

    If the evidence of the filter is unbiased, the draws are from the exact posterior for any number of particles. The
    number of particles determines how well the chain mixes. Choose it so that the log-evidence at a parameter value
    from the posterior has a standard deviation of 1 to 1.7 (Doucet, Pitt, Deligiannidis & Kohn 2015; Sherlock, Thiery,
    Roberts & Rosenthal 2015). `print_summary` shows this standard deviation.

    Args:
        algorithm: `Bootstrap(model)`, or another filter of the program that estimates its evidence. A run warns if the
            evidence is biased.
        num_particles: number of particles N of the filter.
        num_warmup: number of iterations that adapt the proposal and are then discarded, 0 or more.
        num_samples: number of draws of each chain.
        num_chains: number of independent chains.
        batch_size: number of particles moved at a time, over all chains, which bounds the memory; None for as many as
            fit into half of the device's memory, and on a CPU for no more than its cores move fastest. Below N, one
            chain moves at a time.
        progress_bar: whether to show a progress bar over the iterations.
        mesh: devices that share the particles of each filter, as for `Filter`; None for one device.

    Raises:
        ValueError: `num_warmup` is negative, another number is below 1, `mesh` has another axis than "particles", or
            its devices cannot share the particles equally.
        TypeError: `algorithm` is not a filter, or a number is not a whole number.
    """

    @takes_algorithm("num_particles=256, num_warmup=500, num_samples=1000")
    def __init__(
        self,
        algorithm: FilterAlgorithm,
        *,
        num_particles: int,
        num_warmup: int,
        num_samples: int,
        num_chains: int = 1,
        batch_size: int | None = None,
        progress_bar: bool = True,
        mesh: Mesh | None = None,
    ) -> None:
        numbers = {"num_warmup": num_warmup, "num_samples": num_samples}
        super().__init__(algorithm, num_particles, num_chains, batch_size, progress_bar, mesh, **numbers)
        self.num_warmup = num_warmup
        self.num_samples = num_samples

    def run(self, rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> None:
        """Draw from the posterior of the parameters given the observations in the arguments of the program.

        `result` holds the result afterwards: draws of each parameter, shape (num_chains, num_samples, ...), and the
        statistics `acceptance_rate`, `is_accepted`, `log_evidence` and `lp`, each (num_chains, num_samples). The keys
        of chains and iterations are folded from `rng_key` by their indices, so `num_chains` does not change the draws
        of a chain.

        Each run reads anew what the program reads from outside its arguments, as `Filter.run` does.

        Args:
            rng_key: random key, from `jax.random.key`.
            *args: arguments of the program.
            **kwargs: keyword arguments of the program.

        Raises:
            ValueError: the program has no global parameters or a discrete one, the filter cannot run it, or the filter
                does not estimate the evidence.
            FloatingPointError: none of the prior draws from which a chain may start has a finite log-evidence.
        """
        require_key(rng_key, self)
        parameters, attributes = self._begin(args, kwargs)
        given = (parameters.program.args, parameters.program.kwargs)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng_key, jnp.arange(self.num_chains))
        draws = self._chains(keys, *self._start(keys, given), given)
        positions = draws.pop("parameters")
        center = positions.reshape(-1, positions.shape[-1]).mean(0, dtype=float)
        self._result = ParameterResult(
            posterior=self._values(positions, given),
            sample_stats=draws,
            over_time={},
            attributes={
                **attributes,
                "seed": str(np.asarray(jax.random.key_data(rng_key)).tolist()),
                "num_warmup": self.num_warmup,
                "num_chains": self.num_chains,
                **self._spread(jax.random.fold_in(rng_key, self.num_chains), center, given),
            },
        )

    def _num_filters(self) -> int:
        """Largest number of filters that run at the same time."""
        return max(self.num_chains, BATCH)

    def _parts(self, parameters: GlobalParameters) -> dict[str, Callable[..., Any]]:
        """Functions to compile, by name: those of the base class, `cloud` (prior draws) and `move` (iterations)."""
        ends = np.concatenate([pmmh.window_ends(self.num_warmup), np.zeros(self.num_samples, bool)])

        def cloud(rng_key: Any, given: Any) -> Any:
            """Return prior draws, and for the first `BATCH` of them the log-prior and a Gumbel variable."""
            at = parameters.at(*given)
            draw_key, choice_key = jax.random.split(rng_key)
            positions = jax.vmap(at.draw)(jax.random.split(draw_key, CLOUD))
            return positions, jax.vmap(at.log_prior)(positions[:BATCH]), jax.random.gumbel(choice_key, (BATCH,))

        def move(rng_keys: Any, states: Any, adaptations: Any, start: Array, number: Array, given: Any) -> Any:
            """Make `number` iterations, at most `CHUNK`, of each chain, from iteration `start` on."""
            at = parameters.at(*given)

            def log_evidence(rng_key: Any, position: Array) -> tuple[Array, tuple[()]]:
                return self._evidence(at)(rng_key, position).state.log_evidence, ()

            kernel = pmmh.build_kernel(at.log_prior, log_evidence)

            def chain(rng_key: Any, state: Any, adaptation: Any) -> Any:
                def iterate(i: Array, carry: Any) -> Any:
                    state, adaptation, kept = carry
                    n = start + i
                    state, info = kernel(jax.random.fold_in(rng_key, n), state, pmmh.proposal_factor(adaptation))
                    adapted = pmmh.adapt(adaptation, state.position.parameters, info, jnp.asarray(ends)[n])
                    warm = n < self.num_warmup
                    adaptation = jax.tree.map(lambda new, old: jnp.where(warm, new, old), adapted, adaptation)
                    draw = {
                        "parameters": state.position.parameters,
                        "acceptance_rate": info.acceptance_rate,
                        "is_accepted": info.is_accepted,
                        "log_evidence": state.position.log_evidence,
                        "lp": state.logdensity,
                    }
                    return state, adaptation, jax.tree.map(lambda all_, one: all_.at[i].set(one), kept, draw)

                kept = {
                    "parameters": jnp.zeros((CHUNK, parameters.size)),
                    "acceptance_rate": jnp.zeros(CHUNK),
                    "is_accepted": jnp.zeros(CHUNK, bool),
                    "log_evidence": jnp.zeros(CHUNK),
                    "lp": jnp.zeros(CHUNK),
                }
                return jax.lax.fori_loop(0, number, iterate, (state, adaptation, kept))

            return map_particles(chain, self._filters_at_a_time)(rng_keys, states, adaptations)

        return {**super()._parts(parameters), "cloud": cloud, "move": move}

    def _start(self, keys: Any, given: Any) -> tuple[Any, Any]:
        """First state and first adaptation of each chain, with a leading axis of chains.

        A chain starts from one of `BATCH` prior draws, chosen with probability proportional to its estimated evidence.

        Raises:
            FloatingPointError: none of these draws has a finite log-evidence.
        """
        states = []
        for key in keys:
            start_key = jax.random.fold_in(key, self.num_warmup + self.num_samples)
            cloud, log_priors, gumbel = to_host(self._compiled["cloud"](start_key, given))
            logs, _ = self._at(start_key, cloud[:BATCH], given)
            usable = np.isfinite(logs) & np.isfinite(log_priors)
            if not np.any(usable):
                raise FloatingPointError(
                    f"none of {BATCH} draws of the parameters from their prior has a finite log-evidence; check the "
                    "observations for infinite values, and whether the prior is too wide."
                )
            # The largest sum with a Gumbel variable is a draw with probabilities proportional to the evidence.
            chosen = int(np.argmax(np.where(usable, logs + gumbel, -np.inf)))
            position = pmmh.Position(cloud[chosen], log_priors[chosen], logs[chosen].astype(cloud.dtype), ())
            states.append((pmmh.at(position), pmmh.start_adaptation(jnp.asarray(_covariance(cloud)))))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *states)

    def _chains(self, keys: Any, states: Any, adaptations: Any, given: Any) -> dict[str, np.ndarray]:
        """Make all iterations, in chunks of about half a second, and return the draws after the warm-up.

        Returns:
            Statistics of each draw by name, (chain, draw), and the positions as `parameters`, (chain, draw, d).
        """
        total, done, chunk = self.num_warmup + self.num_samples, 0, 2
        chunks: list[dict[str, np.ndarray]] = []
        with lapack_on_one_thread(), progress(self.progress_bar, "PMMH", total) as advance:
            while done < total:
                number = agreed(min(chunk, CHUNK, total - done), self.mesh)
                began = time.monotonic()
                states, adaptations, kept = self._compiled["move"](
                    keys, states, adaptations, np.asarray(done), np.asarray(number), given
                )
                chunks.append({name: values[:, :number] for name, values in to_host(kept).items()})
                if done > 0:  # the first call also compiles; chunks of another size give the same draws
                    chunk = max(1, int(0.5 * number / (time.monotonic() - began)))
                done += number
                advance(number, f"acceptance {chunks[-1]['acceptance_rate'].mean():.2f}")
        return {n: np.concatenate([part[n] for part in chunks], 1)[:, self.num_warmup :] for n in chunks[0]}


def _covariance(positions: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "d d"]:
    """Covariance of the finite positions, with 1e-6 added to the diagonal so that it has a Cholesky factor."""
    kept = positions[np.isfinite(positions).all(1)].astype(np.float64)
    d = kept.shape[1]
    return (np.cov(kept.T).reshape(d, d) + 1e-6 * np.eye(d)).astype(positions.dtype)
