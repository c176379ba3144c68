"""Page of the benchmarks' tables, renewed from the JSON files that the commands on it write."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from .tables import Row, as_table, load_of, tables_of

_SECTION = re.compile(r"^(?=#{2,3} )", re.MULTILINE)
_LOAD = re.compile(r"^Load averages? .*?\.(?=\s)", re.MULTILINE | re.DOTALL)


def renew(page: str, files: Sequence[Path]) -> str:
    """Return a page with the tables and the load of one section as the files say.

    Args:
      page: Markdown; the section's command names all files behind --json, and a table stands below its title.
      files: results that `publish` wrote; their rows follow each other.

    Raises:
      ValueError: no section, or more than one, names the files; it lacks one of their tables, or the load.
    """
    sections = _SECTION.split(page)
    names = [f"--json {path.name}" for path in files]
    found = [number for number, text in enumerate(sections) if all(name in text for name in names)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} sections of the page have a command with {' and '.join(names)}")
    results: list[Row] = [json.loads(path.read_text()) for path in files]
    sections[found[0]] = _renewed(sections[found[0]], results)
    return "".join(sections)


def _renewed(section: str, results: Sequence[Row]) -> str:
    for title, rows in tables_of(results).items():
        table = re.compile(rf"(?<=^\*\*{re.escape(title)}\*\*\n\n)(\|.*\n)+", re.MULTILINE)
        section = _put(table, as_table(rows) + "\n", section, f"table '{title}'")
    return _put(_LOAD, load_of(results), section, "line of the load average")


def _put(pattern: re.Pattern[str], new: str, section: str, named: str) -> str:
    section, count = pattern.subn(lambda _: new, section, count=1)
    if not count:
        raise ValueError(f"the section of the page has no {named}")
    return section
