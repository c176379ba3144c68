"""Figures of an evaluation, for the round's metrics line and for display."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..configs.round_line import AT_CLIENTS

LOW, HIGH = "/low", "/high"  # suffixes of the interval's ends


def shown_metrics(record: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the means of a record by name, with the ends of their intervals, for the round's metrics line.

    Args:
      record: of an evaluation; None if the round has none.
    """
    if record is None:
        return {}
    from ..privacy.statistics.evaluation import CLIENTS, RECORDS

    found: dict[str, float] = {}
    for answer in record["answers"]:
        first = answer["figures"][0]
        if first["name"] == answer["name"] not in (CLIENTS, RECORDS) and first["value"] is not None:
            name = f"{AT_CLIENTS}{answer['name']}"
            found |= {name: first["value"], f"{name}{LOW}": first["low"], f"{name}{HIGH}": first["high"]}
    return found


def said_of(record: Mapping[str, Any]) -> str:
    """Return a record's means with their intervals in one line, or why there are none."""
    found = shown_metrics(record)
    means = {name: value for name, value in found.items() if not name.endswith((LOW, HIGH))}
    told = [
        f"{name.removeprefix(AT_CLIENTS)} {value:.4f} ({found[name + LOW]:.4f} to {found[name + HIGH]:.4f})"
        for name, value in means.items()
    ]
    return ", ".join(told) or str(record.get("reason", "cannot be said"))
