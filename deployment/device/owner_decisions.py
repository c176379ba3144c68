"""Decisions of a device's owner on requests, with their reasons: a file beside the ledgers, and an act on the ledger for each.

The running agent reads the file before it begins anything, so a decision needs no restart. What the file leaves open is
not begun: a request that needs approval waits, a damaged file lets everything wait, and silence counts as refusal in the
end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from ...base.bounded_decoding import build, plain_of, read_json
from ...base.durable_files import replace_file
from ...base.refusal import OneOf, Refusal, refusing, unreadable
from ...privacy.ledger.acts import DECISIONS, acting_user
from ...privacy.ledger.hash_chain import Lock
from .owner_policy import OwnerPolicy
from .owner_requests import KINDS, QUESTION, RUN, OwnerRequest

FILE = "decisions.json"  # in the folder of the ledgers
WAIT_SECONDS = 10.0  # for another process that decides
DEVICE = "device"  # in the place of a request's kind, where the owner decides on all of them
OWNER, OFFICER = ROLES = ("owner", "officer")
TOLERANCE = 1e-9  # relative, between two computations of one noise


class OwnerVerdict(StrEnum):
    """Verdict of an owner on a request, or on the device."""

    APPROVED = "approved"
    REFUSED = "refused"
    STOPPED = "stopped"
    PAUSED = "paused"
    RESUMED = "resumed"


LIFTS = (OwnerVerdict.APPROVED, OwnerVerdict.RESUMED)  # which take back an earlier decision


class Standing(StrEnum):
    """What a device does with a request."""

    APPROVED = "approved"
    WAITING = "waiting"
    REFUSED = "refused"
    EXPIRED = "expired"


@dataclass(frozen=True)
class OwnerDecision:
    """Decision of a device's owner with its reason.

    Attributes:
      verdict: what was decided.
      kind, name, digest, noise: of the request; a stop holds for all requests of its name, a pause for all of the device.
      number: of the decision on this device, from 1.
      role: in which it was made.
      who: user name of its author, from the operating system.
      reason: in the author's words; may be empty.
      at: time, UTC in ISO 8601.
    """

    verdict: OwnerVerdict
    kind: Annotated[str, OneOf((*KINDS, DEVICE))]
    name: str = ""
    digest: str = ""
    noise: float = 0.0
    number: int = 0
    role: Annotated[str, OneOf(ROLES)] = OWNER
    who: str = ""
    reason: str = ""
    at: str = ""

    def __str__(self) -> str:
        subject = f"{self.kind} {self.name}".rstrip()
        return (
            f"{self.at}  {subject} {self.verdict} by {self.who} ({self.role}): {self.reason or 'no reason'}"
        )

    def covers(self, request: OwnerRequest) -> bool:
        """Return whether it is on this request: an approval also holds for more noise, a refusal for less."""
        if (self.kind, self.name) != (request.kind, request.name):
            return False
        if self.verdict is OwnerVerdict.STOPPED:
            return True
        if self.digest != request.digest or self.verdict not in (OwnerVerdict.APPROVED, OwnerVerdict.REFUSED):
            return False
        if self.verdict is OwnerVerdict.APPROVED:
            return request.noise >= self.noise * (1 - TOLERANCE)
        return request.noise <= self.noise * (1 + TOLERANCE)

    def is_lifted_by(self, later: OwnerDecision) -> bool:
        """Return whether a later approval, or end of a pause, takes this decision back."""
        same = (self.kind, self.name) == (later.kind, later.name)
        return same and (self.digest == later.digest or self.verdict is OwnerVerdict.STOPPED)

    @property
    def act(self) -> tuple[tuple[str, int, str], dict[str, Any]]:
        """Key and content of its act on the ledger (`Ledger.act`)."""
        fields = {name: value for name, value in plain_of(self).items() if name != "number"}
        # The time too: the number begins anew in a file that its owner removed.
        return (DECISIONS, self.number, f"{self.verdict} {self.at}"), fields


@dataclass(frozen=True)
class StoredDecisions:
    """Content of the file `FILE`, oldest first."""

    decisions: tuple[OwnerDecision, ...] = ()


def read_decisions(ledgers: Path) -> tuple[OwnerDecision, ...]:
    """Return all decisions in a device's folder of ledgers, oldest first; none without a file.

    Raises:
      Refusal: the file cannot be read, so that nothing may begin.
    """
    path = ledgers / FILE
    try:
        return build(StoredDecisions, read_json(path.read_bytes())).decisions
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, Refusal) as error:
        remedy = unreadable(error, "everything waits; restore it, or remove it and decide again")
        raise Refusal("decisions", str(path), remedy) from error


def add_decision(ledgers: Path, decision: OwnerDecision) -> OwnerDecision:
    """Add a decision to the file, where a running agent sees it; return it with its number, its author and its time.

    Raises:
      Refusal: it cannot be written, or the earlier ones cannot be read.
    """
    path = ledgers / FILE
    with refusing("decisions", path, "cannot be written; nothing was decided"):
        ledgers.mkdir(mode=0o700, parents=True, exist_ok=True)
        with Lock(path, WAIT_SECONDS):
            earlier = read_decisions(ledgers)
            at = datetime.now(UTC).isoformat(timespec="seconds")
            numbered = replace(decision, number=len(earlier) + 1, who=acting_user(), at=at)
            stored = StoredDecisions((*earlier, numbered))
            replace_file(path, (json.dumps(plain_of(stored)) + "\n").encode())
    return numbered


def standing_of(
    request: OwnerRequest, decisions: Sequence[OwnerDecision], policy: OwnerPolicy, now: datetime
) -> Standing:
    """Return what a device does with a request: the last decision on it counts, then the owner's policy.

    Args:
      request: stored, with the time of its first sight.
      decisions: of the owner, oldest first.
      policy: of the owner.
      now: time, with its zone.
    """
    for decision in reversed(decisions):
        if decision.covers(request):
            return Standing.APPROVED if decision.verdict is OwnerVerdict.APPROVED else Standing.REFUSED
    if not needs_approval(request.kind, policy):
        return Standing.APPROVED
    age = now - datetime.fromisoformat(request.at)
    return Standing.EXPIRED if age >= policy.patience else Standing.WAITING


def needs_approval(kind: str, policy: OwnerPolicy) -> bool:
    """Return whether requests of a kind need the owner's approval."""
    demands = {RUN: policy.approve_runs, QUESTION: policy.approve_questions}
    return demands.get(kind, policy.approve_rosters)


def is_paused(decisions: Sequence[OwnerDecision]) -> bool:
    """Return whether the owner has paused the device."""
    of_device = [each.verdict for each in decisions if each.kind == DEVICE]
    return of_device[-1:] == [OwnerVerdict.PAUSED]


def is_stopped(name: str, decisions: Sequence[OwnerDecision]) -> bool:
    """Return whether the last decision on requests of a name stopped them."""
    of_name = [each.verdict for each in decisions if each.name == name]
    return of_name[-1:] == [OwnerVerdict.STOPPED]
