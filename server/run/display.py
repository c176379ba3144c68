"""Display of a run and its audit while it goes on: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ...privacy.audit.run_audit import Measured
from ...privacy.audit.summary import Raised

SHOWN_ROUNDS = 8
LINES = 10  # a plain log gets about this many lines


@dataclass(frozen=True)
class AuditLine:
    """The audit so far, as shown.

    Attributes:
      checked: whether the sums' noise is checked.
      canaries: how many there are.
      measured: the last look at them.
      alarms: raised so far.
      found: what a probe of memorisation last found, as text.
      probed: whether that was after the last round.
      visible: how much smaller than claimed the noise would have to be to be seen, from 0 to 1.
      records: the last look at canary records.
    """

    checked: bool
    canaries: int
    measured: Measured | None
    alarms: tuple[Raised, ...]
    found: tuple[str, ...] = ()
    probed: bool = False
    visible: float = 1.0
    records: Measured | None = None

    def fresh(self, number: int) -> bool:
        """Whether round `number` brought anything new."""
        looked = any(each is not None and each.round == number for each in (self.measured, self.records))
        return self.probed or looked or any(each.round == number for each in self.alarms)

    def words(self) -> list[str]:
        """Return the lines of a plain log."""
        clients = [_numbers(self.measured)] if self.measured else []
        return [*clients, *self.of_records(), *self.found, *self.said()]

    def of_records(self) -> list[str]:
        """Return what canary records show, one line or none."""
        return [f"records: {_numbers(self.records)}"] if self.records else []

    def said(self) -> list[str]:
        """Return the alarms, one line each."""
        return [
            f"{each.alarm.level.upper()} after round {each.round}: {each.alarm.test}, p = {each.alarm.p_value:.2g}"
            for each in self.alarms
        ]


@dataclass(frozen=True)
class ShownRound:
    """One round, as shown. Epsilons are None where there is no such unit, infinite where nothing is hidden."""

    round: int
    metrics: dict[str, float]
    client_epsilon: float | None
    record_epsilon: float | None
    replies: int
    invited: int
    dropped: int
    audit: AuditLine | None = None
    abandoned: bool = False


@dataclass
class Display:
    """Shows a run of `num_rounds` rounds.

    Attributes:
      title: one line above the table.
      num_rounds: the last round's number.
      budgets: target epsilon by unit ("client", "record"); None where there is no target.
      quiet: show nothing.
    """

    title: str
    num_rounds: int
    budgets: dict[str, float | None]
    quiet: bool = False
    _lines: list[ShownRound] = field(default_factory=list[ShownRound])
    _live: Live | None = None
    _start: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Self:
        self._console = Console(stderr=False)
        if self.quiet:
            return self
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, refresh_per_second=8)
            self._live.__enter__()
        else:
            print(self.title, flush=True)
        return self

    def __exit__(self, *problem: object) -> None:
        if self._live is not None:
            self._live.update(self._table())
            self._live.__exit__(None, None, None)

    def show(self, line: ShownRound) -> None:
        """Show one more round."""
        self._lines.append(line)
        if self._live is not None:
            self._live.update(self._table())
        elif not self.quiet and (
            line.round % max(1, self.num_rounds // LINES) == 0 or line.round in (1, self.num_rounds)
        ):
            print(self._plain(line), flush=True)

    def _plain(self, line: ShownRound) -> str:
        shown = [f"round {line.round:>{len(str(self.num_rounds))}}/{self.num_rounds}"]
        shown += [f"{name} {_number(value)}" for name, value in line.metrics.items()]
        shown += [f"{unit} epsilon {text}" for unit, text in self._epsilons(line)]
        shown.append(f"{line.replies} of {line.invited} clients")
        if line.abandoned:
            shown.append("abandoned: nothing was released")
        audit = line.audit.words() if line.audit and line.audit.fresh(line.round) else []
        return "\n".join(["  ".join(shown), *(f"  audit: {each}" for each in audit)])

    def _epsilons(self, line: ShownRound) -> list[tuple[str, str]]:
        rows: list[tuple[str, str]] = []
        for unit, value in (("client", line.client_epsilon), ("record", line.record_epsilon)):
            if value is None:
                continue
            budget = self.budgets.get(unit)
            spent = "infinite" if math.isinf(value) else f"{value:.3f}"
            rows.append((unit, spent if budget is None else f"{spent} of {budget:g}"))
        return rows

    def _table(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        names = list(self._lines[-1].metrics) if self._lines else []
        units = [unit for unit, _ in self._epsilons(self._lines[-1])] if self._lines else []
        for column in ("round", *names, *(f"epsilon ({unit})" for unit in units), "clients"):
            table.add_column(column, justify="right", min_width=9)
        for line in self._lines[-SHOWN_ROUNDS:]:
            clients = f"{line.replies}/{line.invited}" + (f" -{line.dropped}" if line.dropped else "")
            clients += " abandoned" if line.abandoned else ""
            values = [_number(value) for value in line.metrics.values()]
            table.add_row(str(line.round), *values, *(text for _, text in self._epsilons(line)), clients)
        return Group(Text(self.title, style="bold"), table, *self._bars())

    def _bars(self) -> list[RenderableType]:
        done = self._lines[-1].round if self._lines else 0
        seconds = time.monotonic() - self._start
        bars = [_bar("rounds", done, self.num_rounds, f"{done}/{self.num_rounds}  {seconds:.0f} s")]
        if self._lines:
            last = self._lines[-1]
            for unit, value in (("client", last.client_epsilon), ("record", last.record_epsilon)):
                budget = self.budgets.get(unit)
                if value is not None and budget is not None:
                    left = f"{value:.2f} of {budget:g} spent, {max(0.0, budget - value):.2f} left"
                    bars.append(_bar(f"epsilon ({unit})", value, budget, left))
                elif value is not None and math.isinf(value):
                    bars.append(Text(f"epsilon ({unit}) is infinite: nothing is promised", style="bold red"))
            if last.audit is not None:
                bars.append(panel(last.audit))
        return bars


def _bar(name: str, done: float, total: float, text: str) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    row.add_column(width=17)
    row.add_column(width=30)
    row.add_column()
    row.add_row(name, ProgressBar(total=total, completed=min(done, total), width=30), text)
    return row


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else str(value)


def panel(line: AuditLine) -> RenderableType:
    """Return the rows that stand under the bars of the budget."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=17)
    table.add_column()
    label = "audit"
    for text, style in rows_of(line):
        table.add_row(label, Text(text, style=style))
        label = ""
    return table


def rows_of(line: AuditLine) -> list[tuple[str, str]]:
    """Return what there is to say, each with its style."""
    rows: list[tuple[str, str]] = []
    if line.measured is not None:
        rows.append((_numbers(line.measured) + f" (round {line.measured.round})", ""))
    elif line.canaries:
        rows.append((f"{line.canaries} canary clients, not looked at yet", "dim"))
    rows += [(text, "") for text in (*line.of_records(), *line.found)]
    if line.alarms:
        rows += [(text, "bold red") for text in line.said()]
    elif line.checked:
        rows.append((f"noise as claimed ({seen(line.visible)}), and new in every round", "green"))
    return rows or [("nothing is claimed of this sum", "dim")]


def seen(visible: float) -> str:
    """Say which shortfall of noise the check of its size would have seen."""
    if visible == 1:
        return "updates hide even its absence"
    return f"{100 * visible:.1f} % less would be seen"


def _numbers(found: Measured) -> str:
    weak = ": too weak to tell" if found.ceiling <= found.claimed else ""
    return (
        f"claimed {_two_digits(found.claimed)}, measured {_two_digits(found.epsilon)} "
        f"({_two_digits(found.low)} to {_two_digits(found.high)}), could have shown {_two_digits(found.ceiling)}{weak}"
    )


def _two_digits(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "infinity"


def console_for(width: int) -> Console:
    """Return a console as wide as the terminal, or of this many columns where the output is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def warn(text: str) -> None:
    """Print one line of warning to stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print one line of a person's report."""
    print(text, flush=True)
