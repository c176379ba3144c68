"""``fedveil report compare A B``: the different settings and results of two runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from ..evidence.comparison import ComparedValue, compared
from ..evidence.content import report_of
from ..evidence.forms import read_assessment
from ..run.display import console_for
from ..run.files import ASSESSMENT
from ..run.run_files import Fields, as_a_run_wrote, read_run

WIDTH = 110


def compare(first: Path, second: Path, *, everything: bool = False, as_json: bool = False) -> int:
    """Print the values in which the reports of two runs differ, and return the exit code.

    Arguments as of `fedveil report compare`.

    Raises:
      Refusal: one holds no run, or a file of it cannot be read.
    """
    rows = compared(_report(first), _report(second), everything=everything)
    if as_json:
        told = {"first": str(first), "second": str(second), "values": [asdict(each) for each in rows]}
        print(json.dumps(told))
        return 0
    if not rows:
        print("the reports of both runs are the same")
        return 0
    console_for(WIDTH).print(_table(rows, first, second))
    return 0


def _report(folder: Path) -> Fields:
    with as_a_run_wrote(folder):
        return report_of(read_run(folder, read_assessment(folder / ASSESSMENT)))


def _table(rows: list[ComparedValue], first: Path, second: Path) -> Table:
    from rich.text import Text

    table = Table(box=None)
    names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
    for name in ("", "", *names):
        table.add_column(Text(name, overflow="fold"))
    before = ""
    for row in rows:
        cells = (row.part if row.part != before else "", row.name, row.first, row.second)
        table.add_row(*(Text(each, overflow="fold") for each in cells))
        before = row.part
    return table
