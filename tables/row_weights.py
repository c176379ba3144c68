"""Weights of rows from a column of their table: a row's loss times its weight over the column's `high`, which is at most 1.

A row's gradient is clipped after it is weighed, so that its epsilon is what it is without weights. The weight travels in
the target, as weights by group do (`tables.weighted_task`): every training loop passes targets to the loss and to nothing
else. A target is class + classes * (1 + level), and the weight is that level of `LEVELS`. Held-out rows have the class
alone and weigh 1, so that metrics are those of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..tasks.data import Examples
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
    if not schema.outcome.words:
        raise Refusal(field, schema.label, "has no classes, which weights of rows need; remove weight")
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


def weighted(task: Tables) -> Tables:
    """Return a task of classes whose clients' targets encode the levels, which no longer lie beside the groups."""

    def coded(data: Examples) -> Examples:
        levels = (data.groups or {})[LEVEL]
        return replace(_without_levels(data), targets=data.targets + task.classes * (1 + levels))

    return replace(task, clients=tuple(map(coded, task.clients)), test=_without_levels(task.test))


def _without_levels(data: Examples) -> Examples:
    groups = {name: codes for name, codes in (data.groups or {}).items() if name != LEVEL}
    return replace(data, groups=groups or None)


def weights_of(schema: Schema) -> tuple[float, ...]:
    """Return the weight of an example by its target: of the classes alone, then of the classes at each level."""
    of_classes = schema.outcome.weights or (1.0,) * len(schema.outcome.words)
    levels = (level / LEVELS for level in range(LEVELS + 1))
    return (*of_classes, *(weight * level for level in levels for weight in of_classes))


def _column(schema: Schema) -> Column:
    assert schema.weight is not None
    return schema.weight
