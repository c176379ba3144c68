"""Rényi DP of counted events (Mironov 2017, arXiv:1702.07476), and its conversion to epsilon.

The conversion is proposition 12 of Canonne et al. 2020 (arXiv:2004.00010). A Gaussian event's noise multiplier is noise
std / clip, the sensitivity under zero-out. Under replace-one this module, and no other, passes half of it to RDP.
"""

import logging
import math
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..budget import Adjacency
from .events import Counts, Leaf, gaussian_scale, is_exchanged, is_mixture, is_openly_sampled, sample_leaves

if TYPE_CHECKING:
    from dp_accounting.privacy_accountant import NeighboringRelation

Vector = NDArray[np.float64]


def relation_of(adjacency: Adjacency) -> "NeighboringRelation":
    """Return the adjacency in dp_accounting's words."""
    from dp_accounting.privacy_accountant import NeighboringRelation as Relation

    match adjacency:
        case Adjacency.ZERO_OUT:
            return Relation.REPLACE_SPECIAL
        case Adjacency.ADD_OR_REMOVE_ONE:
            return Relation.ADD_OR_REMOVE_ONE
        case Adjacency.REPLACE_ONE:
            return Relation.REPLACE_ONE


@lru_cache(maxsize=4096)
def renyi_holds(leaf: Leaf, adjacency: Adjacency) -> bool:
    """Return whether RDP of a leaf is a bound under this adjacency.

    dp_accounting's RDP knows no sampled mechanism under replace-one, and half the noise does not make it one.
    """
    from dp_accounting.dp_event import GaussianDpEvent

    replaced = adjacency is Adjacency.REPLACE_ONE or is_exchanged(leaf)
    return not replaced or isinstance(leaf, GaussianDpEvent)


def by_renyi(counts: Counts, delta: float, adjacency: Adjacency) -> float | None:
    """Return epsilon by RDP; None if RDP does not cover one of the leaves.

    It is a bound if `renyi_holds` for all leaves, else an estimate of epsilon's size. Arguments as of `epsilon.bounds`.
    """
    total = np.zeros(len(orders()))
    for leaf, n in counts:
        vector = renyi_vector(leaf, adjacency)
        if vector is None:
            return None
        total += n * vector
    return from_renyi(total, delta)


@lru_cache
def orders() -> Vector:
    """Return the orders at which RDP is computed, (orders,)."""
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS

    return np.array(DEFAULT_RDP_ORDERS)


def from_renyi(total: Vector, delta: float) -> float:
    """Return the epsilon at `delta` of composed RDP at the `orders`, (orders,)."""
    from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

    return float(compute_epsilon(orders().tolist(), total.tolist(), delta)[0])


@lru_cache(maxsize=4096)
def renyi_vector(leaf: Leaf, adjacency: Adjacency) -> Vector | None:
    """Return RDP of a leaf at the `orders`, (orders,); None if RDP does not cover the leaf.

    A composition on one secret sample counts as if it were not sampled.

    Args:
      leaf: see `events.leaves`.
      adjacency: the relation of neighbours.
    """
    from dp_accounting.privacy_accountant import NeighboringRelation as Relation
    from dp_accounting.rdp import RdpAccountant

    if is_exchanged(leaf):
        return renyi_vector(leaf.event, Adjacency.REPLACE_ONE)
    parts = sample_leaves(leaf)
    if parts is not None:
        vectors = [(n, renyi_vector(part, adjacency)) for part, n in parts]
        terms = [n * vector for n, vector in vectors if vector is not None]
        if len(terms) < len(vectors):
            return None
        total = np.sum(terms, axis=0)
        if not is_openly_sampled(leaf):
            return total
        # Divergence of order a of a visible draw: log(1 - rate + rate e^((a - 1) total)) / (a - 1).
        rate, above = leaf.sampling_probability, orders() - 1
        return np.maximum(np.logaddexp(math.log1p(-rate), math.log(rate) + above * total) / above, 0.0)
    if is_mixture(leaf):
        from . import gaussian_mixture

        return gaussian_mixture.renyi(
            leaf.standard_deviation, leaf.sensitivities, leaf.sampling_probs, orders()
        )
    relation = relation_of(adjacency)
    if adjacency is Adjacency.REPLACE_ONE:
        leaf, relation = _halved(leaf), Relation.REPLACE_SPECIAL
    accountant = RdpAccountant(neighboring_relation=relation)
    if not accountant.supports(leaf):
        return None
    rate, noise = gaussian_scale(leaf) or (1.0, 1.0)
    if rate < 1:
        from .sampled_gaussian import renyi

        return renyi(rate, noise, orders())
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
    """Return whether to log a record: not if an RDP order failed to converge, since the others are valid without it."""
    return "failed to converge" not in record.getMessage()


def _halved(leaf: Leaf) -> Leaf:
    """Return a Gaussian with half the noise: replacing a unit moves a clipped sum by up to twice the clip."""
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent

    if isinstance(leaf, GaussianDpEvent):
        return GaussianDpEvent(leaf.noise_multiplier / 2)
    if isinstance(leaf, PoissonSampledDpEvent):
        return PoissonSampledDpEvent(leaf.sampling_probability, _halved(leaf.event))
    return leaf
