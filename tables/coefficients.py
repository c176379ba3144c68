"""Coefficients of a linear or additive model of tables in the units of its columns, as contrasts of its parameters.

A number's slope is per unit of its column. A word's value, or a bin's, is the difference to the first word, or to the mean of
the column's bins that public rows have: a common constant of a column cannot be told from the intercept. A combination of a
pair has what it adds to both columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from ..tasks.table_schema import Column, Schema
from .descent import ModelEstimate
from .outcomes import Array

INTERCEPT = "intercept"
MISSING = "missing"  # name of the coefficient of a missing value that is an input
UNSEEN = (
    1e-5  # relative length of a contrast outside the directions of public rows, beyond float32's rounding
)


@dataclass(frozen=True)
class Contrast:
    """Linear function of one score's coefficients, in the unit of the label.

    Attributes:
      column: name of an input column or of a pair, or INTERCEPT.
      of: word or bin of the column, both of a pair, or MISSING; empty for a number's slope and the intercept.
      factors: of the inputs with their 1 last, shape (d,).
    """

    column: str
    of: str
    factors: Array


def contrasts_of(schema: Schema, inputs: Array) -> list[Contrast]:
    """Return the intercept, where numbers are 0 and words the first ones, and the coefficients of each column and pair.

    Args:
      schema: of the model's inputs.
      inputs: public rows with their 1 last, shape (m, d).
    """
    width = schema.width + 1
    intercept, contrasts, start = np.zeros(width), list[Contrast](), 0
    intercept[-1] = 1
    for column in schema.inputs:
        part, rows = slice(start, start + column.width), schema.rows(column).astype(float)
        for of, values, reference in _of_column(column, rows, inputs[:, part]):
            contrasts.append(_contrast(column.name, of, values, part, width))
            intercept[part] = reference
        start += column.width
    for pair in schema.pairs:
        part = slice(start, start + pair.width)
        levels = [each.words or _ranges(pair.edges(each)) for each in (pair.first, pair.second)]
        for names, values in zip(product(*levels), pair.rows.astype(float), strict=True):
            contrasts.append(_contrast(pair.name, ", ".join(names), values, part, width))
        start += pair.width
    return [Contrast(INTERCEPT, "", intercept), *contrasts]


def _contrast(column: str, of: str, values: Array, part: slice, width: int) -> Contrast:
    """Return a contrast with these factors of a part of the inputs, and 0 of others."""
    factors = np.zeros(width)
    factors[part] = values
    return Contrast(column, of, factors)


def _of_column(column: Column, rows: Array, inputs: Array) -> Iterator[tuple[str, Array, Array]]:
    """Yield the name of each coefficient of a column, its factors and those of the column in the intercept.

    Args:
      column: of the schema.
      rows: inputs of each of its values, and last of no value if that is an input.
      inputs: public rows, shape (m, width).
    """
    if column.categories:
        for word, values in zip((*column.words, MISSING)[1:], rows[1:], strict=False):
            yield word, values - rows[0], rows[0]
    elif column.edges:
        bins = rows[: column.values]
        occurs = (inputs[None] == bins[:, None]).all(2).any(1)
        mean = bins[occurs].mean(0) if occurs.any() else np.zeros(column.width)
        names = _ranges([column.low, *column.edges, column.high])
        for name, values in zip([*names, MISSING], rows, strict=False):
            yield name, values - mean, mean
    else:
        offset, scale = column.scale
        yield "", rows[0] / scale, -offset / scale * rows[0]
        if column.missing_input:
            yield MISSING, rows[1], -offset / scale * rows[0]


def _ranges(edges: Sequence[float]) -> list[str]:
    """Return the names of bins between these edges."""
    return [f"{low:g} to {high:g}" for low, high in pairwise(edges)]


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
    unseen = is_unseen(factors, estimate.span)
    return np.where(unseen, np.nan, values), np.where(unseen, np.nan, errors)


def is_unseen(factors: Array, span: Array) -> NDArray[np.bool_]:
    """Return whether public rows, whose directions are `span`, have not the direction of factors of the inputs, shape (n,)."""
    outside = factors - factors @ span @ span.T
    return np.linalg.norm(outside, axis=1) > UNSEEN * np.linalg.norm(factors, axis=1)


def means_of(schema: Schema) -> Array:
    """Return the inputs, with their 1 last, at which each column of an additive model adds the mean of its shape, shape (d,)."""
    parts = list[Array]()
    for column in schema.inputs:
        offset, scale = column.scale
        rows = schema.rows(column).astype(float)
        if column.categories or column.edges:
            parts.append(rows[: column.values].mean(0))
        else:
            parts.append(((column.low + column.high) / 2 - offset) / scale * rows[0])
    return np.concatenate([*parts, *(np.zeros(pair.width) for pair in schema.pairs), np.ones(1)])
