"""Shapes of an additive model: the contributions of bins, of words and of pairs of columns, which are the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from .table_basis import LevelColumn, Pair
from .table_schema import Column, Schema, read_schema

SHAPES = "shapes.json"


def read_shapes(schema: Path, model: Path) -> dict[str, Any] | None:
    """Return the shapes of a run's released model; None if it is not additive.

    Args:
      schema: file of the tables' schema, stored with the run's model.
      model: file of the model's arrays.
    """
    if not schema.is_file() or not model.is_file():
        return None
    from safetensors.numpy import load_file

    declared, arrays = read_schema(schema), load_file(model)
    weight, bias = declared.outcome.parameters
    if set(arrays) != {weight, bias} or arrays[weight].shape[1:] != (declared.width,):
        return None
    return shapes(declared, arrays[weight], arrays[bias], lines=True)


def shapes(
    schema: Schema, weight: NDArray[Any], bias: NDArray[Any], *, lines: bool = False
) -> dict[str, Any]:
    """Return the shapes of a linear model over bins and words, as JSON.

    A score is `intercept` plus one value for each column: that of the row's bin or word. A missing value adds
    `missing`. Each shape is shifted to sum to zero over its declared bins; other tools weight the shift by counts of
    rows, which are private. With two classes there is one score, the log-odds of the second; for a number the score is
    in its own unit, before it is clipped to its bounds. A pair has a value for each combination of its `levels`, shape
    (scores, first, second), which sums to zero over either column, and adds nothing where one is missing. A kind of
    label may add fields by its method `described`, such as survival curves.

    Args:
      schema: schema of the inputs.
      weight: of a linear model, shape (scores, schema.width); its name is the first of `Label.parameters`.
      bias: shape (outputs,).
      lines: whether a number without bins has a line, with values at its two bounds; such a number is refused otherwise.
    """
    if (numbers := [each.name for each in schema.numbers]) and not lines:
        raise Refusal("task.model", ", ".join(numbers), "have no bins; train with task.model=gam")
    offsets, (scores, weight, bias) = bias.astype(np.float64), schema.outcome.scores(weight, bias)
    intercept, curves, start = bias.astype(np.float64), list[dict[str, Any]](), 0
    for column in schema.inputs:
        own = weight[:, start : start + column.width].astype(np.float64)
        values, missing = own[:, : column.values], own[:, column.values :].sum(1)
        if not column.categories and not column.edges:  # a line, by its values at the bounds
            offset, scale = column.scale
            values = values * ((np.array([column.low, column.high]) - offset) / scale)
        else:
            values = values @ schema.rows(column)[: column.values, : column.values].T
        mean = values.mean(1)
        intercept = intercept + mean
        curves.append(_shape(column, values - mean[:, None], missing - mean))
        start += column.width
    for pair in schema.pairs:
        values = weight[:, start : start + pair.width] @ pair.rows.T
        curves.append(_pair(pair, values.astype(np.float64)))
        start += pair.width
    curves.sort(key=lambda each: -each["range"])
    model = {"scores": list(scores), "intercept": intercept.tolist(), "shapes": curves}
    describe = getattr(schema.outcome, "described", None)
    return model if describe is None else model | describe(offsets + intercept - bias, curves)


def _shape(column: Column, values: NDArray[np.float64], missing: NDArray[np.float64]) -> dict[str, Any]:
    """Return one column's shape; `values` have shape (scores, bins or words), `missing` shape (scores,)."""
    shape: dict[str, Any] = {"column": column.name, "range": float(np.ptp(values, 1).max())}
    if column.is_constrained:
        shape["constraint"] = column.constraint
    if column.categories:
        shape["words"] = list(column.words)
    else:
        shape["edges"] = [column.low, *column.edges, column.high]
    shape["values"] = values.tolist()
    # A number that is an input, or has `missing`, never lacks a value: another number stands for it, unless declared.
    if column.missing_input or column.categories or (column.edges and column.missing is None):
        shape["missing"] = missing.tolist()
    return shape


def _pair(pair: Pair, values: NDArray[np.float64]) -> dict[str, Any]:
    """Return one pair's shape; `values` have shape (scores, combinations of levels)."""
    return {
        "column": pair.name,
        "range": float(np.ptp(values, 1).max()),
        "levels": [_levels(pair, each) for each in (pair.first, pair.second)],
        "values": values.reshape(-1, *pair.counts).tolist(),
        "missing": [0.0] * len(values),
    }


def _levels(pair: Pair, column: LevelColumn) -> dict[str, Any]:
    """Return a column's name, with its words or the edges of its groups of bins."""
    return {"column": column.name, "words" if column.categories else "edges": pair.levels(column)}
