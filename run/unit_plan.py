"""Plan of a federation: the noise, the cost of the rounds and the warnings for each privacy unit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dp_accounting.dp_event import DpEvent

from ..base.refusal import Refusal
from ..modes.federation import Federation
from ..privacy.accounting.curve import PrivacyCurve, group_epsilons
from ..privacy.accounting.epsilon import epsilon
from ..privacy.accounting.events import event_from_json, event_to_json
from ..privacy.accounting.record_events import record_event
from ..privacy.budget import UNLIMITED_EPSILON, Adjacency, Budget, Unit
from ..privacy.plan import Plan
from ..privacy.preconditions import emptiness
from ..strategies.cohorts import likely_participations
from ..strategies.record_plan import plans_of_sizes, record_plan
from .acts import unless_accepted
from .client_instructions import client_settings
from .queries import EvaluationPlan, ScalingPlan, queries_of, query_events
from .sum_plan import sum_plan

STEPS = 10  # epsilon is shown after every tenth of the rounds
OUTSIDE = "This guarantee does not cover a person whose records are at two clients."
TWO_UNITS = "A person at two clients is two units: the losses at both add up."
WEAK_EPSILON = 10.0  # e^10: one person changes the odds of a conclusion up to 22 000 times


@dataclass(frozen=True)
class UnitPlan:
    """Plan of one privacy unit: its noise and cost.

    Attributes:
      unit: `client` or `record`.
      noise_multiplier: noise standard deviation over the sensitivity of a clipped contribution.
      epsilon: (round, epsilon) after every tenth of one unit's rounds.
      affordable_rounds: number of rounds that the budget covers at this noise.
      runs: number of runs that the budget is for, this one included.
      runs_epsilon: their joint cost.
      tries: number of values that the arms try, for the cost of one run; 1 without tuning.
      tries_epsilon: joint cost of as many whole runs with this noise.
      accountant: that computes epsilon.
      warnings: sentences on limits that the numbers do not show.
      curve: epsilon at many deltas, mu-GDP and zCDP where they hold, and the trade-off, after all rounds of one run.
      groups: (records, epsilon) of several records of one person together, where the unit is a record.
      scaling: the question for the scaling of the run's inputs, counted like evaluations; None without one.
      evaluation: at the clients, included in `affordable_rounds`, `runs_epsilon` and the curve, but not in `epsilon`;
        None without one.
      scoring: evaluation of each arm's model at its clients, counted like `evaluation`; None without one.
      record_epsilon: of each record of a client whose vectors are summed, at the same delta, with the evaluations; None
        where records are the unit, pay for their own steps, or noise is chosen as the run goes.

    Example:
      >>> import fedveil as fv
      >>> client = fv.plan("digits", privacy={"target_epsilon": 2.0}, num_rounds=20)[0]
      >>> client.unit, client.epsilon[-1][1] <= 2.0
      ('client', True)
    """

    unit: str
    noise_multiplier: float
    epsilon: list[tuple[int, float]]
    affordable_rounds: int
    runs: int
    runs_epsilon: float
    accountant: str
    warnings: list[str]
    curve: PrivacyCurve
    groups: list[tuple[int, float]]
    evaluation: EvaluationPlan | None = None
    tries: int = 1
    tries_epsilon: float = 0.0
    scoring: EvaluationPlan | None = None
    scaling: ScalingPlan | None = None
    record_epsilon: float | None = None


def unit_plans(federation: Federation) -> list[UnitPlan]:
    """Return the plan of each privacy unit."""
    return [_unit_plan(federation, plan, budget) for plan, budget in plans_of(federation)]


def _unit_plan(federation: Federation, plan: Plan, budget: Budget) -> UnitPlan:
    runs, questions, rounds = federation.settings.budget.runs, questions_of(federation, plan), plan.num_rounds
    tries, tries_epsilon = tries_of(federation, plan, budget)
    fields: dict[str, Any] = {}
    for query in queries_of(federation.settings):
        fields |= query.fields(federation, plan)
    return UnitPlan(
        unit=str(plan.unit),
        noise_multiplier=float(plan.noise_multiplier or 0),
        epsilon=curve(plan, budget.target_delta, rounds),
        affordable_rounds=plan.affordable_rounds(budget, questions),
        runs=runs,
        runs_epsilon=plan.epsilon(
            budget.target_delta, rounds * runs, [each for each in questions for _ in range(runs)]
        ),
        accountant=plan.accountant(budget.target_delta),
        warnings=warnings_for(federation, plan, budget),
        curve=plan.curve(budget, prior=questions),
        groups=groups_of(plan, budget, rounds, questions),
        tries=tries,
        tries_epsilon=tries_epsilon,
        record_epsilon=record_epsilon(federation, plan, budget.target_delta, rounds),
        **fields,
    )


def record_epsilon(federation: Federation, plan: Plan, delta: float, rounds: int) -> float | None:
    """Return what a record loses by sums of whole clients, which have a secret draw or none; see `UnitPlan`."""
    if not federation.mode.sums_cost_records or plan.filter_order is not None:
        return None
    releases = -(-rounds // (plan.mechanism.rounds or 1))
    plain = [
        record_event(event_to_json(each), Adjacency.ZERO_OUT)
        for each in (plan.event(), *questions_of(federation, plan))
    ]
    round_, *questions = map(event_from_json, plain)
    return epsilon([*[round_] * releases, *questions], delta, Adjacency.ZERO_OUT)


def questions_of(federation: Federation, plan: Plan) -> list[DpEvent]:
    """Return the events of a run's evaluations and scaling question; empty for a unit that is not charged for them."""
    if not charges_questions(federation, plan):
        return []
    return query_events(federation)


def charges_questions(federation: Federation, plan: Plan) -> bool:
    """Return whether a run's questions are charged to the plan's unit: the unit of the sum, or the only one."""
    return plan.unit is federation.mode.promises[0].unit


def tries_of(federation: Federation, plan: Plan, budget: Budget) -> tuple[int, float]:
    """Return the number of values that arms try, and the joint cost for a unit of as many whole runs."""
    tries = max(1, len(federation.settings.tried))
    return tries, plan.epsilon(budget.target_delta, plan.num_rounds * tries)


def plans_of(federation: Federation) -> Iterator[tuple[Plan, Budget]]:
    """Yield each unit's calibrated plan, whose rounds are those of the run charged to one unit, and its budget."""
    num_rounds = federation.settings.num_rounds
    mode = federation.mode
    if (sums := sum_plan(federation)) and mode.budget:
        yield sums, mode.budget
    if budget := mode.client_budget:
        client = client_settings(federation, Path())
        assert client.record
        participations = likely_participations(federation.cohort, federation.num_clients, num_rounds)
        plan = record_plan(client.record, mode.sizes[0], client)
        if mode.promises[-1].noise_multiplier is not None:  # noise that is planned suits each size
            plans = plans_of_sizes(mode.sizes, client.record, client)
            plan = max(plans, key=lambda each: each.epsilon(budget.target_delta, participations))
        yield replace(plan, num_rounds=participations), budget


def groups_of(
    plan: Plan, budget: Budget, rounds: int, other_events: Sequence[DpEvent] = ()
) -> list[tuple[int, float]]:
    """Return (records, epsilon) of several records of one person together; empty where the unit is no record.

    Args:
      plan: calibrated.
      budget: gives delta.
      rounds: that a record takes part in.
      other_events: a record's events outside the rounds.
    """
    if plan.unit is not Unit.RECORD:
        return []
    events = [*[plan.event()] * rounds, *other_events]
    return group_epsilons(events, budget.target_delta, plan.adjacency)


def curve(plan: Plan, delta: float, rounds: int) -> list[tuple[int, float]]:
    """Return (round, epsilon) after every tenth of the rounds."""
    marks = sorted({max(1, round(rounds * k / STEPS)) for k in range(1, STEPS + 1)})
    return [(mark, plan.epsilon(delta, mark)) for mark in marks]


def warnings_for(federation: Federation, plan: Plan, budget: Budget) -> list[str]:
    """Return sentences on limits that the numbers do not show."""
    sentences = federation.mode.limits(plan, federation.masking)
    if plan.unit in (Unit.PERSON, Unit.PERSON_EVERYWHERE):
        max_examples = federation.mode.per_person
        of_each = "one example" if max_examples == 1 else f"{max_examples} examples"
        sentences.append(f"A client trains on at most {of_each} of one person. {_at_clients(federation)}")
    elif plan.unit == "record":
        sentences.append(OUTSIDE)
        groups = groups_of(plan, budget, plan.num_rounds, questions_of(federation, plan))
        sizes = ((n, f"{each:.3g}" if math.isfinite(each) else "infinite") for n, each in groups)
        losses = ", ".join(f"{n} of them {size}" for n, size in sizes)
        if losses:
            sentences.append(
                f"Several records of one person lose more, epsilon together: {losses}; see per_person."
            )
    if WEAK_EPSILON < budget.target_epsilon < UNLIMITED_EPSILON:
        odds = math.exp(min(budget.target_epsilon, 700))
        sentences.append(
            f"Epsilon {budget.target_epsilon:g} is weak: the odds of any conclusion may change {odds:.2g} times."
        )
    return sentences


def _at_clients(federation: Federation) -> str:
    max_clients = federation.mode.clients_per_person
    return TWO_UNITS if max_clients is None else federation.mode.persons(max_clients)


def require_use(federation: Federation, plan: Plan | None) -> None:
    """Refuse to spend real people's budget on a useless run; on simulated data only warn.

    Args:
      federation: its parts.
      plan: calibrated, of the sum; None where the sum has no guarantee.

    Raises:
      Refusal: the plan is vacuous, or most cohorts would be empty, and this was not accepted.
    """
    clients, rate = federation.declared_clients, federation.cohort.coin
    if plan is not None and (wrong := federation.mode.vacuity(plan)) is not None:
        refusal = Refusal("privacy", str(federation.mode.name), f"{wrong}; use privacy=record_distributed")
    elif rate is not None and (wrong := emptiness(rate, clients)) is not None:
        refusal = Refusal("cohort.rate", float(rate), f"{wrong}; use cohort=all")
    else:
        return
    unless_accepted(federation, refusal)
