"""Survival by group from one cross table of times and events: curves, medians and a log-rank test that allow for the noise.

A row is one of the table's cells: an event, or a censoring, in a bin of the time, or a time beyond the last edge, at which
the row is still at risk. At risk in a bin are the rows whose time lies in it or later; of those censored in it, the part
`censored_share`. With 1 the curve is that of Kaplan and Meier (1958) on times rounded to the bins' ends, with a half it is
the life table of Cutler and Ederer (1958), which is closer where rows are censored at any time of a bin.

All intervals and the test cover both the sampling of the rows and the noise, unlike those of counts, which cover noise.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from .columns import Bins, Table, share
from .figure import ENOUGH, NORMAL_95, Cells, Figure, count_of, roots, unsaid

LEVEL = 0.05  # of the log-rank test
CENSORED_SHARES = {"middle": 0.5, "end": 1.0}  # of a bin, by the word of the key `censoring`
SMALLEST = 1e-12  # hazard, for variances: 0 and 1 have none
SURVIVAL = "survival at "  # begins the names of a curve's figures
TOO_FEW = "cannot be said: too few rows at risk beside the noise"


@dataclass(frozen=True)
class Curve:
    """Survival of one group at the ends of the bins, as far as the noise allows.

    Attributes:
      value: shape (ends,), in 0 .. 1, never rising; ends without an estimate are left out.
      low, high: ends of the 95 % interval at each time.
    """

    value: Cells
    low: Cells
    high: Cells


@dataclass(frozen=True)
class Survival:
    """`Statistic` of the time to an event, by the groups of a column.

    Attributes:
      time: bins of the time, by their edges.
      event: two words: that of a censored row, and that of an event.
      by: bins of the groups; empty for one group of all rows.
      censored_share: share of its bin for which a censored row is at risk, in (0, 1].
    """

    time: Bins
    event: Bins
    by: tuple[Bins, ...] = ()
    censored_share: float = 0.5
    row_norm: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        if self.time.words:
            raise Refusal("of", self.time.name, "is a time: give edges of its bins, and no categories")
        if len(self.event.words) != 2:
            remedy = "give two event_categories: the word of a censored row, then that of an event"
            raise Refusal("event", self.event.words, remedy)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups; an empty one for all rows."""
        return self.by[0].labels if self.by else ("",)

    @property
    def shape(self) -> tuple[int, ...]:
        """Groups, and for each: events in each bin, censored rows in each bin, and rows beyond the last edge."""
        return (len(self.groups), 2 * self.time.count + 1)

    def count(self, table: Table) -> tuple[Cells, float]:
        """Return a client's cells, and the share of its rows outside the declared words, or before the first edge."""
        bins, time_outside = self.time.read(table)
        event, outside = self.event.read(table)
        beyond = time_outside & (bins == self.time.count - 1)
        outside = outside | (time_outside & ~beyond)
        group = np.zeros_like(bins)
        for each in self.by:
            group, group_outside = each.read(table)
            outside = outside | group_outside
        cell = np.where(event == 1, bins, self.time.count + bins)
        cell = np.where(beyond, 2 * self.time.count, cell)
        counts = (group >= 0) & (bins >= 0) & (event >= 0)
        index = np.ravel_multi_index((group[counts], cell[counts]), self.shape)
        cells = np.bincount(index, minlength=math.prod(self.shape)).astype(np.float64)
        return cells.reshape(self.shape), share(outside)

    @cached_property
    def at_risk(self) -> Cells:
        """Weight of each cell in the rows at risk in each bin, shape (bins, cells of a group)."""
        bins = self.time.count
        later = np.triu(np.ones((bins, bins)), 1)
        here = np.eye(bins)
        return np.hstack([later + here, later + self.censored_share * here, np.ones((bins, 1))])

    @cached_property
    def events(self) -> Cells:
        """Weight of each cell in the events of each bin, shape (bins, cells of a group)."""
        return np.eye(self.time.count, self.shape[1])

    def answer(self, cells: Cells, sigma: float) -> list[Figure]:
        """Return the log-rank test if there are groups, each group's rows and median, and each group's curve.

        Args:
          cells: the sum, of `shape`.
          sigma: standard deviation of the noise on each.
        """
        figures = [self.log_rank(cells, sigma)] if len(self.groups) > 1 else []
        curves = [self.curve(each, sigma) for each in cells]
        room = sigma * math.sqrt(self.shape[1])
        for name, own, curve in zip(self.groups, cells, curves, strict=True):
            figures += [count_of(_of("rows", name), own.sum(), room), self.median(_of("median", name), curve)]
        for name, curve in zip(self.groups, curves, strict=True):
            figures += self._figures(name, curve)
        return figures

    def _figures(self, name: str, curve: Curve) -> list[Figure]:
        """Return the figures of a group's curve, one for each end of a bin."""
        figures: list[Figure] = []
        for index, end in enumerate(self.time.edges[1:]):
            figure_name = _of(f"{SURVIVAL}{end:g}", name)
            if index < len(curve.value):
                value, low, high = (float(each[index]) for each in (curve.value, curve.low, curve.high))
                figures.append(Figure(figure_name, value, low, high))
            else:
                figures.append(unsaid(figure_name, TOO_FEW))
        return figures

    def curve(self, cells: Cells, sigma: float) -> Curve:
        """Return a group's survival with the interval at each end of a bin.

        The interval is Wilson's with the effective size that Greenwood's variance has (Rothman 1978), and with the noise's
        variance in addition, by the delta method. It ends where the rows at risk are no longer `ENOUGH` beside the noise.

        Args:
          cells: the group's noisy counts, shape (cells of a group,).
          sigma: standard deviation of the noise on each.
        """
        rows, ends = self.at_risk @ cells, self._reach(cells, sigma)
        rows, events = rows[:ends], (self.events @ cells)[:ends]
        hazard = np.minimum(events / rows, 1.0)
        possible = np.clip(hazard, SMALLEST, 1 - SMALLEST)
        survival, smooth = np.cumprod(1 - hazard), np.maximum(np.cumprod(1 - possible), SMALLEST)
        survivors = rows * (1 - possible)
        size = (1 - smooth) / (smooth * np.cumsum(possible / survivors))
        by_cell = self.events[:ends] - possible[:, None] * self.at_risk[:ends]  # of a hazard, times the rows
        noise = sigma * smooth * np.linalg.norm(np.cumsum(by_cell / survivors[:, None], axis=0), axis=1)
        wilson = NORMAL_95**2 / size
        bounds = [
            roots(1 + extra, value + extra / 2, value**2 - (NORMAL_95 * spread) ** 2)
            for value, extra, spread in zip(survival, wilson, noise, strict=True)
        ]
        low, high = np.array(bounds, np.float64).reshape(-1, 2).T
        return Curve(_falling(survival.astype(np.float64)), _falling(low), _falling(high))

    def _reach(self, cells: Cells, sigma: float) -> int:
        """Return how many bins from the first one have enough rows at risk beside the noise on them."""
        rows, room = self.at_risk @ cells, sigma * np.linalg.norm(self.at_risk, axis=1)
        enough = (rows >= ENOUGH * room) & (rows > 0)
        return int(np.argmin(np.append(enough, False)))

    def median(self, name: str, curve: Curve) -> Figure:
        """Return the time that half of a group survives, between the ends of its bin, and the interval by the curve's.

        The interval has every time at which the curve's interval contains a half (Brookmeyer and Crowley 1982). Where its
        upper end, or the median, is not reached within the curve, the figure says so.

        Args:
          name: name of the figure.
          curve: the group's.
        """
        if not len(curve.value):
            return unsaid(name, TOO_FEW)
        last = self.time.edges[len(curve.value)]
        low, value, high = (self._half(each) for each in (curve.low, curve.value, curve.high))
        if math.isinf(value):
            words = f"not reached by {last:g}"
            later = "" if math.isinf(low) else f"; the interval begins at {low:.4g}"
            return unsaid(name, f"{words}{later}")
        if math.isinf(high):
            return Figure(name, value, low, last, words=f"the interval has no upper end by {last:g}")
        return Figure(name, value, low, high)

    def _half(self, curve: Cells) -> float:
        """Return the time at which a falling curve reaches a half, on a line within its bin; infinity if it does not."""
        values = np.append(1.0, curve)
        below = np.flatnonzero(values <= 0.5)
        if not below.size:
            return math.inf
        end = max(int(below[0]), 1)
        before, after = values[end - 1], values[end]
        start, stop = self.time.edges[end - 1], self.time.edges[end]
        return float(start + (stop - start) * (before - 0.5) / (before - after))

    def log_rank(self, cells: Cells, sigma: float) -> Figure:
        """Return the p-value of the log-rank test of equal curves (Mantel 1966), whose variance includes the noise's.

        The events of each group less those expected are a smooth function of the cells, so that their covariance is the
        test's own plus the noise's by the delta method. The figure has no interval: both its ends are the p-value.

        Args:
          cells: noisy counts, of `shape`.
          sigma: standard deviation of the noise on each.
        """
        from scipy.special import chdtrc  # a device has no use of it

        name = "log-rank p"
        if any(self._reach(each, sigma) == 0 for each in cells):
            return unsaid(name, TOO_FEW)
        bins = self._reach(cells.sum(0), sigma * math.sqrt(len(cells)))
        rows, events = cells @ self.at_risk[:bins].T, cells @ self.events[:bins].T
        all_rows, all_events = rows.sum(0), events.sum(0)
        parts = rows / all_rows
        excess = (events - all_events * parts).sum(1)
        covariance = self._sampling(np.maximum(all_events, 0.0), np.maximum(all_rows, 0.0), parts)
        covariance += self._noise(all_events, all_rows, parts, sigma)
        free = slice(1, None)  # the groups' sum is zero
        if np.linalg.matrix_rank(covariance[free, free]) < len(cells) - 1:
            return unsaid(name, "cannot be said: too few events")
        value = float(excess[free] @ np.linalg.solve(covariance[free, free], excess[free]))
        freedom = len(cells) - 1
        p = float(chdtrc(freedom, max(value, 0.0)))
        verdict = "the curves differ" if p < LEVEL else "no difference is shown"
        degrees = "degree" if freedom == 1 else "degrees"
        return Figure(
            name, p, p, p, words=f"{verdict} (chi-square {value:.4g}, {freedom} {degrees} of freedom)"
        )

    @staticmethod
    def _sampling(events: Cells, rows: Cells, parts: Cells) -> Cells:
        """Return the covariance of the groups' excess events under equal hazards, hypergeometric in each bin."""
        factor = events * np.clip(rows - events, 0.0, None) / np.maximum(rows - 1, 1.0)
        return np.diag((factor * parts).sum(1)) - (factor * parts) @ parts.T

    def _noise(self, events: Cells, rows: Cells, parts: Cells, sigma: float) -> Cells:
        """Return the covariance of the groups' excess events by the noise alone."""
        groups, bins = parts.shape
        mine = (
            np.eye(groups)[:, :, None] - parts[:, None, :]
        )  # of an excess by events, and by rows over the hazard
        hazard = events / rows
        by_cell = mine @ self.events[:bins] - (mine * hazard) @ self.at_risk[:bins]
        flat: NDArray[np.float64] = by_cell.reshape(groups, -1)
        return sigma**2 * flat @ flat.T

    def planned(self, sigma: float, rows: float) -> float:
        """Return the largest half-width of a curve if rows are spread evenly over the groups and none is censored.

        A survival is then a ratio of sums of cells, whose noise is at most that of all cells. Arguments as of `Statistic`.
        """
        size = rows / len(self.groups)
        return NORMAL_95 * math.sqrt(sigma**2 * self.shape[1] + size / 4) / size


def _of(name: str, group: str) -> str:
    """Return the name of a group's figure."""
    return f"{name}, {group}" if group else name


def _falling(values: Cells) -> Cells:
    """Return the closest values that never rise, by least squares, within 0 .. 1."""
    from scipy.optimize import isotonic_regression  # slow to load

    if not len(values):
        return values
    return np.clip(isotonic_regression(values, increasing=False).x, 0.0, 1.0)
