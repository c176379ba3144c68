"""Discrimination and calibration of a model of two classes, from one cross table of labels and scores.

The table counts the rows of each class in bins of the score. Its cells give the confusion matrix at a threshold, sensitivity,
specificity, the area under the ROC curve over the bins, and the share of the second class in each bin. All intervals of shares
and of the area cover both the sampling of the rows and the noise; those of counts cover the noise.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from .columns import Bins, Table, share
from .figure import ENOUGH, NORMAL_95, Cells, Figure, clipped, count_of, roots, unsaid


@dataclass(frozen=True)
class Discrimination:
    """`Statistic` of how a score tells two classes apart.

    Attributes:
      label: two words: the negative class, then the positive one.
      score: bins of the score, by their edges, which hold the threshold.
      threshold: score from which a row is called positive.
    """

    label: Bins
    score: Bins
    threshold: float = 0.5
    row_norm: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        if len(self.label.words) != 2:
            remedy = "give two categories: the negative class, then the positive one"
            raise Refusal("categories", self.label.words, remedy)
        if self.threshold not in self.score.edges[1:-1]:
            raise Refusal(
                "threshold", self.threshold, f"is none of the inner score_edges of {self.score.name}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Classes and bins of the score."""
        return (2, self.score.count)

    def count(self, table: Table) -> tuple[Cells, float]:
        """Return a client's cells, and the share of its rows outside the declared words or edges."""
        label, outside = self.label.read(table)
        score, beyond = self.score.read(table)
        counts = (label >= 0) & (score >= 0)
        index = np.ravel_multi_index((label[counts], score[counts]), self.shape)
        cells = np.bincount(index, minlength=math.prod(self.shape)).astype(np.float64)
        return cells.reshape(self.shape), share(outside | beyond)

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        """Return the area, the shares and counts at the threshold, and the share of the positive class in each bin.

        Args:
          cells: the sum, of `shape`.
          sigma: standard deviation of the noise on each.
        """
        high = np.asarray(self.score.edges[:-1]) >= self.threshold
        negative, positive = np.zeros(self.shape), np.zeros(self.shape)
        negative[0], positive[1] = 1, 1
        right = np.stack([~high, high]).astype(np.float64)
        figures = [
            self.area(cells, sigma),
            wilson_of("sensitivity", cells, right * positive, positive, sigma),
            wilson_of("specificity", cells, right * negative, negative, sigma),
            wilson_of("accuracy", cells, right, np.ones(self.shape), sigma),
        ]
        for number, word in enumerate(self.label.words):
            for answer, called in zip(self.label.words, (~high, high), strict=True):
                room = sigma * math.sqrt(called.sum())
                figures.append(count_of(f"rows of {word} called {answer}", cells[number, called].sum(), room))
        for number, name in enumerate(self.score.labels):
            own = np.zeros(self.shape)
            own[:, number] = 1
            figures.append(wilson_of(f"observed at {name}", cells, own * positive, own, sigma))
        return figures

    def area(self, cells: Cells, sigma: float) -> Figure:
        """Return the area under the ROC curve, ties within a bin counted half (DeLong et al. 1988), as of `answer`."""
        zeros, ones = cells.sum(1)
        if min(zeros, ones) < max(ENOUGH * sigma * math.sqrt(self.score.count), 2.0):
            return unsaid("auc")
        below = (
            np.cumsum(cells[0]) - cells[0] / 2
        ) / zeros  # share of negatives below a positive in each bin
        above = (ones - np.cumsum(cells[1]) + cells[1] / 2) / ones
        area = float(cells[1] @ below / ones)
        noise = sigma**2 * (((below - area) ** 2).sum() / ones**2 + ((above - area) ** 2).sum() / zeros**2)
        rows = np.maximum(cells, 0.0)
        sampling = rows[1] @ (below - area) ** 2 / (ones * (ones - 1))
        sampling += rows[0] @ (above - area) ** 2 / (zeros * (zeros - 1))
        half = NORMAL_95 * math.sqrt(noise + sampling)
        return clipped("auc", area, area - half, area + half, minimum=0.0)

    def planned(self, sigma: float, rows: float) -> float:
        """Return the largest half-width of the accuracy, whose noise is that of all cells. Arguments as of `Statistic`."""
        return NORMAL_95 * math.sqrt(sigma**2 * math.prod(self.shape) + rows / 4) / rows


def wilson_of(name: str, cells: Cells, hits: Cells, of: NDArray[np.float64], sigma: float) -> Figure:
    """Return a share of noisy counts with the interval of Wilson (1927), the noise's variance in addition.

    Args:
      name: of the figure.
      cells: noisy counts.
      hits: 1 for the cells that are counted, of the shape of `cells`.
      of: 1 for the cells of which they are a part.
      sigma: standard deviation of the noise on each cell.
    """
    rows = float((cells * of).sum())
    if rows < max(ENOUGH * sigma * math.sqrt(of.sum()), 1.0):
        return unsaid(name)
    value = min(max(float((cells * hits).sum()) / rows, 0.0), 1.0)
    noise = NORMAL_95 * sigma * float(np.linalg.norm(hits - value * of)) / rows
    extra = NORMAL_95**2 / rows
    low, high = roots(1 + extra, value + extra / 2, value**2 - noise**2)
    return clipped(name, value, low, high, minimum=0.0)
