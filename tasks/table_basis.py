"""Inputs of bins and of pairs of columns: neighbouring bins share their inputs, and a pair has the product of two columns'.

A bin's inputs are its row in the root of a matrix of similarities, exp(-d^2 / 2 s^2) for bins d apart and a length s, both
as shares of half the range. The matrix is centred, since the bias has the constant, and its largest diagonal entry is 1, so
that no row is longer than 1: a linear model over these inputs is a Gaussian process over the bins (Rasmussen and Williams
2006, section 2.2), smooth without a penalty in the loss, at the same sensitivity as separate bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal

# Of a number in a pair: as many as its two shapes need to bend, since every cell gets a share of the noise.
PAIR_BINS = 8
PAIR_LENGTH = 0.5  # of the similarity of bins in a pair
SMOOTHING = 0.5  # length of a gam's bins by default: docs/evidence/accuracy.md, "Tables"
RANGE = 2.0  # a range from -1 to 1


@lru_cache(maxsize=256)
def basis(count: int, length: float) -> NDArray[np.float32]:
    """Return the inputs of each bin, shape (count, count), rows of length at most 1; bins are separate if `length` is 0.

    Args:
      count: number of bins, at least 1.
      length: of the similarity, as a share of half the range, at least 0.
    """
    if not length:
        return np.eye(count, dtype=np.float32)
    middles = (np.arange(count) + 0.5) / count * RANGE
    similar = np.exp(-((middles[:, None] - middles) ** 2) / (2 * length**2))
    return _root(similar)


@lru_cache(maxsize=256)
def contrast(count: int) -> NDArray[np.float32]:
    """Return the inputs of each word of a pair, shape (count, count): one word each, less the mean of all."""
    return _root(np.eye(count))


def _root(similar: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the symmetric root of a matrix of similarities after it is centred and scaled."""
    centred = similar - similar.mean(0) - similar.mean(1)[:, None] + similar.mean()
    values, vectors = np.linalg.eigh(centred / centred.diagonal().max())
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root.astype(np.float32)


def effective(inputs: NDArray[np.float32]) -> float:
    """Return the number of directions in which bins' inputs differ: the number of bins if they are separate."""
    similar = inputs.astype(np.float64) @ inputs.T.astype(np.float64)
    return float(np.trace(similar) ** 2 / np.square(similar).sum())


def inputs_of(codes: NDArray[np.int64], rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the inputs of each code, shape (n, inputs); zeros for -1.

    Args:
      codes: shape (n,), -1 to len(rows) - 1.
      rows: inputs by code.
    """
    return np.vstack([rows, np.zeros_like(rows[:1])])[codes]


class LevelColumn(Protocol):
    """Column of a schema, as a pair reads it."""

    @property
    def name(self) -> str:
        """As in the header of a table."""
        ...

    @property
    def low(self) -> float:
        """Lower bound of a number."""
        ...

    @property
    def high(self) -> float:
        """Upper bound of a number."""
        ...

    @property
    def categories(self) -> tuple[tuple[str, ...], ...]:
        """Spellings of each word; empty for a number."""
        ...

    @property
    def words(self) -> tuple[str, ...]:
        """The words, each by its first spelling."""
        ...

    @property
    def edges(self) -> tuple[float, ...]:
        """Edges between the bins of a number."""
        ...


@dataclass(frozen=True)
class Pair:
    """Pair of columns of an additive model, whose inputs are the products of both columns' inputs.

    They are centred along both columns, so that they add what the two shapes alone cannot.
    """

    first: LevelColumn
    second: LevelColumn

    @property
    def name(self) -> str:
        return pair_name(self.first.name, self.second.name)

    @property
    def counts(self) -> tuple[int, int]:
        """Number of levels of both: words, or at most `PAIR_BINS` groups of neighbouring bins."""
        return _levels(self.first), _levels(self.second)

    @property
    def width(self) -> int:
        """Number of inputs of the model."""
        first, second = self.counts
        return first * second

    @property
    def rows(self) -> NDArray[np.float32]:
        """Inputs of each combination of levels, shape (width, width), rows of length at most 1."""
        return np.kron(_level_inputs(self.first), _level_inputs(self.second))

    def codes(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of each row's combination of levels, -1 where a column is missing; by both columns' codes."""
        one, two = (_coarse(column, each) for column, each in ((self.first, first), (self.second, second)))
        return np.where((one < 0) | (two < 0), -1, one * self.counts[1] + two)

    def levels(self, column: LevelColumn) -> list[float] | list[str]:
        """Return a column's levels in the pair: its words, or the edges of its groups of bins with both bounds."""
        return list(column.words) if column.categories else self.edges(column)

    def edges(self, column: LevelColumn) -> list[float]:
        """Return the edges of a number's groups of bins, with both bounds."""
        bins, count = np.arange(len(column.edges) + 1), _levels(column)
        starts = np.searchsorted(bins * count // len(bins), np.arange(1, count))
        return [column.low, *(column.edges[each - 1] for each in starts), column.high]


def pair_name(first: str, second: str) -> str:
    """Return the name of the pair of two columns, of its shape and of what it adds to a score."""
    return f"{first} x {second}"


def _levels(column: LevelColumn) -> int:
    return len(column.categories) or min(len(column.edges) + 1, PAIR_BINS)


def _coarse(column: LevelColumn, codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the level of each bin or word, -1 if it is missing."""
    if column.categories:
        return codes
    return np.where(codes < 0, -1, codes * _levels(column) // (len(column.edges) + 1))


def _level_inputs(column: LevelColumn) -> NDArray[np.float32]:
    count = _levels(column)
    return contrast(count) if column.categories else basis(count, PAIR_LENGTH)


def read_pairs(
    where: str, value: object, spelling: Callable[[str], str | None]
) -> tuple[tuple[str, str], ...]:
    """Return the names of the pairs that a schema's file declares, as the columns spell them; refuse any other value.

    Args:
      where: key of the value, for a refusal.
      value: a list of lists of two names.
      spelling: name of an input as the schema spells it, None for another name.
    """
    if not isinstance(value, list) or not value:
        raise Refusal(where, value, "must be a list of pairs, such as [[age, education]]")
    pairs = [_names(where, each, spelling) for each in cast(list[object], value)]
    distinct = set[frozenset[str]]()
    for pair in pairs:
        if frozenset(pair) in distinct:
            raise Refusal(where, pair_name(*pair), "occurs twice; remove one")
        if spelling(pair_name(*pair)) is not None:
            raise Refusal(where, pair_name(*pair), "is the name of a column too; rename that column")
        distinct.add(frozenset(pair))
    return tuple(pairs)


def _names(where: str, value: object, spelling: Callable[[str], str | None]) -> tuple[str, str]:
    """Return both names of a pair; refuse what is no pair of two inputs."""
    if not isinstance(value, list) or len(cast(list[object], value)) != 2:
        raise Refusal(where, value, "a pair has two names of columns, such as [age, education]")
    names = list[str]()
    for each in cast(list[object], value):
        name = spelling(str(each))
        if name is None:
            raise Refusal(where, each, "is no input of the model; name two columns that are")
        names.append(name)
    first, second = names
    if first == second:
        raise Refusal(where, first, "is one column; a pair has two")
    return first, second
