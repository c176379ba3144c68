"""Step of DP-SGD on the records of all clients of a simulation, in one pass for any number of clients."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from flwr.app import RecordDict

from ...messages.wire import read_round
from ...privacy.mechanisms.private_sum import CohortSum, on_grid
from ...privacy.mechanisms.randomness import Randomness
from ...privacy.mechanisms.sum_spec import SumSpec
from ...tasks.data import Data, Union
from ...tasks.hardware import placed
from ..app import Workbench, receive_model, seed_layers
from ..private_update import compressed
from .together import draw_records, step_of


def union_of(bench: Workbench) -> Union:
    """Return the records of all clients of the bench's task."""
    parts = tuple(bench.records_of(client, bench.settings) for client in range(bench.task.num_clients))
    return Union(parts, tuple(int(n) for n in np.cumsum([0, *(len(each) for each in parts)])))


def sum_of_union(
    bench: Workbench, union: Union, content: RecordDict, clients: Sequence[int], spec: SumSpec, size: int
) -> CohortSum:
    """Return the sum of these clients' contributions, in one pass over their drawn records.

    The drawn records are those that the clients would draw one by one. The sum is rounded to the lattice once instead
    of once for each client, so the two results differ by rounding; layers with random draws, such as Dropout, use one
    generator for all clients.

    Takes the arguments of `sum_cohort`; `union` holds all clients' records.
    """
    settings = bench.settings
    assert settings.step is not None
    receive_model(bench, bench.data_of(0, settings), content)
    _, number = read_round(content)
    randomness = Randomness(settings.seed)
    seed_layers(int(randomness.stream("training", number).uint64(1)[0]), 0, union.parts[0], bench.device)
    rows = [
        union.first[client]
        + draw_records(len(union.parts[client]), settings.step, randomness.stream("batches", number, client))
        for client in clients
    ]
    examples = placed(cast(Data, union), bench.device)
    update = step_of(*bench.stepped(settings), settings, content, examples, np.concatenate(rows))
    arrays = compressed(update, content, spec)
    assert sum(value.size for value in arrays.values()) == size
    return CohortSum(on_grid(arrays, spec), len(clients))
