"""Rényi DP (Mironov 2017, arXiv:1702.07476) of counted events, and its conversion (Canonne et al. 2020,
arXiv:2004.00010, proposition 12).

A Gaussian event's noise multiplier is noise std / clip, the sensitivity under zero-out. What replace-one adds to
that is added here and nowhere else: RDP gets half the noise multiplier.
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
from .events import Counts, Leaf, asked_of, drawn_openly, gaussian_scale

if TYPE_CHECKING:
    from dp_accounting import NeighboringRelation

Vector = NDArray[np.float64]


def relation_of(adjacency: Adjacency) -> "NeighboringRelation":
    """The adjacency in dp_accounting's words."""
    from dp_accounting import NeighboringRelation as Relation

    match adjacency:
        case Adjacency.ZERO_OUT:
            return Relation.REPLACE_SPECIAL
        case Adjacency.ADD_OR_REMOVE_ONE:
            return Relation.ADD_OR_REMOVE_ONE
        case Adjacency.REPLACE_ONE:
            return Relation.REPLACE_ONE


@lru_cache(maxsize=4096)
def renyi_holds(leaf: Leaf, adjacency: Adjacency) -> bool:
    """dp_accounting's RDP knows no sampled mechanism under replace-one; half the noise does not make it one."""
    from dp_accounting import GaussianDpEvent

    return adjacency is not Adjacency.REPLACE_ONE or isinstance(leaf, GaussianDpEvent)


def by_renyi(counts: Counts, delta: float, adjacency: Adjacency) -> float | None:
    """Epsilon by RDP: a bound where `renyi_holds`, elsewhere a size; None where RDP knows an event not at all."""
    total = np.zeros(len(orders()))
    for leaf, n in counts:
        vector = renyi_vector(leaf, adjacency)
        if vector is None:
            return None
        total += n * vector
    return from_renyi(total, delta)


@lru_cache
def orders() -> Vector:
    """The orders of RDP that are looked at."""
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS

    return np.array(DEFAULT_RDP_ORDERS)


def from_renyi(total: Vector, delta: float) -> float:
    """The epsilon at ``delta`` of RDP ``total`` at the `orders`."""
    from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

    return float(compute_epsilon(orders().tolist(), total.tolist(), delta)[0])


@lru_cache(maxsize=4096)
def renyi_vector(leaf: Leaf, adjacency: Adjacency) -> Vector | None:
    """RDP of ``leaf`` at the `orders`; of a sampled composition as if it were not sampled, or sampled openly."""
    from dp_accounting import NeighboringRelation as Relation
    from dp_accounting.rdp import RdpAccountant

    parts = asked_of(leaf)
    if parts is not None:
        vectors = [(n, renyi_vector(part, adjacency)) for part, n in parts]
        known = [n * vector for n, vector in vectors if vector is not None]
        if len(known) < len(vectors):
            return None
        return (
            _openly(np.sum(known, axis=0), leaf.sampling_probability)
            if drawn_openly(leaf)
            else np.sum(known, axis=0)
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


def _openly(vector: Vector, rate: float) -> Vector:
    """RDP of what happens at this rate, for all to see: the Rényi divergence of a mixture of two visible cases."""
    above = orders() - 1
    return np.maximum(np.logaddexp(math.log1p(-rate), math.log(rate) + above * vector) / above, 0.0)


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
