"""What stands before a SuperLink: the calls of SuperNodes and nothing else, of those who are admitted, in bounds."""

import asyncio
import json
import runpy
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedveil.base.refusal import Refusal
from fedveil.deployment.provision import rotate
from fedveil.links.flower import tls_proxy as front_module
from fedveil.links.flower.fleet_calls import FLEET_PATHS, signed_by
from fedveil.links.flower.tls_proxy import MAX_BODY_BYTES, TlsProxy, open_tls_proxy
from fedveil.links.roster_watch import Nodes, admitted_in, followed_roster, nodes_of
from fedveil.links.server_bundle import read_server_bundle

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

ENDS = Path(__file__).parents[2] / "faults" / "flower_ends.py"
MADE = runpy.run_path(str(ENDS))
make, node_key, signed = (MADE[name] for name in ("make", "node_key", "signed"))
PUSH, PULL = "/v1/fleet/push-object", "/v1/fleet/pull-messages"
MEBIBYTE = 1 << 20


@dataclass
class Upstream:
    """Stands for the SuperLink: notes what reaches it, and answers with the body that came."""

    url: str = ""
    paths: list[str] = field(default_factory=list)
    most: int = 0
    held: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        body = b""
        while (event := await receive())["type"] == "http.request":
            body += event.get("body", b"")
            self.most = max(self.most, len(body))
            if not event.get("more_body"):
                break
        while self.held.is_set():
            await asyncio.sleep(0.01)
        headers = [(b"flwr-told", b"yes"), (b"set-cookie", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("desk"), 8443)


@pytest.fixture(scope="module")
def serving() -> Iterator[Upstream]:
    upstream = Upstream()
    config = uvicorn.Config(upstream, lifespan="off", log_config=None, ws="none")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        upstream.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield upstream
        server.should_exit = True
        thread.join()


@pytest.fixture
def upstream(serving: Upstream) -> Upstream:
    serving.paths.clear()
    serving.most = 0
    return serving


def in_roster(server: Path) -> Nodes:
    return nodes_of(followed_roster(read_server_bundle(server)))


@pytest.fixture
def port(upstream: Upstream, made: Path) -> Iterator[int]:
    server = made / "server"
    front = TlsProxy(upstream.url, admitted_in(server / "supernodes.json", in_roster(server)))
    with open_tls_proxy(front, "127.0.0.1:0", server / "tls.pem", server / "tls.key") as port:
        yield port


@pytest.fixture
def client(port: int, made: Path) -> Iterator[httpx.Client]:
    trust = ssl.create_default_context(cafile=str(made / "server" / "ca.pem"))
    with httpx.Client(base_url=f"https://localhost:{port}", verify=trust) as client:
        yield client


@pytest.fixture
def headers(made: Path) -> dict[str, str]:
    return signed(node_key(made, "east"))


def raw(port: int, made: Path) -> ssl.SSLSocket:
    trust = ssl.create_default_context(cafile=str(made / "server" / "ca.pem"))
    return trust.wrap_socket(socket.create_connection(("localhost", port), 20), server_hostname="localhost")


def said(connection: ssl.SSLSocket) -> bytes:
    answer = b""
    with suppress(OSError):
        while part := connection.recv(65536):
            answer += part
    return answer


def head(path: str, headers: dict[str, str], **more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in {**headers, **more}.items()]
    return "\r\n".join([*lines, "", ""]).encode()


# --- which calls ------------------------------------------------------------------------------------------------


def test_passing_calls_are_those_of_a_supernode() -> None:
    calls = [name for name in vars(FleetHttpClient) if name[0].isupper()]
    assert len(FLEET_PATHS) == len(calls) - 2  # not RegisterNode and UnregisterNode
    assert {("POST", path) for path in FLEET_PATHS} <= PROTOBUF_REQUEST_TYPES.keys()


def test_no_call_of_an_operator_or_an_executor_passes(
    client: httpx.Client, upstream: Upstream, headers: dict[str, str]
) -> None:
    others = {path for _, path in PROTOBUF_REQUEST_TYPES} - FLEET_PATHS
    assert "/v1/control/start-run" in others and "/v1/runtime/acquire-task" in others
    for path in [*sorted(others), "/health", "/docs", "/openapi.json", "/", "*"]:
        assert client.post(path, headers=headers).status_code in (400, 404), path
    for method in ("GET", "PUT", "HEAD", "OPTIONS", "CONNECT"):
        assert client.request(method, PULL, headers=headers).status_code in (400, 404), method
    assert upstream.paths == []


@pytest.mark.parametrize(
    "target",
    [
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/pull-messages/../../control/list-runs",
        "//v1/control/list-runs",
        "/v1/control/list-runs?/v1/fleet/pull-messages",
        "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2flist-runs",
        "http://127.0.0.1/v1/control/list-runs",
        "/V1/fleet/pull-messages",
        "/v1/fleet/pull%2Dmessages",
    ],
)
def test_no_spelling_of_a_path_passes_but_the_one(
    target: str, port: int, made: Path, upstream: Upstream, headers: dict[str, str]
) -> None:
    with raw(port, made) as connection:
        connection.sendall(head(target, headers, content_length="0"))
        assert said(connection).startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))
    assert upstream.paths == []


def test_two_lengths_of_one_body_are_refused(
    port: int, made: Path, upstream: Upstream, headers: dict[str, str]
) -> None:
    smuggled = b"POST /v1/control/list-runs HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    for lengths in ({"content_length": "4", "transfer_encoding": "chunked"}, {"content_length": "4, 5"}):
        with raw(port, made) as connection:
            connection.sendall(head(PULL, headers, **lengths) + b"0\r\n\r\n" + smuggled)
            assert b"HTTP/1.1 200" not in said(connection)
    assert not any("control" in path for path in upstream.paths)


# --- whose calls ------------------------------------------------------------------------------------------------


def test_an_admitted_node_is_passed_on_word_for_word(
    client: httpx.Client, upstream: Upstream, headers: dict[str, str]
) -> None:
    body = bytes(range(256)) * 20_000
    answer = client.post(f"{PUSH}?a=b", headers={**headers, "cookie": "no"}, content=body)
    assert (answer.status_code, answer.content, upstream.paths) == (200, body, [PUSH])
    assert answer.headers["flwr-told"] == "yes" and "set-cookie" not in answer.headers


def test_unadmitted_and_revoked_keys_are_turned_away(
    client: httpx.Client, upstream: Upstream, made: Path, headers: dict[str, str]
) -> None:
    assert client.post(PULL).status_code == 401
    assert client.post(PULL, headers=signed(generate_private_key(SECP384R1()))).status_code == 401
    assert client.post(PULL, headers=headers).status_code == 200
    listed = made / "server" / "supernodes.json"
    before = listed.read_text()
    fingerprint = signed_by(headers)
    listed.write_text(json.dumps({k: v for k, v in json.loads(before).items() if k != fingerprint}))
    assert client.post(PULL, headers=headers).status_code == 401
    listed.write_text(before)
    assert upstream.paths == [PULL]


def test_signature_covers_the_time_in_its_header(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    from datetime import timedelta

    from flwr.supercore.date import now

    from fedveil.links.flower import fleet_calls as flower_fleet

    assert signed_by(headers) is not None
    assert signed_by({**headers, "flwr-timestamp": now().isoformat()}) is None
    assert signed_by({**headers, "flwr-public-key": "AAAA"}) is None
    assert signed_by({**headers, "flwr-timestamp": "2026-01-01T00:00:00"}) is None  # without a zone
    for late in (timedelta(seconds=306), timedelta(seconds=-6)):
        monkeypatch.setattr(flower_fleet, "now", lambda late=late: now() + late)
        assert signed_by(headers) is None


def test_node_with_a_wrong_clock_is_informed_and_goes_on_once_right(
    monkeypatch: pytest.MonkeyPatch, port: int, made: Path, upstream: Upstream
) -> None:
    from datetime import timedelta

    from flwr.supercore.date import now

    from fedveil.links import device_answers
    from fedveil.links.flower import fleet_calls as flower_fleet

    monkeypatch.setattr(device_answers, "FIRST_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(device_answers, "LONGEST_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(flower_fleet, "now", lambda: now() + timedelta(seconds=400))  # the front's
    with MADE["following"](made, f"localhost:{port}", lambda message: message, ("east",)) as told:
        MADE["until"](lambda: sum("the server turns this device away" in line for line in told) >= 3)
        assert upstream.paths == []
        monkeypatch.setattr(flower_fleet, "now", now)
        MADE["until"](lambda: bool(upstream.paths))


# --- how much -----------------------------------------------------------------------------------------------------


def test_too_large_body_is_refused_by_its_length_or_when_it_has_come(
    client: httpx.Client, upstream: Upstream, headers: dict[str, str]
) -> None:
    body = bytes(MAX_BODY_BYTES)
    assert client.post(PUSH, headers=headers, content=body).status_code == 200
    assert client.post(PUSH, headers=headers, content=body + b"x").status_code == 413

    def pieces() -> Iterator[bytes]:
        yield from [bytes(MEBIBYTE)] * 32

    with suppress(httpx.WriteError):
        assert client.post(PUSH, headers=headers, content=pieces()).status_code == 413
    assert upstream.most <= MAX_BODY_BYTES


def test_the_parts_of_one_message_are_bounded_together(
    monkeypatch: pytest.MonkeyPatch, client: httpx.Client, headers: dict[str, str]
) -> None:
    monkeypatch.setattr(front_module, "MAX_REPLY_BYTES", 1000)
    part = bytes(600)
    assert client.post(PUSH, headers=headers, content=part).status_code == 200
    assert client.post(PUSH, headers=headers, content=part).status_code == 413
    assert client.post("/v1/fleet/push-messages", headers=headers, content=part).status_code == 200
    assert client.post(PUSH, headers=headers, content=part).status_code == 200


def test_headers_that_are_too_large_or_never_end_close_the_connection(
    monkeypatch: pytest.MonkeyPatch, port: int, made: Path, upstream: Upstream
) -> None:
    monkeypatch.setattr(front_module, "HEADER_SECONDS", 0.2)
    with raw(port, made) as connection:
        with suppress(OSError):
            connection.sendall(head(PULL, {"x": "x" * (1 << 18)}))
        assert b"200" not in said(connection)
    for begun in (b"", b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost:"):
        with raw(port, made) as connection:
            connection.sendall(begun)
            assert said(connection) == b""  # closed, or this would wait for 20 s
    assert upstream.paths == []


def test_one_node_cannot_take_all_of_the_calls(
    port: int, made: Path, upstream: Upstream, client: httpx.Client, headers: dict[str, str]
) -> None:
    upstream.held.set()
    try:
        held = [raw(port, made) for _ in range(front_module.MAX_NODE_CALLS)]
        for connection in held:
            connection.sendall(head(PULL, headers, content_length="0"))
        MADE["until"](lambda: len(upstream.paths) == len(held))
        assert client.post(PULL, headers=headers).status_code == 503
        upstream.held.clear()
        for connection in held:
            with closing(connection):
                assert connection.recv(15) == b"HTTP/1.1 200 OK"
    finally:
        upstream.held.clear()
    assert client.post(PULL, headers=headers).status_code == 200


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_six_hundred_mebibytes_do_not_grow_the_server_by_sixteen(made: Path, upstream: Upstream) -> None:
    command = [sys.executable, str(ENDS), str(made / "server"), upstream.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        port = int(process.stdout.readline())
        known = signed(node_key(made, "south"))
        pour(
            port, made, head(PULL, known, content_length="0"), 0
        )  # what the first call loads is not of a body
        before = peak(process.pid)
        for headers in ({}, known):
            for size in ({"content_length": str(600 * MEBIBYTE)}, {"transfer_encoding": "chunked"}):
                pour(port, made, head(PUSH, headers, **size), 600)
        grown = peak(process.pid) - before
        process.stdin.close()
    assert grown < 16 * MEBIBYTE
    assert upstream.most <= MAX_BODY_BYTES


def pour(port: int, made: Path, head: bytes, mebibytes: int) -> None:
    """Send as much as the other end takes."""
    chunk = b"100000\r\n" + bytes(MEBIBYTE) + b"\r\n"
    with raw(port, made) as connection:
        connection.sendall(head)
        with suppress(OSError):
            for _ in range(mebibytes):
                connection.sendall(chunk)
            connection.settimeout(1)
            connection.recv(15)


def peak(process: int) -> int:
    """The most memory that a process has had resident, in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


# --- where ------------------------------------------------------------------------------------------------------


def test_used_address_and_invalid_certificate_are_refused(made: Path) -> None:
    server = made / "server"
    front = TlsProxy("http://127.0.0.1:1", admitted_in(server / "supernodes.json", in_roster(server)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(Refusal, match="listen"),
            open_tls_proxy(front, listen, server / "tls.pem", server / "tls.key"),
        ):
            pass
    with (
        pytest.raises(Refusal, match="certificate"),
        open_tls_proxy(front, "127.0.0.1:0", server / "ca.pem", server / "tls.key"),
    ):
        pass


def test_connection_after_a_renewal_sees_the_new_certificate(made: Path, tmp_path: Path) -> None:
    server = Path(shutil.copytree(made, tmp_path / "made")) / "server"
    front = TlsProxy("http://127.0.0.1:1", admitted_in(server / "supernodes.json", in_roster(server)))
    trust = ssl.create_default_context(cafile=str(server / "ca.pem"))

    def shown() -> bytes | None:
        with (
            socket.create_connection(("127.0.0.1", port)) as raw,
            trust.wrap_socket(raw, server_hostname="localhost") as secured,
        ):
            return secured.getpeercert(binary_form=True)

    with open_tls_proxy(front, "127.0.0.1:0", server / "tls.pem", server / "tls.key") as port:
        first, key = shown(), (server / "tls.key").read_bytes()
        rotate(tmp_path / "made", ["server"], None)
        fresh = (server / "tls.key").read_bytes()
        (server / "tls.key").write_bytes(key)  # half of it has come
        assert shown() == first
        (server / "tls.key").write_bytes(fresh)
        assert shown() == ssl.PEM_cert_to_DER_cert((server / "tls.pem").read_text()) != first


def test_absent_superlink_is_reported(made: Path, headers: dict[str, str]) -> None:
    server = made / "server"
    front = TlsProxy("http://127.0.0.1:1", admitted_in(server / "supernodes.json", in_roster(server)))
    trust = ssl.create_default_context(cafile=str(server / "ca.pem"))
    with open_tls_proxy(front, "127.0.0.1:0", server / "tls.pem", server / "tls.key") as port:
        answer = httpx.post(f"https://localhost:{port}{PULL}", headers=headers, verify=trust)
    assert answer.status_code == 503
