"""Coverage of the intervals of models of tables over simulated federations: python -m fedveil.benchmarks.intervals 300.

A federation has new records, a new public table and new noise each time. `descended` takes the steps of a run in NumPy, which
`tests/tables/test_descent.py` compares with a run.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..privacy.budget import Adjacency, Budget, Unit
from ..privacy.plan import Plan
from ..strategies.record_plan import PoissonBatches
from ..tables.descent import Descent, Design, estimate
from ..tables.hazard_intervals import curves
from ..tables.intervals import LEVEL, law_of_number
from ..tables.layouts import Array, SharedScore
from ..tables.outcomes import ClassLaw, HazardLaw
from ..tasks.table_basis import SMOOTHING, basis

DELTA, CLIP, SHARE, ROUNDS = 1e-5, 0.5, 0.1, 100
NORMAL = 1.959963984540054
WAVE = 2.0  # angle of a smooth column's wave at the end of its range
WEAK = 1e-2  # share of the largest singular value: weaker directions of bins are not in the true model
NEW_ROWS = 50  # whose predictions are covered or not, in each federation


@dataclass(frozen=True)
class Case:
    """Federation of which many are drawn.

    Attributes:
      classes: number of classes; 0 for a number.
      records: of all clients.
      public: rows of the public table.
      columns: inputs, half of them numbers and half words of two.
      epsilon: target; infinite without noise and clipping.
      strength: factor of the true coefficients.
      shape: law of a number's errors, normal or exponential.
      weights: of the classes in the loss; empty if all are 1.
      bins: of each number of an additive model; 0 for a linear one.
    """

    classes: int
    records: int = 2000
    public: int = 300
    columns: int = 6
    epsilon: float = 3.0
    strength: float = 1.0
    shape: str = "normal"
    weights: Sequence[float] = ()
    intervals: int = 0
    bins: int = 0

    def rows(self, count: int, stream: np.random.Generator) -> Array:
        """Return rows as the model reads them, with their 1 last, shape (count, inputs)."""
        rows, numbers = rows_of(count, self.columns, stream), self.columns // 2
        if not self.bins:
            return rows
        codes = np.minimum(((rows[:, :numbers] + 1) / 2 * self.bins).astype(int), self.bins - 1)
        smooth = basis(self.bins, SMOOTHING).astype(float)[codes].reshape(count, -1)
        return np.hstack([smooth, rows[:, numbers:]])

    @property
    def first(self) -> Array:
        """Coefficients of the last class, or of a number before their scale, shape (inputs,): waves of smooth columns."""
        first = self.strength * np.append(np.linspace(-1, 1, self.columns), 0.2)
        if not self.bins:
            return first
        middles = (np.arange(self.bins) + 0.5) / self.bins * 2 - 1
        inverse = np.linalg.pinv(basis(self.bins, SMOOTHING).astype(float), rcond=WEAK)
        waves = [inverse @ np.sin(WAVE * middles + number) for number in range(self.columns // 2)]
        return np.concatenate([self.strength * np.concatenate(waves), first[self.columns // 2 :]])


def steps_of(case: Case) -> Descent:
    """Return the steps that a run of `record_distributed` takes, with the rate of `task=csv`."""
    momentum, width = max(1 - 10 / ROUNDS, 0.0), case.columns + 1
    curvature = 1.0 if case.intervals else 0.5 if case.classes else 2.0
    limit = (1 + min(momentum, 0.9)) / width
    steps = Descent(limit / curvature, min(momentum, 0.9), ROUNDS, 1, math.inf, 0.0, 1.0, case.records)
    if math.isinf(case.epsilon):
        return steps
    budget = Budget(Unit.RECORD, case.epsilon, DELTA, Adjacency.ZERO_OUT)
    sampling = PoissonBatches(SHARE, 1)
    plan = Plan(Unit.RECORD, Adjacency.ZERO_OUT, sampling, CLIP, ROUNDS).calibrate(budget)
    size = math.sqrt(width * (case.classes or 1) + max(case.intervals - 1, 0))
    spread = math.sqrt(2 * math.log(1.25 / DELTA)) / case.epsilon * CLIP
    within = case.records / (ROUNDS * spread * size)
    expected = SHARE * case.records
    averaged = max(1, round(ROUNDS * min(0.5, plan.noise_std / CLIP * size / expected / 8)))
    rate = min(limit, (1 - steps.momentum) * within) / curvature
    return replace(
        steps, rate=rate, averaged=averaged, clip=CLIP, noise=plan.noise_std / expected, share=SHARE
    )


def descended(
    steps: Descent,
    inputs: Array,
    targets: Array,
    classes: int,
    stream: np.random.Generator,
    weights: Sequence[float] = (),
) -> Array:
    """Return the model that a run's steps release, shape (outputs, d), as the run takes them.

    Args:
      steps: of the run.
      inputs: all clients' rows with their 1 last, shape (n, d).
      targets: scaled numbers or classes, shape (n,).
      classes: number of classes; 0 for a number.
      stream: of draws and noise.
      weights: of the classes in the loss; empty if all are 1.
    """
    by_class = np.array([*weights] or [1.0] * classes)
    outputs = classes or 1
    model, released = np.zeros((outputs, inputs.shape[1])), np.zeros((outputs, inputs.shape[1]))
    velocity, lengths = np.zeros_like(model), np.linalg.norm(inputs, axis=1)
    for number in range(steps.rounds):
        drawn = stream.random(len(inputs)) < steps.share
        scores = inputs[drawn] @ model.T
        if classes:
            powers = np.exp(scores - scores.max(1, keepdims=True))
            codes = targets[drawn].astype(int)
            errors = by_class[codes, None] * (powers / powers.sum(1, keepdims=True) - np.eye(classes)[codes])
        else:
            errors = 2 * (scores - targets[drawn, None])
        norms = np.linalg.norm(errors, axis=1) * lengths[drawn]
        errors = errors * np.minimum(1, steps.clip / np.maximum(norms, 1e-300))[:, None]
        gradient = errors.T @ inputs[drawn] / (steps.share * steps.records)
        velocity = steps.momentum * velocity + steps.rate * (
            gradient + steps.noise * stream.standard_normal(model.shape)
        )
        model = model - velocity
        released += steps.weight(number + 1) * model
    return released


def rows_of(count: int, columns: int, stream: np.random.Generator) -> Array:
    """Return rows of correlated numbers in -1 .. 1 and of words, with their 1 last, shape (count, columns + 1)."""
    normal = stream.standard_normal((count, columns))
    normal[:, 1] = 0.6 * normal[:, 0] + 0.8 * normal[:, 1]
    half = columns // 2
    rows = np.where(np.arange(columns) < half, np.clip(normal / 3, -1, 1), normal > 0.5)
    return np.hstack([rows, np.ones((count, 1))])


def labels_of(case: Case, truth: Array, inputs: Array, stream: np.random.Generator) -> Array:
    """Return labels of rows by the true model, shape (n,); a number has errors of standard deviation 0.2."""
    scores = inputs @ truth.T
    if case.classes:
        return (scores + stream.gumbel(size=scores.shape)).argmax(1).astype(float)
    errors = (
        stream.standard_normal(len(inputs))
        if case.shape == "normal"
        else stream.exponential(size=len(inputs)) - 1
    )
    return scores[:, 0] + 0.2 * errors


def truth_of(case: Case) -> Array:
    """Return the true model, shape (outputs, inputs); the first of several classes has scores of 0."""
    first = case.first
    if not case.classes:
        return 0.3 * first[None]
    return np.array([first * number / (case.classes - 1) for number in range(case.classes)])


@dataclass(frozen=True)
class Coverage:
    """Coverage of intervals in many federations.

    Attributes:
      coefficients, predictions: shares of the true values that their intervals contain.
      lowest: that of the coefficient with the fewest.
      failures: number of federations without intervals.
      clipped: share of gradients that were clipped.
    """

    coefficients: float
    predictions: float
    lowest: float
    failures: int
    clipped: float


def coverage(case: Case, federations: int, seed: int = 0) -> Coverage:
    """Return the coverage of intervals of level 0.95 over some federations."""
    stream, steps, truth = np.random.default_rng(seed), steps_of(case), truth_of(case)
    difference = np.eye(max(case.classes, 1))[-1:] - (np.eye(case.classes)[:1] if case.classes else 0)
    new, hits, clipped, failures = case.rows(NEW_ROWS, stream), [], [], 0
    for _ in range(federations):
        inputs, public = (case.rows(each, stream) for each in (case.records, case.public))
        labels = labels_of(case, truth, inputs, stream)
        released = descended(steps, inputs, labels, case.classes, stream, case.weights)
        try:
            if case.classes:
                law = ClassLaw(case.classes, case.weights)
                fit = estimate(Design(steps, public, law), law.basis.T @ released)
                to_score = difference @ law.basis
            else:
                law = law_of_number(public, labels_of(case, truth, public, stream))
                fit = estimate(Design(steps, public, law), released)
                to_score = difference
        except (ArithmeticError, np.linalg.LinAlgError):
            failures += 1
            continue
        wanted = np.vstack([np.eye(truth.shape[1]), new])
        errors = wanted @ (to_score @ fit.coefficients - difference @ truth)[0]
        whole = np.kron(to_score, wanted)
        sizes = np.sqrt(np.einsum("np,pq,nq->n", whole, fit.covariance, whole, optimize=True))
        hits.append(np.abs(errors) < NORMAL * sizes)
        clipped.append(fit.clipped_share)
    shares = np.mean(hits, axis=0)
    parts = shares[:-NEW_ROWS], shares[-NEW_ROWS:]
    return Coverage(
        coefficients=float(parts[0].mean()),
        predictions=float(parts[1].mean()),
        lowest=float(parts[0].min()),
        failures=failures,
        clipped=float(np.mean(clipped)),
    )


def hazards_of(case: Case) -> tuple[HazardLaw, Array]:
    """Return the law of a case of times with some censoring in each interval, and its true model."""
    offsets = np.linspace(-2.0, -1.0, case.intervals)
    law = HazardLaw(np.full(case.intervals, 0.05), np.full(case.intervals, -2.0))
    return law, np.concatenate([case.strength * np.linspace(-1, 1, case.columns), offsets])


def descended_hazards(
    steps: Descent,
    layout: SharedScore,
    outcomes: NDArray[np.int64],
    law: HazardLaw,
    stream: np.random.Generator,
) -> Array:
    """Return the model of hazards that a run's steps release, as the run takes them.

    Args:
      steps: of the run.
      layout: over all clients' rows.
      outcomes: number of each row's outcome in the law, shape (n,).
      law: of the outcomes.
      stream: of draws and noise.
    """
    model, released = layout.start, np.zeros(len(layout.start))
    velocity, rows = np.zeros_like(model), len(layout.inputs)
    for number in range(steps.rounds):
        errors = law.lived[outcomes] / (1 + np.exp(-layout.scores(model))) - law.occurred[outcomes]
        norms = np.sqrt((errors * layout.dual(errors[:, None])[:, 0]).sum(1))
        shares = np.minimum(1, steps.clip / np.maximum(norms, 1e-300)) * (stream.random(rows) < steps.share)
        gradient = layout.gradient(errors * shares[:, None]) * rows / (steps.share * steps.records)
        velocity = steps.momentum * velocity + steps.rate * (
            gradient + steps.noise * stream.standard_normal(model.shape)
        )
        model = model - velocity
        released += steps.weight(number + 1) * model
    return released


def coverage_of_times(case: Case, federations: int, seed: int = 0) -> Coverage:
    """Return the coverage of coefficients, and of survival at the ends of the intervals, over some federations."""
    stream, steps, (law, truth) = np.random.default_rng(seed), steps_of(case), hazards_of(case)
    new, hits, clipped, failures = rows_of(NEW_ROWS, case.columns, stream), [], [], 0
    scores = SharedScore(new, law.offsets).scores(truth)
    survival = np.exp(-np.cumsum(np.logaddexp(0, scores), 1))
    for _ in range(federations):
        layout = SharedScore(rows_of(case.records, case.columns, stream), law.offsets)
        scores = layout.scores(truth)
        chances = law.errors(scores, scores).chances.cumsum(1)
        outcomes = (stream.random((len(chances), 1)) > chances).sum(1)
        released = descended_hazards(steps, layout, outcomes, law, stream)
        try:
            fit = estimate(Design(steps, rows_of(case.public, case.columns, stream), law), released)
        except (ArithmeticError, np.linalg.LinAlgError):
            failures += 1
            continue
        errors = np.sqrt(np.diag(fit.covariance))
        _, low, high = curves(fit, new, case.intervals, NORMAL)
        inside = np.abs(fit.coefficients - truth) < NORMAL * errors
        hits.append(np.concatenate([inside, ((low < survival) & (survival < high)).ravel()]))
        clipped.append(fit.clipped_share)
    shares = np.mean(hits, axis=0)
    parts = shares[: len(truth)], shares[len(truth) :]
    return Coverage(
        float(parts[0].mean()),
        float(parts[1].mean()),
        float(parts[0].min()),
        failures,
        float(np.mean(clipped)),
    )


CASES = {
    "times": Case(0, intervals=6),
    "number": Case(0),
    "number, 736 records": Case(0, 736, 184, 8),
    "number, skewed errors": Case(0, shape="exponential"),
    "two classes": Case(2),
    "two classes, 736 records": Case(2, 736, 184, 8),
    "two classes, strong": Case(2, strength=2.0),
    "two classes, weights 1 and 4": Case(2, weights=(0.25, 1.0)),
    "three classes": Case(3),
    "additive, number": Case(0, public=1000, bins=16),
    "additive, two classes": Case(2, public=1000, bins=16),
}


def main(federations: int, *words: str) -> None:
    """Print a line for each case of these names, or of all, and each epsilon."""
    logging.disable(logging.WARNING)
    print(f"level {LEVEL}, {federations} federations each", flush=True)
    for name, case in CASES.items():
        if words and name not in words:
            continue
        for epsilon in (1.0, 3.0, 8.0, math.inf):
            measure = coverage_of_times if case.intervals else coverage
            shares = measure(replace(case, epsilon=epsilon), federations)
            print(
                f"{name:28} epsilon {epsilon:3g}  coefficients {shares.coefficients:.3f} (lowest {shares.lowest:.3f})  "
                f"predictions {shares.predictions:.3f}  without {shares.failures}  clipped {shares.clipped:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
