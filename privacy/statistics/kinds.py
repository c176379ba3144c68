"""Kinds of statistics: for each, a client's counts of its rows, and the estimate from their noisy sum.

A row contributes a part of a known norm, so that n rows have at most n times that norm; a longer contribution is
clipped. `sigma` is always the standard deviation of the noise on each cell, in rows.
"""

import math
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

CellCount = tuple[Cells, float]  # a client's cells, and which share of its rows was outside what is declared


class Statistic(Protocol):
    """Statistic of every client's rows, with its estimator."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the cells."""
        ...

    @property
    def row_norm(self) -> float:
        """L2 norm of the longest part that one row can add."""
        ...

    def count(self, table: Table) -> CellCount:
        """Return a client's cells, and the share of its rows that was outside what is declared.

        Raises:
          Refusal: a column is missing.
        """
        ...

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        """Return the estimate from a noisy sum of cells.

        Args:
          cells: the sum, of this shape.
          sigma: of its noise.
        """
        ...

    def planned(self, sigma: float, rows: float) -> float:
        """Return the largest half-width of an interval over all possible answers.

        Args:
          sigma: of the noise.
          rows: assumed number of all clients' rows.
        """
        ...


def row_count(table: Table) -> int:
    """Return how many rows a client has."""
    return next((len(each) for each in table.values()), 0)


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
        (index, outside), *others = (each.read(table) for each in self.of)
        here = index >= 0
        for each, (bins, beyond) in zip(self.of[1:], others, strict=True):
            index, here, outside = index * each.count + bins, here & (bins >= 0), outside | beyond
        cells = np.bincount(index[here], minlength=math.prod(self.shape)).astype(np.float64)
        return cells.reshape(self.shape), share(outside)

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
        values, outside = self.of.read(table)
        here = values[~np.isnan(values)]
        return np.array([len(here), here.sum()]), share(outside)

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
        read = [each.read(table) for each in self.of]
        values = np.stack([value for value, _ in read])
        here = values[:, ~np.isnan(values).any(0)]
        return np.array([here.shape[1], *here.sum(1)]), share(np.logical_or.reduce([out for _, out in read]))

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        figures = [count_of("rows", cells[0], sigma)]
        for each, total in zip(self.of, cells[1:], strict=True):
            mean = ratio_of(each.name, total, cells[0], sigma)
            figures.append(scaled(mean, each.middle, each.half))
        return figures

    def planned(self, sigma: float, rows: float) -> float:
        """Of the column with the widest bounds."""
        return max(ColumnMean(each).planned(sigma, rows) for each in self.of)


@dataclass(frozen=True)
class Variance:
    """Mean, variance and standard deviation of a column: rows, their sum, and their squares less a half."""

    of: Numbers
    shape: tuple[int, ...] = (3,)
    row_norm: float = 1.5

    def count(self, table: Table) -> CellCount:
        values, outside = self.of.read(table)
        here = values[~np.isnan(values)]
        return np.array([len(here), here.sum(), (here**2 - 0.5).sum()]), share(outside)

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
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
        """Half-width of the mean, to which a resolution refers."""
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
        """Of the leaves, in the units of the column."""
        return np.linspace(self.of.low, self.of.high, self.bins + 1)

    def count(self, table: Table) -> CellCount:
        values, outside = self.of.read(table)
        here = values[~np.isnan(values)]
        leaf = np.clip(np.floor((here + 1) / 2 * self.bins), 0, self.bins - 1).astype(np.int64)
        leaves = np.bincount(leaf, minlength=self.bins).astype(np.float64)
        return np.concatenate([leaves.reshape(self.branches, -1).sum(1), leaves]), share(outside)

    def consistent(self, cells: Cells) -> Cells:
        """Return the leaves of least squares, which add up to their parents: each takes its part of what is missing."""
        parents, leaves = cells[: self.branches], cells[self.branches :].reshape(self.branches, -1)
        missing = (parents - leaves.sum(1)) / (1 + self.branches)
        return (leaves + missing[:, None]).ravel()

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
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
        """Return the standard deviation at each edge of rows below it less `level` of all, in units of sigma."""
        # Variance of a leaf, and what leaves of one parent share.
        single, shared = 1.0, 1 / (1 + self.branches)
        inside = np.arange(self.bins + 1) % self.branches
        whole = np.arange(self.bins + 1) // self.branches
        total = self.branches * self._parent_variance
        within = inside * single - inside**2 * shared  # of the leaves below the edge in its own parent
        below = whole * self._parent_variance + within
        # With the whole: full parents and, of the edge's own, its leaves with all of that parent.
        joint = whole * self._parent_variance + inside * (single - self.branches * shared)
        return np.sqrt(np.maximum(below - 2 * level * joint + level**2 * total, 0.0))

    def planned(self, sigma: float, rows: float) -> float:
        """Where the rows lie evenly; a bin more, since inside of it nobody can tell."""
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
        """Of columns, by their places."""
        return tuple(combinations(range(len(self.of)), 2))

    @property
    def shape(self) -> tuple[int, ...]:
        return (1 + 2 * len(self.of) + len(self.pairs),)

    @property
    def row_norm(self) -> float:
        return math.sqrt(1 + len(self.of) * 1.25 + len(self.pairs))

    def count(self, table: Table) -> CellCount:
        read = [each.read(table) for each in self.of]
        values = np.stack([value for value, _ in read])
        outside = np.logical_or.reduce([out for _, out in read])
        here = values[:, ~np.isnan(values).any(0)]
        products = [float(here[one] @ here[two]) for one, two in self.pairs]
        return np.array([here.shape[1], *here.sum(1), *(here**2 - 0.5).sum(1), *products]), share(outside)

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        count, rows = len(self.of), cells[0]
        figures = [count_of("rows", rows, sigma)]
        for number, (one, two) in enumerate(self.pairs):
            name = f"{self.of[one].name}, {self.of[two].name}"
            indices = [0, 1 + one, 1 + two, 1 + count + one, 1 + count + two, 1 + 2 * count + number]
            figures.append(_correlated(name, cells[indices], sigma))
        return figures

    def planned(self, sigma: float, rows: float) -> float:
        """Where the columns are spread evenly between their bounds, with a variance of 1/3, and do not correlate."""
        return NORMAL_95 * sigma * 3 / rows


def _correlated(name: str, cells: Cells, sigma: float) -> Figure:
    """Return one correlation from rows, sums, squares less a half, and the product's sum."""
    if cells[0] < ENOUGH * sigma or cells[0] <= 0:
        return unsaid(name)
    rows, a, b, aa, bb, ab = cells
    spread = [each / rows + 0.5 - (total / rows) ** 2 for total, each in ((a, aa), (b, bb))]
    min_variance = ENOUGH * sigma / rows  # a variance that the noise could have made tells nothing
    if min(spread) <= max(min_variance, 0.0):
        return unsaid(name)
    both = math.sqrt(spread[0] * spread[1])
    value = (ab / rows - a * b / rows**2) / both
    # By the chain rule, over rows: the covariance and both variances are means less products of means.
    by_cov, by_one, by_two = 1 / both, -value / (2 * spread[0]), -value / (2 * spread[1])
    gradient = np.array(
        [
            by_cov * (-ab / rows + 2 * a * b / rows**2)
            + by_one * (-aa / rows + 2 * a * a / rows**2)
            + by_two * (-bb / rows + 2 * b * b / rows**2),
            by_cov * (-b / rows) + by_one * (-2 * a / rows),
            by_cov * (-a / rows) + by_two * (-2 * b / rows),
            by_one,
            by_two,
            by_cov,
        ],
        np.float64,
    )
    return smooth_of(name, value, gradient / rows, sigma, minimum=-1)


def require_cells(statistic: Statistic, name: str) -> None:
    """Refuse a statistic of more cells than a statistic has.

    Raises:
      Refusal: naming the question.
    """
    if math.prod(statistic.shape) > MAX_CELLS:
        raise Refusal(name, math.prod(statistic.shape), f"has more than {MAX_CELLS} cells; ask for less")
