"""Engine of a simulation's clients: this process and its workers, or Ray's actors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import TYPE_CHECKING

from flwr.app import Message
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid

from ..base.extensions import extension
from ..base.refusal import Refusal
from ..messages.client_settings import ClientSettings
from ..messages.grids import PassingGrid
from ..messages.traffic import LOST, Cargo, Tally, cargo_of, carried_bytes, update_bytes
from ..messages.wire import SummingGrid
from ..modes.federation import Federation
from ..privacy.mechanisms.private_sum import CohortSum
from ..privacy.mechanisms.sum_spec import SumSpec
from ..run.prepared_run import Run
from ..strategies.cohorts import invited_size
from .clients import Clients, fault_mods
from .deadline import within

if TYPE_CHECKING:
    from ..messages.difference_grid import ClientModels


@contextmanager
def engine_with_tally(run: Run, tally: Tally, grid: Grid | None = None) -> Generator[Grid]:
    """Open the grid to the clients on the engine of the settings, and count the bytes of a link.

    Args:
      run: about to begin its rounds.
      tally: takes the bytes.
      grid: grid to use instead of an engine; it is not closed.
    """
    federation = run.federation
    at_once = federation.masking is None  # otherwise each client must mask its own vector
    clients = clients_of(federation, run.client, federation.num_nodes, at_once)
    workers = federation.settings.engine.workers
    with nullcontext(grid) if grid else _opened(federation, clients, workers) as opened:
        if federation.masking and not grid and clients.trains_by_sgd:
            from .encrypted_stacks import with_stacks

            opened = with_stacks(opened, clients.settings, federation.task)
        tallying = counting_grid(opened, tally, federation.sends_differences)
        if _has_speeds(federation) and isinstance(tallying, CountedSums):
            from .arrivals import with_arrivals  # clients without speeds need no virtual time

            tallying = with_arrivals(tallying, federation)
        yield tallying


@contextmanager
def asking_engine(federation: Federation, settings: ClientSettings) -> Generator[tuple[Grid, Tally]]:
    """Open the engine of the settings for a question without training; the tally counts its bytes as a link would."""
    clients = clients_of(federation, settings, federation.num_clients, at_once=False)
    with _opened(federation, clients, federation.settings.engine.workers or 1) as opened:
        yield counting_grid(opened, tally := Tally()), tally


def require_one_machine(federation: Federation) -> None:
    """Refuse real records on a cluster: a client's ledger is on the machine where it trains, which changes."""
    engine = federation.settings.engine
    if engine.address and federation.mode.client_budget and not federation.simulated:
        remedy = (
            "each machine would keep ledgers of its own for the same records; train real ones on one machine"
        )
        raise Refusal("engine.address", engine.address, remedy)


def require_virtual_time(federation: Federation, grid: Grid | None) -> None:
    """Refuse clients of uneven speed on a grid that is no engine, such as Flower's, which has no virtual time."""
    if grid is not None and _has_speeds(federation) and not isinstance(grid, SummingGrid):
        remedy = "only fedveil simulate has the virtual time in which clients answer; use another cohort, and no speed"
        raise Refusal("cohort", federation.settings.cohort.name, remedy)


def _has_speeds(federation: Federation) -> bool:
    """Return whether clients differ in speed, or the cohort depends on who is first."""
    return federation.turns.by_arrival or federation.settings.speed.any


def clients_of(federation: Federation, settings: ClientSettings, count: int, at_once: bool) -> Clients:
    """Return the recipe of `count` clients with these settings, canaries included; `at_once` as of `Clients`."""
    s, invited = federation.settings, round(invited_size(federation.cohort, federation.num_clients))
    return Clients(settings, count, invited, s.engine.deadline, s.faults, federation.randomness, at_once)


def _opened(federation: Federation, clients: Clients, workers: int | None) -> AbstractContextManager[Grid]:
    """Return the context of the grid to these clients, on the engine of the settings."""
    engine = federation.settings.engine
    if engine.elsewhere:
        return extension("engine", engine.option, "engine", engine.option)(clients, engine)
    return closing(clients.grid(federation.task, workers))


def client_mods(federation: Federation) -> tuple[Mod, ...]:
    """Return the mods of a client in Flower's runtime: its deadline, and the faults to inject."""
    s = federation.settings
    deadline = s.engine.deadline
    return (within(deadline), *fault_mods(s.faults, federation.randomness, deadline))


class CountedGrid(PassingGrid):
    """Grid that counts each message that it forwards.

    Args:
      grid: reaches the clients.
      tally: takes the bytes.
      models: which earlier models clients have, to be sent differences from them; None sends whole models.
    """

    def __init__(self, grid: Grid, tally: Tally, models: ClientModels | None = None) -> None:
        super().__init__(grid)
        self._tally, self._models = tally, models

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Count the messages, send them, and count and yield the replies.

        At most one message goes to each node. `timeout`, in seconds, is that of Flower's `Grid`.
        """
        requests = list(messages)
        sizes = dict[int, tuple[int, Cargo]]()  # by content, which most messages share
        cargoes = dict[int, Cargo]()  # by node
        for message in self._encode(requests):
            size, cargo = sizes.get(id(message.content)) or (carried_bytes(message), cargo_of(message))
            sizes[id(message.content)] = size, cargo
            cargoes[message.metadata.dst_node_id] = cargo
            self._tally.add("down", cargo.down, size)
        for reply in self._grid.send_and_receive(requests, timeout=timeout):
            size, cargo = carried_bytes(reply), cargoes.get(reply.metadata.src_node_id)
            self._tally.add("up", LOST if cargo is None else cargo.up(size), size)
            yield reply

    def _encode(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages in the size in which a link would send them, and note that the nodes then hold their models."""
        if self._models is None:
            return messages
        return self._models.encode_for_storing(messages)


class CountedSums(CountedGrid):
    """Counting grid for a grid that adds its clients' replies itself."""

    def __init__(self, grid: SummingGrid, tally: Tally, models: ClientModels | None = None) -> None:
        assert isinstance(grid, Grid)
        super().__init__(grid, tally, models)
        self._adds = grid

    def sum_replies(self, order: Message, nodes: Sequence[int], spec: SumSpec, size: int) -> CohortSum:
        """Let the grid sum the nodes' replies to an order, and count the orders and the replies of `size` coordinates."""
        cargo, added = cargo_of(order), self._adds.sum_replies(order, nodes, spec, size)
        for message, count in self._encoded_order(order, nodes):
            self._tally.add("down", cargo.down, count * carried_bytes(message))
        self._tally.add("up", {cargo.purpose: 1.0}, added.replies * update_bytes(spec, size))
        return added

    def _encoded_order(self, order: Message, nodes: Sequence[int]) -> Iterable[tuple[Message, int]]:
        """Return the distinct messages that a link would send for an order, each with the number of nodes that get it."""
        if self._models is None:
            return [(order, len(nodes))]
        messages = self._encode([Message(order.content, node, order.metadata.message_type) for node in nodes])
        counts = Counter(id(each.content) for each in messages)
        distinct = {id(each.content): each for each in messages}
        return [(message, counts[key]) for key, message in distinct.items()]


def counting_grid(grid: Grid, tally: Tally, differences: bool = False) -> CountedGrid:
    """Return a grid that counts the messages of another.

    Args:
      grid: reaches the clients.
      tally: takes the bytes.
      differences: whether a client that has an earlier model would be sent what changed.
    """
    models = None
    if differences:
        from ..messages.difference_grid import ClientModels

        models = ClientModels()
    if isinstance(grid, SummingGrid):
        return CountedSums(grid, tally, models)
    return CountedGrid(grid, tally, models)
