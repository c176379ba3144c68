"""Display of a run and its audit in progress: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import textwrap
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..base.notice import say
from ..configs.round_line import AT_CLIENTS, GROUPS, OF_CLIENTS
from .callbacks import ObserverLine, RoundEnd, RunEnd, RunStart
from .files import CLIENTS_LOG
from .round_lines import format_means

MAX_ROWS = 8
COLUMNS, INDENT = 80, 2  # of a plain line of a round, and of its continuation
LARGE = 10  # from which a figure has one decimal
LINES = 10  # approximate number of lines of a plain log


@dataclass
class Display:
    """Callback that shows a run: a live table in a terminal, plain lines elsewhere.

    Attributes:
      promised: returns what a new run promises in words, as paragraphs.
    """

    promised: Callable[[], Sequence[str]] = tuple
    _run: RunStart = field(init=False)
    _lines: deque[RoundEnd] = field(default_factory=lambda: deque[RoundEnd](maxlen=MAX_ROWS))
    _evaluated: RoundEnd | None = None  # the last round with an evaluation at the clients
    _live: Live | None = None
    _start: float = field(default_factory=time.monotonic)

    def start(self, run: RunStart) -> None:
        """Show the title, what a new run promises, and in a terminal the progress."""
        self._run, console = run, Console(stderr=False)
        say(run.title)
        if not run.rows:
            for paragraph in self.promised():
                _say_once(paragraph)
        if console.is_terminal:
            self._live = Live(self._table(), console=console, refresh_per_second=8)
            self._live.start()

    def round(self, round_end: RoundEnd) -> None:
        """Show one more round."""
        line = replace(round_end, model={})  # a run of large models would not fit in memory
        self._lines.append(line)
        self._evaluated = line if "evaluation" in round_end.row else self._evaluated
        interval = max(1, self._run.num_rounds // LINES)
        if self._live is not None:
            self._live.update(self._table())
        elif round_end.round % interval == 0 or round_end.round in (1, self._run.num_rounds):
            say(self._plain(round_end))

    def end(self, ending: RunEnd) -> None:
        """Show the ending and the folder of the results."""
        self.close()
        models, metrics = ending.result["models_averaged"], ending.result["metrics"]
        names = held_out(self._lines[-1]) if self._lines and models > 1 else ()
        if means := "  ".join(
            f"{name.replace('_', ' ')} {_number(metrics[name])}" for name in names if name in metrics
        ):
            say(f"mean of the last {models} models: {means}")
        if tuning := tuned_line(ending.result.get("tuning")):
            say(tuning)
        for line in own_lines(metrics):
            say(line)
        for hint in filter(None, map(ending.result.get, ("rise", "early"))):
            say(hint)
        failed, lost = ending.status == "failed", ending.result["rounds_abandoned"]
        abandoned = ""
        if lost and not failed:
            abandoned = f"; rounds abandoned: {lost} (what was charged for them stays spent)"
        say(f"{ending.status}: {ending.reason}{abandoned}; results: {ending.folder}", failed)
        # On real data, or in a run that goes on, the log would show whether a client that fails was drawn.
        show_log = failed and ending.result["rng"] == "seeded"
        if show_log and (last_line := _last_line(ending.folder / CLIENTS_LOG)):
            say(f"{CLIENTS_LOG} ends with: {last_line}", True)

    def close(self) -> None:
        """Restore the terminal."""
        if self._live is not None:
            self._live.update(self._table())
            with suppress(OSError):
                self._live.stop()
            self._live = None

    def _plain(self, line: RoundEnd) -> str:
        """Return a round as text: its figures in lines of at most `COLUMNS`, and below them a line for each note."""
        row = line.row
        columns = [f"round {line.round:>{len(str(self._run.num_rounds))}}/{self._run.num_rounds}"]
        columns += [f"{name.replace('_', ' ')} {_number(value)}" for name, value in held_out(line).items()]
        columns += [f"{unit} epsilon {text.replace(' of ', '/')}" for unit, text in self._epsilons(line)]
        if row["replies"] is None:  # the cohort is secret
            columns.append(f"~{row['invited']:g} clients")
        else:
            columns.append(f"{row['replies']}/{row['invited']} clients")
        if row["abandoned"]:
            dropped = sorted((row["dropped"] or {}).items())
            reasons = ", ".join(f"{reason} {count}" for reason, count in dropped)
            columns.append("abandoned: nothing was released" + (f" ({reasons})" if reasons else ""))
        suspicions = [*row.get("blamed", {}).items(), *row.get("suspected", {}).items()]
        notes = [f"{name} {reason}" for name, reason in suspicions]
        if "cause" in row:
            notes.append(row["cause"])
        if "evaluation" in row:
            notes.append(f"the clients: {format_means(row['evaluation'])}")
        if line.audit and line.audit.fresh(line.round):
            notes += [f"audit: {each}" for each in line.audit.words()]
        return "\n  ".join([*_fitted(columns), *notes])

    def _epsilons(self, line: RoundEnd) -> list[tuple[str, str]]:
        """Return each unit with its epsilon so far, and its budget if there is one."""
        rows: list[tuple[str, str]] = []
        for unit, value in line.epsilon.items():
            budget = self._run.budgets.get(unit)
            spent = "infinite" if math.isinf(value) else f"{value:.3f}"
            rows.append((unit, spent if budget is None else f"{spent} of {budget:g}"))
        return rows

    def _table(self) -> RenderableType:
        """Return what the terminal shows: the last rounds as a table, the last evaluation at the clients, and bars."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        names = list(dict.fromkeys(name for line in self._lines for name in held_out(line)))
        units = [unit for unit, _ in self._epsilons(self._lines[-1])] if self._lines else []
        for column in ("round", *names, *(f"epsilon ({unit})" for unit in units), "clients"):
            table.add_column(column.replace("_", " "), justify="right", min_width=9)
        for line in self._lines:
            figures, clients = held_out(line), _clients(line.row)
            values = [_number(figures[name]) if name in figures else "" for name in names]
            table.add_row(str(line.round), *values, *(text for _, text in self._epsilons(line)), clients)
        parts: list[RenderableType] = []
        if self._lines:
            parts.append(table)
        if (last := self._evaluated) is not None:
            parts.append(Text(f"the clients, round {last.round}: {format_means(last.row['evaluation'])}"))
        return Group(*parts, *self._bars())

    def _bars(self) -> list[RenderableType]:
        """Return the bars of the rounds and of each budget, and the audit's rows."""
        completed = max((row["round"] for row in self._run.rows), default=0)
        if self._lines:
            completed = self._lines[-1].round
        seconds = time.monotonic() - self._start
        total = self._run.num_rounds
        bars = [_bar("rounds", completed, total, f"{completed}/{total}  {seconds:.0f} s")]
        if self._lines:
            last = self._lines[-1]
            for unit, value in last.epsilon.items():
                budget = self._run.budgets.get(unit)
                if budget is not None:
                    text = f"{value:.2f} of {budget:g} spent, {max(0.0, budget - value):.2f} left"
                    bars.append(_bar(f"epsilon ({unit})", value, budget, text))
                elif math.isinf(value):
                    bars.append(Text(f"epsilon ({unit}) is infinite: no guarantee", style="bold red"))
            if last.audit is not None:
                bars.append(panel(last.audit))
        return bars


@cache
def _say_once(paragraph: str) -> None:
    """Say a paragraph, if this process has not said it: the jobs of a sweep have most of theirs in common."""
    say(textwrap.fill(paragraph, COLUMNS))


def _fitted(columns: Sequence[str]) -> list[str]:
    """Return columns in lines, the first of at most `COLUMNS` and each other one with room for its indentation."""
    lines = [""]
    for column in columns:
        longer = f"{lines[-1]}  {column}".lstrip()
        if len(longer) <= COLUMNS - INDENT * (len(lines) > 1):
            lines[-1] = longer
        else:
            lines.append(column)
    return lines


def _clients(row: Mapping[str, Any]) -> str:
    """Return the number of clients in a round for the table: replies/invited -dropped, or the planned number."""
    if row["replies"] is None:  # the cohort is secret
        return f"{row['invited']:g} planned" + (" abandoned" if row["abandoned"] else "")
    dropped = sum(row["dropped"].values())
    counts = f"{row['replies']}/{row['invited']}" + (f" -{dropped}" if dropped else "")
    return counts + (" abandoned" if row["abandoned"] else "")


def _bar(name: str, completed: float, total: float, text: str) -> RenderableType:
    """Return a row with a name, a bar that is filled to completed / total, and a text."""
    row = Table.grid(padding=(0, 1))
    row.add_column(width=17)
    row.add_column(width=30)
    row.add_column()
    row.add_row(name, ProgressBar(total=total, completed=min(completed, total), width=30), text)
    return row


def held_out(line: RoundEnd) -> dict[str, float]:
    """Return the held-out metrics of a round's model, without those by group, of which there may be dozens."""
    return {name: value for name, value in line.metrics.items() if not name.startswith((AT_CLIENTS, GROUPS))}


def own_lines(metrics: Mapping[str, float]) -> list[str]:
    """Return a line with the first metric on the clients' own rows, of three models; none without personal models."""
    own = [name for name in metrics if name.startswith(OF_CLIENTS)]
    first = [name for name in own if name.partition("/")[2] == own[0].partition("/")[2]]
    texts = [f"{name.replace('_', ' ').replace('/', ' ')} {_number(metrics[name])}" for name in first]
    return [f"on the clients' own held-out rows: {'  '.join(texts)}"] if texts else []


def tuned_line(tuning: Mapping[str, Any] | None) -> str:
    """Return a line with the winning value and the others; empty if no value has won."""
    if tuning is None or tuning.get("value") is None:
        return ""
    others = ", ".join(f"{arm['value']:g}{' (no score)' * (arm['score'] is None)}" for arm in tuning["arms"])
    doubt = ", but the difference is within the noise" if tuning.get("apart") is False else ""
    return f"tuned: {tuning['key']}={tuning['value']:g} is best of {others}{doubt}"


def _number(value: float) -> str:
    decimals = (4, 1)[abs(value) >= LARGE]
    return f"{value:.{decimals}f}" if math.isfinite(value) else str(value)


def panel(line: ObserverLine) -> RenderableType:
    """Return the audit's rows, which stand under the bars of the budgets."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=17)
    table.add_column()
    label = "audit"
    for text, style in line.rows():
        table.add_row(label, Text(text, style=style))
        label = ""
    return table


def console_for(width: int) -> Console:
    """Return a console as wide as the terminal, or of `width` columns if the output is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def visible(text: str) -> str:
    """Return text of somebody else's files, in which nothing moves a terminal's cursor, hides or reorders what is shown."""
    return "".join(each if each.isprintable() or each in "\t\n" else ascii(each)[1:-1] for each in text)


def hanging(lead: str, text: str) -> str:
    """Return a lead, such as the name of a key, and its text: at a terminal in lines that are indented by the lead's width.

    Elsewhere both stand in one line.
    """
    console, text = Console(), visible(text)
    width = console.width if console.is_terminal else len(lead) + len(text) + 1
    wrapped = textwrap.wrap(text, max(width - len(lead), 20), break_long_words=False, break_on_hyphens=False)
    return lead + ("\n" + " " * len(lead)).join(wrapped)


def _last_line(path: Path) -> str:
    """Return a log's last line, the text of an exception; "" without a log."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
    except OSError:
        return ""
