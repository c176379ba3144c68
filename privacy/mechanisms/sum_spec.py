"""What a private sum is of: the norm, the grid, and the scalars that travel beside the update. All of it is public."""

from __future__ import annotations

import math
from dataclasses import dataclass

MIN_CELLS = 2**16  # grid units per clipping norm; see the first paragraph of `private_sum`
CELLS_PER_ROOT_COORDINATE = 256  # rounding then adds under 1e-5 to the squared norm of any vector


@dataclass(frozen=True)
class Scalar:
    """A value each client reports in [0, bound], such as its loss: a segment of one coordinate.

    `share` of the squared norm is its own; None takes an equal part of the spec's `metrics_share`.
    """

    name: str
    bound: float
    share: float | None = None


@dataclass(frozen=True)
class SumSpec:
    """What every client must do to its vector, and what the server may assume of it. All of it is public.

    Attributes:
      clipping_norm: L2 norm of the largest contribution, all segments together; None sums without client-level
        privacy, weighted by each client's examples.
      scalars: the values that travel beside the update, in order.
      metrics_share: share of the squared norm that the scalars without a share of their own use, in [0, 1).
      cells: grid units per clipping norm.
    """

    clipping_norm: float | None
    scalars: tuple[Scalar, ...] = ()
    metrics_share: float = 0.0
    cells: int = MIN_CELLS

    def __post_init__(self) -> None:
        if not 1 <= self.cells < 2**31:
            raise ValueError(f"cells={self.cells} must lie in [1, 2**31)")
        if not 0 <= self._scalars_share < 1:
            raise ValueError(
                f"the scalars' share {self._scalars_share:g} of the squared norm must lie in [0, 1)"
            )

    @property
    def step(self) -> float:
        """Width of one grid unit."""
        return 1.0 if self.clipping_norm is None else self.clipping_norm / self.cells

    @property
    def update_norm(self) -> float:
        """What the clipping norm leaves for the update, beside the scalars' share."""
        if self.clipping_norm is None:
            return math.inf
        return self.clipping_norm * math.sqrt(1 - self._scalars_share)

    @property
    def _scalars_share(self) -> float:
        return math.fsum(self._share(scalar) for scalar in self.scalars)

    def _share(self, scalar: Scalar) -> float:
        if scalar.share is not None:
            return scalar.share
        return self.metrics_share / sum(each.share is None for each in self.scalars)

    def aim(self, coordinates: int) -> float:
        """Return the norm to which a long update is scaled, so that rounding seldom carries it over `update_norm`.

        Rounding moves the squared norm by coordinates / 12 grid units on average and by a normal deviation of
        cells / sqrt(3), of which this leaves room for three.
        """
        slack = coordinates / (12 * self.cells**2) + math.sqrt(3) / self.cells
        return self.update_norm * math.sqrt(1 - slack)

    def reach(self, scalar: Scalar) -> float:
        """Largest absolute coordinate of one of the scalars, in the units of the clipping norm."""
        return 0.0 if self.clipping_norm is None else self.clipping_norm * math.sqrt(self._share(scalar))


def cells_for(coordinates: int) -> int:
    """Return a power of two of grid units per norm so fine that rounding costs nothing at this many coordinates."""
    wanted = CELLS_PER_ROOT_COORDINATE * math.sqrt(max(coordinates, 1))
    return max(MIN_CELLS, 1 << math.ceil(math.log2(wanted)))
