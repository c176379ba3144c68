"""Label of tables: what a task predicts. Classes and numbers are here, and other kinds in the room `tables`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from . import numpy_model

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = NDArray[Any]
PREDICTED, SCORE = "predicted", "score"  # columns of a model for questions


class LabelColumn(Protocol):
    """Column of a schema, as a label reads it."""

    @property
    def name(self) -> str:
        """As in the header of a table."""
        ...

    @property
    def words(self) -> tuple[str, ...]:
        """The categories; empty for a number."""
        ...

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each category in the loss, the largest 1; empty if all are 1."""
        ...

    @property
    def scale(self) -> tuple[float, float]:
        """Offset and scale of a number: the middle and half of its range."""
        ...


class LabelCells(Protocol):
    """Cells of a label's column in a block of a table; `is_label` refuses a missing one."""

    def codes(self, is_label: bool = False) -> NDArray[np.int64]:
        """Return the number of each cell's category, shape (n,)."""
        ...

    def scaled(self, is_label: bool = False) -> NDArray[np.float64]:
        """Return numbers clipped to their bounds and scaled to -1 .. 1, shape (n,)."""
        ...

    def numbers(self) -> NDArray[np.float64]:
        """Return numbers as they are, shape (n,), NaN for a missing one."""
        ...

    def refuse_any(self, faults: NDArray[np.bool_], remedy: str) -> None:
        """Refuse the first faulty cell, if there is one."""
        ...


class LinearScores(NamedTuple):
    """Scores of a linear model in the unit in which they are shown: names, weight (scores, inputs) and bias (scores,)."""

    names: Sequence[str]
    weight: Array
    bias: Array


class Label(Protocol):
    """Kind of label: how its columns become targets, how outputs are trained and measured, and what they predict."""

    @property
    def columns(self) -> tuple[LabelColumn, ...]:
        """Columns of the table that hold the label, which are no inputs of the model."""
        ...

    @property
    def words(self) -> tuple[str, ...]:
        """Names of the classes whose logits the outputs are; empty for other kinds."""
        ...

    @property
    def weighted(self) -> tuple[LabelColumn, ...]:
        """Columns of the label that may have weights of their categories."""
        ...

    @property
    def keys(self) -> Mapping[str, object]:
        """Keys and values of the schema's `label`; empty where it is the name of the column alone."""
        ...

    @property
    def unit(self) -> tuple[float, float]:
        """Offset and scale that convert an output of the model to the unit in which it is shown."""
        ...

    @property
    def curvature(self) -> float:
        """Bound on the second derivative of an example's loss by the model's score, from which a learning rate follows."""
        ...

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of an example in the loss by its target; empty if all are 1."""
        ...

    @property
    def directed(self) -> bool:
        """Whether the schema may require a direction or a bound of a column's shape."""
        ...

    @property
    def parameters(self) -> tuple[str, str]:
        """Names of the weight and the bias of a linear model."""
        ...

    def head(self, inputs: int) -> nn.Module:
        """Return a linear model from this many inputs to the outputs, which starts at public values."""
        ...

    def empty(self, rows: int) -> Array:
        """Return an array for the targets of this many rows, shape (rows, ...)."""
        ...

    def targets(self, cells: Mapping[str, LabelCells]) -> Array:
        """Return the targets of a block, shape (n, ...), from its cells by column; refuse a missing cell."""
        ...

    def values(self, targets: Array) -> Mapping[str, Array]:
        """Return the label's columns in the form in which questions count them, shape (n,) each, from its targets."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        """Return the mean loss of a batch, a scalar; arguments as of `losses`, without the dimension of clients."""
        ...

    def losses(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        """Return each client's mean loss, shape (clients,).

        Args:
          outputs: shape (clients, n, outputs).
          targets: shape (clients, n, ...).
          weights: weight of an example by its target; empty if all are 1.
        """
        ...

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return figures of a model on held-out rows, which are public.

        Args:
          outputs: shape (n, outputs), on the CPU.
          targets: shape (n, ...), on the CPU.
        """
        ...

    def predictions(self, outputs: Array) -> dict[str, Array]:
        """Return predictions by column name, shape (n,) each, for outputs of shape (n, outputs)."""
        ...

    def answers(self, outputs: Tensor) -> dict[str, Array]:
        """Return the columns of a model that questions count: PREDICTED, and SCORE where there is one."""
        ...

    def explained(self, outputs: Tensor) -> Tensor | None:
        """Return the number of the output that an explanation is about, shape (n,); None for the first one."""
        ...

    def scores(self, weight: Array, bias: Array) -> LinearScores:
        """Return the scores of a linear model with these arrays, shapes (scores, inputs) and (outputs,)."""
        ...


def answers_of(outputs: Tensor, words: Sequence[str]) -> dict[str, Array]:
    """Return `Label.answers` for logits of classes, or for one number per row.

    Args:
      outputs: shape (n, ...).
      words: names of the classes; empty if they are numbers.
    """
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        return {PREDICTED: outputs.reshape(-1).double().numpy()}
    classes = outputs.argmax(1).numpy()
    columns: dict[str, Array] = {PREDICTED: np.array(words)[classes] if words else classes}
    if outputs.shape[1] == 2:
        columns[SCORE] = outputs.softmax(1)[:, 1].double().numpy()
    return columns


@dataclass(frozen=True)
class Classes:
    """Label with categories, of which the model predicts one by cross-entropy.

    With weights by group a target is class + classes * (2 + group), as `tables.weighted_task` has it.

    Attributes:
      column: the column.
    """

    column: LabelColumn

    unit = (0.0, 1.0)
    curvature = 0.5  # Boehning 1992
    law = "classes"  # of intervals, see tables/intervals.py
    directed = True
    parameters = ("weight", "bias")

    @property
    def columns(self) -> tuple[LabelColumn, ...]:
        return (self.column,)

    @property
    def weighted(self) -> tuple[LabelColumn, ...]:
        return (self.column,)

    @property
    def words(self) -> tuple[str, ...]:
        return self.column.words

    @property
    def keys(self) -> Mapping[str, object]:
        return {}

    @property
    def weights(self) -> tuple[float, ...]:
        return self.column.weights

    def head(self, inputs: int) -> nn.Module:
        from .classification import softmax_regression

        return softmax_regression(inputs, len(self.words))

    def empty(self, rows: int) -> Array:
        return np.empty(rows, dtype=np.int64)

    def targets(self, cells: Mapping[str, LabelCells]) -> Array:
        return cells[self.column.name].codes(True)

    def values(self, targets: Array) -> Mapping[str, Array]:
        return {self.column.name: np.array(self.words, dtype=np.str_)[targets % len(self.words)]}

    def loss(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        if weights:
            return self.losses(outputs[None], targets[None], weights)[0]
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, targets)

    def losses(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        from .classification import cross_entropies

        return cross_entropies(outputs, targets, weights)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        from .classification import class_metrics

        return class_metrics(outputs, targets % len(self.words))

    def predictions(self, outputs: Array) -> dict[str, Array]:
        predictions = numpy_model.columns(outputs, classifies=True)
        words = np.array(self.words)[predictions["class"]]
        return {self.column.name: words, "probability": predictions["probability"]}

    def answers(self, outputs: Tensor) -> dict[str, Array]:
        return answers_of(outputs, self.words)

    def explained(self, outputs: Tensor) -> Tensor | None:
        return outputs.argmax(1)

    def scores(self, weight: Array, bias: Array) -> LinearScores:
        if len(bias) == 2:  # log-odds
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        return LinearScores(self.words[-len(bias) :], weight, bias)


@dataclass(frozen=True)
class Number:
    """Label with numbers between two bounds, which the model predicts by squared error.

    Attributes:
      column: the column.
    """

    column: LabelColumn

    words = ()
    weighted = ()
    weights = ()
    curvature = 2.0
    law = "number"
    directed = True
    parameters = ("weight", "bias")

    @property
    def columns(self) -> tuple[LabelColumn, ...]:
        return (self.column,)

    @property
    def keys(self) -> Mapping[str, object]:
        return {}

    @property
    def unit(self) -> tuple[float, float]:
        return self.column.scale

    def head(self, inputs: int) -> nn.Module:
        from .classification import softmax_regression

        return softmax_regression(inputs, 1)

    def empty(self, rows: int) -> Array:
        return np.empty(rows, dtype=np.float32)

    def targets(self, cells: Mapping[str, LabelCells]) -> Array:
        return cells[self.column.name].scaled(True)

    def values(self, targets: Array) -> Mapping[str, Array]:
        offset, scale = self.unit
        return {self.column.name: offset + scale * targets.astype(np.float64)}

    def loss(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        return ((outputs.squeeze(-1) - targets) ** 2).mean()

    def losses(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        return ((outputs.squeeze(-1) - targets) ** 2).mean(1)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        _, scale = self.unit
        errors = outputs.squeeze(-1) - targets
        metrics = {"mean_absolute_error": scale * errors.abs().mean().item()}
        if variation := (targets.double() - targets.double().mean()).square().sum().item():
            metrics["r2"] = 1 - errors.double().square().sum().item() / variation
        return metrics

    def predictions(self, outputs: Array) -> dict[str, Array]:
        offset, scale = self.unit
        return {self.column.name: offset + scale * np.clip(outputs.astype(np.float64)[:, 0], -1, 1)}

    def answers(self, outputs: Tensor) -> dict[str, Array]:
        return answers_of(outputs, ())

    def explained(self, outputs: Tensor) -> Tensor | None:
        return None

    def scores(self, weight: Array, bias: Array) -> LinearScores:
        offset, scale = self.unit
        return LinearScores([self.column.name], scale * weight, offset + scale * bias)
