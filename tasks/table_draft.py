"""Draft of a schema, from tables whose rows may be looked at: what it says tells of the rows."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from .table_files import CODE, DECIMAL_COMMA, Cells, clients_of, listed, open_table, table_files
from .table_schema import MISSING, Column, Schema, plain, with_label

DRAFT_COMMAND = "fedveil new draft --from csv {} writes a first draft"
# Numbers as people write them, such as 1.133,5 and 10 %, and dates: as categories each would be an input of its own.
WRITTEN = re.compile(r"-?\d[\d.,' ]*%?|\d{4}-\d\d-\d\d.*|\d\d?[./]\d\d?[./]\d{2,4}.*")
LONGEST_WORD = 200  # characters of a category; what is longer is a text
MAX_CATEGORIES = 50  # words of a column that are taken for categories; of more it is a name or a text
MAX_MISSING = 3  # words of a column of numbers that are taken for missing values
MIN_NUMBERS = 10  # different numbers that such a column has; of fewer they are categories
CODES = (-9.0, -99.0, -999.0, -9999.0, 999.0, 9999.0, 99999.0)  # numbers that often stand for a missing one
MAX_CLASSES = 10  # whole numbers of a label that are taken for classes; more are a quantity


@dataclass
class Content:
    """Content of a column in the blocks that were read so far."""

    name: str  # as the first table has it
    low: float = math.inf  # of its numbers but codes
    high: float = -math.inf
    whole: bool = True  # numbers but codes
    numeric: bool = True  # it holds numbers, and few words
    odd_words: set[str] = field(default_factory=set[str])  # among numbers
    codes: set[float] = field(default_factory=set[float])  # numbers that may stand for a missing one
    spellings: dict[str, str] = field(default_factory=dict[str, str])  # the first of each word, by `plain`
    words: dict[Path, set[str]] = field(default_factory=dict[Path, set[str]])  # of each file

    def add(self, cells: Cells) -> None:
        """Add the cells of a block."""
        words = self.words.setdefault(cells.file, set())
        for word in cells.words()[0] if len(self.spellings) <= MAX_CATEGORIES else ():
            if word is not None and plain(word) not in cells.missing:
                self.spellings.setdefault(plain(word), " ".join(word.split()))
                words.add(plain(word))
        numbers = self._numbers(cells) if self.numeric else None
        if numbers is None:
            self.numeric = False
            return
        present = numbers[~np.isnan(numbers)]
        coded = np.isin(present, CODES)
        self.codes |= set(present[coded].tolist())
        if len(rest := present[~coded]):
            self.low, self.high = min(self.low, float(rest.min())), max(self.high, float(rest.max()))
            self.whole = self.whole and bool((rest == np.floor(rest)).all())

    def _numbers(self, cells: Cells) -> NDArray[np.float64] | None:
        """Return the numbers, among which a few words stand for missing ones; None where the column holds words."""
        for word in cells.odd_words():
            self.odd_words |= {plain(word)} - {*cells.missing}
            if len(self.odd_words) > MAX_MISSING:
                return None
        try:
            return replace(cells, column=Column(self.name, absent=tuple(self.odd_words))).numbers()
        except Refusal:  # of a type that is neither, or of a number that is not finite
            return None

    def unfit(self, files: Sequence[Path]) -> str | None:
        """Return why the column of these tables is left out; None where it is of use."""
        words, texts = list(self.spellings), not self.numeric
        lacking = next((file.name for file in files if file not in self.words), "")
        length = next((len(word) for word in words if len(word) > LONGEST_WORD), 0)
        written = texts and all(map(WRITTEN.fullmatch, words))
        advice = "write plain numbers, of a date an age"
        advice += f"; {DECIMAL_COMMA}" if any("," in word for word in words) else ""
        faults = (
            (lacking, f"{lacking} has no such column"),
            (not words, "it holds no value"),
            (len(words) == 1, "it holds one value"),
            (length, f"it holds a text of {length} characters"),
            (written, f"it holds words such as {next(iter(words), '')!r}: {advice}"),
            (texts and len(words) > MAX_CATEGORIES, f"it holds more than {MAX_CATEGORIES} different words"),
        )
        return next((fault for present, fault in faults if present), None)

    def column(self, is_label: bool) -> Column:
        """Return the column as a schema declares it: categories, or a number within bounds."""
        few = len(self.spellings) - len(self.odd_words) < MIN_NUMBERS
        numbers = self.numeric and not (self.odd_words and few)
        if not numbers or (is_label and self.whole and len(self.spellings) <= MAX_CLASSES):
            by_size = all(map(CODE.fullmatch, self.spellings))
            words = sorted(self.spellings, key=(lambda word: (float(word), word)) if by_size else str)
            return Column(self.name, categories=tuple((self.spellings[word],) for word in words))
        far = self._far_codes()
        ends = [self.low, self.high, *(code for code in self.codes if code not in far)]
        absent = (*sorted(self.odd_words), *(f"{code:g}" for code in far))
        return Column(self.name, *rounded_out(min(ends), max(ends)), absent=absent)

    def _far_codes(self) -> list[float]:
        """Return the codes that are far from all other numbers, and so seem to stand for a missing value."""
        width = self.high - self.low
        if not 0 < width < math.inf:
            return []
        return [code for code in sorted(self.codes) if code < 0 <= self.low or abs(code) - self.high > width]


def rounded_out(low: float, high: float) -> tuple[float, float]:
    """Return bounds of one or two digits around two numbers."""
    step = 10.0 ** math.floor(math.log10(high - low)) / 2
    return round(math.floor(low / step) * step, 12), round(math.ceil(high / step) * step, 12)


@dataclass(frozen=True)
class OtherWords:
    """Sets of words of one column that have no word in common: perhaps spellings of the same categories.

    Attributes:
      column: with all words as categories.
      sets: each set, with the files that use it.
      guess: the column if they are spellings, by their initials or else their order; None where their numbers differ.
    """

    column: Column
    sets: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    guess: Column | None

    @property
    def doubtful(self) -> bool:
        """Whether two of the sets have several words, so that each may be all categories."""
        return sum(len(words) > 1 for _, words in self.sets) > 1

    def __str__(self) -> str:
        return listed([f"{listed(files)}: {listed(words)}" for files, words in self.sets], "; ")


def draft_schema(
    paths: Sequence[Path], label: str | None = None
) -> tuple[Schema, dict[str, str], dict[str, OtherWords]]:
    """Return a schema of what the tables hold, why columns were left out, and columns with other words in other files.

    Args:
      paths: files, or folders of clients' files.
      label: of the column that is predicted; None takes the last one.

    Raises:
      Refusal: a table cannot be read, its columns cannot be told from each other, or the last ones differ and no label
        is given.
    """
    files = [file for path in paths for client in clients_of(path) for file in table_files(client)]
    contents, ends = _contents(files)
    if label is None and len(ends) > 1:
        last = ", ".join(ends.values())
        raise Refusal("task.label", None, f"the tables end with different columns ({last}); name the label")
    label_key = plain(label) if label is not None else next(iter(ends), "")
    faults = {key: content.unfit(files) for key, content in contents.items()}
    if faults.get(label_key) is not None:
        raise Refusal("task.label", contents[label_key].name, f"cannot be predicted: {faults[label_key]}")
    columns = {key: contents[key].column(key == label_key) for key, fault in faults.items() if fault is None}
    source = str(paths[0]) if len(paths) == 1 else f"{len(files)} tables"
    name = contents[label_key].name if label_key in contents else label
    schema = with_label(Schema(tuple(columns.values()), ""), name, source)
    words = {c.name: _other_words(c, contents[key].words) for key, c in columns.items() if c.categories}
    left_out = {contents[key].name: fault for key, fault in faults.items() if fault is not None}
    return schema, left_out, {name: other for name, other in words.items() if len(other.sets) > 1}


def _contents(files: Sequence[Path]) -> tuple[dict[str, Content], dict[str, str]]:
    """Return the content of each column, and those with which files end, in words, both by `plain`."""
    contents, ends, names = dict[str, Content](), dict[str, str](), dict[str, str]()
    for file in files:
        with open_table(file) as table:
            columns = [
                Column(name) for name in table.header if name.strip()
            ]  # others count the rows, or hold nothing
            if not columns:
                raise Refusal("table", str(file), "its first line must name the columns")
            for column in columns:
                names.setdefault(plain(column.name), column.name.strip())
            end = plain(columns[-1].name)
            ends.setdefault(end, f"{names[end]!r} in {file.name}")
            for block in table.blocks(columns, MISSING):
                for key, cells in zip(map(plain, block), block.values(), strict=True):
                    contents.setdefault(key, Content(names[key])).add(cells)
    return contents, ends


def _other_words(column: Column, by_file: dict[Path, set[str]]) -> OtherWords:
    """Return the sets of a column's words; files that share a word have one set."""
    sets = list[tuple[set[str], set[str]]]()
    by_file = {file: words for file, words in by_file.items() if words}
    folder = os.path.commonpath([file.parent for file in by_file])
    for path, words in by_file.items():
        sharing = [(files, others) for files, others in sets if others & words]
        sets = [(files, others) for files, others in sets if not others & words]
        names = {os.path.relpath(path, folder)}.union(*(files for files, _ in sharing))
        sets.append((names, words.union(*(others for _, others in sharing))))
    ordered = [
        (tuple(sorted(files)), tuple(word for word in column.words if plain(word) in words))
        for files, words in sets
    ]
    if len({len(words) for _, words in ordered}) > 1:
        return OtherWords(column, tuple(ordered), None)
    longest = max((words for _, words in ordered), key=lambda words: sum(map(len, words)))
    ranked = [_in_order_of(longest, words) for _, words in ordered if words is not longest]
    spellings = tuple(zip(longest, *ranked, strict=True))
    return OtherWords(column, tuple(ordered), replace(column, categories=spellings))


def _in_order_of(words: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Return other words in the order of these: by their initials if each has its own, else as they are."""
    by_initial = {plain(word)[0]: word for word in others}
    initials = [plain(word)[0] for word in words]
    distinct = len(by_initial) == len(others) and set(initials) == set(by_initial)
    return tuple(map(by_initial.__getitem__, initials)) if distinct else tuple(others)
