"""Flower's own link for the benchmark of links: a SuperLink, our front before it, and a process for each client."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from ..links.flower.fleet_calls import node_fingerprint
from ..links.flower.grid import SuperNodeGrid
from ..links.flower.superlink import KEYS, LISTED, open_superlink
from ..simulations.in_process import FIRST_NODE
from .made_certificates import MadeAuthority


@dataclass(frozen=True)
class Told:
    """What a client is started with: its number, the authority's certificate and its key."""

    node: int
    ca: str
    key: str


Client = Callable[[Path, str, Told], AbstractContextManager[int]]


@contextmanager
def our_client(folder: Path, listen: str, told: Told) -> Generator[int]:
    """Run one of our clients as long as the context lasts."""
    path = folder / f"{told.node}.json"
    path.write_text(json.dumps([listen, told.node, told.ca, told.key]))
    process = subprocess.Popen([sys.executable, "-m", f"{__package__}.flower_link_client", str(path)])
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def flower_federation(
    clients: int, client: Client = our_client
) -> Generator[tuple[SuperNodeGrid, list[int]]]:
    """Start a server in this process, a SuperLink, and clients in processes of their own.

    Args:
      clients: how many.
      client: starts one of them, as long as its context lasts.

    Yields:
      The grid that reaches them, and the numbers of their processes.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nodes = tuple(range(FIRST_NODE, FIRST_NODE + clients))
        listen = _free_address()
        _write_server(folder)
        told = _write_keys(folder, nodes)
        grid = stack.enter_context(open_superlink(folder, listen, lambda: nodes))
        yield (grid, [stack.enter_context(client(folder, listen, each)) for each in told])


def _write_server(folder: Path) -> None:
    own = MadeAuthority().server()
    for name, pem in (("ca.pem", own.ca), ("tls.pem", own.certificate), ("tls.key", own.key)):
        (folder / name).write_bytes(pem)


def _write_keys(folder: Path, nodes: tuple[int, ...]) -> list[Told]:
    """Write what the server knows of the nodes' keys; return what the nodes are told."""
    (folder / KEYS).mkdir()
    listed: dict[str, int] = {}
    told: list[Told] = []
    for node in nodes:
        key = generate_private_key(SECP384R1())
        public = key.public_key()
        listed[node_fingerprint(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))] = node
        (folder / KEYS / f"{node}.pub").write_bytes(
            public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        )
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        told.append(Told(node, (folder / "ca.pem").read_text(), secret.decode()))
    (folder / LISTED).write_text(json.dumps(listed))
    return told


def _free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"
