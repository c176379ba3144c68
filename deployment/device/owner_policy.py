"""Policy of a device's owner: the file policy.toml beside the keys, which no message can change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Annotated

from ...base.refusal import Form, Range
from ...configs.bundle_files import Lines, hexadecimal
from ...privacy.ledger.caps import ALL, Cap
from ...privacy.secagg.double_signature import BOTH_BYTES
from ...privacy.secagg.graph import MAXIMUM_CLIENTS
from ...privacy.secagg.policy import Policy
from ...privacy.secagg.suite import KEY_BYTES, SUITES
from ...privacy.secagg.transcript import HASH_BYTES, Profile

MAX_EPOCHS = 10_000
NEWEST_ROSTER = 2**53  # largest version of a roster, which JSON numbers hold exactly
# Time, as a number and a unit, by the unit's keyword of timedelta.
UNITS = {"m": "minutes", "h": "hours", "d": "days"}
TIME = Form("[1-9][0-9]{0,3}[mhd]", "must be a time such as 90m, 24h or 7d")
AUTHORITY = f"([0-9a-fA-F]{{{2 * KEY_BYTES}}}){{1,2}}"


@dataclass(frozen=True, kw_only=True)
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
      own_layers: whether a run may let layers of the model stay on this device, which stores them.
      suites: numbers of the suites of primitives that an attempt may use; [2, 3] requires post-quantum keys, [3] also
        post-quantum signatures.
      peers: fingerprints of the peers that the owner trusts, by a name of the owner's choice; empty trusts all members
        that the authority admits.
      peers_at_least: least number of `peers` in a cohort.
      approve_rosters: whether changed members count only after the owner's approval.
      approve_runs, approve_questions: whether a run, or a question, is answered only after the owner's approval.
      approve_within: time after which a request that waits for approval counts as refused, such as 24h.
      approve_authority: whether new keys of the authority count only after the owner's approval of their fingerprint.
      cosigned_by_at_least: number of other members of the device's roster that must have signed a newer one with
        changed members; of `peers`, if there are any.
      attest: command that must accept the server's quote before shares are sent; empty requires none.
      require_log: whether an instruction without the server's log is declined; always so once the device has seen a
        log.
      witnesses: Ed25519 keys of witnesses of the log, in hexadecimal, by a name of the owner's choice.
      witnessed_by_at_least: number of `witnesses` that must have co-signed the log's head in each instruction.
      purposes: of questions that the device answers; empty answers none.
      queries: hashes of the queries that the device may execute on a database, as `owner_query.query_hash`; empty allows
        none. Provisioning never writes it: the owner does, after reading the query.
      questions_epsilon: part of the budget that questions may spend; None lets them spend all.
      authority: Ed25519 public key that signs rosters, in hexadecimal, followed by the SHA-256 of the ML-DSA key if
        that must sign as well; rollovers lead on from it (`authority.current_authority`).
    """

    target_epsilon: Annotated[float, Range(gt=0)]
    target_delta: Annotated[float, Range(gt=0, lt=1)]
    until: date | None = None
    runs: Lines
    trust_server: bool
    minimum_cohort: Annotated[int, Range(ge=2, le=MAXIMUM_CLIENTS)]
    collusion: Annotated[float, Range(ge=0, lt=1)]
    dropout: Annotated[float, Range(ge=0, lt=1)]
    maximum_clipping_norm: Annotated[float, Range(gt=0)]
    minimum_noise_multiplier: Annotated[float, Range(ge=0)]
    profile: Profile
    maximum_local_epochs: Annotated[int, Range(ge=1, le=MAX_EPOCHS)]
    own_layers: bool = True
    suites: tuple[int, ...] = tuple(sorted(SUITES))
    peers: Mapping[str, Annotated[str, hexadecimal(HASH_BYTES)]] = field(default_factory=dict[str, str])
    peers_at_least: Annotated[int, Range(ge=0)] = 0
    approve_rosters: bool = False
    approve_runs: bool = False
    approve_questions: bool = False
    approve_within: Annotated[str, TIME] = "24h"
    approve_authority: bool = False
    cosigned_by_at_least: Annotated[int, Range(ge=0, le=MAXIMUM_CLIENTS)] = 0
    require_log: bool = True
    witnesses: Mapping[str, Annotated[str, hexadecimal(KEY_BYTES)]] = field(default_factory=dict[str, str])
    witnessed_by_at_least: Annotated[int, Range(ge=0)] = 0
    attest: Lines = ()
    purposes: Lines = ()
    questions_epsilon: Annotated[float, Range(gt=0)] | None = None
    queries: tuple[Annotated[str, hexadecimal(HASH_BYTES)], ...] = ()
    authority: Annotated[str, Form(AUTHORITY, f"must be {KEY_BYTES} or {BOTH_BYTES} bytes in hexadecimal")]
    minimum_roster_version: Annotated[int, Range(ge=1, le=NEWEST_ROSTER)]

    def __post_init__(self) -> None:
        object.__setattr__(self, "authority", self.authority.lower())

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield a key and a remedy for each rule between keys that is broken."""
        if not self.suites or not set(self.suites) <= SUITES.keys():
            yield "suites", f"must be a list of some of {', '.join(map(str, SUITES))}"
        if self.peers_at_least > len(self.peers):
            yield "peers_at_least", f"must be from 0 to {len(self.peers)}"
        if self.witnessed_by_at_least > len(self.witnesses):
            yield "witnessed_by_at_least", f"must be from 0 to {len(self.witnesses)}"
        for name, key in self.witnesses.items():
            if key == self.authority[: 2 * KEY_BYTES]:
                yield f"witnesses.{name}", "is the authority's key, which is no witness of its server"
            if [*self.witnesses.values()].count(key) > 1:
                yield f"witnesses.{name}", "is the key of another name, too: a witness counts once"

    @property
    def patience(self) -> timedelta:
        """Time after which a request that waits for approval counts as refused."""
        return timedelta(**{UNITS[self.approve_within[-1]]: int(self.approve_within[:-1])})

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
            self.profile,
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
