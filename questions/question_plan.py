"""Plan of a question: its noise for a given cost, the resulting intervals, and the cost that would suffice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..base.refusal import Refusal
from ..modes.federation import Federation
from ..privacy.budget import Budget, Unit
from ..privacy.plan import MAX_PLAN_NOISE, MIN_PLAN_NOISE, Plan
from ..privacy.statistics.figure import NORMAL_95
from ..privacy.statistics.inquiry import Inquiry, Question
from ..run.acts import unless_accepted
from ..strategies.cohorts import All, Poisson

if TYPE_CHECKING:
    from .wire import Request  # flwr, and plans know questions too

MAX_QUESTION_NOISE = 2.0**10  # above it an answer is pure noise


@dataclass(frozen=True)
class Spend:
    """Cost of one inquiry: an epsilon or a noise multiplier; exactly one is given.

    Attributes:
      epsilon: of the inquiry alone, at the delta of the federation's budget.
      noise_multiplier: standard deviation of the noise over the sensitivity.
    """

    epsilon: float | None = None
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            remedy = "give the question's cost: either epsilon or noise_multiplier"
            raise Refusal("epsilon", self.epsilon, remedy)


def question_plan(federation: Federation, inquiry: Inquiry, spend: Spend) -> Plan:
    """Return the plan of a question: one round of the cohort, with the noise for its cost.

    Args:
      federation: whose clients or records are protected.
      inquiry: says which.
      spend: its cost.

    Raises:
      Refusal: the federation hides something else, or its cohort is not one that a question has.
    """
    budget, mode = require_budget(federation, inquiry), federation.mode
    plan = Plan(
        budget.unit,
        budget.adjacency,
        mode.question_sampling,
        mode.unit_norm,
        inquiry.levels,
        spend.noise_multiplier,
        mode.promises[0].adversaries,
    )
    if spend.epsilon is not None:
        plan = plan.calibrate(replace(budget, target_epsilon=spend.epsilon))
    if not MIN_PLAN_NOISE <= plan.noise <= MAX_QUESTION_NOISE:
        raise Refusal("noise_multiplier", plan.noise, "leaves only noise; give more epsilon")
    return plan


def require_budget(federation: Federation, inquiry: Inquiry) -> Budget:
    """Return the budget that a question is charged to, if the federation supports the question.

    Raises:
      Refusal: the federation hides something else, or its cohort is not one that a question has.
    """
    budget = budget_of(federation, inquiry)
    if not isinstance(federation.cohort, All if inquiry.unit is Unit.RECORD else All | Poisson):
        remedy = "questions go to all clients or, at the client level, to a Poisson draw of them"
        raise Refusal("cohort", federation.cohort.name, remedy)
    return budget


def budget_of(federation: Federation, inquiry: Request) -> Budget:
    """Return the budget that a question is charged to.

    Raises:
      Refusal: the federation's privacy unit is not the question's.
    """
    settings, mode = federation.settings, federation.mode
    budget = mode.budget or mode.client_budget
    if budget is None or len(mode.promises) != 1:
        remedy = "hides no unit, or two at once, and a question is charged to one: choose client_central, "
        remedy = f"{remedy}client_distributed, record or record_distributed"
        raise Refusal("privacy", settings.privacy.name, remedy)
    if budget.unit is not inquiry.unit:
        if budget.unit in (Unit.PERSON, Unit.PERSON_EVERYWHERE):
            remedy = "a question counts rows, and a person may have several; leave it out"
            raise Refusal("privacy.per_person", mode.per_person, remedy)
        remedy = f"privacy={settings.privacy.name} protects a {budget.unit}: ask with unit={budget.unit}, or choose another"
        raise Refusal("unit", str(inquiry.unit), remedy)
    if mode.client_budget and settings.secagg:
        remedy = "already noises each answer, and they are summed in the clear; leave it out, or use record_distributed"
        raise Refusal("secagg", "on", f"privacy=record {remedy}")
    return budget


def check_resolution(federation: Federation, inquiry: Inquiry, plan: Plan) -> None:
    """Refuse a question whose planned interval is wider than its resolution.

    Raises:
      Refusal: it is; the sentence names the epsilon or the rows that suffice.
    """
    for each in inquiry.questions:
        if each.resolution is None:
            continue
        planned = planned_half_width(federation, inquiry, each, plan)
        if planned is None:
            remedy = f"give the number of rows, so that {each.name} can be planned"
            raise Refusal("at_least", None, remedy)
        if planned > each.resolution:
            raise Refusal(
                "resolution", each.resolution, _resolution_remedy(federation, inquiry, each, plan, planned)
            )


def require_answer(federation: Federation, inquiry: Inquiry, spend: Spend, plan: Plan) -> None:
    """Refuse to spend real people's budget on an answer that the noise drowns; on simulated data only warn.

    Raises:
      Refusal: the noise on a question's count of rows exceeds all rows that count in full, and this was not accepted.
    """
    max_rows = federation.declared_clients * inquiry.records

    def answers(candidate: Plan) -> bool:
        noise = noise_of_sum(federation, candidate)
        return all(
            NORMAL_95 * sigma_of(federation, inquiry, each, noise) < max_rows for each in inquiry.questions
        )

    if answers(plan):
        return
    sigma = max(
        sigma_of(federation, inquiry, each, noise_of_sum(federation, plan)) for each in inquiry.questions
    )
    clients = f"{federation.declared_clients} clients of {inquiry.records:g} rows that count"
    reason = f"leaves only noise, +-{NORMAL_95 * sigma:.0f} rows, on the counts of {clients}"
    epsilon = smallest_epsilon(plan, budget_of(federation, inquiry).target_delta, answers)
    reason += "; no epsilon suffices" if epsilon is None else f"; give more than {epsilon:.2g}"
    reason += ", hide one row by unit=record" if inquiry.unit is Unit.CLIENT else ""
    field = "noise_multiplier" if spend.epsilon is None else "epsilon"
    refusal = Refusal(field, spend.epsilon or spend.noise_multiplier, reason)
    unless_accepted(federation, refusal, "accept_vacuous=true")


def planned_half_width(
    federation: Federation, inquiry: Inquiry, question: Question, plan: Plan
) -> float | None:
    """Return the planned half-width of the interval; None if it depends on an unknown number of rows."""
    sigma = sigma_of(federation, inquiry, question, noise_of_sum(federation, plan))
    rows = question.at_least
    if rows is None:
        ends = [question.statistic.planned(sigma, each) for each in (1.0, 2.0)]
        return ends[0] if ends[0] == ends[1] else None
    return question.statistic.planned(sigma, rows)


def _resolution_remedy(
    federation: Federation, inquiry: Inquiry, question: Question, plan: Plan, planned: float
) -> str:
    """Return a clause with the epsilon and the rows at which the interval meets the resolution."""
    resolution, clause = question.resolution, f"{question.name} is planned to +-{planned:.3g}"
    assert resolution is not None

    def fits(candidate: Plan) -> bool:
        half = planned_half_width(federation, inquiry, question, candidate)
        return half is not None and half <= resolution

    epsilon = smallest_epsilon(plan, budget_of(federation, inquiry).target_delta, fits)
    if epsilon is None:
        return f"{clause}, and no epsilon suffices; ask for less, or ask more clients"
    clause = f"{clause}; epsilon {epsilon:.3g} would suffice"
    sigma = sigma_of(federation, inquiry, question, noise_of_sum(federation, plan))
    rows = () if question.at_least is None else (question.at_least * 1.05**step for step in range(500))
    enough = next((each for each in rows if question.statistic.planned(sigma, each) <= resolution), None)
    return clause if enough is None else f"{clause}, or {math.ceil(enough)} rows"


def smallest_epsilon(plan: Plan, delta: float, fits: Callable[[Plan], bool]) -> float | None:
    """Return the least epsilon at which an insufficient plan becomes sufficient; None if there is none.

    Args:
      plan: with too much noise.
      delta: in (0, 1).
      fits: whether a plan is sufficient.
    """
    low, high = MIN_PLAN_NOISE, plan.noise_multiplier or MAX_PLAN_NOISE
    if not fits(replace(plan, noise_multiplier=low)):
        return None
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(replace(plan, noise_multiplier=middle)) else (low, middle)
    return replace(plan, noise_multiplier=low).epsilon(delta)


def sigma_of(federation: Federation, inquiry: Inquiry, question: Question, noise_over_clip: float) -> float:
    """Return the standard deviation of a cell, in rows, of an answer for all clients.

    With a Poisson draw the cells are divided by its rate, and the undrawn clients add an error, bounded by every
    client's longest part.
    """
    sigma, rate = inquiry.sigma(question, noise_over_clip), rate_of(federation)
    if inquiry.unit is Unit.RECORD:
        return sigma
    bound = inquiry.records * question.statistic.row_norm
    undrawn_variance = federation.declared_clients * (1 - rate) / rate * bound**2
    return math.sqrt((sigma / rate) ** 2 + undrawn_variance)


def noise_of_sum(federation: Federation, plan: Plan) -> float:
    """Return a sum's noise over the norm of one unit: with `privacy=record` every client adds the full noise."""
    return federation.mode.noise_of_answers(plan)


def rate_of(federation: Federation) -> float:
    return federation.cohort.rate if isinstance(federation.cohort, Poisson) else 1.0
