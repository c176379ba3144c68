"""Plan of sums of whole clients within what their records may still lose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dp_accounting.dp_event import DpEvent

from ..base.refusal import Refusal
from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.accounting.events import event_from_json, event_to_json
from ..privacy.accounting.record_events import record_event
from ..privacy.accounting.renyi_filter import spent_epsilon
from ..privacy.budget import UNLIMITED_EPSILON, Adversary, Budget
from ..privacy.ledger.caps import capped
from ..privacy.plan import Plan, find_min_noise

if TYPE_CHECKING:
    from ..privacy.ledger.ledger import SharedBudget


def within_records(
    plan: Plan, shared: SharedBudget, budget: Budget | None, group: str, other_events: Sequence[DpEvent]
) -> Plan:
    """Return a plan whose sums of whole clients cost the records of these data no more than they may still lose.

    Before records have a ledger a run is planned within their owner's caps, as for clients. Later it is refused.

    Args:
      plan: of the whole clients, calibrated.
      shared: budget of records that the sums spend too.
      budget: of the whole clients; None if noise is given instead.
      group: configuration group of the fields that a refusal names, such as `privacy`.
      other_events: events of the run's evaluations.

    Raises:
      Refusal: it does not cover the run or, if noise is given, its first round; the sentence gives what it covers.
    """
    allowed = capped(shared.path, shared.budget)
    releases = 1 if budget is None else math.ceil(plan.num_rounds / (plan.mechanism.rounds or 1))
    delta, order = allowed.target_delta, shared.book.filter_order or plan.filter_order
    prior = shared.book.events(Adversary.MODEL)

    def epsilon_with(run_events: Sequence[DpEvent]) -> float:
        """Return what records have lost after these events of whole clients."""
        plain = [record_event(event_to_json(each), allowed.adjacency, order is None) for each in run_events]
        events = [*prior, *map(event_from_json, plain)]
        return spent_epsilon(events, delta, allowed.adjacency, order, GATE_INTERVAL)

    def cost(noise: float) -> float:
        """Return what records have lost after the run with this noise."""
        return epsilon_with([*[replace(plan, noise_multiplier=noise).event()] * releases, *other_events])

    if cost(plan.noise) <= allowed.target_epsilon:
        return plan
    spending = f"{epsilon_with([]):.4g} of epsilon {allowed.target_epsilon:g} at delta {delta:g}"
    reason = f"records of these data have spent {spending}, and pay for a sum of whole clients as for half its noise"
    field, value = f"{group}.noise_multiplier", plan.noise
    if budget is not None:
        field, value = f"{group}.target_epsilon", budget.target_epsilon
    try:
        min_noise = find_min_noise(cost, allowed.target_epsilon)
    except Refusal:
        raise Refusal(field, value, f"{reason}; keep the model that you have") from None
    if budget is None:
        raise Refusal(field, value, f"{reason}; give at least {min_noise:.4g}")
    fitting = replace(plan, noise_multiplier=min_noise)
    if shared.budget.target_epsilon >= UNLIMITED_EPSILON:
        return fitting
    enough = fitting.epsilon(budget.target_delta, prior=other_events)
    raise Refusal(field, value, f"{reason}; give at most {0.99 * enough:.3g}")
