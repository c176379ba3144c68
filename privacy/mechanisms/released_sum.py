"""Released private sum, as whoever gets the model may look at it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .compression import Sketch

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class RoundCohort:
    """Cohort of a round, as an audit may see it.

    Attributes:
      clients: number of real clients.
      canaries: numbers, from 0, of the canaries that were drawn.
      population: number of real clients that the cohort was drawn from.
    """

    clients: int = 0
    canaries: Sequence[int] = ()
    population: int = 0


@dataclass(frozen=True)
class ReleasedSum:
    """Released private sum; all of it is public.

    Attributes:
      number: of the round.
      layers: the sum, one vector for each array of the update, in clipping norms.
      noise: the claimed std of the new noise in each coordinate, in clipping norms.
      rate: the sampling rate that was charged to the ledger.
      charged: the noise over clip that was charged; 0 without a charge.
      cohort: of the round.
      records: the sum along each of an audit's canary records, in clipping norms, (canary records,).
      sketch: compression of all updates, including the canaries'; the layers are then of the compressed sum.
      step: of the sum's lattice, in clipping norms; 0 without a lattice.
    """

    number: int
    layers: Sequence[Vector]
    noise: float
    rate: float
    charged: float
    cohort: RoundCohort = RoundCohort()
    records: Vector = field(default_factory=lambda: np.zeros(0))
    sketch: Sketch | None = None
    step: float = 0.0
