"""Draft of a schema from tables whose rows may be examined: bounds and words of a draft reveal rows."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from .table_files import CODE, DECIMAL_COMMA, Cells, Files, RowSource, clients_of, listed
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
    """Content of a column in the blocks that were read so far; words are in the form of `plain`."""

    name: str  # as the first table spells it
    low: float = math.inf  # of the numbers that are no codes
    high: float = -math.inf
    whole: bool = True  # whether all numbers that are no codes are whole
    numeric: bool = True  # whether it holds numbers and at most MAX_MISSING words
    odd_words: set[str] = field(default_factory=set[str])  # words among numbers
    codes: set[float] = field(default_factory=set[float])  # numbers of CODES
    spellings: dict[str, str] = field(default_factory=dict[str, str])  # first spelling of each word
    words: dict[Path, set[str]] = field(default_factory=dict[Path, set[str]])  # words of each file

    def add(self, cells: Cells) -> None:
        """Add the cells of a block."""
        words_of_file = self.words.setdefault(cells.file, set())
        for word in cells.words()[0] if len(self.spellings) <= MAX_CATEGORIES else ():
            if word is not None and plain(word) not in cells.missing:
                self.spellings.setdefault(plain(word), " ".join(word.split()))
                words_of_file.add(plain(word))
        numbers = self._numbers(cells) if self.numeric else None
        if numbers is None:
            self.numeric = False
            return
        present = numbers[~np.isnan(numbers)]
        is_code = np.isin(present, CODES)
        self.codes |= set(present[is_code].tolist())
        if len(others := present[~is_code]):
            self.low, self.high = min(self.low, float(others.min())), max(self.high, float(others.max()))
            self.whole = self.whole and bool((others == np.floor(others)).all())

    def _numbers(self, cells: Cells) -> NDArray[np.float64] | None:
        """Return the numbers of a block, NaN for a missing one or an odd word; None if the column is not numeric."""
        for word in cells.odd_words():
            self.odd_words |= {plain(word)} - {*cells.missing}
            if len(self.odd_words) > MAX_MISSING:
                return None
        try:
            return replace(cells, column=Column(self.name, absent=tuple(self.odd_words))).numbers()
        except Refusal:  # of a type that is neither number nor text, or of a number that is not finite
            return None

    def fault(self, files: Sequence[Path]) -> str:
        """Return why a draft from these tables leaves the column out; empty if it does not."""
        words = list(self.spellings)
        without_column = next((file.name for file in files if file not in self.words), "")
        length = next((len(word) for word in words if len(word) > LONGEST_WORD), 0)
        are_formatted = not self.numeric and all(map(WRITTEN.fullmatch, words))
        are_many = not self.numeric and len(words) > MAX_CATEGORIES
        advice = "write plain numbers, of a date an age"
        advice += f"; {DECIMAL_COMMA}" if any("," in word for word in words) else ""
        faults = (
            (without_column, f"{without_column} has no such column"),
            (not words, "it holds no value"),
            (len(words) == 1, "it holds one value"),
            (length, f"it holds a text of {length} characters"),
            (are_formatted, f"it holds words such as {next(iter(words), '')!r}: {advice}"),
            (are_many, f"it holds more than {MAX_CATEGORIES} different words"),
        )
        return next((text for applies, text in faults if applies), "")

    def column(self, is_label: bool) -> Column:
        """Return the column as a schema declares it: categories, or a number within bounds."""
        has_few_numbers = len(self.spellings) - len(self.odd_words) < MIN_NUMBERS
        are_words = not self.numeric or bool(self.odd_words and has_few_numbers)
        are_classes = is_label and self.whole and len(self.spellings) <= MAX_CLASSES
        if are_words or are_classes:
            are_numbers = all(map(CODE.fullmatch, self.spellings))
            words = sorted(self.spellings, key=(lambda word: (float(word), word)) if are_numbers else str)
            return Column(self.name, categories=tuple((self.spellings[word],) for word in words))
        far_codes = self._far_codes()
        numbers = [self.low, self.high, *(code for code in self.codes if code not in far_codes)]
        absent = (*sorted(self.odd_words), *(f"{code:g}" for code in far_codes))
        low, high = _rounded_out(min(numbers), max(numbers))
        return Column(self.name, low, high, absent=absent)

    def _far_codes(self) -> list[float]:
        """Return the codes that are far from all other numbers, and so probably stand for a missing value."""
        width = self.high - self.low
        if not 0 < width < math.inf:
            return []
        return [code for code in sorted(self.codes) if code < 0 <= self.low or abs(code) - self.high > width]


def _rounded_out(low: float, high: float) -> tuple[float, float]:
    """Return bounds around two numbers, rounded to half of the power of ten below their distance."""
    step = 10.0 ** math.floor(math.log10(high - low)) / 2
    return round(math.floor(low / step) * step, 12), round(math.ceil(high / step) * step, 12)


class WordSet(NamedTuple):
    """Words of a column that some files use."""

    files: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class OtherWords:
    """Sets of words of one column that have no word in common: perhaps spellings of the same categories.

    Attributes:
      column: the column with all words as categories.
      sets: the sets.
      guess: the column if the sets are spellings of one, matched by their initials or else by their order; None if the
        sets have different numbers of words.
    """

    column: Column
    sets: tuple[WordSet, ...]
    guess: Column | None

    @property
    def doubtful(self) -> bool:
        """Whether two of the sets have several words, so that each may be all categories."""
        return sum(len(each.words) > 1 for each in self.sets) > 1

    def __str__(self) -> str:
        return listed([f"{listed(each.files)}: {listed(each.words)}" for each in self.sets], "; ")


class SchemaDraft(NamedTuple):
    """Schema of some tables, and what a person must decide about it."""

    schema: Schema
    left_out: dict[str, str]  # by the name of a column that is not in the schema, the reason
    other_words: dict[str, OtherWords]  # by the name of a column whose words differ between files


def draft_schema(paths: Sequence[Path], label: str | None = None) -> SchemaDraft:
    """Return a schema that the content of tables suggests.

    Args:
      paths: files, or folders of clients' files.
      label: name of the column that is predicted; None for the last one.

    Raises:
      Refusal: a table cannot be read, two columns have one name, the label is unfit, or none is named and the last
        columns of the tables differ.
    """
    return draft_of([Files(client) for path in paths for client in clients_of(path)], label)


def draft_of(sources: Sequence[RowSource], label: str | None = None) -> SchemaDraft:
    """Return a schema that the content of clients' sources suggests; `label` and errors as of `draft_schema`."""
    contents, ends, files = _contents(sources)
    if label is None and len(ends) > 1:
        last = ", ".join(ends.values())
        raise Refusal("task.label", None, f"the tables end with different columns ({last}); name the label")
    label_key = plain(label) if label is not None else next(iter(ends), "")
    faults = {key: content.fault(files) for key, content in contents.items()}
    if faults.get(label_key):
        raise Refusal("task.label", contents[label_key].name, f"cannot be predicted: {faults[label_key]}")
    columns = {key: contents[key].column(key == label_key) for key, fault in faults.items() if not fault}
    source = str(sources[0].path) if len(sources) == 1 else f"{len(files)} tables"
    name = contents[label_key].name if label_key in contents else label
    schema = with_label(Schema(tuple(columns.values()), ""), name, source)
    left_out = {contents[key].name: fault for key, fault in faults.items() if fault}
    words = [
        _other_words(column, contents[key].words) for key, column in columns.items() if column.categories
    ]
    return SchemaDraft(schema, left_out, {each.column.name: each for each in words if len(each.sets) > 1})


def _contents(sources: Sequence[RowSource]) -> tuple[dict[str, Content], dict[str, str], list[Path]]:
    """Return each column's content, a description of each table's last column, by names as `plain`, and the tables."""
    contents, ends, names = dict[str, Content](), dict[str, str](), dict[str, str]()
    files = list[Path]()
    for opened in chain.from_iterable(source.tables() for source in sources):
        with opened as table:
            file = table.file
            files.append(file)
            # A column without a name counts the rows, or holds nothing.
            columns = [Column(name) for name in table.header if name.strip()]
            if not columns:
                raise Refusal("table", str(file), "its first line must name the columns")
            for column in columns:
                names.setdefault(plain(column.name), column.name.strip())
            end = plain(columns[-1].name)
            ends.setdefault(end, f"{names[end]!r} in {file.name}")
            for block in table.blocks(columns, MISSING):
                for key, cells in zip(map(plain, block), block.values(), strict=True):
                    contents.setdefault(key, Content(names[key])).add(cells)
    return contents, ends, files


def _other_words(column: Column, by_file: dict[Path, set[str]]) -> OtherWords:
    """Return the sets of a column's words; files that share a word have one set."""
    merged: list[tuple[set[str], set[str]]] = []  # files and words, disjoint
    by_file = {file: words for file, words in by_file.items() if words}
    folder = os.path.commonpath([file.parent for file in by_file])
    for path, words in by_file.items():
        sharing = [each for each in merged if each[1] & words]
        merged = [each for each in merged if not each[1] & words]
        names = {os.path.relpath(path, folder)}.union(*(files for files, _ in sharing))
        merged.append((names, words.union(*(others for _, others in sharing))))
    sets = tuple(
        WordSet(tuple(sorted(files)), tuple(word for word in column.words if plain(word) in words))
        for files, words in merged
    )
    if len({len(each.words) for each in sets}) > 1:
        return OtherWords(column, sets, None)
    longest = max((each.words for each in sets), key=lambda words: sum(map(len, words)))
    others = [_in_order_of(longest, each.words) for each in sets if each.words is not longest]
    spellings = tuple(zip(longest, *others, strict=True))
    return OtherWords(column, sets, replace(column, categories=spellings))


def _in_order_of(words: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Return other words in the order of these: by their initials if each has its own, else as they are."""
    by_initial = {plain(word)[0]: word for word in others}
    initials = [plain(word)[0] for word in words]
    if len(by_initial) < len(others) or set(initials) != set(by_initial):
        return tuple(others)
    return tuple(by_initial[initial] for initial in initials)
