"""Columns that a released model computes from a client's rows: prediction, confidence, and each input's contribution.

They never leave the client; a question counts them like any column (`fedveil ask` with `model: RUN`).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load
from torch import Tensor, nn

from ..base.refusal import Refusal
from ..privacy.statistics.inquiry import ATTRIBUTION
from .arrays import holds_arrays, load_arrays
from .attribution import explained
from .batch_memory import AUTO, outputs_apart
from .columns import columns_of
from .data import Examples, data_of, padded, padded_size
from .labels import answers_of
from .protocol import Task
from .table_schema import Schema
from .tables import Tables


def read_released(model: nn.Module, file: bytes) -> None:
    """Load a released model's file into a model of the task, in place.

    Args:
      model: a model of the task.
      file: content in the safetensors format.

    Raises:
      Refusal: the file is invalid, or of a model with other arrays; nothing was loaded.
    """
    try:
        arrays = load(file)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Refusal("model", f"{len(file)} bytes", "is not the file of a model") from error
    if not holds_arrays(model, arrays):
        remedy = "is of another task, or lacks layers that stay at its clients; name a run of this task, or an own model"
        raise Refusal("model", f"{len(arrays)} arrays", remedy)
    load_arrays(model, arrays)


def columns_with(
    task: Task, client: int, model: nn.Module, attributed: bool, limit: str = AUTO
) -> dict[str, NDArray[Any]]:
    """Return a client's own columns and those of a released model; refuse rows that are not tensors.

    Args:
      task: of the client.
      client: its number.
      model: released, in evaluation mode, on the device of the task's inputs.
      attributed: whether attributions are columns; each row takes 50 passes of the model.
      limit: of the rows in memory, as of `outputs_apart`.
    """
    own, rows, schema = columns_of(task, client), _inputs(task, client), getattr(task, "schema", None)
    # Padded, so that one row cannot change the rounding of others; see `padded_size`.
    inputs = _without_failures(model, padded(rows, padded_size(len(rows))), limit)
    columns = model_columns(model, inputs, schema, limit)
    if attributed:
        columns |= _attributions(model, inputs, schema)
    unpadded = {name: values[: len(rows)] for name, values in columns.items()}
    return {**own, **unpadded}


def _without_failures(model: nn.Module, inputs: Tensor, limit: str) -> Tensor:
    """Return the inputs with zeros in rows on which the model fails; one such row would fail all others."""
    with torch.no_grad(), suppress(Exception):
        outputs_apart(model, inputs, limit)
        return inputs
    inputs = inputs.clone()
    for row in inputs.split(1):
        try:
            model_columns(model, row, None)
        except Exception:  # noqa: BLE001 (of the model's code)
            row.zero_()
    return inputs


def _inputs(task: Task, client: int) -> Tensor:
    """Return the model's inputs for the rows of `columns_of`, shape (n, ...)."""
    if isinstance(task, Tables) and task.sources:
        return task.encode(task.sources[client])  # held-out rows too, as the table's columns have them
    data = data_of(task, client)
    if not isinstance(data, Examples) or not isinstance(data.inputs, Tensor):
        raise Refusal("model", "lazy data", "supports only rows that are tensors; leave it out")
    return data.inputs


def _attributions(model: nn.Module, inputs: Tensor, schema: Schema | None) -> dict[str, NDArray[Any]]:
    """Return the size of each input's contribution to the model's prediction, by column name."""
    parts = explained(model, inputs, schema, classifies=True)
    del parts["score"], parts["at_baseline"]
    return {f"{ATTRIBUTION}{name}": np.abs(values) for name, values in parts.items()}


def model_columns(
    model: nn.Module, inputs: Tensor, schema: Schema | None, limit: str = AUTO
) -> dict[str, NDArray[Any]]:
    """Return a model's outputs for rows: `predicted` and, with two classes, `score`, the probability of the second.

    Args:
      model: in evaluation mode.
      inputs: shape (n, ...).
      schema: schema of tables, whose label names the classes; None for arrays.
      limit: of the rows in memory, as of `outputs_apart`.
    """
    with torch.no_grad():
        outputs = outputs_apart(model, inputs, limit)
    return answers_of(outputs, ()) if schema is None else schema.outcome.answers(outputs)
