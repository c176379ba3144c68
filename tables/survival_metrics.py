"""Figures of survival on public rows: concordance, integrated Brier score and Kaplan and Meier's curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BLOCK = 512  # events that are compared with each other at a time


def concordance(times: Array, events: Array, risks: Array) -> float:
    """Return the share of comparable pairs in which the row with the earlier event has the higher risk, ties half.

    A pair is comparable if one row has an event and the other has a later time, or is censored at the same time (Harrell et
    al. 1982, JAMA 247). NaN without comparable pairs.

    Args:
      times: shape (n,).
      events: whether the event occurred, shape (n,).
      risks: shape (n,); higher for an earlier event.
    """
    _, ranks = np.unique(times, return_inverse=True)
    order = 2 * ranks + ~events.astype(bool)  # an event compares with all rows of a higher order
    by_order = np.argsort(-order, kind="stable")
    order, risks, events = order[by_order], risks[by_order].astype(np.float64), events[by_order].astype(bool)
    cuts = np.flatnonzero(np.diff(order)) + 1  # where equal orders end, and so where a block may
    later, won, pairs, start = np.empty(0), 0.0, 0, 0
    while start < len(order):
        stops = cuts[np.searchsorted(cuts, start + BLOCK) :]
        stop = int(stops[0]) if len(stops) else len(order)
        rows, own = slice(start, stop), np.flatnonzero(events[start:stop]) + start
        below = np.searchsorted(later, risks[own], "left")
        ties = np.searchsorted(later, risks[own], "right") - below
        won, pairs = won + float(below.sum() + ties.sum() / 2), pairs + len(own) * len(later)
        if order[start] != order[stop - 1]:
            comparable = order[None, rows] > order[own][:, None]
            differences = (risks[own][:, None] - risks[None, rows])[comparable]
            won += float((differences > 0).sum() + (differences == 0).sum() / 2)
            pairs += len(differences)
        later, start = np.sort(np.concatenate([later, risks[rows]])), stop
    return won / pairs if pairs else float("nan")


def kaplan_meier(times: Array, events: Array, at: Array) -> NDArray[np.float64]:
    """Return the share without an event before each time `at`, shape (m,), by Kaplan and Meier 1958; arguments as above.

    Rows that are censored at the time of an event count as at risk there.
    """
    moments, index = np.unique(times, return_inverse=True)
    deaths = np.bincount(index, weights=events, minlength=len(moments))
    at_risk = len(times) - np.cumsum(np.bincount(index)) + np.bincount(index)
    curve = np.concatenate([[1.0], np.cumprod(1 - deaths / at_risk)])
    return curve[np.searchsorted(moments, at, "left")]


def integrated_brier(times: Array, events: Array, curves: Array, ends: Sequence[float]) -> float:
    """Return the mean over time of the squared error of survival, with rows weighted for those that are censored.

    It is the score of Graf et al. 1999 (Statistics in Medicine 18), integrated by trapezoids from time 0. A model that
    gives every row an even chance has at most 0.25. NaN if no row outlives the first interval.

    Args:
      times: shape (n,).
      events: whether the event occurred, shape (n,).
      curves: each row's survival at each end, shape (n, intervals).
      ends: ends of the intervals, ascending.
    """
    events = events.astype(bool)
    # Events go before censorings of the same time: these are later by a moment.
    moments = np.unique(times)
    ranks = 2.0 * np.searchsorted(moments, times) + ~events
    uncensored = kaplan_meier(ranks, ~events, ranks)
    grid, scores = [0.0], [0.0]
    for end, survival in zip(ends, curves.T, strict=True):
        before, upto = np.searchsorted(moments, end, "left"), np.searchsorted(moments, end, "right")
        rank = float(before + upto) - 0.5  # after events at the end, before censorings there
        alive = ranks > rank
        share = float(kaplan_meier(ranks, ~events, np.array([rank]))[0])
        if not alive.any() or share <= 0:
            break
        died = events & ~alive
        errors = (survival[died] ** 2 / uncensored[died]).sum() + ((1 - survival[alive]) ** 2).sum() / share
        grid.append(float(end))
        scores.append(float(errors) / len(times))
    return float(np.trapezoid(scores, grid) / grid[-1]) if len(grid) > 1 else float("nan")
