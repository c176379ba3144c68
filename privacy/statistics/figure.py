"""Figure: one number of an answer with the interval that its noise leaves, and how wide that may be planned to be.

The noise on every cell is one independent Gaussian of known size, so that each interval follows from public numbers and
the answer itself. It does not cover how representative the answering clients are.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

NORMAL_95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
ENOUGH = 5.0  # least size of a denominator, in standard deviations of its noise, for the delta method

Cells = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """One number of an answer.

    Attributes:
      name: within the answer.
      value: NaN if the noise drowns it.
      low, high: the 95 % interval of the value without noise; NaN if the noise drowns it.
      words: what the figure means, or why it has no value; may be empty.
    """

    name: str
    value: float
    low: float
    high: float
    words: str = field(default="", kw_only=True)

    @property
    def has_value(self) -> bool:
        """Whether the figure has a value, which its noise does not drown."""
        return math.isfinite(self.value)

    @property
    def plain(self) -> dict[str, Any]:
        """The figure as records of answers keep it."""
        if not self.has_value:
            words = self.words or "cannot be said"
            return {"name": self.name, "value": None, "low": None, "high": None, "said": words}
        value, low, high = (float(each) for each in (self.value, self.low, self.high))  # not NumPy's
        words = {"said": self.words} if self.words else {}
        return {"name": self.name, "value": value, "low": low, "high": high, **words}


def unsaid(name: str, words: str = "") -> Figure:
    """Return a figure without a value, because the noise drowns its denominator, or for the reason in `words`."""
    return Figure(name, math.nan, math.nan, math.nan, words=words)


def count_of(name: str, cell: float, sigma: float) -> Figure:
    """Return a count, which noise may make negative.

    Args:
      name: name of the figure.
      cell: the noisy count.
      sigma: standard deviation of its noise.
    """
    half = NORMAL_95 * sigma
    return Figure(name, float(cell), float(cell) - half, float(cell) + half)


def ratio_of(name: str, above: float, below: float, sigma: float) -> Figure:
    """Return a ratio in [-1, 1] of two noisy sums, and the interval of Fieller (1954), which is exact.

    The interval contains every m for which above - m below is explained by its noise, sigma sqrt(1 + m^2).

    Args:
      name: name of the figure.
      above: numerator.
      below: denominator.
      sigma: standard deviation of the independent noise on each.
    """
    spread = (NORMAL_95 * sigma) ** 2
    leading = below**2 - spread
    if below <= 0 or leading <= 0:
        return unsaid(name)
    low, high = roots(leading, above * below, above**2 - spread)
    return clipped(name, above / below, low, high, minimum=-1.0)


def roots(leading: float, middle: float, last: float) -> tuple[float, float]:
    """Return the roots of leading m^2 - 2 middle m + last, between which a ratio's interval lies; leading is above 0."""
    root = math.sqrt(max(middle**2 - leading * last, 0.0))
    return (middle - root) / leading, (middle + root) / leading


def clipped(name: str, value: float, low: float, high: float, minimum: float) -> Figure:
    """Return a figure whose value and interval are clipped to [minimum, 1]."""
    return Figure(name, *(min(max(each, minimum), 1.0) for each in (value, low, high)))


def smooth_of(name: str, value: float, gradient: Cells, sigma: float, minimum: float) -> Figure:
    """Return a smooth function of noisy sums, and its interval by the delta method.

    Args:
      name: name of the figure.
      value: value of the function at the noisy sums.
      gradient: derivatives of the function there, by each of the sums.
      sigma: standard deviation of the independent noise on each.
      minimum: smallest possible value; the largest is 1.
    """
    half = NORMAL_95 * sigma * float(np.linalg.norm(gradient))
    return clipped(name, value, value - half, value + half, minimum)


def scaled(figure: Figure, middle: float, half: float) -> Figure:
    """Return a figure in [-1, 1] scaled to the units of a column, whose bounds are middle - half and middle + half."""
    low, high = middle + half * figure.low, middle + half * figure.high
    return Figure(figure.name, middle + half * figure.value, low, high)


def quantile_of(name: str, excess: Cells, room: Cells, edges: Cells) -> Figure:
    """Return a quantile of noisy counts, interpolated within its bin; the interval covers every bin that noise allows.

    Args:
      name: name of the figure.
      excess: at each edge, rows below it minus the quantile's share of all rows; at most 0 at the first edge, above 0 at
        the last.
      room: at each edge, half-width of the excess's interval.
      edges: edges of the bins, ascending, at equal distances.
    """
    reached = int(np.argmax(excess[1:] >= 0)) + 1
    before, after = excess[reached - 1], excess[reached]
    part = -before / (after - before) if after > before else 0.5
    value = edges[reached - 1] + (edges[1] - edges[0]) * min(max(part, 0.0), 1.0)
    # Edges that may lie at or above the quantile, and edges that may lie at or below it.
    above, below = np.flatnonzero(excess + room >= 0), np.flatnonzero(excess - room <= 0)
    low = edges[max(int(above[0]) - 1, 0)]
    high = edges[min(int(below[-1]) + 1, len(edges) - 1)]
    return Figure(name, float(value), float(min(low, value)), float(max(high, value)))
