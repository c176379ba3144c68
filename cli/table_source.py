"""Tables that a command names: a file or a folder, in an encoding, or a database and a query."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..base.refusal import Refusal
from .grammar import option

if TYPE_CHECKING:
    from ..tasks.table_files import RowSource

Query = Annotated[
    str | None, option("SELECT", "Query that gives the rows; DATA is then a database or its URL.", "--query")
]
Encoding = Annotated[
    str | None, option("NAME", "Encoding of text files, such as cp1252; UTF-8 by default.", "--encoding")
]


def tables_at(data: str, query: str | None, encoding: str | None) -> Path | RowSource:
    """Return the tables of one owner.

    Args:
      data: a file or a folder; with a query a database, or its URL.
      query: one SELECT; None without one.
      encoding: of text files; None for UTF-8, or UTF-16 if a file begins with its mark.

    Raises:
      Refusal: the path does not exist, the query fails, or gives the rows of several owners.
    """
    if query is None and encoding is None:
        return existing(data)
    sources = sources_at([data], query, encoding, apart=False)
    if len(sources) > 1:
        raise Refusal("DATA", data, f"holds {len(sources)} databases; name one")
    return sources[0]


def sources_at(
    data: list[str], query: str | None, encoding: str | None, *, apart: bool = True
) -> list[RowSource]:
    """Return the tables of all owners; arguments and errors as of `tables_at`, but for `apart`: one source for each owner."""
    from ..tasks.table_files import Files, clients_of, query_results

    if query is None:
        paths = map(existing, data)
        return [Files(each, encoding) for path in paths for each in (clients_of(path) if apart else [path])]
    if encoding is not None:
        raise Refusal("--encoding", encoding, "is of text files, and a query reads a database; leave one out")
    try:
        return [result for database in data for result in query_results(query, database)]
    except Refusal as refusal:
        field = {"task.query": "--query", "task.database": "DATA"}.get(refusal.field, refusal.field)
        raise Refusal(field, refusal.value, refusal.remedy) from None


def existing(data: str) -> Path:
    """Return the path of data; refuse one that does not exist."""
    if "://" in data:
        raise Refusal("DATA", data, "is the URL of a database; say which rows by --query 'SELECT ...'")
    if not (path := Path(data)).exists():
        raise Refusal("DATA", data, "does not exist; name a table, texts, a folder of them or a .npy file")
    return path
