"""Memorisation of a run's secrets for its page: exposure and quality by round, of this run and of one to compare it with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base.refusal import Refusal
from ..configs.round_line import AUDIT, is_metric, main_metric
from ..run.files import CONFIG
from ..run.promise import main_row, promise_rows
from ..run.run_files import Fields, RunFiles, read_run
from .page_text import is_finite

EXPOSURE = "exposure_x"  # before the number of copies, in the name of a test of secrets
BITS, LIMIT = "bits", "limit"  # figures of such a test in a round's line
PERPLEXITY = "perplexity"
SAME = (
    "name",
    "target",
    "folder",
    "base",
    "tokens",
    "num_clients",
    "secrets",
)  # keys of a task in runs to compare
# Expected exposure of a secret that was not memorised, whose rank among many candidates is uniform (Carlini et al. 2019,
# arXiv:1802.08232): 1.44 bits.
CHANCE = math.log2(math.e)


def memorisation_of(run: RunFiles, other: RunFiles | None = None) -> dict[str, Any] | None:
    """Return the exposure by round of the secrets with most copies; None for a run without measured secrets.

    Args:
      run: the run of the report.
      other: run of the same task under another promise; None without one.
    """
    copies = max(_copies(run), default=0)
    if not copies:
        return None
    runs = [run, *filter(None, [other])]
    names = [_quality(each) for each in runs]
    limits = [row[key] for row in run.rounds if is_finite(row.get(key := _key(copies, LIMIT)))]
    return {
        "copies": copies,
        "chance": CHANCE,
        "limit": limits[-1],
        "metric": names[0],
        "curves": [_curve(each, copies, names[0]) for each in runs],
    }


def comparable(run: RunFiles, folder: Path | None) -> RunFiles | None:
    """Return the run in a folder to compare a run with; None without a folder.

    Raises:
      Refusal: there is no run, one of both has measured no secrets, or their tasks differ.
    """
    if folder is None:
        return None
    if not (folder / CONFIG).is_file():
        raise Refusal("--compare", str(folder), "holds no run; name the folder of one of the same task")
    other = read_run(folder)
    for each in (run, other):
        if not any(_copies(each)):
            remedy = (
                f"{each.folder} has measured no secrets by round; run both with task.secrets and audit=full"
            )
            raise Refusal("--compare", str(folder), remedy)
    one, two = (each.config["task"] for each in (run, other))
    if differing := [name for name in SAME if one.get(name) != two.get(name)]:
        remedy = f"differs in task.{differing[0]}; compare runs of one task, one of them with privacy=none"
        raise Refusal("--compare", str(folder), remedy)
    return other


def _key(copies: int, figure: str) -> str:
    """Return the name of a figure of the secrets with so many copies in a round's line."""
    return f"{AUDIT}{EXPOSURE}{copies}/{figure}"


def _copies(run: RunFiles) -> Iterator[int]:
    """Yield the numbers of copies whose exposure a run has measured."""
    start, end = f"{AUDIT}{EXPOSURE}", f"/{BITS}"
    for name in dict.fromkeys(name for row in run.rounds for name in row):
        if name.startswith(start) and name.endswith(end):
            yield int(name.removeprefix(start).removesuffix(end))


def _quality(run: RunFiles) -> str | None:
    """Return the held-out metric beside the exposure: perplexity, or the run's main one."""
    has_perplexity = any(is_metric(PERPLEXITY, row.get(PERPLEXITY)) for row in run.rounds)
    return {True: PERPLEXITY, False: main_metric(run.rounds)}[has_perplexity]


def _curve(run: RunFiles, copies: int, metric: str | None) -> Fields:
    """Return the exposure and the quality of one run by round, beside the epsilon of its first guarantee.

    Args:
      run: its files.
      copies: of the secrets.
      metric: name of the quality; None for no values.
    """
    rows = promise_rows(run)
    first = [row for number, row in enumerate(rows) if number == main_row(rows)]
    return {
        "mode": run.setting("privacy", "name"),
        "epsilon": [*first, {"epsilon": "infinity"}][0]["epsilon"],
        "bits": _points(run, _key(copies, BITS)),
        "quality": _points(run, str(metric)),
    }


def _points(run: RunFiles, name: str) -> list[list[float]]:
    """Return the rounds with a finite value of a name, each with that value."""
    return [[row["round"], row[name]] for row in run.rounds if is_finite(row.get(name))]
