"""Flower grid over SuperNodes in which nodes have the numbers of the roster, not the ids that Flower draws.

A SuperNode is known by its key; the bundle's supernodes.json maps keys to numbers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager

from flwr.app import Message

from ...messages.flower_adapter import name_sender
from ...messages.traffic import NodeTraffic, cargo_of
from ..repeats import Repeats
from ..roster_grid import PRESENCE_SECONDS, RosterGrid
from ..roster_watch import Admitted, Nodes
from .control_calls import RUN_LOST, ServedRun

logger = logging.getLogger("fedveil.server")

POLL_SECONDS = 0.2
MAX_FETCHES, FETCH_SECONDS = 32, 120.0  # replies that are fetched at once, and the time for one
# Flower accepts a device's clock that is up to 305 s wrong, and a reply's lifetime counts by that clock.
CLOCK_SECONDS = 600.0

OpenRun = Callable[[], AbstractContextManager[ServedRun]]


@contextmanager
def open_supernodes(
    open_run: OpenRun, nodes: Nodes, admitted: Admitted, traffic: NodeTraffic | None = None
) -> Generator[SuperNodeGrid]:
    """Yield a grid on a run of a SuperLink, and end the run with the context; arguments as of `SuperNodeGrid`."""
    with ExitStack() as opened:
        yield SuperNodeGrid(open_run, opened, nodes, admitted, traffic or NodeTraffic())


class SuperNodeGrid(RosterGrid):
    """Grid over the SuperNodes of a roster; `open_supernodes` makes it.

    Args:
      open_run: starts a run of the SuperLink; called again when the run is lost.
      opened: ends the run.
      nodes: returns the roster's nodes; called every second.
      admitted: returns the nodes by the fingerprints of their SuperNode keys; called every second.
      traffic: counter of bytes, in which the grid records the purposes of each node's pending message.

    Attributes:
      lost: number of runs that the SuperLink lost.
    """

    def __init__(
        self, open_run: OpenRun, opened: ExitStack, nodes: Nodes, admitted: Admitted, traffic: NodeTraffic
    ) -> None:
        self._open_run, self._opened, self._admitted = open_run, opened, admitted
        self.tally, self._cargo = traffic.tally, traffic.cargo
        self._served = opened.enter_context(open_run())
        super().__init__(self._served.run, nodes)
        self._connected_since, self._last_poll = dict[int, float](), -math.inf
        self.lost = 0

    @property
    def connected(self) -> dict[int, float]:
        """Nodes connected within the last second, with the Unix second since which this process knows it."""
        if time.monotonic() - self._last_poll > PRESENCE_SECONDS:
            self._last_poll = time.monotonic()
            try:
                here = self._on_line()
            except RUN_LOST:
                here = {}
            self._connected_since = {node: self._connected_since.get(node, time.time()) for node in here}
        return self._connected_since

    @property
    def counts(self) -> dict[str, int]:
        """Number of exchanges that ended because the SuperLink had lost the run."""
        return {"runs lost": self.lost}

    def _exchange(self, messages: list[Message], seconds: float) -> Iterator[Message]:
        """Exchange messages; if the SuperLink loses the run, start another one: nodes that have not answered drop out."""
        try:
            yield from self._exchange_in_run(messages, seconds)
        except RUN_LOST as loss:
            logger.warning("the SuperLink lost the run (%s)", type(loss).__name__)
            self.lost += 1
            self._opened.close()
            self._served = self._opened.enter_context(self._open_run())

    def _exchange_in_run(self, messages: list[Message], seconds: float) -> Iterator[Message]:
        """Exchange messages: send them to nodes as these connect, and fetch the replies that nodes announce."""
        end, last_poll = time.monotonic() + seconds, -math.inf
        waiting = dict[str, int]()  # nodes that have not announced a reply, by the id of the message
        coming = dict[Future[Message | None], int]()  # nodes whose replies are being fetched
        requests, repeats = {each.metadata.dst_node_id: each for each in messages}, Repeats()
        fetching = ThreadPoolExecutor(MAX_FETCHES, "flower reply")
        try:
            while (messages or waiting or coming or repeats.pending) and (
                seconds_left := end - time.monotonic()
            ) > 0:
                again = repeats.due(self._nodes)
                requests |= {each.metadata.dst_node_id: each for each in again}
                messages = [*messages, *again]
                if (messages or waiting) and time.monotonic() - last_poll > PRESENCE_SECONDS:
                    last_poll, waiting = time.monotonic(), self._in_roster(waiting)
                    messages = self._send(messages, seconds_left, waiting) if messages else []
                for reply in self._served.replies(list(waiting)) if waiting else ():
                    task = fetching.submit(reply.fetch, min(seconds_left, FETCH_SECONDS))
                    coming[task] = waiting.pop(reply.question)
                pause = min(POLL_SECONDS, seconds_left)
                for task in wait(coming, pause, FIRST_COMPLETED).done if coming else ():
                    node, reply = coming.pop(task), task.result()
                    self._cargo.pop(node, None)
                    if reply is not None and not repeats.take(requests[node], name_sender(reply, node)):
                        yield reply
                if not coming and (messages or waiting or repeats.pending):
                    time.sleep(pause)
            yield from repeats.answers()
        finally:
            fetching.shutdown(wait=False, cancel_futures=True)
            for node in (*waiting.values(), *coming.values()):
                self._cargo.pop(node, None)

    def _send(self, messages: list[Message], seconds_left: float, waiting: dict[str, int]) -> list[Message]:
        """Deliver messages to connected nodes and record them in `waiting`; return those to absent nodes of the roster."""
        ids = self._on_line()
        lifetime = None if math.isinf(seconds_left) else seconds_left + CLOCK_SECONDS
        deliverable = [message for message in messages if message.metadata.dst_node_id in ids]
        self._cargo.update({each.metadata.dst_node_id: cargo_of(each) for each in deliverable})
        addressed = [_address(each, ids[each.metadata.dst_node_id], lifetime) for each in deliverable]
        for name, each in zip(self._served.push(addressed), deliverable, strict=True):
            if name:
                waiting[name] = each.metadata.dst_node_id
        absent = set(self._nodes()) - ids.keys()
        return [message for message in messages if message.metadata.dst_node_id in absent]

    def _on_line(self) -> dict[int, int]:
        """Return Flower's ids, by node number, of the nodes that are connected and admitted."""
        admitted, here = self._admitted(), self._served.online_nodes()
        return {admitted[key]: node for key, node in here.items() if key in admitted}


def _address(message: Message, node: int, lifetime: float | None) -> Message:
    """Return the message to a node, by Flower's id, valid for these seconds; None takes Flower's default."""
    head = message.metadata
    return Message(message.content, node, head.message_type, ttl=lifetime, group_id=head.group_id)
