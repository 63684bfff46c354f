"""Arguments of `ObservationTable.on`, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

    from numpyro_diffusion_da.observation.tables.bias import InstrumentBias
    from numpyro_diffusion_da.observation.tables.checks import QualityCheck
    from numpyro_diffusion_da.observation.tables.quantities import DerivedQuantity


@dataclasses.dataclass(frozen=True)
class Options:
    """Arguments of `ObservationTable.on`, which documents them."""

    window: Any
    errors: float | Mapping[Any, float] | None
    quality: Sequence[QualityCheck] | None
    quantities: Sequence[DerivedQuantity]
    instrument: str | Sequence[str] | None
    bias: InstrumentBias | None
    correlation: float | Callable[[pandas.DataFrame], Any] | None
    sizes: Mapping[str, tuple[int, int]] | None
