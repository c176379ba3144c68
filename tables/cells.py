"""Texts of cells that Python objects hold, as a CSV file would have them."""

from __future__ import annotations

from datetime import datetime


def text_of(cell: object) -> str | None:
    """Return the text of a cell, None for an empty one: a date by ISO 8601, and 20 of 20.0."""
    match cell:
        case None | "":
            return None
        case float() if cell.is_integer():
            return str(int(cell))
        case datetime():
            return cell.isoformat(" ")
        case _:
            return str(cell)
