"""Weights of rows from a column of their table: a row's loss times its weight over the column's `high`, which is at most 1.

A row's gradient is clipped after it is weighed, so that its epsilon is what it is without weights. The weight travels in
the target, as weights by group do (`tables.weighted_task`): every training loop passes targets to the loss and to nothing
else. Of classes a target is class + classes * (1 + level), and the weight is that level of `LEVELS`; of other labels the weight
stands behind the numbers of the target (`Weighed`). Held-out rows weigh 1, so that metrics are those of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..base.refusal import Refusal
from ..tasks.data import Examples
from ..tasks.labels import Array, Label, LabelCells
from ..tasks.table_files import Cells, RowSource, read_cells
from ..tasks.table_schema import Column, Schema, columns_of, plain
from ..tasks.tables import Tables

LEVELS = 1000  # above 0; a weight is rounded by at most half of a thousandth of the largest
LEVEL = "weight of the row"  # beside the groups of examples while they are read


def with_weight(schema: Schema, values: Mapping[str, Any], where: str) -> Schema:
    """Return a schema whose rows are weighed by a column; refuse one that cannot weigh.

    Args:
      schema: with its label.
      values: keys of the schema's file; `weight` has the column's name and its bounds.
      where: the file, for a refusal.
    """
    definition = values["weight"]
    if not isinstance(definition, dict) or len(definition) != 1:
        raise Refusal(
            f"{where}: weight",
            definition,
            "give one column with its bounds, as in {visits: {low: 0, high: 10}}",
        )
    (column,) = columns_of(f"{where}: weight", definition)
    field = f"{where}: weight: {column.name}"
    if column.categories or column.edges or column.standard or column.missing_input or column.is_constrained:
        raise Refusal(
            field, column.name, "is a number with low, high and missing, and no other keys; remove these"
        )
    if column.low < 0:
        raise Refusal(field, f"{column.low:g}", "low must be 0 or above: a weight is not negative")
    if plain(column.name) in {plain(each.name) for each in schema.columns}:
        raise Refusal(field, column.name, "is in columns too, and a weight is no input; remove it there")
    if "group_weights" in values:
        raise Refusal(field, "group_weights", "weigh the rows too; remove one of them")
    return replace(schema, weight=column)


def with_levels(data: Examples, source: Path | RowSource, schema: Schema) -> Examples:
    """Return a client's examples with the level of each row's weight beside their groups.

    Args:
      data: examples of the client.
      source: of its table.
      schema: with a weight.
    """
    column = _column(schema)
    levels = read_cells(source, [column], schema, _levels)[column.name]
    return replace(data, groups={**(data.groups or {}), LEVEL: torch.from_numpy(levels)})


def _levels(cells: Cells) -> NDArray[np.int64]:
    """Return the level of each weight, shape (n,), from 0 to `LEVELS`; refuse a missing one that no number stands for."""
    column, weights = cells.column, cells.numbers()
    absent = np.isnan(weights)
    if column.missing is None:
        cells.refuse_any(
            absent, "is missing and weighs its row; give it, or say missing: 1 in the schema's weight"
        )
    weights[absent] = column.missing
    clipped = np.clip(weights, column.low, column.high)
    return np.rint(clipped / column.high * LEVELS).astype(np.int64)


def label_of_rows(label: Label) -> Label:
    """Return a label whose targets can have the weights of their rows: classes as they are, any other with a weight behind."""
    return label if label.words else Weighed(label)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Weighed:
    """`Label` whose targets are those of another label with the weight of the row behind, shape (n, numbers + 1).

    What is not about targets is that label's own.

    Attributes:
      label: the other label.
    """

    label: Label

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "label":  # a copy asks for them before it has a label
            raise AttributeError(name)
        return getattr(self.label, name)

    def empty(self, rows: int) -> Array:
        return np.ones((rows, math.prod(self._form.shape[1:]) + 1), dtype=np.float32)

    @property
    def _form(self) -> Array:
        return self.label.empty(0)

    def targets(self, cells: Mapping[str, LabelCells]) -> Array:
        numbers = self.label.targets(cells)
        return np.column_stack([numbers, np.ones(len(numbers))])

    def with_weights(self, targets: Tensor, weights: Tensor) -> Tensor:
        """Return targets with the weights of their rows, shape (n,)."""
        return torch.cat([targets[:, :-1], weights[:, None].to(targets.dtype)], 1)

    def own(self, targets: Tensor) -> Tensor:
        """Return the other label's targets, shape (..., n, ...), without weights; held-out rows have none."""
        form = self._form
        numbers = targets[..., :-1].reshape(*targets.shape[:-1], *form.shape[1:])
        return numbers.to(torch.from_numpy(form).dtype)

    def values(self, targets: Array) -> Mapping[str, Array]:
        return self.label.values(self.own(torch.from_numpy(targets)).numpy())

    def loss(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        return self.losses(outputs[None], targets[None], weights)[0]

    def losses(self, outputs: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
        """Return each client's mean loss, from the loss of each row as if it were a client's only one."""
        if self._is_own(outputs, targets):
            return self.label.losses(outputs, targets, weights)
        alone = self.label.losses(
            outputs.flatten(0, 1)[:, None], self.own(targets).flatten(0, 1)[:, None], weights
        )
        return (alone.reshape(outputs.shape[:2]) * targets[..., -1]).mean(1)

    def _is_own(self, outputs: Tensor, targets: Tensor) -> bool:
        """Whether targets have no weights."""
        return targets.dim() < outputs.dim() or targets.shape[-1] == math.prod(self._form.shape[1:])

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return self.label.metrics(outputs, targets if self._is_own(outputs, targets) else self.own(targets))


def weighted(task: Tables) -> Tables:
    """Return a task whose clients' targets have the weights of their rows, which no longer lie beside the groups."""
    outcome: Any = task.schema.outcome

    def coded(data: Examples) -> Examples:
        levels = (data.groups or {})[LEVEL]
        if task.classes:
            targets = data.targets + task.classes * (1 + levels)
        else:
            targets = outcome.with_weights(data.targets, levels / LEVELS)
        return replace(_without_levels(data), targets=targets)

    test = _without_levels(task.test)
    if not task.classes:
        test = replace(test, targets=outcome.own(test.targets))
    return replace(task, clients=tuple(map(coded, task.clients)), test=test)


def _without_levels(data: Examples) -> Examples:
    groups = {name: codes for name, codes in (data.groups or {}).items() if name != LEVEL}
    return replace(data, groups=groups or None)


def labels(task: Tables, targets: Tensor) -> Tensor:
    """Return targets without the weights of their rows; held-out rows have none."""
    if task.classes:
        return targets % task.classes
    outcome: Any = task.schema.outcome
    return outcome.own(targets) if targets.shape[1:] == outcome.empty(0).shape[1:] else targets


def weights_of(schema: Schema) -> tuple[float, ...]:
    """Return the weight of an example by its target: of the classes alone, then of the classes at each level.

    Those of another label are its own.
    """
    if not schema.outcome.words:
        return schema.outcome.weights
    of_classes = schema.outcome.weights or (1.0,) * len(schema.outcome.words)
    levels = (level / LEVELS for level in range(LEVELS + 1))
    return (*of_classes, *(weight * level for level in levels for weight in of_classes))


def _column(schema: Schema) -> Column:
    assert schema.weight is not None
    return schema.weight
