"""Rows that a client holds out of training, to evaluate models on: selected by a keyed hash of each.

The key is public and the same everywhere. So the same data hold the same rows out in every run, and a row that two
clients have once each is held out at both. This releases nothing about a row.

Each row is hashed with its number among the client's equal rows, and so held out by itself. Otherwise all equal rows of
one label would be held out where those of another label train: what is measured on them is not what the model does, and
the model trains on other shares than the data have. A missing row is the last of its equals, because equal rows cannot
be told apart: one row leaves one of the two parts, and no other row moves. Rows of one person stay together.

A client with at least two rows holds out at least one, and trains on at least one. At the record level each row is
selected only by its own hash: otherwise a missing row would change the selection of another one.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY = b"fedveil: held out to evaluate"
BITS = 64  # of a hash


def holdout_mask(
    hashes: NDArray[np.uint64], share: float, independent: bool = False, group_equal_rows: bool = False
) -> NDArray[np.bool_]:
    """Return which of a client's rows are held out, shape (n,).

    Args:
      hashes: keyed hash of each row, or of each row's person, shape (n,).
      share: expected share of rows that are held out, in (0, 1).
      independent: whether each row is selected independently of the others, so that a client may hold out none, or all.
      group_equal_rows: whether rows with equal hashes stay together, as those of a person do, or those of a run that an
        earlier release began.
    """
    if not len(hashes):
        return np.zeros(0, np.bool_)
    hashes = hashes if group_equal_rows else _numbered(hashes)
    mask = hashes < np.uint64(int(share * 2**BITS))
    if independent:
        return mask
    if not mask.any():
        mask = hashes == hashes.min()
    return hashes != hashes.max() if mask.all() else mask


def _numbered(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return hashes that differ between equal rows, shape (n,): the first of them keeps its own, each further one gets another.

    The others are the outputs of SplitMix64 (Steele, Lea and Flood 2014) from the row's hash.
    """
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    numbers = np.empty(len(hashes), np.uint64)
    numbers[order] = np.arange(len(hashes)) - np.searchsorted(ranked, ranked)
    mixed = hashes + numbers * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.where(numbers == 0, hashes, mixed ^ (mixed >> np.uint64(31)))


def hashes_of_rows(arrays: Iterable[NDArray[Any]]) -> NDArray[np.uint64]:
    """Return the keyed hash of each row, shape (n,), over the bytes that the row has in all arrays, of n rows each."""
    columns = [np.ascontiguousarray(each) for each in arrays]
    texts = (b"".join(each[row].tobytes() for each in columns) for row in range(len(columns[0])))
    return np.fromiter((hashed(lambda digest, text=text: digest.update(text)) for text in texts), np.uint64)


def hashed(add: Callable[[Any], None]) -> int:
    """Return the keyed hash of one row; `add` updates the digest, its argument, with the row."""
    digest = hashlib.blake2b(key=KEY, digest_size=BITS // 8)
    add(digest)
    return int.from_bytes(digest.digest(), "big")
