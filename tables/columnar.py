"""Parquet files as tables, and folders `key=value` of Hive's layout as columns of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..tasks.table_files import OpenTable, rows_of_block

NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # folder of rows that lack the column of its key


def open_parquet(file: Path, _encoding: str | None) -> OpenTable:
    """Open a Parquet file."""
    return parquet_table(file, file)


def parquet_table(name: Path, content: object) -> OpenTable:
    """Return the table of a Parquet file.

    Args:
      name: of the table, for refusals.
      content: path of the file, or an Arrow buffer or file of its content.
    """
    opened: Any = import_module("pyarrow.parquet").ParquetFile(content)
    header: list[str] = opened.schema_arrow.names

    def read(positions: Sequence[int]) -> Iterator[Sequence[Any]]:
        names = [header[position] for position in positions]
        for batch in opened.iter_batches(batch_size=rows_of_block(len(names)), columns=names):
            yield [batch.column(name) for name in names]

    return OpenTable(name, header, max_rows=opened.metadata.num_rows, first_row=1, comma="", read=read)


def with_folders(table: OpenTable, folders: Sequence[str]) -> OpenTable:
    """Return the table with a column at its end for each folder `key=value`, which holds one word in all rows."""
    words = dict(map(_partition, folders))
    pa, start = import_module("pyarrow"), len(table.header)

    def read(positions: Sequence[int]) -> Iterator[Sequence[Any]]:
        own = [position for position in positions if position < start]
        for arrays in table.read(own or [0]):  # the first column counts the rows
            by_position = dict(zip(own, arrays, strict=False))
            rows = len(arrays[0])
            further = {start + n: pa.repeat(word, rows) for n, word in enumerate(words.values())}
            yield [(by_position | further)[position] for position in positions]

    return replace(table, header=[*table.header, *words], read=read)


def _partition(folder: str) -> list[str]:
    """Return the name and the word of a column that a folder `key=value` of Hive's layout stands for."""
    name, _, word = map(unquote, folder.partition("="))
    return [name, "" if word == NO_PARTITION else word]
