"""Draft of a schema from tables whose rows may be examined: bounds and words of a draft reveal rows."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..tasks.table_files import CODE, DECIMAL_COMMA, Cells, Files, RowSource, clients_of, listed
from ..tasks.table_schema import MISSING, Column, Schema, plain, with_label
from .durations import UNITS, Since

# Numbers as people write them, such as 1.133,5 and 10 %, and dates: as categories each would be an input of its own.
WRITTEN = re.compile(r"-?\d[\d.,' ]*%?|\d{4}-\d\d-\d\d.*|\d\d?[./]\d\d?[./]\d{2,4}.*")
DATE_FORMS = {  # of dates, by the words that have it
    "": re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d([.]\d+)?)?)?"),
    "%d.%m.%Y": re.compile(r"\d\d?[.]\d\d?[.]\d{4}"),
}
MOST_DAYS = 5 * 366  # between dates, that a draft counts in days; more are counted in years
NEGATIVE = (
    "0",
    "no",
    "nein",
    "non",
    "false",
    "negative",
    "neg",
    "-",
    "benign",
    "healthy",
    "normal",
    "control",
    "absent",
    "alive",
)
ABBREVIATION = 2  # letters at most of a word that abbreviates another of the same column
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
    forms: set[str | None] = field(
        default_factory=set[str | None]
    )  # of its words as dates; None of a word that is none
    first: datetime = datetime.max  # of the dates
    last: datetime = datetime.min

    def add(self, cells: Cells) -> None:
        """Add the cells of a block."""
        words_of_file = self.words.setdefault(cells.file, set())
        for word in cells.words()[0] if len(self.spellings) <= MAX_CATEGORIES or self.are_dates else ():
            if word is None or (key := plain(word)) in cells.missing:
                continue
            if len(self.spellings) <= MAX_CATEGORIES:
                self.spellings.setdefault(key, " ".join(word.split()))
                words_of_file.add(key)
            if None not in self.forms:
                self._add_date(word.strip())
            elif len(self.spellings) > MAX_CATEGORIES:
                break
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

    def _add_date(self, word: str) -> None:
        """Add a word as a date, if it is one."""
        form = next((form for form, shape in DATE_FORMS.items() if shape.fullmatch(word)), None)
        try:
            instant = datetime.strptime(word, form) if form else datetime.fromisoformat(word)
        except ValueError:
            self.forms.add(None)
            return
        self.forms.add(form)
        self.first, self.last = min(self.first, instant), max(self.last, instant)

    @property
    def are_dates(self) -> bool:
        """Whether all words are dates of one form."""
        return len(self.forms) == 1 and None not in self.forms

    def _duration(self) -> Column:
        """Return a column of dates as the time since the year of the first."""
        start, (form,) = datetime(self.first.year, 1, 1), self.forms
        days = (self.last - start).days + 1
        unit = "days" if days <= MOST_DAYS else "years"
        _, high = _rounded_out(0, days * UNITS["days"] / UNITS[unit])
        return Column(self.name, 0.0, high, since=Since(f"{start:%Y-%m-%d}", unit, form or ""))

    def _numbers(self, cells: Cells) -> NDArray[np.float64] | None:
        """Return the numbers of a block, NaN for a missing one or an odd word; None if the column is not numeric."""
        with suppress(Refusal):  # of an odd word that is new
            return self._numbers_beside_words(cells)
        for word in cells.odd_words():
            self.odd_words |= {plain(word)} - {*cells.missing}
            if len(self.odd_words) > MAX_MISSING:
                return None
        with suppress(
            Refusal
        ):  # of a type that is neither number nor text, or of a number that is not finite
            return self._numbers_beside_words(cells)
        return None

    def _numbers_beside_words(self, cells: Cells) -> NDArray[np.float64]:
        return replace(cells, column=Column(self.name, absent=tuple(self.odd_words))).numbers()

    def fault(self, files: Sequence[Path]) -> str:
        """Return why a draft from these tables leaves the column out; empty if it does not."""
        words = list(self.spellings)
        without_column = next((file.name for file in files if file not in self.words), "")
        length = next((len(word) for word in words if len(word) > LONGEST_WORD), 0)
        are_words = not self.numeric and not self.are_dates
        are_formatted = are_words and all(map(WRITTEN.fullmatch, words))
        are_many = are_words and len(words) > MAX_CATEGORIES
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
        if self.are_dates:
            return self._duration()
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
      guess: the column if the sets are spellings of one, matched by their initials or else by their order; None if that
        leaves a word open.
    """

    column: Column
    sets: tuple[WordSet, ...]
    guess: Column | None

    @property
    def doubtful(self) -> bool:
        """Whether two of the sets have several words, so that each may be all categories."""
        return sum(len(each.words) > 1 for each in self.sets) > 1

    @property
    def fault(self) -> str:
        """What is doubtful about the words."""
        several = len(self.sets) > 1
        return "has other words in other tables" if several else "has words that may be spellings of one"

    @property
    def mapping(self) -> str:
        """The guess in words: the spellings of each category; empty without a guess."""
        categories = () if self.guess is None else self.guess.categories
        several = [each for each in categories if len(each) > 1]
        return listed([f"{', '.join(each[1:])} -> {each[0]}" for each in several], "; ")

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
    return SchemaDraft(
        schema, left_out, {each.column.name: each for each in words if len(each.sets) > 1 or each.guess}
    )


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
    guess = _same_words(sets)
    return OtherWords(column, sets, replace(column, categories=guess) if guess else None)


def _same_words(sets: Sequence[WordSet]) -> tuple[tuple[str, ...], ...]:
    """Return the spellings of each category, the longest set's word first, if all sets spell the same; empty if unknown."""
    folds = [_abbreviated(each.words) for each in sets]
    if len(sets) == 1 and all(len(spellings) == 1 for spellings in folds[0].values()):
        return ()
    longest = max(folds, key=lambda fold: (len(fold), sum(map(len, fold))))
    categories = {word: list(spellings) for word, spellings in longest.items()}
    for fold in folds:
        if fold is longest:
            continue
        matches = _in_order_of(list(longest), list(fold))
        if matches is None:
            return ()
        for word, other in matches.items():
            categories[word] += fold[other]
    return tuple(map(tuple, categories.values()))


def _abbreviated(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the spellings of each word: itself, and a word of few letters with which it alone begins."""
    hosts = dict[str, str]()
    for word in words:
        longer = [each for each in words if len(each) > 2 * ABBREVIATION - 1 and each != word]
        extensions = [each for each in longer if plain(each).startswith(plain(word))]
        if word.isalpha() and len(word) <= ABBREVIATION and len(extensions) == 1:
            hosts[word] = extensions[0]
    spellings = {word: [word] for word in words if word not in hosts}
    for word, host in hosts.items():
        spellings[host].append(word)
    return spellings


def _in_order_of(words: Sequence[str], others: Sequence[str]) -> dict[str, str] | None:
    """Return each of other words by the word that it spells: by initials, and of the rest by negation or the order.

    None if fewer other words are in the rest.
    """
    initials: dict[str, list[str]] = {}
    for word in words:
        initials.setdefault(plain(word)[0], []).append(word)
    matches = {
        initials[plain(other)[0]][0]: other for other in others if len(initials.get(plain(other)[0], ())) == 1
    }
    rest = [other for other in others if other not in matches.values()]
    if rest and len(words) != len(others):
        return None
    first, second = _negative_first([word for word in words if word not in matches]), _negative_first(rest)
    return matches | dict(zip(first, second, strict=bool(rest)))


def _negative_first(words: Sequence[str]) -> list[str]:
    """Return the words with those that negate in front, in their order otherwise."""
    return sorted(words, key=lambda word: plain(word) not in NEGATIVE)
