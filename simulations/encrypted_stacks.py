"""Training of many clients of an encrypted sum at once, before each of them masks its own vector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid

from ..client.app import train_round
from ..client.private_update import METRICS, SUM_PART
from ..client.training.cohort_training import MAX_STACK, can_vectorise, is_small, train_ahead
from ..client.workbench import Workbench
from ..messages.client_settings import ClientSettings
from ..messages.flower_adapter import records_of
from ..messages.grids import PassingGrid
from ..messages.wire import SummingGrid, is_query
from ..privacy.mechanisms.private_sum import CohortSum
from ..privacy.mechanisms.sum_spec import SumSpec
from ..tasks.protocol import Task
from .in_process import client_of_node


class EncryptedStacks(PassingGrid):
    """Grid to simulated clients that trains stacks of them, and sends each the app's reply with its instruction.

    A cohort's stacks follow from its messages: they are the same on any engine, with any number of workers. Only the app
    of simulated clients has `StackedReply`, which takes the reply; that of a device refuses such an instruction.

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


class StackedReply:
    """Reply of a client that trained in a stack, which a mod takes out of its instruction and the app then sends."""

    _reply: RecordDict | None = None  # of the instruction that the app answers now

    def take(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Take the reply out of an instruction that has one, and call the app: a mod of Flower."""
        content = message.content
        self._reply = None
        if SUM_PART in content:
            self._reply = RecordDict({name: content.pop(name) for name in (SUM_PART, METRICS)})
        return call_next(message, context)

    def train_round(
        self, message: Message, client: int, bench: Workbench, settings: ClientSettings
    ) -> Message:
        """Return the reply that was taken; without one, that of `app.train_round`, with its arguments."""
        if self._reply is None:
            return train_round(message, client, bench, settings)
        return Message(self._reply, reply_to=message)


def client_of(message: Message) -> int:
    """Return the number of the client to whose node a message goes."""
    return client_of_node(message.metadata.dst_node_id)


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


def with_stacks(grid: Grid, settings: ClientSettings, task: Task) -> Grid:
    """Return the grid to simulated clients that train by SGD and encrypt, or one that trains them in stacks if it can."""
    if settings.accelerator == "cpu" and isinstance(grid, SummingGrid):
        bench = Workbench(settings, task)
        if is_small(bench) and can_vectorise(bench):
            return EncryptedStacks(grid, bench)
    return grid
