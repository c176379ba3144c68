"""A canary client: in place of training it answers with a random direction or, by its coin, with nothing.

What it returns looks like trained arrays, and takes the way of everybody's: difference, clip, lattice, mask. It is
longer than the norm, so that the clip is tried, and claims more examples than others have, so that a sum which weighs
by them shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..privacy.audit.canary_clients import Canaries, canaries_of
from ..privacy.mechanisms.private_sum import CohortSum, add_update
from ..privacy.mechanisms.sum_spec import SumSpec
from .client_settings import CanaryClients
from .wire import layout_of, memory_arrays, only_arrays, view


def canaries_for(settings: CanaryClients, dimension: int) -> Canaries:
    """Return the canaries of a model with so many parameters."""
    return canaries_of(bytes.fromhex(settings.seed), settings.count, dimension, settings.support)


def canary_updates(settings: CanaryClients, clients: Sequence[int], dimension: int) -> NDArray[np.float32]:
    """Return what these clients, all of them canaries, add to the model, shape (clients, dimension)."""
    which = [client - settings.first for client in clients]
    return canaries_for(settings, dimension).updates(which, settings.norm, settings.replaced)


def add_canary(
    cohort_sum: CohortSum, received: NDArray[np.floating], spec: SumSpec, settings: CanaryClients, client: int
) -> None:
    """Add what one canary sends, all of it within its window, to the sum of its cohort.

    Args:
      cohort_sum: of the clients before it.
      received: the instruction's arrays that are averaged, flat, in the layout's order, shape (dimension,).
      spec: the sum's public parameters.
      settings: of the canaries.
      client: which of them, by its number as a client.
    """
    canaries = canaries_for(settings, received.size)
    start, moved = canaries.window(client - settings.first, settings.norm, settings.replaced)
    before = received[start : start + moved.size]
    add_update(cohort_sum, before + moved - before, settings.metrics, spec, start)


def add_canaries(
    settings: CanaryClients, content: RecordDict, numbers: Sequence[int], spec: SumSpec, cohort_sum: CohortSum
) -> None:
    """Add what these canaries, by their numbers from 0, answer to an instruction where no client's machine runs them."""
    arrays = only_arrays(content)
    received: NDArray[Any] = np.concatenate([np.ravel(view(arrays[name])) for name in layout_of(arrays)])
    for number in numbers:
        add_canary(cohort_sum, received, spec, settings, settings.first + number)


def canary_answer(message: Message, settings: CanaryClients, client: int) -> Message:
    """Return the reply of a canary as a client's app gives it: arrays and metrics."""
    received = only_arrays(message.content)
    layout = layout_of(received)
    sizes = [int(np.prod(shape)) for shape in layout.values()]
    (update,) = canary_updates(settings, [client], sum(sizes))
    arrays = {name: view(array) for name, array in received.items()}
    for (name, shape), part in zip(layout.items(), np.split(update, np.cumsum(sizes)[:-1]), strict=True):
        value = arrays[name]
        arrays[name] = (value + part.reshape(shape)).astype(value.dtype)
    metrics = MetricRecord(dict(settings.metrics))
    return Message(RecordDict({"arrays": memory_arrays(arrays), "metrics": metrics}), reply_to=message)
