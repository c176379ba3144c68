"""Adapter to parts of Flower that it does not publish; those of its deployment stand in `links/flower/`.

Contract tests hold `fleet_calls.py` and `control_calls.py` there, and this file, to the pinned release.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.user_config import UserConfig
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.serverapp import Grid

SERVER_NODE = 1  # flwr.supercore.constant.SUPERLINK_NODE_ID
RUN_ID = 1
TASK_ID = 1
QUIET = ("flwr", "httpx", "alembic")  # loggers of Flower, and of what it calls with

Kind = TypeVar("Kind", ArrayRecord, ConfigRecord, MetricRecord)


def claim_identity(run_id: int, task_id: int = TASK_ID) -> Run:
    """Let this process create messages outside Flower's runtime, and return the run that they belong to."""
    TaskIdentity.task_id = task_id
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE
    return Run.create_empty(run_id=run_id)


def name_message(message: Message, message_id: str) -> None:
    """Give a message the id that Flower's link would give it, by which its reply is known."""
    message.metadata.__dict__["_message_id"] = message_id


def name_sender(reply: Message, node: int) -> Message:
    """Return the reply as if it came from the node of that number."""
    reply.metadata.__dict__["_src_node_id"] = node
    return reply


def arrived(payload: RecordDict | Error, metadata: Metadata) -> Message:
    """Return a message as a link delivers it, with the metadata that came with it."""
    made: Any = Message  # its published overloads leave out the metadata
    return made(payload, metadata=metadata)


def records_of(content: RecordDict, kind: type[Kind]) -> dict[str, Kind]:
    """Return the records of one kind by name.

    Flower's own `array_records` and the like put the content into a reference cycle. Its arrays, megabytes of a model,
    then stay until the garbage collector runs, which counts objects and not bytes.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def quiet_flower(level: int = logging.ERROR) -> None:
    """Silence the logs of Flower and its libraries below `level`; fedveil's own table reports the run."""
    for name in QUIET:
        logging.getLogger(name).setLevel(level)


@cache
def report_in_sentences(*kinds: type[Exception]) -> None:
    """Let Flower report these errors, which are no fault of the code, in a sentence and without a traceback."""

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, kinds):
            record.msg, record.args, record.exc_info = "%s", (error,), None
        return True

    logging.getLogger("flwr").addFilter(shorten)


@contextmanager
def start_checked(check: Callable[[object, object], None]) -> Generator[None]:
    """Call `check` with the grid and the `evaluate_fn` before any strategy starts in the block.

    Flower hands `evaluate_fn` to the strategy alone, and calls it before the grid is used at all.

    Args:
      check: may refuse.
    """
    start = Strategy.start

    @wraps(start)
    def checked(*args: Any, **kwargs: Any) -> Result:
        given = signature(start).bind(*args, **kwargs).arguments
        check(given["grid"], given.get("evaluate_fn"))
        return start(*args, **kwargs)

    Strategy.start = checked
    try:
        yield
    finally:
        Strategy.start = start


def client_context(run_id: int, client: int, num_clients: int, run_config: dict[str, Any]) -> Context:
    """Return the context of one simulated node, with Flower's own keys for its partition.

    Args:
      run_id: Flower's number of the run.
      client: number of the client, from 0.
      num_clients: number of clients.
      run_config: configuration of the run.
    """
    node_config: UserConfig = {"partition-id": client, "num-partitions": num_clients}
    return Context(
        run_id=run_id, node_id=client + 2, node_config=node_config, state=RecordDict(), run_config=run_config
    )


def nodes_by_partition(grid: Grid) -> list[int]:
    """Return the ids of a simulation's nodes so far, that of partition 0 first.

    Flower draws the ids at random and tells only the client which partition it got. Nodes are registered in the order
    of their partitions, and the simulation's link state keeps that order.

    Raises:
      TypeError: the grid is not that of Flower's simulation runtime.
    """
    state = getattr(grid, "state", None)
    if state is None:
        raise TypeError(f"{type(grid).__name__} is not the grid of Flower's simulation runtime")
    return [int(info.node_id) for info in state.get_node_info()]


@dataclass(frozen=True)
class Runtime:
    """Flower's simulation runtime, at work in a thread of this process.

    Attributes:
      grid: reaches the clients.
      stop: set it to end the runtime.
      thread: ends after `stop`, or when the runtime fails.
      failures: why it failed, if it did.
    """

    grid: Grid
    stop: threading.Event
    thread: threading.Thread
    failures: list[Exception] = field(default_factory=list[Exception])


def new_link() -> tuple[LinkStateFactory, Grid, Run]:
    """Return a link state in memory that holds one run, the grid on it, and the run."""
    from flwr.proto.task_pb2 import Task
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState, RunRecord
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink.federation import NoOpFederationManager
    from flwr.superlink.grid import InMemoryGrid

    run = claim_identity(RUN_ID)
    run.primary_task_id, run.federation_id = TASK_ID, NOOP_FEDERATION_ID
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = factory.state()
    assert isinstance(state, InMemoryLinkState)
    state.run_ids[run.run_id] = RunRecord(run=run)
    state.task_store[TASK_ID] = Task(task_id=TASK_ID, run_id=run.run_id)
    grid = InMemoryGrid(state_factory=factory)
    grid.set_run(run)
    return factory, grid, run


def start_runtime(client_app: ClientApp, num_clients: int, backend: dict[str, Any]) -> Runtime:
    """Start Flower's simulation runtime on Ray, with the server side left to the caller.

    Flower's own entry points run the server in a thread, where signals do not arrive and an interrupted run cannot end
    in order. Here the clients' side runs in the thread instead.

    Args:
      client_app: run by every client, in Ray's actors.
      num_clients: number of nodes; node k has partition k.
      backend: Flower's backend configuration.
    """
    from flwr.server.superlink.fleet.vce import vce_api
    from flwr.server.superlink.fleet.vce.metrics import VceMetrics

    factory, grid, run = new_link()
    stop, failures = threading.Event(), list[Exception]()

    def work() -> None:
        try:
            vce_api.start_vce(
                backend_name="ray",
                backend_config_json_stream=json.dumps(backend),
                app_dir="",
                is_app=False,
                f_stop=stop,
                run=run,
                metrics=VceMetrics(),
                client_app=client_app,
                num_supernodes=num_clients,
                state_factory=factory,
            )
        except Exception as failure:  # noqa: BLE001 (handed to whoever waits for replies)
            failures.append(failure)

    thread = threading.Thread(target=work, name="flower runtime", daemon=True)
    thread.start()
    return Runtime(grid, stop, thread, failures)
