"""Poisson batches of records: drawn here, and accounted here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from dp_accounting.dp_event import DpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from numpy.typing import NDArray

from ..privacy.mechanisms.randomness import Stream


@dataclass(frozen=True)
class PoissonBatches:
    """`steps` batches, each of which holds every record independently with probability `sample_rate`.

    Attributes:
      sample_rate: in (0, 1].
      steps: batches of one round, at least 1.
    """

    sample_rate: float
    steps: int
    name: str = "poisson batches"

    def draw(self, records: int, stream: Stream) -> Iterator[NDArray[np.intp]]:
        """Yield the indices of each batch, ascending; a batch may be empty and is a step all the same."""
        for _ in range(self.steps):
            if self.sample_rate == 1:
                yield np.arange(records)
            else:
                yield np.flatnonzero(stream.uint64(records) < np.uint64(int(self.sample_rate * 2**64)))

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return what all steps of one round reveal of a record."""
        step = (
            mechanism if self.sample_rate == 1 else PoissonSampledDpEvent(float(self.sample_rate), mechanism)
        )
        return step if self.steps == 1 else SelfComposedDpEvent(step, self.steps)


def poisson_batches(records: int, batch_size: int, local_epochs: int) -> PoissonBatches:
    """Return as many batches of `batch_size` expected records as `local_epochs` passes over the data need."""
    expected = min(batch_size, records)
    return PoissonBatches(expected / records, max(1, -(-records * local_epochs // expected)))
