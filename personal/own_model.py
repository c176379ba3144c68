"""Own model of a client: trained after the release, measured on the client's held-out rows, and chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..tasks.arrays import load_arrays, read_arrays
from ..tasks.batch_memory import AUTO, answers
from ..tasks.data import Data, figures_of, mean_figures, only
from ..tasks.hardware import placed
from ..tasks.persons import names_of
from ..tasks.protocol import Task
from .choice import LOCAL, LOSS, POINTS, SHARED, Choice, FoldMeans, choose, folds_of, shares_of
from .training import Arrays, OwnTraining, Precision, train_local, train_own


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
    """Return a client's own model and its choice; without training or held-out rows it is the released model.

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
    if not len(rows.training) or not len(rows.held_out):
        return shared, Choice(SHARED, 0.0, 0, {})
    device = next(model.parameters()).device
    training, folds = placed(rows.training, device), _folds(rows.held_out, device)
    counts = np.array([len(each) for each in folds], float)
    train_own(task, model, training, shared, own, key, evaluation.precision)
    trained = read_arrays(model)
    measured = dict[float, FoldMeans]()

    def measure(share: float) -> FoldMeans:
        if share not in measured:
            for name, value in trained.items():
                load_arrays(model, {name: _between(shared[name], value, share)})
            measured[share] = _measure(task, model, folds, evaluation)
        return measured[share]

    shares = shares_of([measure(share) for share in POINTS], counts)
    for share in (shares[0], *shares[1]):
        measure(share)
    for name, value in trained.items():
        trained[name] = _between(shared[name], value, shares[0])
    train_local(task, model, training, own, key, evaluation.precision)
    choice = choose(counts, shares, measured, _measure(task, model, folds, evaluation))
    return (read_arrays(model) if choice.name == LOCAL else trained), choice


def _between(shared: NDArray[Any], trained: NDArray[Any], share: float) -> NDArray[Any]:
    """Return an array at a share of the way between two models; whole numbers are those of the nearer model."""
    if share in (0.0, 1.0) or shared.dtype.kind != "f":
        return trained if share > 1 / 2 else shared
    return shared + np.asarray(share, shared.dtype) * (trained - shared)


def _folds(held_out: Data, device: torch.device) -> list[Data]:
    """Return the folds of held-out rows on a device."""
    persons = None if held_out.persons is None else names_of(held_out)
    return [placed(only(held_out, fold), device) for fold in folds_of(len(held_out), persons)]


@torch.no_grad()
def _measure(task: Task, model: nn.Module, folds: Sequence[Data], evaluation: Evaluation) -> FoldMeans:
    """Return the means of the model's loss and metrics on each fold."""
    figures: list[dict[str, float]] = []
    for fold in folds:
        batches: list[tuple[int, dict[str, float]]] = []
        for outputs, targets in answers(model.eval(), fold, evaluation.limit, evaluation.precision):
            with evaluation.precision():
                loss = float(task.loss(outputs, targets))
            batches.append((len(targets), {**figures_of(task, outputs, targets), LOSS: loss}))
        figures.append(mean_figures(batches))
    names = {name: None for each in figures for name in each}
    columns = {name: np.array([each.get(name, math.nan) for each in figures]) for name in names}
    return FoldMeans(columns.pop(LOSS), columns)
