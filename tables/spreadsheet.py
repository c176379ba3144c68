"""Spreadsheet as a table: the one sheet with cells of an .xlsx file, whose first row with cells names the columns."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any
from xml.parsers import expat

from ..base.extras import require_extra
from ..base.refusal import Refusal
from ..tasks.table_files import OpenTable
from .cells import text_of
from .sheet_errors import sheet_errors

BLOCK_ROWS = 1 << 13
LARGEST_BYTES = (
    2 << 30
)  # of an unpacked file, which calamine reads into memory as a whole; Excel's own limit is alike


def open_xlsx(file: Path, _encoding: str | None) -> OpenTable:
    """Open an .xlsx file; refuse one that cannot be read, or has several sheets with cells.

    A cell is the value that was last computed and saved. A date becomes its ISO text, and an error such as #N/A is a word,
    which is refused where the schema does not declare it.
    """
    require_extra("spreadsheets", f"the table {file.name}")
    calamine: Any = import_module("python_calamine")
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(each.file_size for each in archive.infolist())
        if size > LARGEST_BYTES:
            raise Refusal(
                "table", str(file), f"unpacks to {size >> 20} MiB, which is too large; save it as CSV"
            )
        workbook = calamine.load_workbook(file)
        sheets = [workbook.get_sheet_by_name(name) for name in workbook.sheet_names]
        errors = sheet_errors(file)
    except (zipfile.BadZipFile, expat.ExpatError, calamine.CalamineError) as error:
        raise Refusal("table", str(file), f"is no readable spreadsheet ({error}); save it anew") from None
    full = [sheet for sheet in sheets if sheet.start is not None]
    if len(full) != 1:
        names = ", ".join(sheet.name for sheet in full)
        remedy = f"has {len(full)} sheets with cells ({names}); save the one with the rows as its own file"
        raise Refusal("table", str(file), remedy)
    (sheet,) = full
    first, margin = sheet.start
    header = [text_of(cell) or "" for cell in next(islice(sheet.iter_rows(), first, None))]

    def read(positions: Sequence[int]) -> Iterator[Sequence[Any]]:
        pa = import_module("pyarrow")
        cells = islice(enumerate(sheet.iter_rows()), first + 1, None)
        while rows := list(islice(cells, BLOCK_ROWS)):
            texts = [
                [errors.get((n, margin + at)) or text_of(row[at]) for n, row in rows] for at in positions
            ]
            yield [pa.array(column, pa.string()) for column in texts]

    rows = sheet.end[0] - first
    return OpenTable(file, header, max_rows=rows, first_row=first + 2, comma="", read=read)
