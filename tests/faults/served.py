"""A provisioned federation of five on the digits, and a link that reaches its devices by calling them."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Message

from fedveil.client.bundle import read_client_bundle
from fedveil.client.device import Device, read_device
from fedveil.deployment.links import Link, Presence
from fedveil.deployment.provision import provision
from fedveil.strategies.flower_adapter import claim_identity, name_message, name_sender
from fedveil.strategies.grids import AskingGrid

FEDERATION = """\
federation: hearts
server: {{address: "localhost:{port}", listen: "127.0.0.1:{port}"}}
task: {{name: digits}}
policy: {{target_epsilon: 20.0, target_delta: 1e-5, trust_server: true}}
clients: [{{name: cleveland}}, {{name: hungary}}, {{name: switzerland}}, {{name: longbeach}}, {{name: boston}}]
"""

Fault = Callable[[Message, int], Message | None]


def make_federation(folder: Path, port: int = 8443, link: str = "grpc") -> Path:
    (folder / "federation.yaml").write_text(FEDERATION.format(port=port) + f"link: {link}\n")
    provision(folder / "federation.yaml", folder / "hearts", None)
    return folder / "hearts"


class Devices(AskingGrid):
    """Every device, called in turn; `fault` may answer in its place, given the message and how many came before."""

    def __init__(self, clients: Path, fault: Fault | None = None) -> None:
        self._run = claim_identity(1)
        bundles = [read_client_bundle(folder) for folder in sorted(clients.iterdir())]
        self.devices: dict[int, Device] = {each.settings.node: read_device(each) for each in bundles}
        self.fault, self.count = fault, 0

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
        yield Link(grid, lambda: Presence(since, received=1000, sent=2000, turned_away={"late": 1}))

    return reach
