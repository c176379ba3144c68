"""Epsilon of counted events: the smaller of two upper bounds, one by PLD and one by Rényi DP.

The privacy loss distribution (Koskela et al. 2020; connect-the-dots, Doroshenko et al. 2022) is tight and
itself doubles the sensitivity under replace-one; Rényi DP (module `renyi`) also holds at tiny delta and adds
up in microseconds.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

from ...base.refusal import Refusal, real, word
from ..budget import Adjacency, Budget
from .events import (
    MIN_NOISE,
    Counts,
    Leaf,
    gaussian_scale,
    is_exchanged,
    is_mixture,
    is_openly_sampled,
    leaves,
    sample_leaves,
)
from .gaussian import VACUOUS_EPSILON
from .renyi import by_renyi, relation_of, renyi_holds

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

# Steps of the PLD's grid in nats, to gate a release and to publish epsilon.
GATE_INTERVAL, PUBLISH_INTERVAL = 1e-3, 1e-4
# PLD drops 1e-15 of probability mass per composition, which dominates at smaller deltas.
MIN_PLD_DELTA = 1e-12
# A grid's bound is loose by more than 1 % when epsilon, or the typical loss of one sampled round (rate / noise
# multiplier), has fewer steps than these. The grid is then refined, down to the finest.
MIN_STEPS, MIN_STEPS_PER_ROUND = 1000, 5
FINEST_INTERVAL = 1e-5
# If the loss of a round asks for a finer grid than the requested one, grids are refined from the coarsest on until one
# changes the bound by less than this share: the next would change it by less again.
SETTLED = 1e-3
# A grid has at most this many steps, which bounds the memory that a vacuous epsilon takes.
MAX_STEPS = 1_000_000
# Each kind of sampled Gaussian takes a distribution of its own: 20 ms at 1e-3, 0.3 s at 1e-4. Many kinds are published
# on the gate's grid. Beyond the maximum, noise is rounded down and rates up, to the most levels an octave that leave
# few enough kinds; 128 levels cost 1 % of epsilon.
MAX_FINE_KINDS, MAX_KINDS = 32, 128
LEVELS = tuple(2.0**k for k in range(8, -7, -1))
Kind = TypeVar("Kind")

Events = Iterable["DpEvent"] | Mapping["DpEvent", int]  # single events, or how often each happened
VERSION = version("dp-accounting")  # read once: a process that runs out of file descriptors cannot read it


def epsilon(
    events: Events,
    delta: float,
    adjacency: Adjacency | str = Adjacency.ZERO_OUT,
    interval: float = PUBLISH_INTERVAL,
) -> float:
    """Return the epsilon that all events together cost, in nats; 0 for none, infinity for a non-private one.

    Args:
      events: an iterable, or a mapping from an event to how often it happened.
      delta: in (0, 1).
      adjacency: the relation of neighbours, or its name.
      interval: step of the PLD's grid in nats; it is refined where epsilon is small.

    Raises:
      Refusal: an event that cannot be accounted under this adjacency, or a number out of range.

    Example:
      >>> import fedveil as fv
      >>> from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
      >>> step = PoissonSampledDpEvent(0.01, GaussianDpEvent(1.0))
      >>> round(fv.epsilon({step: 1000}, delta=1e-5), 2)
      1.83
    """
    if not 0 < real("delta", delta) < 1:
        raise Refusal("delta", delta, "give a probability strictly between 0 and 1")
    return min(bounds(grouped(events), float(delta), word(Adjacency, "adjacency", adjacency), interval))


def within(events: Events, budget: Budget, interval: float = GATE_INTERVAL) -> bool:
    """Return whether events fit a budget; the cheapest bound that shows it ends the work. Arguments as of `epsilon`."""
    upper_bounds = bounds(grouped(events), budget.target_delta, budget.adjacency, interval)
    return any(bound <= budget.target_epsilon for bound in upper_bounds)


def accountant_name(
    delta: float, adjacency: Adjacency | str = Adjacency.ZERO_OUT, interval: float = PUBLISH_INTERVAL
) -> str:
    """Return how `epsilon` gets its number: accountants, discretisation, conversion, package and version.

    An example is `min(PLD 1e-4 connect-the-dots, RDP Canonne et al. 2020), dp_accounting 0.6.0`. Arguments as of `epsilon`.
    """
    package = f"dp_accounting {VERSION}"
    if delta < MIN_PLD_DELTA:
        return f"RDP Canonne et al. 2020, {package}"
    step = f"{interval:.0e}".replace("e-0", "e-")
    replace = word(Adjacency, "adjacency", adjacency) is Adjacency.REPLACE_ONE
    where = " where unsampled" if replace else ""
    return f"min(PLD {step} connect-the-dots, RDP Canonne et al. 2020{where}), {package}"


def grouped(events: Events) -> Counts:
    """Return the leaves of events with their counts, in an order that does not depend on the order of the events."""
    pairs = events.items() if isinstance(events, Mapping) else ((event, 1) for event in events)
    counts: Counter[Leaf] = Counter()
    for event, count in pairs:
        for leaf, times in leaves(event, count):
            counts[leaf] += times
    return in_order(counts)


# --- upper bounds


def in_order(counts: Mapping[Leaf, int]) -> Counts:
    """Return the counts above zero, in an order that does not depend on how they came."""
    return tuple(sorted(((leaf, n) for leaf, n in counts.items() if n), key=repr))


def bounds(counts: Counts, delta: float, adjacency: Adjacency, interval: float) -> Iterator[float]:
    """Yield upper bounds on epsilon, cheapest first; each alone is valid.

    Args:
      counts: leaves, each with how often it happened.
      delta: in (0, 1).
      adjacency: the relation of neighbours.
      interval: coarsest step of the PLD's grid, in nats.

    Raises:
      Refusal: no accountant covers all of the leaves.
    """
    from dp_accounting.dp_event import NonPrivateDpEvent

    if not counts:
        yield 0.0
        return
    if any(isinstance(leaf, NonPrivateDpEvent) for leaf, _ in counts):
        yield float("inf")
        return
    renyi_epsilon = by_renyi(counts, delta, adjacency)
    if renyi_epsilon is not None and renyi_epsilon > VACUOUS_EPSILON:
        yield float("inf")
        return
    by_rdp = renyi_epsilon is not None and all(renyi_holds(leaf, adjacency) for leaf, _ in counts)
    by_pld = delta >= MIN_PLD_DELTA and all(has_distribution(leaf, adjacency) for leaf, _ in counts)
    if not by_rdp and not by_pld:
        raise _unaccountable(counts, delta, adjacency)
    if renyi_epsilon is not None and by_rdp:
        yield renyi_epsilon
    if by_pld:
        yield from (bound for _, bound in _refined(counts, delta, adjacency, interval, renyi_epsilon))


def _refined(
    counts: Counts, delta: float, adjacency: Adjacency, interval: float, renyi_epsilon: float | None
) -> Iterator[tuple[float, float]]:
    """Yield steps of ever finer grids, each with its PLD bound, until epsilon converges or the grid is the finest.

    Arguments as of `bounds` and `first_interval`.
    """
    interval = max(interval, GATE_INTERVAL) if len(counts) > MAX_FINE_KINDS else interval
    min_loss = min(typical_loss(leaf) for leaf, _ in counts)
    fine_enough = first_interval(min_loss, interval, renyi_epsilon)
    grid, last_bound = GATE_INTERVAL if fine_enough < interval else fine_enough, math.inf
    while True:
        bound = by_distribution(counts, delta, adjacency, grid)
        yield grid, bound
        resolved = grid <= fine_enough and bound >= MIN_STEPS * grid
        settled = fine_enough < interval and grid <= interval and last_bound - bound <= SETTLED * bound
        if resolved or settled or grid <= FINEST_INTERVAL:
            return
        last_bound, grid = bound, finer(grid)


def finer(interval: float) -> float:
    """Return the next finer grid, by tens: the coarser is part of it, so bounds stay monotone in the counts."""
    return max(interval / 10, FINEST_INTERVAL)


def first_interval(loss: float, interval: float, renyi_epsilon: float | None) -> float:
    """Return the step of a grid that resolves a round's loss and reaches epsilon within `MAX_STEPS`.

    Args:
      loss: least `typical_loss` of the leaves, in nats.
      interval: coarsest step, in nats.
      renyi_epsilon: epsilon by RDP, which tells its size; None if RDP does not cover the leaves.
    """
    while interval * MIN_STEPS_PER_ROUND > loss and interval > FINEST_INTERVAL:
        interval = finer(interval)
    while interval * MAX_STEPS < (renyi_epsilon or 0.0):
        interval *= 10
    return interval


@lru_cache(maxsize=4096)
def typical_loss(leaf: Leaf) -> float:
    """Return the scale in nats of one sampled round's privacy loss, or of the narrowest sample inside it.

    `first_interval` chooses a grid by it. It is infinite for a leaf that needs no fine grid.
    """
    if is_exchanged(leaf):
        return typical_loss(leaf.event)
    if is_mixture(leaf):
        pairs = zip(leaf.sensitivities, leaf.sampling_probs, strict=True)
        return min(1.0, sum(sensitivity * share for sensitivity, share in pairs) / leaf.standard_deviation)
    parts = sample_leaves(leaf)
    if parts is None:
        rate, noise = gaussian_scale(leaf) or (1.0, 1.0)
        return rate / noise if rate < 1 else math.inf
    inside = min(typical_loss(part) for part, _ in parts)
    return inside if is_openly_sampled(leaf) else min(inside, leaf.sampling_probability * _joint_loss(parts))


def _joint_loss(parts: Counts) -> float:
    """Return the scale in nats of the joint privacy loss of all parts, at most 1."""
    scales = [(gaussian_scale(leaf) or (min(1.0, typical_loss(leaf)), 1.0), n) for leaf, n in parts]
    return min(1.0, math.hypot(*(rate / noise * n**0.5 for (rate, noise), n in scales)))


def _unaccountable(counts: Counts, delta: float, adjacency: Adjacency) -> Refusal:
    """Return the refusal of leaves, or of a delta, that no accountant covers."""
    culprits = [leaf for leaf, _ in counts if not has_distribution(leaf, adjacency)]
    if culprits:
        return Refusal("event", culprits[0], f"no accountant covers it under {adjacency} beside the others")
    return Refusal("delta", delta, f"give at least {MIN_PLD_DELTA:g}: RDP does not cover these events")


# --- the privacy loss distribution


@lru_cache(maxsize=4096)
def has_distribution(leaf: Leaf, adjacency: Adjacency) -> bool:
    """Return whether PLD covers a leaf under this adjacency."""
    from . import loss_distributions

    return loss_distributions.has_distribution(leaf, relation_of(adjacency))


@lru_cache(maxsize=1024)
def by_distribution(counts: Counts, delta: float, adjacency: Adjacency, interval: float) -> float:
    """Return epsilon by PLD; arguments as of `bounds`."""
    from . import loss_distributions

    return loss_distributions.epsilon(_composed(counts, adjacency, interval), delta)


def losses_of(counts: Counts, delta: float, adjacency: Adjacency, interval: float) -> Any:
    """Return the PLD of counted leaves, on the grid with which `bounds` ends; None if PLD does not cover one of them.

    Arguments as of `bounds`.
    """
    if not all(has_distribution(leaf, adjacency) for leaf, _ in counts):
        return None
    *_, (grid, _) = _refined(counts, delta, adjacency, interval, by_renyi(counts, delta, adjacency))
    return _composed(counts, adjacency, grid)


@lru_cache(maxsize=4)  # the grids of one composition, which serve several deltas
def _composed(counts: Counts, adjacency: Adjacency, interval: float) -> Any:
    """Return the PLD of counted leaves, merged into few kinds. Arguments as of `bounds`."""
    from . import loss_distributions

    merged = in_order(coarsened(with_one_gaussian(dict(counts)), rounded))
    return loss_distributions.distribution(merged, relation_of(adjacency), interval)


def forget_distributions() -> None:
    """Clear the cache of composed distributions: a fine grid takes 6 MiB for each noise that a plan tries."""
    from . import loss_distributions

    _composed.cache_clear()
    loss_distributions.forget()


def with_one_gaussian(counts: Mapping[Leaf, int]) -> dict[Leaf, int]:
    """Return counts with one Gaussian for all of them, which costs exactly as much (Dong et al. 2019, corollary 3.3)."""
    from dp_accounting.dp_event import GaussianDpEvent

    others = {leaf: n for leaf, n in counts.items() if not isinstance(leaf, GaussianDpEvent)}
    gaussians = ((leaf, n) for leaf, n in in_order(counts) if isinstance(leaf, GaussianDpEvent))
    precision = sum(n / (leaf.noise_multiplier * leaf.noise_multiplier) for leaf, n in gaussians)
    return others | ({GaussianDpEvent(precision**-0.5): 1} if precision else {})


def coarsened(counts: dict[Kind, int], rounding: Callable[[Kind, float], Kind]) -> dict[Kind, int]:
    """Return counts of at most `MAX_KINDS` kinds whose cost is an upper bound.

    Args:
      counts: how often each kind happened.
      rounding: maps a kind and a number of levels per octave to a kind that costs no less, such as `rounded`; the finest
        levels that suffice are used.
    """
    coarse = counts
    for levels in LEVELS:
        if len(coarse) <= MAX_KINDS:
            break
        coarse: dict[Kind, int] = {}
        for kind, n in counts.items():
            key = rounding(kind, levels)
            coarse[key] = coarse.get(key, 0) + n
    return coarse


@lru_cache(maxsize=1 << 16)
def rounded(leaf: Leaf, levels: float) -> Leaf:
    """Return a sampled Gaussian of no less loss with noise rounded down and rate rounded up; any other leaf as it is.

    Noise can be added, and a larger sample sampled again, so no divergence is less (post-processing).

    Args:
      leaf: see `events.leaves`.
      levels: number of allowed values of noise, and of rate, per octave.
    """
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent

    scale = gaussian_scale(leaf)
    if scale is None or isinstance(leaf, GaussianDpEvent):
        return leaf
    rate, noise = scale
    larger = 2 ** (math.ceil(math.log2(rate) * levels) / levels)
    less = 2 ** (math.floor(math.log2(noise) * levels) / levels)
    query = GaussianDpEvent(max(min(less, noise), MIN_NOISE))
    return PoissonSampledDpEvent(min(max(larger, rate), 1.0), query)
