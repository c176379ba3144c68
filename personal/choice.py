"""Choice of a client's own model by its rows: how far between two models, or a model of its own rows alone.

Own steps lead from the released model (share 0) to the trained one (share 1). The model on the line between them gets the
posterior mean of the share over POINTS, each of which counts by its PRIOR and its likelihood, exp(-sum of losses): with few
rows a mean errs less than the best point does. A model that saw this client alone is chosen where its sum is lower still.

Held-out rows decide. Where there are fewer than EVIDENCE, the client's training rows make up for them by cross-validation:
each part is measured with models that the other parts trained. The losses of classes are those at the best of TEMPERATURES
for each model, since averages and noise make a released model less sure than it is right, and own steps would win by that.

Figures are cross-fitted: on each fold of the held-out rows they are of the model that all other rows choose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.generic]]
SHARED, OWN, LOCAL = "shared", "own", "local_only"
PERSONAL = "personal"
LOSS = "loss"
COLUMNS = (SHARED, PERSONAL, LOCAL)
POINTS = (0.0, 0.5, 1.0)
# The four were chosen on mnist5k and digits, clients of 14 rows by shards, Dirichlet .3 and .1, and iid, without noise and at
# epsilon 3: the mean over 28 settings was 0.4 points above the better of released and local only, and the worst 0.55 below.
PRIOR = (0.5, 0.25, 0.25)  # of POINTS
EVIDENCE = 16  # rows
PARTS = 4  # of cross-validation
TEMPERATURES = (1.0, 0.5, 2.0, 4.0, 8.0, 16.0)  # factors of logits
GRID = 8  # shares are multiples of 1 / GRID, so that few models are measured
FOLDS = 10

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FoldMeans:
    """Means of one model on each fold of some rows.

    Attributes:
      losses: mean loss at each of TEMPERATURES, or at the first alone, shape (temperatures, folds).
      figures: mean of each metric by name, shape (folds,); NaN where it is undefined.
    """

    losses: Floats
    figures: Mapping[str, Floats]


@dataclass(frozen=True)
class Evidence:
    """Losses by which a client chooses.

    Attributes:
      losses: of the models at POINTS, and last of the local one, shape (4, temperatures, folds); the first folds are
        those of the held-out rows, the others parts of the training rows.
      rows: weight of each fold, shape (folds,): its number of rows, or less.
    """

    losses: Floats
    rows: Floats

    def decide(self, without: int = -1) -> Decision:
        """Return what all folds decide, or all but the one at position `without`."""
        rows = np.where(np.arange(len(self.rows)) == without, 0.0, self.rows)
        losses = self.losses[..., rows > 0]
        sums = np.where(np.isfinite(losses), losses, np.inf) @ rows[rows > 0]
        best = sums.min(axis=1)
        points, finite = best[:-1], np.isfinite(best[:-1])
        if not finite.any():
            return Decision(bool(np.isfinite(best[-1])), 0.0)
        weights = np.array(PRIOR)[finite] * np.exp(points[finite].min() - points[finite])
        share = round(GRID * float(weights @ np.array(POINTS)[finite] / weights.sum())) / GRID
        line = np.interp(share, np.array(POINTS)[finite], points[finite])
        if best[-1] < line:
            return Decision(True, 0.0)
        return Decision(False, share)


@dataclass(frozen=True)
class Decision:
    """A model: the local one, or else the one at a share of the way from the released to the trained model."""

    is_local: bool
    share: float

    @property
    def name(self) -> str:
        """SHARED, OWN or LOCAL."""
        if self.is_local:
            return LOCAL
        return OWN if self.share else SHARED


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


def folds_of(count: int, persons: Sequence[str] | None = None, most: int = FOLDS) -> list[NDArray[np.int64]]:
    """Return the positions of the rows in each fold, none of which is empty; a person's rows are in one fold.

    Args:
      count: number of rows.
      persons: name of each row's person; None if rows are independent.
      most: largest number of folds.
    """
    units = np.arange(count) if persons is None else np.unique(np.array(persons), return_inverse=True)[1]
    number = min(most, len(set(units.tolist())))
    return [np.flatnonzero(units % number == fold) for fold in range(number)]


def between(shared: Arrays, trained: Arrays, share: float) -> Arrays:
    """Return the model at a share of the way between two; whole numbers are those of the nearer model.

    Args:
      shared: arrays of the released model, by name.
      trained: those of the other that are wanted.
      share: in [0, 1].
    """
    return {name: _between(shared[name], trained[name], share) for name in trained}


def _between(start: NDArray[Any], end: NDArray[Any], share: float) -> NDArray[Any]:
    if share in (0.0, 1.0) or start.dtype.kind != "f":
        return end if share > 1 / 2 else start
    return start + np.asarray(share, start.dtype) * (end - start)


class TrainingFolds(NamedTuple):
    """Losses as of `Evidence` of each fold of the training rows, and the folds' weights."""

    losses: list[Floats]
    weights: Floats


def cross_validated(
    parts: Sequence[NDArray[np.int64]],
    lacking: int,
    measure: Callable[[NDArray[np.int64], NDArray[np.int64]], Sequence[FoldMeans]],
) -> TrainingFolds:
    """Return losses as of `Evidence` of parts of the training rows, and the parts' weights.

    There are none where held-out rows suffice, or where the training rows have no two parts.

    Args:
      parts: positions of the rows in each part, as of `folds_of`.
      lacking: number of held-out rows that are missing from EVIDENCE.
      measure: returns the means on one part, the second argument, of the models at POINTS and of the local one that the
        rows at other positions, the first argument, have trained.
    """
    if lacking <= 0 or len(parts) < 2:
        return TrainingFolds([], np.zeros(0))
    sizes = np.array([len(part) for part in parts], float)
    others = [np.concatenate([each for each in parts if each is not part]) for part in parts]
    means = [measure(np.sort(rest), part) for rest, part in zip(others, parts, strict=True)]
    losses = [np.array([each.losses for each in of_part]) for of_part in means]
    return TrainingFolds(losses, min(1.0, lacking / sizes.sum()) * sizes)


def choose(
    rows: Floats,
    measured: dict[float, FoldMeans],
    local: FoldMeans,
    parts: TrainingFolds,
    measure: Callable[[float], FoldMeans],
) -> Choice:
    """Return a client's choice with its figures.

    Args:
      rows: number of held-out rows of each fold, shape (folds,), at least one fold.
      measured: means on these folds of the models at POINTS; those at further shares are added.
      local: means of the local model.
      parts: of the training rows, as of `cross_validated`.
      measure: returns the means of the model at a share.
    """
    held_out = np.array([each.losses for each in (*measured.values(), local)])
    evidence = Evidence(
        np.concatenate([held_out, *parts.losses], axis=2), np.concatenate([rows, parts.weights])
    )
    decisions = [evidence.decide(fold) for fold in range(-1, len(rows))]
    for share in {each.share for each in decisions} - measured.keys():
        measured[share] = measure(share)
    return choice_of(rows, decisions, measured, local)


def choice_of(
    rows: Floats, decisions: Sequence[Decision], measured: Mapping[float, FoldMeans], local: FoldMeans
) -> Choice:
    """Return a client's choice with its figures.

    Args:
      rows: number of held-out rows of each fold, shape (folds,), at least one fold.
      decisions: what all rows decide, and then for each fold what the others do.
      measured: means on these folds of the models at share 0 and at the shares of all decisions.
      local: means of the local model.
    """
    whole, *others = decisions
    columns = {
        SHARED: means_of(rows, [measured[0.0]] * len(rows)),
        PERSONAL: means_of(rows, [local if each.is_local else measured[each.share] for each in others]),
        LOCAL: means_of(rows, [local] * len(rows)),
    }
    return Choice(whole.name, whole.share, int(rows.sum()), columns)


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
    columns[LOSS] = np.array([each.losses[0, fold] for fold, each in enumerate(of_fold)])
    defined = {name: ~np.isnan(values) for name, values in columns.items()}
    return {
        name: float(np.average(values[defined[name]], weights=rows[defined[name]]))
        for name, values in columns.items()
        if defined[name].any()
    }
