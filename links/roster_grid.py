"""A grid of the nodes of a roster, whatever carries its messages: who is away drops out, who leaves is waited for no more."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.supercore.run import Run

from ..strategies.grids import AskingGrid
from .roster_watch import Nodes

LOOK_SECONDS = (
    1.0  # between two looks at who is there, and who of those that are asked is still in the roster
)


class RosterGrid(AskingGrid):
    """See the module's text.

    Args:
      run: the identity of this process.
      nodes: of the roster: who may be asked, here or not; asked again every second.
    """

    def __init__(self, run: Run, nodes: Nodes) -> None:
        self._run, self._nodes = run, nodes

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes of the roster: one that is drawn while it is away drops out."""
        return self._nodes()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send each message once its node is here, and yield the replies as they come.

        It ends when all have answered, gone for good or left the roster, or after `timeout` seconds; a caller that has
        enough may end it before.
        """
        return self._exchange(list(messages), math.inf if timeout is None else timeout)

    @abstractmethod
    def _exchange(self, messages: list[Message], seconds: float) -> Iterator[Message]: ...

    def _still_asked(self, waiting: dict[str, int]) -> dict[str, int]:
        """Return those of the questions, by their nodes, that go to members of the roster as it is now."""
        members = set(self._nodes())
        return {name: node for name, node in waiting.items() if node in members}
