"""Approvals at a running device: what its owner has not approved is not begun, and the server is told to ask again or not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from ...base.refusal import Refusal, disk_remedy
from ...client.private_update import NotTrained
from ...messages.wire import NOT_READY, OWNERS_POLICY, WAITING
from .device_ledger import DeviceLedger
from .ledger_heads import LEDGERS
from .owner_decisions import (
    OwnerDecision,
    Standing,
    is_paused,
    is_stopped,
    needs_approval,
    read_decisions,
    standing_of,
)
from .owner_policy import OwnerPolicy
from .owner_requests import KINDS, OwnerRequest, read_requests, request_name, store_request

logger = logging.getLogger("fedveil.client")


@dataclass
class Approvals:
    """Requests and decisions in a device's state folder, held against its owner's policy.

    Attributes:
      state: the device's state folder.
      policy: the owner's.
      ledger: on which decisions are acts.
    """

    state: Path
    policy: OwnerPolicy
    ledger: DeviceLedger
    _recorded: int = 0  # number of decisions that are on the ledger
    _reported: str = ""  # line of the log that was written last

    @property
    def apply(self) -> bool:
        """Whether anything may be held back: the policy demands approval, or the owner has decided something."""
        return any(needs_approval(kind, self.policy) for kind in KINDS) or bool(self._decisions())

    def require_activity(self, run: str) -> None:
        """Require that the device is not paused, and that what has this name is not stopped.

        Raises:
          NotTrained: WAITING or OWNERS_POLICY.
        """
        decisions, name = self._decisions(), request_name(run)
        if is_paused(decisions):
            self._hold(WAITING, "the owner has paused this device: fedveil client resume FOLDER")
        if is_stopped(name, decisions):
            self._hold(OWNERS_POLICY, f"the owner has stopped {name}")

    def require_name(self, run: str) -> None:
        """Require that a request of this name is approved, or none is known: its terms come later, before any vector.

        Raises:
          NotTrained: WAITING or OWNERS_POLICY, as for the newest request of the name.
        """
        decisions, name = self._decisions(), request_name(run)
        requests = [each for each in read_requests(self.state) if each.name == name]
        if all(self._standing(each, decisions) is not Standing.APPROVED for each in requests):
            for newest in requests[-1:]:
                self._require(newest, decisions)

    def require(self, request: OwnerRequest) -> None:
        """Store a request for its owner, and require that it is approved, or needs no approval.

        Raises:
          NotTrained: WAITING or OWNERS_POLICY; NOT_READY if it cannot be stored.
        """
        try:
            stored = store_request(self.state, request)
        except OSError as error:
            mend = disk_remedy(error) or "mend it"
            self._hold(NOT_READY, f"{self.state} cannot be written ({error.strerror}); {mend}")
        self._require(stored, self._decisions())

    def record_acts(self) -> None:
        """Write decisions to the ledger that are not there yet, because the ledger was in use when they were made.

        Raises:
          Refusal: the ledger cannot be written.
        """
        decisions = self._decisions()
        if len(decisions) > self._recorded:
            self.ledger.record_decisions(decisions)
            self._recorded = len(decisions)

    def _require(self, request: OwnerRequest, decisions: tuple[OwnerDecision, ...]) -> None:
        subject = f"{request.kind} {request.name}"
        match self._standing(request, decisions):
            case Standing.APPROVED:
                return
            case Standing.WAITING:
                self._hold(
                    WAITING, f"{subject} waits for its owner: fedveil client approve FOLDER {request.id}"
                )
            case Standing.EXPIRED:
                within = self.policy.approve_within
                self._hold(
                    OWNERS_POLICY, f"{subject} was not approved within {within}, and counts as refused"
                )
            case Standing.REFUSED:
                self._hold(OWNERS_POLICY, f"{subject} is refused by its owner")

    def _standing(self, request: OwnerRequest, decisions: tuple[OwnerDecision, ...]) -> Standing:
        return standing_of(request, decisions, self.policy, datetime.now(UTC))

    def _hold(self, code: int, reason: str) -> NoReturn:
        if reason != self._reported:  # a server asks again and again
            logger.warning("%s", reason)
            self._reported = reason
        raise NotTrained(code)

    def _decisions(self) -> tuple[OwnerDecision, ...]:
        """Return the owner's decisions; while they cannot be read, everything waits."""
        try:
            return read_decisions(self.state / LEDGERS)
        except Refusal as refusal:
            self._hold(WAITING, str(refusal))
