"""Choice of a client's own model by its held-out rows: how far between two models, or a model of its own rows alone.

Own steps lead from the released model (share 0) to the trained one (share 1). The model on the line between them gets the
posterior mean of the share over POINTS, each of which counts by its likelihood, exp(-rows times mean loss): with few rows a
mean errs less than the best point does. A model that saw this client alone is chosen where its mean loss is lower still.
Figures are cross-fitted: on each fold of the rows they are of the model that the other folds choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHARED, OWN, LOCAL = "shared", "own", "local only"
PERSONAL = "personal"
LOSS = "loss"
COLUMNS = (SHARED, PERSONAL, LOCAL)
POINTS = (0.0, 0.5, 1.0)
GRID = 8  # shares are multiples of 1 / GRID, so that few models are measured
FOLDS = 10

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FoldMeans:
    """Means of one model on each fold of a client's held-out rows.

    Attributes:
      loss: mean loss, shape (folds,).
      figures: mean of each metric by name, shape (folds,); NaN where it is undefined.
    """

    loss: Floats
    figures: Mapping[str, Floats]


@dataclass(frozen=True)
class Choice:
    """A client's choice, and what its held-out rows say of the three models.

    Attributes:
      name: SHARED, OWN or LOCAL.
      share: of the way from the released model to the trained one, in [0, 1]; 0 for the others.
      rows: number of held-out rows.
      columns: by the names of COLUMNS, the mean of each metric and of `loss` over the rows, cross-fitted for PERSONAL; a
        metric that is undefined on all folds is left out, and so are all figures without rows.
    """

    name: str
    share: float
    rows: int
    columns: Mapping[str, Mapping[str, float]]


def folds_of(count: int, persons: Sequence[str] | None = None) -> list[NDArray[np.int64]]:
    """Return the positions of the rows in each fold, at most FOLDS and none empty; a person's rows are in one fold.

    Args:
      count: number of rows.
      persons: name of each row's person; None if rows are independent.
    """
    units = np.arange(count) if persons is None else np.unique(np.array(persons), return_inverse=True)[1]
    number = min(FOLDS, len(set(units.tolist())))
    return [np.flatnonzero(units % number == fold) for fold in range(number)]


def shares_of(points: Sequence[FoldMeans], rows: Floats) -> tuple[float, list[float]]:
    """Return the share that all folds choose, and for each fold the share that the others choose.

    Args:
      points: means of the models at POINTS.
      rows: number of rows of each fold, shape (folds,).
    """
    of_folds = [_share(points, _without(rows, fold)) for fold in range(len(rows))]
    return _share(points, rows), of_folds


def choose(
    rows: Floats,
    shares: tuple[float, list[float]],
    measured: Mapping[float, FoldMeans],
    local: FoldMeans,
) -> Choice:
    """Return a client's choice with its figures.

    Args:
      rows: number of rows of each fold, shape (folds,), at least one fold.
      shares: as of `shares_of`.
      measured: means of the models at share 0 and at all of these.
      local: means of the model of this client's rows alone.
    """
    whole, of_folds = shares
    chosen = [
        local if _lower(local, measured[share], _without(rows, fold)) else measured[share]
        for fold, share in enumerate(of_folds)
    ]
    columns = {
        SHARED: means_of(rows, [measured[0.0]] * len(rows)),
        PERSONAL: means_of(rows, chosen),
        LOCAL: means_of(rows, [local] * len(rows)),
    }
    if _lower(local, measured[whole], rows):
        return Choice(LOCAL, 0.0, int(rows.sum()), columns)
    return Choice(OWN if whole else SHARED, whole, int(rows.sum()), columns)


def means_of(rows: Floats, of_fold: Sequence[FoldMeans]) -> dict[str, float]:
    """Return the mean of each metric and of `loss` over the rows, each fold's from its own means.

    Args:
      rows: number of rows of each fold, shape (folds,).
      of_fold: for each fold the means of its model.
    """
    names = dict.fromkeys(name for each in of_fold for name in each.figures)
    columns = {
        name: np.array([each.figures[name][fold] for fold, each in enumerate(of_fold)]) for name in names
    }
    columns[LOSS] = np.array([each.loss[fold] for fold, each in enumerate(of_fold)])
    defined = {name: ~np.isnan(values) for name, values in columns.items()}
    return {
        name: float(np.average(values[defined[name]], weights=rows[defined[name]]))
        for name, values in columns.items()
        if defined[name].any()
    }


def _share(points: Sequence[FoldMeans], rows: Floats) -> float:
    """Return the posterior mean of the share over POINTS, a multiple of 1 / GRID; 0 without rows.

    A model whose loss is not finite has no weight; without any finite loss the share is 0.
    """
    losses = np.array([_total(each, rows) for each in points])
    finite = np.isfinite(losses)
    if not rows.any() or not finite.any():
        return 0.0
    weights = np.exp(losses[finite].min() - losses[finite])
    return round(GRID * float(weights @ np.array(POINTS)[finite] / weights.sum())) / GRID


def _lower(first: FoldMeans, second: FoldMeans, rows: Floats) -> bool:
    """Return whether one model's loss on these rows is finite and lower than another's; not without rows."""
    loss, other = _total(first, rows), _total(second, rows)
    return bool(np.isfinite(loss)) and not other <= loss


def _total(means: FoldMeans, rows: Floats) -> float:
    """Return the sum of a model's losses over these rows; folds without rows do not count."""
    return float(means.loss[rows > 0] @ rows[rows > 0])


def _without(rows: Floats, fold: int) -> Floats:
    """Return the numbers of rows with 0 for one fold."""
    return np.where(np.arange(len(rows)) == fold, 0.0, rows)
