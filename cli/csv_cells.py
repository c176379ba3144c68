"""Cells of CSV files, none of which a spreadsheet runs as a formula."""

from __future__ import annotations

import re

# https://owasp.org/www-community/attacks/CSV_Injection, with the wide forms that spreadsheets take for the same.
FORMULA = re.compile(r"[=+\-@\t\r\n＝＋－＠]")


def cell(value: object) -> object:
    """Return a value, a text that begins a formula behind an apostrophe; one that reads as a number begins none."""
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)
        return value
    except ValueError:
        return f"'{value}"
