"""Help on the keys of a configuration: its layout in sections, and the texts that are shipped, which need no Hydra.

To compose a configuration takes a second of CPU for imports alone. `help.json` therefore has the rows of each primary
configuration, and those that change with one option of one group. `docs/make_reference.py` writes it, and a test compares it.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..base.extensions import TABLE

WIDTH, COLUMN = 80, 34  # of the help: characters of a line, and the column where meanings begin
FILE = Path(__file__).with_name("help.json")
PACKAGE = Path(__file__).parents[1]
# Titles of sections, each with the keys and groups that it has, in this order.
SECTIONS = {
    "Task and data": ("task", "partition"),
    "Privacy": ("privacy", "budget", "accept_vacuous", "purpose", "reason", "ledger"),
    "Training": [
        "num_rounds",
        "local_epochs",
        "batch_size",
        "learning_rate",
        "optimizer",
        "schedule",
        "strategy",
        "model",
        "personal",
        "tune",
        "optimize",
        "seed",
    ],
    "Clients of a round": ("cohort", "population", "secagg", "compress", "faults", "speed"),
    "Measurements": ("measure_every", "evaluate", "audit", "cost"),
    "Running": ["run", "link", "engine", "checkpoint_every", "resume", "callbacks", "allow_modules"],
}
Row = tuple[str, str, str]  # key, value and meaning
Rows = dict[str, list[Row]]  # by the first part of their keys


def rows_by_part(rows: Iterable[Row]) -> Rows:
    """Return rows by the first part of their keys, in their order."""
    parts: Rows = {}
    for row in rows:
        parts.setdefault(row[0].partition(".")[0], []).append(row)
    return parts


def layout(parts: Rows) -> str:
    """Return the sections of the help; keys that no section names are in the last."""
    sections = {title: [*names] for title, names in SECTIONS.items()}
    listed = {name for names in sections.values() for name in names}
    [*sections.values()][-1] += [name for name in parts if name not in listed]
    lines = ["\nChange any of these with key=value:"]
    for title, names in sections.items():
        rows = [row for name in names for row in parts.get(name, ())]
        if rows:
            lines += ["", heading(f"{title}:"), *(_entry(*row) for row in rows)]
    return "\n".join(lines)


def heading(text: str) -> str:
    """Return a heading, in bold on a terminal unless NO_COLOR is set."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return f"\x1b[1m{text}\x1b[0m"
    return text


def shipped_text(config_name: str, words: Sequence[str]) -> str:
    """Return the help of a primary configuration after these overrides; empty unless `help.json` has them.

    It has no overrides, and one option of one group. It is not used where an extension with keys is removed.
    """
    if len(words) > 1 or not _is_whole():
        return ""
    choices = json.loads(FILE.read_text(encoding="utf-8"))[config_name]
    if any(word not in choices for word in words):
        return ""
    return layout({**choices[""], **choices["".join(words)]})


def _is_whole() -> bool:
    """Return whether each module is here that has keys of an extension."""
    modules = [target.partition(":")[0] for (point, _), target in TABLE.items() if point.endswith("settings")]
    return all((PACKAGE / f"{module.replace('.', '/')}.py").exists() for module in modules)


def _entry(key: str, value: str, meaning: str) -> str:
    """Return a key and its meaning in two columns; the meaning of a long key begins in the line below."""
    first, indent = f"  {key}={value}", " " * COLUMN
    first = f"{first}\n{indent}" if len(first) >= COLUMN else first.ljust(COLUMN)
    meaning_lines = textwrap.wrap(meaning, WIDTH - COLUMN, break_on_hyphens=False)
    return (first + f"\n{indent}".join(meaning_lines)).rstrip()
