"""Calls of a SuperLink's operator (Flower's Control and Runtime interfaces), made on the loopback address.

Access to these interfaces allows running code on the server, and on every SuperNode that installs sent apps.
"""

from __future__ import annotations

import io
import logging
import time
import zipfile
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import httpx
from flwr.app import Message
from flwr.common.constant import SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from ...messages.flower_adapter import claim_identity
from .fleet_calls import beating, node_fingerprint, pull_message

logger = logging.getLogger("fedveil.server")

# Flower's own command, on a Unix socket in the place of a port; it ends with the process that started it.
SUPERLINK = """
import functools, sys, uvicorn
uvicorn.run = functools.partial(uvicorn.run, uds=sys.argv.pop(1))
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.superlink.cli import flower_superlink
start_parent_process_monitor(int(sys.argv.pop(1)))
sys.argv[0] = "flower-superlink"
flower_superlink()
"""
# The app that a run must have. It holds no code: the server's end is this process, and clients run what they installed.
APP = """
[project]
name = "fedveil-link"
version = "1.0.0"
description = "Carries messages of fedveil."
license = "Apache-2.0"
[tool.flwr.app]
publisher = "fedveil"
[tool.flwr.app.components]
serverapp = "fedveil:served_elsewhere"
clientapp = "fedveil:installed_by_its_owner"
"""
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
BEAT_SECONDS = 10.0  # Flower gives a task up after 60
OUTAGE_SECONDS = 60.0  # how long a call waits for a SuperLink that restarts
POLL_SECONDS = 0.1  # between two requests for the run's task
CLAIM_SECONDS = 20.0  # for that task to be assigned
RUN_LOST = (httpx.HTTPError, RunNotRunningException)  # errors of a grid's calls after the end of its run


def admit(address: str, keys: Collection[bytes]) -> None:
    """Register the SuperNodes with these keys, and unregister all others.

    Args:
      address: host and port of the SuperLink.
      keys: public keys in PEM.

    Raises:
      httpx.HTTPError: the SuperLink refuses, or is not there.
    """
    with ControlHttpClient(f"http://{address}") as control:
        nodes = control.ListNodes(ListNodesRequest()).nodes_info
        ids = {info.public_key: info.node_id for info in nodes if info.status != NodeStatus.UNREGISTERED}
        for key in ids.keys() - set(keys):
            control.UnregisterNode(UnregisterNodeRequest(node_id=ids[key]))
        for key in set(keys) - ids.keys():
            control.RegisterNode(RegisterNodeRequest(public_key=key))


@dataclass(frozen=True)
class AnnouncedReply:
    """Reply that a node has begun to deliver.

    Attributes:
      question: id of the message that it replies to.
      fetch: returns the reply, or None if it does not come within the given seconds or is no message.
    """

    question: str
    fetch: Callable[[float], Message | None]


class ServedRun:
    """Run of a SuperLink, by Flower's own grid but without its waiting.

    Flower's grid sleeps 3 s between two looks, and a node that announces a reply and never sends it stops it for three
    minutes. Every call raises one of `RUN_LOST` when the run is over or the SuperLink stays away.

    Args:
      grid: Flower's, connected to the run.
      max_bytes: size of the largest reply that is accepted.
    """

    def __init__(self, grid: HttpGrid, max_bytes: int) -> None:
        self._grid, self._max_bytes = grid, max_bytes
        self.run = grid.run

    def online_nodes(self) -> dict[str, int]:
        """Return the connected SuperNodes: fingerprints of their keys to the ids that Flower drew for them."""
        return {node_fingerprint(info.public_key): info.node_id for info in self._grid.get_nodes()}

    def push(self, messages: list[Message]) -> list[str]:
        """Deliver messages and return their ids; an id is empty if the node is no longer known."""
        return list(self._grid.push_messages(messages))

    def replies(self, questions: Collection[str]) -> list[AnnouncedReply]:
        """Return the replies to these message ids that were announced since the last call, each once."""
        client = self._grid._runtime_client  # pyright: ignore[reportPrivateUsage]
        response = client.PullMessages(PullAppMessagesRequest(message_ids=questions))
        return [
            AnnouncedReply(message.metadata.reply_to_message_id, partial(self._fetch, client, tree))
            for message, tree in zip(response.messages_list, response.message_object_trees, strict=True)
        ]

    def _fetch(self, client: RuntimeHttpClient, tree: ObjectTree, seconds: float) -> Message | None:
        """Return the reply with these parts; None if it does not come within the seconds, or is no message."""
        node, run = self._grid.node, self.run.run_id
        try:
            return pull_message(client, node, run, tree, self._max_bytes, seconds)
        except Exception as error:  # noqa: BLE001 (whatever one reply is, it costs that reply)
            logger.warning("a reply does not come, or cannot be read: %s", type(error).__name__)
            return None


@contextmanager
def open_run(address: str, secret: bytes, max_bytes: int) -> Generator[ServedRun]:
    """Start a run and serve it, as Flower's own executor would; the run ends with the context.

    Args:
      address: host and port of a SuperLink that leaves its tasks to others (`--isolation process`).
      secret: shows that this process may take them.
      max_bytes: size of the largest reply that is accepted.

    Raises:
      httpx.HTTPError: the SuperLink refuses, or is not there.
      TimeoutError: another executor took the task.
    """
    with ControlHttpClient(f"http://{address}") as control:
        run_id = control.StartRun(StartRunRequest(fab=Fab(content=_app()))).run_id
    token = _claim_task(address, secret, run_id)
    with _runtime(address, RuntimeTokenHttpInterceptor(token)) as task:
        task_input = task.PullTaskInput(PullTaskInputRequest())
        grid = HttpGrid(address, insecure=True, token=token)
        grid._retry_invoker.max_time = OUTAGE_SECONDS  # pyright: ignore[reportPrivateUsage]
        grid.set_run(run_from_proto(task_input.run))
        claim_identity(run_id, task_input.task_id)
        try:
            with beating(lambda: task.SendTaskHeartbeat(SendTaskHeartbeatRequest()), BEAT_SECONDS):
                yield ServedRun(grid, max_bytes)
        finally:
            grid.close()
            with suppress(httpx.HTTPError):
                task.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))


def _app() -> bytes:
    """Return `APP` as Flower takes it, a ZIP file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as app:
        app.writestr("pyproject.toml", APP)
    return file.getvalue()


def _claim_task(address: str, secret: bytes, run_id: int) -> str:
    """Return the token of the run's task; tasks of other runs are left to fail."""
    auth = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[ACQUIRE])
    end = time.monotonic() + CLAIM_SECONDS
    with _runtime(address, auth) as executor:
        while time.monotonic() < end:
            response = executor.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if response.token and response.task.run_id == run_id:
                return response.token
            if not response.token:
                time.sleep(POLL_SECONDS)
    raise TimeoutError(f"no task was assigned for run {run_id}")


def _runtime(
    address: str, auth: RuntimeTokenHttpInterceptor | SuperExecAuthHttpInterceptor
) -> RuntimeHttpClient:
    """Return a client of Flower's Runtime interface, which authenticates its calls by `auth`."""
    version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
    return RuntimeHttpClient.from_server_address(address, True, None, [version, auth])
