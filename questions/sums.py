"""Question round: one private sum without a model update, reserved on the ledger before any client is asked.

At the client level the counts are segments of the sum. At the record level they take the place of the update: each
client sends the sum of its records' contributions, as in a step on the records of all clients. With `privacy=record`
each client adds its own noise before it answers, and charges its own ledger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dp_accounting.dp_event import GaussianDpEvent
from flwr.app import RecordDict

from ..privacy.arms import Arm
from ..privacy.budget import Release, Unit
from ..privacy.ledger.ledger import Ledger
from ..privacy.ledger.question_caps import QUESTION
from ..privacy.mechanisms.private_sum import Vector, add_noise
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sum_spec import WEIGHT, Segment, SumSpec
from ..privacy.plan import Plan
from ..privacy.statistics.inquiry import Inquiry
from ..server.accounts import Unnoised
from ..server.masking import Masking
from ..server.participants import Participants
from ..server.private_grid import sums_over
from ..server.round_terms import Mean, Round, Sum
from .wire import Request, update_layout

ROW = 1  # most inquiries are one release
# Grid units per clipping norm of a sum in the clear: rounding then moves a count by less than a part in 10^8 of its bound.
CELLS = 1 << 28


@dataclass
class Charge:
    """Account of one round of a question: its reservation, and its noise; methods as of `Protected`.

    Attributes:
      plan: calibrated, of one round.
      ledger: that pays, open for writing.
      inquiry: the questions, or an evaluation; the release has its name.
      randomness: source of draws and noise.
      row: of the release, under that name.
      arm: of a question to one arm; None for all clients.
    """

    plan: Plan
    ledger: Ledger
    inquiry: Request
    randomness: Randomness
    row: int = ROW
    arm: Arm | None = None

    def reserve(self) -> None:
        """Reserve the answer's release on the ledger, before any client is asked.

        Raises:
          BudgetExhausted: it does not fit; nothing was written.
          Refusal: a question of this name was asked before, or its purpose is not allowed.
        """
        self.ledger.reserve_new(self._release)

    def settle(self) -> None:
        """Commit the release on the ledger, once the answer is released or stored."""
        self.ledger.commit(self._release.key)

    def arrive(self, row: int, nodes: Sequence[int]) -> None:
        """Record nothing: all clients are asked."""

    def noised(self, total: Vector, row: int, spec: SumSpec) -> Vector:
        """Return a sum in the clear with the reserved noise, drawn from the row's own stream."""
        noise = self.plan.noise_over_clip
        noised, event = add_noise(total, noise, spec, self.randomness.stream("noise", row))
        if event != self.plan.mechanism.event(noise):
            raise AssertionError("the mechanism's event is not the one that was reserved")
        return noised

    def check(self, event: GaussianDpEvent) -> None:
        """Fail where the noise that clients added is less than what was reserved."""
        if event.noise_multiplier < self.plan.noise_over_clip:
            raise AssertionError("the sum has less noise than was reserved")

    def units(self, clients: float) -> float:
        """Return the number of clients: each is one unit."""
        return clients

    @property
    def spec(self) -> SumSpec:
        """Public parameters of the sum: of segments, or of records' contributions."""
        norm = self.plan.clipping_norm
        if self.inquiry.unit is Unit.CLIENT:
            return SumSpec(norm, self.inquiry.segments, cells=CELLS)
        return self.inquiry.spec_of_records(norm)

    @property
    def _release(self) -> Release:
        return Release(
            self.plan.unit,
            run=self.inquiry.name,
            round=self.row,
            mechanism=QUESTION,
            events=dict.fromkeys(self.plan.adversaries, self.plan.event()),
            rng=self.randomness.kind,
            segments=self.inquiry.purposes,
            kind=QUESTION,
            arm=self.arm,
        )


@dataclass(frozen=True)
class ClientCharges(Unnoised):
    """Account of one round of a question where each client adds its own noise and charges its own ledger; as `Charge`."""

    plan: Plan
    inquiry: Inquiry
    randomness: Randomness
    row: int = ROW

    def reserve(self) -> None:
        """Do nothing: each client reserves before it answers."""

    def settle(self) -> None:
        """Do nothing: each client commits on its own ledger."""

    @property
    def spec(self) -> SumSpec:
        """Spec of a plain sum of vectors that have their noise already; all clients have equal weight."""
        return SumSpec(None, (Segment(WEIGHT, 1.0),))


QuestionAccount = Charge | ClientCharges


@dataclass(frozen=True)
class Sums:
    """Content of a question's sum.

    Attributes:
      cells: of each question by its name, in rows; at the record level also the numbers of clipped and unclipped rows.
      clipped: the mean share of clipped rows of a question, by the name of its segment; empty at the record level.
      noise: standard deviation of the noise over the norm of one unit.
      clients: number by which the sum is divided for a mean over clients.
    """

    cells: Mapping[str, Vector]
    clipped: Mapping[str, float]
    noise: float
    clients: float


def sums_of(charge: QuestionAccount, result: Round, mean: Mean, is_masked: bool) -> Sums:
    """Return the content of a question's sum, in rows: at the record level the round's mean times its divisor.

    Args:
      charge: of the round.
      result: the round's result.
      mean: released by the round.
      is_masked: whether the sum was encrypted, so that its noise is relative to the range of a vector.
    """
    inquiry = charge.inquiry
    if inquiry.unit is Unit.CLIENT:
        return Sums(mean.counts, mean.scalars, mean.noise, mean.denominator)
    noise, clients, unit_norm = mean.noise, mean.denominator, 1.0
    if isinstance(charge, ClientCharges):  # a mean over those who answered, each with noise of its own
        clients = float(result.replies)
        noise = charge.plan.noise_over_clip * math.sqrt(result.replies)
    else:
        spec = charge.spec
        assert spec.unit_norm is not None and spec.clipping_norm is not None
        unit_norm = spec.unit_norm
        if is_masked:
            noise *= spec.clipping_norm / unit_norm
    cells = {name: mean.arrays[name] * (clients / unit_norm / inquiry.scale(name)) for name in inquiry.layout}
    return Sums(cells, {}, noise, clients)


def ask_cohort(
    participants: Participants,
    charge: QuestionAccount,
    content: RecordDict,
    masking: Masking | None,
    timeout: float | None,
    message_type: str = "train",
) -> tuple[Round, Mean | None]:
    """Ask the cohort, and return the round's result and the noisy sums; None if nothing may be released.

    Args:
      participants: the clients, and the grid that reaches them.
      charge: of the round, which is reserved already.
      content: the instruction's records.
      masking: encrypts the sum, to which the clients add the noise; None sums in the clear.
      timeout: seconds for the replies of one exchange; None waits for all.
      message_type: of the instruction, which selects the function of a Flower app.
    """
    sums = sums_over(participants, charge, masking, charge.randomness)
    # Canaries get no questions: they audit the claims of training.
    stream = charge.randomness.stream("cohort", charge.row)
    cohort = participants.real(participants.draw(stream, arm=participants.arm))
    request = Sum(
        charge.inquiry.name,
        charge.row,
        content,
        message_type,
        charge.spec,
        update_layout(charge.inquiry),
        noise_multiplier=charge.plan.noise_over_clip,
        number=charge.row,
    )
    return sums.sum(cohort, request, timeout, lambda: ())
