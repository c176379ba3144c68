"""The one file that touches what Flower does not publish; contract tests hold it to the pinned release."""

from __future__ import annotations

import logging
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1  # flwr.supercore.constant.SUPERLINK_NODE_ID


def claim_identity(run_id: int) -> Run:
    """Let this process create messages outside Flower's runtime, and return the run they belong to."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE
    return Run.create_empty(run_id=run_id)


def name_message(message: Message, message_id: str) -> None:
    """Give a message the id that Flower's link would give it, so that its reply can be told apart."""
    message.metadata.__dict__["_message_id"] = message_id


def quiet_flower() -> None:
    """Silence Flower's log; our own table says what there is to say."""
    logging.getLogger("flwr").setLevel(logging.ERROR)


def client_context(run_id: int, client: int, num_clients: int, run_config: dict[str, Any]) -> Context:
    """Return the context of one simulated node, with Flower's own keys for its partition."""
    node_config = {"partition-id": client, "num-partitions": num_clients}
    return Context(
        run_id=run_id, node_id=client + 2, node_config=node_config, state=RecordDict(), run_config=run_config
    )


def run_on_ray(server_app: ServerApp, client_app: ClientApp, num_clients: int, backend: dict[str, Any]) -> None:
    """Run both apps on Flower's own simulation runtime.

    Flower deprecates its public `run_simulation` in favour of `flwr run`; this is the function behind both.
    """
    from flwr.simulation.run_simulation import _run_simulation  # pyright: ignore[reportPrivateUsage]
    from flwr.supercore.telemetry import EventType

    _run_simulation(
        num_supernodes=num_clients,
        client_app=client_app,
        server_app=server_app,
        backend_name="ray",
        backend_config=backend,
        exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
    )
