"""Device's end of an enrolment: it checks the server against the token's fingerprint before it reveals the token's key."""

import hmac
import socket
import ssl
import time

from ...base.bounded_decoding import Undecodable
from ...base.refusal import Refusal
from .messages import MOST_ANSWERED, Ask, Reply, receive, send
from .token import Token, fingerprint_of

SECONDS = 30.0  # of one question


def authority_of(token: Token) -> tuple[bytes, bytes]:
    """Return the certificate, in PEM, and the public key of the authority that the token names.

    Raises:
      OSError: no server answers.
      Refusal: the server names another authority.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The certificate is compared with the fingerprint.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reply = _asked(token, Ask("", b"", b"", b""), context)
    if not hmac.compare_digest(fingerprint_of(reply.ca, reply.authority), token.fingerprint):
        remedy = "is not of the authority that the token names: the connection is intercepted, or the authority was replaced; ask the operator"
        raise Refusal("server", token.address, remedy)
    return reply.ca, reply.authority


def ask(token: Token, ca: bytes, request: bytes, seal: bytes) -> Reply:
    """Return the port's answer to a request, over TLS by the authority.

    Args:
      token: opens the port.
      ca: the authority's certificate, as `authority_of` returned it.
      request: the bytes of request.toml.
      seal: under the token's key.

    Raises:
      OSError: no server answers, or it has no certificate of the authority.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca.decode("ascii"))
    return _asked(token, Ask(token.name, token.door, request, seal), context)


def _asked(token: Token, question: Ask, context: ssl.SSLContext) -> Reply:
    host, _, port = token.address.rpartition(":")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    end = time.monotonic() + SECONDS
    with (
        socket.create_connection((host.strip("[]"), int(port)), SECONDS) as stream,
        context.wrap_socket(stream, server_hostname=host.strip("[]")) as sealed,
    ):
        send(sealed, question, end)
        try:
            return receive(sealed, Reply, MOST_ANSWERED, end)
        except Undecodable as error:
            raise ConnectionError(f"the server there uses another protocol ({error})") from None
