"""Rollover of an authority: a statement that its keys are replaced, signed by the old signer and by the new one.

A chain of them leads from a federation's first authority to its present one. Until the end that a rollover states, what
the old authority alone signed counts beside what the new one signed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from ...base.bounded_decoding import build, read_json
from .double_signature import BOTH_BYTES, sign_as_authority, verify_authority
from .refusal import Reason, Refused
from .suite import KEY_BYTES
from .transcript import Purpose, digest, frame

FORMAT = "fedveil rollovers 1"
MAX_BYTES = 1 << 20  # of a chain; a rollover takes 2 kB, with ML-DSA 25 kB
MAX_ROLLOVERS = 32
DAY_SECONDS = 86400
MAX_DAYS = 90  # of an overlap, in which a thief of the old keys can still sign
_CONTEXT = digest(Purpose.ROLLOVER)


@dataclass(frozen=True)
class Rollover:
    """Replacement of an authority's keys.

    Attributes:
      federation: of the authority.
      number: counts from 1.
      old, new: public keys that sign rosters, in hexadecimal; see `roster.read_roster`.
      old_ca, new_ca: certificates of the authority for TLS, in PEM.
      at: Unix second of the statement.
      until: Unix second until which the old keys count beside the new ones.
      by_old, by_new: signatures of both signers, in hexadecimal.
    """

    federation: str
    number: int
    old: str
    new: str
    old_ca: str
    new_ca: str
    at: int
    until: int
    by_old: str = ""
    by_new: str = ""

    @property
    def body(self) -> bytes:
        """The signed bytes."""
        keys = (bytes.fromhex(self.old), bytes.fromhex(self.new), self.old_ca, self.new_ca)
        return frame(Purpose.ROLLOVER, self.federation, self.number, *keys, self.at, self.until)


def sign_rollover(rollover: Rollover, old: Ed25519PrivateKey, new: Ed25519PrivateKey) -> Rollover:
    """Return the rollover with the signatures of both signers; a signer with an ML-DSA key signs doubly."""
    first, second = (
        sign_as_authority(key, _CONTEXT, rollover.body, doubly=len(bytes.fromhex(public)) == BOTH_BYTES)
        for key, public in ((old, rollover.old), (new, rollover.new))
    )
    return replace(rollover, by_old=first.hex(), by_new=second.hex())


def write_chain(chain: Sequence[Rollover]) -> str:
    """Return a chain as text, the first rollover first."""
    return json.dumps({"format": FORMAT, "rollovers": [asdict(each) for each in chain]}, indent=1) + "\n"


@lru_cache(maxsize=16)  # a device reads its own at each instruction
def read_chain(text: bytes | str, federation: str = "") -> tuple[Rollover, ...]:
    """Return the chain in a text, after verifying both signatures of each rollover.

    Args:
      text: what `write_chain` returned.
      federation: name of the authority's federation; empty accepts any.

    Raises:
      Refused: MALFORMED if it is no chain, or a key occurs twice in it; BAD_SIGNATURE.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError("it is too long")
        document = read_json(text)
        if not isinstance(document, dict) or cast(dict[str, object], document).get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        listed = cast(list[object], document["rollovers"])
        if not isinstance(document["rollovers"], list) or not 0 < len(listed) <= MAX_ROLLOVERS:
            raise ValueError(f"it must list 1 to {MAX_ROLLOVERS} rollovers")
        chain = tuple(build(Rollover, each) for each in listed)
        for number, each in enumerate(chain, 1):
            _check(each, number, federation or chain[0].federation)
        keys = [chain[0].old, *(each.new for each in chain)]
        if any(before.new != after.old for before, after in pairwise(chain)):
            raise ValueError("a rollover does not begin with the key of the one before")
        if len({each[: 2 * KEY_BYTES] for each in keys}) < len(keys):
            raise ValueError("a key returns that was replaced")
    except (ValueError, LookupError) as error:
        raise Refused(Reason.MALFORMED, f"this is no chain of rollovers: {error}") from None
    return chain


def _check(rollover: Rollover, number: int, federation: str) -> None:
    """Raise ValueError for a rollover that is not the one due or weakens its keys, Refused for a bad signature."""
    old, new = (bytes.fromhex(each) for each in (rollover.old, rollover.new))
    if {len(old), len(new)} - {KEY_BYTES, BOTH_BYTES} or len(new) < len(old):
        raise ValueError("a key is of another length, or drops ML-DSA")
    if (rollover.number, rollover.federation) != (number, federation):
        raise ValueError(f"it is not rollover {number} of {federation!r}")
    if rollover.until <= rollover.at:
        raise ValueError("its overlap ends before it begins")
    for key, signature in ((old, rollover.by_old), (new, rollover.by_new)):
        verify_authority(key, _CONTEXT, rollover.body, bytes.fromhex(signature))
    for pem in (rollover.old_ca, rollover.new_ca):
        _check_ca(pem, federation)


def _check_ca(pem: str, federation: str) -> None:
    """Raise ValueError for a certificate that is not the self-signed one of an authority of this federation."""
    try:
        ca = x509.load_pem_x509_certificate(pem.encode())
        ca.verify_directly_issued_by(ca)
    except (TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise ValueError("a certificate is not signed by its own key") from None
    organizations = [each.value for each in ca.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    if organizations != [federation] or pem.count("BEGIN CERTIFICATE") != 1:
        raise ValueError(f"a certificate is not that of an authority of {federation!r}")


def fits(pinned: bytes, key: str) -> bool:
    """Return whether a hexadecimal key is the pinned one, after which the hash of the ML-DSA key may be missing."""
    key_bytes = bytes.fromhex(key)
    return key_bytes == pinned or (len(pinned) == KEY_BYTES and key_bytes[:KEY_BYTES] == pinned)


def rollovers_since(chain: Sequence[Rollover], pinned: bytes) -> tuple[Rollover, ...] | None:
    """Return the rollovers of a chain that came after a pinned key; None if the key is not in the chain."""
    for index, each in enumerate(chain):
        if fits(pinned, each.old):
            return tuple(chain[index:])
    return () if chain and fits(pinned, chain[-1].new) else None
