"""Common keys of simulated nodes, computed once for both nodes of a pair."""

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from .suite import agree, public_of

MAX_WAITING = 1 << 16  # of which the oldest are dropped


class PairKeys:
    """Common keys of nodes that one process simulates: the first node of a pair computes the key, the second takes it.

    A key that nobody takes stays in this memory for a while, beyond `NodeAttempt.erase`: a real node uses `agree` alone.
    """

    def __init__(self) -> None:
        self._waiting: dict[tuple[bytes, ...], bytes] = {}

    def agree(self, key: X25519PrivateKey, peer: bytes, info: bytes, public: bytes = b"") -> bytes:
        """Return the same key as the function `agree`, of the same arguments."""
        public = public or public_of(key)
        if common := self._waiting.pop((peer, public, info), b""):
            return common
        common = agree(key, peer, info, public)
        self._waiting[public, peer, info] = common
        if len(self._waiting) > MAX_WAITING:
            del self._waiting[next(iter(self._waiting))]
        return common
