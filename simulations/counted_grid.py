"""Grid of simulated clients that counts what a link would carry, by the sizes that its encoders give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from ..links.grpc.sizes import carried_bytes, update_bytes
from ..links.traffic import LOST, Cargo, Tally, cargo_of
from ..privacy.mechanisms.private_sum import CohortSum
from ..privacy.mechanisms.sum_spec import SumSpec
from ..strategies.grids import PassingGrid
from ..strategies.wire import SummingGrid


class CountedGrid(PassingGrid):
    """Grid that counts each message that it passes on.

    Args:
      grid: reaches the clients.
      tally: takes the bytes.
    """

    def __init__(self, grid: Grid, tally: Tally) -> None:
        super().__init__(grid)
        self._tally = tally

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Count the messages, send them, and count and yield the replies.

        Arguments as of Flower's `Grid`; at most one message goes to each node.
        """
        asked, known = list(messages), dict[int, tuple[int, Cargo]]()
        cargoes = dict[int, Cargo]()
        for message in asked:
            size, cargo = known.get(id(message.content)) or (carried_bytes(message), cargo_of(message))
            known[id(message.content)] = size, cargo
            cargoes[message.metadata.dst_node_id] = cargo
            self._tally.add("down", cargo.down, size)
        for reply in self._grid.send_and_receive(asked, timeout=timeout):
            size, cargo = carried_bytes(reply), cargoes.get(reply.metadata.src_node_id)
            self._tally.add("up", LOST if cargo is None else cargo.up(size), size)
            yield reply


class CountedSums(CountedGrid):
    """The same for a grid that adds its clients' replies itself."""

    def __init__(self, grid: SummingGrid, tally: Tally) -> None:
        assert isinstance(grid, Grid)
        super().__init__(grid, tally)
        self._adds = grid

    def sum_replies(self, order: Message, nodes: Sequence[int], spec: SumSpec, size: int) -> CohortSum:
        """Count an instruction to every node, and the vectors that come back.

        Arguments as of `SummingGrid`.
        """
        cargo, added = cargo_of(order), self._adds.sum_replies(order, nodes, spec, size)
        self._tally.add("down", cargo.down, len(nodes) * carried_bytes(order))
        self._tally.add("up", {cargo.purpose: 1.0}, added.replies * update_bytes(spec, size))
        return added


def counted(grid: Grid, tally: Tally) -> CountedGrid:
    """Return a grid that counts what another passes on.

    Args:
      grid: reaches the clients.
      tally: takes the bytes.
    """
    return CountedSums(grid, tally) if isinstance(grid, SummingGrid) else CountedGrid(grid, tally)
