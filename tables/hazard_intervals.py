"""Intervals of survival curves: of a model's hazards, whose law is that of public rows with the same censoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .descent import ModelEstimate
from .layouts import Array
from .outcomes import HazardLaw, expit
from .run_steps import MIN_ROWS, NoInterval

if TYPE_CHECKING:
    from .survival import SurvivalTimes

MOST_NUMBERS = (
    200_000  # of all outcomes of the public rows in a step, so that it takes some hundredths of a second
)
LEAST_HAZARD = 1e-12  # of a curve up to an end, whose logarithm has an interval


def law_of_times(label: SurvivalTimes, targets: Array) -> HazardLaw:
    """Return the law of survival times with the censoring of public rows, whose targets have shape (n, 2)."""
    count, times, events = len(label.ends), targets[:, 0], targets[:, 1] > 0
    middles, ends = np.array(label.middles), np.array(label.ends)
    through = (times[:, None] >= middles).sum(1)  # intervals that a censored row has lived through
    reached = np.where(events, np.searchsorted(ends, times, "left"), through)
    at_risk = (reached[:, None] >= np.arange(count)).sum(0)
    censored = np.bincount(reached[~events], minlength=count + 1)[:count]
    return HazardLaw(censored / np.maximum(at_risk, 1), np.full(count, label.start))


def public_rows(inputs: Array, intervals: int) -> Array:
    """Return the public rows that are used, evenly spaced: as many as `MOST_NUMBERS` allows.

    Args:
      inputs: of all public rows, shape (m, d).
      intervals: number of the label's intervals.

    Raises:
      NoInterval: they are fewer than `MIN_ROWS`.
    """
    count = min(len(inputs), MOST_NUMBERS // (intervals * (2 * intervals + 1)))
    if count < MIN_ROWS:
        reason = f"of {intervals} bins only {count} public rows are used, and {MIN_ROWS} are the fewest"
        raise NoInterval(f"{reason}; use fewer bins")
    return inputs[np.linspace(0, len(inputs) - 1, count).astype(int)]


def curves(fit: ModelEstimate, inputs: Array, intervals: int, half: float) -> tuple[Array, Array, Array]:
    """Return the survival at the end of each interval with both ends of its own interval, shape (n, intervals) each.

    They are symmetric in the logarithm of the cumulative hazard, the sum of -log(1 - hazard).

    Args:
      fit: of the true model.
      inputs: of rows, with their 1 last, shape (n, d).
      intervals: number of the intervals.
      half: half the width of a normal interval, in standard errors.
    """
    columns, width = inputs[:, :-1], inputs.shape[1] - 1
    scores = (columns @ fit.coefficients[:width])[:, None] + fit.coefficients[width:]
    hazards, sums = expit(scores), np.maximum(np.cumsum(np.logaddexp(0, scores), 1), LEAST_HAZARD)
    errors = np.empty_like(sums)
    for end in range(intervals):
        upto = hazards * (np.arange(intervals) <= end)
        slopes = np.hstack([upto.sum(1, keepdims=True) * columns, upto])
        errors[:, end] = np.sqrt(np.einsum("np,pq,nq->n", slopes, fit.covariance, slopes, optimize=True))
    wide = half * errors / sums
    low, high = (np.exp(-sums * np.exp(sign * wide)) for sign in (1, -1))
    return np.exp(-sums), low, high


def curve_columns(
    label: SurvivalTimes, bands: Sequence[Array], names: Sequence[str] = ("estimate", "low", "high")
) -> dict[str, Array]:
    """Return the columns of predictions of `curves` by name, shape (n,) each: the median time, then each end's survival.

    Args:
      label: of the model.
      bands: the curves and both ends of their intervals.
      names: of these three.
    """
    medians = {
        f"median_{label.time.name}_{name}": label.medians(band)
        for name, band in zip(names, bands, strict=True)
    }
    return medians | {
        f"survival_at_{end:g}_{name}": band[:, number]
        for number, end in enumerate(label.ends)
        for name, band in zip(names, bands, strict=True)
    }
