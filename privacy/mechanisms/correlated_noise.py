"""Correlated noise, partly cancelled by later rounds: the matrix mechanism with a banded Toeplitz matrix.

It is for cohorts with a minimum separation and a maximum number of participations, without random sampling; or for
cohorts in which clients have a turn every b rounds, and then take part by a secret coin (`cohort=cyclic_poisson`).

Let X hold a run's sums, one row a round, on the integer lattice, and A a lower-triangular Toeplitz matrix of whole
numbers whose first column falls from D to 0: the first `bands` coefficients of (1 - x)^(-1/2), times D and rounded
(Kalinin and Lampert 2024, arXiv:2405.13763; the error they optimise is that of all prefix sums, which are the models).

The mechanism is M = A X + Z, in integers, with Z the exact discrete Gaussian of this library. One client moves A X by
at most `sensitivity` in units of D clipping norms. So the whole run, also with adaptively chosen rounds (Denisov et al.
2022, arXiv:2202.08312, theorem 2.1), is one Gaussian mechanism with noise multiplier std(Z) / (sensitivity D clip).

The release of round t is Y_t = round((M_t - sum_{j>=1} A_j Y_{t-j}) / D), which is computed from M alone. X_t is
whole and passes through the rounding, so Y_t = X_t + N_t with

    N_t = round((Z_t - sum_{j=1}^{bands-1} A_j N_{t-j}) / D),

and only the last bands - 1 rows of N are kept. All of this is exact integer arithmetic: the rounding is
post-processing, and it costs under one grid unit of noise in 2^16.

Sensitivity: A's entries are not negative, so a client moves A X most with equal contributions in all its rounds
i < i' < ..., by the norm of the sum of those columns. The inner product of columns i < i' is sum_{s < n - i'} A_s
A_{s + i' - i}: it falls with the gap and with i', as A falls. All are largest at once in rounds 0, b, 2b, ... (the
theorem on decreasing Toeplitz matrices of Kalinin and Lampert). With bands <= b it is sqrt(k) times a column's norm.

Amplification (Choquette-Choo et al. 2023, arXiv:2306.08153, theorem 4): with bands <= b, a client whose turn is every
b-th round moves other rows of M in each of its turns, in each by at most a column's norm. So b rounds, from any of its
turns to the next, are one Gaussian with noise multiplier std(Z) / (column's norm D clip) that the coin samples by
Poisson, and the run is ceil(rounds / b) of them in sequence. Rows may depend adaptively on earlier ones: given
everything before a turn, the client's contribution to the next b rows is one fixed vector or, by its coin, zero, and
all other inputs to these rows are the same in both cases. All groups share b
rounds, and a client is in one group: a release, b rounds, is charged once, by its first round. Replacing a client by
one of another group would move both groups' rows, so replace-one is refused.

Not implemented: the banded inverse square root (Kalinin et al. 2025, arXiv:2505.12128), whose A has no finite
denominators and whose best error at 500 rounds, separation 100, 5 participations is .206 of independent noise against
.196 here; and numerically optimised bands (BandMF), which reach .194.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from dp_accounting.dp_event import DpEvent
from numpy.typing import NDArray

from ...base.refusal import Refusal
from ..accounting.events import gaussian_event
from ..budget import Adjacency
from ..sampling import Sampling, Turns
from .discrete_gaussian import MAX_SIGMA, sample
from .private_sum import Vector
from .randomness import Stream
from .sum_spec import SumSpec

# D of the module's text, a power of two: coarser coefficients would cost error, finer ones room below MAX_SIGMA.
SCALE_BITS = 8
MAX_BANDS = 128  # rows of noise kept, 8 bytes a coordinate each
_NOISE_BLOCK = 1 << 16  # coordinates whose noise is drawn at a time, as in the private sum


@dataclass(frozen=True)
class Correlation:
    """Mechanism with noise that is correlated over a run's rounds, and its bounds on participation; public.

    Attributes:
      num_rounds: rows of noise, at least 1.
      separation: rounds from one participation of a client to its next, at least 1.
      max_participations: of one client in the run, at least 1.
      bands: coefficients of the matrix, from 1, independent noise, to `num_rounds`.
      cycle: rounds that are one release, with one turn of each client; None where the whole run is one.
    """

    num_rounds: int
    separation: int
    max_participations: int
    bands: int = 1
    cycle: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_rounds", "separation", "max_participations", "bands"):
            if getattr(self, name) < 1:
                raise Refusal(name, getattr(self, name), "give at least 1")
        if self.bands > (max_bands := min(self.num_rounds, MAX_BANDS)):
            raise Refusal("bands", self.bands, f"give at most {max_bands}: a row of noise is kept for each")
        if self.bands > self._max_bands:
            remedy = (
                f"give at most {self._max_bands}: turns {self.cycle} rounds apart would not move other rows"
            )
            raise Refusal("bands", self.bands, remedy)
        if self.cycle is not None and (self.max_participations, self.separation) != (1, self.cycle):
            raise ValueError("a cycle has one turn of each client")

    @property
    def _max_bands(self) -> int:
        """Most bands: within a cycle, so that a client's turns move different rows."""
        return min(self.num_rounds, MAX_BANDS, self.cycle or MAX_BANDS)

    @property
    def rounds(self) -> int:
        """Number of rounds that are one release: those of a cycle, or all of the run's."""
        return self.cycle or self.num_rounds

    @property
    def rows(self) -> int:
        """Number of rows of noise: one for each round of the run."""
        return self.num_rounds

    @property
    def described(self) -> str:
        """Description of a release, and of the gain; empty if each round is one release with independent noise."""
        if self.cycle == 1:
            return ""
        together = "The whole run is" if self.cycle is None else f"Each {self.cycle} rounds are"
        paid = f"{together} one release, paid for in its first round; noise is"
        if self.bands == 1:
            return f"{paid} independent."
        share = self.error / replace(self, bands=1).error
        turns = "" if self.cycle is None else " by the same turns"
        return (
            f"{paid} correlated over {self.bands} rounds: "
            f"the models' error is {share:.3f} of that of independent noise{turns}."
        )

    def require(self, sampling: Sampling, adjacency: Adjacency) -> None:
        """Refuse a sampling that does not promise this participation, and an adjacency that moves two cycles."""
        turns: Turns | None = getattr(sampling, "turns", None)
        is_apart = turns is not None and turns.separation >= self.separation
        if self.cycle is None:
            limit = turns.max_participations if turns else None  # None promises no limit
            if not is_apart or limit is None or limit > self.max_participations:
                remedy = (
                    f"a {sampling.name} cohort does not promise that a client takes part at most "
                    f"{self.max_participations} times, {self.separation} rounds apart; use cohort=min_separation"
                )
                raise Refusal("noise", "correlated", remedy)
            if turns and turns.by_arrival and adjacency is Adjacency.REPLACE_ONE:
                remedy = "a client's replacement may arrive in other rounds; use zero-out"
                raise Refusal("adjacency", str(adjacency), remedy)
            return
        if not is_apart:
            remedy = f"a {sampling.name} cohort gives no client its turn every {self.cycle} rounds; use cohort=cyclic_poisson"
            raise Refusal("noise", "correlated", remedy)
        if adjacency is Adjacency.REPLACE_ONE:
            remedy = "a client's replacement may have its turn in another round; use zero-out"
            raise Refusal("adjacency", str(adjacency), remedy)

    def event(self, noise_multiplier: float) -> DpEvent:
        """Return the joint event of one release's rounds: one Gaussian, as the noise is scaled by `sensitivity`."""
        return gaussian_event(noise_multiplier)

    def noise(self, stream_of: Callable[[int], Stream]) -> NoiseRows:
        """Return the run's rows of noise; `stream_of` as of `NoiseRows`."""
        return NoiseRows(self, stream_of)

    @cached_property
    def coefficients(self) -> NDArray[np.int64]:
        """A's first column: shape (bands,), from 2^SCALE_BITS falling, all positive."""
        steps = np.arange(1, self.bands)
        root = np.cumprod(np.concatenate([[1.0], (2 * steps - 1) / (2 * steps)]))
        return np.rint(root * 2**SCALE_BITS).astype(np.int64)

    @property  # `Mechanism` declares a property, which a cached one does not match
    def sensitivity(self) -> float:
        """How far one client moves A X / D, in clipping norms; sqrt(participations) for independent noise."""
        return self._sensitivity

    @cached_property
    def _sensitivity(self) -> float:
        total = np.zeros(
            self.num_rounds, np.int64
        )  # of the columns of a client's rounds, the most sensitive ones
        starts = range(0, self.num_rounds, self.separation)[: self.max_participations]
        for start in starts:
            column = self.coefficients[: self.num_rounds - start]
            total[start : start + len(column)] += column
        return math.sqrt(int(np.dot(total, total))) / 2**SCALE_BITS

    @cached_property
    def error(self) -> float:
        """Root mean square error of the rounds' prefix sums, in clipping norms, at noise multiplier 1."""
        tail = self.coefficients[1:] / 2**SCALE_BITS
        inverse = np.zeros(self.num_rounds)  # first column of A^-1: the noise of each round is A^-1 Z
        inverse[0] = 1.0
        for t in range(1, self.num_rounds):
            previous = inverse[max(0, t - len(tail)) : t][::-1]
            inverse[t] = -np.dot(tail[: len(previous)], previous)
        variances = np.cumsum(np.cumsum(inverse) ** 2)  # of the prefix sum after each round
        return self.sensitivity * math.sqrt(float(variances.mean()))

    def with_best_bands(self) -> Correlation:
        """Return the same participation with the number of bands of least error: a power of two, or the separation."""
        numbers = {min(each, self._max_bands) for each in (*(1 << i for i in range(8)), self.separation)}
        return min((replace(self, bands=each) for each in sorted(numbers)), key=lambda each: each.error)


class NoiseRows:
    """Rows of one run's noise. Any row can be recomputed: earlier rows are drawn again from their streams.

    Args:
      correlation: of the run.
      stream_of: gives the stream of a row, 1 to num_rounds, the same bytes at every call in every process.
    """

    def __init__(self, correlation: Correlation, stream_of: Callable[[int], Stream]) -> None:
        self._correlation = correlation
        self._stream_of = stream_of
        self._rewind()

    def _rewind(self) -> None:
        """Go back before the first row, so that all rows can be drawn again in order."""
        self._last = 0
        self._recent: deque[NDArray[np.int64]] = deque(maxlen=self._correlation.bands - 1)  # newest first

    def add(self, total: Vector, row: int, noise_multiplier: float, spec: SumSpec) -> tuple[Vector, DpEvent]:
        """Return the sum with row `row` of the noise, and the event that accounts for all rows of the run together.

        Args:
          total: the cohort's sum on the lattice, whole numbers.
          row: 1 to num_rounds. No row may noise two different released sums: they would differ without noise.
          noise_multiplier: of the run, the same for every row.
          spec: public parameters with a clipping norm; the lattice is the same for every row.
        """
        if not spec.private:
            raise ValueError("noise needs a clipping norm: without one the sum has no sensitivity")
        if not 1 <= row <= self._correlation.num_rounds:
            raise ValueError(f"row={row} must lie in [1, {self._correlation.num_rounds}]")
        sigma = math.ceil(noise_multiplier * self._correlation.sensitivity * (spec.cells << SCALE_BITS))
        if sigma > MAX_SIGMA:
            remedy = "the lattice holds no such noise over so many participations; raise the budget"
            raise Refusal("noise_multiplier", noise_multiplier, remedy)
        if row <= self._last:
            self._rewind()
        noise = np.zeros(total.size, np.int64)
        while self._last < row:
            noise = self._next(sigma, total.size)
        return total + noise, gaussian_event(noise_multiplier)

    def _next(self, sigma: int, size: int) -> NDArray[np.int64]:
        """Return N_t of the module's text for the next row, shape (size,); `sigma` is the parameter of Z."""
        stream = self._stream_of(self._last + 1)
        noise = np.empty(size, np.int64)
        for start in range(0, size, _NOISE_BLOCK):
            block = noise[start : start + _NOISE_BLOCK]
            block[:] = sample(sigma, block.size, stream)
            for coefficient, earlier in zip(self._correlation.coefficients[1:], self._recent, strict=False):
                block -= coefficient * earlier[start : start + _NOISE_BLOCK]
            block += 1 << (SCALE_BITS - 1)  # so that the shift, a division by D, rounds to the nearest
            block >>= SCALE_BITS
        self._recent.appendleft(noise)
        self._last += 1
        return noise
