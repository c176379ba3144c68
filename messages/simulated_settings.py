"""Settings that only simulated clients get: identities of secure aggregation, and the canaries of an audit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Encryption:
    """Secure aggregation at a simulated client: its identity, and its owner's conditions for every attempt.

    Attributes:
      identities: secret from which all identities are derived, 32 bytes in hexadecimal.
      clients: number of identities.
      minimum_cohort, collusion, dropout, maximum_clipping_norm, minimum_noise_multiplier, profile: as in
        `privacy.secagg.policy.Policy`.
      doubly: whether identities sign with ML-DSA in addition to Ed25519, as in suite 3.
    """

    identities: str = field(repr=False)
    clients: int
    minimum_cohort: int
    collusion: float
    dropout: float
    maximum_clipping_norm: float
    minimum_noise_multiplier: float
    profile: str
    doubly: bool = False


@dataclass(frozen=True)
class CanaryRecords:
    """Canary records of an audit at each simulated client; see `client.extra`.

    Attributes:
      each: number of canary records at each client.
      clients: number of clients.
      seed: secret seed of the canaries' coins, 32 bytes in hexadecimal.
      replaced: whether an excluded canary has the opposite gradient instead of none.
    """

    each: int
    clients: int
    seed: str = field(repr=False)
    replaced: bool

    @property
    def count(self) -> int:
        """Number of canary records at all clients."""
        return self.each * self.clients


NO_CANARY_RECORDS = CanaryRecords(0, 0, "", replaced=False)


@dataclass(frozen=True)
class CanaryClients:
    """Canary clients of an audit, whose numbers follow those of the real clients; see `client.extra`.

    Attributes:
      first: client number of the first canary.
      count: number of canaries.
      seed: secret seed of directions and coins, 32 bytes in hexadecimal.
      support: number of coordinates that one canary may use.
      norm: L2 norm of a canary's update.
      replaced: whether an excluded canary sends the opposite direction instead of nothing.
      metrics: metrics that a canary reports, by name.
    """

    first: int
    count: int
    seed: str = field(repr=False)
    support: int
    norm: float
    replaced: bool
    metrics: Mapping[str, float]

    def __contains__(self, client: int) -> bool:
        return self.count > 0 and client >= self.first


NO_CANARY_CLIENTS = CanaryClients(0, 0, "", 0, 0.0, replaced=False, metrics={})
