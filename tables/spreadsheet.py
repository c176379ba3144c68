"""Spreadsheet as a table: the one sheet with cells of an .xlsx file, whose first row with cells names the columns."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from ..base.extras import require_extra
from ..base.refusal import Refusal
from ..tasks.table_files import OpenTable
from .cells import text_of

BLOCK_ROWS = 1 << 13
LARGEST_BYTES = (
    2 << 30
)  # of an unpacked file, which calamine reads into memory as a whole; Excel's own limit is alike


def open_xlsx(file: Path, _encoding: str | None) -> OpenTable:
    """Open an .xlsx file; refuse one that cannot be read, or has several sheets with cells.

    A cell is the value that was last computed and saved. A date becomes its ISO text.
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
    except (zipfile.BadZipFile, calamine.CalamineError) as error:
        raise Refusal("table", str(file), f"is no readable spreadsheet ({error}); save it anew") from None
    full = [sheet for sheet in sheets if sheet.start is not None]
    if len(full) != 1:
        names = ", ".join(sheet.name for sheet in full)
        remedy = f"has {len(full)} sheets with cells ({names}); save the one with the rows as its own file"
        raise Refusal("table", str(file), remedy)
    (sheet,) = full
    first = sheet.start[0]
    header = [text_of(cell) or "" for cell in next(islice(sheet.iter_rows(), first, None))]

    def read(positions: Sequence[int]) -> Iterator[Sequence[Any]]:
        pa = import_module("pyarrow")
        cells = islice(sheet.iter_rows(), first + 1, None)
        for rows in iter(lambda: list(islice(cells, BLOCK_ROWS)), []):
            yield [pa.array([text_of(row[position]) for row in rows], pa.string()) for position in positions]

    rows = sheet.end[0] - first
    return OpenTable(file, header, max_rows=rows, first_row=first + 2, comma="", read=read)
