"""Head of a server's log: its length and its root, signed with the server's TLS key, which the authority certified.

Two contradicting heads of one federation prove to any third party that its server kept two logs.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from ..base.bounded_decoding import Undecodable, build, read_json
from ..base.refusal import Refusal
from ..configs.bundle_files import Credentials, issued_by
from ..privacy.ledger.hash_chain import canonical
from .server_bundle import SERVER

TAG = b"fedveil log head 1\0"  # so that a head's signature is valid for nothing else that the TLS key signs
MAX_BYTES = 1 << 14  # of a head in JSON; a certificate has about 900
_ROOT = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class TreeHead:
    """Head of the log.

    Attributes:
      federation: of the log.
      size: number of entries.
      root: of their Merkle tree, in hexadecimal.
      at: Unix second in which it was signed.
      certificate: of the server, in PEM.
      signature: in hexadecimal.
    """

    federation: str
    size: int
    root: str
    at: int
    certificate: str
    signature: str

    @property
    def signed_bytes(self) -> bytes:
        """Bytes that the signature covers."""
        fields = {"federation": self.federation, "size": self.size, "root": self.root, "at": self.at}
        return TAG + canonical(fields).encode()

    def to_json(self) -> str:
        """Return the head as text."""
        return json.dumps(asdict(self))


def sign_head(federation: str, size: int, root: bytes, credentials: Credentials) -> TreeHead:
    """Return a new head of the present second, signed with the server's TLS key; `root` is that of `size` entries."""
    key = load_pem_private_key(credentials.key, None)
    assert isinstance(key, EllipticCurvePrivateKey)
    head = TreeHead(federation, size, root.hex(), int(time.time()), credentials.certificate.decode(), "")
    signature = key.sign(head.signed_bytes, ECDSA(SHA256()))
    return TreeHead(federation, size, head.root, head.at, head.certificate, signature.hex())


def read_head(text: str) -> TreeHead:
    """Return the head in a text, its signature unchecked.

    Raises:
      Refusal: it is none.
    """
    try:
        if len(text) > MAX_BYTES:
            raise Undecodable("it is too long")
        head = build(TreeHead, read_json(text))
        if head.size < 0 or not _ROOT.fullmatch(head.root):
            raise Undecodable("no size or no root")
    except Undecodable as error:
        raise Refusal("log", "head", f"is not a head of a log ({error})") from None
    return head


@lru_cache(maxsize=64)  # all messages of a round carry the same head
def check_head(head: TreeHead, ca: bytes, federation: str) -> None:
    """Verify that the federation's server signed a head with a key that the authority had certified for that time.

    Raises:
      Refusal: another signed it, or nobody, or the certificate was not valid when it was signed.
    """
    try:
        certificate = server_certificate(head.certificate.encode(), ca, federation)
        if head.federation != federation:
            raise ValueError("it belongs to the log of another federation")
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not start.timestamp() <= head.at <= end.timestamp():
            raise ValueError("its certificate was not valid then")
        key = certificate.public_key()
        assert isinstance(key, EllipticCurvePublicKey)
        key.verify(bytes.fromhex(head.signature), head.signed_bytes, ECDSA(SHA256()))
    except (ValueError, AssertionError, InvalidSignature) as error:
        reason = str(error) or type(error).__name__
        raise Refusal("log", "head", f"was not signed by the server of {federation!r} ({reason})") from None


def server_certificate(pem: bytes, ca: bytes, federation: str) -> x509.Certificate:
    """Return the certificate if it is that of the federation's server; its validity period is not checked.

    Args:
      pem: the certificate.
      ca: certificate of the authority, in PEM; during an overlap, of both authorities.
      federation: name of the federation.

    Raises:
      ValueError: it is no certificate, or another's.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        is_signed = issued_by(certificate, ca)
    except TypeError as error:
        raise ValueError("it is no certificate") from error
    if not is_signed:
        raise ValueError("the federation's authority did not sign it")
    kinds = (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME)
    names = [[each.value for each in certificate.subject.get_attributes_for_oid(kind)] for kind in kinds]
    if names != [[federation], [SERVER]]:
        raise ValueError("it belongs to another server")
    return certificate
