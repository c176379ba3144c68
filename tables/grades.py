"""Grade as a label: ordered categories by proportional odds (McCullagh 1980), with one score and ordered cut points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..tasks.labels import PREDICTED, LabelCells, LabelColumn, LinearScores
from .label_keys import DeclaredLabel, LabelKeys
from .survival_metrics import concordance

if TYPE_CHECKING:  # a program without torch predicts with an exported model
    from torch import Tensor, nn

Array = NDArray[Any]
KEYS = ("column",)
MOST_LOG_STEP = 10.0  # between cut points: e^10 log-odds are certainty


@dataclass(frozen=True)
class Grades:
    """Label with categories in their order.

    The first output is the log-odds of a grade above the lowest. Each further one is the same for all rows: the logarithm of
    a step, by which the log-odds of a grade above the next are lower. So cut points are ordered, whatever is trained.

    Attributes:
      column: the column; its categories ascend.
    """

    column: LabelColumn

    words = ()  # outputs are no logits of classes
    law = ""
    directed = False
    unit = (0.0, 1.0)
    curvature = 0.5  # each of the two log-odds about a grade adds at most 1/4
    parameters = ("0.weight", "1.bias")

    @property
    def columns(self) -> tuple[LabelColumn, ...]:
        return (self.column,)

    @property
    def weights(self) -> tuple[float, ...]:
        return self.column.weights

    @property
    def weighted(self) -> tuple[LabelColumn, ...]:
        return (self.column,)

    @property
    def keys(self) -> Mapping[str, object]:
        return {"kind": "ordinal", "column": self.column.name}

    def head(self, inputs: int) -> nn.Module:
        from .one_score import one_score

        grades = len(self.column.words)
        shares = np.arange(1, grades) / grades  # all grades alike
        cuts = np.log(shares / (1 - shares))
        return one_score(inputs, [-cuts[0], *np.log(np.diff(cuts))], reach=1)

    def empty(self, rows: int) -> Array:
        return np.empty(rows, dtype=np.float32)  # whole numbers as floats, which nothing takes for classes

    def targets(self, cells: Mapping[str, LabelCells]) -> Array:
        return cells[self.column.name].codes(True)

    def values(self, targets: Array) -> Mapping[str, Array]:
        return {self.column.name: np.array(self.column.words, dtype=np.str_)[targets.astype(int)]}

    def loss(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        return self._terms(outputs, targets, weights).mean()

    def losses(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        return self._terms(outputs, targets, weights).mean(1)

    def _terms(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        """Return each record's loss, shape (..., n): minus the logarithm of the probability of its grade, times its weight."""
        import torch

        logarithms, grades = self._log_shares(outputs), targets.long()
        losses = -logarithms.gather(-1, grades[..., None])[..., 0]
        return losses * torch.tensor(weights, device=targets.device)[grades] if weights else losses

    def _log_shares(self, outputs: Tensor) -> Tensor:
        """Return the logarithm of the probability of each grade, shape (..., grades)."""
        import torch
        from torch.nn.functional import logsigmoid

        steps = outputs[..., 1:].clamp(-MOST_LOG_STEP, MOST_LOG_STEP).exp()
        above = torch.cat([outputs[..., :1], outputs[..., :1] - steps.cumsum(-1)], -1)
        # The log-odds a of at least a grade and b of a higher one: s(a) - s(b) = s(a) s(-b) (1 - e^(b - a)).
        reached, stayed = logsigmoid(above), logsigmoid(-above)
        between = reached[..., :-1] + stayed[..., 1:] + torch.log(-torch.expm1(-steps))
        return torch.cat([stayed[..., :1], between, reached[..., -1:]], -1)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        best, grades = self._log_shares(outputs).argmax(-1), targets.long()
        every = np.ones(len(grades), dtype=bool)
        metrics = {
            "accuracy": float((best == grades).double().mean()),
            "mean_absolute_steps": float((best - grades).abs().double().mean()),
            "concordance": concordance(-targets.numpy(), every, outputs[:, 0].numpy()),
        }
        return {name: value for name, value in metrics.items() if np.isfinite(value)}

    def predictions(self, outputs: Array) -> dict[str, Array]:
        numbers = outputs.astype(np.float64)
        steps = np.exp(np.clip(numbers[:, 1:], -MOST_LOG_STEP, MOST_LOG_STEP))
        above = np.hstack([numbers[:, :1], numbers[:, :1] - np.cumsum(steps, 1)])
        odds = np.hstack(
            [np.ones((len(above), 1)), np.exp(-np.logaddexp(0, -above)), np.zeros((len(above), 1))]
        )
        shares = -np.diff(odds, axis=1)
        words = np.array(self.column.words)[shares.argmax(1)]
        return {self.column.name: words, "probability": shares.max(1)}

    def answers(self, outputs: Tensor) -> dict[str, Array]:
        return {PREDICTED: self.predictions(outputs.numpy())[self.column.name]}

    def explained(self, outputs: Tensor) -> Tensor | None:
        return None

    def scores(self, weight: Array, bias: Array) -> LinearScores:
        return LinearScores([f"above {self.column.words[0]}"], weight, bias[:1])


def ordinal(declared: DeclaredLabel) -> Grades:
    """Return the label that a schema declares by `kind: ordinal`; refuse a column without three categories."""
    keys = LabelKeys(declared, KEYS)
    column = keys.column("column")
    if len(column.categories) < 3:
        remedy = (
            "must have at least three categories, in ascending order; of two, give the column's name alone"
        )
        raise Refusal(keys.field("column"), column.name, remedy)
    return Grades(column)
