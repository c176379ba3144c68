"""Time and memory of reading a large table: python -m fedveil.benchmarks.reading 1000000."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ..tasks.table_files import read_rows
from ..tasks.table_schema import Column, Schema

NUMBERS, BLOCK = 15, 100_000  # columns of numbers, beside five of words; rows that are written at a time
WORDS = ("north", "south", "east", "west")


def schema() -> Schema:
    """Return the schema of a table of 20 columns."""
    numbers = [Column(f"number_{place}", -5, 5) for place in range(NUMBERS)]
    words = [Column(f"word_{place}", categories=tuple((word,) for word in WORDS)) for place in range(4)]
    return Schema((*numbers, *words, Column("label", categories=(("no",), ("yes",)))), "label")


def write(folder: Path, rows: int) -> list[Path]:
    """Write a CSV and a Parquet file of made-up rows.

    Args:
      folder: of both.
      rows: of each; a multiple of BLOCK.
    """
    stream, paths = np.random.default_rng(0), [folder / "table.csv", folder / "table.parquet"]
    writers: list[Any] = []
    for _ in range(rows // BLOCK):
        columns: dict[str, Any] = {
            each.name: np.array(each.words)[stream.integers(each.width, size=BLOCK)]
            if each.categories
            else stream.standard_normal(BLOCK).round(4)
            for each in schema().columns
        }
        table = pa.table(columns)
        writers = writers or [
            pa_csv.CSVWriter(paths[0], table.schema),
            pq.ParquetWriter(paths[1], table.schema),
        ]
        for writer in writers:
            writer.write_table(table)
    for writer in writers:
        writer.close()
    return paths


def main(rows: int) -> None:
    """Print a line for each kind of file."""
    with tempfile.TemporaryDirectory() as folder:
        for path in write(Path(folder), rows):
            before, began = peak_mebibytes(), time.perf_counter()
            found = read_rows(path, schema())
            seconds, matrix = time.perf_counter() - began, found.inputs.nbytes / 2**20
            print(
                f"{path.suffix[1:]}: {rows} rows x 20 columns, {path.stat().st_size / 2**20:.0f} MiB: {seconds:.1f} s, "
                f"peak {peak_mebibytes():.0f} MiB ({before:.0f} before; the inputs take {matrix:.0f})"
            )
            del found


def peak_mebibytes() -> float:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(int(sys.argv[1]))
