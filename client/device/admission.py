"""Admission of a device that enrolled: the files of its bundle, signed by the authority for the device's own keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...configs.bundle_files import SCHEMA
from ...privacy.bounded_decoding import Undecodable, read_json
from ...privacy.refusal import Refusal
from ...privacy.secagg.refusal import Refused
from ...privacy.secagg.suite import KEY_BYTES, SIGNATURE_BYTES, sign, verify
from ...privacy.secagg.transcript import Purpose, digest, frame
from .client_bundle import DEVICE_FILE, POLICY

FILES = frozenset(
    {"ca.pem", "tls.pem", DEVICE_FILE, POLICY, SCHEMA, "requirements.txt", "fedveil-client.service"}
)
_CONTEXT = digest(Purpose.ADMISSION)


def write_admission(
    authority: Ed25519PrivateKey, name: str, identity: bytes, files: Mapping[str, bytes]
) -> bytes:
    """Return what the authority says to a device that it admits.

    Args:
      authority: signs it.
      name: of the client.
      identity: its Ed25519 public key, 32 bytes.
      files: of its bundle, by name, texts in UTF-8.
    """
    body = json.dumps({file: data.decode() for file, data in files.items()}).encode()
    return sign(authority, _CONTEXT, frame(Purpose.ADMISSION, name, identity, body)) + body


def read_admission(data: bytes, authority: bytes, name: str, identity: bytes) -> dict[str, bytes]:
    """Return the files that the authority has signed for this device, by name.

    Args:
      data: as `write_admission` returned it.
      authority: its public key; the Ed25519 key is its first 32 bytes.
      name: of the client.
      identity: its Ed25519 public key, 32 bytes.

    Raises:
      Refusal: it is not for this device, or not of the authority.
    """
    signature, body = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
    try:
        verify(authority[:KEY_BYTES], _CONTEXT, frame(Purpose.ADMISSION, name, identity, body), signature)
        found = read_json(body)
    except (Refused, Undecodable) as error:
        raise Refusal("admission", name, f"is not the authority's for these keys ({error})") from None
    files = cast(dict[str, object], found) if isinstance(found, dict) else {}
    if not files or not files.keys() <= FILES or not all(isinstance(each, str) for each in files.values()):
        raise Refusal("admission", name, "holds other files than a bundle has; update this device")
    return {file: str(text).encode() for file, text in files.items()}
