"""Lines of a run's rounds, one of JSON each: how they are written and read, and what they hold in sum."""

from __future__ import annotations

import errno
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ..base.durable_files import open_for_owner, replace_file
from ..configs.round_line import AT_CLIENTS
from .callbacks import RoundEnd, RunEnd, RunStart
from .files import METRICS, OPERATOR
from .run_files import read_rows, rows_in

LOW, HIGH = "/low", "/high"  # suffixes of an interval's ends in the names of an evaluation's figures
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Lines:
    """Callback that writes METRICS, which anybody may read."""

    folder: Path

    def start(self, run: RunStart) -> None:
        """Delete lines after the last checkpoint, left by a crash."""
        replace_file(self.folder / METRICS, _text(run.rows), mode=None)

    def round(self, round_end: RoundEnd) -> None:
        """Write the round's line."""
        with open(self.folder / METRICS, "ab") as file:
            file.write(_text([round_end.row]))

    def end(self, ending: RunEnd) -> None:
        """Do nothing: every line is written."""


class History(Iterable[dict[str, Any]]):
    """Lines of the finished rounds, read from METRICS by each loop over them.

    Args:
      folder: folder of the run.
      last: number of the last round that counts; later lines were left by a crash.

    Attributes:
      last: line of the last round, which may not be in the file yet; empty before the first round.
    """

    def __init__(self, folder: Path, last: int) -> None:
        self._path, self._count, self.last = folder / METRICS, 0, dict[str, Any]()
        for row in rows_in(self._path):
            if row["round"] <= last:
                self.append(row)

    def append(self, row: dict[str, Any]) -> None:
        """Add the line of the next round, which the caller writes to the file before it adds another."""
        self._count, self.last = self._count + 1, row

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the lines in their order.

        Raises:
          OSError: the file has lost some.
        """
        missing = max(0, self._count - 1)  # all but the last are in the file
        for row in islice(rows_in(self._path), missing):
            missing -= 1
            yield row
        if missing:
            raise OSError(errno.EIO, f"has lost {missing} of the run's lines", str(self._path))
        if self._count:
            yield self.last


@dataclass(frozen=True)
class RoundsOfArm(Iterable[Row]):
    """Lines of the rounds of one arm and of those without any, read anew by each loop over them.

    Attributes:
      rows: lines of all rounds.
      arm: number of the arm; None for the rounds without any.
    """

    rows: Iterable[Row]
    arm: int | None

    def __iter__(self) -> Iterator[Row]:
        return (row for row in self.rows if row.get("arm") in (None, self.arm))


def tell_operator(folder: Path, row: Row) -> None:
    """Append a line to OPERATOR, which only a trusted server's operator may read."""
    with open_for_owner(folder / OPERATOR) as file:
        file.write(_text([row]))


def forget_rounds_after(folder: Path, last: int) -> None:
    """Delete the operator's lines of later rounds, left by a crash."""
    if (folder / OPERATOR).exists():
        replace_file(folder / OPERATOR, _text(read_rows(folder / OPERATOR, last)))


def _text(rows: Sequence[Row]) -> bytes:
    """Return rows as JSON, with null for the NaN and infinite metrics of a diverged model."""
    finite = (
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    )
    # Frozen mappings are not dictionaries.
    return "".join(json.dumps(row, allow_nan=False, default=dict) + "\n" for row in finite).encode()


def drops_in(rows: Iterable[Row]) -> dict[str, int]:
    """Return how many clients were dropped in all of these rounds, by the reason."""
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row["dropped"] or {})
    return dict(sorted(total.items()))


def members_in(rows: Iterable[Row], column: Literal["blamed", "suspected"]) -> dict[str, list[str]]:
    """Return the protocol violations of members by name, one per round, or the reasons to suspect them of spoiling sums."""
    texts: dict[str, list[str]] = {}
    for row in rows:
        for part in (row, row.get("evaluation") or {}):
            for name, text in part.get(column, {}).items():
                texts.setdefault(name, []).append(text)
    return texts


def metric_means(evaluation: Row | None) -> dict[str, float]:
    """Return an evaluation's means by name, with the ends of their intervals; none without an evaluation."""
    if evaluation is None:
        return {}
    from ..privacy.statistics.evaluation import CLIENTS, RECORDS

    columns: dict[str, float] = {}
    for answer in evaluation["answers"]:
        mean = answer["figures"][0]
        if mean["name"] == answer["name"] not in (CLIENTS, RECORDS) and mean["value"] is not None:
            name = f"{AT_CLIENTS}{answer['name']}"
            columns |= {name: mean["value"], f"{name}{LOW}": mean["low"], f"{name}{HIGH}": mean["high"]}
    return columns


def format_means(evaluation: Row) -> str:
    """Return an evaluation's means with their intervals in one line, or why there are none."""
    columns = metric_means(evaluation)
    means = [
        f"{name.removeprefix(AT_CLIENTS)} {value:.4f} ({columns[name + LOW]:.4f} to {columns[name + HIGH]:.4f})"
        for name, value in columns.items()
        if not name.endswith((LOW, HIGH))
    ]
    return ", ".join(means) or str(evaluation.get("reason", "cannot be said"))
