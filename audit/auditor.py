"""Auditor of a running run: it checks every released sum, measures at planned looks, and writes both to a file.

Its inputs are releases, canaries' seeds, and planted data. So it costs no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from ..privacy.audit.free_checks import NORM_TESTS, draw_p, draw_sums
from ..privacy.audit.interference import block_of
from ..privacy.audit.memorisation import MemorisationProbe, MemorisationResult, pooled_p
from ..privacy.audit.round_rows import LAYERS, Rows
from ..privacy.audit.run_audit import AuditTerms, Evidence, Measured, look_of
from ..privacy.audit.sum_audit import NO_MEMORY, Memory, empty_row, noise_p, noise_sums, watch
from ..privacy.audit.summary import Raised, Summary, summarise
from ..privacy.mechanisms.released_sum import ReleasedSum

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

CLEAN = 0.05  # a round none of whose p-values is below this gives no reason to suspect it
BOOKED = 0.99  # least share of the recomputed cost that the ledger must count: two accounts round differently
ACTING = (Level.RED, Level.YELLOW)  # the levels on which a run acts

Arrays = Mapping[str, NDArray[np.generic]]
Sums = NDArray[np.float64]


@dataclass
class Auditor:
    """Auditor of one run.

    Attributes:
      terms: fixed before the first round.
      path: the file of rows.
      directions: of the canaries, on which sums are projected; None without any, and where rows have the projections.
      coins: whether each canary was included, shape (canaries,).
      probes: of planted data.
      record_probe: measures canary records after a round; None without them.
      booked: returns the ledger's epsilon at the claim's delta; None without a ledger.
      prior: events on that ledger before the charges of this run's name; none if clients are in arms.
      start_round: last round that `prior` covers; 0 for none.
      memory: what the next check needs of the earlier sums; part of a checkpoint.
      looks: measurements by canary clients.
      record_looks: measurements by canary records.
      raised: the alarms.
      memorised: results of the probes at the last look.
      energy: sums over all rows of energies and of their dimensions, (2,).
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
    energy: Sums = field(default_factory=lambda: np.zeros(2))
    _row: Rows = field(init=False, repr=False)  # the last one; before the first, an empty one of round 0
    _count: int = 0  # rows that were judged
    # Sums over the rows since the last alarm of a test, or since its last red one, which together show small effects.
    _noise: Sums = field(default_factory=lambda: np.zeros((2, 1 + 2 * LAYERS)))
    _noise_since_red: Sums = field(default_factory=lambda: np.zeros((2, 1 + 2 * LAYERS)))
    _draws: Sums = field(default_factory=lambda: np.zeros(5))
    _alarm_state: AlarmState = field(init=False)

    def __post_init__(self) -> None:
        self._row = empty_row(0, self.terms.canaries)
        self._alarm_state = self.terms.alarms()

    @property
    def rows(self) -> Rows:
        """Rows so far, one for each released round, without their layers, read from the file.

        Raises:
          OSError: the file holds fewer, since somebody changed it.
        """
        rows = round_rows.read(self.path, self.terms.canaries, layers=False)
        rows = rows[rows["round"] > 0][: self._count]
        if len(rows) < self._count:
            raise OSError(f"{self.path} has {len(rows)} rows of {self._count} audited rounds")
        return rows

    def resume(self, last: int, memory: Memory) -> None:
        """Continue after round `last` with the memory of its checkpoint; drop later rows and judge the others again."""
        round_rows.cut(self.path, self.terms.canaries, last)
        self.replay(round_rows.chunks(self.path, self.terms.canaries))
        self.memory = memory

    def replay(self, chunks: Iterable[Rows]) -> None:
        """Judge the file's rows again, some at a time, which restores the looks, the alarms and the use of alpha."""
        for chunk in chunks:
            for row in chunk[chunk["round"] > 0]:
                self._judge(np.asarray(row))

    def take(self, number: int, released: ReleasedSum | None, arrays: Arrays) -> list[Alarm]:
        """Check the sum of round `number` and the resulting model, append its row, and return the alarms that it raises.

        A round with a claim but without a sum was abandoned: it released nothing, so it gets no row.

        Args:
          number: of the round.
          released: its released sum; None if it was abandoned, or if nothing is claimed about sums.
          arrays: the resulting model, by name.
        """
        if released is None and self.terms.delta:
            return []
        if released is None:
            row = empty_row(number, self.terms.canaries)
        else:
            block = block_of(number, self.terms.num_rounds)
            row, self.memory = watch(released, self.memory, self.directions, self.terms.canaries, block)
            row["norm_p"], row["draw_p"] = self._norm_p(row), self._draw_p(row)
        if self.booked is not None and self.terms.books_due(self._last_round, number):
            row["books_p"] = self._books_p(row, self.booked())
        if self.terms.due(self._last_round, number):
            self._probe(number, arrays, row)
        round_rows.append(self.path, row)
        return self._judge(row)

    def _probe(self, number: int, arrays: Arrays, row: Rows) -> None:
        """Look for planted data in the model after round `number`, and write the results into its row."""
        self.memorised = [result for probe in self.probes for result in probe.look(arrays, number)]
        if self.terms.probed:
            row["probe_p"] = pooled_p([each for each in self.memorised if not each.refutes])
        if self.terms.losses:
            row["losses_p"] = pooled_p([each for each in self.memorised if each.refutes])
        if self.record_probe is not None and (records := self.record_probe(number)) is not None:
            record_claim.write(row, records)

    def _draw_p(self, row: Rows) -> float:
        """Return the p-value of the cohorts' sizes under the claimed draw; 1 if the claim relies on no secret draw."""
        if not self.terms.clients:
            return 1.0
        return draw_p(
            self._draws + draw_sums(row["clients"], row["population"], float(row["rate"])), float(row["rate"])
        )

    def _norm_p(self, row: Rows) -> float:
        """Return one p-value of the noise: the smallest of this round's and of several rounds' tests, by Bonferroni.

        Only new evidence may confirm an alarm, so the rows since the last one count. All rows since the last red alarm
        count as well where they would be red at once.
        """
        noise = noise_sums(row[None])
        p_value = min(1.0, NORM_TESTS * min(float(row["norm_p"]), noise_p(self._noise + noise)))
        since_red = NORM_TESTS * noise_p(self._noise_since_red + noise)
        if since_red < CERTAIN * self.terms.alarms().threshold(Check.NORM):
            return min(p_value, since_red)
        return p_value

    def _books_p(self, row: Rows, booked: float) -> float:
        """Return 1 if the ledger's epsilon `booked` covers the cost of `prior` and of the sums since, by their rows, else 0."""
        rows = self.rows
        rows = np.append(rows, row[list(rows.dtype.names or ())].astype(rows.dtype))
        rows = rows[rows["round"] > self.start_round]
        return float(booked >= BOOKED * Evidence(self.terms, self.coins, rows).claimed_after(self.prior))

    @property
    def _last_round(self) -> int:
        """Number of the last released round; 0 before the first."""
        return int(self._row["round"])

    def _judge(self, row: Rows) -> list[Alarm]:
        """Add a row, measure if its round is a planned look, and return the alarms that this raises."""
        number = int(row["round"])
        due = self.terms.due(self._last_round, number)
        self._row, self._count = row, self._count + 1
        measured = self._measure() if due else None
        if measured is not None:
            self.looks.append(measured)
        records = record_claim.read(row, self.terms.record_epsilon)
        if records is not None:
            self.record_looks.append(records)
        look = look_of(self.terms, row, measured, records)
        self._alarm_state, alarms = look_at(self._alarm_state, look)
        # Blindness is no alarm, and is visible by the ceiling of `Measured`.
        raised = [alarm for alarm in alarms if alarm.level is not Level.BLIND]
        self.raised += [Raised(number, alarm) for alarm in raised]
        noise, levels = noise_sums(row[None]), {alarm.test: alarm.level for alarm in raised}
        self.energy = self.energy + noise[:, 0]
        self._noise = np.where(Check.NORM in levels, 0.0, self._noise + noise)
        is_red = levels.get(Check.NORM) is Level.RED
        self._noise_since_red = np.where(is_red, 0.0, self._noise_since_red + noise)
        self._draws = np.where(
            Check.DRAW in levels,
            0.0,
            self._draws + draw_sums(row["clients"], row["population"], float(row["rate"])),
        )
        return raised

    def _measure(self) -> Measured | None:
        """Return the measurement by canaries so far; None without canaries, or while too few were drawn."""
        if not self.terms.canaries:
            return None
        try:
            return Evidence(self.terms, self.coins, self.rows).measured()
        except Refusal:
            return None

    def end(self, first: Arrays, last: Arrays) -> Summary | None:
        """Return the summary of the run; None if no round was released.

        If canaries move the model, a row of round 0 is appended: the models' difference, projected on the canaries.

        Args:
          first: model before the first round, without its integers; empty if canaries do not move the model.
          last: model after the last round.
        """
        if not self._count:
            return None
        row = None
        if self.directions is not None and first:
            parts = [np.subtract(last[name], value, dtype=np.float64) for name, value in first.items()]
            moved = np.concatenate([np.ravel(part) for part in parts])
            row = empty_row(0, self.terms.canaries)
            row["norm"], row["along"] = np.linalg.norm(moved), self.directions.along(moved)
            round_rows.append(self.path, row)
        return summarise(Evidence(self.terms, self.coins, self.rows), self.raised, row)

    @property
    def is_clean(self) -> bool:
        """Whether there is a row, and no p-value of the last one is below `CLEAN`; a secret draw's would reveal its size."""
        row = self._row
        p_values = [row[name] for name in ("norm_p", "reuse_p", "probe_p", "losses_p", "books_p")]
        for looks in (self.looks, self.record_looks):
            if looks and looks[-1].round == int(row["round"]):
                p_values += list(looks[-1].p_values.values())
        return self._count > 0 and all(math.isnan(p) or p >= CLEAN for p in map(float, p_values))

    @property
    def has_probed(self) -> bool:
        """Whether planted data were looked for after the last round."""
        return self._count > 0 and not all(math.isnan(self._row[name]) for name in ("probe_p", "losses_p"))

    @property
    def p_values(self) -> Mapping[Check, float]:
        """P-values of the free checks of the last round, but that of a secret draw, which reveals its size."""
        p_values = look_of(self.terms, self._row, None).p_values if self._count else {}
        return {check: p for check, p in p_values.items() if check is not Check.DRAW}

    def columns(self, number: int) -> dict[str, Any]:
        """Return the audit's columns for the metrics line of `number`, the last round; none if it released nothing."""
        if self._last_round != number:
            return {}
        row = self._row
        columns: dict[str, Any] = {}
        if self.terms.delta:
            columns |= {f"{AUDIT}{name}": float(row[name]) for name in ("norm_p", "reuse_p")}
        for kind, looks in ((AUDIT, self.looks), (f"{AUDIT}records/", self.record_looks)):
            if looks and looks[-1].round == int(row["round"]):
                names = ("claimed", "epsilon", "low", "high", "ceiling")
                columns |= {f"{kind}{name}": getattr(looks[-1], name) for name in names}
        for result in self.memorised if self.has_probed else ():
            columns[f"{AUDIT}{result.name}_p"] = result.p_value
            columns |= {f"{AUDIT}{result.name}/{name}": value for name, value in result.figures.items()}
        return columns
