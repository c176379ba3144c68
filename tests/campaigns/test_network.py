"""A federation of processes on a bad network, killed on top: server and five clients, each in a network namespace.

Figures for docs/evidence/reliability.md. Linux, as root, with `ip`, TUN devices and memory cgroups of version 1.
"""

import itertools
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fedveil.base.refusal import Refusal
from fedveil.deployment.provision import provision
from fedveil.server.checkpoint import read
from fedveil.tasks.digits import load

HERE = Path(__file__).parents[1]
FAULTS = HERE / "faults"
ENDS = runpy.run_path(str(HERE / "faults" / "served.py"))
RULES = runpy.run_path(str(FAULTS / "federation_rules.py"))
SMALL = runpy.run_path(str(FAULTS / "small_devices.py"))
PORT, CLIENTS, ROUNDS, EPSILON = 8443, 5, 6, 8.0
OWNERS_EPSILON = 20.0  # in the bundles
AT_ONCE = 4  # federations: they mostly wait
PATIENCE = 280.0  # of one run, which is then asked to end
INTERRUPTED = 130  # exit code
OUT_AFTER, KILL_AFTER, BACK_AFTER = 1, 2, 2.0  # rounds, rounds, seconds
ARGV = (
    *("batch_size=40", "accept_vacuous=true", "privacy=client_distributed", "privacy.allow_large_delta=true"),
    *(f"privacy.target_epsilon={EPSILON}", f"num_rounds={ROUNDS}", "run=net"),
    *("link.clients=0.8", "link.wait=90"),
)
LINEAR, CNN = 128, 512  # MiB: what runs in them
TASK = {
    0: ("task=digits", "link.deadline=10"),
    LINEAR: ("task=digits", "link.deadline=10"),
    CNN: ("task=custom", "task.target=device_cnn:Pictures", "allow_modules=[device_cnn]", "link.deadline=60"),
}


class Faults(NamedTuple):
    loss: int  # per cent of the packets in each direction
    delay: int  # ms, each way
    rate: int  # kbit/s of each client in each direction; 0: no limit
    outage: int  # s, of everybody
    killed: str
    memory: int  # MiB of each client; 0: no limit


# Every two values of two faults meet in a run, most more than once.
TABLE = [
    Faults(0, 0, 0, 15, "node", 0),
    Faults(0, 0, 1000, 5, "both", 0),
    Faults(0, 0, 256, 0, "node", 512),
    Faults(0, 100, 0, 15, "both", 128),
    Faults(0, 100, 1000, 15, "server", 512),
    Faults(0, 500, 0, 5, "none", 512),
    Faults(0, 500, 256, 0, "server", 0),
    Faults(0, 500, 256, 5, "server", 128),
    Faults(20, 0, 1000, 15, "server", 128),
    Faults(20, 0, 256, 15, "none", 128),
    Faults(20, 100, 0, 0, "both", 512),
    Faults(20, 100, 0, 0, "server", 0),
    Faults(20, 100, 256, 5, "node", 128),
    Faults(20, 500, 1000, 0, "node", 0),
    Faults(20, 500, 1000, 15, "none", 128),
    Faults(20, 500, 1000, 5, "both", 0),
    Faults(5, 0, 0, 0, "none", 128),
    Faults(5, 0, 0, 5, "server", 0),
    Faults(5, 0, 256, 0, "both", 0),
    Faults(5, 100, 1000, 0, "none", 512),
    Faults(5, 100, 1000, 5, "node", 512),
    Faults(5, 100, 256, 5, "none", 0),
    Faults(5, 500, 0, 15, "node", 128),
    Faults(5, 500, 256, 15, "both", 128),
]


class Starter:
    """Starts commands for every federation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, str(FAULTS / "commands.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GRPC_VERBOSITY": "NONE", "PYTHONPATH": str(HERE / "examples")},
        )

    def start(self, namespace: str, cgroup: str, file: Path, *argv: object) -> Any:
        asked = [[str(each) for each in argv], str(file), namespace, cgroup]
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            return ENDS["Process"](int(self._process.stdout.readline()), file)

    def end(self) -> None:
        self._process.communicate()


@dataclass
class Federation:
    """One run: namespaces, a relay between them, processes in them, and what was seen of them."""

    starter: Any
    folder: Path
    number: int
    faults: Faults
    processes: dict[int, Any] = field(default_factory=dict[int, Any])  # 0: the server
    groups: list[Any] = field(default_factory=list[Any])  # of the clients, in their order
    end: float = field(default_factory=lambda: time.monotonic() + PATIENCE)
    starts: int = 0
    peak: int = 0  # MiB of the client that took most
    oom: int = 0  # clients killed for their memory

    @property
    def ends(self) -> list[tuple[str, str]]:
        return [(f"fv{self.number}-{each}", f"10.77.{self.number}.{each + 1}") for each in range(CLIENTS + 1)]

    @property
    def hearts(self) -> Path:
        return self.folder / "hearts"

    def start(self, *which: int) -> None:
        bundles = sorted((self.hearts / "clients").iterdir())
        for each in which:
            self.starts += 1
            serving = ("server", self.hearts / "server", *ARGV, *TASK[self.faults.memory])
            argv = ("client", "start", bundles[each - 1]) if each else serving
            group = str(self.groups[each - 1].folder) if each and self.groups else ""
            file = self.folder / f"{each}-{self.starts}.out"
            self.processes[each] = self.starter.start(self.ends[each][0], group, file, *argv)

    def kill(self, *which: int) -> None:
        for each in which:
            if self.processes[each].alive:
                self.processes[each].kill()

    def rows(self) -> list[dict[str, Any]]:
        return RULES["rows_of"](self.hearts / "server" / "runs" / "net")

    def wait_for(self, rounds: int) -> None:
        """Wait until so many rounds are done, the server has ended, or patience has."""
        while self.processes[0].alive and len(self.rows()) < rounds and time.monotonic() < self.end:
            time.sleep(0.02)

    def ended(self) -> int | None:
        """Return the server's exit code; once patience has ended it is asked to end."""
        while self.processes[0].alive and time.monotonic() < self.end:
            time.sleep(0.05)
        server = self.processes[0]
        return server.kill(signal.SIGTERM) if server.alive else server.wait()

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Limit what each client takes, and leave in `figures` what they took."""
        most = self.faults.memory
        names = [f"{self.number}-{each}" for each in range(CLIENTS)] if most else []
        self.groups = [SMALL["Limited"](name, most) for name in names]
        try:
            yield
        finally:
            for group in self.groups:
                ENDS["until"](lambda group=group: group.empty)
                self.peak, self.oom = max(self.peak, round(group.peak)), self.oom + group.killed
                group.remove()

    @contextmanager
    def network(self) -> Iterator[subprocess.Popen[str]]:
        loss, delay, rate, *_ = self.faults
        told = {
            "ends": self.ends,
            "loss": loss / 100,
            "delay": delay / 1000,
            "rate": rate * 125,
            "seed": self.number,
        }
        relay = subprocess.Popen(
            [sys.executable, str(FAULTS / "relay.py"), json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert relay.stdout is not None and relay.stdout.readline() == "ready\n"
            yield relay
        finally:
            self.kill(*self.processes)
            relay.communicate()
            for namespace, _ in self.ends:
                subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


def provisioned(federation: Federation) -> None:
    host, clients = federation.ends[0][1], ", ".join(f"{{name: {name}}}" for name in ENDS["NAMES"])
    text = ENDS["FEDERATION"].format(port=PORT, listen=PORT, clients=clients)
    text = text.replace("localhost", host).replace("127.0.0.1", host)
    federation.folder.mkdir()
    (federation.folder / "federation.yaml").write_text(text)
    provision(federation.folder / "federation.yaml", federation.hearts, None)
    pixels, labels = digits_of(CLIENTS)
    for number, bundle in enumerate(sorted((federation.hearts / "clients").iterdir())):
        if federation.faults.memory == LINEAR:
            SMALL["make_linear"](bundle, pixels[number], labels[number])
        elif federation.faults.memory == CNN:
            SMALL["make_pictures"](bundle)


def digits_of(clients: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Deal the digits out as arrays."""
    shares = [load(clients).client_data(client) for client in range(clients)]
    return [each.inputs.numpy() for each in shares], [each.targets.numpy() for each in shares]


def lived(federation: Federation) -> list[dict[str, Any]]:
    """Let the run go to its end, with its faults; return the rounds that were done when the server was killed."""
    faults, draw = federation.faults, random.Random(federation.number)
    before: list[dict[str, Any]] = []
    with federation.memory(), federation.network() as relay:
        federation.start(*range(CLIENTS + 1))
        federation.wait_for(OUT_AFTER)
        if faults.outage:
            assert relay.stdin is not None
            relay.stdin.write(f"{faults.outage}\n")
            relay.stdin.flush()
        federation.wait_for(KILL_AFTER)
        victims = {"none": (), "node": (1,), "server": (0,), "both": (0, 1)}[faults.killed]
        time.sleep(draw.uniform(0, 1 + 4 * faults.delay / 1000))
        federation.kill(*victims)
        if 0 in victims:
            saved = read(
                federation.hearts / "server" / "runs" / "net"
            )  # a round is done once it is in the checkpoint
            before = federation.rows()[: saved.state.round if saved else 0]
        time.sleep(BACK_AFTER if victims else 0)
        federation.start(*victims)
        if federation.ended() not in (0, INTERRUPTED):
            raise RuntimeError(federation.processes[0].said)
    return before


def wrongs(federation: Federation, before: list[dict[str, Any]]) -> Iterator[str]:
    """Return what must not be, from the files that the processes left."""
    kills = int(federation.faults.killed in ("server", "both"))
    lived = RULES["Lived"](federation.hearts, "net", ROUNDS, kills, before)
    yield from RULES["wrongs"](lived, EPSILON, OWNERS_EPSILON)
    if federation.oom:
        yield f"{federation.oom} clients were killed for their memory"


def one_run(starter: Starter, folder: Path, number: int, faults: Faults) -> dict[str, Any]:
    federation = Federation(starter, folder / str(number), number, faults)
    provisioned(federation)
    began = time.monotonic()
    try:
        wrong = list(wrongs(federation, lived(federation)))
    except (Refusal, OSError, RuntimeError, AssertionError, ValueError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    rows = federation.rows()
    found = {
        "faults": faults._asdict(),
        "seconds": round(time.monotonic() - began),
        "released": sum(not row["abandoned"] for row in rows),
        "abandoned": sum(row["abandoned"] for row in rows),
        "dropped": sum(CLIENTS - row["replies"] for row in rows if not row["abandoned"]),
        "unfinished": int(len(rows) < ROUNDS),
        "peak": federation.peak,
        "wrong": wrong,
    }
    print(json.dumps(found), flush=True)
    return found


def missing() -> str:
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip") or not Path("/dev/net/tun").exists():
        return "needs Linux, root, ip and TUN devices"
    if not os.access(SMALL["CGROUP"], os.W_OK):
        return "needs a memory cgroup of version 1"
    return ""


@pytest.mark.parametrize(
    ("lost", "kills", "reason", "status"),
    [
        (0, 0, "", "completed"),
        (1, 1, "in part on rounds that were lost when the run was stopped", "completed"),
        (1, 0, "in part on rounds that were lost when the run was stopped", "interrupted"),
        (2, 1, "in part on rounds that were lost when the run was stopped", "interrupted"),
        (1, 1, "the budget is spent", "interrupted"),
    ],
)
def test_a_run_lacks_no_round_but_those_that_a_kill_cost(
    lost: int, kills: int, reason: str, status: str
) -> None:
    assert RULES["whole_status"](lost, kills, reason) == status


def test_every_two_faults_meet_in_the_table() -> None:
    for one, other in itertools.combinations(range(len(Faults._fields)), 2):
        met = {(row[one], row[other]) for row in TABLE}
        assert len(met) == len({row[one] for row in TABLE}) * len({row[other] for row in TABLE})


@pytest.mark.parametrize("memory", TASK)
def test_a_federation_of_the_campaign_is_provisioned_and_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """The campaign is seldom run."""
    monkeypatch.syspath_prepend(str(HERE / "examples"))
    federation = Federation(Starter, tmp_path / "1", 1, TABLE[0]._replace(memory=memory))
    provisioned(federation)
    assert len(list((federation.hearts / "clients").iterdir())) == CLIENTS
    ENDS["begins"](federation.hearts, [*ARGV, *TASK[memory]])


@pytest.mark.campaign
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_federations_on_bad_networks_lose_nothing(tmp_path: Path) -> None:
    starter = Starter()
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            runs = [
                pool.submit(one_run, starter, tmp_path, number, row) for number, row in enumerate(TABLE, 1)
            ]
            found = [run.result() for run in runs]
    finally:
        starter.end()
    figures = {
        name: sum(run[name] for run in found)
        for name in ("seconds", "released", "abandoned", "dropped", "unfinished")
    }
    wrong = [run for run in found if run["wrong"]]
    peaks = {
        most: max(run["peak"] for run in found if run["faults"]["memory"] == most) for most in (LINEAR, CNN)
    }
    print(json.dumps({"runs": len(found), **figures, "peaks": peaks, "wrong": len(wrong)}))
    assert not wrong, wrong
