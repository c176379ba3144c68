"""Grids that support only `send_and_receive`: the base of fedveil's grids, and the base of those that wrap another one."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from ..base.refusal import Refusal


class AskingGrid(Grid):
    """Grid that supports only `send_and_receive`: no message is in flight outside that call."""

    _run: Run

    def set_run(self, run: Run) -> None:
        """Set the run that `run` returns."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run of this process."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message, as Flower's deprecated method does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refuse: one client would answer a pushed message, outside any sum."""
        raise Refusal("push_messages", "called", "use send_and_receive: single clients cannot be reached")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refuse, as `push_messages` does."""
        raise Refusal("pull_messages", "called", "use send_and_receive: single clients cannot be reached")


class PassingGrid(AskingGrid):
    """Grid that wraps another one, with its run and nodes."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        """Set the run of the wrapped grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run of the wrapped grid."""
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the wrapped grid."""
        return self._grid.get_node_ids()

    def keep_unsent(self, content: RecordDict) -> None:
        """Record content that no node is sent, if a wrapped grid keeps a log, in which an empty cohort would otherwise show."""
        if isinstance(self._grid, PassingGrid):
            self._grid.keep_unsent(content)
