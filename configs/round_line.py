"""Numbers in a round's line: prefixes of those that are no metric of the model as such, and its metrics."""

from collections.abc import Iterable, Mapping
from typing import Any

AUDIT = "audit/"  # what the canaries say
TRAIN = "train/"  # what the private sum says of training
AT_BOUND = "at_bound"  # names of noised figures that lay outside their range and were set to its end
AT_CLIENTS = "clients/"  # what clients measured on their own records
GROUPS = "groups/"  # of one group of people, each "attribute=word/figure"
# Prefixes of the numbers that are of the round, and none of its model.
OF_THE_ROUND = ("epsilon", "clipping_norm", "noise_multiplier", "invited", AUDIT)


def is_metric(name: str, value: object) -> bool:
    """Return whether a number of a round's line is a metric of the model on held-out data."""
    return isinstance(value, float) and not name.startswith((*OF_THE_ROUND, TRAIN, AT_CLIENTS, GROUPS))


def main_metric(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the name of the first held-out metric in rounds' lines, accuracy before others; None without any."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if is_metric(name, value))
    return "accuracy" if "accuracy" in names else next(iter(names), None)
