"""Plan of a federation: the noise, the cost of the rounds and the warnings for each privacy unit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_accounting.dp_event import DpEvent

from ..modes.federation import Federation
from ..privacy.accounting.curve import PrivacyCurve, group_epsilons
from ..privacy.accounting.epsilon import epsilon
from ..privacy.accounting.events import event_from_json, event_to_json
from ..privacy.accounting.record_events import record_event
from ..privacy.budget import UNLIMITED_EPSILON, Adjacency, Budget, Unit
from ..privacy.plan import Plan
from .client_instructions import client_settings
from .promise import ROLE, meaning, recognised
from .queries import EvaluationPlan, ScalingPlan, queries_of, query_events_of_unit
from .sum_plan import sum_plan

STEPS = 10  # epsilon is shown after every tenth of the rounds
NO_GUARANTEE = "privacy=none: no guarantee; epsilon is infinite."
WEAK_EPSILON = 10.0  # e^10: one person changes the odds of a conclusion up to 22 000 times


@dataclass(frozen=True)
class UnitPlan:
    """Plan of one privacy unit: its noise and cost.

    Attributes:
      unit: `client`, `record`, `person` or `person_everywhere`.
      noise_multiplier: noise standard deviation over the sensitivity of a clipped contribution.
      epsilon: (round, epsilon) after every tenth of one unit's rounds.
      affordable_rounds: number of rounds that the budget covers at this noise.
      runs: number of runs that the budget is for, this one included.
      runs_epsilon: their joint cost.
      tries: number of values that the arms try, for the cost of one run; 1 without tuning.
      tries_epsilon: joint cost of as many whole runs with this noise.
      accountant: description of the accountant that computes epsilon.
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
    runs, events = federation.settings.budget.runs, query_events_of_unit(federation, plan)
    tries, tries_epsilon = tries_of(federation, plan, budget)
    fields: dict[str, Any] = {}
    for query in queries_of(federation.settings):
        fields |= query.fields(federation, plan)
    return UnitPlan(
        unit=str(plan.unit),
        noise_multiplier=float(plan.noise_multiplier or 0),
        epsilon=curve(plan, budget.target_delta),
        affordable_rounds=plan.affordable_rounds(budget, events),
        runs=runs,
        runs_epsilon=plan.epsilon(budget.target_delta, plan.num_rounds * runs, events * runs),
        accountant=plan.accountant(budget.target_delta),
        warnings=warnings_for(federation, plan, budget),
        curve=plan.curve(budget, prior=events),
        groups=groups_of(plan, budget, events),
        tries=tries,
        tries_epsilon=tries_epsilon,
        record_epsilon=record_epsilon(federation, plan, budget.target_delta),
        **fields,
    )


def plans_of(federation: Federation) -> Iterator[tuple[Plan, Budget]]:
    """Yield each unit's calibrated plan, whose rounds are those that one unit is charged for, and its budget.

    Real clients plan the noise of their records themselves.
    """
    mode = federation.mode
    if (sums := sum_plan(federation)) and mode.budget:
        yield sums, mode.budget
    if (budget := mode.client_budget) and federation.population.reads_data:
        yield mode.client_plan(client_settings(federation, Path())), budget


def promised(federation: Federation) -> list[str]:
    """Return what the planned run promises in words, a paragraph for each unit with a target epsilon."""
    if not federation.mode.promises:
        return [NO_GUARANTEE]
    return [*filter(None, (meaning_of(federation, *each) for each in plans_of(federation)))]


def meaning_of(federation: Federation, plan: Plan, budget: Budget) -> str:
    """Return what the plan of one unit means in two sentences; empty without a target epsilon."""
    if budget.target_epsilon >= UNLIMITED_EPSILON:
        return ""
    promise = plan.curve(budget, prior=query_events_of_unit(federation, plan))
    share = recognised({"curve": promise.to_json()})
    return " ".join(meaning([ROLE[each] for each in plan.adversaries], plan.unit, share))


def curve(plan: Plan, delta: float) -> list[tuple[int, float]]:
    """Return (round, epsilon) after every tenth of the plan's rounds."""
    marks = sorted({max(1, round(plan.num_rounds * k / STEPS)) for k in range(1, STEPS + 1)})
    return [(mark, plan.epsilon(delta, mark)) for mark in marks]


def tries_of(federation: Federation, plan: Plan, budget: Budget) -> tuple[int, float]:
    """Return the number of values that arms try, and the joint cost for a unit of as many whole runs."""
    tries = max(1, len(federation.settings.tried))
    return tries, plan.epsilon(budget.target_delta, plan.num_rounds * tries)


def record_epsilon(federation: Federation, plan: Plan, delta: float) -> float | None:
    """Return what a record loses by the plan's sums of whole clients; see `UnitPlan`.

    Args:
      federation: whose mode tells whether sums cost records anything.
      plan: plan of the sums, whose clients are drawn in secret or not at all.
      delta: delta of the result, in (0, 1).
    """
    if not federation.mode.sums_cost_records or plan.filter_order is not None:
        return None
    releases = -(-plan.num_rounds // (plan.mechanism.rounds or 1))
    release, *queries = (
        event_from_json(record_event(event_to_json(each), Adjacency.ZERO_OUT))
        for each in (plan.event(), *query_events_of_unit(federation, plan))
    )
    return epsilon([*[release] * releases, *queries], delta, Adjacency.ZERO_OUT)


def groups_of(plan: Plan, budget: Budget, other_events: Sequence[DpEvent] = ()) -> list[tuple[int, float]]:
    """Return (records, epsilon) of several records of one person together; empty where the unit is no record.

    Args:
      plan: calibrated; a record takes part in all of its rounds.
      budget: gives delta.
      other_events: a record's events outside the rounds.
    """
    if plan.unit is not Unit.RECORD:
        return []
    events = [*[plan.event()] * plan.num_rounds, *other_events]
    return group_epsilons(events, budget.target_delta, plan.adjacency)


def warnings_for(federation: Federation, plan: Plan, budget: Budget) -> list[str]:
    """Return sentences on limits that the numbers do not show."""
    sentences = federation.limits(plan)
    groups = groups_of(plan, budget, query_events_of_unit(federation, plan))
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
