"""Columns that a released model computes from a client's rows: prediction, confidence, and each input's contribution.

They never leave the client; a question counts them like any column (`fedveil ask` with `model: RUN`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

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
from .columns import columns_of
from .data import Examples, data_of, padded, padded_size
from .protocol import Task
from .table_schema import Schema
from .tables import Tables

PREDICTED, SCORE = "predicted", "score"


def read_released(model: nn.Module, file: bytes) -> None:
    """Load a released model's file into a model of the task, in place.

    Args:
      model: of the task.
      file: in the format safetensors.

    Raises:
      Refusal: the file is invalid, or of a model with other arrays; nothing was loaded.
    """
    try:
        arrays = load(file)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Refusal("model", f"{len(file)} bytes", "is not the file of a model") from error
    if not holds_arrays(model, arrays):
        remedy = "is of another task with other arrays; name a run of this task"
        raise Refusal("model", f"{len(arrays)} arrays", remedy)
    load_arrays(model, arrays)


def columns_with(task: Task, client: int, model: nn.Module, attributed: bool) -> dict[str, NDArray[Any]]:
    """Return a client's own columns and those of a released model, all of one length.

    Args:
      task: of the client.
      client: its number.
      model: released, in evaluation mode, on the device of the task's inputs.
      attributed: whether attributions are columns; each row takes 50 passes of the model.

    Raises:
      Refusal: the rows are not tensors.
    """
    own, rows, schema = columns_of(task, client), _inputs(task, client), getattr(task, "schema", None)
    inputs = _answered(model, padded(rows, padded_size(len(rows))))
    words = schema.target.words if schema is not None and schema.target.categories else ()
    columns = model_columns(model, inputs, words)
    columns |= _attributions(model, inputs, schema) if attributed else {}
    return {**own, **{name: values[: len(rows)] for name, values in columns.items()}}


def _answered(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the inputs with zeros in rows on which the model fails: with one of them all rows would be missing."""
    with torch.no_grad(), suppress(Exception):
        model(inputs)
        return inputs
    inputs = inputs.clone()
    for row in inputs.split(1):
        try:
            model_columns(model, row, ())
        except Exception:  # noqa: BLE001 (of the model's code)
            row.zero_()
    return inputs


def _inputs(task: Task, client: int) -> Tensor:
    if isinstance(task, Tables) and task.paths:
        return task.encode(task.paths[client])  # all rows of the table, in the order of its columns
    data = data_of(task, client)
    if not isinstance(data, Examples) or not isinstance(data.inputs, Tensor):
        raise Refusal("model", "lazy data", "supports only rows that are tensors; leave it out")
    return data.inputs


def _attributions(model: nn.Module, inputs: Tensor, schema: Schema | None) -> dict[str, NDArray[Any]]:
    explanation = explained(model, inputs, schema, schema is None or bool(schema.target.categories))
    parts = {name: values for name, values in explanation.items() if name not in (SCORE, "at_baseline")}
    return {f"{ATTRIBUTION}{name}": np.abs(values) for name, values in parts.items()}


def model_columns(model: nn.Module, inputs: Tensor, words: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return a model's outputs for rows: `predicted` and, with two classes, `score`, the probability of the second.

    Args:
      model: in evaluation mode.
      inputs: shape (n, ...).
      words: of the classes; empty if they are numbers.
    """
    with torch.no_grad():
        outputs = cast(Tensor, model(inputs))
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        return {PREDICTED: outputs.reshape(-1).double().numpy()}
    classes = outputs.argmax(1).numpy()
    columns: dict[str, NDArray[Any]] = {PREDICTED: np.array(words)[classes] if words else classes}
    if outputs.shape[1] == 2:
        columns[SCORE] = outputs.softmax(1)[:, 1].double().numpy()
    return columns
