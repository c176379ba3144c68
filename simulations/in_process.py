"""In-process engine: a Flower grid whose nodes are calls to the app's own ClientApp.

Arrays are passed without serialisation; a client gets its own copy and cannot see another's. Replies are clipped, put
on the lattice and added in the process that computed them. With several workers each is a forked process, one thread
each, that holds its share of the sum in shared memory; only that share comes back. Models live per worker, not per
client.
"""

from __future__ import annotations

import logging
import math
import mmap
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from ..messages.flower_adapter import claim_identity, client_context, name_message
from ..messages.grids import AskingGrid
from ..messages.wire import LATE, add_reply, is_query
from ..privacy.mechanisms.private_sum import CohortSum, add, encode
from ..privacy.mechanisms.sum_spec import SumSpec
from ..tasks.memory import keep_memory
from .deadline import PastDeadline, limited_to
from .warmup import Warmup

if TYPE_CHECKING:
    from ..client.training.in_place import InPlaceRound

logger = logging.getLogger("fedveil.client")  # what a simulated client logs stands in the run's folder

FIRST_NODE = 2  # node 1 is Flower's server
PARTS = 4  # stacks into which a cohort is divided for the sake of other processes
GRACE_SECONDS = 30.0  # beyond its clients' deadlines, before a worker that hangs in C code is killed

Values = dict[str, float | NDArray[np.floating]]  # one client's answer to a question, by the sum's segment
# Trains clients by their numbers on an instruction; returns the sum of their vectors, of the last argument's length.
CohortFunction = Callable[[RecordDict, Sequence[int], SumSpec, int], CohortSum]


def client_of_node(node: int) -> int:
    """Return the number of a simulated client, from 0, by the id of its node."""
    return node - FIRST_NODE


@dataclass
class InProcessGrid(AskingGrid):
    """Grid of calls to one ClientApp, in this process or in forked workers.

    Attributes:
      client_app: called once for every message.
      num_clients: the population; node ids run from 2 on.
      run_config: configuration that the app finds in its context.
      workers: processes, at least 1; with 1 the clients run in this very process.
      warmup: of training in this process, if there is one worker, after which it may take more.
      deadline: seconds that one client may take.
      cohort_function: trains many clients at once; None if the model or the training forbids it.
      stacks: how a cohort is divided for that function; None where it may be called with any clients.
      forks_first: whether this process trains nobody if it has workers, since a process that used a GPU cannot be forked.
      in_place: trains one client after the other without messages; None where only the app itself can train.
      release: closes what this process's clients have open, when the grid is closed.
      counter: returns the function of a client's values for a question; None, or None from it: the app is asked.
    """

    client_app: ClientApp
    num_clients: int
    run_config: dict[str, Any]
    workers: int = 1
    warmup: Warmup = field(default_factory=Warmup)
    deadline: float = 60.0
    cohort_function: CohortFunction | None = None
    stacks: Stacks | None = None
    forks_first: bool = False
    in_place: Callable[[RecordDict], InPlaceRound] | None = None
    release: Callable[[], None] = lambda: None
    counter: Callable[[RecordDict], Callable[[int], Values] | None] | None = None
    # By node, for clients that keep state: the context in this process, and the index of the worker that has it.
    _contexts: dict[int, Context] = field(default_factory=dict[int, Context])
    _homes: dict[int, int] = field(default_factory=dict[int, int])
    _pool: list[_Worker] = field(default_factory=list["_Worker"])

    def __post_init__(self) -> None:
        self._run = claim_identity(run_id=1)
        if self.workers == 1:
            keep_memory()

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all clients."""
        return range(FIRST_NODE, FIRST_NODE + self.num_clients)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Call the app for every message and yield its replies: one by one here, or all at once from the workers.

        At most one message goes to each client; its deadline applies, and `timeout` is ignored.
        """
        if self.workers > 1:
            yield from self._exchange_in_workers(list(messages))
            return
        for number, message in enumerate(messages):
            yield self.answer(message, number)

    def answer(self, message: Message, number: int) -> Message:
        """Call the message's client in this process, and return its reply; the message's id follows from `number`."""
        head = message.metadata
        return self._call(message.content, head.dst_node_id, head.message_type, number)

    def sum_replies(self, order: Message, nodes: Sequence[int], spec: SumSpec, size: int) -> CohortSum:
        """Deliver one instruction to every node and return the sum of the replies.

        Returns:
          The sum, shape (size,), and the counts of replies and of those that are missing.
        """
        orders = order_for(order, nodes, spec, self.stacks)
        if self.workers == 1:
            return self._sum_here(orders, size)
        if len(nodes) <= orders.stack and not self.forks_first:  # indivisible
            return self.add(orders, CohortSum(np.zeros(size)))
        return self._sum_in_workers(orders, size)

    def _sum_here(self, order: CohortOrder, size: int) -> CohortSum:
        """Return the sum of the replies to an order, added in this process; take workers from then on if they pay."""
        with self.warmup.timed():
            cohort_sum = self.add(order, CohortSum(np.zeros(size)))
        if not self._contexts:  # otherwise each worker would begin with the state of all clients
            self.workers = self.warmup.workers
        return cohort_sum

    def add(self, order: CohortOrder, cohort_sum: CohortSum) -> CohortSum:
        """Add the replies of an order's nodes in this process, and return the sum.

        Args:
          order: the instruction and its nodes.
          cohort_sum: sum to which the replies are added in place; clients without a usable one are counted.
        """
        if is_query(order.content):  # nobody trains for it
            values_of_client = self.counter and self.counter(order.content)
            if values_of_client is None:
                return self._sum_one_by_one(order, cohort_sum)
            return self._sum_values(values_of_client, order, cohort_sum)
        if self.cohort_function is not None:
            clients = [client_of_node(node) for node in order.nodes]
            stack = order.stack or max(1, len(clients))
            for first in range(0, len(clients), stack):
                together = clients[first : first + stack]
                cohort_sum.merge(
                    self.cohort_function(order.content, together, order.spec, cohort_sum.total.size)
                )
            return cohort_sum
        if self.in_place is not None:
            self._sum_in_place(self.in_place(order.content), order, cohort_sum)
            return cohort_sum
        return self._sum_one_by_one(order, cohort_sum)

    def _sum_one_by_one(self, order: CohortOrder, cohort_sum: CohortSum) -> CohortSum:
        """Add the replies of the app itself, with a message to each node."""
        for number, node in enumerate(order.nodes):
            add_reply(cohort_sum, self._call(order.content, node, order.message_type, number), order.spec)
        return cohort_sum

    def _sum_values(
        self, values_of_client: Callable[[int], Values], order: CohortOrder, cohort_sum: CohortSum
    ) -> CohortSum:
        """Add the clients' values of a question, encoded here, without messages."""
        for node in order.nodes:
            try:
                with limited_to(self.deadline):
                    vector, _ = encode({}, values_of_client(client_of_node(node)), order.spec)
            except PastDeadline:
                cohort_sum.drop("late")
            except Exception:
                logger.exception("a question failed at this client")
                cohort_sum.drop("failed")
            else:
                add(cohort_sum, vector, order.spec)
        return cohort_sum

    def _sum_in_place(self, round_in_place: InPlaceRound, order: CohortOrder, cohort_sum: CohortSum) -> None:
        """Add the updates of clients that train in this process's model, one after the other, and of canary clients."""
        for node in order.nodes:
            client = client_of_node(node)
            if round_in_place.add_canary(client, cohort_sum, order.spec):
                continue
            try:
                with limited_to(self.deadline):
                    scalars = round_in_place.train(client)
            except PastDeadline:
                cohort_sum.drop("late")
                continue
            round_in_place.add(cohort_sum, scalars, order.spec)

    def _call(self, content: RecordDict, node: int, message_type: str, number: int) -> Message:
        """Return the app's reply for one node; an error if it is late, or fails in any other way."""
        message = Message(_isolated(content), node, message_type)
        name_message(message, str(number + 1))
        context = self._context(node)
        try:
            with limited_to(self.deadline):
                reply = self.client_app(message, context)
        except PastDeadline:
            return Message(Error(LATE, "late"), reply_to=message)
        except Exception:  # noqa: BLE001 (a client may fail in any way; it is dropped and counted)
            return Message(Error(1, "the client failed"), reply_to=message)
        if context.state:
            self._contexts[node] = context
        return reply

    def _context(self, node: int) -> Context:
        client = client_of_node(node)
        return self._contexts.get(node) or client_context(
            self._run.run_id, client, self.num_clients, self.run_config
        )

    @property
    def stateful(self) -> list[int]:
        """The nodes whose clients keep state in this process, in order."""
        return sorted(self._contexts)

    # --- workers --------------------------------------------------------------------------------------------------

    def _sum_in_workers(self, order: CohortOrder, size: int) -> CohortSum:
        """Return the sum of the replies to an order, each worker's share of which lies in shared memory."""
        if self._pool and self._pool[0].size != size:
            self.close()
        total, nodes = CohortSum(np.zeros(size)), order.nodes
        shares = assign_nodes(nodes, self._homes, self.workers)
        if order.stack:
            stacks = [nodes[first : first + order.stack] for first in range(0, len(nodes), order.stack)]
            shares = [list(chain(*stacks[index :: self.workers])) for index in range(self.workers)]
        for worker, share, outcome in self._in_workers(
            shares, lambda share: replace(order, nodes=share), size
        ):
            if outcome is None:
                total.drop("worker died", len(share))
            else:
                total.merge(CohortSum(np.frombuffer(worker.shared, np.float64, size), *outcome))
        return total

    def _exchange_in_workers(self, messages: list[Message]) -> Iterator[Message]:
        """Answer each node in the worker that keeps its state; at most one message per node."""
        waiting = {message.metadata.dst_node_id: message for message in messages}
        shares = assign_nodes(list(waiting), self._homes, self.workers)
        for _, share, outcome in self._in_workers(shares, lambda share: [waiting[node] for node in share], 0):
            if outcome is None:
                yield from (Message(Error(1, "worker died"), reply_to=waiting[node]) for node in share)
            else:
                yield from outcome[0]

    def _in_workers(
        self, shares: list[list[int]], order_to: Callable[[list[int]], CohortOrder | list[Message]], size: int
    ) -> Iterator[tuple[_Worker, list[int], list[Any] | None]]:
        """Yield each worker that has a share with it and its answer; None if it died or timed out, and was replaced."""
        if not self._pool:
            self._pool = [self._start(size, number) for number in range(self.workers)]
        due = [(*each, index) for index, each in enumerate(zip(self._pool, shares, strict=True)) if each[1]]
        for worker, share, _ in due:
            worker.give(order_to(share))
        for worker, share, index in due:
            answer = worker.receive(self.deadline * len(share) + GRACE_SECONDS)
            if answer is None:
                worker.end()
                self._pool[index] = self._start(worker.size, index)
                yield worker, share, None
                continue
            *outcome, stateful = answer
            self._homes |= dict.fromkeys(stateful, index)
            yield worker, share, outcome

    def _start(self, size: int, number: int) -> _Worker:
        """Fork worker `number`, from 0, with shared memory for a sum of `size` coordinates; the child does not return."""
        shared = mmap.mmap(-1, max(size, 1) * 8)
        ours, theirs = multiprocessing.Pipe()
        process = os.fork()
        if process == 0:
            from ..tasks.hardware import be_worker  # torch, which a plan does without

            ours.close()
            be_worker(number)
            self._work(theirs, np.frombuffer(shared, np.float64, size))
        theirs.close()
        return _Worker(process, ours, shared, size)

    def _work(self, orders: Connection, total: np.ndarray) -> None:
        """Serve orders until the parent closes the pipe, then exit. Signals to the group are left to the parent.

        For an order it leaves the sum in `total`, which is shared, and sends the counts; for messages, their replies.
        Each answer ends with the nodes that keep state here, which must be given to this worker from then on.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        keep_memory()
        with suppress(EOFError, BrokenPipeError):
            while True:
                order: CohortOrder | list[Message] = orders.recv()
                if isinstance(order, list):
                    replies = [self.answer(message, number) for number, message in enumerate(order)]
                    orders.send((replies, self.stateful))
                else:
                    total[:] = 0
                    cohort_sum = self.add(order, CohortSum(total))
                    counts = cohort_sum.replies, cohort_sum.clipped_again, cohort_sum.dropped
                    orders.send((*counts, self.stateful))
        os._exit(0)

    def close(self) -> None:
        """End the workers, and close what the clients of this process have open."""
        for worker in self._pool:
            worker.end()
        self._pool = []
        self.release()


@dataclass(frozen=True)
class Stacks:
    """Rule by which a cohort is divided into stacks of clients that are trained at once.

    A model's bits depend on its clients' stacks, so that these follow from the cohort alone, and whole stacks go to
    workers: a run is the same with any number of them.

    Attributes:
      fewest: clients of a stack, if the cohort is divided only for the sake of another process.
      most: clients of a stack.
    """

    fewest: int
    most: int

    def size(self, clients: int) -> int:
        """Return the number of clients in each stack of a cohort, at least 1; the last stack has the rest."""
        stacks = 1
        while clients > self.most * stacks or (stacks < PARTS and clients >= 2 * self.fewest * stacks):
            stacks *= 2
        return max(1, math.ceil(clients / stacks))


@dataclass(frozen=True)
class CohortOrder:
    """One instruction and its nodes.

    Attributes:
      content: records of the instruction.
      message_type: such as "train".
      nodes: nodes of the clients that follow it.
      spec: format of the sum and of its vectors.
      stack: number of the nodes in turn that are trained at once, where they are.
    """

    content: RecordDict
    message_type: str
    nodes: Sequence[int]
    spec: SumSpec
    stack: int = 0


def order_for(message: Message, nodes: Sequence[int], spec: SumSpec, stacks: Stacks | None) -> CohortOrder:
    """Return the order that delivers a message to these nodes, in stacks where they train in stacks.

    Args:
      message: instruction, or question, for which nobody trains.
      nodes: of the cohort.
      spec: format of the sum.
      stacks: how a cohort is divided; None if clients train one by one.
    """
    stack = 0
    if stacks and not is_query(message.content):
        stack = stacks.size(len(nodes))
    return CohortOrder(message.content, message.metadata.message_type, nodes, spec, stack)


@dataclass(frozen=True)
class _Worker:
    """Forked process, its pipe, and the shared memory for its share of a sum, of `size` float64 numbers."""

    process: int
    pipe: Connection
    shared: mmap.mmap
    size: int

    def give(self, order: CohortOrder | list[Message]) -> None:
        with suppress(BrokenPipeError):
            self.pipe.send(order)

    def receive(self, seconds: float) -> Any:
        """Return the worker's answer; None if it died or timed out."""
        try:
            return self.pipe.recv() if self.pipe.poll(seconds) else None
        except (EOFError, ConnectionError):
            return None

    def end(self) -> None:
        """Kill the process, which may hang, and wait until it is gone."""
        self.pipe.close()
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.process, 0)


def assign_nodes(nodes: Sequence[int], homes: Mapping[int, int], workers: int) -> list[list[int]]:
    """Return the nodes dealt evenly; a node with state goes to the worker that holds it.

    Args:
      nodes: nodes that get an order, one for each client.
      homes: number of the worker of each node that keeps state.
      workers: number of workers.
    """
    shares: list[list[int]] = [[] for _ in range(workers)]
    for node in sorted(nodes, key=lambda node: node not in homes):  # those with a home first
        (shares[homes[node]] if node in homes else min(shares, key=len)).append(node)
    return shares


def _isolated(content: RecordDict) -> RecordDict:
    """Return a record that a client may modify: new dictionaries over arrays that are copied when read."""
    out = RecordDict()
    for name, record in content.items():
        out[name] = record.copy() if isinstance(record, ArrayRecord | ConfigRecord) else record
    return out
