"""Kinds of statistics: for each, a client's counts of its rows, and the estimate from their noisy sum.

A row contributes a part of a known norm, so that n rows have at most n times that norm; a longer contribution is
clipped. `sigma` is always the standard deviation of the noise on each cell, in rows. The methods of a kind are those of
`Statistic`; where they add nothing to its words, they have none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import Protocol

import numpy as np

from ...base.refusal import Refusal
from .columns import MAX_CELLS, Bins, Numbers, Table, share
from .figure import (
    ENOUGH,
    NORMAL_95,
    Cells,
    Figure,
    count_of,
    quantile_of,
    ratio_of,
    scaled,
    smooth_of,
    unsaid,
)

CellCount = tuple[
    Cells, float
]  # a client's cells, and the share of its rows outside the declared bounds or words


class Statistic(Protocol):
    """Statistic of every client's rows, with its estimator."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the cells."""
        ...

    @property
    def row_norm(self) -> float:
        """L2 norm of the longest part that one row can add."""
        ...

    def count(self, table: Table) -> CellCount:
        """Return a client's cells, and the share of its rows outside the declared bounds or words."""
        ...

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        """Return the estimate from a noisy sum of cells.

        Args:
          cells: the sum, of `shape`.
          sigma: standard deviation of the noise on each cell.
        """
        ...

    def planned(self, sigma: float, rows: float) -> float:
        """Return the largest half-width of an interval over all possible answers.

        Args:
          sigma: standard deviation of the noise on each cell.
          rows: assumed number of all clients' rows.
        """
        ...


def row_count(table: Table) -> int:
    """Return how many rows a client has."""
    return next((len(each) for each in table.values()), 0)


def _complete_rows(columns: Sequence[Numbers], table: Table) -> tuple[Cells, float]:
    """Return the rows that have a number in every column, (columns, rows) in [-1, 1], and the share of all rows clipped."""
    values, outside = zip(*(each.read(table) for each in columns), strict=True)
    matrix = np.stack(values)
    return matrix[:, ~np.isnan(matrix).any(0)], share(np.logical_or.reduce(outside))


@dataclass(frozen=True)
class Count:
    """Number of rows."""

    shape: tuple[int, ...] = (1,)
    row_norm: float = 1.0

    def count(self, table: Table) -> CellCount:
        return np.array([row_count(table)], np.float64), 0.0

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        return [count_of("rows", cells[0], sigma)]

    def planned(self, sigma: float, rows: float) -> float:
        return NORMAL_95 * sigma


@dataclass(frozen=True)
class Histogram:
    """Number of rows in each bin of a column, or in each combination of bins of several."""

    of: tuple[Bins, ...]
    row_norm: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(each.count for each in self.of)

    def count(self, table: Table) -> CellCount:
        bins, outside = zip(*(each.read(table) for each in self.of), strict=True)
        has_bins = np.all(np.stack(bins) >= 0, axis=0)
        index = np.ravel_multi_index(tuple(each[has_bins] for each in bins), self.shape)
        cells = np.bincount(index, minlength=math.prod(self.shape)).astype(np.float64)
        return cells.reshape(self.shape), share(np.logical_or.reduce(outside))

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        names = map(", ".join, product(*(each.labels for each in self.of)))
        return [count_of(name, cell, sigma) for name, cell in zip(names, cells.ravel(), strict=True)]

    def planned(self, sigma: float, rows: float) -> float:
        return NORMAL_95 * sigma


@dataclass(frozen=True)
class ColumnMean:
    """Mean of a column: a client adds its rows and their sum, in [-1, 1] each."""

    of: Numbers
    shape: tuple[int, ...] = (2,)
    row_norm: float = math.sqrt(2)

    def count(self, table: Table) -> CellCount:
        (values,), outside = _complete_rows([self.of], table)
        return np.array([len(values), values.sum()]), outside

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        rows, total = cells
        mean = ratio_of("mean", total, rows, sigma)
        return [count_of("rows", rows, sigma), scaled(mean, self.of.middle, self.of.half)]

    def planned(self, sigma: float, rows: float) -> float:
        return NORMAL_95 * sigma * math.sqrt(2) * self.of.half / rows


@dataclass(frozen=True)
class ColumnMeans:
    """Means of several columns over the rows that have all of them: rows, and a sum for each column in [-1, 1]."""

    of: tuple[Numbers, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (1 + len(self.of),)

    @property
    def row_norm(self) -> float:
        return math.sqrt(1 + len(self.of))

    def count(self, table: Table) -> CellCount:
        values, outside = _complete_rows(self.of, table)
        return np.array([values.shape[1], *values.sum(1)]), outside

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        figures = [count_of("rows", cells[0], sigma)]
        for each, total in zip(self.of, cells[1:], strict=True):
            mean = ratio_of(each.name, total, cells[0], sigma)
            figures.append(scaled(mean, each.middle, each.half))
        return figures

    def planned(self, sigma: float, rows: float) -> float:
        """Return the half-width of the column with the widest bounds."""
        return max(ColumnMean(each).planned(sigma, rows) for each in self.of)


@dataclass(frozen=True)
class Variance:
    """Mean, variance and standard deviation of a column: rows, their sum, and their squares less a half."""

    of: Numbers
    shape: tuple[int, ...] = (3,)
    row_norm: float = 1.5  # of 1, a value up to 1, and its square less a half, up to 1/2

    def count(self, table: Table) -> CellCount:
        (values,), outside = _complete_rows([self.of], table)
        return np.array([len(values), values.sum(), (values**2 - 0.5).sum()]), outside

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        """Return the rows, the mean, and the variance with its root, by the delta method."""
        rows, total, squares = cells
        figures = ColumnMean(self.of).answer(cells[:2], sigma)
        if rows < ENOUGH * sigma or rows <= 0:
            return [*figures, unsaid("variance"), unsaid("standard deviation")]
        value = squares / rows + 0.5 - (total / rows) ** 2
        gradient = np.array(
            [-squares / rows**2 + 2 * total**2 / rows**3, -2 * total / rows**2, 1 / rows], np.float64
        )
        ratio = smooth_of("variance", value, gradient, sigma, minimum=0)
        squared = self.of.half**2
        variance = Figure("variance", *(squared * each for each in (ratio.value, ratio.low, ratio.high)))
        roots = (math.sqrt(each) for each in (variance.value, variance.low, variance.high))
        return [*figures, variance, Figure("standard deviation", *roots)]

    def planned(self, sigma: float, rows: float) -> float:
        """Return the half-width of the mean, to which a resolution refers."""
        return ColumnMean(self.of).planned(sigma, rows)


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of a column from a histogram in two levels, each row counted once in each.

    The levels are made consistent by least squares (Hay et al. 2010, arXiv:0904.0942). About 16 branches are best
    (Qardaji, Yang and Li 2013, "Understanding hierarchical methods for differentially private histograms").
    """

    of: Numbers
    quantiles: tuple[float, ...] = (0.25, 0.5, 0.75)
    branches: int = 16
    row_norm: float = math.sqrt(2)

    def __post_init__(self) -> None:
        if not self.quantiles or any(not 0 < each < 1 for each in self.quantiles):
            raise Refusal("quantiles", self.quantiles, "give some, each above 0 and below 1")
        if not 2 <= self.branches <= 32:
            raise Refusal("branches", self.branches, "give 2 to 32")

    @property
    def bins(self) -> int:
        """Leaves of the tree."""
        return self.branches**2

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.branches + self.bins,)

    @cached_property
    def edges(self) -> Cells:
        """Edges of the leaves, in the units of the column."""
        return np.linspace(self.of.low, self.of.high, self.bins + 1)

    def count(self, table: Table) -> CellCount:
        """Return the rows in each branch and then in each leaf."""
        (values,), outside = _complete_rows([self.of], table)
        leaf = np.clip(np.floor((values + 1) / 2 * self.bins), 0, self.bins - 1).astype(np.int64)
        leaves = np.bincount(leaf, minlength=self.bins).astype(np.float64)
        return np.concatenate([leaves.reshape(self.branches, -1).sum(1), leaves]), outside

    def consistent(self, cells: Cells) -> Cells:
        """Return the least-squares estimate of the leaves: the leaves of a parent share what is missing of its count."""
        parents, leaves = cells[: self.branches], cells[self.branches :].reshape(self.branches, -1)
        missing = (parents - leaves.sum(1)) / (1 + self.branches)
        return (leaves + missing[:, None]).ravel()

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        """Return the rows and each quantile, from the consistent leaves."""
        below = np.concatenate([[0.0], np.cumsum(self.consistent(cells))])
        figures = [count_of("rows", below[-1], sigma * math.sqrt(self.branches * self._parent_variance))]
        for level in self.quantiles:
            name, room = f"quantile {level:g}", NORMAL_95 * sigma * self._spread(level)
            if below[-1] <= 0 or below[-1] < room[-1]:
                figures.append(unsaid(name))
            else:
                figures.append(quantile_of(name, below - level * below[-1], room, self.edges))
        return figures

    @property
    def _parent_variance(self) -> float:
        return self.branches / (1 + self.branches)  # of a parent after least squares, in sigma^2

    def _spread(self, level: float) -> Cells:
        """Return the standard deviation at each edge of (rows below it - level * all rows), in units of sigma."""
        covariance = -1 / (1 + self.branches)  # of two leaves of one parent; a leaf's variance is 1 more
        full_parents, leaves = np.divmod(np.arange(self.bins + 1), self.branches)  # below each edge
        total_variance = self.branches * self._parent_variance
        variance = full_parents * self._parent_variance + (leaves + leaves**2 * covariance)
        with_total = full_parents * self._parent_variance + leaves * (1 + self.branches * covariance)
        return np.sqrt(np.maximum(variance - 2 * level * with_total + level**2 * total_variance, 0.0))

    def planned(self, sigma: float, rows: float) -> float:
        """Return the half-width where the rows lie evenly; with one more bin, inside which a quantile is not resolved."""
        room = NORMAL_95 * sigma * float(max(self._spread(each).max() for each in self.quantiles))
        return (room / rows + 1 / self.bins) * 2 * self.of.half


@dataclass(frozen=True)
class ColumnCorrelation:
    """Pearson's correlation of each pair of columns, over the rows that have all of them."""

    of: tuple[Numbers, ...]

    def __post_init__(self) -> None:
        if len(self.of) < 2:
            raise Refusal("of", [each.name for each in self.of], "a correlation is of two columns or more")

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs of columns, by their numbers."""
        return tuple(combinations(range(len(self.of)), 2))

    @property
    def shape(self) -> tuple[int, ...]:
        return (1 + 2 * len(self.of) + len(self.pairs),)

    @property
    def row_norm(self) -> float:
        return math.sqrt(1 + len(self.of) * 1.25 + len(self.pairs))

    def count(self, table: Table) -> CellCount:
        """Return rows, the sums of the columns, of their squares less a half, and of the products of `pairs`."""
        values, outside = _complete_rows(self.of, table)
        products = [float(values[one] @ values[two]) for one, two in self.pairs]
        cells = [values.shape[1], *values.sum(1), *(values**2 - 0.5).sum(1), *products]
        return np.array(cells), outside

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        """Return the rows, and the correlation of each of `pairs`."""
        count, rows = len(self.of), cells[0]
        figures = [count_of("rows", rows, sigma)]
        for number, (one, two) in enumerate(self.pairs):
            name = f"{self.of[one].name}, {self.of[two].name}"
            indices = [0, 1 + one, 1 + two, 1 + count + one, 1 + count + two, 1 + 2 * count + number]
            figures.append(_correlated(name, cells[indices], sigma))
        return figures

    def planned(self, sigma: float, rows: float) -> float:
        """Return the half-width where columns lie evenly between their bounds, with a variance of 1/3, uncorrelated."""
        return NORMAL_95 * sigma * 3 / rows


def _correlated(name: str, cells: Cells, sigma: float) -> Figure:
    """Return the correlation of columns a and b.

    Args:
      name: name of the figure.
      cells: noisy sums over rows of 1, a, b, a^2 - 1/2, b^2 - 1/2 and a b.
      sigma: standard deviation of the noise on each.
    """
    if cells[0] < ENOUGH * sigma or cells[0] <= 0:
        return unsaid(name)
    rows, a, b, aa, bb, ab = cells
    var_a, var_b = (each / rows + 0.5 - (total / rows) ** 2 for total, each in ((a, aa), (b, bb)))
    min_variance = ENOUGH * sigma / rows  # noise alone could explain a smaller variance
    if min(var_a, var_b) <= max(min_variance, 0.0):
        return unsaid(name)
    deviations = math.sqrt(var_a * var_b)
    value = (ab / rows - a * b / rows**2) / deviations
    # The chain rule, times rows: derivatives of the value by the covariance and both variances, and of these by the cells.
    by_cov, by_var_a, by_var_b = 1 / deviations, -value / (2 * var_a), -value / (2 * var_b)
    gradient = np.array(
        [
            by_cov * (-ab / rows + 2 * a * b / rows**2)
            + by_var_a * (-aa / rows + 2 * a * a / rows**2)
            + by_var_b * (-bb / rows + 2 * b * b / rows**2),
            by_cov * (-b / rows) + by_var_a * (-2 * a / rows),
            by_cov * (-a / rows) + by_var_b * (-2 * b / rows),
            by_var_a,
            by_var_b,
            by_cov,
        ],
        np.float64,
    )
    return smooth_of(name, value, gradient / rows, sigma, minimum=-1)


def require_cells(statistic: Statistic, name: str) -> None:
    """Refuse a statistic of more than `MAX_CELLS` cells, asked by the question of this name."""
    if math.prod(statistic.shape) > MAX_CELLS:
        raise Refusal(name, math.prod(statistic.shape), f"has more than {MAX_CELLS} cells; ask for less")
