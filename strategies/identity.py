"""Identity of a node in secure aggregation: its number, signing key, owner's policy and the federation's roster.

In a simulation every process derives all identities from one key: they give no protection against the operator of the
machine, who has the clients' data in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..messages.client_settings import Encryption
from ..privacy.mechanisms.randomness import keyed_stream
from ..privacy.secagg.client import Participant
from ..privacy.secagg.double_signature import both_of, post_quantum_public, sign_by
from ..privacy.secagg.own_signatures import OwnSignatures, SimulatedMember
from ..privacy.secagg.policy import Policy
from ..privacy.secagg.roster import Member, Roster, read_roster, write_roster
from ..privacy.secagg.suite import Suite, public_of
from ..privacy.secagg.transcript import Profile

FIRST_NODE = 2  # as in the engines: node 1 is Flower's server
NEVER = 253402300799  # last second of the year 9999


@dataclass(frozen=True)
class Identity:
    """Identity of one node.

    Attributes:
      node: its number, at least `FIRST_NODE`.
      key: Ed25519 key that signs its messages, secret.
      node_key: 32 bytes that seal its memory, secret.
      policy: conditions of its owner for every attempt.
      roster: the newest roster that the node has; every attempt must name this one.
      sign: as `double_signature.sign_by`.
    """

    node: int
    key: Ed25519PrivateKey = field(repr=False)
    node_key: bytes = field(repr=False)
    policy: Policy
    roster: Roster
    sign: Callable[[Suite, Ed25519PrivateKey, bytes, bytes], bytes] = field(default=sign_by, repr=False)

    def participant(self) -> Participant:
        """Return the protocol's participant for this node, without memory of earlier messages."""
        return Participant(self.node, self.key, self.policy, self.roster, sign=self.sign)


@lru_cache(maxsize=1 << 10)  # a client asks several times in a round
def simulated_identity(settings: Encryption, client: int) -> Identity:
    """Return the identity of a simulated client.

    Args:
      settings: the client's policy, and the secret from which all identities derive.
      client: number of the client, from 0.
    """
    node, secret = FIRST_NODE + client, bytes.fromhex(settings.identities)
    roster, authority = simulated_roster(settings.identities, settings.clients, settings.doubly)
    policy = Policy(
        authority,
        roster.version,
        minimum_cohort=settings.minimum_cohort,
        collusion=settings.collusion,
        dropout=settings.dropout,
        maximum_clipping_norm=settings.maximum_clipping_norm,
        minimum_noise_multiplier=settings.minimum_noise_multiplier,
        profile=Profile(settings.profile),
    )
    node_key = keyed_stream(secret, "node key", node).bytes(32)
    own = _own_signatures(settings.identities)
    return Identity(node, _key(secret, node), node_key, policy, roster, own.sign_by)


@lru_cache(maxsize=4)
def simulated_roster(identities: str, clients: int, doubly: bool = False) -> tuple[Roster, bytes]:
    """Return a simulation's roster, as its authority signed it, and the authority's public key.

    Args:
      identities: 32 bytes in hexadecimal, from which every key derives.
      clients: number of clients.
      doubly: whether all sign with ML-DSA as well.
    """
    secret = bytes.fromhex(identities)
    authority = _key(secret, 0)
    nodes = range(FIRST_NODE, FIRST_NODE + clients)
    public = both_of(authority) if doubly else public_of(authority)
    signed = write_roster(
        Roster(1, tuple(_member(secret, node, doubly) for node in nodes)), authority, doubly=doubly
    )
    roster, own = read_roster(signed, public), _own_signatures(identities)
    members = [
        SimulatedMember(each.node, each.name, each.public, each.not_after, each.post_quantum, own)
        for each in roster.members
    ]
    return replace(roster, members=tuple(members)), public


@lru_cache(maxsize=4)
def _own_signatures(identities: str) -> OwnSignatures:
    """Return the signatures of simulated clients in this process; argument as of `simulated_roster`."""
    return OwnSignatures()


def _member(secret: bytes, node: int, doubly: bool) -> Member:
    key = _key(secret, node)
    second = post_quantum_public(key) if doubly else b""
    return Member(node, f"simulated client {node - FIRST_NODE}", public_of(key), NEVER, second)


def _key(secret: bytes, node: int) -> Ed25519PrivateKey:
    """Return the signing key of a node, or with number 0 of the authority."""
    return Ed25519PrivateKey.from_private_bytes(keyed_stream(secret, "identity", node).bytes(32))
