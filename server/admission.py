"""Who may connect: a map from fingerprints of TLS keys to node numbers, read again whenever its file changes."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

logger = logging.getLogger("fedveil.server")

Admitted = Callable[[], Mapping[str, int]]

_FINGERPRINT = re.compile("[0-9a-f]{64}")


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
                read.update(stamp=stamp, map=_map_in(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            logger.error("nobody is admitted: %s cannot be read: %s", path, error)
            read.update(stamp=None, map={})
        return read["map"]

    return admitted


def _map_in(text: str) -> dict[str, int]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise TypeError("not a map from fingerprints to nodes")
    for key, node in cast(dict[str, Any], found).items():
        if not _FINGERPRINT.fullmatch(key) or type(node) is not int or node < 2:
            raise ValueError(f"{key}: not a fingerprint with its node, a number from 2 on")
    return cast(dict[str, int], found)
