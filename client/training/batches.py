"""Batches of shuffled records, for training without record-level privacy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def shuffled_batches(
    records: int, batch_size: int, epochs: int, *, clients: Sequence[int], key: int
) -> Iterator[NDArray[np.intp]]:
    """Yield the batches of every local epoch for clients with equally many records, shape (clients, batch).

    In each epoch a client's records are sorted by hashes of their positions, which depend on `key` and its number. A
    batch that holds all records is not shuffled.

    Args:
      records: of each client, at least 1.
      batch_size: at least 1; the last batch of an epoch takes the remainder.
      epochs: passes over the data, at least 1.
      clients: numbers of the clients.
      key: of the round.
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
    """Return a seed for each client, shape (clients,).

    Args:
      key: of the round.
      clients: numbers of the clients.
    """
    return _mixed(np.uint64(key) + _GOLDEN * np.array(clients, np.uint64))


# SplitMix64 (Steele, Lea and Flood 2014, OOPSLA, figure 16): a good hash of a counter, on which no privacy rests.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in _MIX:
        value = (value ^ (value >> shift)) * factor
    return value ^ (value >> _LAST_SHIFT)
