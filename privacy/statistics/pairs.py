"""Pairs of columns that act together on a label, ranked from one noisy cross table of the label for each pair.

A row adds to one cell of each pair's table: to the part of rows with the event or, for a number, split between a high and a
low part by where it lies within its bounds. In each table the label is fitted by both columns without an interaction, as FAST
does (Lou, Caruana, Gehrke and Hooker 2013, "Accurate Intelligible Models with Pairwise Interactions"), in log odds for an event.
What is left of the cells, over their variance by sampling and noise, is a chi-square test, so that noise alone ranks no pair.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from .columns import MAX_CELLS, Bins, Numbers, Table, share
from .figure import NORMAL_95, Cells, Figure, unsaid

LEVEL = 0.05  # probability that a pair without an interaction is above the noise, over all pairs (Bonferroni)
CLEAR = 2.0  # least count of a cell that is used, in standard deviations of its noise
FULL = 5.0  # least count of a cell that is used without noise, of the chi-square approximation (Cochran 1954)
STEPS = 25  # of the fit in log odds
LONGEST = 1.0  # step of log odds, so that Newton's method does not overshoot
STEEPEST = 8.0  # largest log odds of the fit
WEAK_PRIOR = 1e-9  # keeps the fit's matrix invertible where a level has no cell
TYPED = 72  # characters of the line with the pairs above the noise: it fits into 80 columns
OPTION = "task.pairs"


@dataclass(frozen=True)
class Levels:
    """Column in few levels: bins, or groups of words.

    Attributes:
      bins: bins or words of the column.
      groups: level of each word; empty if each bin or word is one.
    """

    bins: Bins
    groups: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Name of the column."""
        return self.bins.name

    @property
    def count(self) -> int:
        """How many levels there are."""
        return max(self.groups) + 1 if self.groups else self.bins.count

    def read(self, table: Table) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return each row's level from 0, -1 for none, (rows,), and whether the row was outside the declared bounds or words."""
        codes, outside = self.bins.read(table)
        levels = np.array([*(self.groups or range(self.bins.count)), -1])
        return levels[codes], outside


class PairLabel(Protocol):
    """Label as pairs act on it."""

    @property
    def name(self) -> str:
        """Name of the column."""
        ...

    @property
    def moments(self) -> int:
        """Number of cells besides those of the pairs."""
        ...

    def read(self, table: Table) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the part of each row that is high, in [0, 1], NaN if missing, (rows,), and whether it was out of bounds."""
        ...

    def fit(self, cells: "PairCells", moments: Cells) -> tuple[Cells, Cells]:
        """Return the fit of the high parts without an interaction, in [0, 1], and the variance by sampling of each cell's sum.

        Args:
          cells: of one pair, shape (n,) each.
          moments: the cells besides those of the pairs, the number of rows, and the standard deviation of the noise on a cell.
        """
        ...


class PairCells(NamedTuple):
    """Usable cells of one pair: rows and high parts, shape (n,), and which cells have which level, (n, levels of both)."""

    rows: Cells
    high: Cells
    design: Cells


@dataclass(frozen=True)
class Event:
    """Label with an event or none: two groups of words, of which the second is the event."""

    of: Levels
    moments: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.of.count != 2:
            remedy = "give two categories, or two lists of categories: without the event, then with it"
            raise Refusal("categories", self.of.bins.labels, remedy)

    @property
    def name(self) -> str:
        return self.of.name

    def read(self, table: Table) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        levels, outside = self.of.read(table)
        return np.where(levels < 0, np.nan, levels), outside

    def fit(self, cells: PairCells, moments: Cells) -> tuple[Cells, Cells]:
        """Fit the log odds by both columns, by Newton's steps."""
        design, rows = cells.design, cells.rows
        high = np.clip(cells.high, 0.0, rows)
        middle = math.log((high.sum() + 1) / ((rows - high).sum() + 1))
        odds = np.full(len(rows), middle)
        for _ in range(STEPS):
            chances = 1 / (1 + np.exp(-odds))
            weights = rows * chances * (1 - chances)
            step = design @ np.linalg.solve(_gram(design, weights), design.T @ (high - rows * chances))
            odds = np.clip(odds + step * LONGEST / max(np.abs(step).max(), LONGEST), -STEEPEST, STEEPEST)
        chances = 1 / (1 + np.exp(-odds))
        return chances, rows * chances * (1 - chances)


@dataclass(frozen=True)
class Amount:
    """Label that is a number between two bounds: at the upper one all of a row is high, at the lower one nothing."""

    of: Numbers
    moments: int = field(default=1, init=False)  # the sum of the squared high parts

    @property
    def name(self) -> str:
        return self.of.name

    def read(self, table: Table) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        values, outside = self.of.read(table)
        return (values + 1) / 2, outside

    def fit(self, cells: PairCells, moments: Cells) -> tuple[Cells, Cells]:
        """Fit the means by both columns, by least squares."""
        design, rows = cells.design, cells.rows
        means = design @ np.linalg.solve(_gram(design, rows), design.T @ cells.high)
        squares, total, sigma = moments
        variance = squares / total - float(rows @ means**2) / rows.sum()
        return means, rows * max(variance, CLEAR * sigma / total, 1 / total)


def _gram(design: Cells, weights: Cells) -> Cells:
    gram = design.T @ (weights[:, None] * design)
    return gram + WEAK_PRIOR * max(weights.sum(), 1.0) * np.eye(len(gram))


class Interaction(NamedTuple):
    """Interaction of one pair.

    Attributes:
      chi_square: test of none, noise included.
      freedom: degrees of freedom; 0 if the noise drowns the cells.
      rows: rows that count, less by the part of their information that the noise takes where the effect is even.
    """

    chi_square: float
    freedom: int
    rows: float

    @property
    def excess(self) -> float:
        """Chi-square beyond that of no interaction, of which the share is a part of the rows; noise may make it negative."""
        return self.chi_square - self.freedom

    def figure(self, name: str, words: str = "") -> Figure:
        """Return the part of the label's variance, besides what both columns explain alone, that the interaction explains.

        Its interval has every true excess from which the chi-square is less than 1.96 standard deviations away.

        Args:
          name: of the figure.
          words: of the figure.
        """
        square = NORMAL_95**2
        half = NORMAL_95 * math.sqrt(max(4 * (self.excess + square) + 2 * self.freedom, 0.0))
        middle = self.excess + 2 * square
        value, low, high = (
            min(max(each / self.rows, 0.0), 1.0) for each in (self.excess, middle - half, middle + half)
        )
        return Figure(name, value, low, high, words=words)

    @property
    def chance(self) -> float:
        """Probability of so large a chi-square without an interaction."""
        from scipy.special import chdtrc  # a device has no use of it

        return float(chdtrc(self.freedom, self.chi_square))


@dataclass(frozen=True)
class PairStrengths:
    """`Statistic` of how strongly each pair of columns acts together on a label.

    Attributes:
      label: the label.
      columns: columns in their levels.
      pairs: numbers of both columns of each pair.
    """

    label: PairLabel
    columns: tuple[Levels, ...]
    pairs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        (cells,) = self.shape
        if cells > MAX_CELLS:
            remedy = "name fewer `columns`, each in fewer levels, or few `pairs`"
            fault = f"their pairs have {cells} cells, and {MAX_CELLS} are the most; {remedy}"
            raise Refusal("columns", len(self.columns), fault)

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Levels of both columns of each pair."""
        counts = [each.count for each in self.columns]
        return tuple((counts[one], counts[two]) for one, two in self.pairs)

    @property
    def shape(self) -> tuple[int, ...]:
        """The cells of the label, and for each pair those of the high and those of the low parts."""
        return (self.label.moments + sum(2 * one * two for one, two in self.sizes),)

    @property
    def row_norm(self) -> float:
        """Root of the number of pairs and of further cells: a row's high and low part of a pair are at most 1 together."""
        return math.sqrt(len(self.pairs) + self.label.moments)

    def names(self, columns: Sequence[int]) -> list[str]:
        """Return the names of columns."""
        return [self.columns[each].name for each in columns]

    def count(self, table: Table) -> tuple[Cells, float]:
        """Return a client's cells, and the share of its rows outside the declared words or bounds."""
        high, outside = self.label.read(table)
        levels, beyond = zip(*(each.read(table) for each in self.columns), strict=True)
        has_label = ~np.isnan(high)
        cells = [np.atleast_1d((high[has_label] ** 2).sum())] * self.label.moments
        for (one, two), size in zip(self.pairs, self.sizes, strict=True):
            counts = has_label & (levels[one] >= 0) & (levels[two] >= 0)
            index = np.ravel_multi_index((levels[one][counts], levels[two][counts]), size)
            for part in (high[counts], 1 - high[counts]):
                cells.append(np.bincount(index, part, minlength=math.prod(size)))
        return np.concatenate(cells), share(np.logical_or.reduce([outside, *beyond]))

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        """Return the share that each pair explains, the largest first, and the key that names those above the noise.

        Args:
          cells: the sum, of `shape`.
          sigma: standard deviation of the noise on each.
        """
        results = list(zip(self.pairs, self.interactions(cells, sigma), strict=True))
        ranked = sorted(
            results, key=lambda each: each[1].excess / each[1].rows if each[1].freedom else -math.inf
        )[::-1]
        limit = LEVEL / len(self.pairs)
        clear = [pair for pair, each in ranked if each.freedom and each.chance < limit]
        figures = [_figure(" x ".join(self.names(pair)), each, limit) for pair, each in ranked]
        return [*figures, self._key(clear)]

    def _key(self, pairs: Sequence[tuple[int, int]]) -> Figure:
        """Return the number of pairs above the noise, with the key of a run as its words: of as many as fit into a line."""
        words = "no pair is above the noise; give more epsilon, or fewer pairs or columns"
        for count in range(1, len(pairs) + 1):
            names = (f"[{','.join(map(_word, self.names(pair)))}]" for pair in pairs[:count])
            key = f'"{OPTION}=[{",".join(names)}]"'
            if count == 1 or len(key) <= TYPED:
                words = key
        count = float(len(pairs))
        return Figure("pairs above the noise", count, count, count, words=words)

    def interactions(self, cells: Cells, sigma: float) -> list[Interaction]:
        """Return the interaction of each pair, of no degree of freedom where the noise drowns its cells.

        Arguments as of `answer`.
        """
        ends = np.cumsum([self.label.moments, *(2 * one * two for one, two in self.sizes)])
        tables = [
            cells[start:end].reshape(2, *size)
            for (start, end), size in zip(pairwise(ends), self.sizes, strict=True)
        ]
        total = max(float(np.mean([table.sum() for table in tables])), 1.0)
        moments = np.array([*cells[: self.label.moments], total, sigma])
        return [self._interaction(table, sigma, moments) for table in tables]

    def _interaction(self, table: Cells, sigma: float, moments: Cells) -> Interaction:
        """Return the interaction of one pair.

        Args:
          table: high and low parts, shape (2, levels of the first, levels of the second).
          sigma: standard deviation of the noise on each cell.
          moments: as of `PairLabel.fit`.
        """
        size = table.shape[1:]
        high, low = table.reshape(2, -1)
        usable = high + low >= max(CLEAR * math.sqrt(2) * sigma, FULL)
        design = np.vstack(
            [np.indices(size).reshape(2, -1)[axis] == level for axis in (0, 1) for level in range(size[axis])]
        )
        design = design.T[usable].astype(np.float64)
        freedom = len(design) - int(np.linalg.matrix_rank(design)) if len(design) else 0
        if not freedom:
            return Interaction(0.0, 0, 1.0)
        parts = PairCells((high + low)[usable], high[usable], design)
        fit, variance = self.label.fit(parts, moments)
        rest = parts.high - parts.rows * fit
        weights = 1 / (variance + sigma**2 * ((1 - fit) ** 2 + fit**2))
        # Both columns' levels move a cell's sum by its variance: what they explain of the rest is taken out, at these weights.
        slopes = variance[:, None] * design
        moved, *_ = np.linalg.lstsq(np.sqrt(weights)[:, None] * slopes, np.sqrt(weights) * rest, rcond=None)
        rest = rest - slopes @ moved
        part = float(weights @ variance**2) / variance.sum()
        return Interaction(float(weights @ rest**2), freedom, part * float(parts.rows.sum()))

    def planned(self, sigma: float, rows: float) -> float:
        """Return the half-width at a share of 1, the largest one. Arguments as of `Statistic`."""
        freedom = max((one - 1) * (two - 1) for one, two in self.sizes)
        return NORMAL_95 * math.sqrt(4 * rows + 2 * freedom) / rows


def _figure(name: str, interaction: Interaction, limit: float) -> Figure:
    """Return the share that a pair explains; `limit` is the probability below which it is above the noise."""
    if not interaction.freedom:
        return unsaid(name)
    chance = interaction.chance
    return interaction.figure(name, f"above the noise (p = {chance:.2g})" if chance < limit else "")


def _word(name: str) -> str:
    """Return the name of a column as a list of a run's key has it: a plain word, or in quotes as Hydra and a shell read them."""
    if name.isascii() and name.isidentifier():
        return name
    escaped = re.sub("(['\"$`])", r"\\\1", name)
    return f"'{escaped}'"
