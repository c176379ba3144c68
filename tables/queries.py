"""Queries as sources of tables: a SELECT on a database, whose result stays compressed in memory, and in no file."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote
from weakref import WeakValueDictionary

from ..base.extras import require_extra
from ..base.refusal import Refusal
from ..tasks.table_files import TEXTS, UNREAD, OpenTable, rows_of_block, suffixes
from .cells import text_of
from .columnar import parquet_table

BATCH_ROWS = 1 << 16
SQLITE, DUCKDB = b"SQLite format 3\0", b"DUCK"  # at the bytes 0 and 8 of a file, by their documentation
READERS = {**dict.fromkeys((*TEXTS, ".gz"), "read_csv"), ".parquet": "read_parquet"}  # of DuckDB
DATABASES = (*READERS, ".duckdb", ".db", ".sqlite", ".sqlite3")
ONE_SELECT = re.compile(r"\s*(SELECT|WITH)\b[^;]*;?\s*", re.IGNORECASE)
SECRET = re.compile("pass|pwd|secret", re.IGNORECASE)  # in the name of a parameter of a URL


@dataclass(frozen=True, eq=False)
class QueryResult:
    """Result of a query: a client's table.

    Attributes:
      path: name of the database, for refusals.
      content: the rows as a Parquet file in memory.
    """

    path: Path
    content: Any = field(repr=False)

    def tables(self) -> Iterator[AbstractContextManager[OpenTable]]:
        """Yield the table; its rows are numbered from 1."""
        reader: Any = import_module("pyarrow").BufferReader(self.content)
        yield nullcontext(parquet_table(self.path, reader))


# While a task holds a result, a task with the same query has the same rows, although the database may have others by now.
RESULTS = WeakValueDictionary[tuple[str, str], QueryResult]()


def query_results(query: str | None, database: str | None) -> list[QueryResult]:
    """Return the result of a query on a database, or on each database of a folder, by name.

    Args:
      query: one SELECT. The rows of a CSV or Parquet file are the table `data` in it.
      database: a file of DuckDB or SQLite, CSV or Parquet; a folder of them; or a URL as of SQLAlchemy.

    Raises:
      Refusal: the query is no SELECT or fails, the database cannot be read, or its URL has a password.
    """
    require_extra("databases", "task.query")
    if query is None or not ONE_SELECT.fullmatch(query):
        raise Refusal("task.query", query, "write one SELECT, such as SELECT * FROM patients")
    if not database:
        raise Refusal("task.database", database, "name the file, the folder or the URL that task.query reads")
    path = Path(database)
    databases = _files_of(path) if path.is_dir() else [database]
    return [_result(query, str(each)) for each in databases]


def _files_of(folder: Path) -> list[Path]:
    """Return the databases of a folder by name; refuse one without, or with other tables."""
    files = sorted(folder.glob("[!.]*"))
    for file in files:
        suffix = file.suffix.lower()
        if suffix not in DATABASES and (suffix in suffixes() or suffix in UNREAD):
            raise Refusal("task.database", str(file), "is not read by a query; convert it, or move it away")
    databases = [file for file in files if file.suffix.lower() in DATABASES]
    if not databases:
        raise Refusal("task.database", str(folder), f"holds no database ({', '.join(DATABASES)})")
    return databases


def _result(query: str, database: str) -> QueryResult:
    """Return the result of a query on one database, or that of an earlier task which still exists."""
    if (earlier := RESULTS.get((query, database))) is not None:
        return earlier
    result = _of_server(query, database) if "://" in database else _of_file(query, Path(database))
    RESULTS[query, database] = result
    return result


def _of_file(query: str, file: Path) -> QueryResult:
    """Return the result of a query on a file, by the program that its first bytes or its suffix name."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(SQLITE))
    except OSError as error:
        raise Refusal("task.database", str(file), f"cannot be read ({error.strerror})") from None
    name = Path(f"{file}: query")
    if start == SQLITE:
        address = f"file:{quote(str(file.absolute()))}?mode=ro"
        connect = partial(sqlite3.connect, address, uri=True)
        return _of_sqlalchemy(query, name, "sqlite://", creator=connect)
    duckdb: Any = import_module("duckdb")
    try:
        with closing(_connection(duckdb, file, start[8:12] == DUCKDB)) as connection:
            relation = connection.sql(query)
            batches = relation.to_arrow_reader(rows_of_block(len(relation.columns)))
            return QueryResult(name, _stored(batches.schema, batches))
    except duckdb.Error as error:
        raise Refusal("task.query", query, f"{file} does not answer it: {_first_line(error)}") from None


def _connection(duckdb: Any, file: Path, is_database: bool) -> Any:
    """Return a connection of DuckDB that reads this file, and neither reads nor writes another."""
    settings = {"temp_directory": "", "threads": "1"}
    if is_database:
        connection, steps = duckdb.connect(str(file), read_only=True, config=settings), []
    elif (reader := READERS.get(file.suffix.lower())) is not None:
        literal = "'" + str(file).replace("'", "''") + "'"
        connection = duckdb.connect(config=settings)
        steps = [
            f"SET allowed_paths=[{literal}]",
            f"CREATE VIEW data AS SELECT * FROM {reader}({literal})",
        ]
    else:
        remedy = "is no file of DuckDB or SQLite, CSV or Parquet"
        raise Refusal("task.database", str(file), remedy)
    for step in [*steps, "SET enable_external_access=false", "SET lock_configuration=true"]:
        connection.execute(step)
    return connection


def _of_server(query: str, address: str) -> QueryResult:
    """Return the result of a query on a server; refuse a URL with a password, which a run would store."""
    sqlalchemy: Any = import_module("sqlalchemy")
    try:
        url = sqlalchemy.engine.make_url(address)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        remedy = "is no URL of a database, such as postgresql://reader@db.example/wards"
        raise Refusal("task.database", address.partition("://")[0] + "://...", remedy) from None
    if url.password is not None or any(map(SECRET.search, url.query)):
        remedy = (
            "has a password, which the run's folder would keep; leave it out, and give it to the driver, of "
            "PostgreSQL by the environment variable PGPASSWORD or the file ~/.pgpass"
        )
        raise Refusal("task.database", str(url.set(password=None, query={})), remedy)
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    name = Path(f"{url.database} at {url.host or 'this machine'}: query")
    return _of_sqlalchemy(query, name, url)


def _of_sqlalchemy(query: str, name: Path, url: Any, **options: Any) -> QueryResult:
    """Return the result of a query through SQLAlchemy, in a transaction that is read-only and rolled back.

    Args:
      query: one SELECT.
      name: of the database, for refusals.
      url: of SQLAlchemy.
      options: of its engine.
    """
    sqlalchemy, pa = import_module("sqlalchemy"), import_module("pyarrow")
    try:
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool, **options)
        with engine.connect().execution_options(postgresql_readonly=True) as connection:
            streaming = connection.execution_options(stream_results=True, max_row_buffer=BATCH_ROWS)
            rows = streaming.execute(sqlalchemy.text(query.replace(":", r"\:")))  # : names no parameter
            schema = pa.schema([(column, pa.string()) for column in rows.keys()])  # noqa: SIM118 (no mapping)
            parts = rows.partitions(min(BATCH_ROWS, rows_of_block(len(schema.names))))
            return QueryResult(name, _stored(schema, _batches(schema, parts)))
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        cause = getattr(error, "orig", None) or error
        raise Refusal("task.query", query, f"{name.name} fails: {_first_line(cause)}") from None


def _batches(schema: Any, parts: Iterator[Sequence[Sequence[object]]]) -> Iterator[Any]:
    """Yield rows as Arrow batches of texts, since a driver's types may differ from row to row."""
    pa = import_module("pyarrow")
    for rows in parts:
        columns = [pa.array(map(text_of, cells), pa.string()) for cells in zip(*rows, strict=True)]
        yield pa.record_batch(columns, schema=schema)


def _stored(schema: Any, batches: Iterator[Any]) -> Any:
    """Return Arrow batches as the content of a Parquet file."""
    pa, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    names: list[str] = schema.names
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise Refusal("task.query", ", ".join(twice), "names two columns of the result; rename one by AS")
    output = pa.BufferOutputStream()
    try:
        with parquet.ParquetWriter(output, schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
    except pa.ArrowNotImplementedError as error:
        remedy = (
            f"has a column of a type that is no number, text, date or time ({_first_line(error)}); CAST it"
        )
        raise Refusal("task.query", names, remedy) from None
    return output.getvalue()


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
