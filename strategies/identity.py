"""Who a node is in secure aggregation: its number, its signing key, its owner's policy and the federation's roster.

In a simulation all of it is made from one key, by every process alike: such identities protect nobody from whoever runs
the machine, who sees the clients' data anyhow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..privacy.mechanisms.randomness import keyed_stream
from ..privacy.secagg.client import Participant
from ..privacy.secagg.policy import Policy
from ..privacy.secagg.roster import Member, Roster, read_roster, write_roster
from ..privacy.secagg.suite import public_of
from ..privacy.secagg.transcript import Profile
from .client_settings import Encryption

FIRST_NODE = 2  # as in the engines: node 1 is Flower's server
NEVER = 253402300799  # the last second of the year 9999


@dataclass(frozen=True)
class Identity:
    """One node's own; `key` and `node_key`, which seals what it remembers, are secret."""

    node: int
    key: Ed25519PrivateKey = field(repr=False)
    node_key: bytes = field(repr=False)
    policy: Policy
    roster: Roster

    def participant(self) -> Participant:
        """Return the node without a memory."""
        return Participant(self.node, self.key, self.policy, self.roster)


def simulated_identity(settings: Encryption, client: int) -> Identity:
    """Return the identity of a simulated client."""
    node, secret = FIRST_NODE + client, bytes.fromhex(settings.identities)
    roster, authority = simulated_roster(settings.identities, settings.clients)
    policy = Policy(
        authority,
        roster.version,
        settings.minimum_cohort,
        settings.collusion,
        settings.dropout,
        settings.maximum_clipping_norm,
        settings.minimum_noise_multiplier,
        Profile(settings.profile),
    )
    node_key = keyed_stream(secret, "node key", node).bytes(32)
    return Identity(node, _key(secret, node), node_key, policy, roster)


@lru_cache(maxsize=4)
def simulated_roster(identities: str, clients: int) -> tuple[Roster, bytes]:
    """Return a simulation's roster, as its authority signed it, and the authority's public key.

    Args:
      identities: 32 bytes in hexadecimal, from which every key derives.
      clients: the population.
    """
    secret = bytes.fromhex(identities)
    authority = _key(secret, 0)
    members = [
        Member(node, f"simulated client {node - FIRST_NODE}", public_of(_key(secret, node)), NEVER)
        for node in range(FIRST_NODE, FIRST_NODE + clients)
    ]
    public = public_of(authority)
    return read_roster(write_roster(Roster(1, tuple(members)), authority), public), public


def _key(secret: bytes, node: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(keyed_stream(secret, "identity", node).bytes(32))
