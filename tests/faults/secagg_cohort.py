"""A cohort of real nodes and a real server, message by message, with hands on every wire."""

from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.privacy.secagg.attempt import Work
from fedveil.privacy.secagg.client import Participant, declined
from fedveil.privacy.secagg.double_signature import both_of, post_quantum_public
from fedveil.privacy.secagg.policy import Policy
from fedveil.privacy.secagg.refusal import Refused
from fedveil.privacy.secagg.roster import Member, Roster
from fedveil.privacy.secagg.server import Abandoned, Due, OpenedSum, ServerAttempt
from fedveil.privacy.secagg.suite import SUITES, public_of
from fedveil.privacy.secagg.transcript import PROTOCOL_VERSION, AttemptTerms, Profile

NOW = 1_800_000_000
MODEL = b"m" * 32
STAGES = ("advertise", "share", "check", "mask", "confirm", "reveal")
DISPUTE = "dispute"  # the exchange that only an attempt with an accused dealer has
STAGE_OF = {
    Due.ADVERTS: "advertise",
    Due.SHARES: "share",
    Due.CHECKS: "check",
    Due.COMPLAINTS: DISPUTE,
    Due.VECTORS: "mask",
    Due.CONFIRMATIONS: "confirm",
    Due.REVEALED: "reveal",
}
AUTHORITY = Ed25519PrivateKey.from_private_bytes(bytes(32))
KEYS = [Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")) for number in range(1, 301)]


def node_number(place):
    """Node numbers as Flower draws them: large, and in no relation to the roster's places."""
    return (place * 0x9E3779B97F4A7C15 + 7) % 2**64


def same(stage, node, data):
    return data


@dataclass
class Cohort:
    """`size` nodes that trust one authority; `wire` functions see and may change what travels.

    Attributes:
      refusals: reasons by node, as the nodes raised them.
      dropped: reasons by node, as the server raised them.
      blamed: faults by node, as the server found them.
      charged: how many vectors each node was asked to compute.
      traffic: every message and reply that was sent, by stage.
      last: the server's side of the last attempt that was run.
    """

    size: int
    threshold: int
    neighbours: int | None = None
    bits: int = 32
    profile: Profile = Profile.MALICIOUS
    minimum: int = 2
    suite: int = 1
    collusion: float = 0.0
    openings: tuple = ()
    refusals: dict = field(default_factory=dict)
    dropped: dict = field(default_factory=dict)
    blamed: dict = field(default_factory=dict)
    charged: dict = field(default_factory=dict)
    traffic: list = field(default_factory=list)
    last: ServerAttempt | None = None

    def __post_init__(self):
        numbers = sorted(node_number(place) for place in range(self.size))
        doubly = SUITES.get(self.suite) is not None and SUITES[self.suite].doubly_signed
        members = [
            Member(
                n, f"clinic {p}", public_of(KEYS[p]), NOW + 9, post_quantum_public(KEYS[p]) if doubly else b""
            )
            for p, n in enumerate(numbers)
        ]
        authority = both_of(AUTHORITY) if doubly else public_of(AUTHORITY)
        self.roster = Roster(3, tuple(members))
        policy = Policy(authority, 3, self.minimum, self.collusion, 0.0, 2.0, 0.0, self.profile)
        self.nodes = {n: Participant(n, KEYS[p], policy, self.roster) for p, n in enumerate(numbers)}

    def terms(self, round_number=0, **changed):
        terms = AttemptTerms(
            PROTOCOL_VERSION,
            self.suite,
            run=11,
            round=round_number,
            attempt=0,
            roster_version=3,
            roster_hash=self.roster.hash,
            cohort_size=self.size,
            threshold=self.threshold,
            neighbours=self.size - 1 if self.neighbours is None else self.neighbours,
            bits=self.bits,
            step=2.0**-10,
            clipping_norm=1.0,
            noise_multiplier=0.0,
            minimum_survivors=self.minimum,
            profile=self.profile,
            task_hash=b"t" * 32,
        )
        return replace(terms, **changed)

    def attempt(self, dimension, round_number=0, **changed):
        terms = self.terms(round_number, **changed)
        colluders = -int(-self.collusion * self.size // 1)
        return ServerAttempt(terms, self.roster, list(self.nodes), dimension, NOW, colluders)

    def vectors(self, dimension, seed=0):
        draw = np.random.default_rng(seed)
        kind = np.uint16 if self.bits == 16 else np.uint32
        return {n: draw.integers(0, 2**self.bits, dimension, dtype=kind) for n in self.nodes}

    def answer(self, stage, node, message, vectors, model=MODEL):
        """Return the node's reply to one message, or what leaves when it refuses."""

        def vector(terms):
            self.charged[node] = self.charged.get(node, 0) + 1
            return vectors[node].copy(), self.openings

        work = Work(model, vector)
        try:
            return self.nodes[node].handle(message, NOW, work)
        except Refused as refused:
            self.refusals.setdefault(node, refused.reason)
            return declined(refused)

    def exchange(self, attempt, stage, messages, vectors, silent=(), message_wire=same, reply_wire=same):
        """Carry one exchange; a wire that returns None loses what it was given."""
        for node, message in messages.items():
            changed = message_wire(stage, node, message)
            if node in silent or changed is None:
                continue
            reply = self.answer(stage, node, changed, vectors)
            self.traffic.append((stage, node, changed, reply))
            arrived = reply_wire(stage, node, reply)
            if arrived is not None:
                self.deliver(attempt, node, arrived)

    def deliver(self, attempt, node, reply):
        try:
            attempt.take(node, reply)
        except Refused as refused:
            self.dropped.setdefault(node, refused.reason)

    def stages(self):
        return [stage for stage in STAGES if stage != "confirm" or self.profile is Profile.MALICIOUS]

    def run(
        self, vectors, silent=None, round_number=0, message_wire=same, reply_wire=same
    ) -> OpenedSum | Abandoned:
        """Return how one attempt ends, with nodes silent from the stage that `silent` gives them."""
        silent, gone = silent or {}, set()
        attempt = self.attempt(len(next(iter(vectors.values()))), round_number)
        result = attempt.proposal()
        self.blamed, self.last = attempt.blamed, attempt
        while isinstance(result, dict):
            stage = STAGE_OF[attempt.due]
            gone |= set(silent.get(stage, ()))
            self.exchange(attempt, stage, result, vectors, gone, message_wire, reply_wire)
            result = attempt.advance(MODEL)
        return result


def total(vectors, nodes, bits):
    """The plain sum, by whole numbers."""
    whole = sum(vectors[node].astype(object) for node in nodes) % 2**bits
    return whole.astype(np.uint16 if bits == 16 else np.uint32)
