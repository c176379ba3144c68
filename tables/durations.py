"""Durations from the dates of a column: numbers since a date, or since the date of another column in the same row."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import date, datetime
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..tasks.table_files import Cells

UNITS = {"hours": 3600.0, "days": 86_400.0, "years": 365.25 * 86_400}  # in seconds
ISO_DATE = re.compile(r"\d{4}-\d\d-\d\d")
MICROSECOND = 1e-6  # in seconds
EPOCH = datetime(1970, 1, 1)


@dataclass(frozen=True)
class Since:
    """Instant from which the dates of a column count, so that they become numbers.

    Attributes:
      start: a date by ISO 8601, or the name of a column of dates in the same row.
      unit: days, hours or years of 365.25 days.
      form: of the dates, as of `datetime.strptime`; empty for ISO 8601.
    """

    start: str
    unit: str = "days"
    form: str = ""

    @property
    def column(self) -> str:
        """The name of the column from whose dates this one counts; empty if it counts from one date."""
        return "" if ISO_DATE.fullmatch(self.start) else self.start

    @property
    def keys(self) -> dict[str, str]:
        """The keys by which a schema declares it."""
        form = {"format": self.form} if self.form else {}
        return {"since": self.start, "unit": self.unit, **form}


def since_of(where: str, values: dict[str, Any]) -> Since:
    """Return the instant from which a definition's dates count; refuse a definition without `since`, or with a mistake."""
    if "since" not in values:
        key = next(each for each in ("unit", "format") if each in values)
        raise Refusal(where, key, "belongs to dates; add since: a date such as 2020-01-01, or a column")
    start, unit, form = (values.get(key, "") for key in ("since", "unit", "format"))
    if not isinstance(start, str) or not start.strip() or not isinstance(form, str):
        raise Refusal(
            where, start, "since must be a date such as 2020-01-01, or the name of a column of dates"
        )
    if unit not in UNITS:
        raise Refusal(where, unit or None, f"unit must be one of {', '.join(UNITS)}")
    since = Since(start, unit, form)
    if not since.column:
        try:
            date.fromisoformat(start)
        except ValueError as error:
            raise Refusal(where, start, f"since is no date ({error})") from None
    return since


def durations(cells: Cells) -> NDArray[np.float64]:
    """Return the time from `Column.since` to each date in its unit, shape (n,), NaN where a date is missing.

    Raises:
      Refusal: a cell is no date of the column's form.
    """
    since: Since = cells.column.since
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
