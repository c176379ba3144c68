"""Own model of a client: trained after the release, measured on the client's held-out rows, and chosen."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..base.refusal import Refusal
from ..tasks.arrays import final_arrays, load_arrays, read_arrays
from ..tasks.batch_memory import AUTO, answers
from ..tasks.data import Data, figures_of, mean_figures, only
from ..tasks.hardware import placed
from ..tasks.persons import names_of
from ..tasks.probe import is_large
from ..tasks.protocol import Task
from .choice import (
    EVIDENCE,
    LOCAL,
    LOSS,
    OWN,
    PARTS,
    PERSONAL,
    POINTS,
    SHARED,
    TEMPERATURES,
    Choice,
    FoldMeans,
    TrainingFolds,
    between,
    choose,
    cross_validated,
    folds_of,
    means_of,
)
from .training import Arrays, OwnTraining, Precision, check_own, train_local, train_own

logger = logging.getLogger("fedveil.client")


@dataclass(frozen=True)
class Rows:
    """Rows of one client, on the CPU.

    Attributes:
      training: rows that the client trains on.
      held_out: rows that nobody trained on.
    """

    training: Data
    held_out: Data


@dataclass(frozen=True)
class Evaluation:
    """Arithmetic of a model's evaluation.

    Attributes:
      precision: returns the context in which the model and its loss run.
      limit: number of rows that the model gets at a time, as of `evaluated_at_once`.
    """

    precision: Precision = nullcontext
    limit: str = AUTO


PLAIN = Evaluation()


def own_model(
    task: Task,
    model: nn.Module,
    rows: Rows,
    shared: Arrays,
    own: OwnTraining,
    key: int,
    evaluation: Evaluation = PLAIN,
) -> tuple[Arrays, Choice]:
    """Return a client's own model and its choice.

    Without training or held-out rows, and where the task's code fails on them, it is the released model, without figures.
    In memory are the released model, `model`, and the arrays of one more.

    Args:
      task: gives the loss, the metrics and the initial model.
      model: a model of the task, trained in place.
      rows: of the client.
      shared: arrays of the released model, by name.
      own: parameters of the training.
      key: of the training's draws; the same key gives the same bits.
      evaluation: how models are evaluated.

    Raises:
      Refusal: as of `check_own`.
    """
    check_own(task, model, own)
    if len(rows.training) and len(rows.held_out):
        try:
            return _Bench(task, model, shared, own, key, evaluation).chosen(rows)
        except Refusal:
            raise
        except Exception:  # of the task's own code, as in a round
            logger.exception("the client's own model failed")
    return shared, Choice(SHARED, 0.0, 0, {})


def whole_model_figures(
    task: Task,
    model: nn.Module,
    rows: Rows,
    whole: Arrays,
    own: OwnTraining,
    key: int,
    evaluation: Evaluation = PLAIN,
) -> Choice:
    """Return the figures of a model of which some layers stayed at the client, and of one of its own rows alone.

    The client has nothing to choose: the released part has no figures without these layers.

    Args:
      task: all of whose layers travel; gives the loss, the metrics and the initial model.
      model: a model of the task, trained in place.
      rows: of the client.
      whole: arrays of the client's whole model, by name.
      own: parameters of the training of a model of these rows alone.
      key: of the training's draws.
      evaluation: how models are evaluated.
    """
    if len(rows.training) and len(rows.held_out):
        try:
            return _Bench(task, model, whole, own, key, evaluation).figures(rows)
        except Exception:  # of the task's own code, as in a round
            logger.exception("the client's own model failed")
    return Choice(OWN, 1.0, 0, {})


@dataclass(frozen=True, eq=False)
class _Bench:
    """What training and measuring a client's models have in common; attributes as of `own_model`."""

    task: Task
    model: nn.Module
    shared: Arrays
    own: OwnTraining
    key: int
    evaluation: Evaluation

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def chosen(self, rows: Rows) -> tuple[Arrays, Choice]:
        """Return the client's own model and its choice, for at least one training row and one held-out row."""
        folds = self.placed(rows.held_out, folds_of(len(rows.held_out), _persons(rows.held_out)))
        counts = np.array([len(each) for each in folds], float)
        parts = self.cross_validated(rows)
        training = placed(rows.training, self.device)
        local = self.local(training, folds)
        trained = self.trained(training)
        measured = {share: self.measured(trained, share, folds) for share in POINTS}
        choice = choose(counts, measured, local, parts, lambda share: self.measured(trained, share, folds))
        if choice.name == LOCAL:
            trained.clear()  # frees the memory of one model
            self.train_local(training)
            return final_arrays(self.task, read_arrays(self.model)), choice
        for (
            name,
            value,
        ) in trained.items():  # one array after the other, so that no further model is in memory
            trained[name] = between(self.shared, {name: value}, choice.share)[name]
        if choice.share:  # the shared model has its form already
            trained = final_arrays(self.task, trained)
        return trained, choice

    def figures(self, rows: Rows) -> Choice:
        """Return the figures of `shared` as the client's own model, without a choice; arguments as of `chosen`."""
        folds = self.placed(rows.held_out, folds_of(len(rows.held_out), _persons(rows.held_out)))
        counts, personal = (
            np.array([len(each) for each in folds], float),
            self.measured(self.shared, 1, folds),
        )
        local = self.local(placed(rows.training, self.device), folds)
        means = {PERSONAL: personal, LOCAL: local}
        columns = {name: means_of(counts, [each] * len(folds)) for name, each in means.items()}
        return Choice(OWN, 1.0, len(rows.held_out), {SHARED: {}, **columns})

    def placed(self, data: Data, folds: Sequence[NDArray[np.int64]]) -> list[Data]:
        """Return the folds of some rows on the device."""
        return [placed(only(data, fold), self.device) for fold in folds]

    def trained(self, training: Data) -> dict[str, NDArray[np.generic]]:
        """Return the arrays of the released model after own steps on these rows."""
        train_own(self.task, self.model, training, self.shared, self.own, self.key, self.evaluation.precision)
        return read_arrays(self.model)

    def train_local(self, training: Data) -> None:
        """Train a model of these rows alone."""
        train_local(self.task, self.model, training, self.own, self.key, self.evaluation.precision)

    def local(self, training: Data, folds: Sequence[Data]) -> FoldMeans:
        """Return the means of a model of these rows alone."""
        self.train_local(training)
        return _measure(self.task, self.model, folds, self.evaluation)

    def measured(self, trained: Arrays, share: float, folds: Sequence[Data]) -> FoldMeans:
        """Return the means of the model at a share of the way to the trained one."""
        for name, value in trained.items():
            load_arrays(self.model, between(self.shared, {name: value}, share))
        return _measure(self.task, self.model, folds, self.evaluation)

    def cross_validated(self, rows: Rows) -> TrainingFolds:
        """Return what the training rows say; nothing of a large model, whose training would take too long."""
        training, parts = rows.training, list[NDArray[np.int64]]()
        if not is_large(self.model):
            parts = folds_of(len(training), _persons(training), PARTS)

        def measure(others: NDArray[np.int64], part: NDArray[np.int64]) -> list[FoldMeans]:
            """Return means on one part of models that the others train; arguments as of `choice.cross_validated`."""
            rest, fold = placed(only(training, others), self.device), self.placed(training, [part])
            local, trained = self.local(rest, fold), self.trained(rest)
            return [*(self.measured(trained, share, fold) for share in POINTS), local]

        return cross_validated(parts, EVIDENCE - len(rows.held_out), measure)


def _persons(data: Data) -> list[str] | None:
    """Return the name of each row's person; None if rows are independent."""
    return None if data.persons is None else names_of(data)


@torch.no_grad()
def _measure(task: Task, model: nn.Module, folds: Sequence[Data], evaluation: Evaluation) -> FoldMeans:
    """Return the means of the loss and metrics on each fold, of the model in the form in which it will be used."""
    if getattr(task, "final_model", None):  # without, no copy of the arrays is needed
        load_arrays(model, final_arrays(task, read_arrays(model)))
    losses: list[list[float]] = []
    figures: list[dict[str, float]] = []
    for fold in folds:
        batches: list[tuple[int, dict[str, float]]] = []
        for outputs, targets in answers(model.eval(), fold, evaluation.limit, evaluation.precision):
            factors = [each for each in TEMPERATURES[1:] if _are_logits(outputs, targets)]
            with evaluation.precision():
                scaled = [outputs, *(outputs * each for each in factors)]
                tempered = [float(task.loss(each, targets)) for each in scaled]
            metrics = figures_of(task, outputs, targets)
            batches.append(
                (len(targets), metrics | {f"{LOSS} {n}": value for n, value in enumerate(tempered)})
            )
        means = mean_figures(batches)
        losses.append([means.pop(name) for name in [*means] if name.startswith(f"{LOSS} ")])
        figures.append(means)
    names = {name: None for each in figures for name in each}
    columns = {name: np.array([each.get(name, math.nan) for each in figures]) for name in names}
    return FoldMeans(np.array(losses).T, columns)


def _are_logits(outputs: Any, targets: torch.Tensor) -> bool:
    """Return whether outputs are logits of classes, shape (n, classes), and targets the classes, shape (n,)."""
    are_classes = not targets.is_floating_point() and targets.dim() == 1
    return are_classes and isinstance(outputs, torch.Tensor) and outputs.dim() == 2
