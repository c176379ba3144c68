"""Server's end of enrolments: a port that is open while tokens are valid, and a queue that the authority answers.

Without a token a caller can only get the authority's public certificate and key. A connection occupies one of a few
slots for a few seconds. The port signs nothing and parses no request: it stores the bytes for the authority.
"""

from __future__ import annotations

import hmac
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...base.bounded_decoding import Undecodable, build, read_json
from ...base.durable_files import replace_file
from ...base.open_files import listener
from ...base.refusal import Refusal, refusing
from ...configs.bundle_files import NAME, ROSTER, read_file
from ..server_bundle import ServerBundle
from .messages import MAX_ASK, MAX_REQUEST, Ask, Reply, receive, send
from .token import lock_of

logger = logging.getLogger("fedveil.server")

TOKENS, QUEUE = "tokens.json", "enrolment"
MAX_CONNECTIONS = 32  # connections at one time
SECONDS = 10.0  # of one connection
PAUSE_SECONDS = 0.01  # between two connections: a flood costs at most a tenth of a second of TLS each second
POLL_SECONDS = 1.0  # between two reads of the open tokens


@dataclass(frozen=True)
class OpenToken:
    """Server's data of a token: a hash of its port's key, in hexadecimal, and the Unix second of its expiry."""

    lock: str
    end: int


def open_tokens(folder: Path, now: float) -> dict[str, OpenToken]:
    """Return the unexpired tokens of a server's bundle, by the names of their clients.

    Raises:
      Refusal: the list cannot be read; it then opens nothing.
    """
    return {name: each for name, each in _read_tokens(folder).items() if now <= each.end}


def _read_tokens(folder: Path) -> dict[str, OpenToken]:
    """Return all tokens of a server's bundle, expired ones too, by the names of their clients."""
    path = folder / TOKENS
    if not path.exists():
        return {}
    try:
        tokens = read_json(read_file(path))
        if not isinstance(tokens, dict) or not all(NAME.fullmatch(name) for name in tokens):
            raise Undecodable("it does not map names to tokens")
        return {name: build(OpenToken, each) for name, each in tokens.items()}
    except Undecodable as error:
        raise Refusal("file", str(path), f"lists no tokens ({error}); copy it from the desk") from None


def queue_stem(folder: Path, name: str, lock: str) -> Path:
    """Return the path of request and answer under one token, whose hash is `lock`, without their suffixes."""
    return folder / QUEUE / f"{name}.{lock[:16]}"


class EnrolmentPort:
    """Port of a server's bundle for devices that enrol.

    Args:
      bundle: of the server, with an address for enrolments.
      now: returns the Unix second.
    """

    def __init__(self, bundle: ServerBundle, now: Callable[[], float] = time.time) -> None:
        self._bundle, self._now = bundle, now
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._one_at_a_time = threading.Lock()  # for a request's file: the first request of a token counts

    def answer(self, ask: Ask) -> Reply:
        """Return the answer to a question; a token's first request is on disk by then, and another one is "used".

        Raises:
          Refusal: a file of the bundle cannot be read, or the request not be written.
        """
        if not ask.name:
            return Reply("authority", ca=self._bundle.credentials.ca, authority=self._bundle.authority)
        folder = self._bundle.folder
        token = _read_tokens(folder).get(ask.name)
        if token is None or not hmac.compare_digest(lock_of(ask.port_key), token.lock):
            return Reply("unknown")
        if self._now() > token.end:
            return Reply("ended")
        if not 0 < len(ask.request) <= MAX_REQUEST or len(ask.seal) != 32:
            return Reply("unknown")
        stem = queue_stem(folder, ask.name, token.lock)
        with self._one_at_a_time:
            request, answer = (stem.with_name(f"{stem.name}.{each}") for each in ("request", "answer"))
            if not request.exists():
                with refusing("request", request, "cannot be written"):
                    request.parent.mkdir(mode=0o700, exist_ok=True)
                    replace_file(request, ask.seal + ask.request)
            elif read_file(request) != ask.seal + ask.request:
                return Reply("used")
        if not answer.exists():
            return Reply("waits")
        return Reply("admitted", answer=read_file(answer), roster=read_file(folder / ROSTER))

    def serve(self, stop: threading.Event, notify: Callable[[str], None]) -> None:
        """Listen while tokens are open, and return when none is, or `stop` is set.

        Raises:
          Refusal: the address cannot be listened on.
        """
        tokens = open_tokens(self._bundle.folder, self._now())
        if not tokens:
            notify("no token is open: closed")
            return
        assert self._bundle.enrolment is not None
        with listener("enrolment", self._bundle.enrolment) as listening:
            listening.settimeout(POLL_SECONDS)
            notify(f"enrolment on {self._bundle.enrolment}: open tokens: {len(tokens)}")
            last_poll = time.monotonic()
            while tokens and not stop.is_set():
                if time.monotonic() - last_poll > POLL_SECONDS:
                    tokens, last_poll = self._still_open(tokens), time.monotonic()
                self._accept(listening)
        notify("no token is open any more: closed" if not tokens else "stopped")

    def _still_open(self, tokens: Mapping[str, OpenToken]) -> Mapping[str, OpenToken]:
        """Return the open tokens; those of before while the list cannot be read."""
        try:
            return open_tokens(self._bundle.folder, self._now())
        except Refusal as refusal:
            logger.error("%s", refusal)
            return tokens

    def _accept(self, listening: socket.socket) -> None:
        """Accept the next connection when a slot is free, and serve it in a thread of its own."""
        if not self._slots.acquire(timeout=POLL_SECONDS):
            return
        try:
            stream, _ = listening.accept()
        except OSError as error:
            self._slots.release()
            if not isinstance(error, TimeoutError):
                logger.warning("no connection can be taken: %s", error)
                time.sleep(POLL_SECONDS)
            return
        threading.Thread(target=self._hear, args=(stream,), daemon=True).start()
        time.sleep(PAUSE_SECONDS)

    def _hear(self, stream: socket.socket) -> None:
        """Answer the question on a connection, and free its slot."""
        end = time.monotonic() + SECONDS
        try:
            with suppress(OSError, Undecodable), stream:  # an unverified connection may end at any time
                stream.settimeout(SECONDS)
                with self._context().wrap_socket(stream, server_side=True) as sealed:
                    send(sealed, self.answer(receive(sealed, Ask, MAX_ASK, end)), end)
        except Refusal as refusal:
            logger.error("%s", refusal)
        except Exception:
            logger.exception("a question could not be answered")
        finally:
            self._slots.release()

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self._bundle.folder / "tls.pem", self._bundle.folder / "tls.key")
        return context
