"""Question round: one private sum without an update, reserved on the ledger before anybody is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dp_accounting.dp_event import GaussianDpEvent
from flwr.app import RecordDict

from ..privacy.budget import Release
from ..privacy.ledger.ledger import Ledger
from ..privacy.ledger.question_caps import QUESTION
from ..privacy.mechanisms.private_sum import Vector, add_noise
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sum_spec import SumSpec
from ..privacy.plan import Plan
from ..privacy.statistics.inquiry import Inquiry
from .masked_sums import MaskedSums
from .masking import Masking
from .open_sum import OpenSums
from .participants import Participants
from .round_terms import Mean, Round, Sum

ROW = 1  # a question is one release
# Grid units per clipping norm of a sum in the clear: rounding then moves a count by less than a part in 10^8 of its bound.
CELLS = 1 << 28


@dataclass
class Charge:
    """Account of one question: what is reserved, and the noise that was paid for; its functions are `Protected`'s.

    Attributes:
      plan: calibrated, of one round.
      ledger: of the population, open for writing.
      inquiry: what is asked; its name is the release's.
      randomness: where draws and noise come from.
    """

    plan: Plan
    ledger: Ledger
    inquiry: Inquiry
    randomness: Randomness

    def reserve(self) -> None:
        """Reserve the answer's release.

        Raises:
          BudgetExhausted: it does not fit; nothing was written.
          Refusal: a question of this name was asked before, or its purpose is not allowed.
        """
        self.ledger.reserve_new(self._release)

    def settle(self) -> None:
        """Commit it: the answer has left."""
        self.ledger.commit(self._release.key)

    def noised(self, total: Vector, row: int, spec: SumSpec) -> Vector:
        """Return a sum in the clear with its noise."""
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
    def _release(self) -> Release:
        events = dict.fromkeys(self.plan.adversaries, self.plan.event())
        segments = {each.name: each.purpose for each in self.inquiry.segments}
        key = (self.inquiry.name, ROW, QUESTION)
        kind = self.randomness.kind
        return Release(self.plan.unit, *key, events, kind, segments=segments, kind=QUESTION)


def put(
    participants: Participants,
    charge: Charge,
    content: RecordDict,
    masking: Masking | None,
    timeout: float | None,
) -> tuple[Round, Mean | None]:
    """Ask the cohort, and return what the round did and the noisy sums; None where nothing may be released.

    Args:
      participants: who is asked, and the grid that reaches them.
      charge: of the question, which is reserved already.
      content: the instruction's records.
      masking: encrypts the sum, to which the clients add the noise; None sums in the clear.
      timeout: seconds for the replies of one exchange; None waits for all.
    """
    sums = (
        OpenSums(participants, charge)
        if masking is None
        else MaskedSums(participants, charge, masking, charge.randomness)
    )
    drawn = participants.draw(charge.randomness.stream("cohort", ROW))
    wanted = Sum(
        charge.inquiry.name,
        ROW,
        content,
        "train",
        SumSpec(charge.plan.clipping_norm, charge.inquiry.segments, cells=CELLS),
        coordinates=0,
        noise_multiplier=charge.plan.noise_over_clip,
        number=ROW,
    )
    return sums.sum(drawn, wanted, {}, timeout, _nobody)


def _nobody() -> Sequence[int]:
    return ()
