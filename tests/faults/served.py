"""A provisioned federation of five on the digits: its devices called in turn, or all of it as processes."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Message

from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.device.device import Device, read_device
from fedveil.deployment.device.receipts import receipt_for
from fedveil.deployment.open_link import Link, Presence
from fedveil.deployment.provision import provision
from fedveil.deployment.serve import deployed_in, settings_for
from fedveil.links.server_bundle import read_server_bundle
from fedveil.messages.flower_adapter import claim_identity, name_message, name_sender
from fedveil.messages.grids import AskingGrid
from fedveil.messages.notices import RunOver, read_over, reply_with
from fedveil.messages.traffic import Carried
from fedveil.run.build import build
from fedveil.run.prepare import prepare
from fedveil.run.prepared_run import Saved

FEDERATION = """\
federation: hearts
server: {{address: "localhost:{port}", listen: "127.0.0.1:{listen}"}}
task: {{name: digits}}
policy: {{target_epsilon: 80.0, target_delta: 1e-5, trust_server: true, purposes: [statistics, evaluation]}}
clients: [{clients}]
"""
NAMES = ("cleveland", "hungary", "switzerland", "longbeach", "boston")

Fault = Callable[[Message, int], Message | None]


def make_federation(
    folder: Path,
    port: int = 8443,
    link: str = "grpc",
    names: Sequence[str] = NAMES,
    more: str = "",
    listen: int | None = None,
) -> Path:
    clients = ", ".join(f"{{name: {name}}}" for name in names)
    text = FEDERATION.format(port=port, listen=listen or port, clients=clients)
    (folder / "federation.yaml").write_text(f"{text}link: {link}\n{more}")
    provision(folder / "federation.yaml", folder / "hearts", None)
    return folder / "hearts"


def begins(hearts: Path, argv: Sequence[str]) -> None:
    """Prepare the run of a server's command, and read its devices: a campaign that is seldom run begins all the same."""
    bundle = read_server_bundle(hearts / "server")
    settings = settings_for(bundle, argv)
    federation = build(settings.federation, deployed_in(bundle, settings))
    prepare(federation, bundle.folder / "runs" / "none", Saved(""))
    for folder in sorted((hearts / "clients").iterdir()):
        read_device(read_client_bundle(folder))


class Devices(AskingGrid):
    """Every device, called in turn; `fault` may answer in its place, given the message and how many came before."""

    def __init__(self, clients: Path, fault: Fault | None = None) -> None:
        self._run = claim_identity(1)
        bundles = [read_client_bundle(folder) for folder in sorted(clients.iterdir())]
        self.devices: dict[int, Device] = {each.settings.node: read_device(each) for each in bundles}
        self.fault, self.count = fault, 0
        self.told: list[RunOver] = []

    @property
    def run(self):
        return self._run

    def set_run(self, run) -> None:
        self._run = run

    def get_node_ids(self) -> list[int]:
        return sorted(self.devices)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        for message in messages:
            if (over := read_over(message)) is not None:  # the agent's matter
                self.told.append(over)
                node = message.metadata.dst_node_id
                receipt = receipt_for(self.devices[node].bundle, over)
                yield name_sender(reply_with(receipt, message), node)
                continue
            name_message(message, str(self.count))
            node = message.metadata.dst_node_id
            answer = self.fault(message, self.count) if self.fault else None
            self.count += 1
            yield name_sender(answer or self.devices[node].answer(message), node)


def reaching(grid: Devices, here: int = 5):
    """Return what opens a link on which the first so many devices are connected."""
    since = dict.fromkeys(grid.get_node_ids()[:here], time.time())

    @contextmanager
    def reach(settings, bundle, nodes) -> Iterator[Link]:
        carried = Carried({"training": 2000}, {"training": 1000})
        yield Link(grid, lambda: Presence(since, carried, {"late": 1}))

    return reach


PATIENCE = runpy.run_path(str(Path(__file__).with_name("patience.py")))
SECONDS, until = PATIENCE["SECONDS"], PATIENCE["until"]
STARTER = Path(__file__).with_name("commands.py")
free_port = runpy.run_path(str(Path(__file__).with_name("ports.py")))["free_port"]


@dataclass
class Process:
    """One command at work, or what is left of it."""

    pid: int
    file: Path

    @property
    def said(self) -> str:
        return self.file.read_text() if self.file.exists() else ""

    @property
    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self) -> int | None:
        """Return its exit code; None if it was killed."""
        until(lambda: not self.alive, lambda: self.said)
        rc = Path(f"{self.file}.rc")
        return int(rc.read_text()) if rc.exists() else None

    def kill(self, number: int = signal.SIGKILL) -> int | None:
        os.kill(self.pid, number)
        return self.wait()


@dataclass
class Served:
    """A folder of bundles, and the processes on them."""

    hearts: Path
    starter: subprocess.Popen[str]
    clients: dict[str, Process] = field(default_factory=dict[str, Process])
    count: int = 0

    def start(self, *argv: object, death: Iterable[object] = ()) -> Process:
        """Start a command; `death` is the stage and the round at which it kills itself."""
        self.count += 1
        file = self.hearts / f"{self.count}.out"
        asked = [[str(each) for each in argv], str(file), "", "", *death]
        assert self.starter.stdin is not None and self.starter.stdout is not None
        self.starter.stdin.write(json.dumps(asked) + "\n")
        self.starter.stdin.flush()
        return Process(int(self.starter.stdout.readline()), file)

    def client(self, name: str, death: Iterable[object] = ()) -> None:
        self.clients[name] = self.start("client", "start", self.hearts / "clients" / name, death=death)


@contextmanager
def serving(
    kind: type[Served],
    folder: Path,
    link: str = "grpc",
    more: str = "",
    environment: Mapping[str, str] | None = None,
    ports: tuple[int, int] | None = None,
) -> Iterator[Served]:
    """Provision a federation on a free port and start its clients; all of them end with the block.

    `more` stands at the end of the federation's file; `environment` is added to that of the processes; `ports` are the one
    that clients connect to, and the one that the server listens on.
    """
    port, listen = ports or (free_port(),) * 2
    made = kind(make_federation(folder, port, link, more=more, listen=listen), starter_in(environment or {}))
    with living(made):
        for bundle in sorted((made.hearts / "clients").iterdir()):
            made.client(bundle.name)
        yield made


def starter_in(environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Return a process that starts commands; `environment` is added to theirs."""
    return subprocess.Popen(
        [sys.executable, str(STARTER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GRPC_VERBOSITY": "NONE", **environment},
    )


@contextmanager
def living(made: Served) -> Iterator[None]:
    """End the clients of a federation, and what starts them, with the block."""
    try:
        yield
    finally:
        for each in made.clients.values():
            if each.alive:
                os.kill(each.pid, signal.SIGKILL)
        made.starter.communicate()
