"""Steps of own training, with and without torch: their number, their rate and their batches."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ..client.training.batches import shuffled_batches

# A model from scratch takes more steps, at a higher rate: those of a run without personal.learning_rate. On mnist5k, 14 rows a
# client, 40 steps of it were as accurate as 200.
LOCAL_STEPS, LOCAL_RATE = 2, 4
# Of the rate of the rounds. Digits, MLP and softmax: 20 steps of a quarter lose nothing where clients are alike.
RATE_SHARE = 1 / 4


def steps_of_epoch(rows: int, batch_size: int) -> int:
    """Return the number of steps in a pass over the rows; a remainder of one row is none."""
    return rows // batch_size + (rows % batch_size >= _least(rows, batch_size))


def own_batches(rows: int, batch_size: int, steps: int, key: int) -> Iterator[NDArray[np.intp]]:
    """Yield the positions of the rows in each step, shape (batch,).

    Args:
      rows: number of rows, at least 1.
      batch_size: rows of a step, at least 1.
      steps: number of steps, at least 1.
      key: of the order.
    """
    epochs, least = -(-steps // steps_of_epoch(rows, batch_size)), _least(rows, batch_size)
    batches = shuffled_batches(rows, batch_size, epochs, client=0, key=key)
    return islice((each for each in batches if len(each) >= least), steps)


def _least(rows: int, batch_size: int) -> int:
    """Return the least size of a batch: a batch normalisation fails on one row, so a remainder of one is left out."""
    return min(2, rows, batch_size)
