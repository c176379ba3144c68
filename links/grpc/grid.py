"""Flower grid over streams that devices open: mutual TLS, one stream for each device, nothing else on the port.

A message is delivered at least once while its exchange waits, and its first reply counts. Its id follows from its
content (`question_id`): a question that is repeated after a restart has the same id, so that a device may answer it
from memory.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import queue
import secrets
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from flwr.app import Error, Message

from ...base.bounded_decoding import read_json
from ...base.durable_files import replace_file
from ...base.open_files import MAX_CONNECTIONS, for_connections, listener
from ...base.refusal import Refusal, unreadable
from ...configs.bundle_files import Credentials
from ...messages.flower_adapter import claim_identity, name_message, name_sender
from ...messages.frames import METHOD
from ...messages.message_codec import Body, MalformedMessage, pack_body, question_id, segments, unpack
from ...messages.traffic import Cargo, Tally, cargo_of
from ...messages.wire import SPEC_RECORD, UNREADABLE, may_be_late, read_round, read_statement
from ..repeats import Repeats
from ..roster_grid import PRESENCE_SECONDS, RosterGrid
from ..roster_watch import Admitted, Nodes
from .event_loop import OPTIONS_OF_BOTH_ENDS, stream_loop
from .server_end import Letter, Switchboard, Traffic

logger = logging.getLogger("fedveil.server")

MAX_REPLY_BYTES = 1 << 28  # of one message, as on Flower's link
RENEWAL_SECONDS = 0.1  # see `_listen`; the gap that it covers lasts microseconds

OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the port fails, and does not share it
    ("grpc.max_concurrent_streams", 2),
    ("grpc.server_handshake_timeout_ms", 10_000),
    *OPTIONS_OF_BOTH_ENDS,
    ("grpc.http2.max_ping_strikes", 0),  # clients ping as often as the server
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


@dataclass(frozen=True)
class ServerEndpoint:
    """Address on which a server listens, its credentials, and the admitted nodes.

    Attributes:
      listen: address and port; port 0 takes a free one.
      credentials: returns those of the server's end; called for every connection.
      nodes: returns the roster's nodes; called every second.
      admitted: returns the nodes by the fingerprints of their TLS keys; called every second.
      acknowledged: file of the last instruction that each key has answered; None remembers it in this process only.
    """

    listen: str
    credentials: Callable[[], Credentials]
    nodes: Nodes
    admitted: Admitted
    acknowledged: Path | None = None


@contextmanager
def open_link(endpoint: ServerEndpoint) -> Generator[LinkGrid]:
    """Listen as long as the context lasts, and yield the grid.

    Raises:
      Refusal: the address cannot be listened on, certificate and key do not go together, or a file cannot be read.
    """
    acknowledged = read_acknowledged(endpoint.acknowledged)
    listener("listen", endpoint.listen).close()  # gRPC gives no reason for an address in use
    loop = stream_loop()
    board = Switchboard(endpoint.admitted, MAX_REPLY_BYTES, acknowledged)
    try:
        server, port = asyncio.run_coroutine_threadsafe(_listen(endpoint, board), loop).result()
    except Exception as error:
        raise Refusal("listen", endpoint.listen, f"no link can be opened there: {error}") from error
    watch = asyncio.run_coroutine_threadsafe(board.watch(), loop)
    try:
        yield LinkGrid(endpoint.nodes, board, port, endpoint.acknowledged)
    finally:
        watch.cancel()
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result()


async def _listen(endpoint: ServerEndpoint, board: Switchboard) -> tuple[Any, int]:
    """Start gRPC's server, and return it with its port."""
    connection_limit = ("grpc.max_allowed_incoming_connections", min(for_connections(), MAX_CONNECTIONS))
    server = grpc.aio.server(options=(*OPTIONS, connection_limit))
    service, method = METHOD.strip("/").split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(board.follow)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    last = endpoint.credentials()

    def renewal() -> Any:
        """Return the certificate for the connections from now on; None keeps the last one."""
        nonlocal last
        newest = endpoint.credentials()
        if newest == last:
            return None
        last = newest
        # gRPC frees the old certificate on return, although a connection that asked just before may not have taken its
        # reference yet, and the process would crash (grpc/grpc issue 36693). It asks under a lock, so that during this
        # pause no other connection gets that far, and those that are there take theirs.
        time.sleep(RENEWAL_SECONDS)
        return _certificate_configuration(newest)

    credentials = grpc.dynamic_ssl_server_credentials(
        _certificate_configuration(last), renewal, require_client_authentication=True
    )
    port = server.add_secure_port(endpoint.listen, credentials)
    await server.start()
    return server, port


def _certificate_configuration(credentials: Credentials) -> Any:
    return grpc.ssl_server_certificate_configuration(
        [(credentials.key, credentials.certificate)], credentials.ca + b"\n" + credentials.earlier
    )


def read_acknowledged(path: Path | None) -> dict[str, str]:
    """Return the last instruction that each key has answered, by its fingerprint; empty without a file.

    Raises:
      Refusal: it cannot be read.
    """
    if path is None or not path.exists():
        return {}
    try:
        return {str(key): str(name) for key, name in read_json(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError) as error:
        remedy = unreadable(error, "restore it, or remove it: no restored device is then noticed")
        raise Refusal("file", str(path), remedy) from error


Posted = dict[str, tuple[Letter, Message]]  # letters and their messages, by id
Replies = queue.SimpleQueue[tuple[Letter, bytearray]]


class LinkGrid(RosterGrid):
    """Grid over the streams of a roster's nodes, which listens on `port`; `open_link` makes it."""

    def __init__(self, nodes: Nodes, board: Switchboard, port: int, acknowledged: Path | None) -> None:
        super().__init__(claim_identity(run_id=1), nodes)
        self._board, self.port, self._acknowledged = board, port, acknowledged
        self._call = stream_loop().call_soon_threadsafe
        self._session, self._count = secrets.token_hex(8), itertools.count()  # of messages outside a run
        self._unreadable, self._stored = 0, dict(board.acknowledged)  # what the file `acknowledged` has
        self._late: Posted = {}  # of the last exchange, if answers to it may come in the next one
        self._arrived = Replies()  # of such exchanges

    @property
    def traffic(self) -> dict[int, Traffic]:
        """Traffic between the server and each node that ever connected."""
        return self._board.traffic()

    @property
    def tally(self) -> Tally:
        """Tally of the bytes of all nodes, by direction and purpose."""
        return self._board.tally

    @property
    def connected(self) -> dict[int, float]:
        """Connected nodes, with the Unix second at which each connected."""
        starts = {node: passed.connected_since for node, passed in self.traffic.items()}
        return {node: start for node, start in starts.items() if start}

    @property
    def restored(self) -> dict[int, float]:
        """Nodes that did not know an instruction that their key had answered, with the Unix second at which they said so."""
        return self._board.restored.copy()

    @property
    def counts(self) -> dict[str, int]:
        """Number of rejected streams and replies, by reason."""
        return {**self._board.counts(), "unreadable": self._unreadable}

    def _exchange(self, messages: list[Message], seconds: float) -> Iterator[Message]:
        """Post a letter for each message, and yield the replies; then withdraw the letters and store what was acknowledged.

        Letters of a sum whose answers may be late stay for the exchange of the next round, which yields these answers too.
        """
        may_wait = bool(messages) and may_be_late(messages[0].content)
        arrived = self._arrived if may_wait else Replies()
        outgoing = self._take_late(*read_round(messages[0].content)) if may_wait else Posted()  # not answered
        waiting = self._in_roster({name: letter.node for name, (letter, _) in outgoing.items()})
        repeats, end = Repeats(), time.monotonic() + seconds
        try:
            while messages or waiting or repeats.pending:
                if messages:
                    fresh = self._write_letters(messages, lambda letter, data: arrived.put((letter, data)))
                    posted = [letter for letter, _ in fresh.values()]
                    outgoing |= fresh
                    waiting |= {letter.id: letter.node for letter in posted}
                    self._call(self._board.post, posted)
                seconds_left = max(0.0, end - time.monotonic())
                try:
                    letter, data = arrived.get(timeout=min(seconds_left, PRESENCE_SECONDS))
                except queue.Empty:
                    if not seconds_left:
                        break
                    waiting, messages = self._in_roster(waiting), repeats.due(self._nodes)
                    continue
                messages = repeats.due(self._nodes)
                if letter.id not in outgoing:
                    continue  # of an earlier round
                _, request = outgoing.pop(letter.id)
                if waiting.pop(letter.id, None) is None:
                    continue  # its node has left the roster since it was asked
                reply = self._read(request, data)
                if not reply.has_error() and SPEC_RECORD in request.content:
                    self._board.acknowledge(letter.node, letter.id)
                del data  # or its memory is held until the next reply
                if not repeats.take(request, reply):
                    yield reply
                del reply
            yield from repeats.answers()
        finally:
            if may_wait:
                self._late = outgoing
            else:
                self._call(self._board.withdraw, [letter for letter, _ in outgoing.values()])
            self._store_acknowledged()

    def _take_late(self, run: str, number: int) -> Posted:
        """Return the letters of the round before, whose answers may still count, and withdraw those of other rounds."""
        letters, self._late = self._late, {}
        before = run, number - 1
        late = {name: each for name, each in letters.items() if read_round(each[1].content) == before}
        self._call(self._board.withdraw, [letters[name][0] for name in letters.keys() - late.keys()])
        return late

    def _store_acknowledged(self) -> None:
        """Store the last instruction that each key has answered; if that fails, fewer copied devices are noticed."""
        acknowledged = dict(self._board.acknowledged)
        if self._acknowledged is not None and acknowledged != self._stored:
            try:
                replace_file(self._acknowledged, (json.dumps(acknowledged) + "\n").encode())
                self._stored = acknowledged
            except OSError as error:
                logger.warning("%s cannot be written: %s", self._acknowledged, error.strerror)

    def _write_letters(self, messages: list[Message], deliver: Callable[[Letter, bytearray], None]) -> Posted:
        """Return the letter and the message of each id; content that several messages share is packed once.

        `deliver` is called with a letter and the bytes of its reply.
        """
        bodies: dict[int, tuple[Body, Cargo]] = {}
        letters: Posted = {}
        for message in messages:
            if (packed := bodies.get(id(message.content))) is None:
                packed = bodies[id(message.content)] = pack_body(message), cargo_of(message)
            body, cargo = packed
            name_message(message, self._name(message, body))
            head = message.metadata
            statement = read_statement(message.content)
            size = statement.size if statement is not None and statement.difference else 0
            letter = Letter(head.message_id, head.dst_node_id, segments(head, body), cargo, deliver, size)
            letters[letter.id] = (letter, message)
        return letters

    def _name(self, message: Message, body: Body) -> str:
        """Return the id of a message; outside a run a fresh one, since an equal question may need another answer."""
        node = message.metadata.dst_node_id
        return question_id(message, body, node) or f"{self._session}/{next(self._count)}/{node}"

    def _read(self, request: Message, data: bytearray) -> Message:
        """Return the reply in the bytes, with the requested node as its sender, whatever sender it names."""
        node = request.metadata.dst_node_id
        try:
            reply = unpack(data)
            if reply.metadata.reply_to_message_id != request.metadata.message_id:
                raise MalformedMessage("a reply belongs to another message")
        except Exception as error:  # noqa: BLE001 (whatever one reply is, it costs that reply)
            logger.warning("a reply of node %s cannot be read: %s", node, type(error).__name__)
            self._unreadable += 1
            reply = Message(Error(UNREADABLE, "unreadable"), reply_to=request)
        return name_sender(reply, node)
