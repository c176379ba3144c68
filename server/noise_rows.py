"""A run with correlated noise, row by row: who took part, and what is added to the sum.

The ledger holds every row and its cohort before anything is sent. A declared simulation repeats a row bit for bit, so
row and round are one. On real data nobody trains the same update twice: a row that was reserved before a crash may
have left and is never used again; its clients have taken part, and the round goes on with the next row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from dp_accounting.dp_event import DpEvent

from ..privacy.adaptation import NOTHING_ADAPTS
from ..privacy.ledger.ledger import BudgetExhausted, Ledger
from ..privacy.mechanisms.correlated_noise import NoiseRows
from ..privacy.mechanisms.private_sum import Vector
from ..privacy.mechanisms.randomness import Randomness, keyed_stream
from ..privacy.mechanisms.sum_spec import SumSpec
from ..privacy.plan import Plan
from ..privacy.refusal import Refusal
from ..strategies.cohorts import Cohort
from .round_terms import ClientPrivacy


class NoRowLeft(BudgetExhausted):
    """Every row of the run's noise is used: rounds that a crash lost have used theirs."""

    def __init__(self, rows: int) -> None:
        Exception.__init__(
            self, f"all {rows} rows of the run's noise are used, some by rounds lost in a crash"
        )


@dataclass
class RunRows:
    """The rows of one run.

    Attributes:
      plan: calibrated, with a correlation.
      ledger: of the population.
      name: what the ledger calls the run and the mechanism.
      randomness: seeded in a declared simulation.
      key: of the noise where the randomness is not seeded.
    """

    plan: Plan
    ledger: Ledger
    name: tuple[str, str]
    randomness: Randomness
    key: bytes | None = field(repr=False)
    cohorts: list[list[int]] = field(default_factory=list[list[int]])

    def __post_init__(self) -> None:
        assert self.plan.correlation is not None
        seeded = self.randomness.seed is not None
        if not seeded and self.key is None:
            raise Refusal(
                "noise_key", None, "noise that later rounds take back needs a key that survives a crash"
            )
        stream_of = (
            partial(self.randomness.stream, "noise")
            if self.key is None
            else partial(keyed_stream, self.key, "noise")
        )
        self._noise = NoiseRows(self.plan.correlation, stream_of)

    def skip_to(self, number: int) -> None:
        """Continue after round `number`, which an earlier process finished."""
        paid = self.ledger.cohorts(*self.name)
        if len(paid) < number:
            raise Refusal(
                "resume", number, f"the ledger knows only {len(paid)} rounds of this run; restore it"
            )
        self.cohorts = paid if self.randomness.seed is None else paid[:number]

    def next(self) -> int:
        """Return the row that comes next.

        Raises:
          NoRowLeft: all are used.
        """
        assert self.plan.correlation is not None
        if len(self.cohorts) >= self.plan.correlation.num_rounds:
            raise NoRowLeft(self.plan.correlation.num_rounds)
        return len(self.cohorts) + 1

    def add_noise(self, total: Vector, row: int, spec: SumSpec) -> tuple[Vector, DpEvent]:
        """Return the sum with this row's noise, and the event of the whole run."""
        return self._noise.add(total, row, self.plan.noise_over_clip, spec)


def rows_of(
    name: tuple[str, str], cohort: Cohort, privacy: ClientPrivacy | None, randomness: Randomness
) -> RunRows | None:
    """Return the rows of the run and mechanism of this name; None where each round is a release of its own.

    Raises:
      Refusal: who took part must be kept, and the plan keeps nothing; or something is to adapt.
    """
    correlation = None if privacy is None else privacy.plan.correlation
    if cohort.turns is not None and correlation is None:
        remedy = "who took part is kept with a plan for the whole run; give the plan a correlation"
        raise Refusal("cohort", cohort.name, remedy)
    if privacy is None or correlation is None:
        return None
    if privacy.adaptation != NOTHING_ADAPTS:
        remedy = "rounds that are one release together are fixed in advance; let nothing adapt"
        raise Refusal("adaptation", privacy.adaptation, remedy)
    return RunRows(privacy.plan, privacy.ledger, name, randomness, privacy.noise_key)
