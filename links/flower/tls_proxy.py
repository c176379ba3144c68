"""TLS proxy of a SuperLink: it forwards only the calls of admitted SuperNodes, within bounds.

A SuperLink does not authenticate its operator, listens on one port for all callers, and reads a whole body before it
checks the sender. The proxy identifies the caller by the headers, before it reads any of the body, and forwards a body
as it arrives, 64 KiB at a time.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h11
import httpx
import uvicorn
from starlette.background import BackgroundTask
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...base.open_files import listener
from ...base.refusal import Refusal
from ...configs.bundle_files import ROLLOVERS, read_rollovers
from ...messages.traffic import CONTROL, LOST, NodeTraffic
from ...privacy.secagg.rollover import Rollover
from ..roster_watch import Admitted, Followed
from ..server_bundle import FORMER
from .fleet_calls import FLEET_PATHS, PULL_OBJECT, PUSH_MESSAGES, PUSH_OBJECT, signed_by

MAX_BODY_BYTES = 8 << 20  # Flower sends arrays in chunks of 5 MiB
MAX_REPLY_BYTES = 1 << 28  # of one message, as on our own link
MAX_HEADER_BYTES = 16 << 10
MAX_CONNECTIONS = 512
MAX_CALLS, MAX_NODE_CALLS = 64, 8  # at one time: of all nodes, and of one
HEADER_SECONDS, CALL_SECONDS, IDLE_SECONDS = 15, 300, 30
STOP_SECONDS = 2  # for calls that are being answered when the proxy ends
# Forwarded headers: those with these names, and those with a name that begins so.
PASSED, PASSED_PREFIX = ("content-type", "content-length", "accept", "user-agent"), "flwr-"
# A record of TLS 1.3 has 22 bytes more than its content (RFC 8446, section 5.2), which has at most 16 KiB.
TLS_RECORD, MAX_RECORD = 22, 1 << 14
# Bytes of a connection's handshake, with a post-quantum exchange of keys, and the server's certificate alone, by a relay.
OPENING_UP, OPENING_DOWN = 1620, 2490
LINE_END = "\r\n"
STATUS_LINE = len("HTTP/1.1 200 OK" + LINE_END + "date: Thu, 01 Jan 1970 00:00:00 GMT" + LINE_END)


class _TooLarge(Exception):
    """Body of a call that exceeds `MAX_BODY_BYTES`, or `MAX_REPLY_BYTES` together with the message's other parts."""


class TlsProxy:
    """Proxy as an ASGI application.

    Args:
      upstream: URL of the SuperLink.
      admitted: returns the nodes by the fingerprints of their SuperNode keys.
      socket_path: Unix socket of the SuperLink; None if it listens on a port.

    Attributes:
      traffic: between the server and its nodes.
    """

    def __init__(self, upstream: str, admitted: Admitted, socket_path: Path | None = None) -> None:
        self._upstream, self._admitted = upstream, admitted
        limits = httpx.Limits(max_connections=MAX_CALLS, max_keepalive_connections=MAX_CALLS)
        way = httpx.AsyncHTTPTransport(
            uds=None if socket_path is None else str(socket_path), limits=limits, trust_env=False
        )
        self._client = httpx.AsyncClient(timeout=CALL_SECONDS, transport=way, trust_env=False)
        self._calls: Counter[int] = Counter()  # that are being answered, by node
        self._message_bytes: Counter[int] = Counter()  # of the message that each node pushes in parts
        self.traffic = NodeTraffic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        call = _CountedCall(receive, send)
        request = Request(scope, call.receive)
        node = self._caller(request)
        if isinstance(node, Response):
            await node(scope, call.receive, call.send)
            self._count(call, scope, None)
            return
        self._calls[node] += 1
        try:
            async with asyncio.timeout(CALL_SECONDS):
                response = await self._pass_on(request, node)
                await response(scope, call.receive, call.send)
        except (TimeoutError, ClientDisconnect):
            pass  # uvicorn closes what was not answered
        finally:
            self._calls[node] -= 1
            self._count(call, scope, node)

    def connected(self) -> None:
        """Count the beginning of a connection."""
        self.traffic.tally.add("up", CONTROL, OPENING_UP)
        self.traffic.tally.add("down", CONTROL, OPENING_DOWN)

    def _count(self, call: _CountedCall, scope: Scope, node: int | None) -> None:
        """Count a call's bytes: a pushed or pulled part has the purpose of its node's message, everything else is `control`."""
        up = down = CONTROL
        received = call.received
        if node is not None:
            # A body that was not read has come, too.
            received = received or int(Headers(scope=scope).get("content-length", "0"))
            path, cargo = scope["raw_path"].decode("latin-1"), self.traffic.cargo.get(node)
            if path in (PUSH_MESSAGES, PUSH_OBJECT):
                up = LOST if cargo is None else cargo.up(received)
            elif path == PULL_OBJECT:
                down = LOST if cargo is None else cargo.down
        tally = self.traffic.tally
        tally.add("up", up, _request_bytes(scope) + _in_records(received))
        tally.add("down", down, _in_records(call.head) + _in_records(call.sent))

    def _caller(self, request: Request) -> int | Response:
        """Return the calling node by its headers, or the response that refuses it."""
        if request.method != "POST" or request.scope["raw_path"].decode("latin-1") not in FLEET_PATHS:
            return refused(404)
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return refused(413)
        node = self._admitted().get(signed_by(request.headers) or "")
        if node is None:
            return refused(401)
        if self._calls.total() >= MAX_CALLS or self._calls[node] >= MAX_NODE_CALLS:
            return refused(503)
        return node

    async def _pass_on(self, request: Request, node: int) -> Response:
        """Forward a node's call to the SuperLink, and return the response, whose body is read as it is sent on."""
        path = request.url.path
        if path == PUSH_MESSAGES:
            self._message_bytes[node] = 0
        body = self._body(request, node if path == PUSH_OBJECT else None)
        call = self._client.build_request(
            "POST", self._upstream + path, headers=_forwarded_headers(request.headers), content=body
        )
        try:
            answer = await self._client.send(call, stream=True)
        except _TooLarge:
            return refused(413)
        except httpx.HTTPError:
            return refused(503)
        headers = _forwarded_headers(answer.headers)
        return StreamingResponse(
            answer.aiter_raw(), answer.status_code, headers, background=BackgroundTask(answer.aclose)
        )

    async def _body(self, request: Request, node: int | None) -> AsyncIterator[bytes]:
        """Yield the body as it arrives; if a node is named, it is a part of its message. _TooLarge beyond the bounds of either."""
        received = 0
        async for chunk in request.stream():
            received += len(chunk)
            if node is not None:
                self._message_bytes[node] += len(chunk)
            too_long = node is not None and self._message_bytes[node] > MAX_REPLY_BYTES
            if received > MAX_BODY_BYTES or too_long:
                raise _TooLarge
            yield chunk

    async def close(self) -> None:
        """End the connections to the SuperLink."""
        await self._client.aclose()


def _forwarded_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return those of the headers that are forwarded."""
    return {k: v for k, v in headers.items() if k in PASSED or k.startswith(PASSED_PREFIX)}


class _CountedCall:
    """Both directions of a call, and their bytes so far: `received` of its body, `head` and `sent` of the answer."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.received = self.head = self.sent = 0

    async def receive(self) -> Message:
        """Return the next event."""
        event = await self._receive()
        self.received += len(event.get("body", b""))
        return event

    async def send(self, event: Message) -> None:
        """Send the answer's next event."""
        if event["type"] == "http.response.start":
            self.head = STATUS_LINE + _headers_bytes(event["headers"])
        self.sent += len(event.get("body", b""))
        await self._send(event)


def _request_bytes(scope: Scope) -> int:
    """Return the approximate bytes on a connection of a call without its body."""
    line = len(scope["method"]) + len(scope["raw_path"]) + len(" " + " HTTP/1.1" + LINE_END)
    return _in_records(line + _headers_bytes(scope["headers"]))


def _headers_bytes(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the bytes of headers, with the empty line after them."""
    return sum(len(name) + len(value) + len(": " + LINE_END) for name, value in headers) + len(LINE_END)


def _in_records(size: int) -> int:
    """Return the bytes on a connection of a single write of this many bytes."""
    return size + -(-size // MAX_RECORD) * TLS_RECORD


def refused(status: int) -> Response:
    """Return a response without a body, after which the connection is closed and the rest of a request not read."""
    return Response(status_code=status, headers={"connection": "close"})


class _BoundedHttp(H11Protocol):
    """Uvicorn's HTTP/1.1 with bounds on the number of connections and on the time for a request's headers."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Accept a connection, if there is room for it."""
        super().connection_made(transport)
        if isinstance(self.app, TlsProxy):
            self.app.connected()
        self._time_headers()
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes, and start or stop the timer of headers."""
        super().data_received(data)
        self._time_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def _time_headers(self) -> None:
        """Run the timer while a request's headers are incomplete; afterwards uvicorn's own timers run."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@contextmanager
def open_tls_proxy(proxy: TlsProxy, listen: str, certificate: Path, key: Path) -> Generator[int]:
    """Serve the proxy in a separate thread within the context, and yield its port.

    Connections that begin after certificate and key were replaced get the new ones.

    Args:
      proxy: the application.
      listen: address and port; port 0 takes a free one.
      certificate: path of the server's certificate in PEM.
      key: path of its private key in PEM.

    Raises:
      Refusal: the address cannot be listened on, or certificate and key do not go together.
    """
    listening = listener("listen", listen)
    config = uvicorn.Config(
        proxy,
        http=_BoundedHttp,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    try:
        config.load()
    except OSError as error:
        listening.close()
        raise Refusal("file", str(certificate), "is not a certificate of the key beside it") from error
    assert config.ssl is not None
    config.ssl.sni_callback = _newest(config.ssl, certificate, key)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=_serve, args=(server, listening, proxy), name="front")
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def _newest(first: ssl.SSLContext, certificate: Path, key: Path) -> Callable[..., None]:
    """Return the callback that gives each new connection the current certificate of the files.

    Until the overlap of a rollover ends, that is the certificate by the former authority. `first` is the context that is
    used while the files cannot be read.
    """

    def followed(path: Path) -> Followed[ssl.SSLContext]:
        def read(_: ssl.SSLContext) -> ssl.SSLContext:
            fresh = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            fresh.load_cert_chain(path, key)
            return fresh

        return Followed((path, key), read, first)

    newest, former = followed(certificate), followed(certificate.with_name(FORMER))
    path = certificate.with_name(ROLLOVERS)
    rollovers = Followed[tuple[Rollover, ...]]((), lambda _: read_rollovers(path, ""), (), optional=(path,))

    def choose(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        chain = rollovers()
        overlaps = chain and time.time() < chain[-1].until
        connection.context = former() if overlaps else newest()

    return choose


def _serve(server: uvicorn.Server, listening: socket.socket, proxy: TlsProxy) -> None:
    async def serve() -> None:
        await server.serve([listening])
        await proxy.close()

    asyncio.run(serve())
