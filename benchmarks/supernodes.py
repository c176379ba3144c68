"""Cost of Flower's own SuperNode on the links' work: it starts a process for each message, and runs what it is sent.

The SuperLink, our front before it and our grid are those of the other contenders; only the clients differ.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

from flwr.cli.build import build_fab_from_files

from ..links.flower import control_calls as flower_runtime
from ..links.flower.superlink import OFF
from ..messages.flower_adapter import quiet_flower
from .engines import Options
from .flower_link import Told, flower_federation
from .link import FLOWER, OURS, exchanges, federation, wait_for
from .tables import Row, conditions, result_of

STOCK = "Flower's SuperLink and SuperNodes"
STOCK_CLIENTS = 3  # each message takes a second of CPU
SIZES = (10_000, 1_000_000)
SUPERNODE = "from flwr.supernode.cli import flower_supernode; flower_supernode()"
STOP_SECONDS = 20.0
PROJECT = """
[project]
name = "addone"
version = "1.0.0"
description = "Adds one to every number."
license = "Apache-2.0"
[tool.flwr.app]
publisher = "fedveil"
[tool.flwr.app.components]
serverapp = "fedveil:served_elsewhere"
clientapp = "addone:app"
"""
APP = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    given = message.content["arrays"]
    added = {name: Array(array.numpy() + np.float32(1)) for name, array in given.items()}
    return Message(RecordDict({"arrays": ArrayRecord(added)}), reply_to=message)
"""


def run_supernodes(options: Options) -> Row:
    """Measure exchanges with `--clients` of ours on both links, and with a few of Flower's SuperNodes."""
    quiet_flower()
    before = conditions()
    rounds, clients = options.size.rounds, options.size.clients
    rows: list[Row] = []
    with federation(clients, 1) as (grid, _):
        rows += [exchanges(OURS, grid, size, rounds) for size in SIZES]
    with flower_federation(clients) as (grid, _):
        wait_for(grid, clients)
        rows += [exchanges(FLOWER, grid, size, rounds) for size in SIZES]
    with patch.object(flower_runtime, "_app", _app), flower_federation(STOCK_CLIENTS, supernode) as (grid, _):
        wait_for(grid, STOCK_CLIENTS)
        rows += [exchanges(STOCK, grid, size, rounds) for size in SIZES]
    notes = [
        "an exchange: every client gets an instruction of float32 parameters and replies with as many",
        "CPU of a message: of server, SuperLink and clients together, for an instruction and its reply",
    ]
    return result_of("supernodes", before, {"An exchange": rows}, notes)


def _app() -> bytes:
    return build_fab_from_files({"pyproject.toml": PROJECT.encode(), "addone.py": APP.encode()})[0]


@contextmanager
def supernode(folder: Path, listen: str, told: Told) -> Generator[int]:
    """Run one of Flower's SuperNodes, and what it starts, as long as the context lasts."""
    home = folder / f"supernode-{told.node}"
    home.mkdir()
    (home / "key").write_text(told.key)
    (home / "key").chmod(0o600)
    with ExitStack() as stack:
        free = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SUPERNODE, "--superlink", listen, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--root-certificates", str(folder / "ca.pem")]
    command += ["--auth-supernode-private-key", str(home / "key")]
    beside = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # it starts commands of Flower's by name
    environment = {**os.environ, **OFF, "FLWR_HOME": str(home), "PATH": beside}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process.pid
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and its children."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
