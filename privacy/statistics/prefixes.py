"""Prefixes of words, level by level: the step of a search for the commonest words that a tree of prefixes holds.

Every level counts prefixes that are one letter longer, among those with a common shorter prefix. Counts that noise
alone could explain are not followed. The letters and the longest word are declared and do not come from data (heavy
hitters over a prefix tree: Bassily et al. 2017, arXiv:1707.04982; Zhu et al. 2020, arXiv:1902.08534).
"""

import math
from dataclasses import dataclass

import numpy as np

from ...base.refusal import Refusal
from .columns import MAX_CELLS, Table, column, text_of
from .figure import Cells, Figure, count_of

END = ""  # in the place of a letter: the word ends here
MAX_LETTERS, MAX_LONGEST = 256, 64
MAX_PREFIXES = 512  # of one level, so that their text fits into an instruction


@dataclass(frozen=True)
class Prefixes:
    """`Statistic` of one level: rows whose word begins with each prefix and goes on with each letter, or ends.

    Attributes:
      of: the column of words.
      alphabet: letters that a word may have; a word with another letter is not counted, and reported as clipped.
      longest: number of letters of a word that count; a longer word is truncated, and reported as clipped.
      most: largest number of reported words.
      beta: bound on the probability that one level follows any prefix without rows.
      prefixes: followed prefixes, all of one length; at the first level the empty one.
    """

    of: str
    alphabet: tuple[str, ...]
    longest: int
    most: int = 10
    beta: float = 0.05
    prefixes: tuple[str, ...] = ("",)
    row_norm: float = 1.0

    def __post_init__(self) -> None:
        letters = self.alphabet
        if not 0 < len(letters) <= MAX_LETTERS or any(len(each) != 1 for each in letters):
            raise Refusal("alphabet", letters, f"give 1 to {MAX_LETTERS} letters, as in 'abc'")
        if len(set(letters)) < len(letters):
            raise Refusal("alphabet", "".join(letters), "names a letter twice")
        if not 1 <= self.longest <= MAX_LONGEST:
            raise Refusal("longest", self.longest, f"give 1 to {MAX_LONGEST} letters")
        if not 1 <= self.most <= MAX_CELLS:
            raise Refusal("most", self.most, f"give 1 to {MAX_CELLS} words")
        if not 0 < self.beta < 1:
            raise Refusal("beta", self.beta, "give a probability above 0 and below 1")
        if len({len(each) for each in self.prefixes}) != 1 or not 0 <= self.depth < self.longest:
            raise Refusal("prefixes", self.prefixes, "give some of one length, shorter than the longest word")
        if len(set(self.prefixes)) < len(self.prefixes) or not set("".join(self.prefixes)) <= set(letters):
            raise Refusal("prefixes", self.prefixes, "give different ones, of letters of the alphabet")

    @property
    def depth(self) -> int:
        """Number of letters of a followed prefix."""
        return len(self.prefixes[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of prefixes, and of letters with `END` as the last one."""
        return (len(self.prefixes), len(self.alphabet) + 1)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Text of each cell: a prefix with one more letter or, if the word ends there, the word."""
        return tuple(prefix + letter for prefix in self.prefixes for letter in (*self.alphabet, END))

    def count(self, table: Table) -> tuple[Cells, float]:
        """Return a client's cells, and the share of its rows whose word is longer, or has another letter."""
        words = [text_of(each) for each in column(table, self.of)]
        indices = {prefix: number for number, prefix in enumerate(self.prefixes)}
        letters = {letter: number for number, letter in enumerate((*self.alphabet, END))}
        cells, outside = np.zeros(self.shape), 0
        for word in filter(None, words):
            beginning = word[: self.longest]
            is_foreign = not set(beginning) <= letters.keys()
            outside += is_foreign or len(word) > self.longest
            # A word that is shorter than the prefixes has no index.
            index = indices.get(beginning[: self.depth])
            if index is not None and not is_foreign:
                cells[index, letters[beginning[self.depth : self.depth + 1]]] += 1
        return cells, outside / len(words) if words else 0.0

    def threshold(self, sigma: float, prefixes: int | None = None) -> float:
        """Return the smallest count of a followed prefix: noise alone exceeds it with a probability below beta.

        Args:
          sigma: standard deviation of the noise on each cell, in rows.
          prefixes: number of followed prefixes; None for this level's.
        """
        cells = (prefixes or len(self.prefixes)) * self.shape[1]
        return sigma * math.sqrt(2 * math.log(2 * cells / self.beta))

    def select(self, cells: Cells, sigma: float) -> tuple[dict[str, float], tuple[str, ...]]:
        """Return the words that end here with their counts, and the prefixes to follow; both by falling counts.

        Arguments as of `Statistic.answer`.
        """
        threshold, flat = self.threshold(sigma), cells.ravel()
        ended: dict[str, float] = {}
        longer: list[str] = []
        for cell in np.argsort(-flat, kind="stable"):
            if flat[cell] <= threshold:
                break
            name, ends = self.candidates[cell], cell % self.shape[1] == len(self.alphabet)
            if ends or self.depth + 1 == self.longest:
                ended[name] = float(flat[cell])
            else:
                longer.append(name)
        return ended, tuple(longer[: self.widest])

    @property
    def widest(self) -> int:
        """Largest number of prefixes that one level may follow within a question's limit of cells."""
        return min(max(1, MAX_CELLS // (len(self.alphabet) + 1)), MAX_PREFIXES)

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        """Return the count of each candidate of this level."""
        return [
            count_of(name or "no letter", cell, sigma)
            for name, cell in zip(self.candidates, cells.ravel(), strict=True)
        ]

    def planned(self, sigma: float, rows: float) -> float:
        """Return how many rows a word needs to be reported, whatever the data: at a level that follows the most prefixes."""
        return self.threshold(sigma, min(self.widest, len(self.alphabet) ** (self.longest - 1)))
