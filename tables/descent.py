"""Descent of a linear model by the steps of a run, as a function of the true model, with the law of what it releases.

The steps are those of DP-SGD on the records of all clients together: mean gradients, clipped by record, with noise, and
momentum at the server. Without noise they lead from the first model to a point that depends on the true model, the clip, the inputs and
the number of rounds: `released_model`. `estimate` inverts them, which removes the bias of
clipping and of training that has not converged (indirect inference: Gourieroux, Monfort and Renault 1993). The covariance
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
TOLERANCE = 1e-8  # of the largest change in a step of Newton's method
ROUNDING = 1e-12


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
    """Estimate of the true model, without noise and bias.

    Attributes:
      coefficients: in the shape of the model: (c, d) for c scores and d inputs, see `layouts`.
      covariance: of the flattened coefficients, shape (p, p).
      span: orthonormal directions of the inputs that public rows have, shape (d, rank).
      clipped_share: share of gradients that were clipped in the last step.
      information: smallest derivative of the released model by the true one, over all directions.
    """

    coefficients: Array
    covariance: Array
    span: Array
    clipped_share: float
    information: float


def path(design: Design, truth: Array) -> Array:
    """Return the models before and after each round without noise, shape (rounds + 1, ...); `truth` has a model's shape."""
    steps = design.steps
    models, velocity = np.zeros((steps.rounds + 1, *truth.shape)), np.zeros_like(truth)
    models[0] = design.layout.start
    for number in range(steps.rounds):
        law, errors, _ = design.errors(models[number], truth)
        gradient = design.layout.gradient(np.einsum("mk,mkc->mc", law.chances, errors))
        velocity = steps.momentum * velocity + steps.rate * gradient
        models[number + 1] = models[number] - velocity
    return models


def released_model(design: Design, truth: Array) -> Array:
    """Return the model that the steps release without noise, for a true model of its shape."""
    return path(design, truth)[-design.steps.averaged :].mean(0)


@dataclass(frozen=True)
class _Step:
    """One step of the path and its derivatives.

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


def _backwards(design: Design, truth: Array) -> Iterator[_Step]:
    """Yield the steps of a path, the last one first, with the derivative of the released model by each gradient."""
    steps, models, unit = design.steps, path(design, truth), np.eye(truth.size)
    by_model, by_velocity = steps.weight(steps.rounds) * unit, np.zeros_like(unit)
    for number in reversed(range(steps.rounds)):
        law, errors, mean = design.errors(models[number], truth)
        by_truth = mean @ law.by_truth + np.einsum("mkc,mkb->mcb", errors, law.slopes)
        by_velocity = steps.momentum * by_velocity - by_model
        gain = steps.rate * by_velocity
        yield _Step(number + 1, law, errors, gain, design.layout.mean_outer(by_truth))
        by_model = (
            steps.weight(number) * unit + by_model + gain @ design.layout.mean_outer(mean @ law.by_score)
        )


def estimate(design: Design, released: Array) -> ModelEstimate:
    """Return the estimate of the true model whose path leads to a released model, by Newton's method.

    Args:
      design: of the run.
      released: released model.

    Raises:
      ArithmeticError: no true model leads to the released one.
    """
    basis = design.layout.basis
    truth = (basis @ (basis.T @ released.ravel())).reshape(released.shape)
    missing = basis.T @ (released - released_model(design, truth)).ravel()
    for _ in range(MAX_ITERATIONS):
        slope = sum(each.gain @ each.by_truth for each in _backwards(design, truth))
        change = (basis @ np.linalg.solve(basis.T @ slope @ basis, missing)).reshape(truth.shape)
        change, missing = _shortened(design, released, truth, change, missing)
        truth = truth + change
        if np.abs(change).max() < TOLERANCE * max(1.0, np.abs(truth).max()):
            return _with_covariance(design, truth)
    raise ArithmeticError(f"no true model leads to the released one within {MAX_ITERATIONS} steps")


def _shortened(
    design: Design, released: Array, truth: Array, change: Array, missing: Array
) -> tuple[Array, Array]:
    """Return a step of Newton's method, halved while it leads further away, and what is then missing; as of `estimate`."""
    ahead = missing
    for _ in range(MAX_HALVINGS):
        ahead = design.layout.basis.T @ (released - released_model(design, truth + change)).ravel()
        if np.linalg.norm(ahead) <= np.linalg.norm(missing) + ROUNDING:
            break
        change = change / 2
    return change, ahead


def _with_covariance(design: Design, truth: Array) -> ModelEstimate:
    """Return the estimate with the covariance of its three parts."""
    steps, inputs, size = design.steps, design.inputs, truth.size
    chances = design.errors(truth, truth)[0].chances
    slope, noise, influence = np.zeros((size, size)), np.zeros((size, size)), np.zeros((*chances.shape, size))
    drawn, clipped_share = (1 - steps.share) / (steps.share * steps.records), 0.0
    for each in _backwards(design, truth):
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
    middle = noise + (total - np.outer(mean, mean)) / steps.records + public.T @ public / len(inputs) ** 2
    inner = design.layout.basis.T @ slope @ design.layout.basis
    inverse = design.layout.basis @ np.linalg.inv(inner) @ design.layout.basis.T
    information = float(np.linalg.svd(inner, compute_uv=False)[-1])
    span = span_of(inputs)
    return ModelEstimate(truth, inverse @ middle @ inverse.T, span, clipped_share, information)
