"""What releases cost: events of dp_accounting in, epsilon out, and the gate that admits a next release.

Every number reported is an upper bound. The privacy loss distribution (PLD: Koskela et al. 2020; connect-the-
dots, Doroshenko et al. 2022) gives the tight one, Rényi DP (Mironov 2017; conversion of Canonne et al. 2020,
proposition 12) a second one that also holds at tiny delta; the smaller is taken.
A Gaussian event's noise multiplier is noise std / clip, the sensitivity under zero-out. What replace-one adds to
that is added here and nowhere else: PLD does it itself, RDP gets half the noise multiplier.
"""

import logging
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .budget import Adjacency, Budget, real, word
from .events import Leaf, event_from_json, event_to_json, leaves
from .refusal import Refusal

if TYPE_CHECKING:
    from dp_accounting import DpEvent, NeighboringRelation

GATE_INTERVAL = 1e-3
PUBLISH_INTERVAL = 1e-4
# PLD drops 1e-15 of probability mass per composition, which dominates at smaller deltas.
MIN_PLD_DELTA = 1e-12
# A grid is too coarse, and its bound loose by more than 1 %, when epsilon is fewer steps than this or when one
# sampled round's typical loss, rate / noise multiplier, is fewer than that; it is refined, down to the finest.
MIN_STEPS, MIN_STEPS_PER_ROUND = 1000, 5
FINEST_INTERVAL = 1e-5
# A grid is too fine above this many steps, which bounds the memory that a vacuous epsilon takes ...
MAX_STEPS = 1_000_000
# ... and an epsilon beyond this is reported as none at all.
VACUOUS_EPSILON = 1e6

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
    "within",
]

Events = Iterable["DpEvent"] | Mapping["DpEvent", int]
Counts = tuple[tuple[Leaf, int], ...]


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
    return min(_bounds(counts, _probability(delta), word(Adjacency, "adjacency", adjacency), interval))


def within(events: Events, budget: Budget, interval: float = GATE_INTERVAL) -> bool:
    """Whether ``epsilon(events, ...)`` at this interval is at most the budget's; stops at the first bound that is."""
    return _within(grouped(events), budget, interval)


def accountant_name(
    delta: float,
    adjacency: Adjacency | str = Adjacency.ZERO_OUT,
    interval: float = PUBLISH_INTERVAL,
) -> str:
    """How ``epsilon`` gets its number, for reports: ``min(PLD 1e-4, RDP) dp_accounting 0.6.0``."""
    package = f"dp_accounting {version('dp-accounting')}"
    if delta < MIN_PLD_DELTA:
        return f"RDP {package}"
    step = f"{interval:.0e}".replace("e-0", "e-")
    replace = word(Adjacency, "adjacency", adjacency) is Adjacency.REPLACE_ONE
    return f"min(PLD {step}, RDP{' where unsampled' if replace else ''}) {package}"


def grouped(events: Events) -> Counts:
    """Equal leaves counted together, in an order that does not depend on the order of ``events``."""
    pairs = events.items() if isinstance(events, Mapping) else ((event, 1) for event in events)
    counts: Counter[Leaf] = Counter()
    for event, count in pairs:
        for leaf, times in leaves(event, count):
            counts[leaf] += times
    return _canonical(counts)


def _canonical(counts: Mapping[Leaf, int]) -> Counts:
    return tuple(sorted(((leaf, n) for leaf, n in counts.items() if n), key=repr))


def _probability(delta: float) -> float:
    if not 0 < real("delta", delta) < 1:
        raise Refusal("delta", delta, "give a probability strictly between 0 and 1")
    return float(delta)


def _within(counts: Counts, budget: Budget, interval: float) -> bool:
    bounds = _bounds(counts, budget.target_delta, budget.adjacency, interval)
    return any(bound <= budget.target_epsilon for bound in bounds)


def _bounds(counts: Counts, delta: float, adjacency: Adjacency, interval: float) -> Iterator[float]:
    """Upper bounds on epsilon, cheapest first; each alone is valid."""
    import dp_accounting

    if not counts:
        yield 0.0
        return
    if any(isinstance(leaf, dp_accounting.NonPrivateDpEvent) for leaf, _ in counts):
        yield float("inf")
        return
    size = _renyi(counts, delta, adjacency)
    if size is not None and size > VACUOUS_EPSILON:
        yield float("inf")
        return
    by_renyi = size is not None and _renyi_holds(counts, adjacency)
    by_distribution = delta >= MIN_PLD_DELTA and all(_has_distribution(leaf, adjacency) for leaf, _ in counts)
    if not by_renyi and not by_distribution:
        raise _unaccountable(counts, delta, adjacency)
    if size is not None and by_renyi:
        yield size
    if by_distribution:
        yield from _refined(counts, delta, adjacency, _affordable(_fitting_rounds(interval, counts), size))


def _refined(counts: Counts, delta: float, adjacency: Adjacency, interval: float) -> Iterator[float]:
    """PLD bounds on finer and finer grids, until the grid no longer matters or is the finest."""
    while True:
        bound = _distribution(counts, delta, adjacency, interval)
        yield bound
        if bound >= MIN_STEPS * interval or interval <= FINEST_INTERVAL:
            return
        interval = max(interval / 10, FINEST_INTERVAL)


def _fitting_rounds(interval: float, counts: Counts) -> float:
    """The interval, refined by tens to the narrowest sampled round among the counts."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    for leaf, _ in counts:
        if isinstance(leaf, PoissonSampledDpEvent) and isinstance(leaf.event, GaussianDpEvent):
            loss = leaf.sampling_probability / leaf.event.noise_multiplier
            while interval * MIN_STEPS_PER_ROUND > loss and interval > FINEST_INTERVAL:
                interval = max(interval / 10, FINEST_INTERVAL)
    return interval


def _affordable(interval: float, size: float | None) -> float:
    # By tens: the coarser grid is then part of the finer one, and bounds stay monotone in the counts.
    while size is not None and interval * MAX_STEPS < size:
        interval *= 10
    return interval


def _unaccountable(counts: Counts, delta: float, adjacency: Adjacency) -> Refusal:
    culprits = [leaf for leaf, _ in counts if not _has_distribution(leaf, adjacency)]
    if culprits:
        return Refusal("event", culprits[0], f"no accountant covers it under {adjacency} beside the others")
    return Refusal("delta", delta, f"give at least {MIN_PLD_DELTA:g}: RDP does not cover these events")


# --- the privacy loss distribution


def _relation(adjacency: Adjacency) -> "NeighboringRelation":
    from dp_accounting import NeighboringRelation as Relation

    match adjacency:
        case Adjacency.ZERO_OUT:
            return Relation.REPLACE_SPECIAL
        case Adjacency.ADD_OR_REMOVE_ONE:
            return Relation.ADD_OR_REMOVE_ONE
        case Adjacency.REPLACE_ONE:
            return Relation.REPLACE_ONE


@lru_cache(maxsize=4096)
def _has_distribution(leaf: Leaf, adjacency: Adjacency) -> bool:
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(_relation(adjacency)).supports(leaf)


@lru_cache(maxsize=4096)
def _distribution(counts: Counts, delta: float, adjacency: Adjacency, interval: float) -> float:
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(_relation(adjacency), interval)
    precision = 0.0
    for leaf, n in counts:
        if isinstance(leaf, GaussianDpEvent):
            precision += n / (leaf.noise_multiplier * leaf.noise_multiplier)
        else:
            accountant.compose(leaf, n)
    if precision:
        # Gaussians compose exactly into one Gaussian, whatever their noise (Dong et al. 2019, corollary 3.3).
        accountant.compose(GaussianDpEvent(precision**-0.5))
    return float(accountant.get_epsilon(delta))


# --- Rényi DP


def _renyi_holds(counts: Counts, adjacency: Adjacency) -> bool:
    """dp_accounting's RDP knows no sampled mechanism under replace-one; half the noise does not make it one."""
    from dp_accounting import GaussianDpEvent

    return adjacency is not Adjacency.REPLACE_ONE or all(
        isinstance(leaf, GaussianDpEvent) for leaf, _ in counts
    )


def _renyi(counts: Counts, delta: float, adjacency: Adjacency) -> float | None:
    """Epsilon by RDP: a bound where `_renyi_holds`, elsewhere a size; None where RDP knows an event not at all."""
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS, compute_epsilon

    total = np.zeros(len(DEFAULT_RDP_ORDERS))
    for leaf, n in counts:
        vector = _renyi_vector(leaf, adjacency)
        if vector is None:
            return None
        total += n * vector
    return float(compute_epsilon(DEFAULT_RDP_ORDERS, total.tolist(), delta)[0])


@lru_cache(maxsize=4096)
def _renyi_vector(leaf: Leaf, adjacency: Adjacency) -> NDArray[np.float64] | None:
    from dp_accounting import NeighboringRelation as Relation
    from dp_accounting.rdp import RdpAccountant

    relation = _relation(adjacency)
    if adjacency is Adjacency.REPLACE_ONE:
        leaf, relation = _halved(leaf), Relation.REPLACE_SPECIAL
    accountant = RdpAccountant(neighboring_relation=relation)
    if not accountant.supports(leaf):
        return None
    with quiet_orders():
        return accountant.compose(leaf).rdp


@contextmanager
def quiet_orders() -> Generator[None]:
    """Keep dp_accounting from logging a line for every RDP order it leaves out."""
    absl = logging.getLogger("absl")
    absl.addFilter(_unconverged)
    try:
        yield
    finally:
        absl.removeFilter(_unconverged)


def _unconverged(record: logging.LogRecord) -> bool:
    # An order that does not converge is left out; the others are valid without it. A line per order is noise.
    return "failed to converge" not in record.getMessage()


def _halved(leaf: Leaf) -> Leaf:
    """Replacing a unit moves a clipped sum by up to twice the clip: half the noise per sensitivity."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    if isinstance(leaf, GaussianDpEvent):
        return GaussianDpEvent(leaf.noise_multiplier / 2)
    if isinstance(leaf, PoissonSampledDpEvent):
        return PoissonSampledDpEvent(leaf.sampling_probability, _halved(leaf.event))
    return leaf


# --- the gate


class Gate:
    """Decides whether one more release fits, cheaply over thousands of equal rounds; decisions are `within`'s.

    Cost only grows with counts. So what fits vouches for everything below it, what does not fit condemns
    everything above it, and only counts between the two are computed: RDP first (additive, cached per event),
    then PLD, looking ahead in strides that double while they fit and halve where they do not.
    """

    def __init__(self) -> None:
        self._fitting: dict[_Scale, list[dict[Leaf, int]]] = {}
        self._failing: dict[_Scale, list[dict[Leaf, int]]] = {}

    def fits(self, spent: Events, proposed: "DpEvent", budget: Budget) -> bool:
        """Whether ``proposed`` after ``spent`` (events, or how often each happened) stays within ``budget``."""
        step = dict(grouped([proposed]))
        counts = dict(grouped(spent))
        wanted = _ahead(counts, step, 1)
        verdict = self._known(wanted, budget)
        if verdict is None and self._quick(wanted, budget):
            return True
        if verdict is None:
            verdict = self._computed(wanted, budget)
            if verdict:
                self._look_ahead(wanted, step, budget)
        return verdict

    def _known(self, wanted: dict[Leaf, int], budget: Budget) -> bool | None:
        scale = _scale(wanted, budget)
        if any(_covers(larger, wanted) for larger in self._fitting.get(scale, [])):
            return True
        if any(_covers(wanted, smaller) for smaller in self._failing.get(scale, [])):
            return False
        return None

    def _quick(self, wanted: dict[Leaf, int], budget: Budget) -> bool:
        counts = _canonical(wanted)
        if not counts or not _renyi_holds(counts, budget.adjacency):
            return False
        bound = _renyi(counts, budget.target_delta, budget.adjacency)
        return bound is not None and bound <= budget.target_epsilon

    def _computed(self, wanted: dict[Leaf, int], budget: Budget) -> bool:
        scale = _scale(wanted, budget)
        verdict = _within(_canonical(wanted), budget, GATE_INTERVAL)
        if verdict:
            others = [c for c in self._fitting.get(scale, []) if not _covers(wanted, c)]
            self._fitting[scale] = [*others, wanted]
        else:
            others = [c for c in self._failing.get(scale, []) if not _covers(c, wanted)]
            self._failing[scale] = [*others, wanted]
        return verdict

    def _look_ahead(self, wanted: dict[Leaf, int], step: dict[Leaf, int], budget: Budget) -> None:
        stride = max((wanted[leaf] // n for leaf, n in step.items()), default=0)
        while stride >= 1:
            further = _ahead(wanted, step, stride)
            verdict = self._known(further, budget)
            if verdict or (verdict is None and self._computed(further, budget)):
                return
            stride //= 2


# Bounds are monotone in the counts on one grid only, so what vouches and what is vouched for must share it.
_Scale = tuple[Budget, float]


def _scale(counts: dict[Leaf, int], budget: Budget) -> _Scale:
    return budget, _fitting_rounds(GATE_INTERVAL, _canonical(counts))


def _ahead(counts: dict[Leaf, int], step: dict[Leaf, int], times: int) -> dict[Leaf, int]:
    return counts | {leaf: counts.get(leaf, 0) + n * times for leaf, n in step.items()}


def _covers(larger: dict[Leaf, int], smaller: dict[Leaf, int]) -> bool:
    return all(larger.get(leaf, 0) >= n for leaf, n in smaller.items())
