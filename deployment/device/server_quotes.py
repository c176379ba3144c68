"""Attestation quotes of the server: a command of the device's owner must accept one before shares are sent."""

import logging
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from flwr.app import RecordDict

from ...base.refusal import Refusal
from ...links.attestation import NONCE_BYTES, Quote, quote_of, report_data
from ...links.tree_head import server_certificate
from ...messages.secure_wire import messages_of
from ...privacy.secagg.messages import Proposal, read_any
from ...privacy.secagg.refusal import Refused

logger = logging.getLogger("fedveil.client")

VALID_SECONDS = 6 * 3600.0  # validity of an accepted quote
RENEW_SECONDS = 3600.0  # age at which a new one is requested
COMMAND_SECONDS = 60.0
MAX_OUTPUT = 200  # characters of the command's output


@dataclass
class ServerQuotes:
    """Owner's requirement of quotes, and the nonce and the quote of this process that are current.

    Attributes:
      command: of the owner: it gets the quote on its standard input and the expected report data as its last argument,
        and accepts by exit code 0. Without one no quote is required.
      federation: name of the device's federation.
    """

    command: Sequence[str]
    federation: str
    _nonce: bytes = b""  # sent last and not yet answered; empty for none
    _accepted: float = field(default=float("-inf"))  # by the monotonic clock

    def check(self, content: RecordDict, ca: bytes) -> None:
        """Require a quote that was accepted now or within `VALID_SECONDS`, unless the answer consists of keys only.

        Args:
          content: of the instruction.
          ca: certificates of the federation's authority, in PEM, one of which must have signed the server's.

        Raises:
          Refusal: there is none, or the instruction's is not accepted.
        """
        if not self.command:
            return
        quote = quote_of(content)
        if quote is not None and self._nonce:
            nonce, self._nonce = self._nonce, b""  # each nonce is used once
            self._run(quote, nonce, ca)
            self._accepted = time.monotonic()
        if time.monotonic() - self._accepted > VALID_SECONDS and not all(_proposals(content)):
            remedy = "the server sent no quote; shares leave only after the command accepts one"
            raise Refusal("attest", " ".join(self.command), remedy)

    def nonce(self, content: RecordDict) -> bytes:
        """Return a fresh nonce for the reply to a proposal, if a quote is due; else an empty one."""
        recent = time.monotonic() - self._accepted <= RENEW_SECONDS
        if not self.command or recent or not any(_proposals(content)):
            return b""
        self._nonce = os.urandom(NONCE_BYTES)
        return self._nonce

    def _run(self, quote: Quote, nonce: bytes, ca: bytes) -> None:
        """Let the owner's command judge a quote for this nonce; refuse what it does not accept."""
        try:
            server_certificate(quote.certificate, ca, self.federation)
        except ValueError as error:
            raise Refusal("attest", "certificate", f"is not the server's ({error})") from None
        expected = report_data(nonce, quote.certificate)
        command = " ".join(self.command)
        try:
            process = subprocess.run(
                [*self.command, expected],
                input=quote.quote,
                capture_output=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Refusal("attest", command, f"cannot be run ({error}); nothing leaves") from None
        if process.returncode != 0:
            output = (process.stderr or process.stdout).decode(errors="replace").strip()[-MAX_OUTPUT:]
            code = f"exit code {process.returncode}: {output or 'silent'}"
            raise Refusal("attest", command, f"does not accept the server's quote ({code})")
        logger.info("the server's quote is accepted by %s", command)


def _proposals(content: RecordDict) -> list[bool]:
    """Return whether each protocol message in an instruction is a proposal, whose answer consists of keys only.

    An instruction without any is of a sum in the clear: its answer is a vector.
    """
    return [_is_proposal(each) for each in messages_of(content) or []] or [False]


def _is_proposal(message: bytes) -> bool:
    try:
        return isinstance(read_any(message), Proposal)
    except Refused:
        return False
