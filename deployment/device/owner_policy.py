"""Policy of a device's owner: the file policy.toml beside the keys, which no message can change."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

from ...configs.strict import Section
from ...privacy.ledger.caps import ALL, Cap
from ...privacy.secagg.double_signature import BOTH_BYTES
from ...privacy.secagg.graph import MAXIMUM_CLIENTS
from ...privacy.secagg.policy import Policy
from ...privacy.secagg.suite import KEY_BYTES, SUITES
from ...privacy.secagg.transcript import HASH_BYTES, Profile

MOST_EPOCHS = 10_000
NEWEST_ROSTER = 2**53
AUTHORITY = re.compile(f"([0-9a-fA-F]{{{2 * KEY_BYTES}}}){{1,2}}")
# Defaults of keys that are missing in policy.toml.
POLICY_DEFAULTS = {
    "until": None,
    "suites": sorted(SUITES),
    "peers": {},
    "peers_at_least": 0,
    "approve_rosters": False,
    "approve_authority": False,
    "cosigned_by_at_least": 0,
    "require_log": True,
    "witnesses": {},
    "witnessed_by_at_least": 0,
    "attest": [],
    "purposes": [],
    "questions_epsilon": None,
}


@dataclass(frozen=True)
class OwnerPolicy:
    """Floors and caps of the owner, as in the file.

    Attributes:
      target_epsilon, target_delta: largest budget for the device's data.
      until: last day, UTC, on which a release is allowed; None sets no end.
      runs: names of the runs that may train here; empty allows any.
      trust_server: whether the server may see single updates of this client.
      minimum_cohort, collusion, dropout, maximum_clipping_norm, minimum_noise_multiplier, profile,
        minimum_roster_version: as in `privacy.secagg.policy.Policy`.
      maximum_local_epochs: of one round.
      suites: numbers of the suites of primitives that an attempt may use; [2, 3] requires post-quantum keys, [3] also
        post-quantum signatures.
      peers: fingerprints of the peers that the owner trusts, by a name of the owner's choice; empty trusts all members
        that the authority admits.
      peers_at_least: least number of `peers` in a cohort.
      approve_rosters: whether changed members count only after the owner's approval.
      approve_authority: whether new keys of the authority count only after the owner's approval of their fingerprint.
      cosigned_by_at_least: number of other members of the device's roster that must have signed a newer one with
        changed members; of `peers`, if there are any.
      attest: command that must accept the server's quote before shares are sent; empty requires none.
      require_log: whether an instruction without the server's log is declined; always so once the device has seen a
        log.
      witnesses: Ed25519 keys of witnesses of the log, in hexadecimal, by a name of the owner's choice.
      witnessed_by_at_least: number of `witnesses` that must have co-signed the log's head in each instruction.
      purposes: of questions that the device answers; empty answers none.
      questions_epsilon: part of the budget that questions may spend; None lets them spend all.
      authority: Ed25519 public key that signs rosters, in hexadecimal, followed by the SHA-256 of the ML-DSA key if
        that must sign as well; rollovers lead on from it (`authority.trusted`).
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
    suites: tuple[int, ...]
    peers: Mapping[str, str]
    peers_at_least: int
    approve_rosters: bool
    cosigned_by_at_least: int
    require_log: bool
    witnesses: Mapping[str, str]
    witnessed_by_at_least: int
    attest: tuple[str, ...]
    purposes: tuple[str, ...]
    questions_epsilon: float | None
    authority: str
    minimum_roster_version: int
    approve_authority: bool = False

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
            suites=self.suites,
            peers=frozenset(self.peers.values()),
            peers_at_least=self.peers_at_least,
        )

    @property
    def cap(self) -> Cap:
        """Limit for all ledgers of the device."""
        return Cap(
            ALL,
            self.target_epsilon,
            self.target_delta,
            self.until,
            questions=self.questions_epsilon,
            purposes=self.purposes,
        )


def _suites(section: Section) -> tuple[int, ...]:
    found = section.whole_numbers("suites")
    if not found or not set(found) <= SUITES.keys():
        section.refuse("suites", f"must be a list of some of {', '.join(map(str, SUITES))}")
    return found


def _authority(section: Section) -> str:
    """Return the authority's key, followed by the hash of its ML-DSA key if both sign."""
    given = section.text("authority")
    if not AUTHORITY.fullmatch(given):
        section.refuse("authority", f"must be {KEY_BYTES} or {BOTH_BYTES} bytes in hexadecimal")
        return "0" * 2 * KEY_BYTES
    return given.lower()


def _peers(section: Section) -> dict[str, str]:
    """Return the section [peers]: names to SHA-256 of identities, as `fedveil client roster` shows them."""
    inner = section.section("peers")
    found = {name: inner.hexadecimal(name, HASH_BYTES) for name in inner.all_keys()}
    inner.done()
    return found


def _witnesses(section: Section, authority: str) -> dict[str, str]:
    """Return the section [witnesses]: names to Ed25519 keys, each another one and not the authority's."""
    inner = section.section("witnesses")
    found = {name: inner.hexadecimal(name, KEY_BYTES) for name in inner.all_keys()}
    for name, key in found.items():
        if key == authority[: 2 * KEY_BYTES]:
            inner.refuse(name, "is the authority's key, which is no witness of its server")
        if list(found.values()).count(key) > 1:
            inner.refuse(name, "is the key of another name, too: a witness counts once")
    inner.done()
    return found


def read_policy(section: Section) -> OwnerPolicy:
    """Return the policy of a section with every key; after a mistake, noted in the section, some values are placeholders."""
    peers, authority = _peers(section), _authority(section)
    witnesses = _witnesses(section, authority)
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
        suites=_suites(section),
        peers=peers,
        peers_at_least=section.whole("peers_at_least", at_least=0, at_most=len(peers)),
        approve_rosters=section.flag("approve_rosters"),
        cosigned_by_at_least=section.whole("cosigned_by_at_least", at_least=0, at_most=MAXIMUM_CLIENTS),
        require_log=section.flag("require_log"),
        witnesses=witnesses,
        witnessed_by_at_least=section.whole("witnessed_by_at_least", at_least=0, at_most=len(witnesses)),
        purposes=section.texts("purposes"),
        questions_epsilon=section.optional_real("questions_epsilon", above=0),
        attest=section.texts("attest"),
        authority=authority,
        minimum_roster_version=section.whole("minimum_roster_version", at_least=1, at_most=NEWEST_ROSTER),
        approve_authority=section.flag("approve_authority"),
    )
