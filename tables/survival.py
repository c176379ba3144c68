"""Survival as a label: the hazard of an event in each interval of time, from times of which some are censored.

The loss of a record is the sum of its own hazard terms, so a record stays one record; Cox's partial likelihood compares
records, and no record's part in it can be bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..tasks.labels import PREDICTED, SCORE, LabelCells, LabelColumn, LinearScores
from ..tasks.table_schema import Column
from .label_keys import DeclaredLabel, LabelKeys
from .survival_metrics import concordance, integrated_brier

if TYPE_CHECKING:  # a program without torch predicts with an exported model
    from torch import Tensor, nn

Array = NDArray[Any]
KEYS = ("time", "event", "bins")
BINS = 10  # intervals of equal length, unless the schema declares others
MOST_BINS = 1000
SURVIVAL = 0.5  # at the last time, of the model before it is trained
COLUMNS, LEVELS = 6, 4  # by which curves are shown, and levels of a column up to which all are


@dataclass(frozen=True)
class SurvivalTimes:
    """Label with a time and whether the event occurred then, or the row was censored.

    A target is time and event, shape (2,), float32. The model gives the log-odds of the hazard in each interval: a score of
    the row plus an offset of the interval. A row that is censored after the middle of an interval has survived it
    (Gensheimer and Narasimhan 2019, PeerJ 7:e6257).

    Attributes:
      time: column of numbers from 0 on; an event after its upper bound is censored there.
      event: column of two categories; the second says that the event occurred.
      ends: end of each interval, ascending; the last is the upper bound of the times.
      bins: what the schema declares: a number of intervals, or the bounds between them.
    """

    time: LabelColumn
    event: LabelColumn
    ends: tuple[float, ...]
    bins: object

    words = ()
    weighted = ()
    weights = ()
    law = "hazards"  # of intervals, see tables/intervals.py
    directed = True
    unit = (0.0, 1.0)
    # Its mean over records is the sum of the hazards that they live through, which at the fit is the share with an event.
    curvature = 1.0
    parameters = ("0.weight", "1.bias")

    @property
    def columns(self) -> tuple[LabelColumn, ...]:
        return (self.time, self.event)

    @property
    def keys(self) -> Mapping[str, object]:
        return {"kind": "survival", "time": self.time.name, "event": self.event.name, "bins": self.bins}

    @cached_property
    def starts(self) -> tuple[float, ...]:
        """Start of each interval; an event at a start belongs to the interval before."""
        return (-1.0, *self.ends[:-1])

    @cached_property
    def middles(self) -> tuple[float, ...]:
        """Middle of each interval."""
        return tuple((max(0.0, low) + high) / 2 for low, high in zip(self.starts, self.ends, strict=True))

    @property
    def _occurred(self) -> str:
        """Name of the event: its column and the second word."""
        return f"{self.event.name} {self.event.words[1]}"

    @property
    def start(self) -> float:
        """Log-odds of the event in each interval before the training."""
        hazard = 1 - SURVIVAL ** (1 / len(self.ends))
        return float(np.log(hazard / (1 - hazard)))

    def head(self, inputs: int) -> nn.Module:
        from .one_score import one_score

        return one_score(inputs, [self.start] * len(self.ends))

    def empty(self, rows: int) -> Array:
        return np.empty((rows, 2), dtype=np.float32)

    def targets(self, cells: Mapping[str, LabelCells]) -> Array:
        times, events = cells[self.time.name].numbers(), cells[self.event.name].codes(True)
        cells[self.time.name].refuse_any(np.isnan(times), "is the label and missing; remove the row")
        cells[self.time.name].refuse_any(times < 0, "is a time below 0; correct it")
        last = self.ends[-1]
        return np.stack([np.minimum(times, last), (events == 1) & (times <= last)], 1).astype(np.float32)

    def values(self, targets: Array) -> Mapping[str, Array]:
        words = np.array(self.event.words, dtype=np.str_)
        return {
            self.time.name: targets[:, 0].astype(np.float64),
            self.event.name: words[targets[:, 1].astype(int)],
        }

    def loss(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        return self._terms(outputs, targets).mean()

    def losses(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        return self._terms(outputs, targets).mean(1)

    def _terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each record's loss, shape (..., n): minus the log-likelihood of the intervals that it lived through."""
        import torch

        times, events = targets[..., :1], targets[..., 1:] > 0
        starts, middles, ends = (
            torch.tensor(each, device=outputs.device) for each in (self.starts, self.middles, self.ends)
        )
        occurred = events & (times > starts) & (times <= ends)
        # Of a row with an event no interval after it; of a censored one those whose middle it has seen.
        lived = torch.where(events, times > starts, times >= middles)
        return (lived * torch.nn.functional.softplus(outputs) - occurred * outputs).sum(-1)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        curves = self._curves(outputs.numpy())
        times, events = targets[:, 0].numpy().astype(np.float64), targets[:, 1].numpy() > 0
        figures = {
            "concordance": concordance(times, events, -curves[:, -1]),
            "integrated_brier": integrated_brier(times, events, curves, self.ends),
        }
        return {name: value for name, value in figures.items() if np.isfinite(value)}

    def _curves(self, outputs: Array) -> NDArray[np.float64]:
        """Return each row's survival at the end of each interval, shape (n, intervals)."""
        # log(1 - hazard) is -log(1 + e^z).
        return np.exp(-np.cumsum(np.logaddexp(0, outputs.astype(np.float64)), 1))

    def medians(self, curves: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the time at which half survive, shape (n,), on straight lines between ends; infinite after the last."""
        curves = np.hstack([np.ones((len(curves), 1)), curves])
        times = np.array([0.0, *self.ends])
        after = (curves > SURVIVAL).sum(1)  # number of the first end with at most half
        stop = np.minimum(after, len(self.ends))
        rows = np.arange(len(curves))
        high, low = curves[rows, stop - 1], curves[rows, stop]
        share = (high - SURVIVAL) / np.maximum(high - low, np.finfo(np.float64).eps)
        medians = times[stop - 1] + share * (times[stop] - times[stop - 1])
        return np.where(after > len(self.ends), np.inf, medians)

    def predictions(self, outputs: Array) -> dict[str, Array]:
        curves = self._curves(outputs)
        columns: dict[str, Array] = {f"median_{self.time.name}": self.medians(curves)}
        return columns | {
            f"survival_at_{end:g}": curve for end, curve in zip(self.ends, curves.T, strict=True)
        }

    def answers(self, outputs: Tensor) -> dict[str, Array]:
        curves = self._curves(outputs.numpy())
        return {PREDICTED: np.minimum(self.medians(curves), self.ends[-1]), SCORE: 1 - curves[:, -1]}

    def explained(self, outputs: Tensor) -> Tensor | None:
        return None

    def scores(self, weight: Array, bias: Array) -> LinearScores:
        return LinearScores([f"hazard of {self._occurred}"], weight, bias[:1])

    def described(self, offsets: Array, shapes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the curves of an additive model as JSON: where each column adds 0, its mean, and by each of its columns.

        Args:
          offsets: log-odds of the event in each interval where each column adds 0, shape (intervals,).
          shapes: of the model, as `tasks.shapes.shapes` has them, the widest range first.
        """

        def curve(score: float) -> list[float]:
            return [1.0, *(float(f"{each:.6g}") for each in self._curves(offsets[None] + score)[0])]

        columns = [
            {
                "column": shape["column"],
                "curves": [{"of": of, "survival": curve(score)} for of, score in levels],
            }
            for shape, levels in ((each, _levels(each)) for each in shapes if "levels" not in each)
        ]
        names = {"time": self.time.name, "event": self._occurred}
        times = [0.0, *self.ends]
        return {"survival": {**names, "times": times, "baseline": curve(0.0), "columns": columns[:COLUMNS]}}


def _levels(shape: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return a column's values or bins with what they add to the score: all, or those that add least and most."""
    (values,) = shape["values"]
    edges = [f"{each:g}" for each in shape.get("edges", ())]
    bins = edges if len(edges) == len(values) else [f"{low} to {high}" for low, high in pairwise(edges)]
    levels = [*zip(shape.get("words", bins), values, strict=True)]
    if len(levels) <= LEVELS:
        return levels
    chosen = {min(levels, key=lambda each: each[1]), max(levels, key=lambda each: each[1])}
    return [each for each in levels if each in chosen]


def survival(declared: DeclaredLabel) -> SurvivalTimes:
    """Return the label that a schema declares by `kind: survival`; refuse columns that cannot be its time or event."""
    keys = LabelKeys(declared, KEYS)
    time, event = keys.column("time"), keys.column("event")
    if time.categories or time.low < 0:
        raise Refusal(keys.field("time"), time.name, "must hold numbers, with low and high of at least 0")
    if len(event.categories) != 2:
        remedy = 'must have two categories, such as categories: ["0", "1"]; the second says that the event occurred'
        raise Refusal(keys.field("event"), event.name, remedy)
    bins = declared.values.get("bins", str(BINS))
    ends = _ends(keys, bins, time)
    displayed = ends[:-1] if isinstance(bins, list) else len(ends)
    return SurvivalTimes(time, event, ends, displayed)


def _ends(keys: LabelKeys, bins: object, time: Column) -> tuple[float, ...]:
    """Return the end of each interval, from a number of intervals of equal length or the bounds between them."""
    if isinstance(bins, list):
        items: list[object] = bins  # pyright: ignore[reportUnknownVariableType]
        inner = tuple(keys.as_number("bins", each) for each in items)
        if not inner or list(inner) != sorted({0.0, *inner, time.high})[1:-1]:
            remedy = f"must ascend, above 0 and below {time.high:g}"
            raise Refusal(keys.field("bins"), list(inner), remedy)
        return (*inner, time.high)
    number = keys.as_number("bins", bins)
    if number != int(number) or not 1 <= number <= MOST_BINS:
        raise Refusal(keys.field("bins"), bins, f"must be a whole number from 1 to {MOST_BINS}, or a list")
    return tuple(np.linspace(0, time.high, int(number) + 1)[1:].tolist())
