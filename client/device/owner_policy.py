"""Policy of a device's owner: the file policy.toml beside the keys, which nothing from the network changes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from ...configs.strict import Section
from ...privacy.ledger.caps import ALL, Cap
from ...privacy.secagg.graph import MAXIMUM_CLIENTS
from ...privacy.secagg.policy import Policy
from ...privacy.secagg.suite import KEY_BYTES
from ...privacy.secagg.transcript import Profile

MOST_EPOCHS = 10_000
NEWEST_ROSTER = 2**53


@dataclass(frozen=True)
class OwnerPolicy:
    """Floors and caps of the owner, as the file holds them.

    Attributes:
      target_epsilon, target_delta: the most that may be spent on the device's data.
      until: last day, UTC, on which anything may leave; None sets no end.
      runs: names of the runs that may train here; empty allows any.
      trust_server: whether the server may see what this client alone sends.
      minimum_cohort, collusion, dropout, maximum_clipping_norm, minimum_noise_multiplier, profile,
        minimum_roster_version: as in `privacy.secagg.policy.Policy`.
      maximum_local_epochs: of one round.
      authority: Ed25519 public key that signs rosters, in hexadecimal.
    """

    target_epsilon: float
    target_delta: float
    until: date | None
    runs: tuple[str, ...]
    trust_server: bool
    minimum_cohort: int
    collusion: float
    dropout: float
    maximum_clipping_norm: float
    minimum_noise_multiplier: float
    profile: str
    maximum_local_epochs: int
    authority: str
    minimum_roster_version: int

    @property
    def floors(self) -> Policy:
        """Conditions for every attempt of secure aggregation."""
        return Policy(
            bytes.fromhex(self.authority),
            self.minimum_roster_version,
            self.minimum_cohort,
            self.collusion,
            self.dropout,
            self.maximum_clipping_norm,
            self.minimum_noise_multiplier,
            Profile(self.profile),
        )

    @property
    def cap(self) -> Cap:
        """Most that all ledgers of the device may spend."""
        return Cap(ALL, self.target_epsilon, self.target_delta, self.until)


def read_policy(section: Section) -> OwnerPolicy:
    """Return the policy of a section that holds every key; after a mistake, noted there, some values are placeholders."""
    return OwnerPolicy(
        target_epsilon=section.real("target_epsilon", above=0),
        target_delta=section.real("target_delta", above=0, below=1),
        until=section.optional_day("until"),
        runs=section.texts("runs"),
        trust_server=section.flag("trust_server"),
        minimum_cohort=section.whole("minimum_cohort", at_least=2, at_most=MAXIMUM_CLIENTS),
        collusion=section.real("collusion", at_least=0, below=1),
        dropout=section.real("dropout", at_least=0, below=1),
        maximum_clipping_norm=section.real("maximum_clipping_norm", above=0),
        minimum_noise_multiplier=section.real("minimum_noise_multiplier", at_least=0),
        profile=section.word("profile", [*Profile]),
        maximum_local_epochs=section.whole("maximum_local_epochs", at_least=1, at_most=MOST_EPOCHS),
        authority=section.hexadecimal("authority", KEY_BYTES),
        minimum_roster_version=section.whole("minimum_roster_version", at_least=1, at_most=NEWEST_ROSTER),
    )
