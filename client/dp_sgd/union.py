"""Step of DP-SGD on the records of all clients of a simulation, in one pass however many clients there are."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from flwr.app import RecordDict

from ...privacy.mechanisms.private_sum import CohortSum, on_grid
from ...privacy.mechanisms.randomness import Randomness
from ...privacy.mechanisms.sum_spec import SumSpec
from ...strategies.wire import read_round
from ...tasks.data import Data, Union
from ...tasks.hardware import placed
from ..app import Workbench, receive_model, seed_layers
from ..private_update import compressed
from .together import drawn, step_of


def union_of(bench: Workbench) -> Union:
    """Return the records of all clients of the bench's task."""
    parts = tuple(bench.records_of(client, bench.settings) for client in range(bench.task.num_clients))
    return Union(parts, tuple(int(n) for n in np.cumsum([0, *(len(each) for each in parts)])))


def sum_of_union(
    bench: Workbench, union: Union, content: RecordDict, clients: Sequence[int], spec: SumSpec, size: int
) -> CohortSum:
    """Return the sum of what these clients add, in one pass over what they draw.

    The records drawn are those that the clients would draw one by one. The sum is on the grid once and not once for each
    client, so that the two differ by rounding; layers that draw for each example, such as Dropout, do so from one
    generator for all clients.

    Arguments as of `sum_cohort`; `union` is of all clients' records.
    """
    settings = bench.settings
    assert settings.step is not None
    receive_model(bench, bench.data_of(0, settings), content)
    _, number = read_round(content)
    randomness = Randomness(settings.seed)
    seed_layers(int(randomness.stream("training", number).uint64(1)[0]), 0, union.parts[0], bench.device)
    rows = [
        union.first[client]
        + drawn(len(union.parts[client]), settings.step, randomness.stream("batches", number, client))
        for client in clients
    ]
    near = placed(cast(Data, union), bench.device)
    update = step_of(*bench.stepped(settings), settings, content, near, np.concatenate(rows))
    sent = compressed(update, content, spec)
    assert sum(value.size for value in sent.values()) == size
    return CohortSum(on_grid(sent, spec), len(clients))
