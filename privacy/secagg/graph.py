"""Graph of the pairs that share masks: complete up to 128 clients, a random ring with k neighbours above.

The ring is the k-regular Harary graph over a random order of the cohort (Bell et al., CCS 2020, section 3). The order
comes from a hash over all adverts, so that no single client or server chooses it. The last client to advertise can
still try several adverts: 2**q tries cost q bits of `PRIVACY_BITS` on a ring, and none on the complete graph.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ...base.refusal import Refusal
from .transcript import Profile, Purpose, digest

COMPLETE_UP_TO = 128
MAXIMUM_CLIENTS = 10**6  # a larger cohort could keep a client computing tails
PRIVACY_BITS = 40  # an attempt opens more than its sum with probability 2**-40 at most
LIVENESS_BITS = 20  # an attempt fails at the stated dropout with probability 2**-20 at most
_NEGLIGIBLE = 2.0**-60  # of a tail: smaller terms end its sum


@dataclass(frozen=True)
class Shape:
    """Sizes of a graph and of its secret sharing.

    Attributes:
      clients: number of nodes, n.
      neighbours: of each node, k.
      threshold: number of neighbours that open one of a node's two secrets, t.
    """

    clients: int
    neighbours: int
    threshold: int

    @property
    def complete(self) -> bool:
        """Whether all nodes are neighbours of each other."""
        return self.neighbours == self.clients - 1

    @property
    def possible(self) -> bool:
        """Whether such a graph and such a sharing exist."""
        regular = self.complete or (self.neighbours < self.clients and self.neighbours % 2 == 0)
        return regular and 1 <= self.threshold <= self.neighbours


def colluders(clients: int, rate: float) -> int:
    """Return the number of colluding clients, rounded up (0.1 of 300 is 30); at most all others.

    Args:
      clients: the cohort.
      rate: share of it that colludes, in [0, 1).
    """
    return min(clients - 1, math.ceil(clients * rate - 1e-9))


@dataclass(frozen=True)
class Ring:
    """Cohort in a random order, in which each node has its nearest `neighbours`, or all the others.

    The relation is symmetric, and the graph connected.
    """

    order: tuple[int, ...]
    neighbours: int

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {node: position for position, node in enumerate(self.order)}

    def around(self, node: int) -> list[int]:
        """Return a node's neighbours, in ascending order."""
        position, size, half = self._positions[node], len(self.order), self.neighbours // 2
        if self.neighbours == size - 1:
            return sorted([*self.order[:position], *self.order[position + 1 :]])
        return sorted(
            self.order[(position + side * step) % size] for step in range(1, half + 1) for side in (1, -1)
        )


def ring(nodes: Iterable[int], neighbours: int, seed: bytes) -> Ring:
    """Return the nodes in the order given by the seed.

    Args:
      nodes: distinct.
      neighbours: of each node: an even number, or all the others.
      seed: a hash over all adverts.

    Raises:
      ValueError: if there is no such graph.
    """
    order = sorted(nodes, key=lambda node: digest(Purpose.RING, seed, node))
    if not Shape(len(order), neighbours, 1).possible:
        raise ValueError(f"{len(order)} nodes cannot have {neighbours} neighbours each")
    return Ring(tuple(order), neighbours)


@lru_cache(maxsize=64)
def smallest_shape(clients: int, dropout: float, collusion: float, profile: Profile) -> Shape:
    """Return the graph of fewest neighbours, with the lowest threshold, that opens the sum and nothing else.

    Args:
      clients: the cohort, from 2 to `MAXIMUM_CLIENTS`.
      dropout: share of the cohort that fails to answer, in [0, 1).
      collusion: share of it that works for the server, in [0, 1).
      profile: what the server may do.

    Raises:
      Refusal: no graph keeps both, as with a third each and a malicious server.
    """
    sizes = range(2, clients - 1, 2) if clients > COMPLETE_UP_TO else ()
    for neighbours in (*sizes, clients - 1):
        # A higher threshold opens less.
        threshold = 1 + bisect_left(
            range(1, neighbours + 1),
            True,
            key=lambda t, k=neighbours: opens_nothing(Shape(clients, k, t), collusion, dropout, profile),
        )
        shape = Shape(clients, neighbours, threshold)
        if threshold <= neighbours and _opens_the_sum(shape, dropout):
            return shape
    remedy = f"a cohort of {clients} cannot stand this beside collusion={collusion}: lower one, or ask more clients"
    raise Refusal("dropout", dropout, remedy)


def opens_nothing(shape: Shape, collusion: float, dropout: float, profile: Profile) -> bool:
    """Return whether only the survivors' sum can be opened, except with probability 2**-`PRIVACY_BITS`.

    A malicious server also chooses the dropouts, so `dropout` binds only a semi-honest one. Union
    bounds over the cohort, with exact hypergeometric tails.

    Args:
      shape: the graph and its threshold.
      collusion: share of the cohort that works for the server, in [0, 1).
      dropout: share of it that fails to answer, in [0, 1).
      profile: what the server may do.
    """
    n, k, t = shape.clients, shape.neighbours, shape.threshold
    bad = colluders(n, collusion)
    if profile is Profile.MALICIOUS:
        # Honest neighbours open one of the two secrets, colluding ones both: 2t <= k + (colluding) opens both.
        chance = n * tail(n - 1, bad, k, 2 * t - k)
        if not shape.complete:
            # A ring comes apart at two gaps of k/2 places, dropped or colluding. An arc opens only if both its ends
            # have t neighbours left, k/2 inside at most: each gap must hold t - k/2 that collude. The counts of two
            # gaps are negatively associated.
            chance += math.comb(n, 2) * tail(n, bad, k // 2, t - k // 2) ** 2
        return chance <= 2.0**-PRIVACY_BITS
    chance = n * tail(n - 1, bad, k, t)
    if not shape.complete:
        # A ring comes apart at two gaps of k/2 places.
        missing = min(n, bad + colluders(n, dropout))
        chance += math.comb(n, 2) * tail(n, missing, k, k)
    return chance <= 2.0**-PRIVACY_BITS


def _opens_the_sum(shape: Shape, dropout: float) -> bool:
    """Return whether every secret has a threshold of holders left at this dropout, by a union bound over the cohort."""
    n, k, t = shape.clients, shape.neighbours, shape.threshold
    return n * tail(n - 1, colluders(n, dropout), k, k - t + 1) <= 2.0**-LIVENESS_BITS


def tail(population: int, marked: int, draws: int, minimum: int) -> float:
    """Return P[X >= minimum] of the hypergeometric X: the marked ones among draws without replacement.

    Args:
      population: size of the population.
      marked: number of its marked members.
      draws: number of members that are drawn.
      minimum: of X.
    """
    first, last = max(minimum, 0, draws - (population - marked)), min(marked, draws)
    if first > last:
        return 0.0
    # Terms are added from the likeliest value outwards: one at a far end may underflow although the sum does not.
    mode = (draws + 1) * (marked + 1) // (population + 2)
    start = min(max(first, mode), last)
    chance = _log_choose(marked, start) + _log_choose(population - marked, draws - start)
    at_start = term = total = math.exp(chance - _log_choose(population, draws))
    spare = population - marked - draws
    for hit in range(start, last):
        term *= (marked - hit) * (draws - hit) / ((hit + 1) * (spare + hit + 1))
        total += term
        if term <= total * _NEGLIGIBLE:
            break
    term = at_start
    for hit in range(start, first, -1):
        term *= hit * (spare + hit) / ((marked - hit + 1) * (draws - hit + 1))
        total += term
        if term <= total * _NEGLIGIBLE:
            break
    return total


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
