"""Training of many clients of an encrypted sum at once, before each of them masks its own vector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from ..client.training.cohort_training import MAX_STACK, can_vectorise, is_small, train_ahead
from ..client.workbench import Workbench
from ..messages.flower_adapter import records_of
from ..messages.grids import PassingGrid
from ..messages.wire import SummingGrid, is_query
from ..privacy.mechanisms.private_sum import CohortSum
from ..privacy.mechanisms.sum_spec import SumSpec
from ..tasks.protocol import Task
from .clients import Clients
from .in_process import FIRST_NODE


class EncryptedStacks(PassingGrid):
    """Grid to simulated clients that trains stacks of them, and sends each the app's reply with its instruction.

    A cohort's stacks follow from its messages: they are the same on any engine, with any number of workers. The engine
    takes the reply out of the instruction, so that the app, which is that of a real device, never reads one.

    Args:
      grid: to an engine, which adds replies itself.
      bench: on which `train_ahead` trains.
    """

    def __init__(self, grid: SummingGrid, bench: Workbench) -> None:
        assert isinstance(grid, Grid)
        super().__init__(grid)
        self._adds, self._bench = grid, bench

    def sum_replies(self, order: Message, nodes: Sequence[int], spec: SumSpec, size: int) -> CohortSum:
        """Let the grid sum the nodes' replies to an order."""
        return self._adds.sum_replies(order, nodes, spec, size)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages and yield the replies, as the grid does."""
        yield from self._grid.send_and_receive(self._with_replies(messages), timeout=timeout)

    def _with_replies(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield the messages, those to train with the replies of clients that can be stacked."""
        waiting = iter(messages)
        while part := list(islice(waiting, MAX_STACK)):  # so that memory does not grow with the cohort
            orders = {client_of(each): each for each in part if _trains(each.content)}
            replies = {}
            if orders:
                replies = train_ahead(self._bench, next(iter(orders.values())).content, [*orders])
            for message in part:
                yield _extended(message, replies.get(client_of(message)))


def client_of(message: Message) -> int:
    """Return the number of the client to whose node a message goes."""
    return message.metadata.dst_node_id - FIRST_NODE


def _trains(content: RecordDict) -> bool:
    """Return whether an instruction has a model, which all clients of one exchange are sent."""
    return bool(records_of(content, ArrayRecord)) and not is_query(content)


def _extended(message: Message, reply: RecordDict | None) -> Message:
    """Return the message with a reply's records; the message itself if there is none."""
    if not reply:
        return message
    head = message.metadata
    content = RecordDict({**message.content, **reply})
    return Message(content, head.dst_node_id, head.message_type, group_id=head.group_id)


def with_stacks(grid: Grid, clients: Clients, task: Task) -> Grid:
    """Return the grid to simulated clients that encrypt, or one that trains them in stacks if their model is small."""
    trains_by_sgd = clients.trains_by_sgd and clients.settings.accelerator == "cpu"
    if trains_by_sgd and isinstance(grid, SummingGrid):
        bench = Workbench(clients.settings, task)
        if is_small(bench) and can_vectorise(bench):
            return EncryptedStacks(grid, bench)
    return grid
