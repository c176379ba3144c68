"""Layouts of a linear model's parameters: a coefficient of each input for each score, or one score with several offsets.

A row has inputs x with their 1 last, and scores that are linear in the parameters. The gradient of its loss follows from an
error vector e, the derivative of the loss by the scores; its length is the root of the sum of e times `dual(e)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CUTOFF = 1e-6  # singular values below this share of the largest are directions that no row has


class Layout(Protocol):
    """Layout of the parameters over rows with inputs of shape (m, d), for c scores and p parameters."""

    @property
    def start(self) -> Array:
        """Parameters before the first round, in the shape of a model."""
        ...

    @property
    def basis(self) -> Array:
        """Orthonormal directions of the flattened parameters that the rows have, shape (p, rank)."""
        ...

    def scores(self, model: Array) -> Array:
        """Return the rows' scores, shape (m, c)."""
        ...

    def gradient(self, errors: Array) -> Array:
        """Return the mean gradient of rows with errors of shape (m, c), in the shape of a model."""
        ...

    def dual(self, errors: Array) -> Array:
        """Return for errors of shape (m, k, c) what their scalar products with gradients are, in the same shape."""
        ...

    def mean_outer(self, blocks: Array) -> Array:
        """Return the mean derivative of gradients whose errors have the derivatives (m, c, c) by the scores, shape (p, p)."""
        ...

    def moved(self, gain: Array) -> Array:
        """Return how a unit of each error moves what has the derivative (p, p) by the gradient, shape (c, m, p)."""
        ...


def span_of(rows: Array) -> Array:
    """Return orthonormal directions that rows have, shape (d, rank); rows have shape (m, d)."""
    _, sizes, directions = np.linalg.svd(rows, full_matrices=False)
    return directions[sizes > CUTOFF * sizes[0]].T


@dataclass(frozen=True)
class SeparateScores:
    """Layout of a model of shape (c, d), whose scores have coefficients of their own; it starts at 0.

    Attributes:
      inputs: with their 1 last, shape (m, d).
      count: number of scores.
    """

    inputs: Array
    count: int

    @property
    def start(self) -> Array:
        return np.zeros((self.count, self.inputs.shape[1]))

    @property
    def basis(self) -> Array:
        return np.asarray(np.kron(np.eye(self.count), span_of(self.inputs)), dtype=np.float64)

    @cached_property
    def squares(self) -> Array:
        """Squared length of each row, shape (m, 1, 1)."""
        return np.einsum("md,md->m", self.inputs, self.inputs)[:, None, None]

    def scores(self, model: Array) -> Array:
        return self.inputs @ model.T

    def gradient(self, errors: Array) -> Array:
        return errors.T @ self.inputs / len(self.inputs)

    def dual(self, errors: Array) -> Array:
        return self.squares * errors

    def mean_outer(self, blocks: Array) -> Array:
        (rows, scores, _), width = blocks.shape, self.inputs.shape[1]
        result = np.empty((scores, width, scores, width))
        for row in range(scores):
            for other in range(scores):
                result[row, :, other] = self.inputs.T @ (blocks[:, row, other, None] * self.inputs) / rows
        return result.reshape(scores * width, scores * width)

    def moved(self, gain: Array) -> Array:
        return self.inputs @ gain.reshape(len(gain), self.count, -1).transpose(1, 2, 0)


@dataclass(frozen=True)
class SharedScore:
    """Layout of a model of shape (d - 1 + c,): the coefficients of one score, then an offset for each of c outputs.

    Attributes:
      inputs: with their 1 last, shape (m, d).
      offsets: with which the model starts, shape (c,); its coefficients start at 0.
    """

    inputs: Array
    offsets: Array

    @cached_property
    def columns(self) -> Array:
        """The inputs without their 1, shape (m, d - 1)."""
        return np.ascontiguousarray(self.inputs[:, :-1])

    @property
    def start(self) -> Array:
        return np.concatenate([np.zeros(self.columns.shape[1]), self.offsets])

    @property
    def basis(self) -> Array:
        mean, count = self.columns.mean(0), len(self.offsets)
        around = np.hstack([self.columns - mean, np.zeros((len(self.columns), count))])
        return span_of(np.vstack([around, np.hstack([np.tile(mean, (count, 1)), np.eye(count)])]))

    @cached_property
    def squares(self) -> Array:
        """Squared length of each row without its 1, shape (m, 1, 1)."""
        return np.einsum("md,md->m", self.columns, self.columns)[:, None, None]

    def scores(self, model: Array) -> Array:
        width = self.columns.shape[1]
        return (self.columns @ model[:width])[:, None] + model[width:]

    def gradient(self, errors: Array) -> Array:
        return np.concatenate([errors.sum(1) @ self.columns / len(errors), errors.mean(0)])

    def dual(self, errors: Array) -> Array:
        return errors + self.squares * errors.sum(2, keepdims=True)

    def mean_outer(self, blocks: Array) -> Array:
        columns, rows = self.columns, len(blocks)
        both = columns.T @ (blocks.sum((1, 2))[:, None] * columns)
        right, below = columns.T @ blocks.sum(1), blocks.sum(2).T @ columns
        return np.block([[both, right], [below, blocks.sum(0)]]) / rows

    def moved(self, gain: Array) -> Array:
        width = self.columns.shape[1]
        return (self.columns @ gain[:, :width].T)[None] + gain[:, width:].T[:, None]
