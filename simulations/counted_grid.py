"""Grid of simulated clients that counts the bytes of a link, by the sizes of its encoders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from ..messages.difference_grid import HeldModels
from ..messages.difference_wire import told_model
from ..messages.grids import PassingGrid
from ..messages.sizes import carried_bytes, update_bytes
from ..messages.traffic import LOST, Cargo, Tally, cargo_of
from ..messages.wire import SummingGrid
from ..privacy.mechanisms.private_sum import CohortSum
from ..privacy.mechanisms.sum_spec import SumSpec


class CountedGrid(PassingGrid):
    """Grid that counts each message that it forwards.

    Args:
      grid: reaches the clients.
      tally: takes the bytes.
      models: which of them clients would hold, and be sent differences from; None where these are sent the whole.
    """

    def __init__(self, grid: Grid, tally: Tally, models: HeldModels | None = None) -> None:
        super().__init__(grid)
        self._tally, self._models = tally, models

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Count the messages, send them, and count and yield the replies.

        Arguments as of Flower's `Grid`; at most one message goes to each node.
        """
        asked, known = list(messages), dict[int, tuple[int, Cargo]]()
        cargoes = dict[int, Cargo]()
        for message in self._told(asked):
            size, cargo = known.get(id(message.content)) or (carried_bytes(message), cargo_of(message))
            known[id(message.content)] = size, cargo
            cargoes[message.metadata.dst_node_id] = cargo
            self._tally.add("down", cargo.down, size)
        for reply in self._grid.send_and_receive(asked, timeout=timeout):
            size, cargo = carried_bytes(reply), cargoes.get(reply.metadata.src_node_id)
            self._tally.add("up", LOST if cargo is None else cargo.up(size), size)
            yield reply

    def _told(self, asked: Sequence[Message]) -> Sequence[Message]:
        """Return the messages in a link's form, for nodes that then hold the model that they were sent."""
        if self._models is None:
            return asked
        sent = self._models.told(asked)
        for message in sent:
            if (told := told_model(message.content)) is not None:
                self._models.take(message.metadata.dst_node_id, told.model)
        return sent


class CountedSums(CountedGrid):
    """Counting grid for a grid that adds its clients' replies itself."""

    def __init__(self, grid: SummingGrid, tally: Tally, models: HeldModels | None = None) -> None:
        assert isinstance(grid, Grid)
        super().__init__(grid, tally, models)
        self._adds = grid

    def sum_replies(self, order: Message, nodes: Sequence[int], spec: SumSpec, size: int) -> CohortSum:
        """Count an instruction to every node and the returned vectors; arguments as of `SummingGrid`."""
        cargo, added = cargo_of(order), self._adds.sum_replies(order, nodes, spec, size)
        for message, count in self._sent(order, nodes):
            self._tally.add("down", cargo.down, count * carried_bytes(message))
        self._tally.add("up", {cargo.purpose: 1.0}, added.replies * update_bytes(spec, size))
        return added

    def _sent(self, order: Message, nodes: Sequence[int]) -> Iterable[tuple[Message, int]]:
        """Return the distinct messages apart from the node, with the number of each."""
        if self._models is None:
            return [(order, len(nodes))]
        sent = self._told([Message(order.content, node, order.metadata.message_type) for node in nodes])
        times = Counter(id(each.content) for each in sent)
        return [(each, times[key]) for key, each in {id(each.content): each for each in sent}.items()]


def counted(grid: Grid, tally: Tally, differences: bool = False) -> CountedGrid:
    """Return a grid that counts the messages of another.

    Args:
      grid: reaches the clients.
      tally: takes the bytes.
      differences: whether a client that holds an earlier model would be sent what changed.
    """
    models = HeldModels() if differences else None
    if isinstance(grid, SummingGrid):
        return CountedSums(grid, tally, models)
    return CountedGrid(grid, tally, models)
