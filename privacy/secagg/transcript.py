"""Transcript of an attempt's terms, bound by hash into each signature, key and sealed share.

Two sides that differ in a single field derive unrelated keys, and neither accepts the other's signatures.
"""

import hashlib
import struct
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache, lru_cache

from .refusal import Reason, Refused

# Version 2 added commitments to shares, version 3 to the shared seeds, and version 4 to secrets that depend on ML-KEM, and
# signatures of complaints and reveals.
PROTOCOL_VERSION = 4
HASH_BYTES = 32
_DOMAIN = "fedveil secagg"
_FRAMING = 1  # constant, so that signed rosters and stored states stay valid; terms contain the version
_INT_BYTES = 16  # Flower's node and run numbers are unsigned 64-bit, and the sign needs one more bit
_INT_OPENING = b"i" + _INT_BYTES.to_bytes(8, "big")

Part = bytes | str | int | float


class Purpose(StrEnum):
    """Purpose of a hash, key or signature; each has exactly one."""

    SETUP = "setup"
    ROUND = "round"
    ROSTER = "roster"
    ROLLOVER = "rollover"
    COSIGNATURE = "cosignature"
    ML_DSA = "ml-dsa"
    ENROLMENT = "enrolment"
    TOKEN = "token"
    ADMISSION = "admission"
    ADVERT = "advert"
    GRAPH = "graph"
    RING = "ring"
    PAIR = "pair"
    REPLY = "reply"
    SIGNATURE = "signature"
    COMMITMENT = "commitment"
    MASK_KEY = "mask key"
    SHARE_KEY = "share key"
    OWN_MASK = "own mask"
    PAIR_MASK = "pair mask"
    SHARE = "share"
    SURVIVORS = "survivors"
    STATE = "state"
    KEM = "kem"
    HYBRID = "hybrid"
    ESCROW = "escrow"
    DEAL = "deal"
    CHALLENGE = "challenge"
    COMPLAINT = "complaint"
    DISPUTE = "dispute"
    REVEAL = "reveal"


class Profile(StrEnum):
    """Assumption about the server: it follows the protocol (semi-honest), or may deviate from it (malicious)."""

    MALICIOUS = "malicious"
    SEMI_HONEST = "semi_honest"


@dataclass(frozen=True)
class AttemptTerms:
    """Terms that the server proposes for one attempt, the same for the whole cohort.

    Attributes:
      protocol_version: `PROTOCOL_VERSION`.
      suite: a key of `suite.SUITES`.
      run: number of the run.
      round: number of the round.
      attempt: number of the attempt; (run, round, attempt) is never used twice.
      roster_version: version of the roster of identities.
      roster_hash: hash of the roster, 32 bytes.
      cohort_size: number of invited clients, n.
      threshold: number of shares that recover a secret, t.
      neighbours: number of other clients with which each client has pair masks, k.
      bits: bits per coordinate of the sum, 16 or 32.
      step: distance of two grid points, in the units of the update.
      clipping_norm: largest L2 norm of an update.
      noise_multiplier: noise std of the sum / `clipping_norm`; 0 without noise.
      minimum_survivors: smallest number of vectors whose sum may be unmasked.
      profile: assumption about the server.
      task_hash: hash of the task, 32 bytes.
    """

    protocol_version: int
    suite: int
    run: int
    round: int
    attempt: int
    roster_version: int
    roster_hash: bytes
    cohort_size: int
    threshold: int
    neighbours: int
    bits: int
    step: float
    clipping_norm: float
    noise_multiplier: float
    minimum_survivors: int
    profile: Profile
    task_hash: bytes


def signs(terms: AttemptTerms) -> bool:
    """Return whether nodes sign their complaints and reveals, as they do from version 4 on."""
    return terms.protocol_version == PROTOCOL_VERSION


def run_number(run: str) -> int:
    """Return the number of a run in attempts' terms, an unsigned 64-bit hash of its name."""
    return int.from_bytes(hashlib.sha256(run.encode()).digest()[:8], "big")


def frame(purpose: Purpose, *parts: Part) -> bytes:
    """Return an injective encoding of a purpose and parts; integers are of a magnitude below 2**127."""
    return _opening(purpose) + b"".join([framed(part) for part in parts])


@cache
def _opening(purpose: Purpose) -> bytes:
    return b"".join(framed(part) for part in (_DOMAIN, _FRAMING, purpose))


def digest(purpose: Purpose, *parts: Part) -> bytes:
    """Return SHA-256 of the framed parts, 32 bytes."""
    return hashlib.sha256(frame(purpose, *parts)).digest()


def setup_context(terms: AttemptTerms) -> bytes:
    """Return the hash of the terms, the context of adverts and shares, which may be sent before the model."""
    return digest(Purpose.SETUP, *(getattr(terms, field.name) for field in fields(terms)))


@lru_cache(maxsize=16)  # every node of a process computes it of its own view, several times
def round_context(
    setup: bytes, cohort: tuple[int, ...], model_hash: bytes, void: tuple[tuple[int, int], ...] = ()
) -> bytes:
    """Return the context of masks and confirmations, 32 bytes; masks of clients with different models do not cancel.

    Args:
      setup: `Agreement.cohort`, the hash of the attempt and its adverts, 32 bytes.
      cohort: numbers of the nodes that sent shares.
      model_hash: hash of the round's model, 32 bytes.
      void: pairs of nodes without a pair mask, as `void_pairs` returns them.

    Raises:
      Refused: WRONG_COHORT if a node is listed twice.
    """
    members = sorted(cohort)
    if len(set(members)) != len(members):
        raise Refused(Reason.WRONG_COHORT, "a node is listed twice")
    unmasked = [node for pair in void for node in pair]
    return digest(Purpose.ROUND, setup, model_hash, len(members), *members, *unmasked)


def framed(part: Part) -> bytes:
    """Return one part as `frame` has it."""
    if isinstance(part, bytes):  # nearly all of them are bytes, or node numbers
        return b"b" + len(part).to_bytes(8, "big") + part
    if isinstance(part, int):
        return _INT_OPENING + part.to_bytes(_INT_BYTES, "big", signed=True)
    kind, body = (b"s", part.encode()) if isinstance(part, str) else (b"f", struct.pack(">d", part))
    return kind + len(body).to_bytes(8, "big") + body
