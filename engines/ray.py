"""Engine of actors on Ray, on this machine or on a cluster: each trains a share of the cohort and returns one partial sum.

The instruction is sent to each actor once, through the object store if it is large. Shares are assigned during the
round, large ones first: an idle actor gets the next share, so a slow node or clients with much data do not block
others. An actor returns its sum when there is no share left for it, while others train. Sums are integers on the
lattice, independent of the assignment. A simulation's clients are identified by seed and number, so any actor can train
them; a client with state goes to the actor that holds it.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Error, Message

from ..base.notice import warn
from ..base.refusal import Refusal
from ..messages.flower_adapter import claim_identity
from ..messages.grids import AskingGrid
from ..privacy.mechanisms.private_sum import CohortSum
from ..privacy.mechanisms.sum_spec import SumSpec
from ..simulations.clients import Clients
from ..simulations.in_process import (
    FIRST_NODE,
    GRACE_SECONDS,
    CohortOrder,
    InProcessGrid,
    Stacks,
    assign_nodes,
    order_for,
)
from .settings import Ray

DIED = "worker died"  # reason under which a lost actor's clients are counted as dropped
AHEAD = 2  # shares that are on the way to an actor, so that none waits for a message
INLINE_BYTES = 80_000  # of arrays: Ray carries arguments of up to 100 KiB in the call, in a fifth of the time
START_ATTEMPTS = 3  # on this machine: Ray gives its node 30 seconds, in which a busy machine may not start it
START_SECONDS = 120.0  # for an actor to find a free CPU and to import PyTorch

SumStart = tuple[CohortOrder, int]  # an instruction without nodes, and the number of coordinates of its sum


class Added(NamedTuple):
    """Result of a call that adds: the actor's partial sum, None until it is fetched, and the nodes that keep state there."""

    part: CohortSum | None
    stateful: list[int]


# Set before Ray is imported: it reports no usage, and does not warn of how it will treat missing accelerators.
RAY_DEFAULTS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# A client of Ray's ports can run code. On one machine it listens on the loopback address only, as it does on
# macOS and Windows by default; without this it takes the address by which 8.8.8.8 would be reached.
RAY_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextmanager
def ray_grid(clients: Clients, settings: Ray) -> Generator[RayGrid]:
    """Start Ray and its actors, and end both with the block.

    Args:
      clients: made anew in each actor; what they refer to must be importable there.
      settings: address of a cluster or CPUs of this machine.

    Raises:
      Refusal: Ray is not installed, or has no CPU that is free.
      RuntimeError: an actor cannot make the clients, or fails beside them.
    """
    if find_spec("ray") is None:
        raise Refusal("engine", "ray", "it needs Ray: pip install 'fedveil[ray]'")
    handler = signal.getsignal(signal.SIGTERM)
    _start_ray(settings)
    import ray

    try:
        cpus = settings.num_cpus or ray.cluster_resources().get("CPU", 0)
        grid = RayGrid(clients, max(1, min(math.ceil(cpus), clients.invited)))
        try:
            yield grid
        finally:
            grid.end()
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own in its place


class Trainer:
    """Actor that calls clients, and keeps the sum of a round's replies until it is fetched."""

    def __init__(self, clients: Clients, number: int) -> None:
        from ..tasks.hardware import be_worker

        be_worker(number)
        self._clients = clients
        self._sum = CohortSum(np.zeros(0))
        self._order: CohortOrder

    @cached_property
    def _grid(self) -> InProcessGrid:
        """The actor's clients; made in its first call, whose failure has a reason, and not with the actor."""
        return self._clients.grid()

    def ready(self) -> tuple[Stacks | None]:
        """Return, once this actor has started, how a cohort is divided into stacks; None within for one client at a time."""
        return (self._grid.stacks,)

    def add(self, nodes: Sequence[int], sum_start: SumStart | None, last: bool) -> Added:
        """Add the replies of these nodes to this actor's sum.

        Args:
          nodes: of clients.
          sum_start: instruction and size of a new sum, which replaces the present one; None continues that.
          last: whether this call returns the sum, so that no `fetch` follows.
        """
        if sum_start is not None:
            self._order, size = sum_start
            self._sum = CohortSum(np.zeros(size))
        self._sum = self._grid.add(replace(self._order, nodes=nodes), self._sum)
        return self.fetch() if last else Added(None, self._grid.stateful)

    def fetch(self) -> Added:
        """Return the sum since the round began."""
        return Added(self._sum, self._grid.stateful)

    def answers(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """Return the clients' replies, and the nodes that keep state here."""
        return [self._grid.answer(each, number) for number, each in enumerate(messages)], self._grid.stateful


@dataclass
class RayGrid(AskingGrid):
    """Grid whose nodes are called by Ray's actors.

    Attributes:
      clients: of the simulation.
      actors: number of actors, at least 1.
    """

    # Actors have numbers from 0. `_starting` has the number of each that has not answered yet, by its pending call; `_homes`
    # has the actor that keeps a node's state; `_stacks` is how a cohort is divided into stacks, if it is.

    clients: Clients
    actors: int
    _actors: dict[int, Any] = field(default_factory=dict[int, Any])
    _starting: dict[Any, int] = field(default_factory=dict[Any, int])
    _stacks: Stacks | None = None
    _homes: dict[int, int] = field(default_factory=dict[int, int])

    def __post_init__(self) -> None:
        import ray

        self._run = claim_identity(run_id=1)
        self._recipe = ray.put(self.clients)
        for number in range(self.actors):
            self._start(number)
        if len(here := self._live_actors(self.actors)) < self.actors:
            self.end()
            remedy = f"Ray had CPUs for {len(here)} actors; ask for fewer"
            raise Refusal("engine.num_cpus", self.actors, remedy)

    def end(self) -> None:
        """Kill the actors: others need their CPUs, however long somebody keeps this grid."""
        import ray

        for actor in self._actors.values():
            ray.kill(actor)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all clients."""
        return range(FIRST_NODE, FIRST_NODE + self.clients.count)

    def sum_replies(self, order: Message, nodes: Sequence[int], spec: SumSpec, size: int) -> CohortSum:
        """Deliver one instruction to every node and return the sum of the replies; clients of lost actors are dropped."""
        whole, total = order_for(order, nodes, spec, self._stacks), CohortSum(np.zeros(size))
        shares = _Shares(nodes, self._homes, self.actors, whole.stack)
        sum_start = _travelling((replace(whole, nodes=()), size))
        # Shares remain only if every actor of the last pass died; those that have started since take over.
        while shares.remaining and (here := self._live_actors()):
            self._train(here, sum_start, shares, total)
        total.drop(DIED, shares.remaining)
        return total

    def _train(self, here: list[int], sum_start: Any, shares: _Shares, total: CohortSum) -> None:
        """Deal shares to these actors until no share or no actor is left, and merge the sum of each into `total`."""
        import ray

        calls: dict[Any, int] = {}  # pending, with the actor's number
        fetched = set[int]()  # actors whose last call returns their sum
        ahead = 1 if shares.stack else AHEAD

        def give(index: int) -> None:
            """Send an actor its next share or, if none is left, fetch its sum."""
            is_first, actor = not shares.shares[index], self._actors[index]
            if share := shares.next(index):
                is_last = shares.stack > 0 or not shares.remaining  # then this call returns the sum
                calls[actor.add.remote(share, sum_start if is_first else None, is_last)] = index
            elif is_last := not is_first and index not in fetched:
                calls[actor.fetch.remote()] = index
            if is_last:
                fetched.add(index)

        for index in here * ahead:
            give(index)
        while calls:
            ready, late = ray.wait(list(calls), timeout=self._patience(ahead * shares.longest))
            for call in ready or late:
                if (index := calls.pop(call, None)) is None:
                    continue  # its actor is lost already
                if self._take(_result(call) if ready else None, index, shares, total):
                    give(index)
                else:
                    calls = {other: number for other, number in calls.items() if number != index}

    def _take(self, added: Added | None, index: int, shares: _Shares, total: CohortSum) -> bool:
        """Merge the result of an actor's call, None if it died or is late, into the total; return whether it is alive.

        A lost actor is replaced, and all clients of the sum that it has not returned are dropped.
        """
        if added is None:
            self._replace(index)
            total.drop(DIED, len(shares.shares[index]))
            shares.shares[index] = []
            return False
        self._homes |= dict.fromkeys(added.stateful, index)
        if added.part is not None:
            total.merge(added.part)
            shares.shares[index] = []
        return True

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Call the clients and yield their replies as the actors finish.

        Arguments as of `InProcessGrid.send_and_receive`.
        """
        import ray

        del timeout
        waiting = {message.metadata.dst_node_id: message for message in messages}
        if not (here := self._live_actors()):
            yield from (Message(Error(1, DIED), reply_to=message) for message in waiting.values())
            return
        homes = {node: here.index(self._homes[node]) for node in waiting if node in self._homes}
        shares = dict(zip(here, assign_nodes(list(waiting), homes, len(here)), strict=True))
        calls = {
            self._actors[index].answers.remote([waiting[node] for node in share]): index
            for index, share in shares.items()
            if share
        }
        while calls:
            ready, late = ray.wait(list(calls), timeout=self._patience(max(map(len, shares.values()))))
            for call in ready or late:
                index = calls.pop(call)
                answer = _result(call) if ready else None
                if answer is None:
                    self._replace(index)
                    yield from (Message(Error(1, DIED), reply_to=waiting[node]) for node in shares[index])
                    continue
                replies, stateful = answer
                self._homes |= dict.fromkeys(stateful, index)
                yield from replies

    def _patience(self, clients: int) -> float:
        """Return the seconds after which a call on so many clients is late."""
        return self.clients.deadline * clients + GRACE_SECONDS

    def _live_actors(self, required: int = 1) -> list[int]:
        """Return the numbers of the ready actors; if they are fewer than required, wait for some that are starting."""
        import ray

        if self._starting:
            missing = required - (self.actors - len(self._starting))
            seconds = START_SECONDS if missing > 0 else 0
            ready, _ = ray.wait(list(self._starting), num_returns=max(1, missing), timeout=seconds)
            for call in ready:
                index = self._starting.pop(call)
                if (stacks := _result(call)) is None:
                    self._replace(index)
                else:
                    (self._stacks,) = stacks
        return sorted({*range(self.actors)} - {*self._starting.values()})

    def _start(self, number: int) -> None:
        """Start an actor; it gets no share before it is ready."""
        import ray

        actor_type: Any = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(Trainer)
        actor = actor_type.remote(self._recipe, number)
        self._actors[number] = actor
        self._starting[actor.ready.remote()] = number

    def _replace(self, index: int) -> None:
        """Kill an actor and start another in its place; the state of its nodes is lost."""
        import ray

        ray.kill(self._actors[index])
        self._homes = {node: home for node, home in self._homes.items() if home != index}
        self._start(index)


class _Shares:
    """Shares of a cohort for actors. The first of each is three quarters of an even share, later ones are ever smaller.

    Args:
      nodes: of the cohort.
      homes: actors of the nodes that keep state, to which alone these go.
      actors: number of actors.
      stack: number of clients that are trained at once; then shares are even, and of whole stacks. 0 for one after the other.

    Attributes:
      shares: by actor, the nodes whose replies its present sum has or will have.
      longest: size of the largest share so far.
    """

    def __init__(self, nodes: Sequence[int], homes: Mapping[int, int], actors: int, stack: int = 0) -> None:
        self.shares: list[list[int]] = [[] for _ in range(actors)]
        self.longest, self.stack = 0, stack
        self._by_home = [[node for node in nodes if homes.get(node) == index] for index in range(actors)]
        self._rest = [node for node in nodes if node not in homes]
        self._first = math.ceil(len(self._rest) / (actors * 4 / 3))
        if stack:
            self._first = stack * math.ceil(len(self._rest) / stack / actors)

    @property
    def remaining(self) -> int:
        """Number of clients that are not dealt yet."""
        return len(self._rest) + sum(map(len, self._by_home))

    def next(self, index: int) -> list[int]:
        """Return the next share of an actor; empty when there is none."""
        share, self._by_home[index] = self._by_home[index], []
        if not share:
            half_of_even = math.ceil(len(self._rest) / (2 * len(self.shares)))
            size = half_of_even if self.shares[index] else self._first
            share, self._rest = self._rest[:size], self._rest[size:]
        self.shares[index] = [*self.shares[index], *share]
        self.longest = max(self.longest, len(share))
        return share


def _travelling(instruction: SumStart) -> Any:
    """Return an instruction for actors: itself if it is small, otherwise a reference to the object store."""
    import ray

    order, _ = instruction
    arrays = [each for record in order.content.array_records.values() for each in record.values()]
    size = sum(math.prod(each.shape) * np.dtype(each.dtype).itemsize for each in arrays)
    return ray.put(instruction) if size > INLINE_BYTES else instruction


def _result(call: Any) -> Any:
    """Return the result of a call; None if its actor died. RuntimeError if the actor's code failed."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(call)
    except RayTaskError as failure:
        raise RuntimeError(f"an actor failed: {failure.cause}") from failure
    except RayError:
        return None


def _start_ray(settings: Ray) -> None:
    """Start Ray on this machine, or connect to the cluster of the settings, unless this process has done so already."""
    for name, value in (RAY_DEFAULTS | ({} if settings.address else RAY_ON_LOOPBACK)).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    cpus = None if settings.address else math.ceil(settings.num_cpus or len(os.sched_getaffinity(0)))
    for further in (0,) if settings.address else range(START_ATTEMPTS)[::-1]:
        try:
            ray.init(address=settings.address or "local", num_cpus=cpus, **options)
            return
        except Exception as error:  # Ray's are of many kinds
            remedy = f"Ray did not start: {error}; use resume= once it can, or engine=inprocess"
            if not further:
                raise Refusal("engine", settings.address or "ray", remedy) from error
            warn(f"engine=ray: Ray did not start in time, as on a busy machine; trying again: {error}")
            ray.shutdown()  # of what has started
