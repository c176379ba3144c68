"""Coefficients of a linear or additive model of tables in the units of its columns, as contrasts of its parameters.

A number's slope is per unit of its column. A word's value, or a bin's, is the difference to the first word, or to the mean of
the column's bins that public rows have: a common constant of a column cannot be told from the intercept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..tasks.table_schema import Column, Schema
from .descent import ModelEstimate
from .outcomes import Array

INTERCEPT = "intercept"
UNSEEN = (
    1e-5  # relative length of a contrast outside the directions of public rows, beyond float32's rounding
)


@dataclass(frozen=True)
class Contrast:
    """Linear function of one score's coefficients, in the unit of the label.

    Attributes:
      column: name of an input column, or INTERCEPT.
      of: word or bin of the column; empty for a number's slope and the intercept.
      factors: of the inputs with their 1 last, shape (d,).
    """

    column: str
    of: str
    factors: Array


def contrasts_of(schema: Schema, inputs: Array) -> list[Contrast]:
    """Return the intercept, where numbers are 0 and words the first ones, and the coefficients of each column.

    Args:
      schema: of the model's inputs.
      inputs: public rows with their 1 last, shape (m, d).
    """
    width = schema.width + 1
    intercept, contrasts, start = np.zeros(width), list[Contrast](), 0
    intercept[-1] = 1
    for column in schema.inputs:
        part = slice(start, start + column.width)
        for of, values, reference in _of_column(column, inputs[:, part]):
            factors = np.zeros(width)
            factors[part] = values
            contrasts.append(Contrast(column.name, of, factors))
            intercept[part] = reference
        start += column.width
    return [Contrast(INTERCEPT, "", intercept), *contrasts]


def _of_column(column: Column, inputs: Array) -> Iterator[tuple[str, Array, Array]]:
    """Yield the name of each coefficient of a column, its factors and those of the column in the intercept."""
    if column.categories:
        units = np.eye(column.width)
        for code, word in enumerate(column.words[1:], start=1):
            yield word, units[code] - units[0], units[0]
    elif column.edges:
        occurs = (inputs != 0).any(0).astype(float)
        mean = occurs / max(occurs.sum(), 1.0)
        edges = (column.low, *column.edges, column.high)
        for code, unit in enumerate(np.eye(column.width)):
            yield f"{edges[code]:g} to {edges[code + 1]:g}", unit - mean, mean
    else:
        offset, scale = column.scale
        yield "", np.array([1 / scale]), np.array([-offset / scale])


def spread(estimate: ModelEstimate, factors: Array, basis: Array) -> tuple[Array, Array]:
    """Return values and standard errors of contrasts; NaN where the public rows have not the direction.

    Args:
      estimate: of the true model.
      factors: of the inputs, shape (n, d).
      basis: of the scores, shape (n, c) for one function of the scores for each contrast.
    """
    scores, width = estimate.coefficients.shape
    values = np.einsum("nc,cd,nd->n", basis, estimate.coefficients, factors)
    whole = (basis[:, :, None] * factors[:, None, :]).reshape(-1, scores * width)
    errors = np.sqrt(np.einsum("np,pq,nq->n", whole, estimate.covariance, whole, optimize=True))
    outside = factors - factors @ estimate.span @ estimate.span.T
    unseen = np.linalg.norm(outside, axis=1) > UNSEEN * np.linalg.norm(factors, axis=1)
    return np.where(unseen, np.nan, values), np.where(unseen, np.nan, errors)
