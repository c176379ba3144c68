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
from .figure import ENOUGH, NORMAL_95, Cells, Figure, count_of, unsaid

Indices = NDArray[np.int64]
# For each criterion the share that it compares, by condition; {} is filled with the condition's name.
CRITERIA = {
    "equal_opportunity": "true positive rate",
    "equalised_odds": "{} positive rate",
    "parity": "selection rate",
    "accuracy": "accuracy",
    "calibration": "share of positives at score {}",
}
RATES = ("false", "true")
ROWS = "rows"  # what the numbers of rows are called, by condition and group


@dataclass(frozen=True)
class Fairness:
    """`Statistic` of one criterion, by the groups of one attribute. Of two classes the second is the positive one.

    Attributes:
      criterion: one of `CRITERIA`.
      of: the groups, by their words.
      label: the classes.
      prediction: the predicted classes in bins like those of the label; for calibration, the score's bins.
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
        """Groups, conditions, and whether the row counts in the share or beside it."""
        return (self.of.count, len(self.conditions), 2)

    def count(self, table: Table) -> tuple[Cells, float]:
        """Return a client's cells, and the share of its rows that was outside what is declared.

        Raises:
          Refusal: a column is missing.
        """
        (group, out), (label, beyond), (predicted, past) = (
            each.read(table) for each in (self.of, self.label, self.prediction)
        )
        condition, inside = self._select_rows(label, predicted)
        here = (group >= 0) & (label >= 0) & (predicted >= 0) & (condition >= 0)
        index = (group * len(self.conditions) + condition) * 2 + inside
        cells = np.bincount(index[here], minlength=math.prod(self.shape)).astype(np.float64)
        return cells.reshape(self.shape), share(out | beyond | past)

    def _select_rows(self, label: Indices, predicted: Indices) -> tuple[Indices, NDArray[np.bool_]]:
        """Return each row's condition, -1 where the criterion does not ask for it, and whether it counts in the share."""
        zeros = np.zeros_like(label)
        if self.criterion == "equal_opportunity":
            return np.where(label == 1, 0, -1), predicted == 1
        if self.criterion == "equalised_odds":
            return label, predicted == 1
        if self.criterion == "calibration":
            return predicted, label == 1
        return zeros, predicted == label if self.criterion == "accuracy" else predicted == 1

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        """Return each group's share by condition, the largest difference that can be said, and the rows that are counted.

        Args:
          cells: the sum, of this shape.
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
        """Which rows each condition takes, behind `ROWS`."""
        by_label = {"equal_opportunity": self.label.labels[1:], "equalised_odds": self.label.labels}
        words = by_label.get(
            self.criterion, self.prediction.labels if self.criterion == "calibration" else None
        )
        return ("",) if words is None else tuple(f", {word}" for word in words)

    def planned(self, sigma: float, rows: float) -> float:
        """Return half the width of a share's interval where rows are spread evenly over groups, conditions and shares.

        Args:
          sigma: of the noise.
          rows: of all clients together. A group of a tenth of the rows has an interval five times as wide as one of a
            half.
        """
        rows_used = rows / 2 if self.criterion == "equal_opportunity" else rows
        return NORMAL_95 * sigma * math.sqrt(0.5) * self.of.count * len(self.conditions) / rows_used


def share_of(name: str, inside: float, outside: float, sigma: float) -> Figure:
    """Return a share of two noisy counts, and the interval of Fieller (1954), which is exact.

    The interval contains every r for which (1 - r) inside - r beside is explained by its noise, sigma sqrt((1 - r)^2 +
    r^2). For large counts it is that of the delta method: sigma sqrt((1 - r)^2 + r^2) / (inside + beside).

    Args:
      name: of the figure.
      inside: rows that count in the share, with noise.
      outside: the other rows of the group, with noise.
      sigma: standard deviation of the independent noise on each.

    Returns:
      The figure; no value if the noise drowns the group, so that no share would be excluded.
    """
    inside, outside = float(inside), float(outside)
    rows, spread = inside + outside, (NORMAL_95 * sigma) ** 2
    leading = rows**2 - 2 * spread
    if rows <= 0 or leading <= 0:
        return unsaid(name)
    middle = inside * rows - spread
    root = math.sqrt(max(middle**2 - leading * (inside**2 - spread), 0.0))
    low, high = ((middle + sign * root) / leading for sign in (-1, 1))
    value, low, high = (min(max(each, 0.0), 1.0) for each in (inside / rows, low, high))
    return Figure(name, value, low, high)


def difference_of(name: str, shares: list[Figure]) -> Figure:
    """Return the largest minus the smallest known share, and its interval from theirs (Zou and Donner 2008).

    The noisy shares select these groups: with many groups of similar shares this selection alone makes the difference
      large, as in small samples without noise.

    Args:
      name: of the figure.
      shares: one a group, with independent noise.
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
      sigma: of their noise. A cell that is lost in it keeps the weight of one that depends on nothing.

    Returns:
      Shape (groups, classes), above 0.
    """
    lost = cells < ENOUGH * sigma
    counts = np.maximum(cells, max(sigma, np.finfo(np.float64).tiny))
    whole = counts.sum()
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / whole
    weights = np.where(lost, 1.0, expected / counts)
    return weights / weights.max()
