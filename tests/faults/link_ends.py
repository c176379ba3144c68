"""Both ends of the link for tests: a federation's certificates, clients in threads, and either end as a process.

As a script: `link_ends.py server|client|app FOLDER`, with what it needs in the folder's `end.json`.
"""

import json
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedveil.benchmarks.link_clients import crowd, read_endpoints
from fedveil.benchmarks.made_certificates import MadeAuthority
from fedveil.configs.bundle_files import Credentials
from fedveil.links import device_answers
from fedveil.links.grpc import device_end as link
from fedveil.links.grpc.device_end import Endpoint, follow
from fedveil.links.grpc.grid import LinkGrid, ServerEndpoint, open_link
from fedveil.links.roster_watch import admitted_in, fingerprint
from fedveil.messages.frames import METHOD, PROTOCOL_VERSION, Frame, Hello, read, write
from fedveil.messages.wire import SECURE_RECORD, SPEC_RECORD, memory_arrays, view

until = runpy.run_path(str(Path(__file__).with_name("patience.py")))["until"]
free_port = runpy.run_path(str(Path(__file__).with_name("ports.py")))["free_port"]
device_answers.FIRST_WAIT_SECONDS, device_answers.LONGEST_WAIT_SECONDS = 0.05, 0.2
link.POLL_SECONDS = 0.02

Handle = Callable[[Message], Message]


class Federation:
    """Certificates for a server and its clients, and who of them is admitted, in a folder."""

    def __init__(self, folder: Path, nodes: tuple[int, ...]) -> None:
        self.folder, self.nodes = folder, nodes
        self.authority = MadeAuthority()
        self.server = self.authority.server()
        self.pairs = {node: self.authority.client(node) for node in nodes}
        self.admit(*nodes)

    def admit(self, *nodes: int) -> None:
        """Admit these and nobody else."""
        fresh = self.folder / "admitted.new"
        fresh.write_text(json.dumps({fingerprint(self.pairs[node].certificate): node for node in nodes}))
        fresh.replace(self.folder / "admitted.json")

    def door(self, listen: str | None = None) -> ServerEndpoint:
        admitted = admitted_in(self.folder / "admitted.json", lambda: self.nodes)
        return ServerEndpoint(
            listen or f"127.0.0.1:{free_port()}", lambda: self.server, lambda: self.nodes, admitted
        )

    def endpoint(self, node: int, port: int, pair: Credentials | None = None) -> Endpoint:
        return Endpoint(f"127.0.0.1:{port}", node, lambda: pair or self.pairs[node])

    def write(self, folder: Path, port: int, node: int = 0, **more: Any) -> Path:
        """Write what one end of the link needs to run as a process."""
        folder.mkdir(exist_ok=True)
        pair = self.pairs[node] if node else self.server
        told: dict[str, Any] = {k: v.decode() for k, v in asdict(pair).items()}
        told |= {
            "port": port,
            "node": node,
            "nodes": self.nodes,
            "admitted": str(self.folder / "admitted.json"),
        }
        (folder / "end.json").write_text(json.dumps({**told, **more}))
        return folder

    @contextmanager
    def following(self, endpoint: Endpoint, handle: Handle, said: list[str] | None = None) -> Iterator[None]:
        """A client in a thread of this process."""
        stop = threading.Event()
        journal = self.folder / f"journal-{endpoint.node}"
        told = [] if said is None else said
        thread = threading.Thread(target=follow, args=(endpoint, handle, journal, stop, told.append))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(20)
            assert not thread.is_alive()


def moved(message: Message, by: float = 1.0) -> Message:
    """Answer with the arrays that came, plus a number."""
    arrays = {name: view(array) + np.float32(by) for name, array in message.content["arrays"].items()}
    return Message(RecordDict({"arrays": memory_arrays(arrays)}), reply_to=message)


def asking(node: int, size: int = 5, value: float = 0.0, **place: int | str) -> Message:
    """Return an instruction; with a place, such as run and round, it is of a private sum."""
    records: dict[str, Any] = {"arrays": memory_arrays({"x": np.full(size, value, np.float32)})}
    if place:
        records[SPEC_RECORD] = ConfigRecord(dict(place))
    return Message(RecordDict(records), node, "train")


class RawClient:
    """A client that sends what it likes."""

    def __init__(self, endpoint: Endpoint, *, hello: Frame | None = None) -> None:
        own = endpoint.credentials()
        credentials = grpc.ssl_channel_credentials(own.ca, own.key or None, own.certificate or None)
        options = [("grpc.http2.bdp_probe", 0)]  # what it does not read, it does not let in either
        self._channel = grpc.secure_channel(endpoint.server, credentials, options)
        self._out: Any = link.queue.SimpleQueue()
        self._call = self._channel.stream_stream(METHOD)(iter(self._out.get, None), timeout=20)
        self.send(write(hello or Hello(PROTOCOL_VERSION, endpoint.node, [])))

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self._out.put(frame)

    def next(self) -> Frame:
        return read(next(self._call))

    def ended(self) -> tuple[str, str]:
        """Wait for the end; return the status and its words."""
        try:
            for _ in self._call:
                pass
        except grpc.RpcError:
            pass
        return self.status()

    def status(self) -> tuple[str, str]:
        """Wait for the end without reading."""
        return self._call.code().name, self._call.details()

    def close(self) -> None:
        self._out.put(None)
        self._channel.close()


# --- as a process -------------------------------------------------------------------------------------------------


def _credentials(told: dict[str, Any]) -> Credentials:
    return Credentials(*(told[name].encode() for name in ("ca", "certificate", "key")))


def _serve(folder: Path, told: dict[str, Any]) -> None:
    """Ask the nodes again and again, a round a line in `replies`; wait in round `told["hold"]` until it is killed."""
    nodes, own = told["nodes"], _credentials(told)
    admitted = admitted_in(Path(told["admitted"]), lambda: nodes)
    door = ServerEndpoint(f"127.0.0.1:{told['port']}", lambda: own, lambda: nodes, admitted)
    with open_link(door) as grid:
        (folder / "port.new").write_text(str(grid.port))
        (folder / "port.new").rename(folder / "port")
        _ask(grid, folder, told)


def _ask(grid: LinkGrid, folder: Path, told: dict[str, Any]) -> None:
    for number in range(told["rounds"]):
        asked = [
            asking(node, told["size"], float(number), run="run", round=number) for node in grid.get_node_ids()
        ]
        got = {r.metadata.src_node_id: r for r in grid.send_and_receive(asked, timeout=30)}
        sums = {n: float(view(r.content["arrays"]["x"]).sum()) for n, r in got.items() if r.has_content()}
        with open(folder / "replies", "a") as file:
            file.write(json.dumps([number, sums, grid.counts]) + "\n")
    while told["stay"]:
        time.sleep(1)


def _follow(folder: Path, told: dict[str, Any]) -> None:
    endpoint = Endpoint(f"127.0.0.1:{told['port']}", told["node"], lambda: _credentials(told))

    def handle(message: Message) -> Message:
        with open(folder / "handled", "a") as file:
            file.write(message.metadata.message_id + "\n")
        time.sleep(told.get("seconds", 0))
        return moved(message)

    follow(endpoint, handle, folder / "journal", threading.Event(), lambda _: None)


def _train(folder: Path, told: dict[str, Any]) -> None:
    """Be several clients of a task, with our own ClientApp; the second settings are of encrypted sums."""
    import torch

    from fedveil.client.app import make_client_app
    from fedveil.messages.flower_adapter import client_context

    torch.set_num_threads(1)  # as in the engines
    apps = [make_client_app(lambda _, text=text: text) for text in told["settings"]]
    contexts = {node: client_context(1, node - 2, len(told["nodes"]), {}) for node in told["nodes"]}
    crowd(
        read_endpoints(folder / "ends.json"),
        lambda message: apps[SECURE_RECORD in message.content](
            message, contexts[message.metadata.dst_node_id]
        ),
        folder,
        threading.Event(),
    )


if __name__ == "__main__":
    place = Path(sys.argv[2])
    {"server": _serve, "client": _follow, "app": _train}[sys.argv[1]](
        place, json.loads((place / "end.json").read_text())
    )
