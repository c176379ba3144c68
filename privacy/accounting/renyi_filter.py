"""RDP filter: accounts for releases whose noise is chosen from earlier releases.

The bounds of module `epsilon` hold for events that are fixed in advance; the mechanisms behind them may depend on
earlier outputs. They do not hold if the events themselves depend on outputs (Rogers et al. 2016, arXiv:1605.08294; for
the privacy loss distribution Regehr et al. 2026, arXiv:2602.15815). A filter at one order alpha, fixed in advance, does
hold: as long as the RDP at alpha of all releases sums to at most B, the whole is (alpha, B)-RDP for any adaptive choice
(Feldman and Zrnic 2021, arXiv:2008.11193), and so (epsilon, delta)-DP for the epsilon of

    B = epsilon - ln(1 - 1/alpha) + ln(delta * alpha) / (alpha - 1)     (Canonne et al. 2020, proposition 12).

The guarantee is the filter's budget. The amount counted so far is no guarantee: it may depend on the data, and a bound
on it would need an odometer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ...base.refusal import Refusal, real
from ..budget import Adjacency, Budget
from .epsilon import GATE_INTERVAL, PUBLISH_INTERVAL, Events, accountant_name, epsilon, grouped, within
from .renyi import Vector, orders, renyi_holds, renyi_vector

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent


def filter_order(value: object) -> float:
    """Return the order of a filter as a float; refuse one that is not among the accountant's `orders`."""
    if real("filter_order", value) not in orders():
        raise Refusal("filter_order", value, "give one of the accountant's orders, such as 3.4 or 32")
    return real("filter_order", value)


def _index(order: float) -> int:
    """Return the place of a filter's order among the `orders`."""
    return orders().tolist().index(filter_order(order))


def accountant(delta: float, adjacency: Adjacency, order: float | None) -> str:
    """Return the description of the accountant for reports, such as `RDP filter at order 3.4, dp_accounting 0.6.0`.

    Arguments as of `spent_epsilon`.
    """
    name = accountant_name(delta, adjacency)
    return name if order is None else f"RDP filter at order {order:g}, dp_accounting {name.split()[-1]}"


def spent_epsilon(
    events: Events,
    delta: float,
    adjacency: Adjacency,
    order: float | None,
    interval: float = PUBLISH_INTERVAL,
) -> float:
    """Return the smallest epsilon whose filter admits all events, in itself no guarantee; without one, their `epsilon`.

    Args:
      events: as in `epsilon`.
      delta: in (0, 1).
      adjacency: the relation of neighbours.
      order: order of the filter; None for events that were fixed in advance.
      interval: step of the PLD's grid in nats; unused with a filter.
    """
    if order is None:
        return epsilon(events, delta, adjacency, interval)
    total = float(_renyi(events, adjacency)[_index(order)])
    return max(0.0, total - float(_max_rdp(0.0, delta)[_index(order)])) if total else 0.0


def epsilon_of_filter(budget: Budget, order: float, delta: float) -> float:
    """Return a filter's guarantee at another delta, from the largest RDP at its order that its budget allows.

    Args:
      budget: budget that the filter guards.
      order: order of the filter.
      delta: in (0, 1).
    """
    max_rdp = _max_rdp(budget.target_epsilon, budget.target_delta)[_index(order)]
    return max(0.0, float(max_rdp - _max_rdp(0.0, delta)[_index(order)]))


def admits(events: Events, budget: Budget, order: float | None, interval: float = GATE_INTERVAL) -> bool:
    """Return whether events stay within a budget. Arguments as of `spent_epsilon`."""
    if order is None:
        return within(events, budget, interval)
    return spent_epsilon(events, budget.target_delta, budget.adjacency, order) <= budget.target_epsilon


def best_order(event: DpEvent, budget: Budget, prior: Iterable[DpEvent] = ()) -> float:
    """Return the order at which a filter admits a planned event most often after prior ones.

    The filter holds only for an order fixed in advance: it follows from planned events, never from results.

    Raises:
      Refusal: no order affords a single release.
    """
    rest = _max_rdp(budget.target_epsilon, budget.target_delta) - _renyi(prior, budget.adjacency)
    with np.errstate(invalid="ignore"):
        rounds = np.nan_to_num(rest / _renyi([event], budget.adjacency), nan=-np.inf)
    if not rounds.max() >= 1:
        remedy = "no RDP filter affords a single round; raise it"
        raise Refusal("target_epsilon", budget.target_epsilon, remedy)
    return float(orders()[rounds.argmax()])


def _max_rdp(target_epsilon: float, delta: float) -> Vector:
    """Return the largest RDP that (epsilon, delta) allows, B of the module's text, at all orders."""
    return target_epsilon - np.log1p(-1 / orders()) + np.log(delta * orders()) / (orders() - 1)


def _renyi(events: Events, adjacency: Adjacency) -> Vector:
    """Return the RDP of all events together, at all orders; refuse an event that RDP does not cover."""
    total = np.zeros(len(orders()))
    for leaf, n in grouped(events):
        vector = renyi_vector(leaf, adjacency) if renyi_holds(leaf, adjacency) else None
        if vector is None:
            raise Refusal("event", leaf, f"the RDP filter does not cover it under {adjacency}")
        total += n * vector
    return total
