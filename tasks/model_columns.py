"""Columns of a client's rows that a released model makes of them: what it says, how sure it is, and what each input adds.

They never leave the client; a question counts them as it counts any column (`fedveil ask` with `model: RUN`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..privacy.refusal import Refusal
from ..privacy.statistics.inquiry import ATTRIBUTION
from .attribution import explained
from .columns import columns_of
from .data import Examples, data_of
from .tables import Tables

PREDICTED, SCORE = "predicted", "score"


class WithModel:
    """`ColumnTask` of another task, whose clients have the columns of a model beside their own.

    Args:
      task: whose clients are asked.
      model: released, in evaluation mode.
      attributed: whether attributions are columns; each row takes 50 passes of the model.
    """

    def __init__(self, task: Any, model: nn.Module, attributed: bool) -> None:
        self._task, self._model, self._attributed = task, model, attributed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def columns(self, client: int) -> Mapping[str, NDArray[Any]]:
        """Return a client's own columns, and those of the model.

        Args:
          client: its number.

        Raises:
          Refusal: the rows are no tensors.
        """
        own, inputs = columns_of(self._task, client), self._inputs(client)
        schema = getattr(self._task, "schema", None)
        words = schema.target.words if schema is not None and schema.target.categories else ()
        return {**own, **model_columns(self._model, inputs, words), **self._attributions(inputs)}

    def _inputs(self, client: int) -> Tensor:
        if isinstance(self._task, Tables) and self._task.paths:
            return self._task.encode(
                self._task.paths[client]
            )  # all rows of the table, as its columns have them
        data = data_of(self._task, client)
        if not isinstance(data, Examples) or not isinstance(data.inputs, Tensor):
            raise Refusal("model", "lazy data", "says something of rows that are tensors; leave it out")
        return data.inputs

    def _attributions(self, inputs: Tensor) -> dict[str, NDArray[Any]]:
        if not self._attributed:
            return {}
        schema = getattr(self._task, "schema", None)
        classifies = schema is None or bool(schema.target.categories)
        found = explained(self._model, inputs, schema, classifies)
        parts = {name: values for name, values in found.items() if name not in (SCORE, "at_baseline")}
        return {f"{ATTRIBUTION}{name}": np.abs(values) for name, values in parts.items()}


def model_columns(model: nn.Module, inputs: Tensor, words: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return what a model says of rows: `predicted`, and of two classes `score`, the probability of the second.

    Args:
      model: in evaluation mode.
      inputs: shape (n, ...).
      words: of the classes; empty where they have none, and are numbers.
    """
    with torch.no_grad():
        outputs = cast(Tensor, model(inputs))
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        return {PREDICTED: outputs.reshape(-1).double().numpy()}
    said = outputs.argmax(1).numpy()
    found: dict[str, NDArray[Any]] = {PREDICTED: np.array(words)[said] if words else said}
    if outputs.shape[1] == 2:
        found[SCORE] = outputs.softmax(1)[:, 1].double().numpy()
    return found
