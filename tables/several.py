"""Several labels at once: columns of categories that one model predicts together, by the mean of their losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..tasks.labels import Classes, LabelCells, LabelColumn, LinearScores
from .label_keys import DeclaredLabel, LabelKeys

if TYPE_CHECKING:  # a program without torch predicts with an exported model
    from torch import Tensor, nn

Array = NDArray[Any]
KEYS = ("columns",)


@dataclass(frozen=True)
class Several:
    """Several labels, each with categories; the outputs are the logits of the first one's classes, then the next one's.

    A target has the class of each label, shape (labels,).

    Attributes:
      members: the labels.
    """

    members: tuple[Classes, ...]

    words = ()  # outputs are logits of several sets of classes
    weights = ()  # each member has its own
    law = ""
    directed = False
    unit = (0.0, 1.0)
    parameters = ("weight", "bias")

    @property
    def columns(self) -> tuple[LabelColumn, ...]:
        return tuple(member.column for member in self.members)

    @property
    def weighted(self) -> tuple[LabelColumn, ...]:
        return self.columns

    @property
    def keys(self) -> Mapping[str, object]:
        return {"kind": "several", "columns": tuple(column.name for column in self.columns)}

    @property
    def curvature(self) -> float:
        return max(member.curvature for member in self.members) / len(self.members)

    @cached_property
    def parts(self) -> tuple[slice, ...]:
        """Positions of each label's outputs."""
        stops = list(accumulate(len(member.words) for member in self.members))
        return tuple(slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False))

    def head(self, inputs: int) -> nn.Module:
        from ..tasks.classification import softmax_regression

        return softmax_regression(inputs, self.parts[-1].stop)

    def empty(self, rows: int) -> Array:
        return np.empty((rows, len(self.members)), dtype=np.int64)

    def targets(self, cells: Mapping[str, LabelCells]) -> Array:
        return np.stack([member.targets(cells) for member in self.members], 1)

    def values(self, targets: Array) -> Mapping[str, Array]:
        columns: dict[str, Array] = {}
        for member, codes in zip(self.members, targets.T, strict=True):
            columns |= member.values(codes)
        return columns

    def loss(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        import torch

        return torch.stack(
            [own.loss(each, codes, own.weights) for own, each, codes in self._split(outputs, targets)]
        ).mean()

    def losses(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        import torch

        return torch.stack(
            [own.losses(each, codes, own.weights) for own, each, codes in self._split(outputs, targets)]
        ).mean(0)

    def _split(self, outputs: Tensor, targets: Tensor) -> Iterator[tuple[Classes, Tensor, Tensor]]:
        """Yield each label with its outputs and its targets."""
        for number, (member, part) in enumerate(zip(self.members, self.parts, strict=True)):
            yield member, outputs[..., part], targets[..., number]

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for member, own_outputs, own_targets in self._split(outputs, targets):
            for name, value in member.metrics(own_outputs, own_targets).items():
                metrics[f"{name}_{member.column.name}"] = value
        means = [value for name, value in metrics.items() if name.startswith("accuracy_")]
        return {"accuracy": sum(means) / len(means), **metrics}

    def predictions(self, outputs: Array) -> dict[str, Array]:
        columns: dict[str, Array] = {}
        for member, part in zip(self.members, self.parts, strict=True):
            words, probability = member.predictions(outputs[:, part]).values()
            columns |= {member.column.name: words, f"probability_{member.column.name}": probability}
        return columns

    def answers(self, outputs: Tensor) -> dict[str, Array]:
        columns: dict[str, Array] = {}
        for member, part in zip(self.members, self.parts, strict=True):
            own = member.answers(outputs[:, part])
            columns |= {f"{name}_{member.column.name}": values for name, values in own.items()}
        return columns

    def explained(self, outputs: Tensor) -> Tensor | None:
        remedy = "has several labels, and an explanation is of one score; the page of the run shows each label's shapes"
        raise Refusal("--explain", ", ".join(column.name for column in self.columns), remedy)

    def scores(self, weight: Array, bias: Array) -> LinearScores:
        own = [
            (member.column.name, member.scores(weight[part], bias[part]))
            for member, part in zip(self.members, self.parts, strict=True)
        ]
        names = [f"{name}: {word}" for name, scores in own for word in scores.names]
        weights, biases = zip(*((scores.weight, scores.bias) for _, scores in own), strict=True)
        return LinearScores(names, np.concatenate(weights), np.concatenate(biases))


def several(declared: DeclaredLabel) -> Several:
    """Return the labels that a schema declares by `kind: several`; refuse a column without categories."""
    keys = LabelKeys(declared, KEYS)
    own = keys.several("columns")
    for column in own:
        if len(column.categories) < 2:
            raise Refusal(keys.field("columns"), column.name, "must have at least two categories")
    return Several(tuple(map(Classes, own)))
