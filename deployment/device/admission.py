"""Admission of an enrolled device: the files of its bundle, signed by the authority for the device's keys."""

import json
from collections.abc import Mapping
from typing import cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...base.bounded_decoding import Undecodable, read_json
from ...base.refusal import Refusal
from ...configs.bundle_files import CERTIFICATE, ROLLOVERS, SCHEMA
from ...privacy.secagg.double_signature import (
    AUTHORITY_BYTES,
    BOTH_BYTES,
    sign_as_authority,
    verify_authority,
)
from ...privacy.secagg.refusal import Refused
from ...privacy.secagg.suite import SIGNATURE_BYTES
from ...privacy.secagg.transcript import Purpose, digest, frame
from .client_bundle import CA, DEVICE_FILE, POLICY

# Files of a bundle that an authority may send; keys and the roster come otherwise.
FILES = {
    CA,
    CERTIFICATE,
    DEVICE_FILE,
    POLICY,
    ROLLOVERS,
    SCHEMA,
    "requirements.txt",
    "fedveil-client.service",
}
_CONTEXT = digest(Purpose.ADMISSION)


def write_admission(
    authority: Ed25519PrivateKey,
    name: str,
    identity: bytes,
    files: Mapping[str, bytes],
    *,
    doubly: bool,
) -> bytes:
    """Return the authority's answer to a device that it admits.

    Args:
      authority: signs it.
      name: of the client.
      identity: its Ed25519 public key, 32 bytes.
      files: of its bundle, by name, texts in UTF-8.
      doubly: whether the authority's ML-DSA key signs as well.
    """
    body = json.dumps({file: data.decode() for file, data in files.items()}).encode()
    signed = frame(Purpose.ADMISSION, name, identity, body)
    return sign_as_authority(authority, _CONTEXT, signed, doubly=doubly) + body


def read_admission(data: bytes, authority: bytes, name: str, identity: bytes) -> dict[str, bytes]:
    """Return the files in an admission that the authority has signed for this name and identity, by name.

    The other arguments as of `write_admission`, whose result is `data`; but the authority is its Ed25519 public key, 32 bytes.
    If the hash of its ML-DSA key follows, both must have signed.

    Raises:
      Refusal: it is not for this device, or not signed by the authority.
    """
    length = AUTHORITY_BYTES if len(authority) == BOTH_BYTES else SIGNATURE_BYTES
    signature, body = data[:length], data[length:]
    try:
        verify_authority(authority, _CONTEXT, frame(Purpose.ADMISSION, name, identity, body), signature)
        content = read_json(body)
    except (Refused, Undecodable) as error:
        raise Refusal("admission", name, f"is not signed by the authority for these keys ({error})") from None
    files = cast(dict[str, object], content) if isinstance(content, dict) else {}
    if not files or not files.keys() <= FILES or not all(isinstance(each, str) for each in files.values()):
        raise Refusal("admission", name, "holds files that are not part of a bundle; update this device")
    return {file: str(text).encode() for file, text in files.items()}
