"""Own model of a device that trains a linear model in NumPy: the same steps and the same choice as with torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from ...client.training.batches import shuffled_batches
from ...messages.local_training import LocalTraining
from ...personal.choice import LOCAL, POINTS, SHARED, Choice, FoldMeans, choose, folds_of, shares_of
from .linear import Table, gradients_of, log_softmax
from .personal_choice import PersonalChoice

# As of `personal.training`, which needs torch; a test compares them.
LOCAL_STEPS = 5
RATE_SHARE = 1 / 4

Model = dict[str, NDArray[Any]]  # weight, shape (classes, d), and bias, shape (classes,)


@dataclass(frozen=True, eq=False)
class _Course:
    """Own training of one client.

    Attributes:
      table: rows that it trains on.
      learning_rate, batch_size: of the steps.
      key: of the orders of batches.
    """

    table: Table
    learning_rate: float
    batch_size: int
    key: int

    def steps(self, begin: Model, count: int, names: frozenset[str], pull: float) -> Model:
        """Return a model after some steps of SGD.

        Args:
          begin: the model before them.
          count: number of steps.
          names: names of the arrays that train.
          pull: weight of the pull to `begin`, by a proximal step after each step.
        """
        model = {name: value.copy() for name, value in begin.items()}
        rows, rate = len(self.table), np.float32(self.learning_rate)
        share = np.float32(self.learning_rate * pull / (1 + self.learning_rate * pull))
        epochs = -(-count // -(-rows // self.batch_size))
        batches = shuffled_batches(rows, self.batch_size, epochs, client=0, key=self.key)
        for batch in islice(batches, count):
            _, *gradients = gradients_of(model["weight"], model["bias"], self.table.only(batch))
            for name, gradient in zip(("weight", "bias"), gradients, strict=True):
                if name in names:
                    model[name] -= rate * gradient
                    model[name] += share * (begin[name] - model[name])
        return model


def own_model(
    training: Table,
    held_out: Table,
    shared: Mapping[str, NDArray[np.generic]],
    personal: PersonalChoice,
    local: LocalTraining,
    key: int,
) -> tuple[Mapping[str, NDArray[np.generic]], Choice]:
    """Return a client's own model and its choice, as `personal.own_model.own_model` does.

    Args:
      training: rows that the client trains on.
      held_out: rows that nobody trained on.
      shared: arrays of the released model, weight and bias.
      personal: the owner's choice.
      local: training of the run's rounds.
      key: of the orders of batches.

    Raises:
      Refusal: no array has a name of `personal.layers`.
    """
    names = _trained_names(personal.layers)
    if not len(training) or not len(held_out):
        return shared, Choice(SHARED, 0.0, 0, {})
    start = {name: shared[name].astype(np.float32) for name in ("weight", "bias")}
    folds = [held_out.only(rows) for rows in folds_of(len(held_out))]
    counts = np.array([len(each) for each in folds], float)

    rate = personal.learning_rate or RATE_SHARE * local.learning_rate
    course = _Course(training, rate, personal.batch_size or local.batch_size, key)
    trained = course.steps(start, personal.steps, names, personal.pull_or_none)

    def between(share: float) -> Model:
        return {name: start[name] + np.float32(share) * (trained[name] - start[name]) for name in start}

    measured = {share: _measure(between(share), folds) for share in POINTS}
    shares = shares_of([measured[share] for share in POINTS], counts)
    measured |= {share: _measure(between(share), folds) for share in (shares[0], *shares[1])}
    zeros = {name: np.zeros_like(value) for name, value in start.items()}
    alone = course.steps(zeros, LOCAL_STEPS * personal.steps, frozenset(start), 0.0)
    choice = choose(counts, shares, measured, _measure(alone, folds))
    return (alone if choice.name == LOCAL else between(choice.share)), choice


def _trained_names(layers: tuple[str, ...]) -> frozenset[str]:
    """Return the names of the arrays that own training changes, of weight and bias."""
    names = frozenset(
        name for name in ("weight", "bias") if not layers or any(fnmatchcase(name, each) for each in layers)
    )
    if not names:
        raise Refusal("personal.layers", list(layers), "matches no parameter; the model has weight, bias")
    return names


def _measure(model: Model, folds: Sequence[Table]) -> FoldMeans:
    """Return the means of loss and accuracy on each fold of the held-out rows."""
    losses, accuracies = list[float](), list[float]()
    for fold in folds:
        log_probabilities = log_softmax(fold.inputs @ model["weight"].T + model["bias"])
        losses.append(float(-log_probabilities[np.arange(len(fold)), fold.targets].mean()))
        accuracies.append(float((log_probabilities.argmax(1) == fold.targets).mean()))
    return FoldMeans(np.array(losses), {"accuracy": np.array(accuracies)})
