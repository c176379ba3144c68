"""Columns of a client's rows, for questions: those of its task, or the targets alone, as the column `label`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..privacy.statistics.columns import LABEL
from .data import Examples, data_of
from .protocol import ColumnTask, Task


def columns_of(task: Task, client: int) -> dict[str, NDArray[Any]]:
    """Return a client's columns by name, all of one length.

    Raises:
      ValueError: the task's columns are not of one length.
    """
    if isinstance(task, ColumnTask):
        found = {name: np.asarray(values) for name, values in task.columns(client).items()}
        if len({len(each) for each in found.values()}) > 1:
            raise ValueError("the columns of a client are of different lengths")
        return found
    data = data_of(task, client)
    if not isinstance(data, Examples) or data.targets.dim() != 1:
        return {}
    return {LABEL: data.targets.cpu().numpy()}
