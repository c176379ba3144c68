"""Public parameters of a private sum: clipping norm, integer grid, and segments after the update.

A client's vector is its update followed by named segments. Each part is clipped to its own norm, and the squares of
these norms add up to the squared clipping norm, so noise on all coordinates hides a client in all parts together.

A metric in [0, bound] is a segment of one coordinate in +-sqrt(s) C, where C is the clipping norm and s the segment's
share of the squared norm. Noise of standard deviation z C on the sum of n clients gives the metric's mean an error of
z / (2 sqrt(s) n) of its range. With k metrics the update is clipped to sqrt(1 - k s) C, so the share should be small:
`metrics_share` returns the smallest one for the required error.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from ...base.bounded_decoding import RARE
from .compression import Compression

WEIGHT = "num-examples"  # scalar by which clients are weighted
MIN_CELLS = 2**16  # grid units per clipping norm; see the first paragraph of `private_sum`
SMOOTHING = 8  # grid units, s of the proofs in `sizing` and `private_sum`
# Smallest clipping norm: scale factors and grid units are then neither zero nor subnormal.
MIN_NORM = 1e-150
MAX_CELLS = 2**30  # squared norms then stay below 2^62, in int64
_FLOAT_SLACK = 1e-9  # relative rounding error of float64 that comparisons of norms tolerate
CELLS_PER_ROOT_COORDINATE = 256  # rounding then adds under 1e-5 to the squared norm of any vector
# Standard error of a metric's mean over ROUNDS rounds, as a fraction of its range: enough to see a loss fall. On the
# default task it takes a hundredth of the update's norm.
ERROR, ROUNDS = 0.05, 10
MAX_SHARE = 0.1  # limits the update's loss of norm in small cohorts, where metrics get more noise instead
UPDATE, TRAINING = "update", "training"  # name and purpose of the segment that every training round has


@dataclass(frozen=True)
class Segment:
    """Named part of the vector that a client adds to a sum.

    Attributes:
      name: unique name in the sum.
      bound: above 0, in the segment's own units. A scalar is clipped to [0, bound]; the L2 norm of a segment with a
        shape is clipped to `bound`.
      share: fraction of the squared clipping norm; None takes an equal part of the spec's `metrics_share`.
      shape: shape of the segment; () is a scalar, whose missing value counts as the middle of its range.
      purpose: purpose of the segment, stored on the ledger.
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
        """Number of coordinates; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class SumSpec:
    """Public parameters with which clients encode their vectors, and the server decodes the sum.

    Attributes:
      clipping_norm: largest L2 norm of a client's vector, at least `MIN_NORM`; None sums without client-level privacy,
        weighted by numbers of examples.
      segments: parts of the vector after the update, in order.
      metrics_share: share of the squared norm, in [0, 1), that the segments with `share=None` divide equally.
      cells: grid units per clipping norm, in [1, 2**31).
      unit_norm: largest L2 norm of one record's part, if a vector is a sum of records with record-level privacy; the
        clipping norm then only limits the range. None if a vector is the contribution of one unit.
      compression: compression of the update before clipping; None sums whole updates.

    Example:
      >>> from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec
      >>> spec = SumSpec(clipping_norm=2.0, segments=(Segment("loss", bound=10.0),), metrics_share=0.19)
      >>> spec.update_norm, spec.sensitivity(coordinates=1000)
      (1.8, 65536.0)
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
        # The segments of a question may take the whole norm, because it has no update.
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
        """Whether a clipping norm bounds each client's vector, so that noise can hide it."""
        return self.clipping_norm is not None

    @property
    def step(self) -> float:
        """Width of one grid unit, in the units of the vectors; 1 without a clipping norm."""
        return 1.0 if self.clipping_norm is None else self.clipping_norm / self.cells

    @property
    def update_norm(self) -> float:
        """Clipping norm of the update, which the segments' shares reduce; infinite without a clipping norm."""
        if self.clipping_norm is None:
            return math.inf
        return self.clipping_norm * math.sqrt(max(1 - self._segments_share, 0.0))

    @property
    def asks(self) -> bool:
        """Whether the segments take the whole norm: the sum answers a question and has no update."""
        return self.private and self._segments_share >= 1 - _FLOAT_SLACK

    @property
    def segment_size(self) -> int:
        """Number of coordinates of all segments, without the update."""
        return sum(each.size for each in self.segments)

    @property
    def _segments_share(self) -> float:
        """Share of the squared norm that all segments take."""
        return math.fsum(self._share(each) for each in self.segments)

    def _share(self, segment: Segment) -> float:
        if segment.share is not None:
            return segment.share
        return self.metrics_share / sum(each.share is None for each in self.segments)

    def aim(self, coordinates: int) -> float:
        """Return the norm to which a long update is scaled, so that rounding seldom brings it above `update_norm`.

        In squared grid units, rounding adds coordinates / 12 to the squared norm on average, with a standard deviation of
        cells / sqrt(3), and the result leaves room for three deviations. At the record level it leaves room for the
        largest possible rounding: scaling a rounded vector could change it by more than one record's part.
        """
        if self.unit_norm is not None:
            return max(self.update_norm * (1 - _FLOAT_SLACK) - math.sqrt(coordinates) / 2 * self.step, 0.0)
        slack = coordinates / (12 * self.cells**2) + math.sqrt(3) / self.cells
        return self.update_norm * math.sqrt(1 - slack)

    def sensitivity(self, coordinates: int) -> float:
        """Return the L2 sensitivity of a vector on the grid to one unit, in grid units.

        At the record level the vector is projected to a ball and rounded after a record's part is added. The projection
        increases no distance, and rounding increases that of each coordinate by at most 1. So the sensitivity is
        unit_norm / step + sqrt(coordinates).
        """
        if self.unit_norm is None:
            return float(self.cells)
        return self.unit_norm / self.step + math.sqrt(coordinates)

    def clip(self, segment: Segment) -> float:
        """Return the norm of a segment's part of the vector, in the units of the clipping norm; 0 if that is None."""
        return 0.0 if self.clipping_norm is None else self.clipping_norm * math.sqrt(self._share(segment))

    def scale(self, segment: Segment) -> float:
        """Return the value of one grid unit in a shaped segment's own units."""
        return self.step * segment.bound / self.clip(segment)


def compressed_spec(spec: SumSpec, compression: Compression, cells: int | None = None) -> SumSpec:
    """Return the spec of compressed updates, with norms multiplied by `compression.clip_factor`.

    Args:
      spec: spec of whole updates.
      compression: compression of the updates; module `compression` proves that the privacy event is unchanged.
      cells: grid units per norm of a coarser grid; None uses the spec's.
    """
    factor = compression.clip_factor
    clip, unit = (None if norm is None else norm * factor for norm in (spec.clipping_norm, spec.unit_norm))
    grid = spec.cells if cells is None else cells
    return replace(spec, clipping_norm=clip, unit_norm=unit, cells=grid, compression=compression)


def cells_for(coordinates: int, units: float = 1.0) -> int:
    """Return the grid units per clipping norm, a power of two up to `MAX_CELLS`, with a negligible effect of rounding.

    Args:
      coordinates: number of coordinates of the vector.
      units: norm of the vector divided by the norm of one unit.
    """
    cells = max(CELLS_PER_ROOT_COORDINATE * math.sqrt(max(coordinates, 1)), MIN_CELLS) * units
    return min(1 << math.ceil(math.log2(cells)), MAX_CELLS)


def metrics_share(noise_over_clip: float, expected_size: float, metrics: int) -> float:
    """Return the share of the squared norm that all metrics take together, in [0, MAX_SHARE].

    Args:
      noise_over_clip: standard deviation of a round's noise / clipping norm.
      expected_size: expected number of clients in the cohort, the fixed denominator of the mean.
      metrics: number of metrics.
    """
    return min(metrics * (noise_over_clip / (2 * ERROR * expected_size)) ** 2 / ROUNDS, MAX_SHARE)
