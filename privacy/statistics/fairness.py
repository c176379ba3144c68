"""Fairness by group from clipped counts of the cells that a criterion conditions on, and weights that would balance them.

A criterion compares shares, such as the share of positive predictions among rows with the label (equal opportunity,
Hardt, Price and Srebro 2016). Only rows that satisfy its condition are counted, one cell each. A vector of all rows of
a client would spend its norm on cells that no figure needs: on census data its error is ten times as large.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from .columns import Bins, Table, share
from .figure import ENOUGH, NORMAL_95, Cells, Figure, clipped, count_of, roots, unsaid

Indices = NDArray[np.int64]
# For each criterion the name of the share that it compares; {} stands for the condition.
CRITERIA = {
    "equal_opportunity": "true positive rate",
    "equalised_odds": "{} positive rate",
    "parity": "selection rate",
    "accuracy": "accuracy",
    "calibration": "share of positives at score {}",
}
RATES = ("false", "true")
ROWS = "rows"  # begins the names of the numbers of rows, by condition and group


@dataclass(frozen=True)
class Fairness:
    """`Statistic` of one criterion, by the groups of one attribute. Of two classes the second is the positive one.

    Attributes:
      criterion: one of `CRITERIA`.
      of: bins of the groups.
      label: bins of the classes.
      prediction: bins of the predicted classes, as many as of the label; for calibration, bins of the score.
    """

    criterion: str
    of: Bins
    label: Bins
    prediction: Bins
    row_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise Refusal("criterion", self.criterion, f"choose one of {', '.join(CRITERIA)}")
        if self.criterion != "accuracy" and self.label.count != 2:
            raise Refusal("label", self.label.count, f"{self.criterion} is of two classes; ask for accuracy")
        if self.criterion != "calibration" and self.prediction.count != self.label.count:
            remedy = f"has other bins than the label, which has {self.label.count}"
            raise Refusal("said", self.prediction.count, remedy)
        if self.of.count < 2:
            raise Refusal("of", self.of.labels, "give two groups at least")

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the cells that are compared over groups one by one."""
        if self.criterion == "equalised_odds":
            return RATES
        return self.prediction.labels if self.criterion == "calibration" else ("",)

    @property
    def shape(self) -> tuple[int, ...]:
        """Groups, conditions, and 2: the rows outside of the compared share, and those in it."""
        return (self.of.count, len(self.conditions), 2)

    def count(self, table: Table) -> tuple[Cells, float]:
        """Return a client's cells, and the share of its rows outside the declared words or bounds."""
        columns = (self.of, self.label, self.prediction)
        (group, label, predicted), outside = zip(*(each.read(table) for each in columns), strict=True)
        condition, inside = self._select_rows(label, predicted)
        counts = (group >= 0) & (label >= 0) & (predicted >= 0) & (condition >= 0)
        index = (group * len(self.conditions) + condition) * 2 + inside
        cells = np.bincount(index[counts], minlength=math.prod(self.shape)).astype(np.float64)
        return cells.reshape(self.shape), share(np.logical_or.reduce(outside))

    def _select_rows(self, label: Indices, predicted: Indices) -> tuple[Indices, NDArray[np.bool_]]:
        """Return the number of each row's condition, (rows,), -1 for none, and whether the row is in the share that is compared."""
        match self.criterion:
            case "equal_opportunity":
                return np.where(label == 1, 0, -1), predicted == 1
            case "equalised_odds":
                return label, predicted == 1
            case "calibration":
                return predicted, label == 1
            case "accuracy":
                return np.zeros_like(label), predicted == label
            case _:  # parity
                return np.zeros_like(label), predicted == 1

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        """Return for each condition the groups' shares, the largest difference of two known ones, and the numbers of rows.

        Args:
          cells: the sum, of `shape`.
          sigma: standard deviation of the noise on each.
        """
        shares: list[Figure] = []
        rows: list[Figure] = []
        for index, (condition, suffix) in enumerate(zip(self.conditions, self._row_suffixes, strict=True)):
            name = CRITERIA[self.criterion].format(condition)
            by_group = [
                share_of(f"{name}, {group}", cells[row, index, 1], cells[row, index, 0], sigma)
                for row, group in enumerate(self.of.labels)
            ]
            shares += [*by_group, difference_of(f"{name}, difference", by_group)]
            # From the same noisy counts: they cost nothing more.
            sizes = zip(self.of.labels, cells[:, index].sum(1), strict=True)
            std = math.sqrt(2) * sigma
            rows += [count_of(f"{ROWS}{suffix}, {group}", size, std) for group, size in sizes]
        return shares + rows

    @property
    def _row_suffixes(self) -> tuple[str, ...]:
        """Text after `ROWS` for each condition: the label or the score of its rows."""
        words = {
            "equal_opportunity": self.label.labels[1:],
            "equalised_odds": self.label.labels,
            "calibration": self.prediction.labels,
        }
        return tuple(f", {word}" for word in words.get(self.criterion, ())) or ("",)

    def planned(self, sigma: float, rows: float) -> float:
        """Return the half-width of a share's interval if rows are spread evenly over the cells.

        A group of a tenth of the rows has an interval five times as wide as one of a half. Arguments as of `Statistic`.
        """
        rows_used = rows / 2 if self.criterion == "equal_opportunity" else rows
        return NORMAL_95 * sigma * math.sqrt(0.5) * self.of.count * len(self.conditions) / rows_used


def share_of(name: str, inside: float, outside: float, sigma: float) -> Figure:
    """Return a share of two noisy counts, and the interval of Fieller (1954), which is exact.

    The interval contains every r for which (1 - r) inside - r outside is explained by its noise, sigma sqrt((1 - r)^2 +
    r^2). For large counts it is that of the delta method: sigma sqrt((1 - r)^2 + r^2) / (inside + outside).

    Args:
      name: name of the figure.
      inside: noisy number of rows in the share.
      outside: noisy number of the other rows of the group.
      sigma: standard deviation of the independent noise on each.

    Returns:
      The figure; without a value if noise alone could explain the rows, so that the interval would exclude no share.
    """
    inside, outside = float(inside), float(outside)
    rows, spread = inside + outside, (NORMAL_95 * sigma) ** 2
    leading = rows**2 - 2 * spread
    if rows <= 0 or leading <= 0:
        return unsaid(name)
    low, high = roots(leading, inside * rows - spread, inside**2 - spread)
    return clipped(name, inside / rows, low, high, minimum=0.0)


def difference_of(name: str, shares: list[Figure]) -> Figure:
    """Return the largest minus the smallest known share, and its interval from theirs (Zou and Donner 2008).

    The noisy shares select these groups: with many groups of similar shares this selection alone makes the difference
    large, as in small samples without noise.

    Args:
      name: name of the figure.
      shares: share of each group, with independent noise.
    """
    ranked = sorted((each for each in shares if each.has_value), key=lambda each: each.value)
    if len(ranked) < 2:
        return unsaid(name)
    low, high = ranked[0], ranked[-1]
    value = high.value - low.value
    below = math.hypot(high.value - high.low, low.high - low.value)
    above = math.hypot(high.high - high.value, low.value - low.low)
    return Figure(name, value, max(value - below, -1.0), min(value + above, 1.0))


def reweighing(cells: Cells, sigma: float) -> Cells:
    """Return a weight for each group and class under which group and class do not depend on each other, the largest 1.

    P(group) P(class) / P(group, class) (Kamiran and Calders 2012). It is computed from released counts, so it costs
    nothing and is public: clients may get it with the task.

    Args:
      cells: noisy counts, shape (groups, classes).
      sigma: standard deviation of the noise on each. A cell that it drowns has the weight 1 before scaling.

    Returns:
      Shape (groups, classes), above 0.
    """
    lost = cells < ENOUGH * sigma
    counts = np.maximum(cells, max(sigma, np.finfo(np.float64).tiny))
    whole = counts.sum()
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / whole
    weights = np.where(lost, 1.0, expected / counts)
    return weights / weights.max()
