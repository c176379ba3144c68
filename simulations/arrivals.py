"""Arrival of simulated clients, in virtual time: a grid that asks only those whose answers come in time.

Each client takes a virtual time for a round, which is public, fixed for the run, and independent of its data. A round
ends once as many clients have answered as its cohort takes, or at the virtual deadline. Only the clients whose answers
count are asked at all, so a simulation with slow clients takes no longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from ..configs.schema import SpeedSettings
from ..messages.grids import PassingGrid
from ..messages.wire import DROP_REASONS, LATE, NOT_NEEDED, SummingGrid, is_query, read_round
from ..modes.federation import Federation
from ..privacy.mechanisms.private_sum import CohortSum
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sum_spec import SumSpec

TIE = 1e-9  # relative difference by which a random order of clients that take the same time is made


def times_of(speed: SpeedSettings, nodes: Sequence[int], randomness: Randomness) -> dict[int, float]:
    """Return the virtual time of each node for a round; that of a usual one is about 1.

    Args:
      speed: distribution of the times.
      nodes: of all clients.
      randomness: source of the draws.
    """
    generator = randomness.stream("speed").generator()
    times = np.exp(speed.sigma * generator.standard_normal(len(nodes)))
    times *= np.where(generator.random(len(nodes)) < speed.slow, speed.slow_factor, 1.0)
    return dict(zip(nodes, (times * (1 + TIE * generator.random(len(nodes)))).tolist(), strict=True))


@dataclass
class VirtualRounds:
    """Virtual time of a run's rounds, and the clients at work.

    Attributes:
      times: virtual time of each node for a round.
      enough: number of answers that ends a round; None waits for all.
      deadline: virtual time after which a round ends in any case.
      staleness: 1 if a client that is at work when its round ends may answer in the next one, else 0.
    """

    times: dict[int, float]
    enough: int | None
    deadline: float
    staleness: int
    _row: int = field(default=0, init=False)  # of the last round
    _at_work: dict[int, tuple[float, int]] = field(default_factory=dict[int, tuple[float, int]], init=False)

    def round(self, row: int, nodes: Sequence[int]) -> tuple[dict[int, list[int]], float]:
        """Return the nodes that answer in a round, by the row whose model they trained, and the time that it took.

        Args:
          row: of the round.
          nodes: those that it invites.
        """
        going_on = {
            node: (rest, start)
            for node, (rest, start) in self._at_work.items()
            if start >= row - self.staleness
        }
        at_work = {node: (self.times[node], row) for node in nodes} | going_on
        order = sorted((rest, node) for node, (rest, _) in at_work.items())
        in_time = [(rest, node) for rest, node in order if rest <= self.deadline][: self.enough]
        arrived: dict[int, list[int]] = {}
        for _, node in in_time:
            arrived.setdefault(at_work.pop(node)[1], []).append(node)
        is_over = len(in_time) == self.enough or not at_work
        length = in_time[-1][0] if is_over and in_time else self.deadline
        self._at_work = {node: (rest - length, start) for node, (rest, start) in at_work.items()}
        return {start: sorted(each) for start, each in sorted(arrived.items())}, length


class ArrivingGrid(PassingGrid):
    """Grid that asks the clients whose answers come in time, and no others; questions go to all.

    Args:
      grid: adds the replies of the clients.
      rounds: says who answers in time.
    """

    def __init__(self, grid: SummingGrid, rounds: VirtualRounds) -> None:
        assert isinstance(grid, Grid)
        super().__init__(grid)
        self._adds, self._rounds = grid, rounds
        self._orders: dict[int, Message] = {}  # by row: those that clients at work follow

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages of an encrypted sum or outside of a round; the replies come in the order of the clients' speeds."""
        times = self._rounds.times
        replies = self._grid.send_and_receive(messages, timeout=timeout)
        return sorted(replies, key=lambda reply: times.get(reply.metadata.src_node_id, 0.0))

    def sum_replies(self, order: Message, nodes: Sequence[int], spec: SumSpec, size: int) -> CohortSum:
        """Return the sum of the replies that come in time, each to the order that its client follows."""
        if is_query(order.content):
            return self._adds.sum_replies(order, nodes, spec, size)
        _, row = read_round(order.content)
        arrived, length = self._rounds.round(row, nodes)
        oldest = row - self._rounds.staleness
        self._orders = {start: each for start, each in self._orders.items() if start >= oldest} | {row: order}
        total = CohortSum(np.zeros(size), virtual_time=length)
        for start, clients in arrived.items():
            total.merge(self._adds.sum_replies(self._orders[start], clients, spec, size))
            total.nodes += clients
        reason = NOT_NEEDED if length < self._rounds.deadline else DROP_REASONS[LATE]
        total.drop(reason, len(nodes) - len(arrived.get(row, ())))
        return total


def with_arrivals(grid: SummingGrid, federation: Federation) -> ArrivingGrid:
    """Return a grid whose clients answer in virtual time, by the speeds of the settings."""
    assert isinstance(grid, Grid)
    speed, turns = federation.settings.speed, federation.turns
    times = times_of(speed, list(grid.get_node_ids()), federation.randomness)
    size = round(federation.cohort.expected_size(federation.num_clients))
    rounds = VirtualRounds(
        times, size if turns.by_arrival else None, speed.deadline or math.inf, turns.staleness
    )
    return ArrivingGrid(grid, rounds)
