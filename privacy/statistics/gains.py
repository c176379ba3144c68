"""Histogram over clients of what an own model gains over another model, with the mean, in one segment of an evaluation."""

import math
from collections.abc import Sequence

import numpy as np

from .figure import ENOUGH, NORMAL_95, Cells, Figure, scaled, smooth_of, unsaid

SMALL = 0.05  # of the metric's bound: up to it a loss or a gain counts as small
BINS = ("loses more", "loses less", "as good", "gains less", "gains more")
GAIN_CELLS = 1 + len(BINS)  # the difference, and one cell for each bin
# The difference and the bin each take half of the squared norm of the segment, which is 1.
PART = math.sqrt(0.5)
SHARES = {"share of clients with a gain": (3, 4), "with a loss": (0, 1), "with a larger loss": (0,)}


def gain_cells(difference: float, bound: float) -> Cells:
    """Return a client's cells, shape (GAIN_CELLS,), of a norm of at most 1; zeros for a NaN, which counts for no client.

    Args:
      difference: metric of its own model minus that of the other; clipped to [-bound, bound].
      bound: largest value of the metric, which is at least 0.
    """
    cells = np.zeros(GAIN_CELLS)
    if math.isnan(difference):
        return cells
    part = min(max(difference / bound, -1.0), 1.0)
    cells[0] = part * PART
    cells[1 + bin_of(part)] = PART
    return cells


def bin_of(part: float) -> int:
    """Return the number of the bin of a difference over the metric's bound: exactly 0 has a bin of its own."""
    return 2 + (part > 0) + (part > SMALL) - (part < 0) - (part < -SMALL)


def gain_figures(name: str, cells: Cells, sigma: float, bound: float) -> list[Figure]:
    """Return the mean difference, under the part's name, and shares of the clients, all among those with an own model.

    Args:
      name: of the part.
      cells: its noisy sum, shape (GAIN_CELLS,).
      sigma: standard deviation of the noise on each cell.
      bound: largest value of the metric.
    """
    total, counts, sigma = float(cells[0]) / PART, cells[1:] / PART, sigma / PART
    clients = float(counts.sum())
    if clients < max(ENOUGH * sigma * math.sqrt(len(BINS)), 1e-9):
        return [unsaid(each) for each in (name, *SHARES)]
    of_count = np.full(len(BINS), -total / clients**2)
    mean = smooth_of(name, total / clients, np.array([1 / clients, *of_count]), sigma, -1.0)
    return [scaled(mean, 0.0, bound), *(_share(each, counts, SHARES[each], sigma) for each in SHARES)]


def _share(name: str, counts: Cells, bins: Sequence[int], sigma: float) -> Figure:
    """Return the share of the clients in some bins; arguments as of `gain_figures`, `counts` for each bin."""
    inside, clients = float(counts[[*bins]].sum()), float(counts.sum())
    gradient = np.full(len(counts), -inside / clients**2)
    gradient[[*bins]] += 1 / clients
    return smooth_of(name, inside / clients, gradient, sigma, 0.0)


def gain_half_width(sigma: float, bound: float, clients: float) -> float:
    """Return the half-width of a mean difference that is near 0; arguments as of `gain_figures`."""
    return bound * NORMAL_95 * sigma / PART / clients
