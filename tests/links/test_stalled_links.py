"""Links whose other end stalls, renegotiates, expires or whose clocks jump: the others are served, and nothing ends."""

import runpy
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedveil.links.grpc.grid import LinkGrid, open_link
from fedveil.messages.frames import Begin, Chunk, Hello, write
from fedveil.messages.wire import view

HERE = Path(__file__).parents[1]
MADE = runpy.run_path(str(HERE / "faults" / "link_ends.py"))
Federation, RawClient = MADE["Federation"], MADE["RawClient"]
asking, moved, until = (MADE[name] for name in ("asking", "moved", "until"))
MASKED = runpy.run_path(str(HERE / "faults" / "masked_clients.py"))
NODES = (2, 3)
DAY = 86_400.0
HANDSHAKES = 100


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Federation(tmp_path_factory.mktemp("federation"), NODES)


@pytest.fixture
def grid(federation: Any) -> Iterator[LinkGrid]:
    with open_link(federation.door()) as opened:
        yield opened


def served(grid: LinkGrid, node: int = 2) -> bool:
    [reply] = grid.send_and_receive([asking(node)], timeout=20)
    return bool(view(reply.content["arrays"]["x"])[0] == 1.0)


def test_trickling_reply_holds_up_its_round_to_the_deadline(grid: LinkGrid, federation: Any) -> None:
    slow = RawClient(federation.endpoint(3, grid.port))
    assert isinstance(slow.next(), Hello)
    with ThreadPoolExecutor(1) as pool, federation.following(federation.endpoint(2, grid.port), moved):
        until(lambda: len(grid.connected) == 2)
        future = pool.submit(list, grid.send_and_receive([asking(2), asking(3)], timeout=3))
        begin = slow.next()
        slow.send(write(Begin(begin.id, 100)))
        while not future.done():
            slow.send(write(Chunk(b"x")))
            time.sleep(0.05)
        assert [reply.metadata.src_node_id for reply in future.result()] == [2]
        assert served(grid)
    slow.close()


def hello_of_tls(federation: Any) -> bytes:
    """Return the first message of a handshake with the federation's server."""
    context = ssl.create_default_context(cadata=federation.server.ca.decode())
    came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(came, goes, server_hostname="127.0.0.1").do_handshake()
    return goes.read()


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_handshakes_that_stop_half_way_hold_up_nobody(grid: LinkGrid, federation: Any, part: float) -> None:
    first = hello_of_tls(federation)
    with ExitStack() as opened:
        for _ in range(HANDSHAKES):
            stranger = opened.enter_context(socket.create_connection(("127.0.0.1", grid.port), 20))
            stranger.sendall(first[: int(len(first) * part)])
        with federation.following(federation.endpoint(2, grid.port), moved):
            assert served(grid) and served(grid)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl")
def test_renegotiation_ends_that_connection(grid: LinkGrid, federation: Any, tmp_path: Path) -> None:
    own = federation.pairs[3]
    for name, pem in (("ca", own.ca), ("own", own.certificate + own.key)):
        (tmp_path / name).write_bytes(pem)
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{grid.port}", "-tls1_2", "-alpn", "h2"]
    command += [
        "-CAfile",
        str(tmp_path / "ca"),
        "-cert",
        str(tmp_path / "own"),
        "-key",
        str(tmp_path / "own"),
    ]
    with federation.following(federation.endpoint(2, grid.port), moved):
        said = subprocess.run(command, input=b"R\nR\n", capture_output=True, timeout=30, check=False)
        assert b"RENEGOTIATING" in said.stdout + said.stderr and said.returncode != 0
        assert served(grid)


def test_certificate_expiring_under_a_stream_ends_with_the_stream(federation: Any) -> None:
    """TLS looks at a certificate once, in the handshake; whoever is to go at once is revoked."""
    seconds = 6
    short = federation.authority.client(3, days=(seconds + 1) / DAY)
    before, federation.pairs[3] = federation.pairs[3], short
    federation.admit(*NODES)
    try:
        with (
            open_link(federation.door()) as grid,
            federation.following(federation.endpoint(2, grid.port), moved),
        ):
            begun = time.monotonic()
            with federation.following(federation.endpoint(3, grid.port), moved):
                assert served(grid, 3)
                time.sleep(max(0.0, begun + seconds + 1 - time.monotonic()))
                assert served(grid, 3) and served(grid, 2)
            said: list[str] = []
            with federation.following(federation.endpoint(3, grid.port), moved, said):
                until(lambda: len(said) >= 2)
                assert 3 not in grid.connected and served(grid, 2)
    finally:
        federation.pairs[3] = before
        federation.admit(*NODES)


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_a_clock_that_jumps_by_a_day_loses_no_round(
    grid: LinkGrid, federation: Any, jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = time.time
    with federation.following(federation.endpoint(2, grid.port), moved):
        assert served(grid)
        monkeypatch.setattr(time, "time", lambda: true() + jump)
        assert served(grid) and served(grid)
        monkeypatch.setattr(time, "time", true)
        assert served(grid)


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_encrypted_sum_opens_under_clock_jumps_of_a_day(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    true, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return true() + (jump if calls[0] % 3 else 0.0)

    monkeypatch.setattr(time, "time", jumping)
    rounds = MASKED["rounds_of"](MASKED["Clients"](), MASKED["wanted"](), 2)
    assert [each.survivors for each in rounds] == [MASKED["CLIENTS"]] * 2 and calls[0] > 16
