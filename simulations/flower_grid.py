"""Grid of Flower's simulation runtime whose clients are named by their partition.

Flower gives its nodes random ids, so that a seeded draw among them would pick other clients in every run. Here
client k is node `FIRST_NODE` + k, as on the in-process engine, and the same seed draws the same clients on both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from ..base.refusal import Refusal
from ..messages.flower_adapter import name_sender, nodes_by_partition
from ..messages.grids import PassingGrid
from .in_process import FIRST_NODE, GRACE_SECONDS

POLL_SECONDS = 0.05  # half of Flower's own interval
START_SECONDS = 60.0  # for the nodes to register; they need milliseconds
SETTLE_SECONDS = 0.5  # no more nodes for so long: registration is over


class FlowerGrid(PassingGrid):
    """Grid of Flower's simulation runtime.

    Args:
      grid: of Flower's simulation runtime.
      num_clients: how many clients the task has.
      deadline: seconds that one client may take; a client that hangs beyond any alarm is given up after as many
        for each of the cohort.
    """

    def __init__(self, grid: Grid, num_clients: int, deadline: float = math.inf) -> None:
        super().__init__(grid)
        self._num_clients = num_clients
        self._deadline = deadline
        self._nodes: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all clients, once they have registered.

        Raises:
          Refusal: the federation has another number of nodes than the task has clients.
        """
        if not self._nodes:
            self._nodes = self._registered()
        return range(FIRST_NODE, FIRST_NODE + len(self._nodes))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass messages to the runtime and return their ids."""
        self.get_node_ids()
        return self._grid.push_messages([self._addressed(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the available replies."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Pass the messages to the runtime and yield its replies as they arrive.

        Args:
          messages: at most one to each client.
          timeout: seconds to wait for all replies; the clients' deadlines may end it earlier.
        """
        sent = list(messages)
        waiting = {
            key: message.metadata.dst_node_id
            for key, message in zip(self.push_messages(sent), sent, strict=True)
        }
        limit = min(math.inf if timeout is None else timeout, self._deadline * len(waiting) + GRACE_SECONDS)
        end = time.monotonic() + limit
        while waiting and time.monotonic() < end:
            replies = list(self.pull_messages(list(waiting)))
            for reply in replies:  # what the link itself answers for a node comes from the link
                yield name_sender(reply, waiting.pop(reply.metadata.reply_to_message_id))
            if waiting and not replies:
                time.sleep(POLL_SECONDS)

    def _addressed(self, message: Message) -> Message:
        head = message.metadata
        node = self._nodes[head.dst_node_id - FIRST_NODE]
        return Message(message.content, node, head.message_type, ttl=head.ttl, group_id=head.group_id)

    def _registered(self) -> list[int]:
        end = time.monotonic() + START_SECONDS
        nodes, since = nodes_by_partition(self._grid), time.monotonic()
        while time.monotonic() < min(end, since + SETTLE_SECONDS) or (not nodes and time.monotonic() < end):
            time.sleep(POLL_SECONDS)
            if len(found := nodes_by_partition(self._grid)) != len(nodes):
                nodes, since = found, time.monotonic()
        if len(nodes) != self._num_clients:
            remedy = f"the task has {self._num_clients} clients: --federation-config num-supernodes={self._num_clients}"
            raise Refusal("num-supernodes", len(nodes), remedy)
        return nodes
