"""Figures of an evaluation, for the round's metrics line and for display."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..configs.round_line import AT_CLIENTS

LOW, HIGH = "/low", "/high"  # suffixes of the interval's ends


def metric_means(record: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the means of a record by name, with the ends of their intervals, for the round's metrics line.

    Args:
      record: of an evaluation; None if the round has none.
    """
    if record is None:
        return {}
    from ..privacy.statistics.evaluation import CLIENTS, RECORDS

    means: dict[str, float] = {}
    for answer in record["answers"]:
        first = answer["figures"][0]
        if first["name"] == answer["name"] not in (CLIENTS, RECORDS) and first["value"] is not None:
            name = f"{AT_CLIENTS}{answer['name']}"
            means |= {name: first["value"], f"{name}{LOW}": first["low"], f"{name}{HIGH}": first["high"]}
    return means


def format_means(record: Mapping[str, Any]) -> str:
    """Return a record's means with their intervals in one line, or why there are none."""
    metrics = metric_means(record)
    means = {name: value for name, value in metrics.items() if not name.endswith((LOW, HIGH))}
    texts = [
        f"{name.removeprefix(AT_CLIENTS)} {value:.4f} ({metrics[name + LOW]:.4f} to {metrics[name + HIGH]:.4f})"
        for name, value in means.items()
    ]
    return ", ".join(texts) or str(record.get("reason", "cannot be said"))
