"""Time and memory of reading a large table: python -m fedveil.benchmarks.reading 1000000, or of 1000 rows x 15000 columns."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ..tables.draft import draft_schema
from ..tasks.table_files import read_rows
from ..tasks.table_schema import Column, Schema, read_schema

COLUMNS, WORD_COLUMNS = 20, 5  # of the table by default; those of words, the last of which is the label
BLOCK_CELLS = 2_000_000  # that are written at a time
WORDS = ("north", "south", "east", "west")


def schema(columns: int) -> Schema:
    """Return the schema of a table of so many columns."""
    numbers = [Column(f"number_{each}", -6, 6) for each in range(columns - WORD_COLUMNS)]
    words = [
        Column(f"word_{each}", categories=tuple((word,) for word in WORDS))
        for each in range(WORD_COLUMNS - 1)
    ]
    return Schema((*numbers, *words, Column("label", categories=(("no",), ("yes",)))), "label")


def write(folder: Path, rows: int, columns: int) -> list[Path]:
    """Write a CSV and a Parquet file of made-up rows.

    Args:
      folder: of both.
      rows: of each.
      columns: of each.
    """
    stream, paths = np.random.default_rng(0), [folder / "table.csv", folder / "table.parquet"]
    writers: list[Any] = []
    block = BLOCK_CELLS // columns
    for start in range(0, rows, block):
        size = min(block, rows - start)
        cells: dict[str, Any] = {
            each.name: np.array(each.words)[stream.integers(each.width, size=size)]
            if each.categories
            else stream.standard_normal(size).round(4)
            for each in schema(columns).columns
        }
        table = pa.table(cells)
        writers = writers or [
            pa_csv.CSVWriter(paths[0], table.schema),
            pq.ParquetWriter(paths[1], table.schema),
        ]
        for writer in writers:
            writer.write_table(table)
    for writer in writers:
        writer.close()
    return paths


def main(rows: int, columns: int) -> None:
    """Print a line for each kind of file, one for its schema's file, and one for a draft from the CSV file."""
    with tempfile.TemporaryDirectory() as folder:
        paths, yaml = write(Path(folder), rows, columns), Path(folder, "schema.yaml")
        print(f"{rows} rows x {columns} columns")
        for path in paths:
            matrix = rows * schema(columns).width * 4 / 2**20
            size = path.stat().st_size / 2**20
            _measure(
                f"{path.suffix[1:]} of {size:.0f} MiB, inputs of {matrix:.0f} MiB",
                partial(read_rows, path, schema(columns)),
            )
        yaml.write_text(schema(columns).text())
        _measure("schema", partial(read_schema, yaml))
        _measure("draft", partial(draft_schema, paths[:1]))


def _measure(what: str, work: Callable[[], object]) -> None:
    """Print the time of some work, and the most memory that the process held before and after."""
    before, began = peak_mebibytes(), time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    print(f"  {what}: {seconds:.1f} s, peak {peak_mebibytes():.0f} MiB, {before:.0f} before")


def peak_mebibytes() -> float:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else COLUMNS)
