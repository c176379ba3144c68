"""Receipt of a device for a run: its signature over the run's description and over a commitment to its own ledgers.

The commitment covers the head of each of the device's ledgers and a salt that stays on the device. A bare head would
reveal how often the device took part, in this federation and in others; an unchanged head would reveal that it missed a
run. The device's owner may open the commitment to a third party, and so prove the state of the ledgers on that day.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ...base.bounded_decoding import build, plain_of, read_json
from ...base.refusal import Refusal
from .hash_chain import Head, canonical

# Tags of signatures, so that a receipt's signature is valid for nothing else. Devices of earlier releases sign with the
# first one, and without comparing the run with what they received.
UNCOMPARED, COMPARED = b"fedveil receipt 1\0", b"fedveil receipt 2\0"
COMMITTED = b"fedveil ledgers of a device 1\0"  # tag of a commitment
SALT_BYTES = COMMITMENT_BYTES = 32
SIGNATURE_BYTES = 64


@dataclass(frozen=True)
class RunDescription:
    """Description of a run that a device received and signs.

    Attributes:
      federation: its name.
      run: its name.
      manifest: SHA-256 of the run's manifest, in hexadecimal.
    """

    federation: str
    run: str
    manifest: str


@dataclass(frozen=True)
class Receipt:
    """Receipt as the server gets it.

    Attributes:
      node: number of the device in the roster.
      commitment: commitment to the heads of the device's ledgers, 32 bytes; see `commitment_of`.
      signature: Ed25519, by the device's key in the roster.
    """

    node: int
    commitment: bytes
    signature: bytes


@dataclass(frozen=True)
class ReceiptOpening:
    """Opening of a commitment; it stays on the device.

    Attributes:
      salt: random, new for each receipt, in hexadecimal.
      heads: heads of the device's ledgers, by their file names.
    """

    salt: str
    heads: Mapping[str, Head]


def commitment_of(opening: ReceiptOpening) -> bytes:
    """Return the commitment of an opening: the hash of its salt and heads."""
    return hashlib.sha256(COMMITTED + canonical(plain_of(opening)).encode()).digest()


def sign_receipt(
    key: Ed25519PrivateKey, description: RunDescription, node: int, commitment: bytes
) -> Receipt:
    """Return a device's receipt."""
    return Receipt(node, commitment, key.sign(COMPARED + _content(description, node, commitment)))


def holds(receipt: Receipt, description: RunDescription, public: bytes, tag: bytes = COMPARED) -> bool:
    """Return whether a receipt is a valid signature of this key over the run's description.

    Args:
      receipt: unverified.
      description: the expected one.
      public: Ed25519 key of the device, by the roster.
      tag: `COMPARED`, or `UNCOMPARED` for a receipt of an earlier release.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(receipt.signature, tag + _content(description, receipt.node, receipt.commitment))
    except (InvalidSignature, ValueError):
        return False
    return True


def _content(description: RunDescription, node: int, commitment: bytes) -> bytes:
    """Return the bytes that a receipt signs, without its tag."""
    fields = {**asdict(description), "node": node, "commitment": commitment.hex()}
    return canonical(fields).encode()


def read_opening(path: Path) -> ReceiptOpening:
    """Return the opening of a commitment, as `opening_text` wrote it; refuse an unreadable file."""
    try:
        opening = read_json(path.read_bytes())
        return build(ReceiptOpening, {"salt": opening["salt"], "heads": opening["heads"]})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        raise Refusal("receipt", str(path), f"cannot be read ({problem}); ask the device's owner") from None


def opening_text(opening: ReceiptOpening, description: RunDescription, node: int) -> bytes:
    """Return an opening as the bytes of its file, with the names of its device and run."""
    run = {"run": description.run, "manifest": description.manifest}
    whole = {**run, "node": node, **plain_of(opening)}
    return (json.dumps(whole, indent=1) + "\n").encode()
