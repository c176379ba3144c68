"""What the gRPC link costs: the time of an exchange, a fleet in one run, and what a client and the server hold for it.

The clients are processes on the loopback address with certificates of their own. They add a number, so that what is
measured is the link. Each table names its contender: another link may stand beside ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from ...client.link import Endpoint
from ...server.admission import fingerprint
from ...server.link_grid import Door, LinkGrid, open_link
from ...strategies.wire import SPEC_RECORD, memory_arrays
from ..engine import FIRST_NODE
from .engines import Options
from .link_clients import ARRAYS, write_endpoints
from .made_certificates import Authority
from .stopwatch import memory
from .tables import Row, conditions, median, result_of

OURS = "fedveil, gRPC"
SIZES = (1_000, 100_000, 1_000_000, 10_000_000)
PAIR = 2  # clients of the exchanges that are timed
FLEET_PARAMETERS = 10_000
PER_PROCESS = 100  # connections
_SECONDS = 120.0
_MILLI, _KIBI, _MEGA = 1e3, 1024.0, 1e6


def run_link(options: Options) -> Row:
    """Measure exchanges with two clients, then rounds with `--clients` of them."""
    before = conditions()
    rounds, clients = options.size.rounds, options.size.clients
    fleet = _fleet(clients, rounds)  # first, while this process has held nothing large
    with _federation(PAIR, 1) as (grid, processes):
        exchanges = [_exchanges(grid, size, rounds) for size in SIZES]
        client = {"contender": OURS, "after the largest exchange, MiB resident": _resident(processes[0])}
    with _federation(1, 1) as (grid, processes):
        client["idle, MiB resident"] = _resident(processes[0])
        client["threads"] = len(os.listdir(f"/proc/{processes[0]}/task"))
    tables = {
        f"An exchange with {PAIR} clients": exchanges,
        "A fleet in one run": [fleet],
        "A client's process, without torch": [client],
    }
    notes = [
        "an exchange: every client gets an instruction of float32 parameters and replies with as many",
        f"a round of the fleet: one exchange of {FLEET_PARAMETERS} parameters with all clients",
    ]
    return result_of("link", before, tables, notes)


def _exchanges(grid: LinkGrid, parameters: int, count: int) -> Row:
    seconds = [_exchange(grid, parameters, number) for number in range(count + 1)][1:]
    return {
        "contender": OURS,
        "parameters": parameters,
        "median ms": median([_MILLI * each for each in seconds]),
        "slowest ms": float(f"{_MILLI * max(seconds):.4g}"),
        "MB each way": 4 * parameters / _MEGA,
    }


def _exchange(grid: LinkGrid, parameters: int, number: int) -> float:
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
    with _federation(clients, PER_PROCESS) as (grid, processes):
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
    return sum(each.bytes_in + each.bytes_out for each in grid.traffic.values())


@contextmanager
def _federation(clients: int, per_process: int) -> Generator[tuple[LinkGrid, list[int]]]:
    """A server in this process, and clients in others, all connected; and the numbers of their processes."""
    authority = Authority()
    nodes = tuple(range(FIRST_NODE, FIRST_NODE + clients))
    pairs = {node: authority.client(node) for node in nodes}
    admitted = {fingerprint(pair.certificate): node for node, pair in pairs.items()}
    door = Door("127.0.0.1:0", authority.server(), nodes, lambda: admitted)
    with open_link(door) as grid, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ends = [Endpoint(f"127.0.0.1:{grid.port}", node, pairs[node]) for node in nodes]
        shares = [ends[first : first + per_process] for first in range(0, clients, per_process)]
        processes = [
            stack.enter_context(_clients(folder / f"{n}.json", share)) for n, share in enumerate(shares)
        ]
        _wait(grid, clients)
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


def _wait(grid: LinkGrid, clients: int) -> None:
    end = time.monotonic() + _SECONDS
    while len(grid.connected) < clients:
        if time.monotonic() > end:
            raise TimeoutError(f"{len(grid.connected)} of {clients} clients connected")
        time.sleep(0.05)
