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
from ..privacy.statistics.inquiry import CLIPPED, Answer, Inquiry, Question, clipped_name
from ..privacy.statistics.prefixes import Prefixes
from ..run.client_instructions import own_layers_of
from ..run.files import OPERATOR
from ..run.queries import Reach
from ..server.participants import Participants
from ..server.round_terms import Round, describe_failure
from .question_plan import budget_of, rate_of, sigma_of
from .sums import ROW, Charge, ClientCharges, QuestionAccount, Sums, ask_cohort, sums_of
from .wire import Request, question_content


@dataclass(frozen=True)
class Outcome:
    """Outcome of a question.

    Attributes:
      charge: of its last round.
      answers: empty if nothing may be released.
      cause: why nothing was released; empty with answers.
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
class QuestionRounds:
    """Rounds of one question."""

    federation: Federation  # of the clients
    plan: Plan  # of the question, calibrated
    ledger: Ledger | None  # that pays; None where each client charges its own
    participants: Participants  # clients, and the grid that reaches them
    reach: Reach  # how the clients answer

    def ask_once(self, inquiry: Inquiry, row: int = ROW, alias: Inquiry | None = None) -> Outcome:
        """Ask in one round, which is reserved here; the caller settles its charge once the answer is stored.

        Args:
          inquiry: the questions.
          row: of the release under its name; it selects the streams of draws and noise.
          alias: the same questions under the name that the clients get; None for the inquiry's own.
        """
        outcome, sums = self._round(inquiry, row, alias or inquiry)
        if sums is None:
            return outcome
        answers = [_answer(self.federation, inquiry, question, sums) for question in inquiry.questions]
        return replace(outcome, answers=answers)

    def search(self, inquiry: Inquiry) -> Outcome:
        """Ask for the commonest words, one round for each letter, and extend only prefixes that exceed the noise.

        Each round is reserved at the plan's noise before it is asked, so the choice of prefixes by noisy counts costs no
        more. All charges but the last are settled here; the caller settles that once the answer is stored.
        """
        (question,) = inquiry.questions
        figures: dict[str, Figure] = {}
        level, row, clipped = inquiry, 1, unsaid(CLIPPED)
        sizes: list[tuple[int, int] | None] = []
        while True:
            outcome, sums = self._round(level, row, level)
            sizes.append(outcome.message_bytes)
            outcome = replace(outcome, rounds=row, message_bytes=_total(sizes))
            if sums is None:
                return outcome
            (level_question,) = level.questions
            statistic = level_question.statistic
            assert isinstance(statistic, Prefixes)
            if row == 1:
                clipped = _answer(self.federation, level, level_question, sums).clipped
            cells = sums.cells[question.name] / rate_of(self.federation)
            sigma = sigma_of(self.federation, level, question, sums.noise)
            final_counts, longer_prefixes = statistic.select(cells, sigma)
            figures |= {word: count_of(word, count, sigma) for word, count in final_counts.items()}
            if not longer_prefixes:
                break
            outcome.charge.settle()
            level, row = inquiry.following(longer_prefixes), row + 1
        best = sorted(figures.values(), key=lambda each: -each.value)[: statistic.most]
        return replace(outcome, answers=(Answer(question.name, tuple(best), clipped),))

    def _round(self, inquiry: Inquiry, row: int, alias: Inquiry) -> tuple[Outcome, Sums | None]:
        """Reserve and ask one round; return its outcome without answers, and the sums that hold them, if it has any."""
        randomness, client_noise = self.reach.randomness, None
        charge: QuestionAccount
        if self.ledger is None:
            charge = ClientCharges(self.plan, inquiry, randomness, row)
            client_noise = self.plan.noise_over_clip
        else:
            charge = Charge(self.plan, self.ledger, inquiry, randomness, row)
        order = question_order(self.federation, alias, self.plan)
        charge.reserve()
        content = question_content(alias, order, client_noise, self.reach.released)
        masking = self.federation.masking
        result, mean = ask_cohort(self.participants, charge, content, masking, self.reach.timeout)
        outcome = Outcome(charge, message_bytes=result.message_bytes)
        if mean is None:
            return replace(outcome, cause=self._cause(result), dropped=result.dropped), None
        return outcome, sums_of(charge, result, mean, is_masked=masking is not None)

    def _cause(self, result: Round) -> str:
        """Return why a round released nothing; where counts are secret, the clients' reasons are the operator's."""
        if self.federation.mode.hides_counts:
            return f"{describe_failure(result, False)}; {OPERATOR} has the clients' reasons"
        return describe_failure(result, True)


def _total(sizes: Sequence[tuple[int, int] | None]) -> tuple[int, int] | None:
    """Return the sums of the rounds' (bytes down, bytes up); None if one is not known."""
    pairs = [each for each in sizes if each]
    if len(pairs) < len(sizes):
        return None
    return sum(down for down, _ in pairs), sum(up for _, up in pairs)


def require_all_rounds(ledger: Ledger, plan: Plan, inquiry: Inquiry) -> None:
    """Refuse a question of several rounds if a cap or a budget, of records too, does not cover them all.

    Raises:
      BudgetExhausted: nothing was written.
    """
    if plan.num_rounds == 1:
        return  # the ledger's own gate refuses it
    all_rounds = Release(
        plan.unit,
        run=inquiry.name,
        round=ROW,
        mechanism=QUESTION,
        events=dict.fromkeys(plan.adversaries, SelfComposedDpEvent(plan.event(), plan.num_rounds)),
        rng="system",
        segments=inquiry.purposes,
        kind=QUESTION,
    )
    ledger.require_question(all_rounds)
    for adversary in plan.adversaries:
        events = [*ledger.events(adversary), *[plan.event()] * plan.num_rounds]
        if not admits(events, ledger.budget, ledger.filter_order):
            budget = ledger.budget
            epsilon = spent_epsilon(events, budget.target_delta, budget.adjacency, ledger.filter_order)
            raise BudgetExhausted(budget, adversary, epsilon)
    for each in ledger.shared:
        each.require(all_rounds)


def question_order(
    federation: Federation, request: Request, plan: Plan, arm: Arm | None = None
) -> dict[str, str]:
    """Return the order that travels with a question: it trains nothing and states the answer's cost.

    Args:
      federation: whose clients are asked.
      request: the question.
      plan: calibrated, of one round.
      arm: the only arm whose clients are asked; None asks all.
    """
    from ..tasks.arrays import agreement_of  # torch, and plans know evaluations too

    client, record = None, None
    if request.unit is Unit.CLIENT:
        client = ClientClaim(plan.noise, plan.adjacency)
    else:
        budget = budget_of(federation, request)
        record = RecordTerms(
            budget.target_epsilon,
            budget.target_delta,
            plan.clipping_norm,
            plan.adjacency,
            sample_rate=federation.mode.question_rate,
        )
    share = request.share if isinstance(request, Evaluation) else None
    order = TrainingOrder(
        run=request.name,
        privacy=federation.mode.name,
        training=LocalTraining(),
        client=client,
        record=record,
        agreement=agreement_of(federation.task),
        held_out=share,
        group_equal_rows=federation.settings.group_equal_rows and share is not None,
        arm=arm,
        moments=federation.moments,
        own_layers=own_layers_of(federation.settings),
    )
    return {ORDER_KEY: order.to_json()}


def _answer(federation: Federation, inquiry: Inquiry, question: Question, sums: Sums) -> Answer:
    """Return the answer to one question of an inquiry, from the content of its sum."""
    cells = sums.cells[question.name] / rate_of(federation)  # estimated for all clients, drawn or not
    figures = question.statistic.answer(cells, sigma_of(federation, inquiry, question, sums.noise))
    name = clipped_name(question)
    if inquiry.unit is Unit.RECORD:
        clipped = inquiry.clipped_of(question, sums.cells[name], sums.noise)
    else:
        clipped = inquiry.clipped(sums.clipped[name], sums.noise, sums.clients)
    return Answer(question.name, tuple(figures), clipped)
