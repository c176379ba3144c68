"""A federation over Flower's own link, for tests: its bundles, its clients in threads, and the front as a process.

As a script: `flower_ends.py SERVER_FOLDER UPSTREAM` serves the front alone and prints its port.
"""

import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.provision import provision
from fedveil.links import device_answers
from fedveil.links.flower import device_end as fleet
from fedveil.links.flower.device_end import SuperLinkEndpoint, follow_fleet, read_node_key
from fedveil.links.flower.tls_proxy import TlsProxy, open_tls_proxy
from fedveil.links.roster_watch import admitted_in, followed_roster, nodes_of
from fedveil.links.server_bundle import read_server_bundle
from fedveil.messages.wire import SPEC_RECORD

until = runpy.run_path(str(Path(__file__).with_name("patience.py")))["until"]
NAMES = ("north", "east", "south")
FEDERATION = """\
federation: compass
link: flower
server: {{address: "localhost:{port}", listen: "127.0.0.1:{port}"}}
certificate_days: 90
task: {{name: digits}}
policy: {{target_epsilon: 8.0, target_delta: 1e-5}}
clients:
"""


def make(folder: Path, port: int, names: tuple[str, ...] = NAMES) -> Path:
    """Provision a federation, and return the folder of its bundles."""
    text = FEDERATION.format(port=port) + "".join(f"  - name: {name}\n" for name in names)
    (folder / "federation.yaml").write_text(text)
    provision(folder / "federation.yaml", folder / "compass", None)
    return folder / "compass"


def node_key(made: Path, name: str) -> EllipticCurvePrivateKey:
    return read_node_key(made / "clients" / name / "supernode.key")


def signed(key: EllipticCurvePrivateKey) -> dict[str, str]:
    """The headers by which Flower's own client says who it is."""
    kept: dict[str, str] = {}

    class Context:
        request = httpx.Request("POST", "https://localhost")

    def keep(context: Any) -> Any:
        kept.update({k: v for k, v in context.request.headers.items() if k.startswith("flwr-")})

    NodeAuthHttpInterceptor(key, key.public_key()).intercept(Context, keep)  # type: ignore[arg-type]
    return kept


@contextmanager
def following(
    made: Path, server: str, handle: Callable[[Message], Message], names: tuple[str, ...] = NAMES
) -> Iterator[list[str]]:
    """Clients in threads of this process, and what they say of their connections."""
    stop, said = threading.Event(), list[str]()
    with ExitStack() as ending:
        ending.callback(stop.set)
        for name in names:
            bundle = read_client_bundle(made / "clients" / name)
            door = SuperLinkEndpoint(
                server, bundle.settings.node, bundle.credentials.ca, read_node_key(bundle.supernode_key)
            )
            told = (door, handle, bundle.state / "journal", stop, said.append)
            thread = threading.Thread(target=follow_fleet, args=told)
            thread.start()
            ending.callback(thread.join)
        ending.callback(stop.set)
        yield said


def asking(node: int, attempt: int = 0, **more: Any) -> Message:
    """A question of a run."""
    place = ConfigRecord({"run": "r", "round": 1, "attempt": attempt, "exchange": 0})
    return Message(RecordDict({SPEC_RECORD: place, **more}), node, "train")


def hasten() -> None:
    """Let clients look often and come back soon."""
    fleet.LONGEST_POLL_SECONDS = 0.2
    device_answers.FIRST_WAIT_SECONDS = device_answers.LONGEST_WAIT_SECONDS = 0.3


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    nodes = nodes_of(followed_roster(read_server_bundle(folder)))
    front = TlsProxy(sys.argv[2], admitted_in(folder / "supernodes.json", nodes))
    with open_tls_proxy(front, "127.0.0.1:0", folder / "tls.pem", folder / "tls.key") as port:
        print(port, flush=True)
        sys.stdin.read()
