"""Scale of the columns of data: whether they were standardised by a mean, a deviation or bounds of their own."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .data import Data, Examples, leaves

NEAR = 1e-5  # of mean 0 and deviation 1
MANY = 10  # distinct values of a column that is measured and not coded
MOST = 8  # columns whose values are counted
GRID = 255  # steps of an image's pixels, whose least is 0 and whose greatest 1 whatever the data
STANDARD, BOUNDED = "mean 0 and deviation 1", "minimum 0 and maximum 1"
SAID = (
    "have {}: if they were scaled by what was computed from these data, each record changes all others, which no epsilon "
    "counts; scale by declared bounds, or use a table with task=csv task.scaling=asked"
)


def own_scale(read: Callable[[], Iterable[Data]]) -> str:
    """Return what columns of the data have exactly, as after scaling by their own; empty if nothing.

    Args:
      read: yields the data, which count as one; called twice. Only tables in memory are looked at.
    """
    sums = [
        (len(t), t.sum(0), t.square().sum(0), t.amin(0), t.amax(0), t.frac().any(0)) for t in _tables(read)
    ]
    count = sum(each[0] for each in sums)
    if count <= MANY or len({each[1].shape for each in sums}) != 1:
        return ""
    total, squares, low, high, real = (torch.stack(each) for each in list(zip(*sums, strict=True))[1:])
    mean, measured = total.sum(0) / count, real.any(0)
    deviation = (squares.sum(0) / count - mean.square()).clamp(min=0).sqrt()
    ones = [(deviation * factor - 1).abs() < NEAR for factor in (1.0, (count / (count - 1)) ** 0.5)]
    standard = measured & (mean.abs() < NEAR) & (ones[0] | ones[1])
    bounded = (low.amin(0) == 0) & (high.amax(0) == 1)
    if standard.any() and any(len(values) > MANY for values, _ in _counted(read, standard)):
        return STANDARD
    # Declared bounds cut values off, of which several then lie on a bound, and reach it in few columns.
    whole = measured.any() and bool(bounded[measured].all())
    for values, times in _counted(read, measured) if whole else ():
        if len(values) > MANY and times[0] == times[-1] == 1 and (values * GRID).frac().abs().gt(1e-4).any():
            return BOUNDED
    return ""


def _tables(read: Callable[[], Iterable[Data]]) -> Iterable[Tensor]:
    for data in read():
        if not isinstance(data, Examples) or not len(data):
            continue
        tables = [e.double() for e in leaves(data.inputs) if e.is_floating_point() and e.dim() == 2]
        if tables:
            yield torch.cat(tables, 1)


def _counted(read: Callable[[], Iterable[Data]], columns: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return distinct values and how often each occurs, of some of these columns."""
    chosen = columns.nonzero().flatten()[:MOST]
    some = torch.cat([table[:, chosen] for table in _tables(read)])
    return [column.unique(return_counts=True) for column in some.T]
