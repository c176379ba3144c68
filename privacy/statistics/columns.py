"""Columns of a client's rows as a question reads them: numbers between declared bounds, or declared words.

Bounds and words are public and part of the question; they do not come from data. A missing or invalid number is not
counted. A number outside the bounds counts as the nearest bound, and an undeclared word is not counted: both are in the
share reported as clipped. The reading of a cell depends only on that cell: at the record level no row may change how
another one counts.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal, real

LABEL = "label"  # the column of targets, where a task names none
FEW = 16  # number of words up to which comparing all rows at once is faster than a look-up for each row
MAX_CELLS = 4096  # of one question: more are a data set, and no statistic
WHOLE = re.compile(r"(-?\d+)(\.0+)?")

Table = Mapping[str, NDArray[Any]]  # a client's columns by name, all of one length


@dataclass(frozen=True)
class Numbers:
    """Column of numbers between two bounds.

    Attributes:
      name: name of the column.
      low, high: bounds, low below high.
    """

    name: str
    low: float
    high: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", real(f"{self.name}.low", self.low))
        object.__setattr__(self, "high", real(f"{self.name}.high", self.high))
        if not self.low < self.high:
            raise Refusal(f"{self.name}.low", self.low, f"must be below high={self.high:g}")

    @property
    def middle(self) -> float:
        """Middle of the bounds."""
        return (self.low + self.high) / 2

    @property
    def half(self) -> float:
        """Half the distance of the bounds."""
        return (self.high - self.low) / 2

    def read(self, table: Table) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return each row's number scaled to [-1, 1] and clipped, NaN if missing, (rows,), and whether it was out of bounds."""
        numbers = numbers_of(column(table, self.name))
        outside = (numbers < self.low) | (numbers > self.high)
        return np.clip((numbers - self.middle) / self.half, -1, 1), outside


@dataclass(frozen=True)
class Bins:
    """Column in bins: numbers between edges, or words.

    Attributes:
      name: name of the column.
      edges: ascending; the first and the last are the bounds. Empty where there are words.
      words: each a bin; empty where there are edges.
    """

    name: str
    edges: tuple[float, ...] = ()
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.edges) == bool(self.words):
            raise Refusal(self.name, None, "give edges of numbers, or categories of words, and not both")
        if self.words and len(set(map(text_of, self.words))) < len(self.words):
            raise Refusal(f"{self.name}.categories", self.words, "names a word twice")
        edges = tuple(real(f"{self.name}.edges", each) for each in self.edges)
        if self.edges and (len(edges) < 2 or any(b <= a for a, b in pairwise(edges))):
            raise Refusal(f"{self.name}.edges", self.edges, "give at least two, each above the one before")
        object.__setattr__(self, "edges", edges)

    @property
    def count(self) -> int:
        """How many bins there are."""
        return len(self.words) or len(self.edges) - 1

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the bins; a bin includes its lower edge, and the last one both."""
        return self.words or tuple(f"{low:g} to {high:g}" for low, high in pairwise(self.edges))

    def read(self, table: Table) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return each row's bin from 0, -1 for none, (rows,), and whether the row was outside the declared bounds or words."""
        cells = column(table, self.name)
        if self.words:
            return self._read_words(cells)
        numbers = numbers_of(cells)
        outside = (numbers < self.edges[0]) | (numbers > self.edges[-1])
        bins = np.clip(np.searchsorted(self.edges, numbers, side="right") - 1, 0, self.count - 1)
        return np.where(np.isnan(numbers), -1, bins), outside

    def _read_words(self, cells: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return each row's bin and whether its word is undeclared, as `read` does; an empty cell has no bin."""
        is_text = cells.dtype.kind == "U" and not any(map(WHOLE.fullmatch, self.words))
        if is_text and len(self.words) <= FEW:
            bins = np.full(len(cells), -1, np.int64)
            for number, word in enumerate(self.words):
                bins[cells == word] = number
            return bins, (bins < 0) & (cells != "")
        numbers = {text_of(word): number for number, word in enumerate(self.words)}
        words = [text_of(each) for each in cells]
        bins = np.array([numbers.get(each, -1) for each in words], np.int64)
        return bins, (bins < 0) & np.array([each != "" for each in words], np.bool_)


def column(table: Table, name: str) -> NDArray[Any]:
    """Return a client's column."""
    if name not in table:
        raise Refusal("of", name, f"is no column; there are {', '.join(sorted(table)) or 'none'}")
    return table[name]


def share(outside: NDArray[np.bool_]) -> float:
    """Return the share of rows outside the declared bounds or words; 0 without rows."""
    return np.count_nonzero(outside) / outside.size if outside.size else 0.0


def numbers_of(cells: NDArray[Any]) -> NDArray[np.float64]:
    """Return a column as numbers, NaN for an invalid cell: a failure would reveal its presence."""
    try:
        return np.asarray(cells, np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.array([_number(each) for each in cells.tolist()], np.float64)


def _number(cell: Any) -> float:
    """Return a cell as a number, NaN for an invalid one."""
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def text_of(cell: object) -> str:
    """Return a cell as a word, empty for an empty cell; 7, 7.0 and "7.0" are the same word.

    A table reads whole numbers as floats if one row of the column is empty. That row must not change the other rows' bins.
    """
    if isinstance(cell, float | np.floating):
        if math.isnan(cell):
            return ""
        return str(int(cell)) if cell.is_integer() else str(cell)
    text = "" if cell is None else str(cell)
    whole = WHOLE.fullmatch(text)
    return whole[1] if whole else text
