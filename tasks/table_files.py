"""Reader of tables, CSV or Parquet: rows become float32 inputs of one schema, and mistakes name file, column and row.

A row's number is a spreadsheet's: the header of a CSV file is row 1. Files are read in blocks, column by column, so
that a table takes the memory of its float32 matrix and of one block.
"""

from __future__ import annotations

import csv
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.extras import require_extra
from ..base.refusal import Refusal
from ..configs.strict import nearest
from .table_schema import Column, Schema, plain

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")
# Files that may hold a client's rows and are not read, by suffix; they are refused, so that no client is left out silently.
UNREAD = {
    suffix: fault
    for fault, suffixes in (
        ("is a spreadsheet, which is not read; save it as CSV", ".xlsx .xls .xlsm .ods"),
        ("is packed, which is not read; unpack it", ".gz .zip .bz2 .xz .zst .7z .tgz"),
        ("is not read; save it as Parquet or CSV", ".feather .arrow .sav .dta .sas7bdat"),
    )
    for suffix in suffixes.split()
}
SEPARATORS = (",", ";", "\t", "|")
BLOCK_BYTES = 8 << 20  # of a CSV file
BLOCK_ROWS = 1 << 17  # of a Parquet file
NUMBER = r"^-?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][-+]?[0-9]+)?$"
CODE = re.compile(NUMBER)  # a number that stands for a missing value
DECIMAL_COMMA = "a decimal comma goes with semicolons between the columns, and no points between thousands"
NO_NUMBER = {  # remedy for a word in a column of numbers, by the first pattern with which the word begins
    r"\d{4}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d\d": "write a date as an age or a number of days, or leave the column out of "
    "the schema",
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


def table_files(path: Path) -> list[Path]:
    """Return the tables of one client: the file itself, or the files of its folder by name; refuse if there is none."""
    if path.is_file():
        return [path]
    tables = sorted(filter(_is_table, path.glob("*"))) if path.is_dir() else []
    if not tables:
        fault = "holds no table" if path.exists() else "does not exist"
        remedy = f"{fault}; name a file ({', '.join(SUFFIXES)}) or a folder of them"
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
    clients = [p for p in paths if _is_table(p) or (p.is_dir() and any(map(_is_table, p.iterdir())))]
    return clients or table_files(folder)


def _is_table(path: Path) -> bool:
    """Return whether a file is a table by its suffix; refuse one that may hold rows and cannot be read."""
    suffix = path.suffix.lower()
    if path.name.startswith(".") or path.is_dir():
        return False
    if suffix in UNREAD and not path.name.startswith("~"):
        raise Refusal("table", str(path), f"{UNREAD[suffix]}, or move it away")
    if suffix in SUFFIXES and not path.is_file():
        remedy = "is no file, or a link that leads to none; put the table there, or move it away"
        raise Refusal("table", str(path), remedy)
    return suffix in SUFFIXES


def read_rows(path: Path, schema: Schema, labelled: bool = True) -> Rows:
    """Return the rows of a client's file, or of all files of its folder.

    Args:
      path: the file or the folder.
      schema: schema of the tables.
      labelled: whether the label's column is read.

    Raises:
      Refusal: a table has a mistake, named by file, column and row; has no rows; or changed while it was read.
    """
    columns = schema.columns if labelled else schema.inputs
    parts = list[Rows]()
    for file in table_files(path):
        with open_table(file) as table:
            parts.append(_read_table(table, schema, columns))
    if len(parts) == 1:
        return parts[0]
    inputs = np.concatenate([part.inputs for part in parts])
    targets = [part.targets for part in parts if part.targets is not None]
    return Rows(inputs, np.concatenate(targets) if targets else None)


def read_columns(path: Path, schema: Schema) -> dict[str, NDArray[Any]]:
    """Return the schema's columns of all rows of `read_rows` by name: numbers, NaN if missing, and words.

    A word is the first spelling of its category, or empty if it is missing. A word of no category remains as it is; a
    question counts it among the clipped values. Arguments as of `read_rows`.
    """

    def values_of(cells: Cells) -> NDArray[Any]:
        return cells.spelled() if cells.column.categories else cells.numbers()

    return _read_columns(path, (*schema.columns, *schema.groups), schema, values_of)


def read_persons(path: Path, column: str, schema: Schema) -> list[str]:
    """Return the person of each row from a column that is not in the schema; other arguments as of `read_rows`."""

    def persons_of(cells: Cells) -> NDArray[np.object_]:
        words, index = cells.words()
        names = ["" if word is None else plain(word) for word in words]
        absent = np.array([name in schema.missing for name in names])[index]
        remedy = "is missing, but identifies the person of the row; give each unknown person its own name"
        cells.refuse_any(absent, remedy)
        return np.array(names, dtype=object)[index]

    return _read_columns(path, [Column(column)], schema, persons_of)[column].tolist()


def read_groups(path: Path, columns: Sequence[Column], schema: Schema) -> dict[str, NDArray[np.int64]]:
    """Return by column the number of each row's category, -1 if it is missing; other arguments as of `read_rows`."""
    return _read_columns(path, columns, schema, Cells.codes)


def _read_columns(
    path: Path, columns: Sequence[Column], schema: Schema, read: Callable[[Cells], NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Return the results of a function of a column's cells in one block, by column, over all blocks of a client's files."""
    parts: dict[str, list[NDArray[Any]]] = {column.name: [] for column in columns}
    for file in table_files(path):
        with open_table(file) as table:
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
    batches = (batch.columns for batch in table.to_batches(max_chunksize=BLOCK_ROWS))

    def read(positions: Sequence[int]) -> Iterator[Sequence[Any]]:
        return ([columns[position] for position in positions] for columns in batches)

    opened = OpenTable(
        Path("data frame"),
        header=table.column_names,
        max_rows=table.num_rows,
        first_row=1,
        comma=False,
        read=read,
    )
    return _read_table(opened, schema, schema.inputs).inputs


def _read_table(table: OpenTable, schema: Schema, columns: Sequence[Column]) -> Rows:
    """Return the rows of a table; the label is read if it is among the columns."""
    outcome, labelled = schema.outcome, schema.target in columns
    inputs = np.empty((table.max_rows, schema.width), dtype=np.float32)
    targets = outcome.empty(table.max_rows)
    stop = 0
    for block in table.blocks(columns, schema.missing):
        start, stop = stop, stop + len(next(iter(block.values())).values)
        offset = 0
        for column in schema.inputs:
            block[column.name].encode(inputs[start:stop, offset : offset + column.width])
            offset += column.width
        if labelled:
            targets[start:stop] = outcome.targets(block)
    if not stop:
        raise Refusal("table", str(table.file), "has no rows; remove the client, or add data")
    return Rows(inputs[:stop], targets[:stop] if labelled else None)


# --- the cells of one block ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """Cells of one column in one block of a table.

    Attributes:
      values: an Arrow array, shape (n,).
      column: the column of the schema.
      missing: words that stand for a missing value in any column.
      file: the table, for refusals.
      comma: whether numbers are written with a decimal comma.
      first_row: number of the block's first row, for refusals.
    """

    values: Any
    column: Column
    missing: tuple[str, ...]
    file: Path
    comma: bool = False
    first_row: int = 2
    # The module pyarrow.compute, which is imported only when a table is read.
    _pc: Any = field(default_factory=lambda: import_module("pyarrow.compute"), repr=False)

    def encode(self, inputs: NDArray[np.float32]) -> None:
        """Write the column's inputs of the model, shape (n, column.width): one-hot, zeros for no value; or a number."""
        column = self.column
        if column.categories or column.edges:
            codes = self.codes() if column.categories else self.bins()
            if column.missing_input:
                codes = np.where(codes < 0, column.values, codes)
            inputs[:] = codes[:, None] == np.arange(column.width)
            return
        numbers = self.numbers()
        if column.missing_input:
            inputs[:, 1] = np.isnan(numbers)
        inputs[:, 0] = self._scaled(numbers, False)

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
        pa, pc = import_module("pyarrow"), self._pc
        cells, values = self._trimmed()
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
        if codes := [float(word) for word in (*self.missing, *self.column.absent) if CODE.fullmatch(word)]:
            numbers[np.isin(numbers, codes)] = math.nan
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
        _, values = self._trimmed()
        if not self._is_text(values):
            return []
        fits = self._pc.match_substring_regex(values, NUMBER)
        return values.filter(self._pc.invert(fits)).unique().to_pylist()

    def _trimmed(self) -> tuple[Any, Any]:
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
        return cells, pc.replace_substring(cells, ",", ".", max_replacements=1) if self.comma else cells

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
      comma: whether numbers are written with a decimal comma.
      read: function of positions of columns; yields blocks, an Arrow array for each of these columns.
    """

    file: Path
    header: Sequence[str]
    max_rows: int
    first_row: int
    comma: bool
    read: Callable[[Sequence[int]], Iterator[Sequence[Any]]]

    def blocks(self, columns: Sequence[Column], missing: tuple[str, ...]) -> Iterator[dict[str, Cells]]:
        """Yield the cells of these columns by name, block by block; `missing` are the schema's words for no value."""
        row = self.first_row
        for arrays in self.read(self.positions(columns)):
            pairs = zip(arrays, columns, strict=True)
            yield {c.name: Cells(values, c, missing, self.file, self.comma, row) for values, c in pairs}
            row += len(arrays[0])

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
def open_table(file: Path) -> Generator[OpenTable]:
    """Open a table; refuse one that is neither CSV nor Parquet, cannot be parsed, or changes while it is read."""
    require_extra("tables", f"the table {file.name}")
    pa, suffix = import_module("pyarrow"), file.suffix.lower()
    version = attrgetter("st_ino", "st_size", "st_mtime_ns")
    if not file.is_file():
        raise Refusal("table", str(file), "does not exist; name a file, or a folder of them")
    if suffix not in SUFFIXES:
        raise Refusal("table", str(file), f"is not a table by its suffix; use one of {', '.join(SUFFIXES)}")
    try:
        before = version(file.stat())
        yield _parquet(file) if suffix == ".parquet" else _csv(file)
        after = version(file.stat())
    except OSError as error:
        raise Refusal("table", str(file), f"cannot be read ({error.strerror or error})") from None
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        fault = str(error).splitlines()[0].removeprefix("CSV parse error: ")
        if "UTF8" in fault or isinstance(error, UnicodeDecodeError):
            fault = "it is not UTF-8; save it as UTF-8"
        raise Refusal("table", str(file), fault[:200]) from None
    if before != after:
        raise Refusal("table", str(file), "changed while it was read; repeat when no process writes to it")


def _csv(file: Path) -> OpenTable:
    """Open a CSV file whose separator is the one that splits the header into most columns."""
    reader: Any = import_module("pyarrow.csv")
    pa = import_module("pyarrow")
    with file.open("rb") as opened:
        first = opened.readline().decode("utf-8-sig").rstrip("\r\n")
        if not first.strip():
            raise Refusal("table", str(file), "is empty; its first line must name the columns")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            starts = range(0, len(content), BLOCK_BYTES)
            lines = sum(content[start : start + BLOCK_BYTES].count(b"\n") for start in starts)
    separator = max(SEPARATORS, key=lambda candidate: len(_split(first, candidate)))
    header = _split(first, separator)
    if (longest := max(map(len, header))) > LONGEST_NAME:
        remedy = f"its first line has a name of {longest} characters; it must name the columns"
        raise Refusal("table", str(file), remedy)
    names = [str(position) for position in range(len(header))]

    def read(positions: Sequence[int]) -> Iterator[Sequence[Any]]:
        with reader.open_csv(
            file,
            reader.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, skip_rows=1, column_names=names),
            reader.ParseOptions(delimiter=separator, newlines_in_values=True),
            reader.ConvertOptions(
                include_columns=[names[position] for position in positions],
                column_types=dict.fromkeys(names, pa.string()),
            ),
        ) as batches:
            yield from (batch.columns for batch in batches)

    return OpenTable(file, header, max_rows=lines + 1, first_row=2, comma=separator == ";", read=read)


def _split(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator))
    except csv.Error:  # a cell that is longer than any name: it is not the separator
        return [line]


def _parquet(file: Path) -> OpenTable:
    """Open a Parquet file."""
    opened: Any = import_module("pyarrow.parquet").ParquetFile(file)
    header: list[str] = opened.schema_arrow.names

    def read(positions: Sequence[int]) -> Iterator[Sequence[Any]]:
        names = [header[position] for position in positions]
        for batch in opened.iter_batches(batch_size=BLOCK_ROWS, columns=names):
            yield [batch.column(name) for name in names]

    return OpenTable(file, header, max_rows=opened.metadata.num_rows, first_row=1, comma=False, read=read)


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first few names in one text."""
    return separator.join([*names[:MAX_NAMES], *(["..."] if len(names) > MAX_NAMES else [])])
