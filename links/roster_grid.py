"""Grid of the nodes of a roster, common to both links: nodes that leave the roster are no longer waited for."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.supercore.run import Run

from ..messages.grids import AskingGrid
from .roster_watch import Nodes

PRESENCE_SECONDS = 1.0  # between two checks of the connected nodes and of the roster


class RosterGrid(AskingGrid):
    """Grid whose nodes are those of a roster, connected or not.

    Args:
      run: identity of this process.
      nodes: returns the roster's nodes; called every second.
    """

    def __init__(self, run: Run, nodes: Nodes) -> None:
        self._run, self._nodes = run, nodes

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes of the roster; one that is drawn while it is away drops out."""
        return self._nodes()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send each message once its node is connected, and yield the replies as they come.

        The iterator ends when all nodes have answered, are gone for good or have left the roster. A caller that has
        enough replies may close it earlier.

        Args:
          messages: at most one to each node.
          timeout: seconds after which it ends in any case; None waits without limit.
        """
        return self._exchange(list(messages), math.inf if timeout is None else timeout)

    @abstractmethod
    def _exchange(self, messages: list[Message], seconds: float) -> Iterator[Message]:
        """Exchange messages as `send_and_receive` does, for at most this long."""

    def _in_roster(self, waiting: dict[str, int]) -> dict[str, int]:
        """Return those of the messages, by id, whose nodes are still in the roster."""
        members = set(self._nodes())
        return {name: node for name, node in waiting.items() if node in members}
