"""Rows that a client holds out of training, to evaluate models on: selected by a keyed hash of each.

The key is public and the same everywhere. So the same data hold the same rows out in every run, and a row of two
clients is held out at both: neither trains on a row that the other evaluates on. This releases nothing about a row. A
client with at least two different rows holds out at least one, and trains on at least one. At the record level each row
is selected only by its own hash: otherwise a missing row would change the selection of another one.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY = b"fedveil: held out to evaluate"
BITS = 64  # of a hash


def held_rows(hashes: NDArray[np.uint64], share: float, alone: bool = False) -> NDArray[np.bool_]:
    """Return which of a client's rows are held out, shape (n,).

    Args:
      hashes: of the rows, shape (n,).
      share: of all rows of the world that are held out, in (0, 1).
      alone: whether each row is selected independently of the others, so that a client may hold out none, or all.
    """
    if not len(hashes):
        return np.zeros(0, np.bool_)
    held = hashes < np.uint64(int(share * 2**BITS))
    if alone:
        return held
    if not held.any():
        held = hashes == hashes.min()
    return hashes != hashes.max() if held.all() else held


def hashes_of_rows(arrays: Iterable[NDArray[Any]]) -> NDArray[np.uint64]:
    """Return the keyed hash of each row, shape (n,)."""
    columns = [np.ascontiguousarray(each) for each in arrays]
    made = (b"".join(each[row].tobytes() for each in columns) for row in range(len(columns[0])))
    return np.fromiter((hashed(lambda digest, text=text: digest.update(text)) for text in made), np.uint64)


def hashed(add: Callable[[Any], None]) -> int:
    """Return the keyed hash of one row.

    Args:
      add: feeds the row to the digest that it is given.
    """
    digest = hashlib.blake2b(key=KEY, digest_size=BITS // 8)
    add(digest)
    return int.from_bytes(digest.digest(), "big")
