"""Partitions of one data set's examples into clients' shares.

Each partition is a function of only the labels and an integer seed. Every example goes to exactly one client, and every
client has at least one; a client may hold a single example or a single class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal

Indices = NDArray[np.int64]

MAX_SEED = 2**63 - 1
# Two shards a client, as in McMahan et al., 1602.05629, section 3.
SHARDS_PER_CLIENT = 2


@dataclass(frozen=True)
class Partition:
    """Named rule that deals examples to clients.

    Attributes:
      name: a key of `PARTITIONS`.
      num_clients: at least 1.
      alpha: concentration of a dirichlet partition, finite and above 0; the others ignore it.
      seed: 0 to 2**63 - 1.

    Raises:
      Refusal: a value is out of its range.
    """

    name: str
    num_clients: int
    alpha: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in PARTITIONS:
            raise Refusal("partition", self.name, f"choose one of {', '.join(PARTITIONS)}")
        if not _is_int(self.num_clients) or self.num_clients < 1:
            raise Refusal("num_clients", self.num_clients, "give a whole number of at least 1")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise Refusal("alpha", self.alpha, "give a finite number above 0")
        if not _is_int(self.seed) or not 0 <= self.seed <= MAX_SEED:
            raise Refusal("seed", self.seed, "give a whole number from 0 to 2**63 - 1")

    def shares(self, labels: Indices, groups: Indices | None = None) -> tuple[Indices, ...]:
        """Return for each client the sorted positions of its examples.

        Args:
          labels: classes, shape (n,).
          groups: natural owner of each example, shape (n,); None if unknown.

        Raises:
          Refusal: there are fewer examples than clients, or the partition does not suit the data.
        """
        if len(labels) < self.num_clients:
            raise Refusal("num_clients", self.num_clients, f"there are only {len(labels)} examples")
        dealt = PARTITIONS[self.name](self, labels, groups)
        return tuple(np.sort(share) for share in dealt)


def natural(how: Partition, labels: Indices, groups: Indices | None) -> list[Indices]:
    """Return one share for each owner in `groups`; refuse None, and a number of owners other than that of clients."""
    if groups is None:
        remedy = "these data do not name owners; choose iid, dirichlet or shards"
        raise Refusal("partition", how.name, remedy)
    owners = np.unique(groups)
    if len(owners) != how.num_clients:
        remedy = f"the natural partition has {len(owners)} clients; use that number or another partition"
        raise Refusal("num_clients", how.num_clients, remedy)
    return [np.flatnonzero(groups == owner) for owner in owners]


def iid(how: Partition, labels: Indices, groups: Indices | None) -> list[Indices]:
    """Return shares of a uniformly random deal by the seed of `how`; their sizes differ by at most one."""
    return np.array_split(_generator(how).permutation(len(labels)), how.num_clients)


def dirichlet(how: Partition, labels: Indices, groups: Indices | None) -> list[Indices]:
    """Return shares whose class mixes are drawn from Dirichlet(alpha * class frequencies); sizes differ by at most one.

    Hsu, Qi and Brown 2019, arXiv:1909.06335, section 3: an exhausted class is no longer drawn. A small alpha gives
    clients with one class, a large one approaches iid. `how` gives alpha and the seed; `groups` are not used.
    """
    generator = _generator(how)
    order = generator.permutation(len(labels))
    pools = [order[labels[order] == label] for label in np.unique(labels)]
    remaining = np.array([len(pool) for pool in pools])  # of each class; dealt from the end of its pool
    concentration = how.alpha * remaining / remaining.sum()
    sizes = map(len, np.array_split(order, how.num_clients))
    shares: list[Indices] = []
    for size in sizes:
        mix = np.nan_to_num(generator.dirichlet(concentration))
        counts = _draw_classes(generator, mix, remaining, size)
        parts = zip(pools, remaining, counts, strict=True)
        shares.append(np.concatenate([pool[end - count : end] for pool, end, count in parts]))
        remaining = remaining - counts
    return shares


def shards(how: Partition, labels: Indices, groups: Indices | None) -> list[Indices]:
    """Return shares of SHARDS_PER_CLIENT random pieces each of the examples sorted by class."""
    pieces = SHARDS_PER_CLIENT * how.num_clients
    if len(labels) < pieces:
        remedy = f"shards need {SHARDS_PER_CLIENT} examples per client, and there are {len(labels)}"
        raise Refusal("num_clients", how.num_clients, remedy)
    generator = _generator(how)
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    shards = np.array_split(by_class, pieces)
    numbers = generator.permutation(pieces).reshape(how.num_clients, SHARDS_PER_CLIENT)
    return [np.concatenate([shards[number] for number in row]) for row in numbers]


PARTITIONS: Mapping[str, Callable[[Partition, Indices, Indices | None], list[Indices]]] = {
    "natural": natural,
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
}


def _generator(how: Partition) -> np.random.Generator:
    return np.random.default_rng([how.seed, how.num_clients])


def _draw_classes(
    generator: np.random.Generator, mix: NDArray[np.float64], remaining: Indices, size: int
) -> Indices:
    """Return one client's number of examples of each class: `size` in all, at most `remaining` of each."""
    counts = np.zeros_like(remaining)
    while (missing := size - int(counts.sum())) > 0:
        weights = mix * (counts < remaining)
        if weights.sum() < np.finfo(np.float64).tiny:  # the client's own classes are exhausted
            weights = (remaining - counts).astype(np.float64)
        drawn = generator.multinomial(missing, weights / weights.sum())
        counts = np.minimum(counts + drawn, remaining)
    return counts


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
