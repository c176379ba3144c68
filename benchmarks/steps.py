"""Cost of a step on all clients' records among real processes: a server and five clients, masked, over the gRPC link.

Each client holds 40 examples of a CNN of 99 838 parameters, and draws each with probability 0.1. All of it is what
users start: `fedveil provision`, `fedveil client start` and `fedveil server`, on the loopback address.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from ..deployment.provision import provision
from .engines import Options
from .stopwatch import cpu_seconds
from .tables import Row, conditions, median, result_of
from .workload import EXAMPLES

CLIENTS, WARM = 5, 20  # steps that are not counted
# Six processes share the cores: with a pool of threads each, they wait for each other and take three times the CPU time.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
WORKLOAD = "cnn-100k-equal"
TASK = "fedveil.benchmarks.made_task:Made"
FEDERATION = """\
federation: steps
link: {link}
server: {{address: "localhost:{port}", listen: "127.0.0.1:{port}"}}
task:
  target: "{task}"
  allow_modules: [fedveil.benchmarks.made_task]
  args: {{workload: {workload}, num_clients: {clients}}}
policy: {{target_epsilon: 1000, target_delta: 1e-5, minimum_cohort: 3}}
clients: [{names}]
"""
_MILLI, _SECONDS, _POLL = 1e3, 900.0, 0.005


def run_steps(options: Options) -> Row:
    """Measure `--rounds` steps with words of 16 and of 32 bits."""
    before = conditions()
    kinds = (("grpc", 16), ("grpc", 32))
    rows = [_steps(link, bits, options.size.rounds) for link, bits in kinds]
    notes = [
        f"a step: each of {CLIENTS} processes draws from its {EXAMPLES} examples, charges its ledger, masks and uploads",
        "CPU of a step: of the server and all clients together",
    ]
    return result_of("steps", before, {"A step among five processes": rows}, notes)


def _steps(link: str, bits: int, count: int) -> Row:
    asked = f"""task=custom task.target={TASK} allow_modules=[{TASK.partition(":")[0]}]
        task.args.workload={WORKLOAD} task.args.num_clients={CLIENTS}
        privacy=record_distributed privacy.noise_multiplier=3 privacy.target_epsilon=1000
        privacy.records={CLIENTS * EXAMPLES} privacy.most_records={EXAMPLES} secagg.bits={bits}
        strategy=fedavg learning_rate=0.1 link.clients=1 accept_vacuous=true num_rounds={WARM + count} run=steps"""
    with tempfile.TemporaryDirectory() as folder:
        made = _provisioned(Path(folder), link)
        with _clients(made):
            return {"link": link, "bits": bits, **_served(made / "server", asked.split(), count)}


def _served(bundle: Path, asked: list[str], count: int) -> Row:
    rows, log = bundle / "runs" / "steps" / "metrics.jsonl", bundle / "log"
    with open(log, "w") as said:
        command = [sys.executable, "-m", "fedveil", "server", bundle, *asked]
        server = subprocess.Popen(command, stdout=said, stderr=said, env=ONE_THREAD)

        def reach(steps: int) -> float:
            _until(lambda: _lines(rows) >= steps or server.poll() is not None)
            return time.perf_counter()

        reach(WARM)
        cpu = cpu_seconds(os.getpid())
        ends = [reach(WARM + step) for step in range(count + 1)]
        cpu = cpu_seconds(os.getpid()) - cpu
        if server.wait():
            raise RuntimeError(log.read_text())
    laps = [_MILLI * (end - begin) for begin, end in pairwise(ends)]
    return {
        "steps": count,
        "ms/step": float(f"{sum(laps) / count:.4g}"),
        "median ms": median(laps),
        "cpu ms/step": float(f"{_MILLI * cpu / count:.4g}"),
    }


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + _SECONDS
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("the steps are not there in time")
        time.sleep(_POLL)


def _provisioned(folder: Path, link: str) -> Path:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names = ", ".join(f"{{name: c{number}}}" for number in range(CLIENTS))
    text = FEDERATION.format(link=link, port=port, task=TASK, workload=WORKLOAD, clients=CLIENTS, names=names)
    (folder / "federation.yaml").write_text(text)
    provision(folder / "federation.yaml", folder / "made", None)
    return folder / "made"


@contextmanager
def _clients(made: Path) -> Generator[None]:
    command = [sys.executable, "-m", "fedveil", "client", "start"]
    running = [
        subprocess.Popen([*command, each], stderr=subprocess.DEVNULL, env=ONE_THREAD)
        for each in sorted((made / "clients").iterdir())
    ]
    try:
        yield
    finally:
        for each in running:
            each.send_signal(signal.SIGTERM)
        for each in running:
            each.wait()
