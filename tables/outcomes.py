"""Outcomes of a table's label given a row's scores: their probabilities and the clipped gradients of the loss.

A row with inputs x has the scores theta x. The gradient of its loss is an error vector e times x, of length |e| |x|, which
DP-SGD clips. An outcome is a possible label of the row; its probability follows from the scores of the true model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    """Errors of the outcomes of m rows, for k outcomes and c scores.

    Attributes:
      chances: probability of each outcome, shape (m, k).
      slopes: derivative of the probabilities by the true scores, shape (m, k, c).
      errors: derivative of the loss by the scores, shape (m, k, c).
      by_score: derivative of the errors by the scores, the same for all outcomes, shape (m, c, c).
      by_truth: derivative of the errors by the true scores, shape (m, c, c).
    """

    chances: Array
    slopes: Array
    errors: Array
    by_score: Array
    by_truth: Array


class Outcomes(Protocol):
    """Law of a label.

    Attributes:
      scores: number of scores of a row.
    """

    @property
    def scores(self) -> int:
        """Number of scores of a row."""
        ...

    def errors(self, scores: Array, truth: Array) -> Errors:
        """Return the outcomes of rows whose scores are `scores`, and by the true model `truth`, shape (m, c) each."""
        ...

    def influence(self, inputs: Array) -> Array:
        """Return how each public row moves the model by which the law was fitted, times their number, shape (m, c d)."""
        ...


@dataclass(frozen=True)
class NumberLaw:
    """Law of a number under squared error: the true score plus the residual of a public row.

    The residuals are those of a fit by least squares to the public rows themselves, so that they are orthogonal to the inputs,
    as errors are on average. They may be skewed, and their size may depend on the inputs.

    Attributes:
      residuals: of each public row, shape (m,).
    """

    residuals: Array
    scores = 1

    def errors(self, scores: Array, truth: Array) -> Errors:
        """Return the only outcome of each row; see `Outcomes`."""
        ones = np.ones((len(scores), 1))
        errors = 2 * (scores - truth - self.residuals[:, None])
        twos = np.full((len(scores), 1, 1), 2.0)
        return Errors(ones, np.zeros((len(scores), 1, 1)), errors[:, None, :], twos, -twos)

    def influence(self, inputs: Array) -> Array:
        """Return how each public row moves the fit by least squares, times their number, shape (m, d)."""
        spread = np.linalg.pinv(inputs.T @ inputs / len(inputs), hermitian=True)
        return (inputs * self.residuals[:, None]) @ spread


def contrasts(classes: int) -> Array:
    """Return an orthonormal basis of the vectors of classes whose entries sum to 0, shape (classes, classes - 1).

    Scores of a softmax are known up to a common constant; in this basis noise of equal size stays so (Helmert).
    """
    basis = np.zeros((classes, classes - 1))
    for column in range(classes - 1):
        basis[: column + 1, column] = -1
        basis[column + 1, column] = column + 1
    return basis / np.linalg.norm(basis, axis=0)


@dataclass(frozen=True)
class ClassLaw:
    """Law of a class under cross-entropy: the softmax of the true scores, which are in the basis of `contrasts`.

    Attributes:
      classes: number of classes, at least 2.
    """

    classes: int

    @property
    def scores(self) -> int:
        """Number of contrasts."""
        return self.classes - 1

    @cached_property
    def basis(self) -> Array:
        """Basis of the scores, shape (classes, classes - 1)."""
        return contrasts(self.classes)

    def errors(self, scores: Array, truth: Array) -> Errors:
        """Return each class of each row; see `Outcomes`."""
        basis = self.basis
        now, true = softmax(scores @ basis.T), softmax(truth @ basis.T)
        slopes = true[:, :, None] * (basis[None] - (true @ basis)[:, None, :])
        errors = (now @ basis)[:, None, :] - basis[None]
        mean = now @ basis
        by_score = np.einsum("mk,kc,kb->mcb", now, basis, basis) - mean[:, :, None] * mean[:, None, :]
        return Errors(true, slopes, errors, by_score, np.zeros_like(by_score))

    def influence(self, inputs: Array) -> Array:
        """Return zeros: the law follows from the true model alone."""
        return np.zeros((len(inputs), self.scores * inputs.shape[1]))


def softmax(logits: Array) -> Array:
    """Return probabilities of classes, shape (m, k), of logits of that shape."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def clipped(errors: Array, lengths: Array, clip: float) -> tuple[Array, Array]:
    """Return errors of rows whose gradients are clipped, shape (m, k, c), and the derivative, shape (m, k, c, c).

    Args:
      errors: shape (m, k, c).
      lengths: length of each row's inputs, shape (m,).
      clip: largest length of a gradient; infinite without clipping.
    """
    norms = np.linalg.norm(errors, axis=2)
    limits = (clip / lengths)[:, None]
    is_clipped = norms > limits
    safe = np.where(is_clipped, norms, 1.0)
    factors = np.where(is_clipped, limits / safe, 1.0)
    directions = np.where(is_clipped[:, :, None], errors / safe[:, :, None], 0.0)
    unit = np.eye(errors.shape[2]) - directions[:, :, :, None] * directions[:, :, None, :]
    return factors[:, :, None] * errors, factors[:, :, None, None] * unit
