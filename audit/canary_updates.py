"""Canary clients of an audit: instead of training, each answers with a random direction or, by its coin, with zero.

The answer has the form of trained arrays and is processed like any other: difference, clip, lattice, mask. It is longer
than the clipping norm, which tests the clip, and it claims more examples than other clients have, which reveals a sum
that is weighted by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..messages.client_settings import CanaryClients
from ..messages.wire import layout_of, memory_arrays, only_arrays, sketch_for, view, views
from ..privacy.audit.canary_clients import Canaries, canaries_of
from ..privacy.mechanisms.compression import Sketch
from ..privacy.mechanisms.private_sum import CohortSum, add_update
from ..privacy.mechanisms.sum_spec import SumSpec


def canaries_for(settings: CanaryClients, dimension: int) -> Canaries:
    """Return the canaries of a model of `dimension` coordinates, as their secret seed determines them."""
    return canaries_of(bytes.fromhex(settings.seed), settings.count, dimension, settings.support)


def canary_updates(settings: CanaryClients, clients: Sequence[int], dimension: int) -> NDArray[np.float32]:
    """Return the updates of canaries, named by client numbers from `settings.first` on, (clients, dimension)."""
    numbers = [client - settings.first for client in clients]
    return canaries_for(settings, dimension).updates(numbers, settings.norm, settings.replaced)


def add_canary(
    cohort_sum: CohortSum,
    received: NDArray[np.floating],
    spec: SumSpec,
    settings: CanaryClients,
    client: int,
    sketch: Sketch | None = None,
) -> None:
    """Add one canary's update to the sum of its cohort: only a window of it, outside of which it is 0.

    Args:
      cohort_sum: changed in place.
      received: the instruction's averaged arrays, flat, in the layout's order, shape (dimension,).
      spec: public parameters of the sum.
      settings: of the canaries.
      client: the canary's number as a client.
      sketch: compression of all updates, including canaries'; None leaves them whole.
    """
    canaries = canaries_for(settings, received.size)
    start, moved = canaries.window(client - settings.first, settings.norm, settings.replaced)
    before = received[start : start + moved.size]
    update = before + moved - before  # rounded as the difference of a trained array and the received one
    if sketch is None:
        return add_update(cohort_sum, update, settings.metrics, spec, start)
    whole = np.zeros(received.size, update.dtype)
    whole[start : start + update.size] = update
    add_update(cohort_sum, sketch.of(whole), settings.metrics, spec)


def add_canaries(
    settings: CanaryClients, content: RecordDict, numbers: Sequence[int], spec: SumSpec, cohort_sum: CohortSum
) -> None:
    """Add the canaries' answers to a cohort's sum on the server, where no client's machine runs them.

    Args:
      settings: of the canaries.
      content: the instruction that the cohort got.
      numbers: of the canaries in the cohort, from 0.
      spec: public parameters of the sum.
      cohort_sum: changed in place.
    """
    arrays = only_arrays(content)
    received: NDArray[Any] = np.concatenate([np.ravel(view(arrays[name])) for name in layout_of(arrays)])
    sketch = sketch_for(content, spec)
    for number in numbers:
        add_canary(cohort_sum, received, spec, settings, settings.first + number, sketch)


def canary_answer(message: Message, settings: CanaryClients, client: int) -> Message:
    """Return a canary's reply as of a client that trained: the received arrays moved by its update, and metrics."""
    received = only_arrays(message.content)
    layout = layout_of(received)
    sizes = [int(np.prod(shape)) for shape in layout.values()]
    (update,) = canary_updates(settings, [client], sum(sizes))
    arrays = views(received)
    for (name, shape), part in zip(layout.items(), np.split(update, np.cumsum(sizes)[:-1]), strict=True):
        value = arrays[name]
        arrays[name] = (value + part.reshape(shape)).astype(value.dtype)
    metrics = MetricRecord(dict(settings.metrics))
    return Message(RecordDict({"arrays": memory_arrays(arrays), "metrics": metrics}), reply_to=message)
