"""Batches of shuffled records, for training without record-level privacy."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def shuffled_batches(
    records: int, batch_size: int, epochs: int, *, client: int, key: int
) -> Iterator[NDArray[np.intp]]:
    """Yield the positions of the records in every batch of every local epoch, shape (batch,).

    In each epoch the records are sorted by hashes of their positions, which depend on `key` and the client's number. A
    batch that holds all records is not shuffled.

    Args:
      records: of the client, at least 1.
      batch_size: at least 1; the last batch of an epoch takes the remainder.
      epochs: passes over the data, at least 1.
      client: its number.
      key: of the round.
    """
    seeds = seeds_of(key, [client])
    order = np.arange(records)
    for epoch in range(epochs):
        if batch_size < records:
            positions = np.arange(epoch * records, (epoch + 1) * records, dtype=np.uint64)
            order = np.argsort(_mixed(seeds + _GOLDEN * positions), kind="stable")
        for start in range(0, records, batch_size):
            yield order[start : start + batch_size]


def stacked_batches(
    records: NDArray[np.intp], batch_size: int, epochs: int, *, clients: Sequence[int], key: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Yield the batches of several clients step by step: positions, shape (active, width), and the size of each batch.

    A client's batches are those of `shuffled_batches`. A batch that is smaller than the widest of its step is padded
    with its own last record. A client that has taken all its steps is left out of later ones.

    `records` are the numbers of records, shape (clients,), descending; other arguments as of `shuffled_batches`.
    """
    # One entry for each visit of a record: all epochs of the first client, then all of the second, and so on.
    visits = records * epochs
    first = np.cumsum(visits) - visits  # of each client
    owner = np.repeat(np.arange(len(records)), visits)  # the client, for each entry
    positions = np.arange(len(owner)) - first[owner]  # of an entry among those of its client
    hashes = _mixed(seeds_of(key, clients)[owner] + _GOLDEN * positions.astype(np.uint64))
    hashes = np.where((batch_size < records)[owner], hashes, positions.astype(np.uint64))
    order = np.lexsort((hashes, positions // records[owner], owner))  # by client, then epoch, then hash
    rows = positions[order] % records[owner]  # the record, for each entry
    batches = -(-records // batch_size)
    for step in range(int(batches[0]) * epochs):
        active = np.count_nonzero(batches * epochs > step)
        epoch, batch = np.divmod(step, batches[:active])
        start = batch * batch_size  # of each client's batch in its epoch
        counts = np.minimum(batch_size, records[:active] - start)
        start += first[:active] + epoch * records[:active]  # among all entries
        columns = np.minimum(np.arange(counts.max()), counts[:, None] - 1)  # padding repeats the last record
        yield rows[start[:, None] + columns], counts


def seeds_of(key: int, clients: Sequence[int]) -> NDArray[np.uint64]:
    """Return a seed for each client, shape (clients,), from the round's key."""
    return _mixed(np.uint64(key) + _GOLDEN * np.array(clients, np.uint64))


# SplitMix64 (Steele, Lea and Flood 2014, OOPSLA, figure 16): a good hash of a counter, on which no privacy rests.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the hash of each number, shape as of `value`."""
    for shift, factor in _MIX:
        value = (value ^ (value >> shift)) * factor
    return value ^ (value >> _LAST_SHIFT)
