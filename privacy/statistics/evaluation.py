"""Evaluation of a model at its clients: a client's contribution from its held-out records, and estimates from the noisy sum.

Every part of a client's vector is zero if it holds no record out, or does not answer. A client counts once, for any
number of records. The mean over clients is:

- with `clients`, the count of evaluating clients, a ratio of two noisy sums, with the interval of Fieller (1954);
- without it, a mean over all asked clients, with a half-width of 1.96 times half of z over their number: a client that
  did not evaluate counts as the middle of the range.

At the record level each held-out record counts once instead, with the model's metric on it alone: a client's vector is
the sum of its records' parts, each of a norm of at most 1, and the mean is over all held-out records.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from ...base.bounded_decoding import RARE, Undecodable, build, plain_of, read_json
from ...base.refusal import Refusal, positive, real
from ..budget import Unit
from ..mechanisms.sum_spec import Segment, SumSpec, cells_for
from .figure import ENOUGH, NORMAL_95, Cells, Figure, clipped, count_of, quantile_of, ratio_of, scaled, unsaid
from .gains import GAIN_CELLS, gain_cells, gain_figures

EVALUATION = "evaluation"  # the purpose that owners allow or refuse
METRIC, LOSS, CLIENTS, HISTOGRAM = FIGURES = ("metric", "loss", "clients", "histogram")
# Differences of a client's metrics: of its own model to the shared one, and to one of its own records alone.
PERSONAL, LOCAL_ONLY = GAINS = ("personal", "local_only")
GAIN_NAMES = {PERSONAL: "personal - shared", LOCAL_ONLY: "personal - local only"}  # as they are released
BY_METRIC = "clients by "  # begins the name of the histogram of the clients' metrics
RECORDS = "held-out records"  # what is counted where they are hidden
BINS = 20  # of the clients' metrics
WORST = 0.1  # "worst decile": a tenth of the clients has less
NORMAL_9875 = 2.241402727604947  # the 98.75 % quantile: two such intervals hold together in 95 %
LOSS_BOUND = 5.0  # a client's mean loss above it counts as it; uniform guessing among 100 classes has 4.6
MAX_BYTES, MAX_NAME = 4096, 200  # bytes of an evaluation that travels, characters of its texts


@dataclass(frozen=True)
class HeldOutMeans:
    """Means over one client's held-out records.

    Attributes:
      metric, loss: as the client measures them; neither need be finite.
      gains: metric of the client's own model minus another model's, by some of `GAINS`; empty without an own model.
    """

    metric: float
    loss: float
    gains: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class HeldOutRows:
    """Metric and loss of a model on each of one client's held-out records.

    Attributes:
      metrics, losses: shape (n,); none need be finite.
    """

    metrics: NDArray[np.float64]
    losses: NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of the model in the question by every client. All of it is public.

    Attributes:
      name: name of the release on the ledger, where another evaluation needs another row or another name.
      share: share of its records that each client holds out, in (0, 1); None if the client's app decides.
      metric: name of one of the task's metrics.
      bound: largest value of the metric, which lies in [0, bound].
      figures: some of `FIGURES` and, at the client level, of `GAINS`, in equal parts of the squared norm.
      why: reason of the evaluation, in a sentence for owners.
      records: at the record level, number of a client's records that count in full; the contribution of a client with
        more is clipped. None at the client level.
      own: how simulated clients train own models for `GAINS`, as JSON; empty for devices, whose owners decide.
    """

    name: str
    share: float | None
    metric: str = "accuracy"
    bound: float = 1.0
    figures: tuple[str, ...] = FIGURES
    why: str = ""
    records: Annotated[float | None, RARE] = None  # devices of an earlier release know no such key
    own: Annotated[str, RARE] = ""
    purpose: str = field(default=EVALUATION, init=False)

    def __post_init__(self) -> None:
        for name in ("name", "metric", "why"):
            value: object = getattr(self, name)
            if not isinstance(value, str) or len(value) > MAX_NAME or not (value or name == "why"):
                raise Refusal(f"evaluate.{name}", value, f"give at most {MAX_NAME} characters")
            if value and not value.isprintable():
                raise Refusal(f"evaluate.{name}", value, "give printable characters")
        object.__setattr__(self, "figures", tuple(self.figures))
        once = len({*self.figures}) == len(self.figures)
        if not self.figures or not once or not {*self.figures} <= {*FIGURES, *GAINS}:
            raise Refusal("evaluate.figures", self.figures, f"give some of {', '.join(FIGURES)}, each once")
        if self.metric in (*FIGURES, *GAINS, *GAIN_NAMES.values(), self._by_metric):
            remedy = "is a name of another figure; name a metric of the task"
            raise Refusal("evaluate.metric", self.metric, remedy)
        if self.share is not None and not 0 < real("evaluate.share", self.share) < 1:
            raise Refusal("evaluate.share", self.share, "give a share above 0 and below 1")
        positive("evaluate.metric_bound", self.bound)
        if self.records is None:
            return
        if real("evaluate.records", self.records) < 1:
            raise Refusal("evaluate.records", self.records, "give a number of at least 1")
        if {*GAINS} & {*self.figures}:
            remedy = "a client's own model depends on all its records, so that no record has a part of its own; hide clients"
            raise Refusal("evaluate.figures", self.figures, remedy)
        if HISTOGRAM in self.figures or CLIENTS not in self.figures:
            remedy = "where records are hidden, clients have no histogram, and how many records there are is always asked"
            raise Refusal("evaluate.figures", self.figures, remedy)

    @property
    def unit(self) -> Unit:
        """Hidden unit: a client or, if a vector is the sum of records' parts, a record."""
        return Unit.CLIENT if self.records is None else Unit.RECORD

    @property
    def text(self) -> str:
        """The evaluation as JSON, as it travels."""
        return json.dumps(plain_of(self), sort_keys=True)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Segments of each client's vector; each part has a norm of at most 1 in its own units."""
        share, shapes = 1 / len(self.figures), {HISTOGRAM: (BINS,), **dict.fromkeys(GAINS, (GAIN_CELLS,))}
        return tuple(
            Segment(self._called(each), 1.0, share, shapes.get(each, (1,)), self.purpose)
            for each in self.figures
        )

    @property
    def purposes(self) -> dict[str, str]:
        """Purpose of each part by its name, as ledgers list them."""
        return {each.name: each.purpose for each in self.segments}

    @property
    def unit_name(self) -> str:
        """Name of the count that the means are over: clients, or held-out records."""
        return CLIENTS if self.records is None else RECORDS

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name of a vector at the record level."""
        return {self._called(each): (1,) for each in self.figures}

    def spec_of_records(self, unit_norm: float) -> SumSpec:
        """Return the parameters of the sum if records are hidden, and each record's part is at most `unit_norm` long."""
        rows = self.records or 1.0
        return SumSpec(unit_norm * rows, cells=cells_for(len(self.figures), rows), unit_norm=unit_norm)

    def scale(self, name: str) -> float:
        """Return a figure's entry in a vector at the record level if its value is 1, as a share of the norm of a record's part."""
        assert name in self.layout
        return math.sqrt(1 / len(self.figures))

    def contribution_of_records(
        self, measured: HeldOutRows | None, unit_norm: float
    ) -> dict[str, NDArray[np.float64]]:
        """Return the sum of the parts of a client's held-out records, by the names of `layout`.

        Args:
          measured: metric and loss of each of these records; None if the client holds none out.
          unit_norm: largest norm of a record's part.
        """
        rows = HeldOutRows(np.zeros(0), np.zeros(0)) if measured is None else measured
        metrics = [_within(value, self.bound, 0.0) for value in rows.metrics.tolist()]
        losses = [_within(value, LOSS_BOUND, LOSS_BOUND) for value in rows.losses.tolist()]
        sums = {
            METRIC: math.fsum(2 * (value / self.bound) - 1 for value in metrics),
            LOSS: math.fsum(2 * value / LOSS_BOUND - 1 for value in losses),
            CLIENTS: float(len(metrics)),
        }
        called = {self._called(each): sums[each] for each in self.figures}
        return {name: np.array([total * unit_norm * self.scale(name)]) for name, total in called.items()}

    def contribution(self, measured: HeldOutMeans | None) -> dict[str, NDArray[np.floating]]:
        """Return a client's value of every segment, in [-1, 1]; all zero if it holds no record out (`measured` is None)."""
        values: dict[str, NDArray[np.floating]] = {each.name: np.zeros(each.shape) for each in self.segments}
        if measured is None:
            return values
        metric = _within(measured.metric, self.bound, 0.0)  # a model that diverged counts as the worst one
        loss = _within(measured.loss, LOSS_BOUND, LOSS_BOUND)
        scaled_values = {METRIC: 2 * (metric / self.bound) - 1, LOSS: 2 * loss / LOSS_BOUND - 1, CLIENTS: 1.0}
        for each in self.figures:
            if each == HISTOGRAM:
                values[self._by_metric][min(int(metric / self.bound * BINS), BINS - 1)] = 1.0
            elif each in GAINS:
                values[self._called(each)][:] = gain_cells(measured.gains.get(each, math.nan), self.bound)
            else:
                values[self._called(each)][0] = scaled_values[each]
        return values

    def answers(
        self, sums: Mapping[str, Cells], noise_over_clip: float, clients: float
    ) -> list[tuple[str, list[Figure]]]:
        """Return the figures of each part, by its name.

        Args:
          sums: noisy sum of each segment, by its name.
          noise_over_clip: standard deviation of the sum's noise over its clipping norm.
          clients: number of clients in the sum: of the cohort or, if it is visible, of those who answered.
        """
        sigma, unit_name = self.sigma(noise_over_clip), self.unit_name
        rows = float(sums[unit_name][0]) if CLIENTS in self.figures else None
        parts: list[tuple[str, list[Figure]]] = []
        for each in self.figures:
            name = self._called(each)
            if each == HISTOGRAM:
                parts += self._spread(sums[name], rows, sigma)
            elif each in GAINS:
                parts.append((name, gain_figures(name, sums[name], sigma, self.bound)))
            elif each == CLIENTS:
                parts.append((name, [count_of(unit_name, sums[name][0], sigma)]))
            else:
                half = (self.bound if each == METRIC else LOSS_BOUND) / 2
                mean = _mean(name, float(sums[name][0]), rows, sigma, clients)
                parts.append((name, [scaled(mean, half, half)]))
        return parts

    def sigma(self, noise_over_clip: float) -> float:
        """Return the standard deviation of the noise on each part, in units: clients, or held-out records."""
        return noise_over_clip * math.sqrt(len(self.figures))

    def half_width(self, noise_over_clip: float, clients: float) -> float | None:
        """Return the largest half-width of the metric's interval over all results; None if the metric is no figure.

        Args:
          noise_over_clip: standard deviation of the sum's noise over its clipping norm.
          clients: number of clients that will evaluate, or of held-out records.
        """
        if METRIC not in self.figures:
            return None
        widest = math.sqrt(2) if CLIENTS in self.figures else 1.0  # a ratio's interval is widest at -1 and 1
        return self.bound / 2 * widest * NORMAL_95 * self.sigma(noise_over_clip) / clients

    @property
    def _by_metric(self) -> str:
        return BY_METRIC + self.metric

    def _called(self, figure: str) -> str:
        """Return the name under which one of `FIGURES` is released."""
        names = {METRIC: self.metric, HISTOGRAM: self._by_metric, CLIENTS: self.unit_name, **GAIN_NAMES}
        return names.get(figure, figure)

    def _spread(self, cells: Cells, rows: float | None, sigma: float) -> list[tuple[str, list[Figure]]]:
        """Return the histogram of the clients' metrics, and its quantiles with the distance of the quartiles.

        Args:
          cells: noisy counts of the bins.
          rows: noisy number of clients; None if it is no figure.
          sigma: standard deviation of the noise on each.
        """
        edges = np.linspace(0, self.bound, BINS + 1)
        bins = [
            count_of(f"{low:g} to {high:g}", cell, sigma)
            for (low, high), cell in zip(pairwise(edges), cells, strict=True)
        ]

        def quantile(name: str, level: float, normal: float = NORMAL_95) -> Figure:
            return _quantile(name, cells, rows, level, edges, sigma, normal)

        upper, lower = (quantile("", level, NORMAL_9875) for level in (0.75, 0.25))
        distance = upper.value - lower.value
        figures = [
            quantile("worst decile", WORST),
            quantile("lower quartile", 0.25),
            quantile("median", 0.5),
            quantile("upper quartile", 0.75),
            Figure("quartiles' distance", distance, max(upper.low - lower.high, 0.0), upper.high - lower.low),
        ]
        return [(self._by_metric, bins), ("spread", figures)]


def _quantile(
    name: str, cells: Cells, rows: float | None, level: float, edges: Cells, sigma: float, normal: float
) -> Figure:
    """Return a quantile of a histogram.

    The excess at an edge, the count below it minus `level` of all, can be estimated from the bins below and above it, or
    from either of these and the total. At each edge the estimate with the least noise is used, which depends only on
    public numbers.

    Args:
      name: name of the figure.
      cells: noisy counts.
      rows: noisy total; None if it was not released.
      level: share of all that is below.
      edges: edges of the bins.
      sigma: standard deviation of each count.
      normal: half the width of the interval, in standard deviations.
    """
    below, bins_below = np.concatenate([[0.0], np.cumsum(cells)]), np.arange(len(edges))
    above, bins_above = below[-1] - below, len(cells) - bins_below
    estimates = [(1 - level) * below - level * above]
    variances = [(1 - level) ** 2 * bins_below + level**2 * bins_above]
    total = below[-1] if rows is None else rows
    if rows is not None:
        estimates += [below - level * rows, (1 - level) * rows - above]
        variances += [bins_below + level**2, bins_above + (1 - level) ** 2]
    best = np.argmin(variances, axis=0)
    excess = np.choose(best, estimates)
    if total <= 0 or total < ENOUGH * sigma or excess[-1] <= 0:
        return unsaid(name)
    return quantile_of(name, excess, normal * sigma * np.sqrt(np.choose(best, variances)), edges)


def _mean(name: str, total: float, rows: float | None, sigma: float, clients: float) -> Figure:
    """Return the mean of values in [-1, 1]: over the noisy number of `rows`, or without one over all `clients`."""
    if rows is not None:
        return ratio_of(name, total, rows, sigma)
    value, half = total / clients, NORMAL_95 * sigma / clients
    return clipped(name, value, value - half, value + half, minimum=-1.0)


def _within(value: float, bound: float, otherwise: float) -> float:
    """Return a value clipped to [0, bound]; `otherwise` if it is not finite."""
    return min(max(value, 0.0), bound) if math.isfinite(value) else otherwise


def evaluation_from_json(text: str) -> Evaluation:
    """Return the evaluation that travelled.

    Raises:
      Refusal: it is none: too long, no JSON, or a value is missing, unknown or out of range.
    """
    if len(text) > MAX_BYTES:
        raise Refusal(EVALUATION, f"{len(text)} bytes", f"an evaluation has at most {MAX_BYTES}")
    try:
        return build(Evaluation, read_json(text), whole=True)
    except Undecodable as error:
        raise Refusal(EVALUATION, text[:40], f"is none ({error})") from error
