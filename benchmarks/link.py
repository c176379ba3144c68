"""Cost of the links: the time of an exchange, a fleet in one run, and what a client and the server hold for it.

The clients are processes on the loopback address with certificates of their own. They add a number, so that what is
measured is the link. Flower's own is its SuperLink behind our front, with our clients on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from ..links.flower.grid import SuperNodeGrid
from ..links.grpc.device_end import Endpoint
from ..links.grpc.grid import LinkGrid, ServerEndpoint, open_link
from ..links.roster_watch import fingerprint
from ..messages.flower_adapter import quiet_flower
from ..messages.wire import SPEC_RECORD, memory_arrays
from ..simulations.in_process import FIRST_NODE
from .engines import Options
from .flower_link import flower_federation
from .link_clients import ARRAYS, write_endpoints
from .made_certificates import MadeAuthority
from .stopwatch import cpu_seconds, memory
from .tables import Row, conditions, median, result_of

OURS = "fedveil, gRPC"
FLOWER = "Flower's SuperLink"
Reaching = LinkGrid | SuperNodeGrid
SIZES = (1_000, 100_000, 1_000_000, 10_000_000)
PAIR = 2  # clients of the exchanges that are timed
FLEET_PARAMETERS = 10_000
PER_PROCESS = 100  # connections
_SECONDS = 120.0
_MILLI, _KIBI, _MEGA = 1e3, 1024.0, 1e6


def run_link(options: Options) -> Row:
    """Measure exchanges with two clients, then rounds with `--clients` of them."""
    quiet_flower()
    before = conditions()
    rounds, clients = options.size.rounds, options.size.clients
    fleet = _fleet(clients, rounds)  # first, while this process has held nothing large
    with federation(PAIR, 1) as (grid, processes):
        rows = [exchanges(OURS, grid, size, rounds) for size in SIZES]
        after = {OURS: _resident(processes[0])}
    with flower_federation(PAIR) as (grid, processes):
        wait_for(grid, PAIR)
        rows += [exchanges(FLOWER, grid, size, rounds) for size in SIZES]
        after[FLOWER] = _resident(processes[0])
    idle: list[Row] = []
    for name, opened in ((OURS, federation(1, 1)), (FLOWER, flower_federation(1))):
        with opened as (grid, processes):
            wait_for(grid, 1)
            idle.append(_client_row(name, processes[0], after[name]))
    tables = {
        f"An exchange with {PAIR} clients": rows,
        "A fleet in one run": [fleet],
        "A client's process, without torch": idle,
    }
    notes = [
        "an exchange: every client gets an instruction of float32 parameters and replies with as many",
        "CPU of a message: of server, SuperLink and client together, for an instruction and its reply",
        f"a round of the fleet: one exchange of {FLEET_PARAMETERS} parameters with all clients",
    ]
    return result_of("link", before, tables, notes)


def _client_row(name: str, process: int, after: float) -> Row:
    return {
        "contender": name,
        "after the largest exchange, MiB resident": after,
        "idle, MiB resident": _resident(process),
        "threads": len(os.listdir(f"/proc/{process}/task")),
    }


def exchanges(name: str, grid: Reaching, parameters: int, count: int) -> Row:
    """Measure exchanges with all clients, after one that is not measured.

    Args:
      name: of the contender.
      grid: reaches the clients.
      parameters: numbers that travel in each direction.
      count: of exchanges.
    """
    clients = len(list(grid.get_node_ids()))
    _exchange(grid, parameters, 0)
    cpu = cpu_seconds(os.getpid())
    seconds = [_exchange(grid, parameters, number + 1) for number in range(count)]
    cpu = cpu_seconds(os.getpid()) - cpu
    return {
        "contender": name,
        "clients": clients,
        "parameters": parameters,
        "median ms": median([_MILLI * each for each in seconds]),
        "slowest ms": float(f"{_MILLI * max(seconds):.4g}"),
        "cpu ms/message": float(f"{_MILLI * cpu / (count * clients):.3g}"),
        "MB each way": 4 * parameters / _MEGA,
    }


def _exchange(grid: Reaching, parameters: int, number: int) -> float:
    place = ConfigRecord({"run": f"of {parameters}", "round": number})
    content = RecordDict({ARRAYS: memory_arrays({"x": np.zeros(parameters, np.float32)}), SPEC_RECORD: place})
    nodes = list(grid.get_node_ids())
    begin = time.perf_counter()
    asked = [Message(content, node, "train") for node in nodes]
    replies = sum(reply.has_content() for reply in grid.send_and_receive(asked, timeout=_SECONDS))
    if replies != len(nodes):
        raise RuntimeError(f"{replies} of {len(nodes)} clients replied")
    return time.perf_counter() - begin


def _fleet(clients: int, rounds: int) -> Row:
    alone = memory(os.getpid())
    with federation(clients, PER_PROCESS) as (grid, processes):
        connected = _own_memory(processes)
        _exchange(grid, FLEET_PARAMETERS, 0)
        passed, cpu = _passed(grid), time.process_time()
        seconds = [_exchange(grid, FLEET_PARAMETERS, number + 1) for number in range(rounds)]
        cpu, passed = time.process_time() - cpu, _passed(grid) - passed
        held = _own_memory(processes)
    shares = rounds * clients
    return {
        "contender": OURS,
        "clients": clients,
        "rounds": rounds,
        "median round s": median(seconds),
        "slowest s": float(f"{max(seconds):.4g}"),
        "server cpu ms/reply": float(f"{_MILLI * cpu / shares:.3g}"),
        "kB/client/round": float(f"{passed / shares / _MILLI:.4g}"),
        "server KiB/client, idle": round((connected - alone) * _KIBI / clients, 1),
        "after": round((held - alone) * _KIBI / clients, 1),
    }


def _own_memory(others: Sequence[int]) -> float:
    """Return what this process holds without the clients that it started, in MiB."""
    return memory(os.getpid()) - sum(memory(each) for each in others)


def _resident(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def _passed(grid: LinkGrid) -> int:
    total = grid.tally.total()
    return sum((*total.down.values(), *total.up.values()))


@contextmanager
def federation(clients: int, per_process: int) -> Generator[tuple[LinkGrid, list[int]]]:
    """Start a server in this process and clients in others, all connected.

    Args:
      clients: how many.
      per_process: clients that share a process.

    Yields:
      The grid that reaches them, and the numbers of their processes.
    """
    authority = MadeAuthority()
    own = authority.server()
    nodes = tuple(range(FIRST_NODE, FIRST_NODE + clients))
    pairs = {node: authority.client(node) for node in nodes}
    admitted = {fingerprint(pair.certificate): node for node, pair in pairs.items()}
    door = ServerEndpoint("127.0.0.1:0", lambda: own, lambda: nodes, lambda: admitted)
    with open_link(door) as grid, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ends = [Endpoint(f"127.0.0.1:{grid.port}", node, partial(pairs.__getitem__, node)) for node in nodes]
        shares = [ends[first : first + per_process] for first in range(0, clients, per_process)]
        processes = [
            stack.enter_context(_clients(folder / f"{n}.json", share)) for n, share in enumerate(shares)
        ]
        wait_for(grid, clients)
        yield grid, processes


@contextmanager
def _clients(path: Path, endpoints: Sequence[Endpoint]) -> Generator[int]:
    write_endpoints(path, endpoints)
    module = f"{__package__}.link_clients"
    process = subprocess.Popen([sys.executable, "-m", module, str(path)])
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def wait_for(grid: Reaching, clients: int) -> None:
    """Wait until at least `clients` clients are connected.

    Args:
      grid: reaches them.
      clients: how many.

    Raises:
      TimeoutError: they are not there in time.
    """
    end = time.monotonic() + _SECONDS
    while len(grid.connected) < clients:
        if time.monotonic() > end:
            raise TimeoutError(f"{len(grid.connected)} of {clients} clients connected")
        time.sleep(0.05)
