"""Names of the numbers in a round's line of metrics.jsonl, and which of them are metrics of the model."""

from collections.abc import Iterable, Mapping
from typing import Any

AUDIT = "audit/"  # prefix: measurements of the audit
TRAIN = "train/"  # prefix: figures of the training, from the private sum
AT_BOUND = "at_bound"  # list of the noised figures that lay outside their range and were set to its end
AT_CLIENTS = "clients/"  # prefix: metrics that clients measured on their own records
GROUPS = "groups/"  # prefix: metrics of a group of people, as "attribute=word/figure"
# Prefixes, of a result: means over the clients' own held-out rows, of the released model and of personal ones.
OF_CLIENTS = ("shared/", "personal/", "local_only/")
# Prefixes of the numbers that describe the round, and not its model.
OF_THE_ROUND = ("epsilon", "clipping_norm", "noise_multiplier", "invited", "virtual_time", AUDIT)


def is_metric(name: str, value: object) -> bool:
    """Return whether a number of a round's line is a metric of the model on held-out data."""
    return isinstance(value, float) and not name.startswith(
        (*OF_THE_ROUND, *OF_CLIENTS, TRAIN, AT_CLIENTS, GROUPS)
    )


def main_metric(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the name of the first held-out metric in rounds' lines, accuracy before others; None if there is none."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if is_metric(name, value))
    return "accuracy" if "accuracy" in names else next(iter(names), None)
