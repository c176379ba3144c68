"""Refusal of an attempt by a client or the server: one exception, and a closed list of reasons."""

from enum import StrEnum
from typing import final


class Reason(StrEnum):
    """Reason for a refusal, as it appears in messages, logs and tests."""

    POLICY = "policy"
    REPLAY = "replay"
    BAD_SIGNATURE = "bad_signature"
    UNKNOWN_MEMBER = "unknown_member"
    EXPIRED = "expired"
    WRONG_COHORT = "wrong_cohort"
    TOO_FEW = "too_few"
    SPLIT_VIEW = "split_view"
    ALIVE_AND_DEAD = "alive_and_dead"
    WRONG_MODEL = "wrong_model"
    BAD_SHARE = "bad_share"
    OUT_OF_ORDER = "out_of_order"
    MALFORMED = "malformed"
    ERASED = "erased"


class Fault(StrEnum):
    """Fault that evidence proves of a node; nobody can produce evidence against a node that follows the protocol."""

    BAD_DEAL = "dealt a share that does not open or does not fit"
    FALSE_COMPLAINT = "complained of a good share"
    WRONG_SHARE = "revealed a share that was not dealt to it"
    WRONG_MASK = "revealed a mask key that is not the pair's"
    WRONG_COMMITMENT = "committed to another seed than it dealt"
    WRONG_SEED = "dealt a mask seed that is not its key's"
    WRONG_SECRET = "committed to another mask secret than it sealed"


@final
class Refused(Exception):
    """Error that ends an attempt on this side, at a client or at the server.

    Attributes:
      reason: reason, the only part that may be sent to the other side.
      detail: text for the local log, which never contains a secret or a vector's value.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
