"""Durations from the dates of a column: numbers since a date, or since the date of another column in the same row."""

from __future__ import annotations

import math
from datetime import datetime
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tasks.table_files import Cells
from ..tasks.table_schema import UNITS

MICROSECOND = 1e-6  # in seconds
EPOCH = datetime(1970, 1, 1)


def durations(cells: Cells) -> NDArray[np.float64]:
    """Return the time from `Column.since` to each date in its unit, shape (n,), NaN where a date is missing.

    Raises:
      Refusal: a cell is no date of the column's form.
    """
    since = cells.column.since
    assert since is not None
    seconds = _seconds(cells, since.form)
    for origin in cells.origin:
        return (seconds - _seconds(origin, since.form)) / UNITS[since.unit]
    start = (datetime.fromisoformat(since.start) - EPOCH).total_seconds()
    return (seconds - start) / UNITS[since.unit]


def _seconds(cells: Cells, form: str) -> NDArray[np.float64]:
    """Return the seconds since 1970 of dates, shape (n,), NaN for a missing one; a time zone is converted to UTC."""
    pa, pc = import_module("pyarrow"), import_module("pyarrow.compute")
    _, values = cells.trimmed()
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        instants = pc.cast(pc.cast(values, pa.timestamp("us"), safe=False), pa.int64())
        return np.array(pc.fill_null(pc.cast(instants, pa.float64(), safe=False), math.nan)) * MICROSECOND
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        cells.refuse_any(np.asarray(pc.is_valid(values)), "is no date; write it as 2020-01-31", values)
    encoded = pc.dictionary_encode(values)
    seconds = np.array([*(_second(word, form) for word in encoded.dictionary.to_pylist()), math.nan])
    index = np.asarray(pc.fill_null(encoded.indices, len(seconds) - 1), dtype=np.int64)
    example = datetime(2020, 1, 31).strftime(form or "%Y-%m-%d")
    remedy = f"is no date like {example}; correct it, or name the form of the dates by format: in the schema"
    cells.refuse_any(np.isinf(seconds)[index], remedy, values)
    return seconds[index]


def _second(word: Any, form: str) -> float:
    """Return the seconds since 1970 of a text; infinite if it is no date of the form."""
    try:
        instant = datetime.strptime(word, form) if form else datetime.fromisoformat(word)
    except (TypeError, ValueError):
        return math.inf
    return (instant.replace(tzinfo=None) - (instant.utcoffset() or EPOCH - EPOCH) - EPOCH).total_seconds()
