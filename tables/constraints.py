"""Directions and bounds of an additive model's shapes, which the schema's `monotone` and `bound` declare.

They are imposed on the released model when a run ends, by the closest shape that has them: post-processing, which costs no
epsilon. A number's bins, in order, become their isotonic regression with equal weights, since counts of rows are private; a
line gets its sign. A bounded shape is clipped about a zero mean. With two classes the score is the log-odds of the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from ..base.refusal import Refusal
from ..tasks.table_schema import Column, Schema

Array = NDArray[np.float64]
HALVINGS = 60  # of the interval in which a shift is searched, to the last bit of a double


def require_shapes(schema: Schema, layers: Sequence[int]) -> None:
    """Refuse a model or a label that has no shape of each column, or no single score with a direction.

    Args:
      schema: with columns that are constrained.
      layers: sizes of the model's hidden layers; empty for a linear model.
    """
    names = ", ".join(column.name for column in schema.constrained)
    if layers:
        remedy = (
            f"has no shape of a column, and the schema has monotone or bound of {names}; use linear or gam"
        )
        raise Refusal("task.model", "mlp", remedy)
    if not schema.outcome.directed:
        remedy = f"is of a kind without monotone and bound, which the schema has of {names}; remove these"
        raise Refusal("task.label", schema.label, remedy)
    if len(schema.outcome.words) > 2 and any(column.monotone for column in schema.constrained):
        remedy = f"has {len(schema.outcome.words)} classes, each with a score of its own; remove monotone, or use two classes"
        raise Refusal("task.label", schema.label, remedy)


def constrained(schema: Schema, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return a linear model's arrays, by name, with the closest shapes that the schema allows, in the arrays' types."""
    names = schema.outcome.parameters
    weight, bias = (arrays[name].astype(np.float64) for name in names)
    ones = schema.outcome.scores(np.ones_like(weight), bias).weight
    is_odds = len(ones) < len(weight)
    unit = 1.0 if is_odds else float(ones[0, 0])  # of a score, in those of an output
    scores = (weight[1:] - weight[:1] if is_odds else weight) * unit
    shift, start = np.zeros(len(scores)), 0
    for column in schema.inputs:
        part = slice(start, start + column.width)
        if column.is_constrained:
            own = [_closest(column, each) for each in scores[:, part]]
            scores[:, part] = np.stack([each.weights for each in own])
            shift += [each.shift for each in own]
            # Half on either side, so that differences of float32 are exactly in order.
            sides = np.stack([-scores[0, part], scores[0, part]]) / 2 if is_odds else scores[:, part] / unit
            weight[:, part] = sides
        start += column.width
    bias = bias + (np.array([-shift[0], shift[0]]) / 2 if is_odds else shift / unit)
    return {
        **arrays,
        **{name: new.astype(arrays[name].dtype) for name, new in zip(names, (weight, bias), strict=True)},
    }


@dataclass(frozen=True)
class _Shape:
    """Weights of a column's inputs in a score, shape (width,), and what they leave to the intercept."""

    weights: Array
    shift: float


def _closest(column: Column, weights: Array) -> _Shape:
    """Return the closest weights of a column's inputs with its direction and bound."""
    values, missing = weights[: column.values], weights[column.values :]
    sign = {"up": 1.0, "down": -1.0}.get(column.monotone, 0.0)
    if not column.categories and not column.edges:
        if sign:
            values = sign * np.maximum(sign * values, 0.0)
        _, scale = column.scale
        largest = (
            column.bound * 2 * scale / (column.high - column.low)
        )  # half of the line's rise is within the bound
        return _Shape(
            np.concatenate([np.clip(values, -largest, largest), _clipped(missing, column.bound)]), 0.0
        )
    if sign:
        values = isotonic_regression(values, increasing=sign > 0).x
    mean = float(values.mean())
    centred = _bounded(values - mean, column.bound) if column.bound < math.inf else values - mean
    if missing.size:  # relative to the mean, as shapes have it
        return _Shape(np.concatenate([mean + centred, mean + _clipped(missing - mean, column.bound)]), 0.0)
    level = float(np.clip(mean, -column.bound, column.bound))  # a missing value adds -level
    return _Shape(level + centred, mean - level)


def _clipped(values: Array, bound: float) -> Array:
    return np.clip(values, -bound, bound)


def _bounded(values: Array, bound: float) -> Array:
    """Return the closest values with mean 0 and a size of at most the bound, of values with mean 0."""
    low, high = float(values.min()) - bound, float(values.max()) + bound
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _clipped(values - middle, bound).mean() > 0:
            low = middle
        else:
            high = middle
    return _clipped(values - (low + high) / 2, bound)
