"""Gains of a client's own model over the shared one and over one of its rows alone, for a charged evaluation."""

import math
from collections.abc import Mapping

from ..privacy.statistics.evaluation import LOCAL_ONLY
from ..privacy.statistics.evaluation import PERSONAL as OVER_SHARED
from .choice import LOCAL, PERSONAL, SHARED

Columns = Mapping[str, Mapping[str, float]]


def gains_of(columns: Columns, metric: str) -> dict[str, float]:
    """Return the differences of a metric by the names of `evaluation.GAINS`; NaN where a model has no such figure.

    Args:
      columns: as of `choice.Choice`.
      metric: name of the metric.
    """
    values = {name: columns.get(name, {}).get(metric, math.nan) for name in (PERSONAL, SHARED, LOCAL)}
    return {
        OVER_SHARED: values[PERSONAL] - values[SHARED],
        LOCAL_ONLY: values[PERSONAL] - values[LOCAL],
    }
