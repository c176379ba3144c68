"""Canary clients: dummies that send a random direction, and how far the released aggregates lie along it.

Andrew et al. 2023 (arXiv:2302.03098). Everything here is computed from released aggregates and seeds: it costs no
privacy. The server is honest but curious; canaries that went through clipping and masking test those too.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..accounting.events import leaves
from ..mechanisms.randomness import Stream, keyed_stream
from ..refusal import Refusal
from .one_run import Scores

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Directions:
    """Unit vectors, each zero outside a window of the coordinates.

    ``values``: (canaries, support), float32; ``starts``: (canaries,), where each window begins; ``dimension`` of the
    whole update. A window costs memory and time by its size, and as much power as the whole against isotropic noise.
    """

    values: NDArray[np.float32]
    starts: NDArray[np.int64]
    dimension: int

    def along(self, released: NDArray[np.floating]) -> Scores:
        """Inner products with a released vector of shape (dimension,): (canaries,)."""
        support = self.values.shape[1]
        if support == self.dimension:
            return (self.values @ released.astype(np.float32)).astype(np.float64)
        pairs = zip(self.values, self.starts, strict=True)
        # Not row @ ...: BLAS spreads so short a product over all cores, whose waiting takes three times as long.
        return np.array([(row * released[start : start + support]).sum() for row, start in pairs], np.float64)

    def updates(self, canaries: Sequence[int], norms: NDArray[np.float64]) -> NDArray[np.float32]:
        """What these canaries send: their directions at these L2 norms, (len(canaries), dimension)."""
        support = self.values.shape[1]
        whole = np.zeros((len(canaries), self.dimension), np.float32)
        for row, canary, norm in zip(whole, canaries, norms, strict=True):
            start = int(self.starts[canary])
            row[start : start + support] = np.float32(norm) * self.values[canary]
        return whole


def directions(stream: Stream, canaries: int, dimension: int, support: int | None = None) -> Directions:
    """Draw unit vectors uniformly, each within a window of ``support`` coordinates (all of them by default)."""
    support = dimension if support is None else support
    if not 2 <= support <= dimension:
        raise Refusal(
            "support", support, f"give a number from 2 to {dimension}, the coordinates of an update"
        )
    generator = stream.generator()
    values = generator.standard_normal((canaries, support), dtype=np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return Directions(values, generator.integers(0, dimension - support + 1, canaries), dimension)


@dataclass(frozen=True)
class Canaries:
    """Canary clients: their directions, and their coins, (canaries,), true for those that are in."""

    directions: Directions
    coins: NDArray[np.bool_]

    def updates(self, canaries: Sequence[int], norm: float, replaced: bool) -> NDArray[np.float32]:
        """What these canaries send: in, their direction at L2 norm `norm`; out, nothing, or the opposite if `replaced`."""
        sides = np.where(self.coins[list(canaries)], 1.0, -1.0 if replaced else 0.0)
        return self.directions.updates(canaries, norm * sides)

    def window(self, canary: int, norm: float, replaced: bool) -> tuple[int, NDArray[np.float32]]:
        """What one canary sends, where it is not zero: the first coordinate, and (support,) from there on."""
        side = 1.0 if self.coins[canary] else -1.0 if replaced else 0.0
        return int(self.directions.starts[canary]), np.float32(norm * side) * self.directions.values[canary]


@lru_cache(maxsize=2)
def canaries_of(seed: bytes, count: int, dimension: int, support: int) -> Canaries:
    """Return the canaries that a secret seed of 32 bytes stands for; the same ones in every process."""
    drawn = directions(keyed_stream(seed, "directions"), count, dimension, support)
    return Canaries(drawn, coins_of(seed, count))


def coins_of(seed: bytes, count: int) -> NDArray[np.bool_]:
    """Return the fair coins of so many canaries, (count,)."""
    return keyed_stream(seed, "coins").uint64(count) % np.uint64(2) == 1


def commitment(seed: bytes, coins: NDArray[np.bool_]) -> str:
    """SHA-256 of a secret seed of 32 bytes and the coins: published before the first round, opened after the last."""
    if len(seed) != 32:
        raise Refusal(
            "seed", f"{len(seed)} bytes", "give 32, or the coins could be guessed from the commitment"
        )
    return hashlib.sha256(seed + np.packbits(coins).tobytes() + len(coins).to_bytes(8, "big")).hexdigest()


@dataclass(frozen=True)
class KnownRounds:
    """The rounds that each canary was in, or would have been in: evidence only where the claim keeps no draw secret.

    ``taken``: (rounds, canaries), bool; ``event``: what one round costs against whoever sees the scores. Refusal where
    that cost counts on a draw: who knows the rounds is then no adversary of the claim, and would refute a true one.
    """

    taken: NDArray[np.bool_]
    event: "DpEvent"

    def __post_init__(self) -> None:
        if any(hasattr(leaf, "sampling_probability") for leaf, _ in leaves(self.event)):
            remedy = "the claim counts on a draw that nobody sees; score the sum of all rounds instead"
            raise Refusal("event", type(self.event).__name__, remedy)


def round_scores(along: Vector, norms: Vector, dimension: int, rounds: KnownRounds | None = None) -> Scores:
    """One score a canary, about N(0, 1) for such as were out: the rounds' inner products, weighted by precision.

    ``along``: (rounds, canaries), from `Directions.along`; ``norms``: (rounds,), L2 norms of what was released, and
    0 nowhere. Without ``rounds`` all rounds count for every canary. The final model is the case of one round: the inner
    products and the norm of final minus initial parameters.
    """
    if np.any(norms <= 0):
        raise Refusal("norms", float(norms.min()), "a round that released zeros was not noised; leave it out")
    taken = np.ones(along.shape, np.bool_) if rounds is None else rounds.taken
    precision = taken / norms[:, None] ** 2
    total = np.sqrt(precision.sum(axis=0))
    if np.any(total == 0):
        raise Refusal("rounds", int((total == 0).sum()), "canaries without a single round; leave them out")
    return math.sqrt(dimension) * (precision * along).sum(axis=0) / total


def ceiling_mu(clip: float, dimension: int, weights: Vector, squared_norm: float, noise: float) -> float:
    """The mu that canaries would show if the noise were absent, and only other clients' updates in their way.

    ``weights``: (rounds,), those of the sum; ``squared_norm`` of that weighted sum of released vectors, sums at this
    ``clip``; ``noise``, its claimed standard deviation a coordinate in one round. The noise's energy is taken off less
    three of its standard deviations, so that by chance the ceiling is too low rather than too high.
    """
    energy = noise**2 * float((weights**2).sum())
    slack = math.sqrt(2 * dimension) * energy
    masking = max(squared_norm - dimension * energy + 3 * slack, slack)
    return clip * float(weights.sum()) * math.sqrt(dimension / masking) if masking else math.inf
