"""Order of reading: a client's data may depend neither on the clients nor on the items that were read before."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.refusal import Refusal
from .data import Examples, LazyExamples, data_of_all, leaves
from .fingerprint import content_of
from .probe import equal, quiet_generators, seed, spread
from .protocol import Task

# Readings of a batch after each of two others. Two examples that are each drawn by a coin seem by chance to depend on
# the batch before in one of 100 000 data sets.
READINGS = 5
ROUNDING = 1e-5  # largest relative difference of a number computed twice that counts as rounding


def check_reading(read: Callable[[], Any], one: Callable[[], Any], other: Callable[[], Any]) -> None:
    """Refuse data whose items depend on the items that were read before.

    A batch is read several times after each of two, and compared to the bit. Data with a random generator of their own
    differ also after the same batch, and pass.

    Args:
      read: returns a batch.
      one: reads a batch, perhaps the same.
      other: reads another one than `one`.
    """

    def examples_after(reading: Callable[[], Any]) -> list[Tensor]:
        reading()
        seed()  # so that numbers which it drew do not count
        return [tensor.clone() for tensor in leaves(read())]

    def alike(readings: Sequence[list[Tensor]]) -> bool:
        return all(equal(a, b) for later in readings for a, b in zip(readings[0], later, strict=False))

    with quiet_generators():
        examples_after(one)  # a cache that the first reading fills is no memory of examples
        readings = [examples_after(reading) for reading in (one, other) * READINGS]
    after_one, after_other = readings[::2], readings[1::2]
    if alike(after_one) and alike(after_other) and not alike(readings):
        remedy = "let the data set and its transform keep nothing of the items that they read"
        raise Refusal("data", "an example differs after another one was read", remedy)


def check_order(task: Task) -> None:
    """Refuse a task with which a client's data depend on the clients whose data were read before.

    Forked processes read all clients in one order and in the other: each begins with the present state of the task, its
    modules and their caches, and leaves that as it is. Data in memory are read whole, of others a few items.

    Args:
      task: a task of which no client has been read.
    """
    clients = range(task.num_clients)
    orders = clients, clients[::-1]
    forward, backward = (_contents(task, order) for order in orders)
    if not (changed := [client for client in clients if forward[client] != backward[client]]):
        return
    repeated = _contents(task, clients)  # data that differ in the same order too are random
    suspects = [client for client in changed if forward[client] == repeated[client]]
    # Two at most, since each takes two readings of all clients.
    for client in suspects[:: max(1, len(changed) - 1)]:
        a, b = (np.frombuffer(_contents(task, order, whole=client)[client]) for order in orders)
        rounding = ROUNDING * float(np.abs(np.nan_to_num(a)).max(initial=0)) / 100
        if a.shape != b.shape or not np.allclose(a, b, ROUNDING, rounding, equal_nan=True):
            remedy = (
                "a client's data change with the clients that were read before; compute them from its own and public "
                "data, and a generator's seed from its number"
            )
            raise Refusal("client_data", type(task).__name__, remedy)


def _contents(task: Task, order: Sequence[int], whole: int | None = None) -> dict[int, bytes]:
    """Return each client's `_content`, of client `whole` its numbers, as a forked process reads it in this order."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    if (process := os.fork()) == 0:
        with suppress(BaseException):
            torch.set_num_threads(1)  # the pool of threads is not forked
            for client in order:
                sender.send_bytes(_content(task, client, client == whole))
        os._exit(0)
    sender.close()
    try:
        with receiver:
            return {client: receiver.recv_bytes() for client in order}
    except EOFError as error:
        remedy = "the process that read all clients to compare them died, as where memory ends; make room"
        raise Refusal("client_data", type(task).__name__, remedy) from error
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _content(task: Task, client: int, whole: bool) -> bytes:
    """Return a hash of a client's data, or all their numbers; empty if they fail, or differ after the same seed."""

    def seeded_batch(data: LazyExamples) -> Examples:
        seed()
        return Examples(*data.batch(spread(len(data))))

    try:
        seed()
        data = data_of_all(task, client)
        if isinstance(data, LazyExamples):
            first, data = seeded_batch(data), seeded_batch(data)
            if content_of(first) != content_of(data):
                return b""
        if not whole:
            return str(content_of(data)).encode()
        numbers = leaves((data.inputs, data.targets))
        return b"".join(tensor.double().contiguous().numpy().tobytes() for tensor in numbers)
    except Exception:  # noqa: BLE001 (of the task's own code, which the checks of its data name)
        return b""
