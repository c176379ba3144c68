"""Grid whose clients may answer one round late: those that are still at work are not asked again meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from ..messages.grids import PassingGrid
from ..messages.wire import may_be_late, read_round


class LateAnswers(PassingGrid):
    """Grid that asks only clients that are not at work on the last round; theirs are among the replies of the present one.

    Args:
      grid: yields the answers to an instruction that `may_be_late` in its own exchange or in the next one.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._at_work = dict[int, int]()  # by node, the round of the instruction that it has not answered

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send the messages to those that are not at work, and yield the replies as they come, late ones included.

        If all are at work, they are asked anew, and one answer of each counts, whichever comes first. `timeout` is in
        seconds; None waits without limit.
        """
        requests = list(messages)
        if not requests or not may_be_late(requests[0].content):
            return self._grid.send_and_receive(requests, timeout=timeout)
        _, number = read_round(requests[0].content)
        self._at_work = {node: row for node, row in self._at_work.items() if row == number - 1}
        fresh = [each for each in requests if each.metadata.dst_node_id not in self._at_work] or requests
        self._at_work |= {each.metadata.dst_node_id: number for each in fresh}
        return self._received(self._grid.send_and_receive(fresh, timeout=timeout))

    def _received(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Yield the reply of each client at work, which is then no longer so: another one, to an earlier letter, is dropped."""
        for reply in replies:
            if reply.metadata.src_node_id in self._at_work:
                del self._at_work[reply.metadata.src_node_id]
                yield reply
