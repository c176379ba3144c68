"""Columns of a client's rows, for questions: those of its task, or only the targets as the column `label`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..privacy.statistics.columns import LABEL
from .data import Examples, data_of
from .protocol import Task


@dataclass(frozen=True)
class LazyColumns(Mapping[str, NDArray[Any]]):
    """Columns of one length, each computed on access, because a question needs few of them.

    Attributes:
      functions: by a column's name, the function that computes it.
    """

    functions: Mapping[str, Callable[[], NDArray[Any]]]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.functions[name]()

    def __contains__(self, name: object) -> bool:  # the default computes the column
        return name in self.functions

    def __iter__(self) -> Iterator[str]:
        return iter(self.functions)

    def __len__(self) -> int:
        return len(self.functions)


def columns_of(task: Task, client: int) -> Mapping[str, NDArray[Any]]:
    """Return a client's columns by name, all of one length: the task's, or else its examples' targets, or else none.

    Raises:
      ValueError: the task's columns are not of one length.
    """
    # A `ColumnTask`: checking all its members would take longer than counting a small table.
    columns: Callable[[int], Mapping[str, Any]] | None = getattr(task, "columns", None)
    if columns is not None:
        values_by_name = columns(client)
        if isinstance(values_by_name, LazyColumns):
            return values_by_name
        # Cells of a list stay objects: numpy would choose one type for all of them, which one row can change.
        arrays = {
            name: np.asarray(values, object if isinstance(values, list) else None)
            for name, values in values_by_name.items()
        }
        if len({len(each) for each in arrays.values()}) > 1:
            raise ValueError("the columns of a client are of different lengths")
        return arrays
    data = data_of(task, client)
    if not isinstance(data, Examples) or data.targets.dim() != 1:
        return {}
    return {LABEL: data.targets.cpu().numpy()}
