"""Descent of a linear model by the steps of a run, as a function of the true model, with the law of what it releases.

The steps are those of DP-SGD on the records of all clients together: mean gradients, clipped by record, with noise, and
momentum at the server. Without noise they lead from the first model to a point that depends on the true model, the clip, the inputs and
the number of rounds: `released_model`. `estimate` inverts them, which removes the bias of
clipping and of training that has not converged (indirect inference: Gourieroux, Monfort and Renault 1993). Where the steps say
little, as of a rare word or of a bend of a smooth shape, a wide prior keeps the estimate finite: it is the process of Gauss
whose inputs `tasks.table_basis` gives (Rasmussen and Williams 2006). The covariance
of the estimate follows from the linearised steps. It has three parts: the noise of each round with the draw of its records,
the records themselves (a sandwich: Huber 1967), and the public rows, which stand for the distribution of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .layouts import Array, Layout, span_of
from .outcomes import Errors, Outcomes, clipped

MAX_ITERATIONS = 30
MAX_HALVINGS = 12  # of a step that leads further from the released model
TOLERANCE = 1e-4  # of a step, squared and in standard errors
SMALLEST = 1e-4  # eigenvalue of a covariance by its largest: a hundredth of a deviation is lost in the linearised steps
PRIOR = 2.5  # standard deviation of a coefficient before the run: the scale of Gelman et al. 2008, of inputs in -1 .. 1


@dataclass(frozen=True)
class Descent:
    """Descent of a run. All of it is public.

    Attributes:
      rate: learning rate.
      momentum: at the server, in [0, 1).
      rounds: number of steps.
      averaged: number of the last models whose mean is released.
      clip: largest length of a record's gradient; infinite without clipping.
      noise: standard deviation of the noise on each coordinate of a mean gradient.
      share: probability with which a record is in a step, in (0, 1].
      records: number of records.
    """

    rate: float
    momentum: float
    rounds: int
    averaged: int
    clip: float
    noise: float
    share: float
    records: float

    def weight(self, number: int) -> float:
        """Return the share of the model after round `number` in the released mean."""
        return 1 / self.averaged if number > self.rounds - self.averaged else 0.0


@dataclass(frozen=True)
class Design:
    """What is public of a run: its steps, the distribution of the inputs, and the law of the label.

    Attributes:
      steps: of the run.
      inputs: public rows with their 1 for the bias, shape (m, d).
      law: of the label.
    """

    steps: Descent
    inputs: Array
    law: Outcomes

    @cached_property
    def layout(self) -> Layout:
        """Layout of the model's parameters over the rows."""
        return self.law.layout(self.inputs)

    def errors(self, model: Array, truth: Array) -> tuple[Errors, Array, Array]:
        """Return the outcomes' errors, and clipped with their mean derivative, as `clipped` returns them."""
        layout = self.layout
        law = self.law.errors(layout.scores(model), layout.scores(truth))
        return law, *clipped(law, layout.dual(law.errors), self.steps.clip)


@dataclass(frozen=True)
class ModelEstimate:
    """Estimate of the true model, without noise and bias of the steps.

    Attributes:
      coefficients: in the shape of the model: (c, d) for c scores and d inputs, see `layouts`.
      covariance: of the flattened coefficients, shape (p, p).
      span: orthonormal directions of the inputs that public rows have, shape (d, rank).
      clipped_share: share of gradients that were clipped in the last step.
      information: share of what is known of the least known direction that is not the prior's, in [0, 1].
    """

    coefficients: Array
    covariance: Array
    span: Array
    clipped_share: float
    information: float


@dataclass(frozen=True)
class _Path:
    """Steps of a run without noise for one true model.

    Attributes:
      design: of the run.
      truth: the true model, in its shape.
    """

    design: Design
    truth: Array

    @cached_property
    def models(self) -> Array:
        """Models before and after each round, shape (rounds + 1, ...)."""
        design, truth, steps = self.design, self.truth, self.design.steps
        models, velocity = np.zeros((steps.rounds + 1, *truth.shape)), np.zeros_like(truth)
        models[0] = design.layout.start
        for number in range(steps.rounds):
            law, errors, _ = design.errors(models[number], truth)
            gradient = design.layout.gradient(np.einsum("mk,mkc->mc", law.chances, errors))
            velocity = steps.momentum * velocity + steps.rate * gradient
            models[number + 1] = models[number] - velocity
        return models

    @property
    def released(self) -> Array:
        """Model that the steps release."""
        return np.asarray(self.models[-self.design.steps.averaged :].mean(0), dtype=np.float64)

    def backwards(self) -> Iterator[_Step]:
        """Yield the steps, the last one first, with the derivative of the released model by each gradient."""
        design, steps, unit = self.design, self.design.steps, np.eye(self.truth.size)
        by_model, by_velocity = steps.weight(steps.rounds) * unit, np.zeros_like(unit)
        for number in reversed(range(steps.rounds)):
            law, errors, mean = design.errors(self.models[number], self.truth)
            by_truth = mean @ law.by_truth + np.einsum("mkc,mkb->mcb", errors, law.slopes)
            by_velocity = steps.momentum * by_velocity - by_model
            gain = steps.rate * by_velocity
            yield _Step(number + 1, law, errors, gain, design.layout.mean_outer(by_truth))
            by_model = (
                steps.weight(number) * unit + by_model + gain @ design.layout.mean_outer(mean @ law.by_score)
            )

    @cached_property
    def slope(self) -> Array:
        """Derivative of the released model by the true one, in the directions of the rows, shape (p, p)."""
        basis = self.design.layout.basis
        whole = np.sum([each.gain @ each.by_truth for each in self.backwards()], axis=0)
        return np.asarray(basis.T @ whole @ basis, dtype=np.float64)


def released_model(design: Design, truth: Array) -> Array:
    """Return the model that the steps release without noise, for a true model of its shape."""
    return _Path(design, truth).released


@dataclass(frozen=True)
class _Step:
    """One step of a path and its derivatives.

    Attributes:
      number: of the round, from 1.
      law: outcomes of the rows at the model before the step.
      errors: clipped errors, shape (m, k, c).
      gain: derivative of the released model by this step's gradient, shape (p, p).
      by_truth: derivative of the gradient by the true model, shape (p, p).
    """

    number: int
    law: Errors
    errors: Array
    gain: Array
    by_truth: Array


def estimate(design: Design, released: Array, prior: float = PRIOR) -> ModelEstimate:
    """Return the most probable true model for a released model, by steps of Gauss and Newton.

    Args:
      design: of the run.
      released: released model.
      prior: standard deviation of a coefficient before the run; infinite without a prior.

    Raises:
      ArithmeticError: the steps do not converge.
    """
    basis = design.layout.basis
    path = _Path(design, (basis @ (basis.T @ released.ravel())).reshape(released.shape))
    weight = np.asarray(np.linalg.inv(_scatter(path)[0]), dtype=np.float64)
    fit = _Fit(design, released, weight, 1 / prior**2)
    for _ in range(MAX_ITERATIONS):
        precision, change = fit.step(path)
        if change @ precision @ change < TOLERANCE:
            return _with_covariance(path, 1 / prior**2)
        path = fit.shortened(path, change)
    raise ArithmeticError(f"the steps to the true model do not converge within {MAX_ITERATIONS}")


@dataclass(frozen=True)
class _Fit:
    """Fit of a true model to a released one under a prior: a coefficient is normal about its start.

    Attributes:
      design: of the run.
      released: model of the run.
      weight: inverse covariance of the released model in the directions of the rows, shape (p, p).
      certainty: inverse variance of a coefficient before the run.
    """

    design: Design
    released: Array
    weight: Array
    certainty: float

    def step(self, path: _Path) -> tuple[Array, Array]:
        """Return the precision of the true model, shape (p, p), and the change that the linearised path asks for, (p,)."""
        weighted = path.slope.T @ self.weight
        precision = weighted @ path.slope + self.certainty * np.eye(len(weighted))
        pull = weighted @ self._missing(path) - self.certainty * self._moved(path)
        return precision, np.asarray(np.linalg.solve(precision, pull), dtype=np.float64)

    def shortened(self, path: _Path, change: Array) -> _Path:
        """Return the path of the true model after a change, halved while it leads further away."""
        distance, ahead = self._distance(path), path
        for _ in range(MAX_HALVINGS):
            ahead = _Path(
                self.design, path.truth + (self.design.layout.basis @ change).reshape(path.truth.shape)
            )
            if self._distance(ahead) <= distance:
                return ahead
            change = change / 2
        return ahead

    def _missing(self, path: _Path) -> Array:
        return np.asarray(
            self.design.layout.basis.T @ (self.released - path.released).ravel(), dtype=np.float64
        )

    def _moved(self, path: _Path) -> Array:
        return np.asarray(
            self.design.layout.basis.T @ (path.truth - self.design.layout.start).ravel(), dtype=np.float64
        )

    def _distance(self, path: _Path) -> float:
        """Return twice the negative logarithm of the posterior density, up to a constant."""
        missing, moved = self._missing(path), self._moved(path)
        return float(missing @ self.weight @ missing + self.certainty * moved @ moved)


def _scatter(path: _Path) -> tuple[Array, float]:
    """Return the covariance of the released model, in the directions of the rows, and the share of clipped gradients."""
    design, steps, inputs = path.design, path.design.steps, path.design.inputs
    size = path.truth.size
    chances = design.errors(path.truth, path.truth)[0].chances
    slope, noise, influence = np.zeros((size, size)), np.zeros((size, size)), np.zeros((*chances.shape, size))
    drawn, clipped_share = (1 - steps.share) / (steps.share * steps.records), 0.0
    for each in path.backwards():
        slope += each.gain @ each.by_truth
        blocks = np.einsum("mk,mkc,mkb->mcb", chances, each.errors, each.errors)
        round_noise = steps.noise**2 * np.eye(size) + drawn * design.layout.mean_outer(blocks)
        noise += each.gain @ round_noise @ each.gain.T
        influence += np.einsum("mkc,cmp->mkp", each.errors, design.layout.moved(each.gain), optimize=True)
        if each.number == steps.rounds:
            dual = design.layout.dual(each.law.errors)
            norms = np.sqrt(np.einsum("mkc,mkc->mk", each.law.errors, dual))
            clipped_share = float((chances * (norms > steps.clip)).sum(1).mean())
    of_rows = np.einsum("mk,mkp->mp", chances, influence)
    mean = of_rows.mean(0)
    total = np.einsum("mk,mkp,mkq->pq", chances, influence, influence, optimize=True) / len(inputs)
    public = of_rows - mean - design.law.influence(inputs) @ slope.T
    whole = noise + (total - np.outer(mean, mean)) / steps.records + public.T @ public / len(inputs) ** 2
    return _positive(design.layout.basis.T @ whole @ design.layout.basis), clipped_share


def _positive(matrix: Array) -> Array:
    """Return a covariance whose smallest eigenvalues are raised to where it can be inverted."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.maximum(values, SMALLEST * values[-1])) @ vectors.T, dtype=np.float64)


def _with_covariance(path: _Path, certainty: float) -> ModelEstimate:
    """Return the estimate at the end of the steps, with its covariance and information."""
    basis, (covariance, clipped_share) = path.design.layout.basis, _scatter(path)
    precision = path.slope.T @ np.linalg.solve(covariance, path.slope)
    inverse = np.linalg.inv(precision + certainty * np.eye(len(precision)))
    information = max(0.0, float(1 - certainty * np.linalg.eigvalsh(inverse)[-1]))
    return ModelEstimate(
        path.truth, basis @ inverse @ basis.T, span_of(path.design.inputs), clipped_share, information
    )
