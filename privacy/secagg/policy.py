"""Policy: a data owner's requirements on every attempt that the server proposes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...base.refusal import Refusal
from .double_signature import BOTH_BYTES
from .graph import MAXIMUM_CLIENTS, Shape, colluders, opens_nothing
from .refusal import Reason, Refused
from .suite import KEY_BYTES, SUITES
from .transcript import PROTOCOL_VERSION, AttemptTerms, Profile

WIDTHS = (16, 32)  # bits of a word of the sum
_UNSIGNED = 3  # version in which nodes signed neither complaints nor reveals


@dataclass(frozen=True)
class Policy:
    """Floors of one client, from its own file.

    Attributes:
      authority: Ed25519 public key, 32 bytes, that signs the roster; behind it the hash of the ML-DSA key that signs
        beside it, where both must.
      minimum_roster_version: older rosters are refused, so that a revoked key stays revoked.
      minimum_cohort: fewest clients whose sum may be opened with this client's vector in it.
      collusion: share of the other clients that may work for the server, in [0, 1).
      dropout: share of the cohort that may fail to answer, in [0, 1).
      maximum_clipping_norm: largest L2 norm that a vector may keep; where it sums several records, see `secure_update`.
      minimum_noise_multiplier: smallest noise of the sum over the clipping norm; 0 asks for none.
      profile: the weakest profile accepted; `MALICIOUS` satisfies both.
      suites: suites accepted, by number.
      peers: fingerprints of the members that the owner trusts; all others count as colluders in the noise. Empty trusts
        every member that the authority admits.
      peers_at_least: smallest number of these peers in a cohort.

    Raises:
      Refusal: an owner's value that protects nothing or cannot be met.
    """

    authority: bytes
    minimum_roster_version: int
    minimum_cohort: int
    collusion: float
    dropout: float
    maximum_clipping_norm: float
    minimum_noise_multiplier: float
    profile: Profile = Profile.MALICIOUS
    suites: tuple[int, ...] = tuple(SUITES)
    peers: frozenset[str] = frozenset()
    peers_at_least: int = 0

    def __post_init__(self) -> None:
        if len(self.authority) not in (KEY_BYTES, BOTH_BYTES):
            remedy = "give the 32-byte public key of the roster's signer"
            raise Refusal("authority", self.authority.hex(), remedy)
        if self.minimum_cohort < 2:
            remedy = "a sum of one client hides nothing: ask for 2 or more"
            raise Refusal("minimum_cohort", self.minimum_cohort, remedy)
        for name in ("collusion", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise Refusal(name, getattr(self, name), "give a share of the clients in [0, 1)")
        if not self.maximum_clipping_norm > 0:
            raise Refusal("maximum_clipping_norm", self.maximum_clipping_norm, "give a norm above 0")
        if not self.minimum_noise_multiplier >= 0:
            raise Refusal("minimum_noise_multiplier", self.minimum_noise_multiplier, "give 0 or more")
        if not set(self.suites) <= SUITES.keys():
            raise Refusal("suites", self.suites, f"choose from {tuple(SUITES)}")


def check(policy: Policy, terms: AttemptTerms) -> None:
    """Check that the terms are no weaker than the policy. The roster's hash is left to the caller.

    Raises:
      Refused: POLICY, naming the first field of the terms that is weaker.
    """
    if not speaks(terms):
        spoken = f"protocol_version={terms.protocol_version} with suite={terms.suite}"
        problem = f"{spoken} is that of another release"
        remedy = f"install one release of fedveil on both: this client speaks {PROTOCOL_VERSION}"
        raise Refused(Reason.POLICY, f"{problem}; {remedy}")
    for name in _shortfalls(policy, terms):
        raise Refused(Reason.POLICY, f"{name}={getattr(terms, name)!r} is not what this policy accepts")


def speaks(terms: AttemptTerms) -> bool:
    """Return whether this release keeps its promises in an attempt of these terms.

    It still serves a server of version 3 without ML-KEM, whose only lack is blame that others can check. Version 3 with
    ML-KEM is refused: there a false mask secret corrupts a sum and no member can be blamed.
    """
    suite = SUITES.get(terms.suite)
    old = terms.protocol_version == _UNSIGNED and suite is not None and not suite.hybrid
    return old or terms.protocol_version == PROTOCOL_VERSION


def _shortfalls(policy: Policy, terms: AttemptTerms) -> Iterator[str]:
    """Yield the names of the terms that are weaker than the policy; the comparisons are false for NaN."""
    shape = Shape(terms.cohort_size, terms.neighbours, terms.threshold)
    # The sum must contain at least one honest client besides this one.
    fewest = max(policy.minimum_cohort, colluders(terms.cohort_size, policy.collusion) + 2)
    demands = {
        # Double signatures of members protect only if the authority signs their roster doubly.
        "suite": terms.suite in policy.suites
        and (not SUITES[terms.suite].doubly_signed or len(policy.authority) == BOTH_BYTES),
        "profile": terms.profile in (policy.profile, Profile.MALICIOUS),
        "roster_version": terms.roster_version >= policy.minimum_roster_version,
        "bits": terms.bits in WIDTHS,
        "step": 0 < terms.step < math.inf,
        "clipping_norm": 0 < terms.clipping_norm <= policy.maximum_clipping_norm,
        "noise_multiplier": policy.minimum_noise_multiplier <= terms.noise_multiplier < math.inf,
        "cohort_size": terms.cohort_size <= MAXIMUM_CLIENTS,
        "minimum_survivors": fewest <= terms.minimum_survivors <= terms.cohort_size,
    }
    yield from (name for name, met in demands.items() if not met)
    if not shape.possible:
        yield "neighbours"
    elif not opens_nothing(shape, policy.collusion, policy.dropout, terms.profile):
        yield "threshold"
