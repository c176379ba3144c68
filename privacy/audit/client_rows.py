"""Rows of numbers in a client's own file, one a round, each as `numpy.save` writes it, without pickle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...base.tensor_file import read_npy

if TYPE_CHECKING:
    from .one_run import Scores

SUFFIX = ".canaries"  # of the file of a client's canary records, beside its ledger
LOSSES = ".losses"  # of the file of the losses of a client's records, round after round


def begin(path: Path, coins: NDArray[np.bool_]) -> None:
    """Write a new file of canaries that begins with their coins, shape (n,); an existing file raises FileExistsError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        np.save(file, coins, allow_pickle=False)


def append(path: Path, number: int, values: NDArray[np.floating]) -> None:
    """Add the row of a round, values of shape (n,), to the file."""
    with open(path, "ab") as file:
        np.save(file, np.concatenate([[number], values]), allow_pickle=False)


def read_rows(path: Path) -> dict[int, Scores]:
    """Return the values of each round, of shape (n,), by the round's number, from a file without coins."""
    return _by_round(arrays_of(path))


def _by_round(rows: Sequence[NDArray[np.float64]]) -> dict[int, Scores]:
    """Return the rows that `append` wrote by the round's number; of a repeated round the last one counts."""
    return {int(row[0]): row[1:] for row in rows}


def trace(path: Path) -> Scores:
    """Return the rows as a matrix, shape (rounds, n), without rounds of another number of records than the last."""
    rows = list(read_rows(path).values())
    same = [row for row in rows if len(row) == len(rows[-1])]
    return np.stack(same) if same else np.empty((0, 0))


def arrays_of(path: Path) -> list[NDArray[np.float64]]:
    """Return all arrays in the file, in their order, without a truncated one at the end."""
    arrays: list[NDArray[np.float64]] = []
    with open(path, "rb") as file:
        while True:
            try:
                arrays.append(read_npy(file))
            except ValueError:  # the end, or a row that a crash cut short
                return arrays


def read_scores(paths: Sequence[Path]) -> tuple[Scores, Scores]:
    """Return the scores of the canaries in files of clients, summed over rounds: of those that were in, and out."""
    inside, outside = [np.zeros(0)], [np.zeros(0)]
    for path in paths:
        coins, *rows = arrays_of(path)
        if rows:
            total = np.stack(list(_by_round(rows).values())).sum(0)
            inside.append(total[coins.astype(np.bool_)])
            outside.append(total[~coins.astype(np.bool_)])
    return np.concatenate(inside), np.concatenate(outside)


def step_ratio(moved: Scores, noise: float, rate: float, replaced: bool = False) -> Scores:
    """Return the log likelihood ratio of in to out of one step, for each canary, shape (canaries,).

    In: the sum is N(1, noise^2) with probability `rate`, else N(0, noise^2). Out: it is N(0, noise^2) or, if `replaced`,
    that of a record opposite to the canary.

    Args:
      moved: noised sums along the canaries, over the clipping norm, shape (canaries,).
      noise: noise std over the clipping norm, above 0.
      rate: sampling rate of a record, in (0, 1].
      replaced: whether a canary that is out has the opposite gradient instead of none.
    """

    def ratio(sums: Scores) -> Scores:
        """Return the log ratio of N(1, noise^2), sampled, to N(0, noise^2)."""
        unsampled = (sums - 0.5) / noise**2
        return unsampled if rate == 1 else np.logaddexp(np.log1p(-rate), np.log(rate) + unsampled)

    return ratio(moved) - ratio(-moved) if replaced else ratio(moved)
