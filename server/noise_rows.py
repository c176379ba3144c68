"""Rows of a run: the release of each round, the earlier cohorts, and the stream of each row's noise.

If each round is a release of its own, row and round are the same. If several rounds form one release, the ledger
records every row before anything is sent, with its cohort unless the accounting relies on a secret draw. A cohort that
is known only once its clients have answered is recorded before their sum is noised: a crash before that released nothing,
and a crash after it leaves them counted. A declared simulation repeats a row bit for bit, so that row and round are the
same there too, but with a cohort by arrival, since it forgets which clients were at work. On real data a client never trains
the same update twice: a row that was reserved before a crash may have been released and is not used again; its clients
count as having taken part, and the round continues with the next row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from ..base.refusal import Refusal
from ..privacy.adaptation import NOTHING_ADAPTS
from ..privacy.ledger.ledger import BudgetExhausted, Ledger
from ..privacy.mechanisms.randomness import Randomness, Stream, keyed_stream
from ..privacy.sampling import NO_BOUNDS, Turns
from ..strategies.cohorts import Cohort
from .round_terms import SumPrivacy

ARRIVALS = "arrivals"  # of the notes on the ledger that say whose vectors are in a row's sum


@dataclass(frozen=True)
class RoundRows:
    """Rows of a run in which each round is a release of its own."""

    randomness: Randomness
    cohorts: tuple[()] = ()

    def skip_to(self, number: int) -> None:
        """Do nothing: rounds do not depend on each other."""

    def next(self, number: int) -> int:
        """Return the round's number."""
        return number

    def take(self, cohort: Sequence[int]) -> None:
        """Keep nothing."""

    def arrive(self, row: int, nodes: Sequence[int]) -> None:
        """Keep nothing."""

    def ledger_cohort(self, cohort: Sequence[int]) -> None:
        """Return None: the cohort is not recorded."""

    def stream_of(self, row: int) -> Stream:
        """Return a stream of the row's own."""
        return self.randomness.stream("noise", row)


class RowsExhausted(BudgetExhausted):
    """Every row of the run's noise is used, some by rounds that a crash lost."""

    def __init__(self, rows: int) -> None:
        # Past `BudgetExhausted`, whose sentence is about epsilon.
        Exception.__init__(
            self, f"all {rows} rows of the run's noise are used, some by rounds lost in a crash"
        )


@dataclass
class RunRows:
    """Rows of a run with correlated rounds.

    Attributes:
      count: number of rows.
      ledger: of the population.
      run: its name on the ledger.
      mechanism: the name of its sums on the ledger.
      randomness: seeded in a declared simulation.
      key: of the noise, 32 bytes; None if the randomness is seeded.
      secret: whether no file may reveal the cohorts.
      turns: of the cohort.
      cohorts: of the rows used so far, in their order; empty lists if they are secret.
    """

    count: int
    ledger: Ledger
    run: str
    mechanism: str
    randomness: Randomness
    key: bytes | None = field(repr=False)
    secret: bool = False
    turns: Turns = NO_BOUNDS
    cohorts: list[list[int]] = field(default_factory=list[list[int]])

    def __post_init__(self) -> None:
        self.stream_of = partial(self.randomness.stream, "noise")
        if self.key is not None:
            self.stream_of = partial(keyed_stream, self.key, "noise")
        elif not self.randomness.seeded:
            remedy = "noise that later rounds subtract needs a key that survives a crash"
            raise Refusal("noise_key", None, remedy)

    def skip_to(self, number: int) -> None:
        """Continue after round `number`, the last finished one; on real data rows that a crash lost stay used."""
        cohorts = self.ledger.cohorts(self.run, self.mechanism)
        if len(cohorts) < number:
            remedy = f"the ledger knows only {len(cohorts)} rounds of this run; restore it"
            raise Refusal("resume", number, remedy)
        if self.turns.by_arrival:
            notes = (self.ledger.note_of((self.run, row + 1, ARRIVALS)) for row in range(len(cohorts)))
            cohorts = [[int(node) for node in note.get("cohort", ())] for note in notes]
        is_repeated = self.randomness.seeded and not self.turns.by_arrival
        self.cohorts = cohorts[:number] if is_repeated else cohorts

    def next(self, number: int) -> int:
        """Return the next unused row, whatever the round.

        Raises:
          RowsExhausted: every row is used.
        """
        if len(self.cohorts) >= self.count:
            raise RowsExhausted(self.count)
        return len(self.cohorts) + 1

    def take(self, cohort: Sequence[int]) -> None:
        """Record the cohort of the next row; one by arrival is empty until `arrive`."""
        self.cohorts.append([] if self.turns.by_arrival else list(cohort))

    def arrive(self, row: int, nodes: Sequence[int]) -> None:
        """Record on the ledger whose vectors are in the sum of a row, of a cohort by arrival, before the sum is noised.

        Raises:
          AssertionError: the bounds on participation exclude one of them, or others are recorded; nothing may be released.
        """
        recorded = self.cohorts[row - 1] if self.turns.by_arrival else nodes
        if set(nodes) <= set(recorded) and len(set(nodes)) == len(nodes):
            return
        if again := self.turns.resting(self.cohorts[: row - 1]) & set(nodes):
            raise AssertionError(f"{len(again)} clients take part again before their turn")
        if recorded or len(set(nodes)) != len(nodes):
            raise AssertionError("a row has one cohort, and a client is in it once")
        self.ledger.note((self.run, row, ARRIVALS), {"cohort": sorted(nodes)})
        self.cohorts[row - 1] = sorted(nodes)

    def ledger_cohort(self, cohort: Sequence[int]) -> tuple[int, ...]:
        """Return the cohort, which later draws need; if the draw is secret or decides nothing, only that it took place."""
        return () if self.secret or self.turns.by_arrival else tuple(cohort)


Rows = RoundRows | RunRows


def create_rows(
    run: str, mechanism: str, cohort: Cohort, privacy: SumPrivacy | None, randomness: Randomness
) -> Rows:
    """Return the rows of a run, correlated if the plan's mechanism is; arguments as of `PrivateGrid` and `RunRows`.

    Raises:
      Refusal: the cohorts must be kept, and the plan keeps none; or a choice is adaptive.
    """
    if privacy is None or privacy.plan.mechanism.rows is None:
        if cohort.turns is not None:
            remedy = "only a plan for the whole run records earlier cohorts; give the plan a correlation"
            raise Refusal("cohort", cohort.name, remedy)
        return RoundRows(randomness)
    if privacy.adaptation != NOTHING_ADAPTS:
        remedy = "rounds that form one release are fixed in advance; turn adaptation off"
        raise Refusal("adaptation", privacy.adaptation, remedy)
    count, key = privacy.plan.mechanism.rows, privacy.noise_key
    return RunRows(
        count, privacy.ledger, run, mechanism, randomness, key, cohort.secret, cohort.turns or NO_BOUNDS
    )
