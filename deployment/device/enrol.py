"""Enrolment of a device by a token: it generates its keys, which stay on it, and verifies and stores the answer.

An interrupted device continues with the same keys. A device with a bundle gets new keys for it, and keeps its policy,
its settings and its ledgers.
"""

import hmac
import logging
import shutil
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from ...base.bounded_decoding import Undecodable
from ...base.durable_files import PUBLIC, replace_file, replace_files
from ...base.refusal import Refusal, refusing
from ...configs.bundle_files import ROSTER, read_file
from ...links.enrolment.messages import MAX_REPLY, Ask, Reply, receive, send
from ...links.enrolment.token import Token, fingerprint_of, lock_of, seal_of
from ...privacy.secagg.suite import KEY_BYTES
from .admission import read_admission
from .client_bundle import (
    DEVICE_FILE,
    OWNERS,
    POLICY,
    finish_replacement,
    read_client_bundle,
    read_device_file,
    read_pinned,
    replace_bundle,
)
from .enrolment import PRIVATE, REQUEST, Enrolment, parse_request, write_request

logger = logging.getLogger("fedveil.client")

MAKING = "enrolling"  # folder of the keys before their admission
ENROLLED = "enrolled"  # file with the lock of the token that made the bundle
ASK_SECONDS = 5.0  # between two polls for the authority's answer
REASONS = {  # by the states of a reply in which the token is refused
    "unknown": "is not known there: it was withdrawn or replaced; ask for a new one",
    "ended": "has ended; ask for a new one",
    "used": "was used by another device: tell the operator, and ask for a new one",
}
SECONDS = 30.0  # for one question and its answer


def enrol(
    token: Token, folder: Path, *, wait: float = float("inf"), notify: Callable[[str], None] = logger.info
) -> bool:
    """Generate this device's keys, request their admission, and complete the bundle once it is granted.

    Args:
      token: of the operator.
      folder: of the bundle, which may not exist yet.
      wait: seconds for the authority's answer; the same call can continue later.
      notify: called with a line of text on each change.

    Returns:
      Whether the device was admitted.

    Raises:
      Refusal: the token is not accepted, the connection is intercepted, the folder is another device's, or its owner's
        policy does not allow the roster. The device's bundle stays as it is.
    """
    finish_replacement(folder)
    completed = folder / ENROLLED
    if completed.exists() and completed.read_bytes() == lock_of(token.port_key).encode():
        return True
    _check_folder(token, folder)
    request, enrolment = _request_in(token, folder)
    end, reported = time.monotonic() + wait, ""
    while True:
        pending = _poll(token, folder, request, enrolment)
        if not pending:
            return True
        if pending != reported:
            notify(pending)
            reported = pending
        if time.monotonic() + ASK_SECONDS > end:
            return False
        time.sleep(ASK_SECONDS)


def _request_in(token: Token, folder: Path) -> tuple[bytes, Enrolment]:
    """Return the device's request; generate it, with its keys, if there is none."""
    making = folder / MAKING
    if not (making / REQUEST).exists():
        shutil.rmtree(making, ignore_errors=True)  # keys of an interrupted call, without a request
        with refusing("folder", folder, "cannot be written"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_request(making, token.name)
    request = read_file(making / REQUEST)
    enrolment = parse_request(request, str(making / REQUEST))
    if enrolment.name != token.name:
        remedy = f"holds keys of {enrolment.name!r}, whose enrolment was not completed; name another folder"
        raise Refusal("folder", str(folder), remedy)
    return request, enrolment


def _poll(token: Token, folder: Path, request: bytes, enrolment: Enrolment) -> str:
    """Send the request to the server once, and complete the bundle if the device is admitted.

    Returns:
      The pending step, in words; empty once the device is admitted.
    """
    try:
        ca, authority = authority_of(token)
        _check_authority(token, folder, authority)
        reply = ask(token, ca, request, seal_of(token.seal_key, request))
    except ssl.SSLCertVerificationError as error:
        remedy = f"has no certificate of the authority for that name ({error.verify_message})"
        raise Refusal("server", token.address, remedy) from None
    except OSError as error:
        reason = error.strerror or error
        return f"no server answers at {token.address} ({reason}): fedveil server enrol FOLDER must run there"
    if reply.state in REASONS:
        raise Refusal("token", token.name, REASONS[reply.state])
    if reply.state != "admitted":
        return "asked; the authority has not answered yet"
    files = read_admission(reply.answer, authority, token.name, enrolment.identity)
    _complete(token, folder, files, reply.roster)
    return ""


def _check_folder(token: Token, folder: Path) -> None:
    """Refuse a folder with another device's bundle, or with keys that no bundle belongs to."""
    if (folder / DEVICE_FILE).exists():
        if (name := read_device_file(folder).name) != token.name:
            raise Refusal("token", token.name, f"is for another client than {folder}, which is of {name}")
    elif any((folder / each).exists() for each in PRIVATE):
        raise Refusal("folder", str(folder), "already holds keys; name another folder for new ones")


def _check_authority(token: Token, folder: Path, authority: bytes) -> None:
    """Refuse an authority other than the owner's, before it is asked to admit anything.

    That is the one in the policy, or the one to which rollovers have led that the device follows.
    """
    if (folder / DEVICE_FILE).exists():
        trusted_authority = read_pinned(folder).authority
        if authority[:KEY_BYTES] not in {key[:KEY_BYTES] for key in trusted_authority.keys(time.time())}:
            remedy = (
                f"is of another authority than {folder / POLICY} names; enrol into another folder or, if its holder "
                f"replaced it, first: fedveil client authority {folder} --rollover rollovers.json"
            )
            raise Refusal("token", token.name, remedy)


def _complete(token: Token, folder: Path, files: dict[str, bytes], roster: bytes) -> None:
    """Make the whole bundle beside the device's, read it, and replace that; a later call repeats what was cut short."""
    making = folder / MAKING
    with refusing("folder", folder, "cannot be written"):
        owners_files = {name: read_file(folder / name) for name in OWNERS if (folder / name).exists()}
        replace_files(making, {**files, **owners_files, ROSTER: roster}, PUBLIC)
        replace_file(making / ENROLLED, lock_of(token.port_key).encode())
    bundle = read_client_bundle(making, folder)
    if bundle.policy.queries and POLICY not in owners_files:
        remedy = (
            "came with the bundle, and only the owner lists them; ask the operator for a policy without them"
        )
        raise Refusal("queries", list(bundle.policy.queries), remedy)
    replace_bundle(folder, making)


def authority_of(token: Token) -> tuple[bytes, bytes]:
    """Return the certificate, in PEM, and the public key of the authority that the token names.

    Raises:
      OSError: no server answers.
      Refusal: the server names another authority.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Any certificate will do: nothing secret is sent, and the reply must have the token's fingerprint.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reply = _answer(token, Ask("", b"", b"", b""), context)  # without a name it asks for the authority
    if not hmac.compare_digest(fingerprint_of(reply.ca, reply.authority), token.fingerprint):
        remedy = "is not of the authority that the token names: the connection is intercepted, or the authority was replaced; ask the operator"
        raise Refusal("server", token.address, remedy)
    return reply.ca, reply.authority


def ask(token: Token, ca: bytes, request: bytes, seal: bytes) -> Reply:
    """Return the port's answer to a request, which the token's key sealed, over TLS by the authority's certificate.

    Raises:
      OSError: no server answers, or it has no certificate of the authority.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca.decode("ascii"))
    return _answer(token, Ask(token.name, token.port_key, request, seal), context)


def _answer(token: Token, question: Ask, context: ssl.SSLContext) -> Reply:
    """Return the reply of the enrolment port to a question, over TLS under `context`."""
    host, _, port = token.address.rpartition(":")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    end = time.monotonic() + SECONDS
    with (
        socket.create_connection((host.strip("[]"), int(port)), SECONDS) as stream,
        context.wrap_socket(stream, server_hostname=host.strip("[]")) as sealed,
    ):
        send(sealed, question, end)
        try:
            return receive(sealed, Reply, MAX_REPLY, end)
        except Undecodable as error:
            raise ConnectionError(f"the server there uses another protocol ({error})") from None
