"""Shares dealt by a partitioner of flwr-datasets."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from ..base.refusal import Refusal
from ..configs.strict import nearest
from .partition import Indices

FLWR = "flwr"  # name of this partition
ROW, LABEL, GROUP = "row", "label", "group"  # columns of the partitioner's data set


def flwr_shares(how: Mapping[str, Any], labels: Any, groups: Any = None) -> tuple[Indices, ...]:
    """Return for each client the sorted positions of its examples, as a partitioner of flwr-datasets deals them.

    The partitioner sees a data set with the columns row, label and, if known, group, but no inputs.

    Args:
      how: keys of the partition: `target`, the partitioner's class; `args`, its keyword arguments; `num_clients`, or
        None; `seed`.
      labels: of each example, shape (n,).
      groups: natural owner of each example, shape (n,); None if unknown.

    Raises:
      Refusal: a package is missing, or the partitioner rejects an argument or these data.
    """
    path, _, name = str(how["target"]).rpartition(".")
    try:
        make: Any = getattr(import_module(path), name)
        dataset: Any = import_module("datasets").Dataset
    except ModuleNotFoundError as error:
        remedy = f"{error.name} is not installed; pip install flwr-datasets"
        raise Refusal("partition.target", how["target"], remedy) from None
    columns = {ROW: np.arange(len(labels)), LABEL: labels}
    if groups is not None:
        columns[GROUP] = groups
    arguments = _arguments(make, how, has_groups=groups is not None)
    try:
        partitioner = make(**arguments)
        partitioner.dataset = dataset.from_dict(columns)
        count = int(partitioner.num_partitions)
        parts = [partitioner.load_partition(client)[ROW] for client in range(count)]
        shares = [np.sort(np.asarray(part, np.int64)) for part in parts]
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise Refusal("partition.target", how["target"], f"refuses these arguments or data: {why}") from None
    if how["num_clients"] not in (None, count):
        remedy = f"{name} deals to {count} clients; leave it null, or change partition.args"
        raise Refusal("task.num_clients", how["num_clients"], remedy)
    rows = np.concatenate(shares)
    if len(np.unique(rows)) < len(rows):
        remedy = "deals one example to several clients; choose another"
        raise Refusal("partition.target", how["target"], remedy)
    return tuple(shares)


def _arguments(make: Any, how: Mapping[str, Any], has_groups: bool) -> dict[str, Any]:
    """Return the arguments of a partitioner's class: the user's `args`, and by default those that follow from the task."""
    parameters = inspect.signature(make).parameters
    for key, value in how["args"].items():
        if key not in parameters:
            remedy = f"{make.__name__} takes no such argument; {nearest(key, parameters)}"
            raise Refusal(f"partition.args.{key}", value, remedy)
    by_group = has_groups and "NaturalId" in make.__name__
    defaults = {
        "num_partitions": how["num_clients"],
        "partition_by": GROUP if by_group else LABEL,
        "seed": how["seed"],
    }
    arguments = {key: value for key, value in defaults.items() if key in parameters} | how["args"]
    if arguments.get("num_partitions", 0) is None:
        raise Refusal("task.num_clients", None, "give the number of clients to deal the examples to")
    for key, each in parameters.items():
        if each.default is each.empty and key not in arguments:
            raise Refusal(f"partition.args.{key}", None, f"{make.__name__} needs it; give it a value")
    return arguments
