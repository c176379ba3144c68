"""Own model of a device that trains a linear model in NumPy: the same steps and the same choice as with torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from ...messages.local_training import LocalTraining
from ...personal.choice import (
    EVIDENCE,
    LOCAL,
    PARTS,
    POINTS,
    SHARED,
    TEMPERATURES,
    Choice,
    FoldMeans,
    between,
    choose,
    cross_validated,
    folds_of,
)
from ...personal.steps import LOCAL_RATE, LOCAL_STEPS, RATE_SHARE, own_batches
from .linear_model import Table, gradients_of, log_softmax
from .personal_choice import PersonalChoice

Model = dict[str, NDArray[Any]]  # weight, shape (classes, d), and bias, shape (classes,)


@dataclass(frozen=True, eq=False)
class _Course:
    """Own training of one client.

    Attributes:
      shared: the released model.
      steps, learning_rate, batch_size, pull: of own training.
      names: names of the arrays that train.
      key: of the orders of batches.
    """

    shared: Model
    steps: int
    learning_rate: float
    batch_size: int
    pull: float
    names: frozenset[str]
    key: int

    def trained(self, table: Table) -> Model:
        """Return the released model after own steps on these rows."""
        return self._after(self.shared, table, self.steps, self.learning_rate, self.pull)

    def local(self, table: Table) -> Model:
        """Return a model of these rows alone."""
        zeros = {name: np.zeros_like(value) for name, value in self.shared.items()}
        whole = replace(self, names=frozenset(zeros))
        return whole._after(zeros, table, LOCAL_STEPS * self.steps, LOCAL_RATE * self.learning_rate, 0.0)

    def measured(self, training: Table, folds: Sequence[Table]) -> dict[float, FoldMeans]:
        """Return the means of the models at POINTS, by their shares, trained on these rows."""
        trained = self.trained(training)
        return {share: _measure(between(self.shared, trained, share), folds) for share in POINTS}

    def _after(self, begin: Model, table: Table, count: int, rate: float, pull: float) -> Model:
        """Return a model after so many steps of SGD, each with a proximal step to where they begin."""
        model = {name: value.copy() for name, value in begin.items()}
        length, share = np.float32(rate), np.float32(rate * pull / (1 + rate * pull))
        for batch in own_batches(len(table), self.batch_size, count, self.key):
            _, *gradients = gradients_of(model["weight"], model["bias"], table.only(batch))
            for name, gradient in zip(("weight", "bias"), gradients, strict=True):
                if name in self.names:
                    model[name] -= length * gradient
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
    rate = personal.learning_rate or RATE_SHARE * local.learning_rate
    batch_size = personal.batch_size or local.batch_size
    course = _Course(start, personal.steps, rate, batch_size, personal.pull_or_none, names, key)
    folds = [held_out.only(rows) for rows in folds_of(len(held_out))]
    counts = np.array([len(each) for each in folds], float)

    def measure(others: NDArray[np.int64], part: NDArray[np.int64]) -> list[FoldMeans]:
        """Return means on one part of models that the others train; arguments as of `choice.cross_validated`."""
        rest, fold = training.only(others), [training.only(part)]
        return [*course.measured(rest, fold).values(), _measure(course.local(rest), fold)]

    parts = cross_validated(folds_of(len(training), most=PARTS), EVIDENCE - len(held_out), measure)
    alone, trained = course.local(training), course.trained(training)
    of_local, measured = _measure(alone, folds), course.measured(training, folds)
    choice = choose(
        counts, measured, of_local, parts, lambda share: _measure(between(start, trained, share), folds)
    )
    return alone if choice.name == LOCAL else between(start, trained, choice.share), choice


def _trained_names(layers: Sequence[str]) -> frozenset[str]:
    """Return the names of the arrays that own training changes, of weight and bias."""
    names = frozenset(
        name for name in ("weight", "bias") if not layers or any(fnmatchcase(name, each) for each in layers)
    )
    if not names:
        raise Refusal("personal.layers", list(layers), "matches no parameter; the model has weight, bias")
    return names


def _measure(model: Mapping[str, Any], folds: Sequence[Table]) -> FoldMeans:
    """Return the means of loss and accuracy on each fold."""
    losses, accuracies = list[list[float]](), list[float]()
    for fold in folds:
        outputs, rows = fold.inputs @ model["weight"].T + model["bias"], np.arange(len(fold))
        tempered = [log_softmax(outputs * np.float32(each))[rows, fold.targets] for each in TEMPERATURES]
        losses.append([float(-each.mean()) for each in tempered])
        accuracies.append(float((outputs.argmax(1) == fold.targets).mean()))
    return FoldMeans(np.array(losses).T, {"accuracy": np.array(accuracies)})
