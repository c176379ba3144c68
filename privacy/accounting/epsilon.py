"""What releases cost: events of dp_accounting in, epsilon out.

Every number reported is an upper bound, the smaller of the two of module `bounds`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from ..budget import Adjacency, Budget, real, word
from ..refusal import Refusal
from .bounds import GATE_INTERVAL, MIN_PLD_DELTA, PUBLISH_INTERVAL, bounds, in_order
from .events import Counts, Leaf, event_from_json, event_to_json, leaves
from .gate import Gate
from .renyi import quiet_orders

if TYPE_CHECKING:
    from dp_accounting import DpEvent

__all__ = [
    "GATE_INTERVAL",
    "MIN_PLD_DELTA",
    "PUBLISH_INTERVAL",
    "Gate",
    "accountant_name",
    "epsilon",
    "event_from_json",
    "event_to_json",
    "grouped",
    "quiet_orders",
    "within",
]

Events = Iterable["DpEvent"] | Mapping["DpEvent", int]


def epsilon(
    events: Events,
    delta: float,
    adjacency: Adjacency | str = Adjacency.ZERO_OUT,
    interval: float = PUBLISH_INTERVAL,
) -> float:
    """The epsilon that all ``events`` together cost at ``delta``, in nats; 0 for none, inf for a non-private one.

    ``events`` is an iterable, or a mapping from an event to how often it happened. ``interval`` is the step of
    the PLD's grid in nats; it is refined where epsilon is small.
    Refusal names an event that cannot be accounted under this adjacency, or a number out of range.
    """
    counts = grouped(events)
    return min(bounds(counts, _probability(delta), word(Adjacency, "adjacency", adjacency), interval))


def within(events: Events, budget: Budget, interval: float = GATE_INTERVAL) -> bool:
    """Whether ``epsilon(events, ...)`` at this interval is at most the budget's; stops at the first bound that is."""
    found = bounds(grouped(events), budget.target_delta, budget.adjacency, interval)
    return any(bound <= budget.target_epsilon for bound in found)


def accountant_name(
    delta: float,
    adjacency: Adjacency | str = Adjacency.ZERO_OUT,
    interval: float = PUBLISH_INTERVAL,
) -> str:
    """How ``epsilon`` gets its number: accountants, their discretisation and conversion, package and version.

    ``min(PLD 1e-4 connect-the-dots, RDP Canonne et al. 2020), dp_accounting 0.6.0``
    """
    package = f"dp_accounting {version('dp-accounting')}"
    if delta < MIN_PLD_DELTA:
        return f"RDP Canonne et al. 2020, {package}"
    step = f"{interval:.0e}".replace("e-0", "e-")
    replace = word(Adjacency, "adjacency", adjacency) is Adjacency.REPLACE_ONE
    where = " where unsampled" if replace else ""
    return f"min(PLD {step} connect-the-dots, RDP Canonne et al. 2020{where}), {package}"


def grouped(events: Events) -> Counts:
    """Equal leaves counted together, in an order that does not depend on the order of ``events``."""
    pairs = events.items() if isinstance(events, Mapping) else ((event, 1) for event in events)
    counts: Counter[Leaf] = Counter()
    for event, count in pairs:
        for leaf, times in leaves(event, count):
            counts[leaf] += times
    return in_order(counts)


def _probability(delta: float) -> float:
    if not 0 < real("delta", delta) < 1:
        raise Refusal("delta", delta, "give a probability strictly between 0 and 1")
    return float(delta)
