"""Evaluation of a model at one client: means over the records that it holds out of its training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..privacy.refusal import Refusal
from ..privacy.statistics.evaluation import Evaluation, HeldOutMeans
from ..tasks.data import Data, batches_of, run_on
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
        found, weight = task.metrics(outputs, targets), len(targets) / len(held)
        if asked.metric not in found:
            known = ", ".join(sorted(found)) or "none"
            raise Refusal("evaluate.metric", asked.metric, f"the task has {known}")
        metric += weight * float(found[asked.metric])
        loss += weight * float(task.loss(outputs, targets))
    return HeldOutMeans(metric, loss)
