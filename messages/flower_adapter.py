"""Adapter to parts of Flower that it does not publish; those of its deployment stand in `links/flower/`.

Contract tests hold `fleet_calls.py` and `control_calls.py` there, and this file, to the pinned release.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.user_config import UserConfig
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    from flwr.serverapp import Grid

SERVER_NODE = 1  # flwr.supercore.constant.SUPERLINK_NODE_ID
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


def delivered_message(payload: RecordDict | Error, metadata: Metadata) -> Message:
    """Return a message as a link delivers it, with the metadata that came with it."""
    message_type: Any = Message  # its published overloads leave out the metadata
    return message_type(payload, metadata=metadata)


def records_of(content: RecordDict, kind: type[Kind]) -> dict[str, Kind]:
    """Return the records of one kind by name.

    Flower's own `array_records` and the like put the content into a reference cycle. Its arrays, megabytes of a model,
    then stay until the garbage collector runs, which counts objects and not bytes.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def config_of(content: RecordDict, name: str) -> ConfigRecord:
    """Return the configuration record of a name; an empty one if there is none."""
    return records_of(content, ConfigRecord).get(name, ConfigRecord())


def values_under(content: RecordDict, key: str) -> list[object]:
    """Return what an instruction's configuration records hold under a key, which no more than one of them should have."""
    return [record[key] for record in records_of(content, ConfigRecord).values() if key in record]


def quiet_flower() -> None:
    """Silence the logs of Flower and its libraries but for errors; fedveil's own table reports the run."""
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


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
def start_checked(check: Callable[[Strategy, object, object], None]) -> Generator[None]:
    """Call `check` with the strategy, the grid and the `evaluate_fn` before any strategy starts in the block.

    Flower hands `evaluate_fn` to the strategy alone, and calls it before the grid is used at all.
    """
    start = Strategy.start

    @wraps(start)
    def checked(*args: Any, **kwargs: Any) -> Result:
        arguments = signature(start).bind(*args, **kwargs).arguments
        check(arguments["self"], arguments["grid"], arguments.get("evaluate_fn"))
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
