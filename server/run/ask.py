"""Question to a federation's clients, from settings to an answer that is kept: planned, refused or charged, asked, recorded.

What was answered under a name is answered from the record and costs nothing. A new answer takes a new name: its noise is
drawn anew, and it is charged anew.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dp_accounting.dp_event import SelfComposedDpEvent
from flwr.serverapp import Grid

from ...configs.local_training import LocalTraining
from ...privacy.accounting.epsilon import PUBLISH_INTERVAL
from ...privacy.accounting.renyi_filter import admits, counted
from ...privacy.budget import Budget, Release, Unit
from ...privacy.ledger.durable_files import replace_file
from ...privacy.ledger.ledger import BudgetExhausted, Ledger, LedgerUnavailable
from ...privacy.ledger.question_caps import QUESTION
from ...privacy.mechanisms.randomness import Randomness
from ...privacy.plan import LEAST_NOISE, MOST_NOISE, Plan
from ...privacy.refusal import Refusal
from ...privacy.statistics.figure import Figure, count_of, unsaid
from ...privacy.statistics.inquiry import CLIPPED, Answer, Inquiry, Question, clipped_name
from ...privacy.statistics.prefixes import Prefixes
from ...reports.files import OF_RECORDS
from ...strategies.cohorts import All, Poisson
from ...strategies.question_wire import question_content
from ...strategies.record_plan import PoissonBatches
from ...strategies.training_order import ORDER_KEY, ClientClaim, RecordOrder, TrainingOrder
from ..participants import Participants
from ..questions import ROW, Charge, OwnCharges, QuestionAccount, Sums, put, sums_of
from ..round_terms import ALL_ANSWERS, Answers, Round
from .client_instructions import task_options
from .federation import EVERYBODY, Federation
from .prepare import open_ledger
from .run_folder import make_folder

SYSTEM = Randomness()
TOO_FEW = "too few clients answered"
# By what is hidden, where nobody says how.
PRIVACY_OF_QUESTIONS = {Unit.CLIENT: "client_central", Unit.RECORD: "record_distributed"}
MOST_QUESTION_NOISE = 2.0**10  # above it an answer is noise alone, whatever is asked


@dataclass(frozen=True)
class Spend:
    """What one inquiry may cost: an epsilon of its own, or the noise that makes it; exactly one is given.

    Attributes:
      epsilon: that the inquiry alone costs, at the delta of the federation's budget.
      noise_multiplier: standard deviation of the noise over the sensitivity.
    """

    epsilon: float | None = None
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise Refusal(
                "epsilon", self.epsilon, "say what the question may cost: epsilon or noise_multiplier"
            )


@dataclass(frozen=True)
class Reach:
    """How a federation's clients are reached for a question.

    Attributes:
      grid: opens the grid, as long as a context lasts.
      answers: by how many a question goes.
      timeout: seconds for the replies of one exchange; None waits for all.
      randomness: where draws and noise come from; seeded for a declared simulation alone.
    """

    grid: Callable[[], AbstractContextManager[Grid]]
    answers: Answers = ALL_ANSWERS
    timeout: float | None = None
    randomness: Randomness = SYSTEM


def ask(federation: Federation, inquiry: Inquiry, spend: Spend, folder: Path, reach: Reach) -> dict[str, Any]:
    """Ask a federation's clients, and return the record of what they said, which `folder` keeps.

    Args:
      federation: whose clients are hidden as a whole.
      inquiry: what is asked.
      spend: what it may cost.
      folder: of records; in a simulation its ledger lies there too.
      reach: how the clients are reached.

    Raises:
      Refusal: nothing was charged.
      BudgetExhausted: it does not fit; nothing was charged.
    """
    kept = record_path(folder, inquiry)
    if kept.exists():
        return _from_record(kept, federation, inquiry)
    plan = question_plan(federation, inquiry, spend)
    check_resolution(federation, inquiry, plan)
    make_folder("into", folder)
    budget = federation.sum_budget
    home = folder / OF_RECORDS if inquiry.unit is Unit.RECORD else folder  # a ledger is of one unit
    ledger = None if budget is None else open_ledger(federation, home, budget)
    try:
        if ledger is not None:
            ledger.purpose = inquiry.why or None
            _require_all(ledger, plan, inquiry)
        before = None if ledger is None else ledger.epsilon()
        with reach.grid() as grid:
            participants = Participants(
                grid,
                federation.cohort,
                federation.num_clients,
                reach.answers,
                population=federation.population,
            )
            participants.some(1)  # once the clients are connected
            asking = Asking(federation, plan, ledger, participants, reach)
            ended = asking.search(inquiry) if inquiry.levels > 1 else asking.once(inquiry)
        record = _record(asking, inquiry, before, ended)
        if ended.answers:
            replace_file(kept, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
            ended.charge.settle()
        return record
    finally:
        with suppress(LedgerUnavailable):  # of a note only: what was reserved stays spent
            if ledger is not None:
                ledger.close()


@dataclass(frozen=True)
class Outcome:
    """What a question came to.

    Attributes:
      charge: of its last round.
      answers: empty where nothing may be released.
      cause: why, then.
      rounds: that were reserved.
    """

    charge: QuestionAccount
    answers: Sequence[Answer]
    cause: str = ""
    rounds: int = 1


@dataclass(frozen=True)
class Asking:
    """One question that is being asked.

    Attributes:
      federation: whose clients are asked.
      plan: calibrated, of all rounds.
      ledger: of the population, open for writing; None where each client charges its own.
      participants: who is asked.
      reach: how.
    """

    federation: Federation
    plan: Plan
    ledger: Ledger | None
    participants: Participants
    reach: Reach

    def once(self, inquiry: Inquiry) -> Outcome:
        """Ask in one round."""
        charge, done, sums = self._round(inquiry, 1)
        if sums is None:
            return Outcome(charge, (), done.cause or TOO_FEW)
        return Outcome(charge, _answers(self.federation, inquiry, sums))

    def search(self, inquiry: Inquiry) -> Outcome:
        """Ask for the commonest words, a round a letter, and follow the prefixes that noise alone did not make."""
        (asked,) = inquiry.questions
        told: dict[str, Figure] = {}
        level, row, clipped = inquiry, 1, unsaid(CLIPPED)
        while True:
            charge, done, sums = self._round(level, row)
            if sums is None:
                return Outcome(charge, (), done.cause or TOO_FEW, row)
            statistic = level.questions[0].statistic
            assert isinstance(statistic, Prefixes)
            if row == 1:
                clipped = _answers(self.federation, level, sums)[0].clipped
            cells = sums.cells[asked.name] / _rate(self.federation)
            sigma = _sigma(self.federation, level, asked, sums.noise)
            ended, longer = statistic.found(cells, sigma)
            told |= {word: count_of(word, count, sigma) for word, count in ended.items()}
            if not longer:
                break
            charge.settle()
            level, row = inquiry.following(longer), row + 1
        best = sorted(told.values(), key=lambda each: -each.value)[: statistic.most]
        return Outcome(charge, (Answer(asked.name, tuple(best), clipped),), rounds=row)

    def _round(self, inquiry: Inquiry, row: int) -> tuple[QuestionAccount, Round, Sums | None]:
        randomness, own_noise = self.reach.randomness, None
        charge: QuestionAccount
        if self.ledger is None:
            charge, own_noise = OwnCharges(self.plan, inquiry, randomness, row), self.plan.noise_over_clip
        else:
            charge = Charge(self.plan, self.ledger, inquiry, randomness, row)
        charge.reserve()
        content = question_content(inquiry, _order(self.federation, inquiry, self.plan), own_noise)
        masking = self.federation.masking
        done, mean = put(self.participants, charge, content, masking, self.reach.timeout)
        return charge, done, None if mean is None else sums_of(charge, done, mean, masking is not None)


def _require_all(ledger: Ledger, plan: Plan, inquiry: Inquiry) -> None:
    """Refuse a question of several rounds before the first one, where budget or owners do not afford them all.

    Raises:
      BudgetExhausted: nothing was written.
    """
    if plan.num_rounds == 1:
        return  # the ledger's own gate says it
    key, told = (inquiry.name, ROW, QUESTION), inquiry.asked
    rounds = dict.fromkeys(plan.adversaries, SelfComposedDpEvent(plan.event(), plan.num_rounds))
    ledger.require_asked(Release(plan.unit, *key, rounds, "system", segments=told, kind=QUESTION))
    for adversary in plan.adversaries:
        events = [*ledger.events(adversary), *[plan.event()] * plan.num_rounds]
        if not admits(events, ledger.budget, ledger.filter_order):
            budget = ledger.budget
            would = counted(events, budget.target_delta, budget.adjacency, ledger.filter_order)
            raise BudgetExhausted(budget, adversary, would)


def record_path(folder: Path, inquiry: Inquiry) -> Path:
    """Return where the answer under an inquiry's name is kept.

    Raises:
      Refusal: the name is none of a file.
    """
    if (
        not inquiry.name.replace("-", "").replace("_", "").replace(".", "").isalnum()
        or inquiry.name[0] == "."
    ):
        raise Refusal(
            "name", inquiry.name, "give letters, digits, '-', '_' and '.': the answer is kept under it"
        )
    return folder / f"{inquiry.name}.json"


def _from_record(path: Path, federation: Federation, inquiry: Inquiry) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        others = found["owner"] != _owner(federation)
        same = json.dumps(found["question"], sort_keys=True) == json.dumps(
            json.loads(inquiry.text), sort_keys=True
        )
    except (OSError, ValueError, LookupError, TypeError) as problem:
        raise Refusal("name", inquiry.name, f"has a record that cannot be read ({problem})") from problem
    if not same:
        raise Refusal("name", inquiry.name, f"was asked something else ({path}); take a new name")
    if others:
        raise Refusal("name", inquiry.name, f"was asked of other clients ({path}); take a new name or folder")
    return {**found, "from_record": True}


def _owner(federation: Federation) -> str:
    """Return what names the clients: as on their ledger, and of simulated ones all that their data are made from."""
    if not federation.simulated:
        return federation.owner
    task = federation.settings.task
    made = [task.name, task.target, task_options(federation.settings, federation.seed)]
    return hashlib.sha256(json.dumps(made, sort_keys=True, default=repr).encode()).hexdigest()


# --- the plan -----------------------------------------------------------------------------------------------------


def question_plan(federation: Federation, inquiry: Inquiry, spend: Spend) -> Plan:
    """Return the plan of a question: one round of the cohort, with the noise that is paid for.

    Args:
      federation: whose clients, or records, are hidden.
      inquiry: says which.
      spend: what it may cost.

    Raises:
      Refusal: the federation hides something else, or its cohort is not one that a question has.
    """
    budget = _budget(federation, inquiry)
    of_records = inquiry.unit is Unit.RECORD
    if not isinstance(federation.cohort, All if of_records else All | Poisson):
        remedy = "questions go to all clients, or, where clients are hidden, to a Poisson draw of them"
        raise Refusal("cohort", federation.cohort.name, remedy)
    plan = Plan(
        budget.unit,
        budget.adjacency,
        PoissonBatches(1.0, 1) if of_records else federation.cohort,
        1.0 if federation.summed is None else federation.unit_norm,
        inquiry.levels,
        spend.noise_multiplier,
        EVERYBODY if of_records else federation.adversaries,
    )
    if spend.epsilon is not None:
        plan = plan.calibrate(replace(budget, target_epsilon=spend.epsilon))
    assert plan.noise_multiplier is not None
    if not LEAST_NOISE <= plan.noise_multiplier <= MOST_QUESTION_NOISE:
        raise Refusal("noise_multiplier", plan.noise_multiplier, "leaves no answer; give more epsilon")
    return plan


def _budget(federation: Federation, inquiry: Inquiry) -> Budget:
    """Return the budget of whoever a question is charged to.

    Raises:
      Refusal: the federation does not hide what the question says that it hides.
    """
    settings = federation.settings
    both = federation.summed is not None and federation.record is not None
    found = federation.sum_budget or federation.record_budget
    if found is None or both:
        remedy = (
            "hides nobody, or two units at once, and a question is charged to one: choose client_central, "
        )
        raise Refusal(
            "privacy", settings.privacy.name, f"{remedy}client_distributed, record or record_distributed"
        )
    if found.unit is not inquiry.unit:
        if found.unit in (Unit.PERSON, Unit.PERSON_EVERYWHERE):
            remedy = "a question counts rows, and a person may have several; leave it out"
            raise Refusal("privacy.per_person", federation.per_person, remedy)
        remedy = f"privacy={settings.privacy.name} hides a {found.unit}: ask with unit={found.unit}, or choose another"
        raise Refusal("unit", str(inquiry.unit), remedy)
    if federation.record is not None and federation.settings.secagg is not None:
        remedy = "sums answers that are noised already in the clear; leave it out, or take record_distributed"
        raise Refusal("secagg", "on", f"privacy=record {remedy}")
    return found


def check_resolution(federation: Federation, inquiry: Inquiry, plan: Plan) -> None:
    """Refuse a question whose planned interval is wider than the resolution that it asks for.

    Raises:
      Refusal: naming the epsilon or the rows that would do.
    """
    for each in inquiry.questions:
        if each.resolution is None:
            continue
        planned = planned_half_width(federation, inquiry, each, plan)
        if planned is None:
            raise Refusal(
                "at_least", None, f"say how many rows there are, so that {each.name} can be planned"
            )
        if planned > each.resolution:
            raise Refusal(
                "resolution", each.resolution, _what_would_do(federation, inquiry, each, plan, planned)
            )


def planned_half_width(
    federation: Federation, inquiry: Inquiry, question: Question, plan: Plan
) -> float | None:
    """Return half the width of the interval that is planned; None where it goes by rows that nobody has told of."""
    sigma = _sigma(federation, inquiry, question, _noise_of(federation, plan.noise_over_clip))
    rows = question.at_least
    if rows is None:
        ends = [question.statistic.planned(sigma, each) for each in (1.0, 2.0)]
        return ends[0] if ends[0] == ends[1] else None
    return question.statistic.planned(sigma, rows)


def _what_would_do(
    federation: Federation, inquiry: Inquiry, question: Question, plan: Plan, planned: float
) -> str:
    """Return a clause: the epsilon at which the interval would be as wide as it may be, and the rows."""
    assert question.resolution is not None

    def half(noise: float) -> float:
        found = planned_half_width(federation, inquiry, question, replace(plan, noise_multiplier=noise))
        assert found is not None
        return found

    said = f"{question.name} is planned to +-{planned:.3g}"
    low, high = LEAST_NOISE, plan.noise_multiplier or MOST_NOISE
    if half(low) > question.resolution:
        return f"{said}, and no epsilon would do; ask for less, or of more clients"
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if half(middle) <= question.resolution else (low, middle)
    enough = replace(plan, noise_multiplier=low).epsilon(_budget(federation, inquiry).target_delta)
    said = f"{said}; epsilon {enough:.3g} would do"
    if question.at_least is not None:
        rows = question.at_least
        while (
            question.statistic.planned(
                _sigma(federation, inquiry, question, _noise_of(federation, plan.noise_over_clip)), rows
            )
            > question.resolution
            and rows < 1e12
        ):
            rows *= 1.05
        said += f", or {math.ceil(rows)} rows" if rows < 1e12 else ""
    return said


def _sigma(federation: Federation, inquiry: Inquiry, question: Question, noise_over_clip: float) -> float:
    """Return the standard deviation of a cell, in rows, of an answer that stands for all clients.

    Of a Poisson draw the cells are divided by its rate, and who was not drawn adds an error: no more than every client's
    longest part would.
    """
    sigma, rate = inquiry.sigma(question, noise_over_clip), _rate(federation)
    if inquiry.unit is Unit.RECORD:
        return sigma
    bound = inquiry.records * question.statistic.row_norm
    drawn = federation.population * (1 - rate) / rate * bound**2
    return math.sqrt((sigma / rate) ** 2 + drawn)


def _noise_of(federation: Federation, noise_over_clip: float) -> float:
    """Return the noise on a sum over the norm of one unit: with `privacy=record` every client adds the whole of it."""
    return noise_over_clip * (math.sqrt(federation.population) if federation.summed is None else 1.0)


def _rate(federation: Federation) -> float:
    return federation.cohort.rate if isinstance(federation.cohort, Poisson) else 1.0


# --- the round, and its record ------------------------------------------------------------------------------------


def _order(federation: Federation, inquiry: Inquiry, plan: Plan) -> dict[str, str]:
    from ...tasks.arrays import agreement_of  # torch

    assert plan.noise_multiplier is not None
    client, record, mode = None, None, federation.mode
    if inquiry.unit is Unit.CLIENT:
        client = ClientClaim(plan.noise_multiplier, plan.adjacency)
    else:
        budget = _budget(federation, inquiry)
        rate = None if federation.summed is None else 1.0
        record = RecordOrder(
            budget.target_epsilon, budget.target_delta, plan.clipping_norm, plan.adjacency, sample_rate=rate
        )
    agreement = agreement_of(federation.task)
    order = TrainingOrder(inquiry.name, mode, LocalTraining(), client, record, agreement)
    return {ORDER_KEY: order.to_json()}


def _record(asking: Asking, inquiry: Inquiry, before: float | None, ended: Outcome) -> dict[str, Any]:
    federation, plan, ledger = asking.federation, asking.plan, asking.ledger
    events = [plan.event()] * ended.rounds
    budget = _budget(federation, inquiry)
    asked = {
        "name": inquiry.name,
        "question": json.loads(inquiry.text),
        "purpose": inquiry.purpose,
        "from_record": False,
        "released": bool(ended.answers),
        "unit": str(plan.unit),
        "adjacency": str(plan.adjacency),
        "adversaries": [str(each) for each in plan.adversaries],
        "noise_multiplier": plan.noise_multiplier,
        "epsilon": counted(events, budget.target_delta, plan.adjacency, None, PUBLISH_INTERVAL),
        "epsilon_before": before,
        "epsilon_after": None if ledger is None else ledger.epsilon(),
        "target_epsilon": budget.target_epsilon,
        "delta": budget.target_delta,
        "rounds": ended.rounds,
        "rng": asking.reach.randomness.kind,
        "cohort": federation.cohort.name,
        "owner": _owner(federation),
        "clients": federation.population,
        "confidence": 0.95,
    }
    if not ended.answers:
        return {**asked, "reason": ended.cause, "answers": []}
    return {**asked, "answers": [_plain(each) for each in ended.answers]}


def _answers(federation: Federation, inquiry: Inquiry, sums: Sums) -> Sequence[Answer]:
    rate = _rate(federation)
    return [
        Answer(
            each.name,
            tuple(
                each.statistic.answer(
                    sums.cells[each.name] / rate, _sigma(federation, inquiry, each, sums.noise)
                )
            ),
            inquiry.clipped_of(each, sums.cells[clipped_name(each)], sums.noise)
            if inquiry.unit is Unit.RECORD
            else inquiry.clipped(sums.clipped[clipped_name(each)], sums.noise, sums.clients),
        )
        for each in inquiry.questions
    ]


def _plain(answer: Answer) -> dict[str, Any]:
    return {
        "name": answer.name,
        "clipped": _figure(answer.clipped),
        "figures": [_figure(each) for each in answer.figures],
    }


def _figure(figure: Figure) -> dict[str, Any]:
    if not figure.said:
        return {"name": figure.name, "value": None, "low": None, "high": None, "said": "cannot be said"}
    value, low, high = (float(each) for each in (figure.value, figure.low, figure.high))  # not NumPy's
    return {"name": figure.name, "value": value, "low": low, "high": high}
