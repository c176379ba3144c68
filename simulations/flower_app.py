"""Flower app of the main job, for ``flwr run``: both sides compose the same settings from one run-config string.

``simulations/quickstart`` is the app folder that points here.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp import Grid, ServerApp

from ..base.refusal import Refusal
from ..client.app import make_client_app
from ..configs.schema import LedgerSettings, SimulationSettings
from ..configs.settings import settings_from_overrides
from ..messages.flower_adapter import name_sender, nodes_by_partition, report_in_sentences
from ..messages.grids import PassingGrid
from ..modes.federation import Federation
from ..privacy.ledger.caps import default_folder
from ..run.build import build
from ..run.client_instructions import client_settings
from ..run.record_ledgers import client_ledgers_of
from ..server.run_status import Status
from .engines import client_mods
from .in_process import FIRST_NODE, GRACE_SECONDS
from .simulate import simulate

RUNS = Path.home() / ".local" / "share" / "fedveil" / "runs"
POLL_SECONDS = 0.05  # half of Flower's own interval
START_SECONDS = 60.0  # for the nodes to register; they need milliseconds
SETTLE_SECONDS = 0.5  # no more nodes for so long: registration is over


def settings_of(context: Context) -> SimulationSettings:
    """Return the settings that the user gave as ``flwr run -c "overrides='...'"``."""
    return settings_from_overrides(shlex.split(str(context.run_config["overrides"])))


def folder_of(context: Context) -> Path:
    """Return the run folder, outside the runtime's own working directory, where nobody would look for results."""
    folder = Path(str(context.run_config["folder"]) or RUNS / str(context.run_id))
    if not folder.is_absolute():
        remedy = "give an absolute path: the runtime works in a folder of its own"
        raise Refusal("folder", str(folder), remedy)
    return folder


def _text_of(context: Context) -> str:
    """Return the settings of a client, as JSON, from its run and node configuration."""
    # The data's owner decides where ledgers lie, and so which caps apply; the run's configuration does not.
    ledgers = str(context.node_config.get("ledger-dir", default_folder()))
    return _client_settings(str(context.run_config["overrides"]), folder_of(context), ledgers)


@lru_cache(maxsize=1)
def _federation(overrides: str) -> Federation:
    """Return the federation of the run, which all clients in a process of the runtime share."""
    return build(settings_from_overrides(shlex.split(overrides)), announced=True)


@lru_cache(maxsize=1)
def _client_settings(overrides: str, folder: Path, ledgers: str) -> str:
    """Return the settings of every client as JSON, after earlier losses were charged to the ledgers in their folder."""
    federation = _federation(overrides)
    with_ledgers = federation.settings.model_copy(update={"ledger": LedgerSettings(dir=ledgers)})
    federation = replace(federation, settings=with_ledgers)
    settings = client_settings(federation, folder, with_ledgers.num_rounds)
    client_ledgers_of(federation, settings).settle()
    return settings.to_json()


def conditions(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Call the app within the mods of the settings, which only the context of the run's messages gives."""
    for mod in reversed(client_mods(_federation(str(context.run_config["overrides"])))):
        call_next = _around(mod, call_next)
    return call_next(message, context)


def _around(mod: Mod, call_next: ClientAppCallable) -> ClientAppCallable:
    """Return the app with a mod around it."""
    return lambda message, context: mod(message, context, call_next)


# Flower looks for plain assignments in this module's text.
server = ServerApp()
client = make_client_app(_text_of, (conditions,))


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation on the runtime's grid.

    Raises:
      RuntimeError: the run failed, so that Flower reports it as failed.
    """
    report_in_sentences(Refusal)
    settings, folder = settings_of(context), folder_of(context)
    if settings.resume:
        raise Refusal("resume", settings.resume, "flwr run starts runs; fedveil simulate resumes them")
    clients = build(settings, announced=True).task.num_clients
    outcome = simulate(settings, folder, grid=FlowerGrid(grid, clients, settings.engine.deadline))
    if outcome.result["status"] == Status.FAILED:
        raise RuntimeError(outcome.result["reason"])


class FlowerGrid(PassingGrid):
    """Grid of Flower's simulation runtime whose clients are named by their partition.

    Flower gives its nodes random ids, so that a seeded draw among them would pick other clients in every run. Here
    client k is node `FIRST_NODE` + k, as on the in-process engine, and the same seed draws the same clients on both.

    Args:
      grid: grid of Flower's simulation runtime.
      num_clients: how many clients the task has.
      deadline: seconds that one client may take; replies are awaited for the deadlines of all asked clients together,
        so that a client that no alarm can stop does not block the run.
    """

    def __init__(self, grid: Grid, num_clients: int, deadline: float = math.inf) -> None:
        super().__init__(grid)
        self._num_clients = num_clients
        self._deadline = deadline
        self._nodes: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all clients, once they have registered.

        Raises:
          Refusal: the federation has another number of nodes than the task has clients.
        """
        if not self._nodes:
            self._nodes = self._registered()
        return range(FIRST_NODE, FIRST_NODE + len(self._nodes))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass messages to the runtime and return their ids."""
        self.get_node_ids()
        return self._grid.push_messages([self._addressed(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the available replies."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Pass the messages to the runtime and yield its replies as they arrive.

        Args:
          messages: messages, at most one to each client.
          timeout: seconds to wait for all replies; the clients' deadlines may end it earlier.
        """
        requests = list(messages)
        waiting = {
            key: message.metadata.dst_node_id
            for key, message in zip(self.push_messages(requests), requests, strict=True)
        }
        limit = min(math.inf if timeout is None else timeout, self._deadline * len(waiting) + GRACE_SECONDS)
        end = time.monotonic() + limit
        while waiting and time.monotonic() < end:
            replies = list(self.pull_messages(list(waiting)))
            for reply in replies:  # what the link itself answers for a node comes from the link
                yield name_sender(reply, waiting.pop(reply.metadata.reply_to_message_id))
            if waiting and not replies:
                time.sleep(POLL_SECONDS)

    def _addressed(self, message: Message) -> Message:
        """Return the message with the runtime's own id for its client's node."""
        head = message.metadata
        node = self._nodes[head.dst_node_id - FIRST_NODE]
        return Message(message.content, node, head.message_type, ttl=head.ttl, group_id=head.group_id)

    def _registered(self) -> list[int]:
        """Return the runtime's nodes in the order of their partitions, once no more register."""
        end = time.monotonic() + START_SECONDS
        nodes, last_change = nodes_by_partition(self._grid), time.monotonic()
        while (now := time.monotonic()) < end and (not nodes or now < last_change + SETTLE_SECONDS):
            time.sleep(POLL_SECONDS)
            if len(current := nodes_by_partition(self._grid)) != len(nodes):
                nodes, last_change = current, time.monotonic()
        if len(nodes) != self._num_clients:
            remedy = f"the task has {self._num_clients} clients: --federation-config num-supernodes={self._num_clients}"
            raise Refusal("num-supernodes", len(nodes), remedy)
        return nodes
