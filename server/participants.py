"""Participants of a round: the real clients and, behind them, the canaries of an audit.

Canaries are dummy clients. They are drawn after the real clients, whose draw and accounting they do not change; the
mean divides by the real cohort. In a simulation they are nodes of the grid like all others. With real clients they
answer in this process: a round does not count their answers, and their contribution is subtracted after the sum is
noised and its norm checked, so that they do not affect the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..base.refusal import Refusal
from ..messages.grids import PassingGrid
from ..messages.wire import SummingGrid, sum_of
from ..privacy.arms import Arm
from ..privacy.mechanisms.private_sum import CohortSum, Vector
from ..privacy.mechanisms.randomness import Stream
from ..privacy.mechanisms.sum_spec import SumSpec
from ..privacy.sampling import NO_BOUNDS, Turns
from ..strategies.cohorts import Cohort, Earlier, canary_cohort, in_arm
from .culprit_search import Search
from .round_terms import ALL_ANSWERS, Answers

NODE_WAIT_SECONDS = 60.0  # Flower's heartbeat declares a node lost after 60 s
FIRST_CANARY = 1 << 62  # above every number of a roster: canaries sort after clients that join later

# Adds the vectors with which canaries answer to a sum. Arguments: the instruction, the canaries' numbers, the spec, the sum.
AddCanaries = Callable[[RecordDict, Sequence[int], SumSpec, CohortSum], None]


@dataclass
class Participants:
    """Clients and canaries of a run.

    Attributes:
      grid: reaches the clients.
      cohort: draws the real clients of each round.
      clients: number of real clients in the federation.
      answers: how many a round needs, and how many are enough.
      canaries: number of canaries.
      add_canaries: adds the canaries' vectors in this process; None if canaries are the last nodes of the grid.
      population: a public number of clients, for the fixed denominator; None if `clients` is public.
      declared: whether the user declared the number of clients, without a roster, so that more of them are refused.
      names: of the clients by node, for dealing into arms; None if a client's name is its index.
      arm: of a sum over one arm; None for all clients.
      search: for members that corrupt encrypted sums, of rounds and evaluations alike.
    """

    grid: Grid
    cohort: Cohort
    clients: int
    answers: Answers = ALL_ANSWERS
    canaries: int = 0
    add_canaries: AddCanaries | None = None
    population: int | None = None
    declared: bool = False
    names: Mapping[int, str] | None = None
    arm: Arm | None = None
    search: Search = field(default_factory=Search)
    _real: Sequence[int] = field(default=(), init=False)  # nodes of the real clients; () until connected
    _dummies: list[int] = field(default_factory=list[int], init=False)  # nodes of the canaries
    _members: dict[Arm, list[int]] = field(default_factory=dict[Arm, list[int]], init=False)  # see `members`

    def __post_init__(self) -> None:
        if self.add_canaries is not None:
            self._dummies = list(range(FIRST_CANARY, FIRST_CANARY + self.canaries))

    def first_nodes(self, limit: int) -> list[int]:
        """Return the first `limit` nodes; the first call waits until clients are connected.

        Raises:
          Refusal: no client is connected.
        """
        self._connect()
        return [*self._real[:limit], *self._dummies][:limit]

    @property
    def _arms(self) -> int:
        """Number of parts of the clients, of which a round asks one."""
        return self.arm.deal.arms if self.arm else 1

    @property
    def expected(self) -> float:
        """Expected number of real clients of a round: the divisor of the mean."""
        clients = round(self.population / self._arms) if self.population else self.pool_size
        return in_arm(self.cohort, self._arms).expected_size(clients)

    @property
    def pool_size(self) -> int:
        """Number of real clients that a round's cohort is drawn from."""
        return len(self.members(self.arm)) if self.arm else self.clients

    @property
    def turns(self) -> Turns:
        """Bounds on participation by turns."""
        return self.cohort.turns or NO_BOUNDS

    @property
    def due(self) -> Answers:
        """Answers needed by the round: for an arm its share of those of all clients; a cohort by arrival is that many."""
        enough = round(self.expected) if self.turns.by_arrival else self.answers.enough
        return Answers(self.answers.quorum // self._arms, enough and max(1, enough // self._arms))

    def members(self, arm: Arm) -> list[int]:
        """Return the nodes of an arm's clients, in order."""
        self._connect()
        if arm not in self._members:
            names = self.names or {node: str(index) for index, node in enumerate(self._real)}
            self._members[arm] = [node for node in self._real if arm.holds(names[node])]
        return self._members[arm]

    def renew(self, nodes: Sequence[int], answers: Answers, names: Mapping[int, str] | None = None) -> None:
        """Continue with these clients, and the same canaries."""
        self._real, self.clients, self.answers, self.names = list(nodes), len(nodes), answers, names
        self._members = {}

    def draw(self, stream: Stream, earlier: Earlier = (), arm: Arm | None = None) -> list[int]:
        """Return the cohort of one round, canaries last, given the earlier cohorts.

        Args:
          stream: of the round's draw.
          earlier: cohorts of the rounds before, in their order.
          arm: to draw from; None draws from all clients.

        Raises:
          Refusal: the arm is empty, or smaller than a round needs.
        """
        self._connect()
        if arm is not None:
            return self._draw_from_arm(arm, stream, earlier)
        nodes = self.cohort.draw(self._real, stream, earlier)
        if not self._dummies:
            return nodes
        rule = canary_cohort(self.cohort, self.clients, len(self._dummies))
        return nodes + rule.draw(self._dummies, stream, earlier)

    def _draw_from_arm(self, arm: Arm, stream: Stream, earlier: Earlier) -> list[int]:
        members = self.members(arm)
        if not members:
            remedy = f"arm {arm.number} has no client; try fewer values"
            raise Refusal("tune.values", arm.deal.arms, remedy)
        nodes = in_arm(self.cohort, arm.deal.arms).draw(members, stream, earlier)
        if not set(nodes) <= set(members):
            raise AssertionError("a client of another arm was drawn")
        return nodes

    def real(self, nodes: Sequence[int]) -> list[int]:
        """Return the real clients of a cohort, without canaries."""
        dummies = set(self._dummies)
        return [node for node in nodes if node not in dummies]

    def numbers(self, nodes: Sequence[int]) -> list[int]:
        """Return the numbers, from 0, of the real clients among the drawn nodes: their positions in the population."""
        real = self.real(nodes)
        if isinstance(self._real, range):
            return [self._real.index(node) for node in real]
        indices = {node: index for index, node in enumerate(self._real)}
        return [indices[node] for node in real]

    def all_among(self, nodes: Collection[int]) -> bool:
        """Return whether every real client is among these nodes."""
        return 0 < len(self._real) <= len(nodes) and set(self._real) <= set(nodes)

    def dummies(self, nodes: Sequence[int]) -> list[int]:
        """Return the numbers, from 0, of the canaries among the drawn nodes."""
        numbers = {node: number for number, node in enumerate(self._dummies)}
        return [numbers[node] for node in nodes if node in numbers]

    def over_grid(self, nodes: Sequence[int]) -> list[int]:
        """Return the members of a cohort that are reached over the grid."""
        return list(nodes) if self.add_canaries is None else self.real(nodes)

    def sum(
        self, order: Message, nodes: Sequence[int], spec: SumSpec, size: int, timeout: float | None
    ) -> tuple[CohortSum, Vector | None]:
        """Return the sum over a cohort, shape (size,), and the canaries' part to subtract; None if they are nodes.

        Args:
          order: the instruction to all.
          nodes: from `draw`.
          spec: the sum's public parameters.
          size: coordinates of the sum, all segments included.
          timeout: seconds to wait for answers; None waits for all.
        """
        cohort_sum = self._exchange(order, self.over_grid(nodes), spec, size, timeout)
        if self.add_canaries is None:
            return cohort_sum, None
        dummies = CohortSum(np.zeros(size))
        self.add_canaries(order.content, self.dummies(nodes), spec, dummies)
        cohort_sum.total += dummies.total
        return cohort_sum, dummies.total

    def _exchange(
        self, order: Message, nodes: list[int], spec: SumSpec, size: int, timeout: float | None
    ) -> CohortSum:
        """Send an order to nodes of the grid, and return the sum of their replies; arguments as of `sum`."""
        if not nodes:
            if isinstance(
                self.grid, PassingGrid
            ):  # otherwise a log of messages would show which cohorts were empty
                self.grid.keep_unsent(order.content)
            return CohortSum(np.zeros(size))
        if isinstance(self.grid, SummingGrid):
            cohort_sum = self.grid.sum_replies(order, nodes, spec, size)
            if cohort_sum.replies and not cohort_sum.nodes:  # the grid does not say whose they are
                cohort_sum.nodes = nodes
            return cohort_sum
        metadata = order.metadata
        kind, group = metadata.message_type, metadata.group_id
        messages = [Message(order.content, node, kind, group_id=group) for node in nodes]
        replies = self.grid.send_and_receive(messages, timeout=timeout)
        return sum_of(replies, spec, size, len(messages), self.due.enough)

    def _connect(self) -> None:
        """Wait for the nodes of the grid, once, and divide them into clients and canaries."""
        if self._real:
            return
        num_canaries = self.canaries if self.add_canaries is None else 0
        nodes = self._wait_for_nodes(self.clients + num_canaries)
        if not nodes:
            raise Refusal("population", self.clients, "no client connected; start the clients first")
        # The plan and its delta hold for the declared number.
        if self.declared and len(nodes) > self.clients + num_canaries:
            remedy = f"{len(nodes) - num_canaries} clients are connected; set it to that number"
            raise Refusal("population", self.clients, remedy)
        if self.add_canaries is None:
            self._real, self._dummies = nodes[: self.clients], list(nodes[self.clients :])
        else:
            self._real = nodes

    def _wait_for_nodes(self, expected: int) -> Sequence[int]:
        """Return the nodes of the grid, ascending, once this many are connected or the wait is over."""
        deadline = time.monotonic() + NODE_WAIT_SECONDS
        while (
            len(nodes := cast("Sequence[int]", self.grid.get_node_ids())) < expected
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        # A simulation has a range of nodes, whose memory does not grow with their number.
        return nodes if isinstance(nodes, range) else sorted(nodes)
