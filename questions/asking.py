"""Rounds of a planned question over the grid: one, or one for each letter of the commonest words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dp_accounting.dp_event import SelfComposedDpEvent

from ..messages.local_training import LocalTraining
from ..messages.training_order import ORDER_KEY, ClientClaim, RecordTerms, TrainingOrder
from ..modes.federation import Federation
from ..privacy.accounting.renyi_filter import admits, spent_epsilon
from ..privacy.arms import Arm
from ..privacy.budget import Release, Unit
from ..privacy.ledger.ledger import BudgetExhausted, Ledger
from ..privacy.ledger.question_caps import QUESTION
from ..privacy.plan import Plan
from ..privacy.statistics.evaluation import Evaluation
from ..privacy.statistics.figure import Figure, count_of, unsaid
from ..privacy.statistics.inquiry import CLIPPED, Answer, Inquiry, clipped_name
from ..privacy.statistics.prefixes import Prefixes
from ..run.files import OPERATOR
from ..run.queries import Reach
from ..server.participants import Participants
from ..server.round_terms import Round, unanswered
from .question_plan import budget_of, rate_of, sigma_of
from .sums import ROW, Charge, OwnCharges, QuestionAccount, Sums, put, sums_of
from .wire import Asked, question_content


@dataclass(frozen=True)
class Outcome:
    """Outcome of a question.

    Attributes:
      charge: of its last round.
      answers: empty if nothing may be released.
      cause: why nothing was released.
      rounds: number of reserved rounds.
      message_bytes: approximate sizes of all instructions to one client and of its replies; None where they are
        encrypted.
      dropped: counts of the clients whose answers were not added in the last round, by the reason that they sent.
    """

    charge: QuestionAccount
    answers: Sequence[Answer] = ()
    cause: str = ""
    rounds: int = 1
    message_bytes: tuple[int, int] | None = None
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Asking:
    """One question in progress."""

    federation: Federation
    plan: Plan
    ledger: Ledger | None
    participants: Participants
    reach: Reach

    def once(self, inquiry: Inquiry, row: int = ROW, sent: Inquiry | None = None) -> Outcome:
        """Ask in one round.

        Args:
          inquiry: what is asked.
          row: of the release under its name; it selects the streams of draws and noise.
          sent: what the clients are sent, under another name; None for the inquiry.
        """
        outcome, sums = self._round(inquiry, row, sent)
        if sums is None:
            return outcome
        return replace(outcome, answers=_answers(self.federation, inquiry, sums))

    def search(self, inquiry: Inquiry) -> Outcome:
        """Ask for the commonest words, one round for each letter, and extend only prefixes that exceed the noise."""
        (asked,) = inquiry.questions
        told: dict[str, Figure] = {}
        level, row, clipped, sizes = inquiry, 1, unsaid(CLIPPED), (0, 0)
        while True:
            outcome, sums = self._round(level, row)
            one = outcome.message_bytes
            sizes = sizes and one and (sizes[0] + one[0], sizes[1] + one[1])
            outcome = replace(outcome, rounds=row, message_bytes=sizes)
            if sums is None:
                return outcome
            statistic = level.questions[0].statistic
            assert isinstance(statistic, Prefixes)
            if row == 1:
                clipped = _answers(self.federation, level, sums)[0].clipped
            cells = sums.cells[asked.name] / rate_of(self.federation)
            sigma = sigma_of(self.federation, level, asked, sums.noise)
            ended, longer = statistic.select(cells, sigma)
            told |= {word: count_of(word, count, sigma) for word, count in ended.items()}
            if not longer:
                break
            outcome.charge.settle()
            level, row = inquiry.following(longer), row + 1
        best = sorted(told.values(), key=lambda each: -each.value)[: statistic.most]
        return replace(outcome, answers=(Answer(asked.name, tuple(best), clipped),))

    def _cause(self, done: Round) -> str:
        if self.federation.mode.hides_counts:
            return f"{unanswered(done, False)}; {OPERATOR} has the clients' reasons"
        return unanswered(done, True)

    def _round(self, inquiry: Inquiry, row: int, sent: Inquiry | None = None) -> tuple[Outcome, Sums | None]:
        """Return the outcome of a round without its answers, and the sums that they are read from, if it has any."""
        randomness, own_noise = self.reach.randomness, None
        charge: QuestionAccount
        if self.ledger is None:
            charge, own_noise = OwnCharges(self.plan, inquiry, randomness, row), self.plan.noise_over_clip
        else:
            charge = Charge(self.plan, self.ledger, inquiry, randomness, row)
        sent = sent or inquiry
        order = question_order(self.federation, sent, self.plan)
        charge.reserve()
        content = question_content(sent, order, own_noise, self.reach.released)
        masking = self.federation.masking
        done, mean = put(self.participants, charge, content, masking, self.reach.timeout)
        outcome = Outcome(charge, message_bytes=done.message_bytes)
        if mean is None:
            return replace(outcome, cause=self._cause(done), dropped=done.dropped), None
        return outcome, sums_of(charge, done, mean, masking is not None)


def require_all(ledger: Ledger, plan: Plan, inquiry: Inquiry) -> None:
    """Refuse a question of several rounds before the first one if a budget, of records too, or a cap does not cover all.

    Raises:
      BudgetExhausted: nothing was written.
    """
    if plan.num_rounds == 1:
        return  # the ledger's own gate refuses it
    rounds = dict.fromkeys(plan.adversaries, SelfComposedDpEvent(plan.event(), plan.num_rounds))
    whole = Release(
        plan.unit, inquiry.name, ROW, QUESTION, rounds, "system", segments=inquiry.purposes, kind=QUESTION
    )
    ledger.require_question(whole)
    for adversary in plan.adversaries:
        events = [*ledger.events(adversary), *[plan.event()] * plan.num_rounds]
        if not admits(events, ledger.budget, ledger.filter_order):
            budget = ledger.budget
            would = spent_epsilon(events, budget.target_delta, budget.adjacency, ledger.filter_order)
            raise BudgetExhausted(budget, adversary, would)
    for each in ledger.shared:
        each.require(whole)


def question_order(
    federation: Federation, asked: Asked, plan: Plan, arm: Arm | None = None
) -> dict[str, str]:
    """Return the order that travels with a question: it trains nothing and states the answer's cost.

    Args:
      federation: whose clients are asked.
      asked: the question.
      plan: calibrated, of one round.
      arm: the only arm whose clients are asked; None asks all.
    """
    from ..tasks.arrays import agreement_of  # torch, and plans know evaluations too

    client, record = None, None
    if asked.unit is Unit.CLIENT:
        client = ClientClaim(plan.noise, plan.adjacency)
    else:
        budget, rate = budget_of(federation, asked), federation.mode.question_rate
        epsilon, delta = budget.target_epsilon, budget.target_delta
        record = RecordTerms(epsilon, delta, plan.clipping_norm, plan.adjacency, sample_rate=rate)
    agreement, share = agreement_of(federation.task), asked.share if isinstance(asked, Evaluation) else None
    order = TrainingOrder(
        run=asked.name,
        privacy=federation.mode.name,
        training=LocalTraining(),
        client=client,
        record=record,
        agreement=agreement,
        held_out=share,
        group_equal_rows=federation.settings.group_equal_rows and share is not None,
        arm=arm,
        moments=federation.moments,
    )
    return {ORDER_KEY: order.to_json()}


def _answers(federation: Federation, inquiry: Inquiry, sums: Sums) -> Sequence[Answer]:
    rate = rate_of(federation)
    return [
        Answer(
            each.name,
            tuple(
                each.statistic.answer(
                    sums.cells[each.name] / rate, sigma_of(federation, inquiry, each, sums.noise)
                )
            ),
            inquiry.clipped_of(each, sums.cells[clipped_name(each)], sums.noise)
            if inquiry.unit is Unit.RECORD
            else inquiry.clipped(sums.clipped[clipped_name(each)], sums.noise, sums.clients),
        )
        for each in inquiry.questions
    ]
