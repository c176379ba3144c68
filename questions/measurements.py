"""Evaluation of a model at one client, on its held-out records: their means, or each record separately."""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..privacy.statistics.evaluation import Evaluation, HeldOutMeans, HeldOutRows
from ..tasks.batch_memory import AUTO, answers, evaluated_apart
from ..tasks.data import BATCH, Data, mean_figures, padded, rows_of, run_on
from ..tasks.protocol import Task

logger = logging.getLogger("fedveil.client")


@torch.no_grad()
def measure_means(
    data: Data,
    task: Task,
    model: nn.Module,
    precision: Callable[[], AbstractContextManager[Any]],
    evaluation: Evaluation,
    limit: str = AUTO,
) -> HeldOutMeans | None:
    """Return a model's means on held-out records; it is put into evaluation mode.

    A metric that is undefined for some batches, such as the area under a curve for records of one class, is the mean
    over the others. If it is undefined for all, the result is None, as of a client without records: a failure would
    reveal something about the records.

    Args:
      data: at least one record, on the model's device.
      task: defines loss and metrics.
      model: to evaluate.
      precision: the context in which the model runs.
      evaluation: names the metric.
      limit: of the records in memory, as of `evaluated_at_once`.
    """
    metrics: list[tuple[int, dict[str, float]]] = []
    losses: list[tuple[int, dict[str, float]]] = []
    for outputs, targets in answers(model.eval(), data, limit, precision):
        with precision():
            losses.append((len(targets), {"loss": float(task.loss(outputs, targets))}))
        figures = task.metrics(outputs, targets).items()
        metrics.append(
            (len(targets), {name: float(each) for name, each in figures if name == evaluation.metric})
        )
    means = mean_figures(metrics)
    if evaluation.metric not in means:
        return None
    return HeldOutMeans(means[evaluation.metric], mean_figures(losses)["loss"])


@torch.no_grad()
def measure_rows(
    data: Data,
    task: Task,
    model: nn.Module,
    precision: Callable[[], AbstractContextManager[Any]],
    evaluation: Evaluation,
    limit: str = AUTO,
) -> HeldOutRows:
    """Return a model's metric and loss for each held-out record alone; arguments as for `measure_means`.

    The model does not mix examples, so a record's outputs depend only on it. What is undefined for one record is NaN, and
    so is all of a record on which the task's code fails: without an answer of the client, all its records would be missing.
    """

    def measure(rows: torch.Tensor) -> list[tuple[float, float]]:
        """Return (metric, loss) of each of these records; a batch that fails is measured again record by record."""
        try:
            inputs, targets = data.batch(rows)
            with precision():
                outputs = run_on(model, padded(inputs, parts.size(len(targets))))
            records = [(rows_of(outputs, slice(at, at + 1)), targets[at : at + 1]) for at in range(len(rows))]
            metrics = [float(task.metrics(*each).get(evaluation.metric, math.nan)) for each in records]
            return list(zip(metrics, [float(task.loss(*each)) for each in records], strict=True))
        except Exception:
            if len(rows) > 1:
                return [each for row in rows.split(1) for each in measure(row)]
            logger.exception("a held-out record has no value because the task fails on it")
            return [(math.nan, math.nan)]

    parts = evaluated_apart(limit, model.eval(), data)
    values = [
        each for rows in torch.arange(len(data)).split(min(BATCH, parts.rows)) for each in measure(rows)
    ]
    return HeldOutRows(*np.array(values).reshape(-1, 2).T)
