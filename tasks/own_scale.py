"""Scale of the columns of data: whether they were standardised by a mean, a deviation or bounds of their own."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .data import Data, Examples, leaves

NEAR = 1e-5  # distance from mean 0 and deviation 1 that rounding explains
MANY = 10  # distinct values of a column that is measured and not coded
MOST = 8  # columns whose distinct values are counted
GRID = 255  # steps of an image's pixels, which lie in 0 .. 1 whatever the data
STANDARD, BOUNDED = "mean 0 and deviation 1", "minimum 0 and maximum 1"
WARNING = (
    "have {}: if they were scaled by what was computed from these data, each record changes all others, which no epsilon "
    "counts; scale by declared bounds, or use a table with task=csv task.scaling=asked"
)


def own_scale(read: Callable[[], Iterable[Data]]) -> str:
    """Return which figures show that columns were scaled by their own values, STANDARD or BOUNDED, for a warning.

    Args:
      read: yields the data of clients, which are examined together; called twice. Only tables in memory are examined.

    Returns:
      An empty text if no column has either.
    """
    sums = [_sums(table) for table in _tables(read)]
    if len({each["total"].shape for each in sums}) != 1:
        return ""
    stacked = {name: torch.stack([each[name] for each in sums]) for name in sums[0]}
    count = int(stacked["rows"].sum())
    if count <= MANY:
        return ""
    measured = stacked["has_fractions"].any(0)
    mean = stacked["total"].sum(0) / count
    deviation = (stacked["squares"].sum(0) / count - mean.square()).clamp(min=0).sqrt()
    sample_deviation = deviation * (count / (count - 1)) ** 0.5
    is_one = ((deviation - 1).abs() < NEAR) | ((sample_deviation - 1).abs() < NEAR)
    standard = measured & (mean.abs() < NEAR) & is_one
    if standard.any() and any(len(values) > MANY for values, _ in _distinct_values(read, standard)):
        return STANDARD
    # Few columns that were scaled by declared bounds reach both, and if these clip, several values lie on one.
    bounded = (stacked["low"].amin(0) == 0) & (stacked["high"].amax(0) == 1)
    if not measured.any() or not bool(bounded[measured].all()):
        return ""
    for values, counts in _distinct_values(read, measured):
        is_image = not (values * GRID).frac().abs().gt(1e-4).any()
        if len(values) > MANY and counts[0] == counts[-1] == 1 and not is_image:
            return BOUNDED
    return ""


def _sums(table: Tensor) -> dict[str, Tensor]:
    """Return figures of a table's columns, shape (columns,) each, from which those of several tables follow."""
    return {
        "rows": torch.tensor(len(table)),
        "total": table.sum(0),
        "squares": table.square().sum(0),
        "low": table.amin(0),
        "high": table.amax(0),
        "has_fractions": table.frac().any(0),
    }


def _tables(read: Callable[[], Iterable[Data]]) -> Iterable[Tensor]:
    """Yield each client's inputs in float64, shape (n, columns)."""
    for data in read():
        if not isinstance(data, Examples) or not len(data):
            continue
        tables = [t.double() for t in leaves(data.inputs) if t.is_floating_point() and t.dim() == 2]
        if tables:
            yield torch.cat(tables, 1)


def _distinct_values(read: Callable[[], Iterable[Data]], mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return for the first MOST columns of a mask their distinct values, ascending, and how often each occurs."""
    columns = mask.nonzero().flatten()[:MOST]
    values = torch.cat([table[:, columns] for table in _tables(read)])
    return [column.unique(return_counts=True) for column in values.T]
