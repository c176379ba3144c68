"""Device's end of Flower's link: a SuperNode that polls a SuperLink and answers with the code that its owner installed.

Flower's own SuperNode starts a process for each message and runs the server's code in it. This one makes the same calls
in the process that holds model and data, and never requests code.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Error, Message

from ...base.refusal import Refusal
from ...configs.bundle_files import read_secret
from ...messages.message_codec import pack_body, question_id
from ...messages.wire import FAILED
from ..device_answers import MAX_BYTES, Handle, Journal, Longest, back_off, handle_once, loss_line, usual_wait
from .fleet_calls import (
    FLEET_FAILURES,
    HEARTBEAT_SECONDS,
    RUN_OVER,
    TOO_LARGE,
    UNKNOWN_NODE,
    FleetNode,
    beating,
    load_node_key,
)

logger = logging.getLogger("fedveil.client")

# Flower's own SuperNode polls every 3 s, too slow for a round of several exchanges.
SHORTEST_POLL_SECONDS, LONGEST_POLL_SECONDS, SLOWER = 0.2, 3.0, 1.1
BEAT_SECONDS = 0.8 * HEARTBEAT_SECONDS


@dataclass(frozen=True)
class SuperLinkEndpoint:
    """Address of the SuperLink, and identity of this device.

    Attributes:
      server: host and port; the server's certificate must name that host.
      node: this device's number.
      ca: the authority's certificate in PEM.
      key: private key of this device as a SuperNode.
    """

    server: str
    node: int
    ca: bytes
    key: EllipticCurvePrivateKey


def read_node_key(path: Path) -> EllipticCurvePrivateKey:
    """Return the SuperNode's key of a bundle.

    Raises:
      Refusal: it cannot be read, is another kind of key, or may be read by others.
    """
    try:
        return load_node_key(read_secret(path))
    except ValueError:
        raise Refusal("file", str(path), "is not a key of a Flower SuperNode; provision again") from None


@dataclass
class ReplyMemory:
    """Memory of the last reply, for a repeated instruction, and of `unsent`, a reply that is not delivered yet."""

    node: int
    handle: Handle
    journal: Journal
    unsent: Message | None = None
    _last_id: str = ""  # of the instruction that was answered last
    _last_reply: Message | None = None  # None while the next one is worked on, too

    def reply_to(self, message: Message) -> Message:
        """Return the reply to an instruction; a repeated one is answered from memory."""
        try:
            name = question_id(message, pack_body(message), self.node) or message.metadata.message_id
            reply = self._last_reply if name == self._last_id else None
            if reply is None:
                self._last_reply = None  # its memory is free for the next one
                reply = handle_once(name, message, self.handle, self.journal)
                self._last_id, self._last_reply = name, reply
            content = reply.error if reply.has_error() else reply.content
            return Message(content, reply_to=message)
        except Exception:
            # The error may depend on the data: only the owner's log has it.
            logger.exception("an instruction failed at this client")
        return Message(Error(FAILED, "the client failed"), reply_to=message)

    def settle(self, connection: FleetNode) -> None:
        """Deliver the unsent reply, if there is one; a server that refuses it no longer needs it."""
        if self.unsent is None:
            return
        try:
            connection.send(self.unsent)
        except httpx.HTTPStatusError as refused:
            if refused.response.status_code not in (RUN_OVER, TOO_LARGE):
                raise
            logger.warning("a reply was not taken: %s", _reason(refused))
        self.unsent = None


def follow_fleet(
    endpoint: SuperLinkEndpoint,
    handle: Handle,
    journal: Path,
    stop: threading.Event,
    notify: Callable[[str], None] = logger.info,
    longest: Longest = usual_wait,
) -> None:
    """Follow a SuperLink until `stop` is set, also after failures; other arguments as of `grpc.device_end.follow`.

    Raises:
      OSError: the journal cannot be opened.
    """
    instructions = Journal(journal)
    connection = FleetNode(endpoint.server, endpoint.ca, endpoint.key, MAX_BYTES)
    answers, failures = ReplyMemory(endpoint.node, handle, instructions), 0
    try:
        with beating(connection.beat, BEAT_SECONDS):
            while not stop.is_set():
                try:
                    connection.go_online()
                    notify(f"connected to {endpoint.server}")
                    failures = 0
                    _work(connection, answers, stop)
                except Exception as failure:
                    if not isinstance(failure, FLEET_FAILURES):
                        logger.exception("the link failed")
                    failures += 1
                    seconds = back_off(failures, longest())
                    notify(loss_line(seconds, _reason(failure)))
                    stop.wait(seconds)
    finally:
        connection.go_offline()
        instructions.close()


def _work(connection: FleetNode, answers: ReplyMemory, stop: threading.Event) -> None:
    """Answer messages until `stop` is set or a call fails; while there are none, poll less and less often."""
    answers.settle(connection)
    wait = SHORTEST_POLL_SECONDS
    while not stop.is_set():
        if _answer_next(connection, answers):
            wait = SHORTEST_POLL_SECONDS
        else:
            stop.wait(wait)
            wait = min(LONGEST_POLL_SECONDS, wait * SLOWER)


def _answer_next(connection: FleetNode, answers: ReplyMemory) -> bool:
    """Answer the next message, if there is one, release its memory, and return whether there was one."""
    message = connection.receive()
    if message is not None:
        answers.unsent = answers.reply_to(message)
        answers.settle(connection)
    return message is not None


def _reason(failure: Exception) -> str:
    """Return why a call failed, for the device's owner."""
    if not isinstance(failure, httpx.HTTPStatusError):
        return str(failure) or type(failure).__name__
    if failure.response.status_code == UNKNOWN_NODE:
        return "the server turns this device away, which was revoked, has new keys, or a clock that is wrong"
    return f"the server said {failure.response.status_code}"
