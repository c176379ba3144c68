"""Repeats of instructions to devices whose owners have not decided: each is sent again until its exchange ends.

A device that waits for its owner has begun nothing. So its exchange goes on until the deadline, as for a device that is
late, and a decision that comes in time is followed in the same exchange.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict

from ..messages.flower_adapter import config_of
from ..messages.wire import SPEC_RECORD, WAITING
from .roster_watch import Nodes

FIRST_SECONDS, LONGEST_SECONDS = (
    1.0,
    60.0,
)  # between an answer and the next sending; each wait is twice the last
REPEAT = "repeat"  # key beside a sum's spec: how often it was sent before, so that no reply comes from memory


@dataclass
class Repeats:
    """Instructions of one exchange that are sent again, and the last answers to them."""

    _due: list[tuple[float, int, Message]] = field(default_factory=list[tuple[float, int, Message]])
    _answers: dict[int, Message] = field(default_factory=dict[int, Message])  # by node
    _count: Iterator[int] = field(default_factory=itertools.count)  # orders messages that are due at once

    def take(self, request: Message, reply: Message) -> bool:
        """Return whether a reply says that its device waits; its instruction is then sent again later.

        Args:
          request: the instruction.
          reply: of its node.
        """
        node = request.metadata.dst_node_id
        if not reply.has_error() or reply.error.code != WAITING or SPEC_RECORD not in request.content:
            self._answers.pop(node, None)
            return False
        self._answers[node] = reply
        times = int(str(config_of(request.content, SPEC_RECORD).get(REPEAT, 0)))
        wait = min(LONGEST_SECONDS, FIRST_SECONDS * 2 ** min(times, 16))
        heapq.heappush(self._due, (time.monotonic() + wait, next(self._count), _again(request, times + 1)))
        return True

    @property
    def pending(self) -> bool:
        """Whether an instruction is to be sent again."""
        return bool(self._due)

    def due(self, nodes: Nodes) -> list[Message]:
        """Return the instructions whose wait is over, each once; `nodes` returns the roster's, and others get none."""
        messages: list[Message] = []
        while self._due and self._due[0][0] <= time.monotonic():
            messages.append(heapq.heappop(self._due)[2])
        members = set(nodes()) if messages else set[int]()
        return [message for message in messages if message.metadata.dst_node_id in members]

    def answers(self) -> list[Message]:
        """Return the last answers of devices that still wait, for the end of the exchange."""
        return list(self._answers.values())


def _again(message: Message, times: int) -> Message:
    """Return an instruction that was sent this many times before."""
    head, content = message.metadata, message.content
    record = ConfigRecord({**config_of(content, SPEC_RECORD), REPEAT: times})
    repeated = RecordDict({**dict(content.items()), SPEC_RECORD: record})
    return Message(repeated, head.dst_node_id, head.message_type, ttl=head.ttl, group_id=head.group_id)
