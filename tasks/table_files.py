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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.extras import require_extra
from ..base.refusal import Refusal
from ..configs.strict import nearest
from .table_schema import Column, Schema, plain, with_label

TEXTS = (".csv", ".tsv", ".txt")
SUFFIXES = (*TEXTS, ".parquet")
# Files that may hold a client's rows and are not read, by suffix: a client may not be left out in silence.
UNREAD = {
    suffix: why
    for why, suffixes in (
        ("is a spreadsheet, which is not read; save it as CSV", ".xlsx .xls .xlsm .ods"),
        ("is packed, which is not read; unpack it", ".gz .zip .bz2 .xz .zst .7z .tgz"),
        ("is not read; save it as Parquet or CSV", ".feather .arrow .sav .dta .sas7bdat"),
    )
    for suffix in suffixes.split()
}
SEPARATORS = (",", ";", "\t", "|")
BLOCK_BYTES = 8 << 20  # of a CSV file
BLOCK_ROWS = 1 << 17  # of a Parquet file
DECIMAL_COMMA = "a decimal comma goes with semicolons between the columns, and no points between thousands"
NUMBER = r"^-?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][-+]?[0-9]+)?$"
CODE = re.compile(NUMBER)  # a number that stands for a missing value
# Numbers as people write them, such as 1.133,5 and 10 %, and dates: as categories each would be an input of its own.
WRITTEN = re.compile(r"-?\d[\d.,' ]*%?|\d{4}-\d\d-\d\d.*|\d\d?[./]\d\d?[./]\d{2,4}.*")
LONGEST_NAME = 2000  # characters of a column's name
LONGEST_WORD = 200  # characters of a category; what is longer is a text
MOST_CATEGORIES = 50  # words of a column that a draft takes for categories; of more it is a name or a text
MOST_TOLD = 6  # of names in a sentence
MOST_MISSING = 3  # words of a column of numbers that a draft takes for missing values
LEAST_NUMBERS = 10  # different numbers that such a column has; of fewer they are categories
CODES = (-9.0, -99.0, -999.0, -9999.0, 999.0, 9999.0, 99999.0)  # numbers that often stand for a missing one
MOST_CLASSES = 10  # whole numbers of a label that are taken for classes; more are a quantity
DRAFT_COMMAND = "fedveil new draft --from csv {} writes a first draft"

Columns = Mapping[str, Any]  # a block: one Arrow array a column, by the schema's name


@dataclass(frozen=True)
class Rows:
    """Rows of a table as a model takes them.

    Attributes:
      inputs: shape (n, schema.width), float32, between -1 and 1.
      targets: shape (n,): int64 classes, or float32 numbers between -1 and 1; None where no label was read.
    """

    inputs: NDArray[np.float32]
    targets: NDArray[Any] | None


def table_files(path: Path) -> list[Path]:
    """Return the tables of one client: the file itself, or the files of its folder by name.

    Raises:
      Refusal: there is none.
    """
    if path.is_file():
        return [path]
    found = sorted(each for each in path.glob("*") if _is_table(each)) if path.is_dir() else []
    if not found:
        fault = "holds no table" if path.exists() else "does not exist"
        raise Refusal(
            "task.folder", str(path), f"{fault}; name a file ({', '.join(SUFFIXES)}) or a folder of them"
        )
    return found


def clients_of(folder: Path, beside: Sequence[Path] = ()) -> list[Path]:
    """Return one path a client: the tables and the folders with tables in `folder`, by name; or the file itself.

    Args:
      folder: of all clients.
      beside: files that are no client's, such as the public one.

    Raises:
      Refusal: there is no table.
    """
    if folder.is_file():
        return [folder]
    others = set(map(os.path.realpath, beside))  # Path.resolve raises where links form a loop
    found = [each for each in sorted(folder.glob("[!.]*")) if os.path.realpath(each) not in others]
    clients = [
        each for each in found if _is_table(each) or (each.is_dir() and any(map(_is_table, each.iterdir())))
    ]
    return clients or table_files(folder)


def _is_table(path: Path) -> bool:
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
      path: of the file or the folder.
      schema: what the columns hold.
      labelled: whether the label's column is read.

    Raises:
      Refusal: a mistake in a table, by file, column and row; it has no rows; or it changed while it was read.
    """
    wanted = schema.columns if labelled else schema.inputs
    parts = [_read_file(file, schema, wanted, labelled) for file in table_files(path)]
    if len(parts) == 1:
        return parts[0]
    inputs = np.concatenate([part.inputs for part in parts])
    targets = (
        np.concatenate([part.targets for part in parts if part.targets is not None]) if labelled else None
    )
    return Rows(inputs, targets)


def read_columns(path: Path, schema: Schema) -> dict[str, NDArray[Any]]:
    """Return the columns of a client's file, or of all files of its folder: numbers, NaN where missing, and words.

    A word is the first spelling of its category, empty where it is missing, and as it stands where it is none: a question
    counts it nowhere and tells it as clipped.

    Arguments as of `read_rows`.

    Raises:
      Refusal: as of `read_rows`.
    """

    def told(cells: CellReader, values: Any, column: Column) -> NDArray[Any]:
        return cells.spelled(values, column) if column.categories else cells.numbers(values, column)

    return _read_each(path, (*schema.columns, *schema.groups), schema, told)


def read_persons(path: Path, column: str, schema: Schema) -> list[str]:
    """Return whose each row of a client's file is, or of all files of its folder, in the order of `read_rows`.

    Args:
      path: of the file or the folder.
      column: that names persons; it is no column of the schema.
      schema: says how a missing value is written.

    Raises:
      Refusal: there is no such column, or a cell of it is missing.
    """

    def named(cells: CellReader, values: Any, wanted: Column) -> NDArray[np.object_]:
        words, places = cells.words(values)
        names = ["" if word is None else plain(word) for word in words]
        absent = np.array([name in schema.missing for name in names])[places]
        if absent.any():
            why = "is missing, but identifies the person of the row; give each unknown person its own name"
            cells.refuse(wanted, int(absent.argmax()), None, why)
        return np.array(names, dtype=object)[places]

    return _read_each(path, [Column(column)], schema, named)[column].tolist()


def read_groups(path: Path, columns: Sequence[Column], schema: Schema) -> dict[str, NDArray[np.int64]]:
    """Return the group of each row of a client's file, or of all files of its folder, in the order of `read_rows`.

    Args:
      path: of the file or the folder.
      columns: whose categories are the groups.
      schema: says how a missing value is written.

    Returns:
      By column, the number of each row's category, shape (n,), -1 where it is missing.

    Raises:
      Refusal: there is no such column, or a word of it is none of its categories.
    """
    return _read_each(path, columns, schema, CellReader.codes)


def _read_each(
    path: Path,
    columns: Sequence[Column],
    schema: Schema,
    read: Callable[[CellReader, Any, Column], NDArray[Any]],
) -> dict[str, NDArray[Any]]:
    """Return what is read of each column, by its name, over all blocks of a client's files."""
    found: dict[str, list[NDArray[Any]]] = {column.name: [] for column in columns}
    for file in table_files(path):
        with _unchanged(file), _table(file) as table:
            first = table.first_row
            for block in table.blocks(table.find(columns)):
                cells = CellReader(file, schema.missing, table.comma, first)
                for column in columns:
                    found[column.name].append(read(cells, block[column.name], column))
                first += len(next(iter(block.values())))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def frame_inputs(frame: object, schema: Schema) -> NDArray[np.float32]:
    """Return the inputs of a data frame's rows, as of `Rows`.

    Args:
      frame: of pandas, or what else `pyarrow.table` takes.
      schema: what the columns hold.

    Raises:
      Refusal: it is no frame, or a mistake in it, by column and row.
    """
    require_extra("tables", "a data frame")
    pa: Any = import_module("pyarrow")
    try:
        table = pa.table(frame)
    except (pa.ArrowException, TypeError, ValueError) as error:
        remedy = f"is not a data frame ({str(error).splitlines()[0]})"
        raise Refusal("data", type(frame).__name__, remedy) from None
    batches = (batch.columns for batch in table.to_batches(max_chunksize=BLOCK_ROWS))

    def read(places: Sequence[int]) -> Iterator[Sequence[Any]]:
        return ([columns[place] for place in places] for columns in batches)

    opened = OpenTable(Path("data frame"), table.column_names, table.num_rows, 1, False, read)
    return _read_table(opened, schema, schema.inputs, labelled=False).inputs


def _read_file(file: Path, schema: Schema, wanted: Sequence[Column], labelled: bool) -> Rows:
    with _unchanged(file), _table(file) as table:
        return _read_table(table, schema, wanted, labelled)


def _read_table(table: OpenTable, schema: Schema, wanted: Sequence[Column], labelled: bool) -> Rows:
    inputs = np.empty((table.most_rows, schema.width), dtype=np.float32)
    targets: NDArray[Any] = np.empty(
        table.most_rows, dtype=np.int64 if schema.target.categories else np.float32
    )
    done = 0
    for block in table.blocks(table.find(wanted)):
        cells = CellReader(table.file, schema.missing, table.comma, done + table.first_row)
        here = slice(done, done + len(next(iter(block.values()))))
        _fill(inputs[here], cells, block, schema.inputs)
        if labelled:
            read = cells.codes if schema.target.categories else cells.scaled
            targets[here] = read(block[schema.target.name], schema.target, True)
        done = here.stop
    if not done:
        raise Refusal("table", str(table.file), "has no rows; remove the client, or add data")
    return Rows(inputs[:done], targets[:done] if labelled else None)


def _fill(inputs: NDArray[np.float32], cells: CellReader, block: Columns, columns: Sequence[Column]) -> None:
    start = 0
    for column in columns:
        if column.categories:
            codes = cells.codes(block[column.name], column)
            inputs[:, start : start + column.width] = codes[:, None] == np.arange(column.width)
        elif column.edges:
            bins = cells.bins(block[column.name], column)
            inputs[:, start : start + column.width] = bins[:, None] == np.arange(column.width)
        else:
            inputs[:, start] = cells.scaled(block[column.name], column)
        start += column.width


@contextmanager
def _unchanged(file: Path) -> Generator[None]:
    """Refuse a file that is written to while it is read."""
    told = attrgetter("st_ino", "st_size", "st_mtime_ns")
    try:
        before = told(file.stat())
        yield
        after = told(file.stat())
    except OSError as error:
        raise Refusal("table", str(file), f"cannot be read ({error.strerror or error})") from None
    if before != after:
        raise Refusal("table", str(file), "changed while it was read; repeat when no process writes to it")


# --- the cells of one block ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellReader:
    """Reader of the cells of one block of a file.

    Attributes:
      file: for refusals.
      missing: words that stand for a missing value.
      comma: whether numbers are written with a decimal comma.
      first_row: number of the block's first row.
    """

    file: Path
    missing: tuple[str, ...]
    comma: bool = False
    first_row: int = 2
    _pc: Any = field(default_factory=lambda: import_module("pyarrow.compute"), repr=False)

    def scaled(self, values: Any, column: Column, is_label: bool = False) -> NDArray[np.float64]:
        """Return scaled numbers, shape (n,): the column's bounds become -1 and 1, unless it has a mean and a deviation.

        Args:
          values: the cells, an Arrow array.
          column: with the bounds.
          is_label: whether none may be missing.

        Raises:
          Refusal: a cell is no finite number, or is missing where it must not be.
        """
        numbers = self.numbers(values, column)
        absent = np.isnan(numbers)
        self._present_all(absent, column, is_label)
        middle, half = column.scale
        numbers[absent] = middle if column.missing is None else column.missing
        low, high = (column.low - middle) / half, (column.high - middle) / half
        ends = (-1.0, 1.0) if column.standard is None else (low, high)
        return np.clip((numbers - middle) / half, *ends, out=numbers)

    def bins(self, values: Any, column: Column) -> NDArray[np.int64]:
        """Return the bin of each number, shape (n,), -1 where it is missing and nothing stands in for it.

        Args:
          values: the cells, an Arrow array.
          column: with the edges; a number on an edge is in the bin above it.

        Raises:
          Refusal: as `scaled` does.
        """
        numbers = self.numbers(values, column)
        absent = np.isnan(numbers)
        self._present_all(absent, column, is_label=False)
        if column.missing is not None:
            numbers[absent], absent = column.missing, np.zeros_like(absent)
        return np.where(absent, -1, np.searchsorted(column.edges, numbers, side="right"))

    def _present_all(self, absent: NDArray[np.bool_], column: Column, is_label: bool) -> None:
        if (is_label or column.required) and absent.any():
            why = "is missing, and the schema requires it"
            if is_label:
                why = "is the label and missing; remove the row"
            self.refuse(column, int(absent.argmax()), None, why)

    def numbers(self, values: Any, column: Column) -> NDArray[np.float64]:
        """Return numbers, shape (n,), NaN where one is missing; values and refusals as of `scaled`."""
        pa, pc = import_module("pyarrow"), self._pc
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        if text:
            values = self._present(values, column)
        written = values
        if text and self.comma:
            values = pc.replace_substring(values, ",", ".", max_replacements=1)
        try:
            numbers = np.array(pc.fill_null(pc.cast(values, pa.float64(), safe=False), math.nan))
        except pa.ArrowInvalid:
            fits = np.asarray(pc.fill_null(pc.match_substring_regex(values, NUMBER), True))
            row = int((~fits).argmax())
            word = written[row].as_py()
            remedy = DECIMAL_COMMA if "," in str(word) else "correct it, or add it to missing:"
            if re.match(r"\d{4}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d\d", str(word)):
                remedy = "write a date as an age or a number of days, or leave the column out of the schema"
            return self.refuse(column, row, word, f"is not a number; {remedy}")
        except (pa.ArrowNotImplementedError, NotImplementedError):
            return self.refuse(column, 0, str(values.type), "has a type that is neither number nor text")
        if codes := [float(each) for each in (*self.missing, *column.absent) if CODE.fullmatch(each)]:
            numbers[np.isin(numbers, codes)] = math.nan
        infinite = np.isinf(numbers)
        if infinite.any():
            row = int(infinite.argmax())
            self.refuse(
                column, row, values[row].as_py(), "is not finite; correct it, or leave the cell empty"
            )
        return numbers

    def codes(self, values: Any, column: Column, is_label: bool = False) -> NDArray[np.int64]:
        """Return the number of each cell's category, shape (n,), -1 where it is missing.

        Args:
          values: the cells, an Arrow array.
          column: with the categories.
          is_label: whether none may be missing.

        Raises:
          Refusal: a word is none of the categories, or is missing where it must not be.
        """
        words, places = self.words(values)
        known = {**dict.fromkeys((*self.missing, *column.absent), -1), **column.codes}
        table = np.array(
            [-1 if word is None else known.get(plain(word), -2) for word in words], dtype=np.int64
        )
        codes = table[places] if len(table) else np.full(len(places), -1, dtype=np.int64)
        if (codes == -2).any():
            row = int((codes == -2).argmax())
            remedy = (
                f"is not one of its categories ({_some(column.words)}); correct it, or add it to the schema"
            )
            self.refuse(column, row, words[places[row]], remedy)
        self._present_all(codes < 0, column, is_label)
        return codes

    def spelled(self, values: Any, column: Column) -> NDArray[np.str_]:
        """Return each cell's word, shape (n,): the first spelling of its category, or as it stands; empty where it is missing.

        Arguments as of `codes`.
        """
        words, places = self.words(values)
        missing = {*self.missing, *column.absent}
        known = {spelling: column.words[code] for spelling, code in column.codes.items()}
        told = [
            "" if word is None or plain(word) in missing else known.get(plain(word), word) for word in words
        ]
        return np.array(told, dtype=np.str_)[places]

    def words(self, values: Any) -> tuple[list[str | None], NDArray[np.int64]]:
        """Return the different words of the cells, and the place of each cell's own among them, shape (n,)."""
        pa, pc = import_module("pyarrow"), self._pc
        encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
        words: list[str | None] = [
            None if each is None else str(each) for each in encoded.dictionary.to_pylist()
        ]
        places = np.asarray(pc.fill_null(encoded.indices, len(words)), dtype=np.int64)
        return [*words, None], places

    def _present(self, values: Any, column: Column) -> Any:
        """Return text without outer spaces, null where it stands for a missing value."""
        pa, pc = import_module("pyarrow"), self._pc
        values = pc.utf8_trim_whitespace(values)
        words = pa.array((*self.missing, *column.absent), type=values.type)
        absent = pc.is_in(pc.utf8_lower(values), value_set=words)
        return pc.if_else(absent, pa.scalar(None, type=values.type), values)

    def refuse(self, column: Column, row: int, value: object, remedy: str) -> Any:
        """Refuse a cell.

        Args:
          column: in which it stands.
          row: its place in the block, from 0.
          value: what it holds.
          remedy: what to do.
        """
        raise Refusal(f"{self.file}: column {column.name!r}, row {self.first_row + row}", value, remedy)


# --- the files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenTable:
    """Table that is open.

    Attributes:
      file: for refusals.
      header: names of its columns as it has them.
      most_rows: a bound on its number of rows.
      first_row: number of its first row.
      comma: whether numbers are written with a decimal comma.
      read: yields blocks: Arrow arrays by the places of the columns that are asked for.
    """

    file: Path
    header: Sequence[str]
    most_rows: int
    first_row: int
    comma: bool
    read: Callable[[Sequence[int]], Iterator[Sequence[Any]]]

    def find(self, wanted: Sequence[Column]) -> dict[str, int]:
        """Return the place of each column by its name in the schema.

        Raises:
          Refusal: one is not there, or stands twice.
        """
        header = [plain(each) for each in self.header]
        counts, places = Counter(header), {name: place for place, name in enumerate(header)}
        for column in wanted:
            times = counts[plain(column.name)]
            if times != 1:
                remedy = (
                    "occurs twice; rename one"
                    if times
                    else f"is missing; {nearest(column.name, self.header)}"
                )
                raise Refusal(f"{self.file}: column", column.name, remedy)
        return {column.name: places[plain(column.name)] for column in wanted}

    def blocks(self, places: Mapping[str, int]) -> Iterator[Columns]:
        """Yield the columns at these places, block by block, by their names."""
        for arrays in self.read(list(places.values())):
            yield dict(zip(places, arrays, strict=True))


@contextmanager
def _table(file: Path) -> Generator[OpenTable]:
    """Open a table; refuse one that is neither CSV nor Parquet, and what the parser finds while it is read."""
    require_extra("tables", f"the table {file.name}")
    pa = import_module("pyarrow")
    if not file.is_file():
        raise Refusal("table", str(file), "does not exist; name a file, or a folder of them")
    if file.suffix.lower() not in SUFFIXES:
        raise Refusal("table", str(file), f"is not a table by its suffix; use one of {', '.join(SUFFIXES)}")
    try:
        yield _parquet(file) if file.suffix.lower() == ".parquet" else _csv(file)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        said = str(error).splitlines()[0].removeprefix("CSV parse error: ")
        if "UTF8" in said or isinstance(error, UnicodeDecodeError):
            said = "it is not UTF-8; save it as UTF-8"
        raise Refusal("table", str(file), said[:200]) from None


def _csv(file: Path) -> OpenTable:
    reader: Any = import_module("pyarrow.csv")
    pa = import_module("pyarrow")
    with file.open("rb") as opened:
        first = opened.readline().decode("utf-8-sig").rstrip("\r\n")
        if not first.strip():
            raise Refusal("table", str(file), "is empty; its first line must name the columns")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            lines = sum(
                content[at : at + BLOCK_BYTES].count(b"\n") for at in range(0, len(content), BLOCK_BYTES)
            )
    separator = max(SEPARATORS, key=lambda each: len(_split(first, each)))
    header = _split(first, separator)
    if (longest := max(map(len, header))) > LONGEST_NAME:
        remedy = f"its first line has a name of {longest} characters; it must name the columns"
        raise Refusal("table", str(file), remedy)
    places = [str(place) for place in range(len(header))]

    def read(wanted: Sequence[int]) -> Iterator[Sequence[Any]]:
        with reader.open_csv(
            file,
            read_options=reader.ReadOptions(
                use_threads=False, block_size=BLOCK_BYTES, skip_rows=1, column_names=places
            ),
            parse_options=reader.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=reader.ConvertOptions(
                include_columns=[places[each] for each in wanted],
                column_types=dict.fromkeys(places, pa.string()),
            ),
        ) as batches:
            yield from (batch.columns for batch in batches)

    return OpenTable(file, header, lines + 1, 2, separator == ";", read)


def _split(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator))
    except csv.Error:  # a cell that is longer than any name, so that this does not separate
        return [line]


def _parquet(file: Path) -> OpenTable:
    opened: Any = import_module("pyarrow.parquet").ParquetFile(file)
    header: list[str] = opened.schema_arrow.names

    def read(wanted: Sequence[int]) -> Iterator[Sequence[Any]]:
        names = [header[each] for each in wanted]
        for batch in opened.iter_batches(batch_size=BLOCK_ROWS, columns=names):
            yield [batch.column(name) for name in names]

    return OpenTable(file, header, opened.metadata.num_rows, 1, False, read)


# --- a schema of data that may be looked at -----------------------------------------------------------------------


@dataclass
class _Seen:
    """What was seen of a column so far."""

    low: float = math.inf
    high: float = -math.inf
    whole: bool = True
    spellings: dict[str, str] = field(default_factory=dict[str, str])
    files: set[Path] = field(default_factory=set[Path])
    numeric: bool = True
    others: set[str] = field(default_factory=set[str])
    codes: set[float] = field(default_factory=set[float])
    words: dict[Path, set[str]] = field(default_factory=dict[Path, set[str]])

    def absent(self) -> tuple[str, ...]:
        """Return what seems to stand for a missing value: words among numbers, and codes far from all others."""
        width = self.high - self.low
        if not 0 < width < math.inf:
            return tuple(sorted(self.others))
        odd = [each for each in sorted(self.codes) if (each < 0 <= self.low) or abs(each) - self.high > width]
        return (*sorted(self.others), *(f"{each:g}" for each in odd))


@dataclass(frozen=True)
class OtherWords:
    """Sets of words of one column that have no word in common: perhaps spellings of the same categories.

    Attributes:
      column: with all words as categories.
      of: each set, with the files that use it.
      guess: the column if they are spellings, by their initials or else their order; None where their numbers differ.
    """

    column: Column
    of: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    guess: Column | None

    @property
    def doubtful(self) -> bool:
        """Whether two of the sets have several words, so that each may be all categories."""
        return sum(len(words) > 1 for _, words in self.of) > 1

    def __str__(self) -> str:
        return _some([f"{_some(files)}: {_some(words)}" for files, words in self.of], "; ")


def _some(names: Sequence[str], between: str = ", ") -> str:
    return between.join([*names[:MOST_TOLD], *(["..."] if len(names) > MOST_TOLD else [])])


def draft_schema(
    paths: Sequence[Path], label: str | None = None
) -> tuple[Schema, dict[str, str], dict[str, OtherWords]]:
    """Return a schema of what the tables hold, why columns were left out, and columns with other words in other files.

    All of it tells of the rows.

    Args:
      paths: files, or folders of clients' files.
      label: of the column that is predicted; None takes the last one.

    Raises:
      Refusal: a table cannot be read, its columns cannot be told from each other, or the last ones differ and no label
        is given.
    """
    files = [file for path in paths for client in clients_of(path) for file in table_files(client)]
    seen: dict[str, _Seen] = {}
    names: dict[str, str] = {}
    ends: dict[str, str] = {}
    for file in files:
        with _unchanged(file), _table(file) as table:
            columns = [
                Column(name) for name in table.header if name.strip()
            ]  # others count the rows, or hold nothing
            for column in columns:
                names.setdefault(plain(column.name), column.name.strip())
            if not columns:
                raise Refusal("table", str(file), "its first line must name the columns")
            ends.setdefault(plain(columns[-1].name), file.name)
            for block in table.blocks(table.find(columns)):
                cells = CellReader(file, Schema((), "").missing, table.comma)
                for column in columns:
                    _look(
                        seen.setdefault(plain(column.name), _Seen()), cells, block[column.name], column, file
                    )
    if label is None and len(ends) > 1:
        last = ", ".join(f"{names[each]!r} in {file}" for each, file in ends.items())
        raise Refusal("task.label", None, f"the tables end with different columns ({last}); name the label")
    chosen = plain(label) if label is not None else next(iter(ends), "")
    kept, left_out = list[Column](), dict[str, str]()
    for key, each in seen.items():
        why = _unfit(each, files)
        if why is None:
            kept.append(_drafted(names[key], each, key == chosen))
        else:
            left_out[names[key]] = why
    where = str(paths[0]) if len(paths) == 1 else f"{len(files)} tables"
    if chosen in {plain(each) for each in left_out}:
        raise Refusal("task.label", names[chosen], f"cannot be predicted: {left_out[names[chosen]]}")
    schema = with_label(Schema(tuple(kept), ""), names.get(chosen, label), where)
    found = {each.name: _other_words(each, seen[plain(each.name)]) for each in kept if each.categories}
    return schema, left_out, {name: each for name, each in found.items() if len(each.of) > 1}


def _other_words(column: Column, seen: _Seen) -> OtherWords:
    """Return the sets of a column's words; files that share a word have one set."""
    sets = list[tuple[set[str], set[str]]]()
    folder = os.path.commonpath([file.parent for file in seen.words])
    for path, words in seen.words.items():
        file = os.path.relpath(path, folder)
        joined = [each for each in sets if each[1] & words]
        sets = [each for each in sets if not each[1] & words]
        sets.append(({file}.union(*(each[0] for each in joined)), words.union(*(each[1] for each in joined))))
    of = [
        (tuple(sorted(files)), tuple(word for word in column.words if plain(word) in words))
        for files, words in sets
    ]
    if len({len(words) for _, words in of}) > 1:
        return OtherWords(column, tuple(of), None)
    spelled_out = max((words for _, words in of), key=lambda words: sum(map(len, words)))
    ranked = [words if words is spelled_out else _in_order_of(spelled_out, words) for _, words in of]
    ranked.sort(key=lambda words: words is not spelled_out)
    return OtherWords(column, tuple(of), replace(column, categories=tuple(zip(*ranked, strict=True))))


def _in_order_of(words: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Return other words in the order of these: by their initials if each has its own, else as they are."""
    by_initial = {plain(each)[0]: each for each in others}
    initials = [plain(each)[0] for each in words]
    own = len(by_initial) == len(others) and set(initials) == set(by_initial)
    return tuple(map(by_initial.__getitem__, initials)) if own else tuple(others)


def _look(seen: _Seen, cells: CellReader, values: Any, column: Column, file: Path) -> None:
    seen.files.add(file)
    words, _ = cells.words(values)
    for word in words if len(seen.spellings) <= MOST_CATEGORIES else ():
        if word is not None and plain(word) not in cells.missing:
            seen.spellings.setdefault(plain(word), " ".join(word.split()))
            seen.words.setdefault(file, set()).add(plain(word))
    numbers = _numbers(seen, cells, values, column, words) if seen.numeric else None
    if numbers is None:
        seen.numeric = False
        return
    present = numbers[~np.isnan(numbers)]
    coded = np.isin(present, CODES)
    seen.codes |= set(present[coded].tolist())
    if len(rest := present[~coded]):
        seen.low, seen.high = min(seen.low, float(rest.min())), max(seen.high, float(rest.max()))
        seen.whole = seen.whole and bool((rest == np.floor(rest)).all())


def _numbers(
    seen: _Seen, cells: CellReader, values: Any, column: Column, words: Sequence[str | None]
) -> NDArray[np.float64] | None:
    """Return the numbers of a column, in which a few words stand for missing ones; None where it holds words."""
    for _ in range(2):
        try:
            return cells.numbers(values, replace(column, absent=tuple(seen.others)))
        except Refusal:
            texts = [
                plain(word.replace(",", ".") if cells.comma else word) for word in words if word is not None
            ]
            seen.others |= {each for each in texts if not CODE.fullmatch(each) and each not in cells.missing}
            if len(seen.others) > MOST_MISSING:
                return None
    return None


def _unfit(seen: _Seen, files: Sequence[Path]) -> str | None:
    lacking = [file for file in files if file not in seen.files]
    if lacking:
        return f"{lacking[0].name} has no such column"
    if not seen.spellings:
        return "it holds no value"
    if len(seen.spellings) == 1:
        return "it holds one value"
    if long := next((each for each in seen.spellings if len(each) > LONGEST_WORD), None):
        return f"it holds a text of {len(long)} characters"
    if not seen.numeric and all(map(WRITTEN.fullmatch, seen.spellings)):
        commas = f"; {DECIMAL_COMMA}" if any("," in each for each in seen.spellings) else ""
        return f"it holds words such as {next(iter(seen.spellings))!r}: write plain numbers, of a date an age{commas}"
    if not seen.numeric and len(seen.spellings) > MOST_CATEGORIES:
        return f"it holds more than {MOST_CATEGORIES} different words"
    return None


def _drafted(name: str, seen: _Seen, is_label: bool) -> Column:
    few = len(seen.spellings) - len(seen.others) < LEAST_NUMBERS
    numbers = seen.numeric and not (seen.others and few)
    if not numbers or (is_label and seen.whole and len(seen.spellings) <= MOST_CLASSES):
        by_size = seen.numeric and not seen.others
        words = sorted(seen.spellings, key=(lambda each: (float(each), each)) if by_size else str)
        return Column(name, categories=tuple((seen.spellings[each],) for each in words))
    absent = seen.absent()
    kept = [each for each in seen.codes if f"{each:g}" not in absent]
    low, high = rounded_out(min([seen.low, *kept]), max([seen.high, *kept]))
    return Column(name, low, high, absent=absent)


def rounded_out(low: float, high: float) -> tuple[float, float]:
    """Return bounds of one or two digits around two numbers."""
    step = 10.0 ** math.floor(math.log10(high - low)) / 2
    return round(math.floor(low / step) * step, 12), round(math.ceil(high / step) * step, 12)
