"""Adapter to private parts of Flower's Python API; the parts for a deployment are in `links/flower/`.

Contract tests check this file, and `fleet_calls.py` and `control_calls.py` there, against the pinned release of Flower.
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
QUIET = ("flwr", "httpx", "alembic")  # loggers of Flower and its libraries

Kind = TypeVar("Kind", ArrayRecord, ConfigRecord, MetricRecord)


def claim_identity(run_id: int, task_id: int = TASK_ID) -> Run:
    """Set the run and task ids by which this process may create messages outside Flower's runtime; return their run."""
    TaskIdentity.task_id = task_id
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE
    return Run.create_empty(run_id=run_id)


def name_message(message: Message, message_id: str) -> None:
    """Set the id of a message, as Flower's link does; its reply refers to this id."""
    message.metadata.__dict__["_message_id"] = message_id


def name_sender(reply: Message, node: int) -> Message:
    """Set the number of the node that sent a reply, whatever sender it names, and return the reply."""
    reply.metadata.__dict__["_src_node_id"] = node
    return reply


def delivered_message(payload: RecordDict | Error, metadata: Metadata) -> Message:
    """Return a message with received metadata, as a link delivers it."""
    message_type: Any = Message  # its published overloads leave out the metadata
    return message_type(payload, metadata=metadata)


def records_of(content: RecordDict, kind: type[Kind]) -> dict[str, Kind]:
    """Return the records of one kind by name.

    Flower's own properties, such as `array_records`, create a reference cycle. The arrays, megabytes of a model, would
    then stay in memory until the garbage collector runs, which counts objects and not bytes.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def config_of(content: RecordDict, name: str) -> ConfigRecord:
    """Return the configuration record with this name; an empty one if there is none."""
    record = content.get(name)
    if isinstance(record, ConfigRecord):
        return record
    return ConfigRecord()


def values_under(content: RecordDict, key: str) -> list[object]:
    """Return the values of a key in all configuration records of an instruction, normally one at most."""
    return [record[key] for record in records_of(content, ConfigRecord).values() if key in record]


def quiet_flower() -> None:
    """Silence the logs of Flower and its libraries except errors; fedveil displays the run itself."""
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


@cache
def report_in_sentences(*kinds: type[Exception]) -> None:
    """Make Flower log exceptions of these types, which are users' mistakes, as a sentence without a traceback."""

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, kinds):
            record.msg, record.args, record.exc_info = "%s", (error,), None
        return True

    logging.getLogger("flwr").addFilter(shorten)


@contextmanager
def start_checked(check: Callable[[Strategy, object, object], None]) -> Generator[None]:
    """Call `check(strategy, grid, evaluate_fn)` before any strategy starts in the block.

    Flower passes `evaluate_fn` to the strategy only, and calls it before it uses the grid.
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
    """Return the context of the simulated node of a client, from 0, with Flower's own keys for its partition."""
    node_config: UserConfig = {"partition-id": client, "num-partitions": num_clients}
    return Context(
        run_id=run_id, node_id=client + 2, node_config=node_config, state=RecordDict(), run_config=run_config
    )


def nodes_by_partition(grid: Grid) -> list[int]:
    """Return the ids of a simulation's registered nodes, in the order of their partitions.

    Flower draws ids at random, and sends the number of a partition to its client only. It registers nodes in the order
    of their partitions, and the simulation's link state returns them in that order.

    Raises:
      TypeError: the grid does not belong to Flower's simulation runtime.
    """
    state = getattr(grid, "state", None)
    if state is None:
        raise TypeError(f"{type(grid).__name__} is not the grid of Flower's simulation runtime")
    return [int(info.node_id) for info in state.get_node_info()]
