"""What a run keeps of its particles: all of them, reductions, some steps, fewer digits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_diffusion_da.arguments import require, require_count, require_flag, require_number, shown
from numpyro_diffusion_da.smc.base import map_particles
from numpyro_diffusion_da.smc.columns import map_columns
from numpyro_diffusion_da.smc.rows import sum_rows

MANTISSA_BITS = 23
"""Number of mantissa bits of a float32."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """Choice of what a run keeps of the particles of one site: ``Filter(keep={"x": Kept(...)})``.

    Reductions are over the equally weighted particles of a chain and a time. They are the groups `posterior_mean`,
    `posterior_std` and `posterior_quantile` of a `DataTree`, and `FilterResult.reduced`.

    Args:
        particles: whether to keep the particles themselves.
        every: keep the particles of every k-th step and of the last one only. The other steps are NaN in the Zarr group
            of the run, and take no space; it needs a directory.
        mantissa_bits: number of bits of the mantissa to which the kept particles are rounded, 1 to 23; the others are
            zero, and compress to nothing. 10 bits are the precision of a float16, a relative error of 2^-11 = 0.05 % at
            most, with the range of a float32. None keeps all. The filter itself goes on with unrounded particles.
        mean: whether to keep the mean over particles.
        std: whether to keep the standard deviation over particles, with the divisor N - 1: the spread.
        quantiles: quantiles to keep, between 0 and 1.

    Raises:
        ValueError: nothing is kept, or a number is out of its range.
        TypeError: an argument is of the wrong kind.
    """

    particles: bool = True
    every: int = 1
    mantissa_bits: int | None = None
    mean: bool = False
    std: bool = False
    quantiles: Sequence[float] = ()

    def __post_init__(self) -> None:
        for name in ("particles", "mean", "std"):
            object.__setattr__(self, name, require_flag(getattr(self, name), self, name))
        require_count(self.every, self, "every")
        if self.mantissa_bits is not None:
            require_count(self.mantissa_bits, self, "mantissa_bits")
            if self.mantissa_bits > MANTISSA_BITS:
                raise ValueError(f"Kept got mantissa_bits={self.mantissa_bits}; give 1 to {MANTISSA_BITS}, or None.")
        require(self.quantiles, Sequence, self, "quantiles", "(0.1, 0.5, 0.9)")
        advice = "give numbers between 0 and 1."
        levels = tuple(require_number(q, "Kept", "quantiles", advice, least=0.0) for q in self.quantiles)
        if any(level > 1.0 for level in levels) or list(levels) != sorted(set(levels)):
            raise ValueError(f"Kept got quantiles={shown(self.quantiles)}; give increasing numbers between 0 and 1.")
        object.__setattr__(self, "quantiles", levels)
        if not (self.particles or self.mean or self.std or levels):
            raise ValueError("Kept keeps nothing; give particles=True, mean=True, std=True or quantiles.")

    def of(self, values: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Values of the particles as they are kept, leading axis N."""
        if self.mantissa_bits is None or values.dtype != jnp.float32:
            return values
        bits = self.mantissa_bits
        return map_particles(lambda value: rounded(value, bits))(values)


def rounded(values: Float[Array, ...], mantissa_bits: int) -> Float[Array, ...]:
    """Round numbers of type float32 to some bits of their mantissa, to nearest and ties to even.

    Args:
        values: the numbers; those that are not finite stay as they are.
        mantissa_bits: number of bits to keep, 1 to 23.
    """
    drop = MANTISSA_BITS - mantissa_bits
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    last = (bits >> drop) & jnp.uint32(1)
    half = jnp.uint32((1 << drop) >> 1)
    up = bits + jnp.where(half > 0, half - 1 + last, 0).astype(jnp.uint32)
    kept = jax.lax.bitcast_convert_type((up >> drop) << drop, jnp.float32)
    return jnp.where(jnp.isfinite(values), kept, values)


class Keep(NamedTuple):
    """Parts of the particles that a run keeps.

    Attributes:
        sites: what to keep of each latent or deterministic site, by name; None for the particles of all. Sites in
            `metadata` are always kept.
        observed: whether to keep a predictive draw and the log-likelihood of each observation.
        forecasts: whether to keep the one-step forecast from which each particle was drawn.
        metadata: names of the deterministic sites that are recorded once per time, not for each particle.
    """

    sites: Mapping[str, Kept] | None
    observed: bool
    forecasts: bool
    metadata: tuple[str, ...] = ()

    def of(self, sites: dict[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
        """Select the sites to keep.

        Args:
            sites: values by group and site, from `StateSpaceModel.record`.

        Returns:
            Kept values by group and site. Groups of observed sites that are not kept are empty.

        Raises:
            ValueError: `sites` of this object names a site that is not latent or deterministic, or none that particles
                have.
        """
        if not self.observed:
            sites = {**sites, "posterior_predictive": {}, "log_likelihood": {}}
        if self.sites is None:
            return sites
        if unknown := set(self.sites) - {*sites["posterior"], *self.metadata}:
            known = sorted({*sites["posterior"], *self.metadata})
            raise ValueError(
                f"keep names {sorted(unknown)}, but the latent and deterministic sites are {known}; give names from "
                "this list."
            )
        own = {name: kept for name, kept in self.sites.items() if name not in self.metadata}
        if not own:
            raise ValueError(
                f"keep names {sorted(self.sites)} only, which are the same for all particles and always recorded; add "
                f"a site that particles have, one of {sorted(sites['posterior'])}."
            )
        posterior = {name: kept.of(sites["posterior"][name]) for name, kept in own.items() if kept.particles}
        return {**sites, "posterior": posterior}

    def reduced(self, posterior: dict[str, Array]) -> dict[str, dict[str, Array]]:
        """Reductions of the sites over particles, by kind (`mean`, `std`, `quantile`) and site.

        Args:
            posterior: values of the latent and deterministic sites, leading axis N.

        Returns:
            Arrays in the shape of the site; `quantile` has a leading axis of quantiles.
        """
        found: dict[str, dict[str, Array]] = {"mean": {}, "std": {}, "quantile": {}}
        for name, kept in ({} if self.sites is None else self.sites).items():
            if name in self.metadata:
                continue
            values = posterior[name]
            if kept.mean:
                found["mean"][name] = _mean(values)
            if kept.std:
                found["std"][name] = _std(values)
            if kept.quantiles:
                found["quantile"][name] = _quantiles(values, kept.quantiles)
        return {kind: sites for kind, sites in found.items() if sites}


def _mean(values: Float[Array, "n ..."]) -> Float[Array, ...]:
    """Mean over particles, whose rows may be on disk."""
    return sum_rows(values) / len(values)


def _std(values: Float[Array, "n ..."]) -> Float[Array, ...]:
    """Standard deviation over particles, with the divisor N - 1; they are read a second time."""
    mean = _mean(values)
    squares = map_particles(lambda value: (value - mean) ** 2)(values)
    return jnp.sqrt(sum_rows(squares) / (len(values) - 1))


def _quantiles(values: Float[Array, "n ..."], levels: Sequence[float]) -> Float[Array, "q ..."]:
    """Quantiles over particles, with a leading axis of levels."""
    flat = map_particles(lambda value: value.reshape(-1))(values)
    at = jnp.asarray(levels)
    _, found = map_columns(lambda parts, _: ([], jnp.quantile(parts[0], at, axis=0).T), [flat])
    return jnp.asarray(found.T).reshape(len(levels), *values.shape[1:])


def kept_sites(keep: Any) -> dict[str, Kept] | None:
    """Choice of what to keep of each site, from the argument `keep` of a `Filter`.

    Args:
        keep: None, a list of names, or a mapping from names to `Kept`.

    Raises:
        ValueError: it is none of these, or quantiles differ between sites.
    """
    if keep is None:
        return None
    is_list = isinstance(keep, Sequence | Set) and not isinstance(keep, str)
    if is_list and keep and all(isinstance(site, str) for site in keep):
        return {site: Kept() for site in keep}
    if isinstance(keep, Mapping) and keep and all(isinstance(site, str) for site in keep):
        for site, kept in keep.items():
            require(kept, Kept, "Filter", f"keep[{site!r}]", "ndda.inference.Kept(mean=True)")
        if len({kept.quantiles for kept in keep.values() if kept.quantiles}) > 1:
            raise ValueError(f"Filter got keep={shown(keep)}; give the same quantiles to all sites.")
        return dict(keep)
    raise ValueError(
        f"Filter got keep={shown(keep)}; give a list of one or more names of latent or deterministic sites, a mapping "
        "from names to ndda.inference.Kept(...), or None for all."
    )
