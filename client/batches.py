"""Batches of records: Poisson ones, drawn here and accounted here, and shuffled ones, which claim nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..privacy.mechanisms.randomness import Stream

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent


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
        from dp_accounting.dp_event import PoissonSampledDpEvent, SelfComposedDpEvent

        step = (
            mechanism if self.sample_rate == 1 else PoissonSampledDpEvent(float(self.sample_rate), mechanism)
        )
        return step if self.steps == 1 else SelfComposedDpEvent(step, self.steps)


def poisson_batches(records: int, batch_size: int, local_epochs: int) -> PoissonBatches:
    """Return as many batches of `batch_size` expected records as `local_epochs` passes over the data need."""
    expected = min(batch_size, records)
    return PoissonBatches(expected / records, max(1, -(-records * local_epochs // expected)))


def shuffled_batches(
    records: int, batch_size: int, epochs: int, *, clients: Sequence[int], key: int
) -> Iterator[NDArray[np.intp]]:
    """Yield the batches of every local epoch for clients with equally many records, shape (clients, batch).

    Each client has an order of its own in each epoch, which `key` and its number decide: its records sorted by hashes
    of their positions. One batch that holds everything is not shuffled.
    """
    own = seeds_of(key, clients)[:, None]
    for epoch in range(epochs):
        places = np.arange(epoch * records, (epoch + 1) * records, dtype=np.uint64)
        if batch_size < records:
            order = np.argsort(_mixed(own + _GOLDEN * places), axis=1, kind="stable")
        else:
            order = np.tile(np.arange(records), (len(clients), 1))
        for start in range(0, records, batch_size):
            yield order[:, start : start + batch_size]


def seeds_of(key: int, clients: Sequence[int]) -> NDArray[np.uint64]:
    """Return a seed for each client, shape (clients,), from a round's key."""
    return _mixed(np.uint64(key) + _GOLDEN * np.array(clients, np.uint64))


# SplitMix64 (Steele, Lea and Flood 2014, OOPSLA, figure 16): a good hash of a counter. Nobody's privacy rests on it.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in _MIX:
        value = (value ^ (value >> shift)) * factor
    return value ^ (value >> _LAST_SHIFT)
