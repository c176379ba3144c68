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
    """Cost of one inquiry: either an epsilon or a noise multiplier.

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
    """Return the plan of a question: its rounds, and the noise of each for the cost of all.

    Args:
      federation: whose clients or records are protected.
      inquiry: names the unit: a client or a record.
      spend: cost of the inquiry.

    Raises:
      Refusal: the federation hides something else, or its cohort is not one that a question has.
    """
    budget = require_budget(federation, inquiry)
    mode = federation.mode
    plan = Plan(
        budget.unit,
        budget.adjacency,
        mode.question_sampling,
        clipping_norm=mode.unit_norm,
        num_rounds=inquiry.levels,
        noise_multiplier=spend.noise_multiplier,
        adversaries=mode.promises[0].adversaries,
    )
    if spend.epsilon is not None:
        plan = plan.calibrate(replace(budget, target_epsilon=spend.epsilon))
    if not MIN_PLAN_NOISE <= plan.noise <= MAX_QUESTION_NOISE:
        raise Refusal("noise_multiplier", plan.noise, "leaves only noise; give more epsilon")
    return plan


def require_budget(federation: Federation, inquiry: Inquiry) -> Budget:
    """Return the budget that a question is charged to; refuse one that the federation or its cohort cannot answer."""
    budget = budget_of(federation, inquiry)
    if not isinstance(federation.cohort, All if inquiry.unit is Unit.RECORD else All | Poisson):
        remedy = "questions go to all clients or, at the client level, to a Poisson draw of them"
        raise Refusal("cohort", federation.cohort.name, remedy)
    return budget


def budget_of(federation: Federation, request: Request) -> Budget:
    """Return the budget that a question is charged to; refuse one of another unit than the federation hides."""
    settings, mode = federation.settings, federation.mode
    budget = mode.budget or mode.client_budget
    if budget is None or len(mode.promises) != 1:
        remedy = "hides no unit, or two at once, and a question is charged to one: choose client_central, "
        remedy = f"{remedy}client_distributed, record or record_distributed"
        raise Refusal("privacy", settings.privacy.name, remedy)
    if budget.unit is not request.unit:
        if budget.unit in (Unit.PERSON, Unit.PERSON_EVERYWHERE):
            remedy = "a question counts rows, and a person may have several; leave it out"
            raise Refusal("privacy.per_person", mode.per_person, remedy)
        remedy = f"privacy={settings.privacy.name} protects a {budget.unit}: ask with unit={budget.unit}, or choose another"
        raise Refusal("unit", str(request.unit), remedy)
    if mode.client_budget and settings.secagg:
        remedy = "already noises each answer, and they are summed in the clear; leave it out, or use record_distributed"
        raise Refusal("secagg", "on", f"privacy=record {remedy}")
    return budget


def check_resolution(federation: Federation, inquiry: Inquiry, plan: Plan) -> None:
    """Refuse a question whose interval is wider than its resolution; name the epsilon or the rows that suffice."""
    for each in inquiry.questions:
        if each.resolution is None:
            continue
        planned = planned_half_width(federation, inquiry, each, plan)
        if planned is None:
            remedy = f"give the number of rows, so that {each.name} can be planned"
            raise Refusal("at_least", None, remedy)
        if planned > each.resolution:
            remedy = _resolution_remedy(federation, inquiry, each, plan)
            raise Refusal("resolution", each.resolution, f"{each.name} is planned to +-{planned:.3g}{remedy}")


def require_answer(federation: Federation, inquiry: Inquiry, spend: Spend, plan: Plan) -> None:
    """Refuse to spend real people's budget on an answer that the noise drowns; on simulated data only warn.

    Raises:
      Refusal: the noise on a question's count of rows exceeds all rows that count in full, and this was not accepted.
    """
    max_rows = federation.declared_clients * inquiry.records

    def half_width(candidate: Plan) -> float:
        """Return the largest half-width of the interval of a count, in rows."""
        noise = noise_of_sum(federation, candidate)
        return NORMAL_95 * max(sigma_of(federation, inquiry, each, noise) for each in inquiry.questions)

    if half_width(plan) < max_rows:
        return
    delta = budget_of(federation, inquiry).target_delta
    epsilon = smallest_epsilon(plan, delta, lambda candidate: half_width(candidate) < max_rows)
    clients = f"{federation.declared_clients} clients of {inquiry.records:g} rows that count"
    reason = f"leaves only noise, +-{half_width(plan):.0f} rows, on the counts of {clients}"
    reason += "; no epsilon suffices" if epsilon is None else f"; give more than {epsilon:.2g}"
    if inquiry.unit is Unit.CLIENT:
        reason += ", hide one row by unit=record"
    field = "noise_multiplier" if spend.epsilon is None else "epsilon"
    refusal = Refusal(field, spend.epsilon or spend.noise_multiplier, reason)
    unless_accepted(federation, refusal, "accept_vacuous=true")


def planned_half_width(
    federation: Federation, inquiry: Inquiry, question: Question, plan: Plan
) -> float | None:
    """Return the planned half-width of the interval; None if it depends on an unknown number of rows."""
    sigma = sigma_of(federation, inquiry, question, noise_of_sum(federation, plan))
    planned = question.statistic.planned
    if question.at_least is not None:
        return planned(sigma, question.at_least)
    # One and two rows have the same half-width only where it does not depend on the number of rows.
    half_width = planned(sigma, 1.0)
    return half_width if planned(sigma, 2.0) == half_width else None


def _resolution_remedy(federation: Federation, inquiry: Inquiry, question: Question, plan: Plan) -> str:
    """Return a clause with the epsilon and the rows at which the interval meets the resolution."""
    resolution, rows = question.resolution, question.at_least
    assert resolution is not None

    def fits(candidate: Plan) -> bool:
        half_width = planned_half_width(federation, inquiry, question, candidate)
        return half_width is not None and half_width <= resolution

    epsilon = smallest_epsilon(plan, budget_of(federation, inquiry).target_delta, fits)
    if epsilon is None:
        return ", and no epsilon suffices; ask for less, or ask more clients"
    clause = f"; epsilon {epsilon:.3g} would suffice"
    if rows is None:
        return clause
    sigma = sigma_of(federation, inquiry, question, noise_of_sum(federation, plan))
    for candidate in (rows * 1.05**step for step in range(500)):  # to 5 %, up to 10^10 times the rows
        if question.statistic.planned(sigma, candidate) <= resolution:
            return f"{clause}, or {math.ceil(candidate)} rows"
    return clause


def smallest_epsilon(plan: Plan, delta: float, fits: Callable[[Plan], bool]) -> float | None:
    """Return the least epsilon at which a plan with too much noise becomes sufficient; None if none does.

    Args:
      plan: with too much noise.
      delta: of the epsilon, in (0, 1).
      fits: whether the plan is sufficient with another noise multiplier; less noise never makes it insufficient.
    """
    low, high = MIN_PLAN_NOISE, plan.noise_multiplier or MAX_PLAN_NOISE
    if not fits(replace(plan, noise_multiplier=low)):
        return None
    for _ in range(40):
        middle = math.sqrt(low * high)
        if fits(replace(plan, noise_multiplier=middle)):
            low = middle
        else:
            high = middle
    return replace(plan, noise_multiplier=low).epsilon(delta)


def sigma_of(federation: Federation, inquiry: Inquiry, question: Question, noise_over_clip: float) -> float:
    """Return the standard deviation of a cell, in rows, of an answer for all clients.

    With a Poisson draw the cells are divided by its rate, and the undrawn clients add an error.

    Args:
      federation: of the clients.
      inquiry: of the question.
      question: of the cell.
      noise_over_clip: standard deviation of the sum's noise over the norm of one unit, as of `noise_of_sum`.
    """
    sigma = inquiry.sigma(question, noise_over_clip)
    if inquiry.unit is Unit.RECORD:
        return sigma
    rate = rate_of(federation)
    bound = inquiry.records * question.statistic.row_norm  # of any client's cells
    undrawn_variance = federation.declared_clients * (1 - rate) / rate * bound**2
    return math.sqrt((sigma / rate) ** 2 + undrawn_variance)


def noise_of_sum(federation: Federation, plan: Plan) -> float:
    """Return a sum's noise over the norm of one unit: with `privacy=record` every client adds the full noise."""
    return federation.mode.noise_of_answers(plan)


def rate_of(federation: Federation) -> float:
    """Return the probability with which a question reaches a client."""
    return federation.cohort.rate if isinstance(federation.cohort, Poisson) else 1.0
