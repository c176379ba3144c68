"""Public parameters of a private sum: the norm, the grid, and the segments besides the update.

The one vector is a list of named segments. Each is clipped to a norm of its own, and the squares of these norms add up
to the square of the sum's: one noise on all coordinates hides a client in all of them together.

A metric in [0, bound] has a coordinate of +-sqrt(s) C in a vector of norm C, s its share of the squared norm. Noise of
standard deviation z C on the sum of n clients moves its mean by z / (2 sqrt(s) n) of its range, and the update, clipped
to sqrt(1 - k s) C with k such metrics, loses that much: so `metrics_share` is the smallest share for the wanted error.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from ...base.bounded_decoding import RARE
from .compression import Compression

WEIGHT = "num-examples"  # the scalar that weighs
MIN_CELLS = 2**16  # grid units per clipping norm; see the first paragraph of `private_sum`
SMOOTHING = 8  # grid units, s of the proofs in `sizing` and `private_sum`
# The least norm of a sum: scale factors and grid units are then neither zero nor subnormal.
MIN_NORM = 1e-150
MAX_CELLS = 2**30  # squared norms then stay below 2^62, in int64
_FLOAT_SLACK = 1e-9  # relative: what float64 may err by where two norms are compared
CELLS_PER_ROOT_COORDINATE = 256  # rounding then adds under 1e-5 to the squared norm of any vector
# A metric's mean over ROUNDS rounds is known to this part of its range (one standard deviation): enough to see a
# loss fall, and a hundredth of the update's norm on the default task.
ERROR, ROUNDS = 0.05, 10
MAX_SHARE = 0.1  # where the cohort is too small, metrics get more noise and the update keeps its norm


UPDATE, TRAINING = "update", "training"  # name and purpose of the segment that every training round has


@dataclass(frozen=True)
class Segment:
    """Named part of the vector that a client adds to a sum.

    Attributes:
      name: within the sum.
      bound: of a scalar, the largest value that counts, in [0, bound]; of a segment with a shape, the largest L2 norm
        of one client's part. Both are in the segment's own units.
      share: of the squared clipping norm, its own; None takes an equal part of the spec's `metrics_share`.
      shape: of the part; a scalar has none. A scalar is centred, so a missing value counts as the middle of its range.
      purpose: as kept on the ledger.
    """

    name: str
    bound: float
    share: float | None = None
    shape: tuple[int, ...] = ()
    purpose: str = TRAINING

    def __post_init__(self) -> None:
        if not self.bound > 0 or any(side < 1 for side in self.shape):
            raise ValueError(f"segment {self.name!r} needs a bound above 0 and sides of at least 1")

    @property
    def size(self) -> int:
        """Coordinates."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class SumSpec:
    """Parameters of every client's encoding, and of the server's decoding. All of it is public.

    Attributes:
      clipping_norm: L2 norm of the largest contribution, all segments together, at least `MIN_NORM`; None sums
        without client-level privacy, weighted by each client's examples.
      segments: besides the update, in order.
      metrics_share: share of the squared norm that the segments without a share of their own use, in [0, 1).
      cells: grid units per clipping norm.
      unit_norm: L2 norm of one record's part of a vector, at the record level, where a vector is the sum of several
        records; the clipping norm then only limits the range. None if a vector is that of one unit.
      compression: of the update, before it is clipped; None sums whole updates.
    """

    clipping_norm: float | None
    segments: tuple[Segment, ...] = ()
    metrics_share: float = 0.0
    cells: int = MIN_CELLS
    unit_norm: Annotated[float | None, RARE] = None
    compression: Annotated[Compression | None, RARE] = None

    def __post_init__(self) -> None:
        if not 1 <= self.cells < 2**31:
            raise ValueError(f"cells={self.cells} must lie in [1, 2**31)")
        if self.clipping_norm is not None and not self.clipping_norm >= MIN_NORM:
            raise ValueError(f"clipping_norm={self.clipping_norm} must be at least {MIN_NORM:g}")
        # A question has no update, and leaves nothing for one.
        if not 0 <= self._segments_share <= 1 + _FLOAT_SLACK:
            problem = f"the segments' share {self._segments_share:g} of the squared norm must lie in [0, 1]"
            raise ValueError(problem)
        if not self.private and any(each.shape for each in self.segments):
            raise ValueError("a segment with a shape needs a clipping norm")
        if self.unit_norm is not None and (
            self.segments or self.clipping_norm is None or not 0 < self.unit_norm <= self.clipping_norm
        ):
            problem = f"unit_norm={self.unit_norm} needs a clipping norm of at least itself, and no segments"
            raise ValueError(problem)

    @property
    def private(self) -> bool:
        """Whether a norm bounds each client's contribution, so that noise can hide it."""
        return self.clipping_norm is not None

    @property
    def step(self) -> float:
        """Width of one grid unit."""
        return 1.0 if self.clipping_norm is None else self.clipping_norm / self.cells

    @property
    def update_norm(self) -> float:
        """Clipping norm of the update, after the segments' shares."""
        if self.clipping_norm is None:
            return math.inf
        return self.clipping_norm * math.sqrt(max(1 - self._segments_share, 0.0))

    @property
    def asks(self) -> bool:
        """Whether the segments leave no norm for an update: the sum is then the answer to a question."""
        return self.private and self._segments_share >= 1 - _FLOAT_SLACK

    @property
    def segment_size(self) -> int:
        """Number of coordinates of the segments besides the update."""
        return sum(each.size for each in self.segments)

    @property
    def _segments_share(self) -> float:
        return math.fsum(self._share(each) for each in self.segments)

    def _share(self, segment: Segment) -> float:
        if segment.share is not None:
            return segment.share
        return self.metrics_share / sum(each.share is None for each in self.segments)

    def aim(self, coordinates: int) -> float:
        """Return the norm to which a long update is scaled, so that rounding seldom carries it over `update_norm`.

        Rounding moves the squared norm by coordinates / 12 grid units on average and by a normal deviation of cells /
        sqrt(3), of which this leaves room for three. At the record level the vector is never pulled back, because that
        could move it by more than one record's part.
        """
        if self.unit_norm is not None:
            return max(self.update_norm * (1 - _FLOAT_SLACK) - math.sqrt(coordinates) / 2 * self.step, 0.0)
        slack = coordinates / (12 * self.cells**2) + math.sqrt(3) / self.cells
        return self.update_norm * math.sqrt(1 - slack)

    def sensitivity(self, coordinates: int) -> float:
        """Return how far one unit moves a vector on the grid, L2, in grid units.

        A record's part is added before the vector is scaled to the range, which is the nearest point of a ball and so
        moves no two vectors apart, and before each coordinate is rounded to the nearest whole number, which moves two
        of them apart by at most one more. So the bound is unit_norm / step + sqrt(coordinates).
        """
        if self.unit_norm is None:
            return float(self.cells)
        return self.unit_norm / self.step + math.sqrt(coordinates)

    def clip(self, segment: Segment) -> float:
        """Return the norm of one of the segments, in the units of the clipping norm."""
        return 0.0 if self.clipping_norm is None else self.clipping_norm * math.sqrt(self._share(segment))

    def scale(self, segment: Segment) -> float:
        """Return the value of one grid unit in a shaped segment's own units."""
        return self.step * segment.bound / self.clip(segment)


def compressed_spec(spec: SumSpec, compression: Compression, cells: int | None = None) -> SumSpec:
    """Return the spec of compressed updates, with norms scaled by the average effect of compression.

    Args:
      spec: of whole updates.
      compression: of the updates; module `compression` proves that the event stays.
      cells: of a coarser grid; None leaves the spec's.
    """
    factor = compression.clip_factor
    clip, unit = (None if norm is None else norm * factor for norm in (spec.clipping_norm, spec.unit_norm))
    grid = spec.cells if cells is None else cells
    return replace(spec, clipping_norm=clip, unit_norm=unit, cells=grid, compression=compression)


def cells_for(coordinates: int, units: float = 1.0) -> int:
    """Return a power of two of grid units per norm, fine enough that rounding costs nothing.

    Args:
      coordinates: of the vector.
      units: norm of the vector, in norms of one unit; at most 2^30 cells are returned in any case.
    """
    cells = max(CELLS_PER_ROOT_COORDINATE * math.sqrt(max(coordinates, 1)), MIN_CELLS) * units
    return min(1 << math.ceil(math.log2(cells)), MAX_CELLS)


def metrics_share(noise_over_clip: float, expected_size: float, metrics: int) -> float:
    """Return the share of the squared norm that all metrics take together, in [0, MAX_SHARE].

    Args:
      noise_over_clip: standard deviation of a round's noise over the clipping norm.
      expected_size: of the cohort, the fixed denominator.
      metrics: how many there are.
    """
    return min(metrics * (noise_over_clip / (2 * ERROR * expected_size)) ** 2 / ROUNDS, MAX_SHARE)
