"""Export of a ledger: its entries as JSON that can be read and checked without SQLite."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...base.refusal import Refusal
from .hash_chain import START, Entry, chained

FORMAT = "fedveil ledger export 1"


def export_text(entries: Iterable[Entry], more: Mapping[str, Any] | None = None) -> str:
    """Return entries as JSON.

    Args:
      entries: entries of the ledger; keys and payloads stay verbatim, because `hash` covers their text.
      more: further fields of the whole, by name.
    """
    whole = {"format": FORMAT, **(more or {}), "entries": [entry._asdict() for entry in entries]}
    return json.dumps(whole, indent=1, allow_nan=False)


def read_export(text: bytes, source: str) -> list[Entry]:
    """Return the entries of an export, each checked against the one before.

    Raises:
      Refusal: the text is no export, or its chain is broken.
    """
    try:
        return entries_from(json.loads(text), source)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
        raise Refusal("ledger", source, f"cannot be read ({problem}); restore a true copy") from problem


def entries_from(whole: Any, source: str) -> list[Entry]:
    """Return the entries of an export's JSON value, each checked against the one before.

    Raises:
      Refusal: the chain is broken.
      ValueError, LookupError or TypeError: the value is no export.
    """
    if whole["format"] != FORMAT:
        raise ValueError(f"format {whole['format']!r}")
    rows: Sequence[Any] = [tuple(each[name] for name in Entry._fields) for each in whole["entries"]]
    return list(chained(rows, START, source))
