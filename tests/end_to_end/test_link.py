"""The link between real processes: either end killed at any moment, and bodies that nobody asked for."""

import json
import os
import re
import runpy
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fedveil.links.grpc.grid import open_link
from fedveil.messages.frames import CHUNK_BYTES, Begin, frames_of, write
from fedveil.messages.wire import HANDLED_BEFORE, view

ENDS = Path(__file__).parents[1] / "faults" / "link_ends.py"
MADE = runpy.run_path(str(ENDS))
free_port = MADE["free_port"]
Authority, Federation, RawClient = (MADE[name] for name in ("MadeAuthority", "Federation", "RawClient"))
asking, moved, until = (MADE[name] for name in ("asking", "moved", "until"))
MEBI = 1 << 20
QUIET = {**os.environ, "GRPC_VERBOSITY": "NONE"}


class End:
    """One end of the link as a process."""

    def __init__(self, role: str, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen([sys.executable, str(ENDS), role, str(folder)], env=QUIET)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(20)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def kibibytes(self, field: str) -> int:
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(rf"{field}:\s+(\d+)", text)
        assert found is not None
        return int(found[1])


@contextmanager
def running(role: str, folder: Path) -> Iterator[End]:
    end = End(role, folder)
    try:
        yield end
    finally:
        end.kill()


@pytest.fixture
def federation(tmp_path: Path) -> Any:
    return Federation(tmp_path, (2, 3))


def test_a_client_killed_at_work_comes_back_and_does_not_do_it_twice(federation: Any) -> None:
    with open_link(federation.door()) as grid:
        folder = federation.write(federation.folder / "2", grid.port, 2, seconds=30)
        client = End("client", folder)
        replies = iter(grid.send_and_receive([asking(2, run="run", round=1)], timeout=40))
        got: list[Any] = []
        waiting = threading.Thread(target=lambda: got.append(next(replies)))
        waiting.start()
        until(lambda: client.lines("handled"))
        client.kill()
        federation.write(folder, grid.port, 2, seconds=0)
        with running("client", folder) as again:
            waiting.join(40)
            assert got[0].error.code == HANDLED_BEFORE
            assert len(again.lines("handled")) == 1
            [reply] = grid.send_and_receive([asking(2, run="run", round=2)], timeout=20)
            assert view(reply.content["arrays"]["x"])[0] == 1.0


def test_client_killed_during_receipt_does_the_work_later(federation: Any) -> None:
    """40 MB are on their way: what it never had whole, it never began."""
    with open_link(federation.door()) as grid:
        raw = RawClient(federation.endpoint(2, grid.port))
        raw.next()
        got: list[Any] = []
        asked = [asking(2, 10_000_000, run="run", round=1)]
        waiting = threading.Thread(target=lambda: got.extend(grid.send_and_receive(asked, timeout=40)))
        waiting.start()
        for _ in range(20):
            raw.next()
        raw.close()
        until(lambda: not grid.connected)
        with federation.following(federation.endpoint(2, grid.port), moved):
            waiting.join(40)
        assert view(got[0].content["arrays"]["x"]).shape == (10_000_000,)


def test_a_client_killed_while_it_replies_leaves_nothing_behind(federation: Any) -> None:
    with open_link(federation.door()) as grid:
        raw = RawClient(federation.endpoint(2, grid.port))
        raw.next()
        got: list[Any] = []
        asked = [asking(2, 500_000, run="run", round=1)]
        waiting = threading.Thread(target=lambda: got.extend(grid.send_and_receive(asked, timeout=40)))
        waiting.start()
        begin = raw.next()
        raw.send(*list(frames_of(begin.id, [bytes(8 * CHUNK_BYTES)]))[:4])
        time.sleep(0.2)
        raw.close()
        until(lambda: not grid.connected)
        with federation.following(federation.endpoint(2, grid.port), moved):
            waiting.join(40)
        assert view(got[0].content["arrays"]["x"])[0] == 1.0


def test_repeatedly_killed_server_gets_every_round_once(federation: Any) -> None:
    """Each of its lives asks rounds 0 to 3 anew, as one that resumes from its checkpoint asks the round it was in."""
    port = free_port()
    handled: dict[int, list[str]] = {2: [], 3: []}

    def handle(node: int) -> Callable[[Any], Any]:
        def work(message: Any) -> Any:
            handled[node].append(message.metadata.message_id)
            time.sleep(0.05)
            return moved(message)

        return work

    folder = federation.write(federation.folder / "server", port, rounds=1, size=300_000, stay=True)
    with ExitStack() as stack:
        for node in (2, 3):
            stack.enter_context(federation.following(federation.endpoint(node, port), handle(node)))
        for after in (0.0, 0.03, 0.5):
            server = End("server", folder)
            until(lambda: (folder / "port").exists())
            time.sleep(after)  # among connecting, sending, working, replying
            server.kill()
            (folder / "port").unlink()
        with running("server", folder) as server:
            until(lambda: server.lines("replies"))
            rounds = [json.loads(line) for line in server.lines("replies")]
    assert rounds[-1][1] == {"2": 300_000.0, "3": 300_000.0}
    assert {node: len(names) for node, names in handled.items()} == {2: 1, 3: 1}


# --- bodies that nobody asked for ---------------------------------------------------------------------------------


def pump(sock: socket.socket, size: int) -> int:
    """Send so many bytes, or as many as the other end lets in."""
    sent, block = 0, bytes(MEBI)
    with suppress(OSError):
        while sent < size:
            sock.sendall(block)
            sent += len(block)
    return sent


def plain(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 20)


def encrypted(port: int, pair: Any = None, folder: Path | None = None) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if pair is not None and folder is not None:
        (folder / "pair.pem").write_bytes(pair.certificate + pair.key)
        context.load_cert_chain(folder / "pair.pem")
    return context.wrap_socket(plain(port), server_hostname="127.0.0.1")


def posted(sock: socket.socket) -> socket.socket:
    """Begin HTTP/2, open a stream and a frame of data that never ends."""
    with suppress(OSError):
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
    return sock


def test_six_hundred_mebibytes_from_strangers_take_no_memory(federation: Any) -> None:
    folder = federation.write(federation.folder / "server", 0, rounds=0, size=1, stay=True)
    stranger = federation.authority.client(9)  # signed, but never admitted
    with running("server", folder) as server:
        until(lambda: (folder / "port").exists())
        port = int((folder / "port").read_text())
        with federation.following(federation.endpoint(2, port), moved, before_them := []):
            until(lambda: any("connected" in line for line in before_them))
        before = server.kibibytes("VmRSS")
        bodies = [
            lambda: plain(port),
            lambda: posted(encrypted(port)),
            lambda: posted(encrypted(port, Authority().client(2), folder)),
            lambda: posted(encrypted(port, stranger, folder)),
        ]
        for body in bodies:
            with suppress(OSError), body() as sock:
                pump(sock, 600 * MEBI)
        raw = RawClient(federation.endpoint(2, port, stranger))
        raw.send(*[write(Begin("x", 600 * MEBI))], *[bytes(CHUNK_BYTES)] * 2400)
        assert raw.ended()[0] == "PERMISSION_DENIED"
        raw.close()
        assert server.kibibytes("VmHWM") - before < 16 * 1024
        with federation.following(federation.endpoint(2, port), moved, said := []):
            until(lambda: any("connected" in line for line in said))
