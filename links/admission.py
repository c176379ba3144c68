"""Who may connect: a map from fingerprints of TLS keys to node numbers, read again whenever its file changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from .roster_watch import Followed, Nodes
from .server_bundle import read_admitted

Admitted = Callable[[], Mapping[str, int]]


def fingerprint(certificate: bytes) -> str:
    """Return SHA-256 of a PEM certificate's SubjectPublicKeyInfo, in hexadecimal: a new certificate may keep its key.

    Raises:
      ValueError: it is no certificate.
    """
    public = x509.load_pem_x509_certificate(certificate).public_key()
    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def admitted_in(path: Path, nodes: Nodes) -> Admitted:
    """Return a function that says who is admitted: whom the list names, as it is now, of the nodes that there are.

    A list that is missing or damaged admits nobody until it is mended.
    """
    listed = Followed[dict[str, int]]((path,), lambda _: read_admitted(path), {}, in_doubt={})

    def admitted() -> Mapping[str, int]:
        known = set(nodes())
        return {key: node for key, node in listed().items() if node in known}

    return admitted
