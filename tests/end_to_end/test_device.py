"""`fedveil client` as its owner runs it: real processes on the gRPC link, killed, stopped, asked how they are, removed."""

import io
import json
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fedveil.__main__ import run
from fedveil.deployment.device.device_ledger import epsilon_of
from fedveil.links.grpc.grid import LinkGrid, ServerEndpoint, open_link
from fedveil.links.roster_watch import admitted_in, followed_roster, nodes_of
from fedveil.links.server_bundle import read_server_bundle
from fedveil.messages.local_training import LocalTraining
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.privacy.ledger.ledger_state import RESERVE
from fedveil.privacy.secagg.refusal import Fault
from fedveil.server.masking import Masking
from fedveil.server.round_terms import Sum
from fedveil.server.secure_sum import Opened, SecureSums

until = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "patience.py"))["until"]
MADE = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "devices.py"))
free_port = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "ports.py"))["free_port"]
CLASSES, CLIENTS, FEATURES, ORDER, SPEC, content = (
    MADE[name] for name in ("CLASSES", "CLIENTS", "FEATURES", "ORDER", "SPEC", "content")
)
CHEATING = Path(__file__).parents[1] / "faults" / "cheating_device.py"
SLOW_RECORDS = 40_000  # one at a time: seconds of training
PATIENCE = 240.0


class Said(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def fedveil(*arguments: object) -> Said:
    """Run the verb as the command line does, in this process: what runs for long has one of its own."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(["client", *map(str, arguments)])
    return Said(code, out.getvalue(), err.getvalue())


class Agents:
    """The devices' processes, by number; `server` is their grid."""

    def __init__(self, clients: Path, server: LinkGrid, masking: Masking) -> None:
        self.clients, self.server = clients, server
        self.sums = SecureSums(server, masking)
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def start(self, *numbers: int, cheats: str = "") -> None:
        for number in numbers:
            bundle = str(self.clients / f"c{number}")
            script = (
                [str(CHEATING), bundle, cheats] if cheats else ["-m", "fedveil", "client", "start", bundle]
            )
            command = [sys.executable, *script]
            self.processes[number] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        until(lambda: {number + 2 for number in numbers} <= set(self.server.connected))

    def end(self, number: int, how: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        process = self.processes.pop(number)
        process.send_signal(how)
        _, said = process.communicate(timeout=PATIENCE)
        return process.returncode, said

    def kill_once_reserved(self, number: int, row: int) -> None:
        until(lambda: ["spring", row, "private_sum 0"] in self.reservations(number))
        self.end(number, signal.SIGKILL)

    def round(self, number: int, timeout: float = PATIENCE, order=ORDER) -> Opened:
        size = CLASSES * (FEATURES + 1)
        wanted = Sum("spring", number, content(order), "train", SPEC, {"w": (size,)}, 3.0)
        return self.sums.sum(list(self.server.get_node_ids()), wanted, timeout)

    def ledger(self, number: int) -> Path:
        found = list((self.clients / f"c{number}" / "state" / "ledgers").glob("client-*.ledger"))
        return found[0] if found else Path("none")

    def reservations(self, number: int) -> list[list]:
        return [json.loads(e.key) for e in read_entries(self.ledger(number)) if e.kind == RESERVE]


@contextmanager
def federation(folder: Path) -> Iterator[Agents]:
    made = MADE["make_federation"](folder, free_port())
    bundle = read_server_bundle(made / "server")
    nodes = nodes_of(followed_roster(bundle))
    door = ServerEndpoint(
        bundle.listen, lambda: bundle.credentials, nodes, admitted_in(bundle.admitted, nodes)
    )
    with open_link(door) as server:
        agents = Agents(made / "clients", server, Masking(bundle.roster, dropout=0.4, collusion=0.1))
        try:
            yield agents
        finally:
            for number in list(agents.processes):
                agents.end(number, signal.SIGKILL)


def test_devices_that_are_killed_restarted_stopped_and_removed(tmp_path):
    with federation(tmp_path) as agents:
        draw = np.random.default_rng(0)
        inputs = draw.normal(size=(SLOW_RECORDS, FEATURES)).astype(np.float32)
        victim = agents.clients / "c0"
        np.savez(victim / "device.npz", inputs=inputs, targets=draw.integers(0, CLASSES, SLOW_RECORDS))
        assert "never started" in fedveil("status", victim).stdout
        agents.start(*range(CLIENTS))
        assert agents.round(1).survivors == CLIENTS

        # Killed in mid-training: the round goes on without it, and costs it what it had reserved.
        slow = replace(ORDER, training=LocalTraining(0.1, local_epochs=10, batch_size=1))
        killer = threading.Thread(target=agents.kill_once_reserved, args=(0, 2))
        killer.start()
        opened = agents.round(2, timeout=10, order=slow)
        killer.join()
        assert opened.survivors == CLIENTS - 1 and opened.dropped == {"no reply": 1}
        assert agents.reservations(0) == [["spring", n, "private_sum 0"] for n in (1, 2)]
        assert fedveil("status", victim).returncode == 1

        # Back again: the next round is as before.
        agents.start(0)
        assert agents.round(3).survivors == CLIENTS
        assert agents.reservations(0) == [["spring", n, "private_sum 0"] for n in (1, 2, 3)]
        assert verify(agents.ledger(0)).ok
        assert epsilon_of(agents.ledger(0)) == epsilon_of(agents.ledger(1))

        status = fedveil("status", victim)
        assert status.returncode == 0 and "round 3 of spring answered" in status.stdout
        plain = json.loads(fedveil("status", victim, "--json").stdout)
        assert plain["running"] and plain["pid"] == agents.processes[0].pid
        assert plain["state"].startswith("connected to localhost")
        command = [sys.executable, "-m", "fedveil", "client", "start", str(victim)]
        second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
        for refused in (second, fedveil("forget", victim)):
            assert refused.returncode == 2 and "in use by process" in refused.stderr

        # What the device remembers goes, and what it has spent stays, unless that is asked for as well.
        code, said = agents.end(0)
        assert code == 0 and "stopped" in said and "Traceback" not in said
        state = victim / "state"
        forgotten = fedveil("forget", victim)
        assert forgotten.returncode == 0 and "the ledgers stay" in forgotten.stdout
        left = {path.name for path in state.iterdir()}  # who was revoked stays so
        assert left == {"ledgers", "heads.json", "journal", "agent.lock", "roster.bin"}
        spent = agents.ledger(0)
        assert fedveil("uninstall", victim).returncode == 2 and (victim / "tls.key").exists()
        agents.start(0)
        assert fedveil("uninstall", victim, "--yes").returncode == 0
        agents.processes[0].communicate(timeout=PATIENCE)
        assert agents.processes.pop(0).returncode == 0
        assert {path.name for path in victim.iterdir()} == {"state"}
        assert {path.name for path in state.iterdir()} == {"ledgers", "heads.json"} and spent.exists()

        other = agents.clients / "c1"
        agents.end(1)
        gone = fedveil("forget", other, "--ledgers")
        assert "starts at zero" in gone.stdout and not (other / "state" / "ledgers").exists()
        removed = fedveil("uninstall", other, "--yes", "--ledgers")
        assert removed.returncode == 0 and not other.exists()


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("way", "fault"),
    [
        ("degree hidden", Fault.BAD_DEAL),
        ("garbage seals", Fault.BAD_DEAL),
        ("false complaint with a proof", Fault.FALSE_COMPLAINT),
        ("wrong reveal", Fault.WRONG_SHARE),
    ],
)
def test_a_device_that_cheats_is_named_and_no_other_pays_for_it(tmp_path, way, fault):
    with federation(tmp_path) as agents:
        agents.start(0, cheats=way)
        agents.start(*range(1, CLIENTS))
        late = fault is Fault.WRONG_SHARE  # its vector is in the sum by then
        for row in (1, 2):
            opened = agents.round(row)
            assert opened.blamed == {2: fault} and opened.survivors == CLIENTS - 1 + late
            paid = [["spring", number, "private_sum 0"] for number in range(1, row + 1)]
            assert [agents.reservations(number) for number in range(1, CLIENTS)] == [paid] * (CLIENTS - 1)
            assert late or not agents.ledger(0).exists()


def test_a_bundle_that_is_not_whole_is_refused_in_a_sentence(tmp_path):
    made = MADE["make_federation"](tmp_path)
    for number, spoiled in enumerate(("client.toml", "device.npz", "identity.key")):
        (made / "clients" / f"c{number}" / spoiled).write_bytes(b"\xff")
        refused = fedveil("start", made / "clients" / f"c{number}")
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr


def test_a_folder_that_is_no_bundle_is_left_alone(tmp_path):
    (tmp_path / "photos").touch()
    for verb in (("uninstall", tmp_path, "--yes", "--ledgers"), ("forget", tmp_path), ("status", tmp_path)):
        assert fedveil(*verb).returncode == 2
    assert (tmp_path / "photos").exists()
