"""Task whose clients hold records out of training, to evaluate models on; `holdout` selects them."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..privacy.statistics.holdout import hashed, hashes_of_rows, holdout_mask
from .data import BATCH, SPLIT, Data, Examples, LazyExamples, data_of_all, leaves, only
from .fingerprint import SAMPLED, feed
from .persons import names_of
from .protocol import Task

MOST_KEPT = 10_000  # clients whose split is cached; with more it is computed again
AnyTask = TypeVar("AnyTask", bound=Task)


@dataclass(frozen=True)
class _Split:
    """Rule that splits each client's records, with the splits that this process has computed.

    Attributes:
      share, alone, group_equal_rows: rule that selects records, as in `held_back`.
      parts: by client, its training records and its held-out ones; at most MOST_KEPT clients.
    """

    share: float
    alone: bool
    group_equal_rows: bool
    parts: dict[int, tuple[Data, Data]] = field(default_factory=dict[int, tuple[Data, Data]])

    def of(self, task: Task, client: int) -> tuple[Data, Data]:
        """Return a client's training records and its held-out ones, and keep them in `parts` for later calls."""
        if client not in self.parts:
            if len(self.parts) >= MOST_KEPT:
                self.parts.clear()
            data = data_of_all(task, client)
            # The rule of earlier releases knew no persons.
            by_person = data.persons is not None and not self.group_equal_rows
            hashes = _hashes_of_persons(data, client) if by_person else _hashes_of(data)
            held_out = holdout_mask(hashes, self.share, self.alone, self.group_equal_rows or by_person)
            self.parts[client] = only(data, np.flatnonzero(~held_out)), only(data, np.flatnonzero(held_out))
        return self.parts[client]


def held_back(task: AnyTask, share: float, alone: bool = False, group_equal_rows: bool = False) -> AnyTask:
    """Return a copy of the task whose clients train without their held-out records; refuse a task that has slots.

    Args:
      task: any task; it is not changed.
      share: expected share of each client's records that is held out, in (0, 1).
      alone: whether a record, or a person with all records, is selected independently, as the record level requires.
      group_equal_rows: whether equal records are held out together and persons ignored, as in earlier releases.
    """
    split_task = copy(task)
    try:
        object.__setattr__(split_task, SPLIT, _Split(share, alone, group_equal_rows))
    except AttributeError as error:
        remedy = f"{type(task).__name__} has slots; turn evaluation off, or give it a __dict__"
        raise Refusal("evaluate.clients", type(task).__name__, remedy) from error
    return split_task


def held_back_of(task: Task, client: int) -> Data | None:
    """Return a client's held-out records; None if neither the task nor one that it wraps holds records out."""
    split: _Split | None = getattr(task, SPLIT, None)
    if split is None:
        inner: Task | None = getattr(task, "task", None)  # of a task with planted examples
        return None if inner is None else held_back_of(inner, client)
    return split.of(task, client)[1]


def _hashes_of_persons(data: Data, client: int) -> NDArray[np.uint64]:
    """Return the hash of each record's person, shape (n,)."""
    names = [each.encode() for each in names_of(data, f"client {client}")]
    return np.fromiter((hashed(lambda digest, name=name: digest.update(name)) for name in names), np.uint64)


def _hashes_of(data: Data) -> NDArray[np.uint64]:
    """Return the hash of each record's content, shape (n,); refuse records without a hash, or with a random one."""
    if isinstance(data, Examples):
        tensors = [*leaves(data.inputs), *leaves(data.targets)]
        return hashes_of_rows(each.detach().cpu().numpy() for each in tensors)
    try:
        first = list(_hashes_of_items(data, min(len(data), SAMPLED)))
        hashes = np.fromiter(_hashes_of_items(data, len(data)), np.uint64)
    except TypeError as error:
        remedy = "has no content that could select a record to hold out"
        raise Refusal("evaluate.clients", str(error), remedy) from error
    if first != hashes[: len(first)].tolist():
        remedy = "a record differs from one reading to the next; move what is random into transform"
        raise Refusal("evaluate.clients", type(data.dataset).__name__, remedy)
    return hashes


def _hashes_of_items(data: LazyExamples, count: int) -> Iterator[int]:
    """Yield the hashes of the first `count` items, before `transform`."""
    for start in range(0, count, BATCH):
        for item in data.raw_items(list(range(start, min(start + BATCH, count)))):
            yield hashed(lambda digest, item=item: feed(digest, item))
