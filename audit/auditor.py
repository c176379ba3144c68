"""Auditor of a running run: it checks every released sum, measures at planned looks, and writes both to a file.

Its inputs are releases, canaries' seeds, and planted data. So it costs no privacy.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..configs.round_line import AUDIT
from ..privacy.audit import record_claim, round_rows
from ..privacy.audit.alarms import CERTAIN, Alarm, AlarmState, Check, Level, look_at
from ..privacy.audit.canary_clients import Directions
from ..privacy.audit.free_checks import NORM_TESTS, draw_p
from ..privacy.audit.interference import block_of
from ..privacy.audit.memorisation import MemorisationProbe, MemorisationResult, pooled_p
from ..privacy.audit.round_rows import LAYERS, Rows
from ..privacy.audit.run_audit import AuditTerms, Evidence, Measured, look_of
from ..privacy.audit.sum_audit import NO_MEMORY, Memory, empty_row, layers_of, noise_p, watch
from ..privacy.audit.summary import Raised, Summary, summarise
from ..privacy.mechanisms.released_sum import ReleasedSum

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

CLEAN = 0.05  # a round none of whose p-values is below this gives no reason to suspect it
BOOKED = 0.99  # the ledger must count this share of the released sums' cost: two accounts round differently
FIRST_ROWS = 64  # initial capacity in rows
ACTING = (Level.RED, Level.YELLOW)  # the levels on which a run acts

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass
class Auditor:
    """Auditor of one run.

    Attributes:
      terms: fixed before the first round.
      path: the file of rows.
      directions: of the canaries; None without any, or after the audit has ended.
      coins: which canaries were included.
      probes: of planted data.
      record_probe: measures canary records after a round; None without them.
      booked: returns the ledger's epsilon at the claim's delta; None without one.
      prior, start_round: events on that ledger before the first row after `start_round`; none if clients are in arms.
      memory: from the last round.
      looks, record_looks: measurements by canaries and by canary records.
      raised, memorised: the alarms, and the last finding of the probe.
    """

    terms: AuditTerms
    path: Path
    directions: Directions | None = None
    coins: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    probes: Sequence[MemorisationProbe] = ()
    record_probe: Callable[[int], Measured | None] | None = None
    booked: Callable[[], float] | None = None
    prior: Sequence[DpEvent] = ()
    start_round: int = 0
    memory: Memory = NO_MEMORY
    looks: list[Measured] = field(default_factory=list[Measured])
    record_looks: list[Measured] = field(default_factory=list[Measured])
    raised: list[Raised] = field(default_factory=list[Raised])
    memorised: Sequence[MemorisationResult] = ()
    _room: Rows = field(init=False, repr=False)
    _count: int = 0
    _layers: dict[int, tuple[int, NDArray[np.float64]]] = field(
        default_factory=dict[int, tuple[int, "NDArray[np.float64]"]]
    )
    _alarms: AlarmState | None = None

    def __post_init__(self) -> None:
        self._room = round_rows.stack_rows([], self.terms.canaries)

    @property
    def rows(self) -> Rows:
        """The rows so far, one for each released round."""
        return self._room[: self._count]

    def _and(self, row: Rows) -> Rows:
        """Return the rows and one more; the capacity doubles, so that a long run does not copy all rows in every round."""
        if self._count == len(self._room):
            more = np.zeros(max(FIRST_ROWS, self._count), self._room.dtype)
            self._room = np.concatenate([self._room, more])
        self._room[self._count] = row
        return self._room[: self._count + 1]

    def go_on(self, last: int, memory: Memory) -> None:
        """Continue after round `last` with the memory of its checkpoint; drop later rows and test the others again."""
        rows = round_rows.read(self.path, self.terms.canaries)
        rows = rows[(rows["round"] > 0) & (rows["round"] <= last)]
        round_rows.cut(self.path, rows)
        self.replay(rows)
        self.memory = memory

    def replay(self, rows: Rows) -> None:
        """Judge recorded rounds again."""
        for row in rows:
            self._judge(np.asarray(row))

    def take(self, number: int, released: ReleasedSum | None, arrays: Arrays) -> list[Alarm]:
        """Check the sum of round `number` and the resulting model; return the alarms that this raises.

        A round whose claimed sum was abandoned released nothing, and is skipped.

        Args:
          number: of the round.
          released: its released sum; None without a claim about it.
          arrays: the resulting model, by name.
        """
        if released is None and self.terms.delta:
            return []
        due = self.terms.due(self._before, number)
        if released is None:
            row = empty_row(number, self.terms.canaries)
        else:
            block = block_of(number, self.terms.num_rounds)
            row, self.memory = watch(released, self.memory, self.directions, self.terms.canaries, block)
            row["norm_p"], row["draw_p"] = self._norm_p(row), self._draw_p(row)
        if self.booked is not None and self.terms.books_due(self._before, number):
            row["books_p"] = self._books_p(row, self.booked())
        if due:
            self._probe(number, arrays, row)
        round_rows.append(self.path, row)
        return self._judge(row)

    def _probe(self, number: int, arrays: Arrays, row: Rows) -> None:
        self.memorised = [memorised for probe in self.probes for memorised in probe.look(arrays, number)]
        for name, is_tested, refutes in (
            ("probe_p", self.terms.probed, False),
            ("losses_p", self.terms.losses, True),
        ):
            if is_tested:
                row[name] = pooled_p([each for each in self.memorised if each.refutes is refutes])
        if self.record_probe is not None and (records := self.record_probe(number)) is not None:
            record_claim.write(row, records)

    def _rows_after_alarm(self, test: Check, row: Rows, levels: Container[Level] = frozenset(Level)) -> Rows:
        """All rows since the last alarm of this test at these `levels`, including the new one: small effects add up."""
        alarms = (each for each in self.raised if each.alarm.test is test and each.alarm.level in levels)
        alarm_round = max((each.round for each in alarms), default=0)
        rows = self._and(row)
        return rows[bisect_right(rows["round"], alarm_round) :] if alarm_round else rows

    def _noise_p(self, rows: Rows) -> float:
        """Return `noise_p` of the last rows, with sums of layers that are kept from round to round."""
        begin = self._count + 1 - len(rows)
        start, sums = self._layers.get(begin, (begin, np.zeros((4, LAYERS))))
        for each in self._room[start : self._count]:
            sums = sums + layers_of(each[None])
        self._layers[begin] = self._count, sums
        return noise_p(rows, sums + layers_of(rows[-1:]))

    def _draw_p(self, row: Rows) -> float:
        if not self.terms.clients:
            return 1.0
        rows = self._rows_after_alarm(Check.DRAW, row)
        return draw_p(rows["clients"], rows["population"], float(row["rate"]))

    def _norm_p(self, row: Rows) -> float:
        """Return the p-value of this round's noise alone, and of all rounds' noise together, whole and by layer.

        A confirmation needs new evidence, so rows since the last alarm count; all rows since the last red alarm count
        if they are conclusive.
        """
        rows, red_rows = (
            self._rows_after_alarm(Check.NORM, row, levels) for levels in (frozenset(Level), {Level.RED})
        )
        p_value = min(1.0, NORM_TESTS * min(float(row["norm_p"]), self._noise_p(rows)))
        whole = NORM_TESTS * self._noise_p(red_rows)
        certain = whole < CERTAIN * self.terms.alarms().threshold(Check.NORM)
        return min(p_value, whole) if certain else p_value

    def _books_p(self, row: Rows, booked: float) -> float:
        """1 if the ledger's epsilon covers the separately computed cost of the sums and of its earlier entries; else 0."""
        rows = self._and(row)
        rows = rows[rows["round"] > self.start_round]
        return float(booked >= BOOKED * Evidence(self.terms, self.coins, rows).claimed_after(self.prior))

    @property
    def _before(self) -> int:
        return int(self.rows[-1]["round"]) if self._count else 0

    def _judge(self, row: Rows) -> list[Alarm]:
        number = int(row["round"])
        due = self.terms.due(self._before, number)
        self._count = len(self._and(row))
        measured = self.measure() if due and self.terms.canaries else None
        if measured is not None:
            self.looks.append(measured)
        records = record_claim.read(row, self.terms.record_epsilon)
        if records is not None:
            self.record_looks.append(records)
        look = look_of(self.terms, row, measured, records)
        self._alarms, alarms = look_at(self._alarms or self.terms.alarms(), look)
        # The ceiling of Measured reports blindness.
        raised = [alarm for alarm in alarms if alarm.level is not Level.BLIND]
        self.raised += [Raised(number, alarm) for alarm in raised]
        return raised

    def measure(self) -> Measured | None:
        """Return the measurement by canaries after the rounds so far; None while too few were drawn."""
        if not self.terms.canaries or not self._count:
            return None
        try:
            return Evidence(self.terms, self.coins, self.rows).measured()
        except Refusal:
            return None

    def end(self, first: Arrays | None, last: Arrays) -> Summary | None:
        """Return the summary of the run that led from the first arrays to the last; None without a round.

        The file gets a row of round 0 with the difference of the two models; `first` is None if canaries do not move
        the model.
        """
        if not self._count:
            return None
        row = None
        if self.directions is not None and first is not None:
            moved = [np.subtract(last[name], value, dtype=np.float64) for name, value in first.items()]
            whole = np.concatenate([np.ravel(part) for part in moved])
            row = empty_row(0, self.terms.canaries)
            row["norm"], row["along"] = np.linalg.norm(whole), self.directions.along(whole)
            round_rows.append(self.path, row)
        return summarise(Evidence(self.terms, self.coins, self.rows), self.raised, row)

    @property
    def clean(self) -> bool:
        """Whether the last round's p-values are unsuspicious; that of a secret draw would reveal its size."""
        row = self.rows[-1]
        p_values = [row[name] for name in ("norm_p", "reuse_p", "probe_p", "losses_p", "books_p")]
        for looks in (self.looks, self.record_looks):
            if looks and looks[-1].round == int(row["round"]):
                p_values += list(looks[-1].p_values.values())
        return all(math.isnan(p) or p >= CLEAN for p in map(float, p_values))

    @property
    def acting(self) -> list[Raised]:
        """The alarms on which the run acts."""
        return [each for each in self.raised if each.alarm.level in ACTING]

    @property
    def p_values(self) -> Mapping[Check, float]:
        """P-values of the free checks of the last round; none before the first. The one of a secret draw reveals its size."""
        p_values = look_of(self.terms, self.rows[-1], None).p_values if self._count else {}
        return {check: p for check, p in p_values.items() if check is not Check.DRAW}

    def columns(self, number: int) -> dict[str, Any]:
        """Return the numbers of the last round, `number`, for its line of metrics; none if it released nothing."""
        if self._before != number:
            return {}
        row = self.rows[-1]
        columns: dict[str, Any] = {}
        if self.terms.delta:
            columns |= {f"{AUDIT}{name}": float(row[name]) for name in ("norm_p", "reuse_p")}
        for kind, looks in ((AUDIT, self.looks), (f"{AUDIT}records/", self.record_looks)):
            if looks and looks[-1].round == int(row["round"]):
                names = ("claimed", "epsilon", "low", "high", "ceiling")
                columns |= {f"{kind}{name}": getattr(looks[-1], name) for name in names}
        if not math.isnan(float(row["probe_p"])) or not math.isnan(float(row["losses_p"])):
            for finding in self.memorised:
                columns[f"{AUDIT}{finding.name}_p"] = finding.p_value
                columns |= {f"{AUDIT}{finding.name}/{name}": value for name, value in finding.figures.items()}
        return columns
