"""Co-signature of a log's head by a witness: a party with an Ed25519 key of its own, which signs no two branches of a log.

The root of a tree covers every entry, so that federation, size and root name one log and no other.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..base.bounded_decoding import Undecodable, build, read_json
from ..base.refusal import Refusal
from .ledger.hash_chain import canonical
from .secagg.suite import public_of

TAG = b"fedveil log witness 1\0"  # before the signed bytes, so that a co-signature is valid for nothing else
TWO_BRANCHES = "has co-signed two branches"  # why a key's co-signatures do not count
MAX_BYTES = 1 << 11  # of a co-signature in JSON; 400 are usual


@dataclass(frozen=True)
class HeadCosignature:
    """Signature of a witness under a head of a log.

    Attributes:
      federation: name of the log's federation.
      size: number of the log's entries.
      root: root of their Merkle tree, in hexadecimal.
      at: Unix second, by the witness's clock.
      public: Ed25519 key of the witness, in hexadecimal.
      signature: in hexadecimal.
    """

    federation: str
    size: int
    root: str
    at: int
    public: str
    signature: str = ""

    @property
    def signed(self) -> bytes:
        """The bytes under the signature."""
        plain = asdict(self)
        del plain["signature"]
        return TAG + canonical(plain).encode()

    @property
    def holds(self) -> bool:
        """Whether the signature is that of the key over the other fields."""
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.public))
            key.verify(bytes.fromhex(self.signature), self.signed)
        except (InvalidSignature, ValueError):
            return False
        return True

    def to_json(self) -> str:
        """Return the co-signature as text."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        return f"{self.size} entries, root {self.root}"


def cosign_head(federation: str, size: int, root: str, at: int, key: Ed25519PrivateKey) -> HeadCosignature:
    """Return a witness's co-signature of a head, by the witness's key. Other arguments as of `HeadCosignature`."""
    unsigned = HeadCosignature(federation, size, root, at, public_of(key).hex())
    return replace(unsigned, signature=key.sign(unsigned.signed).hex())


def read_cosignature(text: str | bytes) -> HeadCosignature:
    """Return the co-signature in a JSON text; its signature is still to be checked, by `holds`.

    Raises:
      Refusal: the text is no co-signature, its key is not in lower case, or it is of no entry.
    """
    try:
        if len(text) > MAX_BYTES:
            raise Undecodable("it is too long")
        cosignature = build(HeadCosignature, read_json(text))
        if cosignature.public != cosignature.public.lower() or cosignature.size < 1:
            raise Undecodable("no key in lower case, or no entry")
    except Undecodable as error:
        raise Refusal("witness", "co-signature", f"is not one of a log's head ({error})") from None
    return cosignature


def read_stored_cosignatures(text: bytes) -> tuple[HeadCosignature, ...]:
    """Return the co-signatures in a file that `format_cosignatures` wrote.

    Raises:
      Undecodable: the file has another content.
    """
    entries = read_json(text)
    if not isinstance(entries, list):
        raise Undecodable("no list")
    return tuple(build(HeadCosignature, each) for each in cast(list[object], entries))


def format_cosignatures(cosignatures: Iterable[HeadCosignature]) -> bytes:
    """Return co-signatures as the bytes of a file."""
    return (json.dumps([asdict(each) for each in cosignatures], indent=1) + "\n").encode()


def newest(cosignatures: Iterable[HeadCosignature]) -> tuple[HeadCosignature, ...]:
    """Return for each key its co-signature of the longest log, in the order of the keys."""
    by_key = dict[str, HeadCosignature]()
    for each in cosignatures:
        if each.public not in by_key or each.size > by_key[each.public].size:
            by_key[each.public] = each
    return tuple(by_key[public] for public in sorted(by_key))
