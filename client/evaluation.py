"""Evaluation of a model at one client: on the records that it holds out of its training, their means or each by itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..privacy.refusal import Refusal
from ..privacy.statistics.evaluation import Evaluation, HeldOutMeans, HeldOutRows
from ..tasks.data import Data, batches_of, rows_of, run_on
from ..tasks.protocol import Task


@torch.no_grad()
def means_over(
    held: Data,
    task: Task,
    model: nn.Module,
    precision: Callable[[], AbstractContextManager[Any]],
    asked: Evaluation,
) -> HeldOutMeans:
    """Return what a model does on held-out records; it is put into evaluation mode.

    Args:
      held: at least one record, where the model is.
      task: says loss and metrics.
      model: that is evaluated.
      precision: the context in which the model runs.
      asked: names the metric.

    Raises:
      Refusal: the task has no such metric.
    """
    model.eval()
    metric = loss = 0.0
    for inputs, targets in batches_of(held):
        with precision():
            outputs = run_on(model, inputs)
        weight = len(targets) / len(held)
        metric += weight * _metric(task, outputs, targets, asked)
        loss += weight * float(task.loss(outputs, targets))
    return HeldOutMeans(metric, loss)


@torch.no_grad()
def rows_measured(
    held: Data,
    task: Task,
    model: nn.Module,
    precision: Callable[[], AbstractContextManager[Any]],
    asked: Evaluation,
) -> HeldOutRows:
    """Return what a model does on each held-out record by itself; arguments and refusals as of `means_over`.

    The model keeps examples apart, so that a record's outputs are its own; metric and loss are of that record alone.
    """
    model.eval()
    metrics: list[float] = []
    losses: list[float] = []
    for inputs, targets in batches_of(held):
        with precision():
            outputs = run_on(model, inputs)
        for row in (slice(at, at + 1) for at in range(len(targets))):
            said, truth = rows_of(outputs, row), targets[row]
            metrics.append(_metric(task, said, truth, asked))
            losses.append(float(task.loss(said, truth)))
    return HeldOutRows(np.array(metrics), np.array(losses))


def _metric(task: Task, outputs: Tensor, targets: Tensor, asked: Evaluation) -> float:
    found = task.metrics(outputs, targets)
    if asked.metric not in found:
        known = ", ".join(sorted(found)) or "none"
        raise Refusal("evaluate.metric", asked.metric, f"the task has {known}")
    return float(found[asked.metric])
