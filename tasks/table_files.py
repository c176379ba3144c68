"""Reader of tables: rows become float32 inputs of one schema, and mistakes name file, column and row.

CSV is read here; other sources are extensions, found by their suffix.

A row's number is a spreadsheet's: the header of a CSV file is row 1. Files are read in blocks, column by column, so
that a table takes the memory of its float32 matrix and of one block.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..base.extensions import extension, names
from ..base.extras import require_extra
from ..base.refusal import Refusal
from ..configs.strict import nearest
from .table_basis import inputs_of
from .table_schema import Column, Schema, plain

TEXTS = (".csv", ".tsv", ".txt")
OTHERS = "table source"  # extension point of tables with another suffix: a function of file and encoding
# Files that may hold a client's rows and are not read, by suffix; they are refused, so that no client is left out silently.
UNREAD = {
    suffix: fault
    for fault, suffixes in (
        ("is a spreadsheet, which is not read; save it as CSV", ".xls .xlsm .ods"),
        ("is packed, which is not read; unpack it", ".bz2 .xz .zst .7z .tgz"),
        ("is not read; save it as Parquet or CSV", ".feather .arrow .sav .dta .sas7bdat"),
    )
    for suffix in suffixes.split()
}
THOUSANDS = r"^-?[1-9][0-9]{0,2},[0-9]{3}$"
# By separator between the columns, the numbers whose comma may stand between thousands instead of before decimals.
COMMAS = {",": "", ";": r"^$", "\t": THOUSANDS, "|": THOUSANDS}
BLOCK_BYTES = 8 << 20  # of a CSV file, at least
COUNTED_BYTES = 1 << 18  # of a CSV file, in which lines are counted at once
BLOCK_LINES = 256  # of a CSV file, at least: of wide tables a block is longer
BLOCK_ROWS = 1 << 17  # of a Parquet file, at most
BLOCK_CELLS = 1 << 22  # of a Parquet file, at most: of wide tables a block has fewer rows
NUMBER = r"^-?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][-+]?[0-9]+)?$"
CODE = re.compile(NUMBER)  # a number that stands for a missing value
DECIMAL_COMMA = "a decimal comma goes with semicolons between the columns, and no points between thousands"
NO_NUMBER = {  # remedy for a word in a column of numbers, by the first pattern with which the word begins
    r"\d{4}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d\d": "write a date as an age, or declare since: and unit: for the column, or "
    "leave it out of the schema",
    r"[^,]*,": DECIMAL_COMMA,
    r"": "correct it, or add it to missing:",
}
LONGEST_NAME = 2000  # characters of a column's name
MAX_NAMES = 6  # in a sentence


@dataclass(frozen=True)
class Rows:
    """Rows of a table as a model takes them.

    Attributes:
      inputs: shape (n, schema.width), float32, between -1 and 1.
      targets: shape (n,): int64 classes, or float32 numbers between -1 and 1; other kinds of label have their own; None
        where no label was read.
    """

    inputs: NDArray[np.float32]
    targets: NDArray[Any] | None


@runtime_checkable
class RowSource(Protocol):
    """One client's tables, wherever they are.

    Attributes:
      path: name for refusals.
    """

    @property
    def path(self) -> Path: ...

    def tables(self) -> Iterator[AbstractContextManager[OpenTable]]:
        """Yield each table, to be opened and read in full before the next."""
        ...


@dataclass(frozen=True)
class Files:
    """One client's file, or the files in its folder and in folders below.

    Attributes:
      path: the file or the folder.
      encoding: of text files, as Python names it; None: UTF-8, or UTF-16 if a file begins with its mark.
    """

    path: Path
    encoding: str | None = None

    def tables(self) -> Iterator[AbstractContextManager[OpenTable]]:
        """Yield each file; the folders `key=value` on the way to it are columns of words."""
        for file in table_files(self.path):
            folders = file.relative_to(self.path).parts[:-1]
            yield open_table(file, self.encoding, [name for name in folders if "=" in name])


def table_files(path: Path) -> list[Path]:
    """Return one client's files: the file itself, or those in its folder and below; refuse if there is none."""
    if path.is_file():
        return [path]
    tables = sorted(_tables_in(path))
    if not tables:
        fault = "holds no table" if path.exists() else "does not exist"
        remedy = f"{fault}; name a file ({', '.join(suffixes())}) or a folder of them"
        raise Refusal("task.folder", str(path), remedy)
    return tables


def clients_of(folder: Path, public: Sequence[Path] = ()) -> list[Path]:
    """Return one path per client: the tables and the folders with tables in `folder`, by name; or `folder`, if a file.

    Args:
      folder: folder of all clients, or one client's file.
      public: files in it that belong to no client.
    """
    if folder.is_file():
        return [folder]
    excluded = set(map(os.path.realpath, public))  # Path.resolve raises where links form a loop
    paths = [path for path in sorted(folder.glob("[!.]*")) if os.path.realpath(path) not in excluded]
    clients = [path for path in paths if _is_table(path) or any(_tables_in(path))]
    return clients or table_files(folder)


def suffixes() -> tuple[str, ...]:
    """Return the suffixes of tables; those of extensions may need a package that is not installed."""
    return (*TEXTS, *names(OTHERS))


def _tables_in(folder: Path) -> Iterator[Path]:
    """Yield the tables in a folder and in those below it, whose names begin with no point."""
    for path in folder.glob("[!.]*") if folder.is_dir() else ():
        if _is_table(path):
            yield path
        elif not path.is_symlink():  # of folders, links may form a loop
            yield from _tables_in(path)


def _is_table(path: Path) -> bool:
    """Return whether a file is a table by its suffix; refuse one that may hold rows and cannot be read."""
    suffix = path.suffix.lower()
    if path.name.startswith(".") or path.is_dir():
        return False
    if suffix in UNREAD and not path.name.startswith("~"):
        raise Refusal("table", str(path), f"{UNREAD[suffix]}, or move it away")
    is_table = suffix in suffixes()
    if is_table and not path.is_file():
        remedy = "is no file, or a link that leads to none; put the table there, or move it away"
        raise Refusal("table", str(path), remedy)
    return is_table


def query_results(query: str | None, database: str | None) -> list[RowSource]:
    """Return the result of a SELECT on a database or a URL, or on each database of a folder, by name."""
    return extension("rows", "query", "task.query", query)(query, database)


def source_of(path: Path | RowSource) -> RowSource:
    """Return a source; a path is one of files."""
    return Files(path) if isinstance(path, Path) else path


def read_rows(path: Path | RowSource, schema: Schema, labelled: bool = True) -> Rows:
    """Return the rows of all tables of a client.

    Args:
      path: a file, a folder, or another source.
      schema: schema of the tables.
      labelled: whether the label's column is read.

    Raises:
      Refusal: a table has a mistake, named by file, column and row; has no rows; or changed while it was read.
    """
    columns = schema.columns if labelled else schema.inputs
    parts = list[Rows]()
    for opened in source_of(path).tables():
        with opened as table:
            parts.append(_read_table(table, schema, columns))
    if len(parts) == 1:
        return parts[0]
    inputs = np.concatenate([part.inputs for part in parts])
    targets = [part.targets for part in parts if part.targets is not None]
    return Rows(inputs, np.concatenate(targets) if targets else None)


def row_bound(source: RowSource) -> int:
    """Return a bound on the number of a client's rows without reading cells; refuse a file that is no table."""
    total = 0
    for opening in source.tables():
        with opening as table:
            total += table.max_rows
    return total


def read_columns(path: Path | RowSource, schema: Schema) -> dict[str, NDArray[Any]]:
    """Return the schema's columns of all rows of `read_rows` by name: numbers, NaN if missing, and words.

    A word is the first spelling of its category, or empty if it is missing. A word of no category remains as it is; a
    question counts it among the clipped values. Arguments as of `read_rows`.
    """

    def values_of(cells: Cells) -> NDArray[Any]:
        return cells.spelled() if cells.column.categories else cells.numbers()

    return read_cells(path, (*schema.columns, *schema.groups), schema, values_of)


def read_persons(path: Path | RowSource, column: str, schema: Schema) -> list[str]:
    """Return the person of each row from a column that is not in the schema; other arguments as of `read_rows`."""

    def persons_of(cells: Cells) -> NDArray[np.object_]:
        words, index = cells.words()
        names = ["" if word is None else plain(word) for word in words]
        absent = np.array([name in schema.missing for name in names])[index]
        remedy = "is missing, but identifies the person of the row; give each unknown person its own name"
        cells.refuse_any(absent, remedy)
        return np.array(names, dtype=object)[index]

    return read_cells(path, [Column(column)], schema, persons_of)[column].tolist()


def read_groups(
    path: Path | RowSource, columns: Sequence[Column], schema: Schema
) -> dict[str, NDArray[np.int64]]:
    """Return by column the number of each row's category, -1 if it is missing; other arguments as of `read_rows`."""
    return read_cells(path, columns, schema, Cells.codes)


def read_cells(
    path: Path | RowSource, columns: Sequence[Column], schema: Schema, read: Callable[[Cells], NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Return the results of a function of a column's cells in one block, by column, over all blocks of a client's tables.

    Args:
      path: a file, a folder, or another source.
      columns: to read.
      schema: of the tables, for its words for a missing value.
      read: returns an array of shape (n,) for a block's n cells.
    """
    parts: dict[str, list[NDArray[Any]]] = {column.name: [] for column in columns}
    for opened in source_of(path).tables():
        with opened as table:
            for block in table.blocks(columns, schema.missing):
                for name, cells in block.items():
                    parts[name].append(read(cells))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def frame_inputs(frame: object, schema: Schema) -> NDArray[np.float32]:
    """Return `Rows.inputs` of a data frame of pandas, or of what else `pyarrow.table` accepts; refuse anything else."""
    require_extra("tables", "a data frame")
    pa: Any = import_module("pyarrow")
    try:
        table = pa.table(frame)
    except (pa.ArrowException, TypeError, ValueError) as error:
        remedy = f"is not a data frame ({str(error).splitlines()[0]})"
        raise Refusal("data", type(frame).__name__, remedy) from None
    return _read_table(arrow_table(Path("data frame"), table), schema, schema.inputs).inputs


def _read_table(table: OpenTable, schema: Schema, columns: Sequence[Column]) -> Rows:
    """Return the rows of a table; the label is read if it is among the columns."""
    outcome, labelled = schema.outcome, schema.target in columns
    inputs = np.empty((table.max_rows, schema.width), dtype=np.float32)
    targets = outcome.empty(table.max_rows)
    stop = 0
    for block in table.blocks(columns, schema.missing):
        start, stop = stop, stop + len(next(iter(block.values())).values)
        _write_inputs(inputs[start:stop], block, schema)
        if labelled:
            targets[start:stop] = outcome.targets(block)
    if not stop:
        raise Refusal("table", str(table.file), "has no rows; remove the client, or add data")
    return Rows(inputs[:stop], targets[:stop] if labelled else None)


def _write_inputs(inputs: NDArray[np.float32], block: Mapping[str, Cells], schema: Schema) -> None:
    """Write the model's inputs of one block: those of each column, then those of each pair."""
    offset = 0
    for column in schema.inputs:
        block[column.name].encode(inputs[:, offset : offset + column.width], schema.rows(column))
        offset += column.width
    for pair in schema.pairs:
        codes = pair.codes(*(block[each.name].levels() for each in (pair.first, pair.second)))
        inputs[:, offset : offset + pair.width] = inputs_of(codes, pair.rows)
        offset += pair.width


# --- the cells of one block ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """Cells of one column in one block of a table.

    Attributes:
      values: an Arrow array, shape (n,).
      column: the column of the schema.
      missing: words that stand for a missing value in any column.
      file: the table, for refusals.
      comma: regular expression of numbers whose comma may be no decimal comma; empty if commas are never decimal.
      first_row: number of the block's first row, for refusals.
      origin: cells of `Column.origin`.
    """

    values: Any
    column: Column
    missing: tuple[str, ...]
    file: Path
    comma: str = ""
    first_row: int = 2
    origin: tuple[Cells, ...] = ()
    # The module pyarrow.compute, which is imported only when a table is read.
    _pc: Any = field(default_factory=lambda: import_module("pyarrow.compute"), repr=False)

    def encode(self, inputs: NDArray[np.float32], rows: NDArray[np.float32]) -> None:
        """Write the column's inputs of the model, shape (n, column.width): a number, or the row of its bin or word.

        Args:
          inputs: written; zeros for no value.
          rows: inputs by bin or word, as of `Schema.rows`.
        """
        column = self.column
        if column.categories or column.edges:
            codes = self.levels()
            if column.missing_input:
                codes = np.where(codes < 0, column.values, codes)
            inputs[:] = inputs_of(codes, rows)
            return
        numbers = self.numbers()
        if column.missing_input:
            inputs[:, 1] = np.isnan(numbers)
        inputs[:, 0] = self._scaled(numbers, False)

    def levels(self) -> NDArray[np.int64]:
        """Return the number of each cell's word or bin, shape (n,), -1 for no value."""
        return self.codes() if self.column.categories else self.bins()

    def scaled(self, is_label: bool = False) -> NDArray[np.float64]:
        """Return numbers scaled by `Column.scale` and clipped to the column's bounds, shape (n,).

        Args:
          is_label: whether a missing number is refused.

        Raises:
          Refusal: a cell is no finite number, or is missing although the column requires it.
        """
        return self._scaled(self.numbers(), is_label)

    def _scaled(self, numbers: NDArray[np.float64], is_label: bool) -> NDArray[np.float64]:
        """Return numbers, NaN if missing, scaled in place as by `scaled`."""
        column, absent = self.column, np.isnan(numbers)
        self._check_present(absent, is_label)
        offset, scale = column.scale
        numbers[absent] = offset if column.missing is None else column.missing
        low, high = (column.low - offset) / scale, (column.high - offset) / scale
        if column.standard is None:  # exactly, whatever the rounding
            low, high = -1.0, 1.0
        return np.clip((numbers - offset) / scale, low, high, out=numbers)

    def bins(self) -> NDArray[np.int64]:
        """Return the bin of each number, shape (n,), -1 if it is missing and no number stands for it.

        A number on an edge is in the bin above it. Refuse a cell that is no finite number, or missing but required.
        """
        numbers = self.numbers()
        absent = np.isnan(numbers)
        self._check_present(absent)
        bins = np.searchsorted(self.column.edges, numbers, side="right")
        missing = self.column.missing
        bins[absent] = -1 if missing is None else np.searchsorted(self.column.edges, missing, side="right")
        return bins

    def numbers(self) -> NDArray[np.float64]:
        """Return numbers, shape (n,), NaN for a missing one; refuse a cell that is no finite number."""
        if self.column.since is not None:
            return extension("cells", "since", "since", self.column.name)(self)
        numbers = self._plain_numbers()
        numbers = self._read_numbers() if numbers is None else numbers
        words = (*self.missing, *self.column.absent)
        if codes := [float(word) for word in words if CODE.fullmatch(word)]:
            numbers[np.isin(numbers, codes)] = math.nan
        return numbers

    def _plain_numbers(self) -> NDArray[np.float64] | None:
        """Return numbers, shape (n,), of texts that all are finite numbers as they stand; None of any other cells."""
        pa = import_module("pyarrow")
        if not self._is_text(self.values):
            return None
        try:
            numbers = np.array(self._pc.cast(self.values, pa.float64()))
        except pa.ArrowInvalid:
            return None
        return numbers if np.isfinite(numbers).all() else None

    def _read_numbers(self) -> NDArray[np.float64]:
        """Return numbers, shape (n,), NaN for a missing one, but not for codes; refuse a cell that is no finite number."""
        pa, pc = import_module("pyarrow"), self._pc
        cells, values = self.trimmed()
        try:
            numbers = np.array(pc.fill_null(pc.cast(values, pa.float64(), safe=False), math.nan))
        except pa.ArrowInvalid:
            fits = np.asarray(pc.fill_null(pc.match_substring_regex(values, NUMBER), True))
            row = int((~fits).argmax())
            word = cells[row].as_py()
            remedy = next(NO_NUMBER[form] for form in NO_NUMBER if re.match(form, str(word)))
            return self._refuse(row, word, f"is not a number; {remedy}")
        except (pa.ArrowNotImplementedError, NotImplementedError):
            return self._refuse(0, str(values.type), "has a type that is neither number nor text")
        self.refuse_any(np.isinf(numbers), "is not finite; correct it, or leave the cell empty", values)
        return numbers

    def codes(self, is_label: bool = False) -> NDArray[np.int64]:
        """Return the number of each cell's category, shape (n,), -1 if it is missing; refuse an unknown word.

        Args:
          is_label: whether a missing word is refused.
        """
        column, (words, index) = self.column, self.words()
        numbers = {**dict.fromkeys((*self.missing, *column.absent), -1), **column.codes}
        by_word = [-1 if word is None else numbers.get(plain(word), -2) for word in words]
        codes = np.array(by_word, dtype=np.int64)[index]
        if (unknown := codes == -2).any():
            row = int(unknown.argmax())
            remedy = (
                f"is not one of its categories ({listed(column.words)}); correct it, or add it to the schema"
            )
            self._refuse(row, words[index[row]], remedy)
        self._check_present(codes < 0, is_label)
        return codes

    def spelled(self) -> NDArray[np.str_]:
        """Return each cell's word, shape (n,): the first spelling of its category, or the word itself; empty if missing."""
        column, (words, index) = self.column, self.words()
        spellings = {word: column.words[code] for word, code in column.codes.items()}
        spellings |= dict.fromkeys((*self.missing, *column.absent), "")
        by_word = ["" if word is None else spellings.get(plain(word), word) for word in words]
        return np.array(by_word, dtype=np.str_)[index]

    def words(self) -> tuple[list[str | None], NDArray[np.int64]]:
        """Return the distinct words of the cells with None at their end, and each cell's index among them, shape (n,)."""
        pa, pc = import_module("pyarrow"), self._pc
        is_encoded = pa.types.is_dictionary(self.values.type)
        encoded = self.values if is_encoded else self.values.dictionary_encode()
        words = [None if word is None else str(word) for word in encoded.dictionary.to_pylist()]
        return [*words, None], np.asarray(pc.fill_null(encoded.indices, len(words)), dtype=np.int64)

    def odd_words(self) -> list[str]:
        """Return the distinct texts of the cells that are neither numbers nor missing."""
        _, values = self.trimmed()
        if not self._is_text(values):
            return []
        fits = self._pc.match_substring_regex(values, NUMBER)
        return values.filter(self._pc.invert(fits)).unique().to_pylist()

    def trimmed(self) -> tuple[Any, Any]:
        """Return the cells without outer spaces, null for a missing value; and the same with a decimal point for a comma."""
        pa, pc, cells = import_module("pyarrow"), self._pc, self.values
        if pa.types.is_dictionary(cells.type):
            cells = cells.dictionary_decode()
        if not self._is_text(cells):
            return cells, cells
        cells = pc.utf8_trim_whitespace(cells)
        words = pa.array((*self.missing, *self.column.absent), type=cells.type)
        absent = pc.is_in(pc.utf8_lower(cells), value_set=words)
        cells = pc.if_else(absent, pa.scalar(None, type=cells.type), cells)
        if not self.comma:
            return cells, cells
        points = pc.replace_substring(cells, ",", ".", max_replacements=1)
        ambiguous = pc.match_substring_regex(cells, self.comma)
        return cells, pc.if_else(ambiguous, cells, points)

    @staticmethod
    def _is_text(values: Any) -> bool:
        types: Any = import_module("pyarrow").types
        return types.is_string(values.type) or types.is_large_string(values.type)

    def _check_present(self, absent: NDArray[np.bool_], is_label: bool = False) -> None:
        """Refuse a missing cell of the label, or of a column whose values are required."""
        if is_label:
            self.refuse_any(absent, "is the label and missing; remove the row")
        elif self.column.required:
            self.refuse_any(absent, "is missing, and the schema requires it")

    def refuse_any(self, faults: NDArray[np.bool_], remedy: str, values: Any = None) -> None:
        """Refuse the first faulty cell, if there is one, with its value among `values`, or none for missing values."""
        if faults.any():
            row = int(faults.argmax())
            self._refuse(row, None if values is None else values[row].as_py(), remedy)

    def _refuse(self, row: int, value: object, remedy: str) -> Any:
        raise Refusal(f"{self.file}: column {self.column.name!r}, row {self.first_row + row}", value, remedy)


# --- the files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenTable:
    """Open table.

    Attributes:
      file: the table, for refusals.
      header: names of its columns as they are written.
      max_rows: a bound on its number of rows.
      first_row: number of its first row.
      comma: as of `Cells`.
      read: function of positions of columns; yields blocks, an Arrow array for each of these columns.
    """

    file: Path
    header: Sequence[str]
    max_rows: int
    first_row: int
    comma: str
    read: Callable[[Sequence[int]], Iterator[Sequence[Any]]]

    def blocks(self, columns: Sequence[Column], missing: tuple[str, ...]) -> Iterator[dict[str, Cells]]:
        """Yield the cells of these columns by name, block by block; `missing` are the schema's words for no value."""
        row = self.first_row
        every = {plain(column.name): column for column in chain(*(c.origin for c in columns), columns)}
        names_of = dict(zip(self.positions([*every.values()]), every, strict=True))
        for arrays in self.read([*names_of]):
            values = dict(zip(names_of.values(), arrays, strict=True))
            yield {c.name: self._cells(c, values, missing, row) for c in columns}
            row += len(arrays[0])

    def _cells(self, column: Column, values: Mapping[str, Any], missing: tuple[str, ...], row: int) -> Cells:
        """Return the cells of a column in a block that begins with a row, among the values of columns by name."""
        origin = tuple(self._cells(replace(c, since=None), values, missing, row) for c in column.origin)
        return Cells(values[plain(column.name)], column, missing, self.file, self.comma, row, origin)

    def positions(self, columns: Sequence[Column]) -> list[int]:
        """Return the position of each column; refuse one that is missing or occurs twice."""
        header = [plain(name) for name in self.header]
        counts, positions = Counter(header), {name: position for position, name in enumerate(header)}
        for column in columns:
            if (count := counts[plain(column.name)]) != 1:
                remedy = f"is missing; {nearest(column.name, self.header)}"
                if count:
                    remedy = "occurs twice; rename one"
                raise Refusal(f"{self.file}: column", column.name, remedy)
        return [positions[plain(column.name)] for column in columns]


@contextmanager
def open_table(
    file: Path, encoding: str | None = None, partition: Sequence[str] = ()
) -> Generator[OpenTable]:
    """Open a table; refuse one of another format, that cannot be parsed, or changes while it is read.

    Args:
      file: the table.
      encoding: as of `Files`.
      partition: folders `key=value` on the way to it, which are columns of one word.
    """
    require_extra("tables", f"the table {file.name}")
    pa = import_module("pyarrow")
    version = attrgetter("st_ino", "st_size", "st_mtime_ns")
    if not file.is_file():
        raise Refusal("table", str(file), "does not exist; name a file, or a folder of them")
    opener = _opener(file)
    try:
        before = version(file.stat())
        table = opener(file, encoding)
        if partition:
            table = extension("tables", "partition", "table", str(file))(table, partition)
        yield table
        after = version(file.stat())
    except OSError as error:
        raise Refusal("table", str(file), f"cannot be read ({error.strerror or error})") from None
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        fault = str(error).splitlines()[0].removeprefix("CSV parse error: ")
        if "UTF8" in fault or isinstance(error, UnicodeDecodeError):
            name = getattr(error, "encoding", "utf-8").upper()
            fault = f"it is not {name}; save it as UTF-8, or name its encoding: task.encoding=cp1252 or --encoding cp1252"
        raise Refusal("table", str(file), fault[:200]) from None
    if before != after:
        raise Refusal("table", str(file), "changed while it was read; repeat when no process writes to it")


def _opener(file: Path) -> Callable[[Path, str | None], OpenTable]:
    """Return the function that opens files of a suffix; refuse one that has none."""
    suffix = file.suffix.lower()
    if suffix in TEXTS:
        return _csv
    if suffix not in names(OTHERS):
        raise Refusal("table", str(file), f"is not a table by its suffix; use one of {', '.join(suffixes())}")
    return extension(OTHERS, suffix, "table", str(file))


def _csv(file: Path, encoding: str | None) -> OpenTable:
    """Open a CSV file."""
    return text_table(file, partial(import_module("pyarrow").OSFile, str(file)), encoding)


def text_table(file: Path, opened: Callable[[], Any], encoding: str | None) -> OpenTable:
    """Return the table of a CSV file whose separator is the one that splits the header into most columns.

    Args:
      file: name of the table, for refusals.
      opened: function that opens the content as an Arrow file; it is called for each pass, the first of which counts lines.
      encoding: as of `Files`.
    """
    reader, pa = import_module("pyarrow.csv"), import_module("pyarrow")
    encoding = _encoding_of(opened, encoding)
    with io.BufferedReader(_as_utf8(opened, encoding)) as content:
        first = content.readline().decode("utf-8-sig").rstrip("\r\n")
        if not first.strip():
            raise Refusal("table", str(file), "is empty; its first line must name the columns")
        size = lines = 0
        for block in iter(partial(content.read, COUNTED_BYTES), b""):
            size, lines = size + len(block), lines + block.count(b"\n")
    separator = max(COMMAS, key=lambda candidate: len(_split(first, candidate)))
    header = _split(first, separator)
    if (longest := max(map(len, header))) > LONGEST_NAME:
        remedy = f"its first line has a name of {longest} characters; it must name the columns"
        raise Refusal("table", str(file), remedy)
    positions_as_names = [str(position) for position in range(len(header))]
    block_bytes = max(BLOCK_BYTES, BLOCK_LINES * size // (lines + 1))

    def read(positions: Sequence[int]) -> Iterator[Sequence[Any]]:
        with (
            _as_utf8(opened, encoding) as stream,
            reader.open_csv(
                stream,
                reader.ReadOptions(
                    use_threads=False, block_size=block_bytes, skip_rows=1, column_names=positions_as_names
                ),
                reader.ParseOptions(delimiter=separator, newlines_in_values=True),
                reader.ConvertOptions(
                    include_columns=[positions_as_names[position] for position in positions],
                    column_types=dict.fromkeys(positions_as_names, pa.string()),
                ),
            ) as batches,
        ):
            yield from (batch.columns for batch in batches)

    return OpenTable(file, header, max_rows=lines + 1, first_row=2, comma=COMMAS[separator], read=read)


def _encoding_of(opened: Callable[[], Any], encoding: str | None) -> str:
    """Return the encoding of a content by its mark, if none is declared; refuse an unknown one."""
    if encoding is None:
        with opened() as content:
            marked = content.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        return "utf-16" if marked else "utf-8"
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        remedy = "is no encoding that Python knows; use one such as utf-8, cp1252 or latin-1"
        raise Refusal("task.encoding", encoding, remedy) from None


def _as_utf8(opened: Callable[[], Any], encoding: str) -> Any:
    """Return the opened content in UTF-8, which Arrow reads in blocks."""
    if encoding.startswith("utf-8"):
        return opened()
    return import_module("pyarrow").transcoding_input_stream(opened(), encoding, "utf-8")


def _split(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator))
    except csv.Error:  # a cell that is longer than any name: it is not the separator
        return [line]


def rows_of_block(columns: int) -> int:
    """Return the number of rows that are read at once of so many columns."""
    return max(1, min(BLOCK_ROWS, BLOCK_CELLS // max(1, columns)))


def arrow_table(name: Path, table: Any) -> OpenTable:
    """Return the table of a `pyarrow.Table`; `name` is for refusals."""
    batches = (batch.columns for batch in table.to_batches(max_chunksize=BLOCK_ROWS))

    def read(positions: Sequence[int]) -> Iterator[Sequence[Any]]:
        return ([columns[position] for position in positions] for columns in batches)

    return OpenTable(name, table.column_names, table.num_rows, first_row=1, comma="", read=read)


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first few names in one text."""
    return separator.join([*names[:MAX_NAMES], *(["..."] if len(names) > MAX_NAMES else [])])
