"""Metrics of a run's models on the public held-out examples of its task; private ones would need a release."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..modes.federation import Federation
from ..tasks.arrays import emptied, holding
from ..tasks.batch_memory import answers
from ..tasks.data import Examples, derived, figures_of, group_figures, held_out_of, mean_figures, rows_of
from ..tasks.hardware import device_of, gpus, placed, precision
from ..tasks.memory import give_back
from ..tasks.protocol import GroupedTask
from .callbacks import Arrays

MAX_CLASSES = 32  # of a confusion matrix


def evaluator(federation: Federation) -> Callable[[Arrays, int], dict[str, float]]:
    """Return the function that computes a model's metrics and mean loss on the held-out examples, by name.

    It takes the model's arrays by name, and the number of the round, which it ignores. It returns nothing where the
    examples are not public, or where there are none.
    """
    if not federation.held_out_public:
        return lambda arrays, number: {}
    task, limit = federation.task, federation.settings.engine.examples_at_once
    device, model = _device_and_model(federation)
    run_precision = partial(precision, device, federation.settings.engine.dtype)
    public = held_out_of(task)
    give_back()  # memory of models that were made to check the task
    examples, groups = placed(public, device), public.groups if isinstance(public, Examples) else None

    def evaluate(arrays: Arrays, number: int) -> dict[str, float]:
        if not len(examples):
            return {}
        figures: list[tuple[int, dict[str, float]]] = []
        with holding(model.eval(), arrays), torch.no_grad():
            start = 0
            for outputs, targets in answers(model, examples, limit, run_precision):
                with run_precision():
                    loss = float(task.loss(outputs, targets))
                figures.append((len(targets), {**figures_of(task, outputs, targets), "loss": loss}))
                if groups and isinstance(task, GroupedTask):
                    codes = rows_of(groups, slice(start, start := start + len(targets)))
                    figures[-1][1].update(group_figures(outputs, targets, codes, task.group_words))
        return derived(task, mean_figures(figures))

    return evaluate


def device_here(federation: Federation) -> torch.device:
    """Return the device on which this process evaluates models."""
    engine = federation.settings.engine
    # A process that has used a GPU cannot fork workers that use it, so with such workers it evaluates on the CPU.
    single = (engine.workers or gpus(engine.device)) <= 1
    return device_of(engine.device if single else "cpu")


def _device_and_model(federation: Federation) -> tuple[torch.device, torch.nn.Module]:
    """Return the device of evaluations, and the task's model on it, whose arrays are empty until `holding` fills them."""
    device = device_here(federation)
    return device, emptied(federation.task.model().to(device))


def confusion(federation: Federation, arrays: Arrays) -> list[list[int]] | None:
    """Return the confusion matrix on the public held-out examples: one row for each class, one column for each answer.

    Args:
      federation: gives the task, and the engine's device.
      arrays: of the model, by name; empty if there is none.

    Returns:
      None where the examples are not public, or the task has no 2 to `MAX_CLASSES` classes.
    """
    if not federation.held_out_public or not arrays:
        return None
    engine, (device, model) = federation.settings.engine, _device_and_model(federation)
    counts, classes = torch.zeros(0, dtype=torch.int64), 0
    with holding(model.eval(), arrays), torch.no_grad():
        examples, limit = placed(held_out_of(federation.task), device), engine.examples_at_once
        for outputs, targets in answers(model, examples, limit, partial(precision, device, engine.dtype)):
            if not isinstance(outputs, torch.Tensor) or outputs.dim() != 2 or targets.dim() != 1:
                return None
            classes = outputs.shape[1]
            if targets.is_floating_point() or not 2 <= classes <= MAX_CLASSES or (targets < 0).any():
                return None
            true = targets.long() % classes  # targets of tables may contain a group as well
            cells = true * classes + outputs.argmax(1)
            cell_counts = torch.bincount(cells, minlength=classes**2).cpu()
            counts = cell_counts + counts if len(counts) else cell_counts
    return counts.reshape(classes, classes).tolist() if len(counts) else None
