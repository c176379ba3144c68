"""Canary clients: dummies that each send a random direction, scored by how far released sums lie along it.

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

from ...base.refusal import Refusal
from ..accounting.events import leaves
from ..mechanisms.randomness import Stream, keyed_stream
from .one_run import Scores

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Directions:
    """Unit vectors, each zero outside a window of the coordinates.

    A window costs memory and time by its size, and has as much power as the whole against isotropic noise.

    Attributes:
      values: coordinates inside the windows, (canaries, support), float32.
      starts: first coordinate of each window, (canaries,).
      dimension: number of coordinates of an update.
    """

    values: NDArray[np.float32]
    starts: NDArray[np.int64]
    dimension: int

    def along(self, released: NDArray[np.floating]) -> Scores:
        """Return the inner product of each direction with a released vector, (dimension,): (canaries,)."""
        support = self.values.shape[1]
        if support == self.dimension:
            return (self.values @ released.astype(np.float32)).astype(np.float64)
        pairs = zip(self.values, self.starts, strict=True)
        # Not `row @ ...`: BLAS spreads even short products over all cores and takes three times as long.
        return np.array([(row * released[start : start + support]).sum() for row, start in pairs], np.float64)

    def updates(self, canaries: Sequence[int], norms: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the updates of canaries, their directions times their norms: (len(canaries), dimension).

        Args:
          canaries: numbers of the canaries.
          norms: L2 norm of each of these updates, negative for the opposite direction.
        """
        support = self.values.shape[1]
        whole = np.zeros((len(canaries), self.dimension), np.float32)
        for row, canary, norm in zip(whole, canaries, norms, strict=True):
            start = int(self.starts[canary])
            row[start : start + support] = np.float32(norm) * self.values[canary]
        return whole


def directions(stream: Stream, canaries: int, dimension: int, support: int) -> Directions:
    """Draw unit vectors uniformly, each within a window.

    Args:
      stream: stream of random numbers.
      canaries: number of directions.
      dimension: number of coordinates of an update.
      support: number of coordinates of a window, from 2 to `dimension`.

    Raises:
      Refusal: the window does not fit.
    """
    if not 2 <= support <= dimension:
        remedy = f"give a number from 2 to {dimension}, the coordinates of an update"
        raise Refusal("support", support, remedy)
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
        """Return the updates of canaries: (len(canaries), dimension).

        Args:
          canaries: numbers of the canaries.
          norm: L2 norm of the update of a canary that is in.
          replaced: whether canaries that are out send the opposite update instead of zero.
        """
        return self.directions.updates(canaries, self._norms(norm, replaced)[list(canaries)])

    def window(self, canary: int, norm: float, replaced: bool) -> tuple[int, NDArray[np.float32]]:
        """Return one canary's update as its window: the first coordinate, and the (support,) values from there.

        Other arguments as of `updates`.
        """
        length = np.float32(self._norms(norm, replaced)[canary])
        return int(self.directions.starts[canary]), length * self.directions.values[canary]

    def _norms(self, norm: float, replaced: bool) -> NDArray[np.float64]:
        """Return the signed length of each canary's update along its direction, (canaries,); 0 or opposite if it is out."""
        return np.where(self.coins, norm, -norm if replaced else 0.0)


@lru_cache(maxsize=2)
def canaries_of(seed: bytes, count: int, dimension: int, support: int) -> Canaries:
    """Return the canaries of a secret seed; the same in every process.

    Args:
      seed: 32 bytes.
      count: number of canaries.
      dimension: as of `directions`.
      support: as of `directions`.
    """
    canary_directions = directions(keyed_stream(seed, "directions"), count, dimension, support)
    return Canaries(canary_directions, coins_of(seed, count))


def coins_of(seed: bytes, count: int) -> NDArray[np.bool_]:
    """Return the fair coins of `count` canaries, derived from a secret seed of 32 bytes, (count,)."""
    return keyed_stream(seed, "coins").uint64(count) % np.uint64(2) == 1


def commitment(seed: bytes, coins: NDArray[np.bool_]) -> str:
    """Return the SHA-256 of seed and coins: published before the first round, opened after the last.

    Args:
      seed: secret, 32 bytes.
      coins: (canaries,).

    Raises:
      Refusal: the seed has another length; the coins could be guessed from the commitment.
    """
    if len(seed) != 32:
        remedy = "give 32, or the coins could be guessed from the commitment"
        raise Refusal("seed", f"{len(seed)} bytes", remedy)
    return hashlib.sha256(seed + np.packbits(coins).tobytes() + len(coins).to_bytes(8, "big")).hexdigest()


@dataclass(frozen=True)
class KnownRounds:
    """Rounds whose cohort included each canary, for scores that use them; a claim with a secret draw forbids it.

    Attributes:
      included: (rounds, canaries), bool.
      event: cost of one round against an adversary that sees the scores.

    Raises:
      Refusal: the event relies on a secret draw; the claim then excludes an adversary that knows the rounds.
    """

    included: NDArray[np.bool_]
    event: "DpEvent"

    def __post_init__(self) -> None:
        if any(hasattr(leaf, "sampling_probability") for leaf, _ in leaves(self.event)):
            remedy = "the claim counts on a draw that nobody sees; score the sum of all rounds instead"
            raise Refusal("event", type(self.event).__name__, remedy)


def round_scores(along: Vector, norms: Vector, dimension: int, rounds: KnownRounds | None = None) -> Scores:
    """Return the score of each canary, (canaries,), about N(0, 1) for canaries that were out.

    Rounds are weighted by precision. The final model is the case of one round: the inner products and the
    norm of final minus initial parameters.

    Args:
      along: (rounds, canaries), from `Directions.along`.
      norms: L2 norms of the released sums, above 0, (rounds,).
      dimension: number of coordinates of an update.
      rounds: rounds that count for each canary; None if all count.

    Raises:
      Refusal: a round was not noised, or a canary has no round.
    """
    if np.any(norms <= 0):
        raise Refusal("norms", float(norms.min()), "a round that released zeros was not noised; leave it out")
    included = np.ones(along.shape, np.bool_) if rounds is None else rounds.included
    precision = included / norms[:, None] ** 2
    total = np.sqrt(precision.sum(axis=0))
    if np.any(total == 0):
        raise Refusal("rounds", int((total == 0).sum()), "canaries without a single round; leave them out")
    return math.sqrt(dimension) * (precision * along).sum(axis=0) / total
