"""Who may connect: a map from fingerprints of TLS keys to node numbers, read again whenever its file changes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ..privacy.refusal import Refusal
from .bundle import read_admitted

logger = logging.getLogger("fedveil.server")

Admitted = Callable[[], Mapping[str, int]]


def fingerprint(certificate: bytes) -> str:
    """Return SHA-256 of a PEM certificate's SubjectPublicKeyInfo, in hexadecimal: a new certificate may keep its key.

    Raises:
      ValueError: it is no certificate.
    """
    public = x509.load_pem_x509_certificate(certificate).public_key()
    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def admitted_in(path: Path) -> Admitted:
    """Return a function that reads who is admitted, and reads again once the file is another.

    A file that is missing or damaged admits nobody until it is mended.
    """
    read: dict[str, Any] = {"stamp": None, "map": {}}

    def admitted() -> Mapping[str, int]:
        try:
            state = path.stat()
            stamp = (state.st_mtime_ns, state.st_ino, state.st_size)
            if stamp != read["stamp"]:
                read.update(stamp=stamp, map=read_admitted(path))
        except (OSError, Refusal) as error:
            if read["stamp"] != (failed := str(error)):
                logger.error("nobody is admitted: %s", failed)
            read.update(stamp=failed, map={})
        return read["map"]

    return admitted
