"""Signatures of nodes that one process simulates, which it does not check against keys of its own."""

import hashlib
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from .double_signature import sign_by
from .roster import Member
from .suite import Suite, public_of

MAX_KEPT = 1 << 12  # of which the oldest are dropped; a forgotten one is checked as another's


class OwnSignatures:
    """Signatures that this process made: by construction they are valid for exactly these bytes, under this key."""

    def __init__(self) -> None:
        self._made: dict[bytes, tuple[int, bytes, bytes, bytes]] = {}

    def sign_by(self, suite: Suite, identity: Ed25519PrivateKey, context: bytes, body: bytes) -> bytes:
        """Return the same as the function `sign_by`, of the same arguments, and remember it."""
        signature = sign_by(suite, identity, context, body)
        self._made[signature] = suite.number, public_of(identity), context, hashlib.sha256(body).digest()
        if len(self._made) > MAX_KEPT:
            del self._made[next(iter(self._made))]
        return signature

    def include(self, suite: Suite, public: bytes, context: bytes, body: bytes, signature: bytes) -> bool:
        """Return whether this is a signature that `sign_by` made here; arguments as of `verify_by`."""
        row = suite.number, public, context, hashlib.sha256(body).digest()
        return self._made.get(signature) == row


@dataclass(frozen=True)
class SimulatedMember(Member):
    """Member of a simulation.

    Attributes:
      own: signatures of this process.
    """

    own: OwnSignatures = field(default_factory=OwnSignatures, compare=False, repr=False)

    def check(self, suite: Suite, context: bytes, body: bytes, signature: bytes) -> None:
        """Check a signature as `Member` does, unless this process made it."""
        if not self.own.include(suite, self.public, context, body, signature):
            super().check(suite, context, body, signature)
