"""Outcomes of a table's label given a row's scores: their probabilities and the clipped gradients of the loss.

DP-SGD clips the gradient of a row's loss, which follows from the errors, the derivatives of the loss by the row's scores. An
outcome is a possible label of the row; its probability follows from the scores of the true model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from .layouts import Array, Layout, SeparateScores, SharedScore


@dataclass(frozen=True)
class Errors:
    """Errors of the outcomes of m rows, for k outcomes and c scores.

    Attributes:
      chances: probability of each outcome, shape (m, k).
      slopes: derivative of the probabilities by the true scores, shape (m, k, c).
      errors: derivative of the loss by the scores, shape (m, k, c).
      by_score: derivative of the errors by the scores, shape (m, c, c), of those that an outcome depends on.
      by_truth: derivative of the errors by the true scores, shape (m, c, c).
      depends: weight of the outcome where its error depends on a score, else 0, shape (k, c); the derivatives are over it.
    """

    chances: Array
    slopes: Array
    errors: Array
    by_score: Array
    by_truth: Array
    depends: Array


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

    def layout(self, inputs: Array) -> Layout:
        """Return the layout of the model's parameters over rows with these inputs, shape (m, d)."""
        ...

    def influence(self, inputs: Array) -> Array:
        """Return how each public row moves the model by which the law was fitted, times their number, shape (m, p)."""
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
        slopes = np.zeros((len(scores), 1, 1))
        return Errors(ones, slopes, errors[:, None, :], twos, -twos, np.ones((1, 1)))

    def layout(self, inputs: Array) -> Layout:
        """Return the layout of a model with one score."""
        return SeparateScores(inputs, 1)

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

    With weights the loss of a row is multiplied by that of its class: the steps lead to scores that are moved by the logarithms
    of the weights, and the true ones are those before.

    Attributes:
      classes: number of classes, at least 2.
      weights: of each class in the loss; empty if all are 1.
    """

    classes: int
    weights: Sequence[float] = ()

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
        weights = np.array([*self.weights] or [1.0] * self.classes)[:, None]
        errors = weights * ((now @ basis)[:, None, :] - basis[None])
        mean = now @ basis
        by_score = np.einsum("mk,kc,kb->mcb", now, basis, basis) - mean[:, :, None] * mean[:, None, :]
        return Errors(true, slopes, errors, by_score, np.zeros_like(by_score), weights * np.ones(basis.shape))

    def layout(self, inputs: Array) -> Layout:
        """Return the layout of a model with a score for each contrast."""
        return SeparateScores(inputs, self.scores)

    def influence(self, inputs: Array) -> Array:
        """Return zeros: the law follows from the true model alone."""
        return np.zeros((len(inputs), self.scores * inputs.shape[1]))


def softmax(logits: Array) -> Array:
    """Return probabilities of classes, shape (m, k), of logits of that shape."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@dataclass(frozen=True)
class HazardLaw:
    """Law of a survival time: the event in an interval, or a censoring after the row has lived through some of them.

    The outcomes are the event in each of c intervals, and then the censorings after 0 to c intervals. A row is censored as the
    public rows are, whatever its inputs.

    Attributes:
      censored: share of the rows at risk in an interval that are censored before they have lived through it, shape (c,).
      offsets: log-odds of the hazards with which the model starts, shape (c,).
    """

    censored: Array
    offsets: Array

    @property
    def scores(self) -> int:
        """Number of intervals."""
        return len(self.offsets)

    @cached_property
    def lived(self) -> Array:
        """Intervals of each outcome whose hazard it has faced, shape (2 c + 1, c), 0 or 1."""
        count = self.scores
        return np.vstack([np.tri(count), np.tri(count + 1, count, -1)])

    @cached_property
    def occurred(self) -> Array:
        """Interval of the event of each outcome, shape (2 c + 1, c), 0 or 1."""
        return np.vstack([np.eye(self.scores), np.zeros((self.scores + 1, self.scores))])

    @cached_property
    def open(self) -> Array:
        """Probability of each outcome's censoring, and of none before, shape (2 c + 1,)."""
        still = np.concatenate([[1.0], np.cumprod(1 - self.censored)])
        return np.concatenate([still[1:], still[:-1] * self.censored, still[-1:]])

    def errors(self, scores: Array, truth: Array) -> Errors:
        """Return each outcome of each row; see `Outcomes`."""
        now, true = expit(scores), expit(truth)
        chances = self.open * np.exp(truth @ self.occurred.T - np.logaddexp(0, truth) @ self.lived.T)
        slopes = chances[:, :, None] * (self.occurred - self.lived * true[:, None, :])
        by_score = (now * (1 - now))[:, :, None] * np.eye(self.scores)
        errors = self.lived * now[:, None, :] - self.occurred
        return Errors(chances, slopes, errors, by_score, np.zeros_like(by_score), self.lived)

    def layout(self, inputs: Array) -> Layout:
        """Return the layout of a model with one score and an offset for each interval."""
        return SharedScore(inputs, self.offsets)

    def influence(self, inputs: Array) -> Array:
        """Return zeros: the hazards follow from the true model alone."""
        return np.zeros((len(inputs), inputs.shape[1] - 1 + self.scores))


def expit(scores: Array) -> Array:
    """Return probabilities of log-odds."""
    return np.exp(-np.logaddexp(0, -scores))


def clipped(law: Errors, dual: Array, clip: float) -> tuple[Array, Array]:
    """Return errors of rows whose gradients are clipped, shape (m, k, c), and their mean derivative, shape (m, c, c).

    Args:
      law: of the rows' outcomes; the derivative is by errors that `by_score` and `by_truth` change.
      dual: of the errors, as `Layout.dual` returns it.
      clip: largest length of a gradient; infinite without clipping.
    """
    errors = law.errors
    squares = np.einsum("mkc,mkc->mk", errors, dual)
    is_clipped = squares > clip**2
    safe = np.where(is_clipped, squares, 1.0)
    factors = np.where(is_clipped, clip / np.sqrt(safe), 1.0)[:, :, None]
    weights = law.chances[:, :, None] * factors
    along = np.where(is_clipped, 1 / safe, 0.0)[:, :, None] * dual * law.depends
    whole = np.einsum("mkc,kc->mc", weights, law.depends)[:, :, None] * np.eye(errors.shape[2])
    return factors * errors, whole - (weights * errors).transpose(0, 2, 1) @ along
