"""Attestation of a server in its messages: a device sends a nonce, and the server answers with a quote over it.

A quote consists of the bytes that the server's own command prints for a hash of the nonce and of the server's TLS key.
fedveil does not interpret it: a command of the device's owner does.
"""

import hashlib
import logging
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from cryptography import x509
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from ..base.refusal import Refusal
from ..configs.bundle_files import Credentials, spki
from ..messages.flower_adapter import records_of
from ..messages.grids import PassingGrid
from ..messages.wire import QUOTE_RECORD, SPEC_RECORD

logger = logging.getLogger("fedveil.server")

QUOTE = "FEDVEIL_QUOTE"  # environment variable: the server's command
NONCE_BYTES = 32
MAX_QUOTE = 1 << 20  # bytes; quotes of TDX and SEV-SNP with their certificates take about 10 kB
MAX_CERTIFICATE = 1 << 13  # bytes, in PEM
QUOTE_SECONDS = 30.0  # for the server's command
_TAG = b"fedveil attestation 1\0"


@dataclass(frozen=True)
class Quote:
    """Quote of a server: the output of its command, and the certificate of its TLS key, in PEM."""

    quote: bytes
    certificate: bytes


def report_data(nonce: bytes, certificate: bytes) -> str:
    """Return the hash that a quote must attest: SHA-256 in hexadecimal of a nonce and of the key in a PEM certificate.

    Raises:
      ValueError: it is no certificate.
    """
    public = x509.load_pem_x509_certificate(certificate).public_key()
    return hashlib.sha256(_TAG + nonce + spki(public)).hexdigest()


def with_nonce(content: RecordDict, nonce: bytes) -> RecordDict:
    """Return a reply's content with a nonce, by which the device asks for a quote."""
    return RecordDict({**dict(content.items()), QUOTE_RECORD: ConfigRecord({"nonce": nonce})})


def nonce_of(content: RecordDict) -> bytes | None:
    """Return the nonce in a reply; None if it has none of `NONCE_BYTES`."""
    nonce = records_of(content, ConfigRecord).get(QUOTE_RECORD, ConfigRecord()).get("nonce")
    return nonce if isinstance(nonce, bytes) and len(nonce) == NONCE_BYTES else None


def quote_of(content: RecordDict) -> Quote | None:
    """Return the quote in an instruction, None if there is none.

    Raises:
      Refusal: it is malformed.
    """
    record = records_of(content, ConfigRecord).get(QUOTE_RECORD)
    if record is None:
        return None
    quote, certificate = record.get("quote"), record.get("certificate")
    if not isinstance(quote, bytes) or not isinstance(certificate, bytes):
        raise Refusal("attest", "record", "is not a quote of a server")
    if len(quote) > MAX_QUOTE or len(certificate) > MAX_CERTIFICATE:
        raise Refusal("attest", f"{len(quote)} bytes", f"is longer than the longest quote, {MAX_QUOTE}")
    return Quote(quote, certificate)


def run_quote_command(command: Sequence[str], nonce: bytes, certificate: bytes) -> bytes:
    """Return the output of the server's command for a nonce; if it fails, return b"" and log why.

    Args:
      command: of the server; the hash to attest is added as its last argument.
      nonce: of a device.
      certificate: of the server, in PEM.
    """
    try:
        arguments = [*command, report_data(nonce, certificate)]
        process = subprocess.run(
            arguments, capture_output=True, timeout=QUOTE_SECONDS, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.error("no quote for a device that asks for one: %s", error)
        return b""
    return process.stdout


class AttestedGrid(PassingGrid):
    """Grid that answers devices' nonces with quotes, which `command` prints, in the next instruction to them."""

    def __init__(self, grid: Grid, command: str, credentials: Callable[[], Credentials]) -> None:
        super().__init__(grid)
        self._command, self._credentials = shlex.split(command), credentials
        self._nonces = dict[int, bytes]()  # by node

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send the messages, with quotes for devices that asked for one, and yield the replies.

        At most one message goes to each node; a nonce in a reply is for the next message. `timeout` is in seconds.
        """
        outgoing = [self._with_quote(message) for message in messages]
        for reply in self._grid.send_and_receive(outgoing, timeout=timeout):
            if not reply.has_error():
                node, nonce = reply.metadata.src_node_id, nonce_of(reply.content)
                if nonce is not None:
                    self._nonces[node] = nonce
                else:
                    self._nonces.pop(node, None)
            yield reply

    def _with_quote(self, message: Message) -> Message:
        """Return an instruction with a quote over its node's nonce, if the node has sent one."""
        head = message.metadata
        nonce = self._nonces.get(head.dst_node_id)
        if nonce is None or SPEC_RECORD not in message.content:
            return message
        certificate = self._credentials().certificate
        quote = run_quote_command(self._command, nonce, certificate)
        record = ConfigRecord({"quote": quote, "certificate": certificate})
        content = RecordDict({**dict(message.content.items()), QUOTE_RECORD: record})
        return Message(content, head.dst_node_id, head.message_type, ttl=head.ttl, group_id=head.group_id)
