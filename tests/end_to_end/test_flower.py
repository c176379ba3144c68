"""Flower's own link with real processes: SuperLink, front and devices, secure aggregation on, and Flower's own SuperNode.

Slow: pytest -m campaign tests/end_to_end/test_flower.py
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from shared.runs import json_lines

from fedveil.deployment.device.device_ledger import epsilon_of
from fedveil.deployment.provision import provision
from fedveil.links.flower import superlink
from fedveil.links.flower.grid import SuperNodeGrid
from fedveil.links.flower.superlink import open_superlink
from fedveil.links.roster_watch import followed_roster, nodes_of
from fedveil.links.server_bundle import read_server_bundle
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.privacy.ledger.ledger_state import RESERVE
from fedveil.server.masking import Masking
from fedveil.server.round_terms import Sum
from fedveil.server.secure_sum import Opened, SecureSums

until = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "patience.py"))["until"]
MADE = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "devices.py"))
free_port = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "ports.py"))["free_port"]
SELDOM = Path(__file__).parents[1] / "faults" / "seldom_alarms.py"
CLASSES, CLIENTS, FEATURES, ORDER, SPEC, content = (
    MADE[name] for name in ("CLASSES", "CLIENTS", "FEATURES", "ORDER", "SPEC", "content")
)
SUPERNODE = "from flwr.supernode.cli import flower_supernode; flower_supernode()"
OFF = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
PATIENCE = 240.0


@pytest.fixture
def made(tmp_path: Path) -> Path:
    folder = MADE["make_federation"](tmp_path, free_port())
    for file in [*folder.glob("clients/*/client.toml"), folder / "server" / "server.toml"]:
        file.write_text(file.read_text().replace('link = "grpc"', 'link = "flower"'))
    return folder


@contextmanager
def agents(clients: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """`fedveil client start` for every client."""
    folders = sorted(clients.iterdir())
    commands = [[sys.executable, "-m", "fedveil", "client", "start", str(folder)] for folder in folders]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        yield running
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=PATIENCE)[1] for process in running]
    assert "Traceback" not in "".join(told), "".join(told)
    assert {process.returncode for process in running} <= {0, -signal.SIGKILL}


def secure_round(grid: SuperNodeGrid, sums: SecureSums, number: int, timeout: float = PATIENCE) -> Opened:
    wanted = Sum("spring", number, content(ORDER), "train", SPEC, {"w": (CLASSES, FEATURES + 1)}, 3.0)
    begun = time.monotonic()
    opened = sums.sum(list(grid.get_node_ids()), wanted, timeout)
    print(f"round {number}: {time.monotonic() - begun:.2f} s, {opened.survivors} clients, {opened.dropped}")
    return opened


def cpu_and_memory(process: int) -> str:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    pss = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return f"{seconds:.2f} CPU s, {pss / 1024:.0f} MiB"


def children(process: int) -> str:
    return Path(f"/proc/{process}/task/{process}/children").read_text()


@pytest.mark.campaign
def test_secure_aggregation_survives_its_superlink_and_a_client(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links: list[superlink.SuperLink] = []
    start = superlink.SuperLink.start

    def noted(self: superlink.SuperLink) -> None:
        start(self)
        links.append(self)

    monkeypatch.setattr(superlink.SuperLink, "start", noted)
    bundle = read_server_bundle(made / "server")
    with (
        open_superlink(bundle.folder, bundle.listen, nodes_of(followed_roster(bundle))) as grid,
        agents(made / "clients") as running,
    ):
        sums = SecureSums(grid, Masking(bundle.roster, dropout=0.4, collusion=0.1))
        until(lambda: len(grid.connected) == CLIENTS)
        print("device, idle:", cpu_and_memory(running[0].pid))
        for number in (1, 2):
            assert secure_round(grid, sums, number).survivors == CLIENTS
        assert not any(children(process.pid) for process in running)  # no process for a message
        print("device, after two rounds:", cpu_and_memory(running[0].pid))

        first = links[0]._process
        assert first is not None
        print("SuperLink:", cpu_and_memory(first.pid))
        first.kill()
        until(lambda: len(links) == 2 and len(grid.connected) == CLIENTS)
        assert secure_round(grid, sums, 3).survivors == CLIENTS

        running[0].kill()
        opened = secure_round(grid, sums, 4, timeout=20)
        assert opened.survivors == CLIENTS - 1
        ledgers = [next(made.glob(f"clients/c{n}/state/ledgers/client-*.ledger")) for n in range(CLIENTS)]
        reserved = [
            [json.loads(e.key)[1] for e in read_entries(each) if e.kind == RESERVE] for each in ledgers
        ]
        assert reserved == [[1, 2, 3], *[[1, 2, 3, 4]] * (CLIENTS - 1)]
        assert all(verify(each).ok for each in ledgers)
        assert len({epsilon_of(each) for each in ledgers[1:]}) == 1


TOGETHER = """\
federation: together
link: flower
server: {{address: "localhost:{port}", listen: "127.0.0.1:{port}"}}
task: {{name: digits, options: {{num_clients: 5}}}}
policy: {{target_epsilon: 20.0, target_delta: 1e-5, minimum_cohort: 3}}
clients: [{{name: a}}, {{name: b}}, {{name: c}}, {{name: d}}, {{name: e}}]
"""


ASKED = (
    *("task=digits", "privacy=record_distributed", "privacy.records=1437", "privacy.most_records=400"),
    *("privacy.noise_multiplier=2", "privacy.target_epsilon=18", "num_rounds=3", "run=together"),
)


def test_the_federations_of_the_campaign_are_provisioned_and_begin(made: Path, tmp_path: Path) -> None:
    bundle = read_server_bundle(made / "server")
    assert bundle.link == "flower" and len(nodes_of(followed_roster(bundle))()) == CLIENTS
    (tmp_path / "f.yaml").write_text(TOGETHER.format(port=free_port()))
    provision(tmp_path / "f.yaml", tmp_path / "all", None)
    runpy.run_path(str(SELDOM.with_name("served.py")))["begins"](tmp_path / "all", ASKED)


@pytest.mark.campaign
def test_records_of_all_clients_are_hidden_in_one_sum_over_flower(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(TOGETHER.format(port=free_port()))
    provision(tmp_path / "f.yaml", tmp_path / "made", None)
    server = [sys.executable, "-P", str(SELDOM), "server", str(tmp_path / "made" / "server"), *ASKED]
    with agents(tmp_path / "made" / "clients"):
        done = subprocess.run([*server, "link.clients=1"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "made" / "server" / "runs" / "together"
    rows = json_lines(folder / "metrics.jsonl")
    assert [row["replies"] for row in rows] == [5] * 3 and rows[-1]["exchanges"] == 3
    spent = {
        row["adversary"]: row["epsilon"]
        for row in json.loads((folder / "result.json").read_text())["privacy"]
    }
    for path in tmp_path.glob("made/clients/*/state/ledgers/*.ledger"):
        charged = [json.loads(e.payload)["events"] for e in read_entries(path) if e.kind == RESERVE]
        assert [each["server"]["kind"] for each in charged] == ["PoissonSampled"] * 3
        own = epsilon_of(path)
        assert own is not None and own[0] <= spent["server"] + 1e-6


@pytest.mark.campaign
def test_flower_supernode_enters_by_the_front_with_a_bundles_key(made: Path, tmp_path: Path) -> None:
    bundle = read_server_bundle(made / "server")
    client = made / "clients" / "c1"
    port = str(free_port())
    command = [
        sys.executable,
        "-c",
        SUPERNODE,
        "--superlink",
        f"localhost:{bundle.listen.rpartition(':')[2]}",
    ]
    command += ["--root-certificates", str(client / "ca.pem")]
    command += ["--auth-supernode-private-key", str(client / "supernode.key")]
    command += ["--host", "127.0.0.1", "--port", port, "--isolation", "process"]
    environment = {**os.environ, **OFF, "FLWR_HOME": str(tmp_path / "flwr")}
    with open_superlink(bundle.folder, bundle.listen, nodes_of(followed_roster(bundle))) as grid:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            until(lambda: list(grid.connected) == [3])
        finally:
            process.terminate()
            _, said = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in said, said


APP = {
    "pyproject.toml": """\
[project]
name = "stranger"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "stranger"
[tool.flwr.app.components]
serverapp = "stranger.server:app"
clientapp = "stranger.client:app"
[tool.flwr.app.config]
out = ""
loaded = ""
""",
    "stranger/__init__.py": "",
    "stranger/client.py": """\
from pathlib import Path
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()
Path("LOADED").touch()
@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
""",
    "stranger/server.py": """\
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    asked = [Message(RecordDict({"c": ConfigRecord({"a": 1})}), node, "train") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(asked, timeout=60))
    Path("OUT").write_text(f"{len(replies)} {sum(reply.has_error() for reply in replies)}")
""",
}


@pytest.mark.campaign
def test_app_of_flwr_run_gets_errors_and_is_loaded_on_no_device(made: Path, tmp_path: Path) -> None:
    out, loaded = tmp_path / "out", tmp_path / "loaded"
    for name, text in APP.items():
        path = tmp_path / "app" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("OUT", str(out)).replace("LOADED", str(loaded)))
    home = made / "server" / "flower"
    environment = {**os.environ, **OFF, "FLWR_HOME": str(home)}
    bundle = read_server_bundle(made / "server")
    with (
        open_superlink(bundle.folder, bundle.listen, nodes_of(followed_roster(bundle))) as grid,
        agents(made / "clients"),
    ):
        until(lambda: len(grid.connected) == CLIENTS)
        address = (home / "config.toml").read_text().split('address = "')[1].split('"')[0]
        executor = [
            sys.executable,
            "-c",
            "from flwr.supercore.cli import flower_superexec; flower_superexec()",
        ]
        executor += ["--insecure", "--runtime-api-address", address]
        executor += ["--superexec-auth-secret-file", str(home / "executor.key")]
        command = [
            sys.executable,
            "-c",
            "from flwr.cli.app import app; app()",
            "run",
            str(tmp_path / "app"),
            "fedveil",
        ]
        scripts = str(
            Path(httpx.__file__).parents[4] / "bin"
        )  # where flwr-serverapp is, whatever runs the tests
        environment["PATH"] = f"{scripts}:{environment['PATH']}"
        with subprocess.Popen(executor, env=environment, stderr=subprocess.DEVNULL) as running:
            try:
                ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                assert ended.returncode == 0, ended.stdout + ended.stderr
                until(out.exists)
            finally:
                running.terminate()
    assert out.read_text() == f"{CLIENTS} {CLIENTS}"
    assert not loaded.exists()
