"""Desk of a device's owner: what waits for a decision and what was decided, and the commands that decide.

Neither keys nor data are read here, so that the commands and the page work while the agent runs, and before a bundle can
be used.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ...base.bounded_decoding import plain_of
from ...base.refusal import Form, Refusal
from ...configs.bundle_files import read_toml
from . import roster_changes
from .client_bundle import POLICY, DeviceFile, read_device_file
from .device import device_name
from .device_ledger import DeviceLedger
from .ledger_heads import LEDGERS
from .owner_decisions import (
    DEVICE,
    LIFTS,
    OFFICER,
    ROLES,
    OwnerDecision,
    OwnerVerdict,
    Standing,
    add_decision,
    is_paused,
    read_decisions,
    standing_of,
)
from .owner_policy import OwnerPolicy
from .owner_requests import ROSTER, OwnerRequest, read_requests, roster_request

WIDTH, TERM_WIDTH = 80, 26  # columns of the screen, and of a term's name
SHOWN = 8  # number of settled requests, and of decisions, on the screen
REASON = Form(".{1,500}", "give a reason of at most 500 characters, in one line")
SUBJECT = Form(".{1,200}", "give a name or an id, as fedveil client pending FOLDER shows it")


@dataclass(frozen=True)
class OwnerDesk:
    """Requests, decisions and policy of one device, as they are now.

    Attributes:
      folder: of the bundle.
      device: the file client.toml.
      policy: the owner's.
      requests: newest first, each with its standing; a roster that waits before all others.
      decisions: oldest first.
      now: time at which they were read.
    """

    folder: Path
    device: DeviceFile
    policy: OwnerPolicy
    requests: tuple[tuple[OwnerRequest, Standing], ...]
    decisions: tuple[OwnerDecision, ...]
    now: datetime

    @property
    def state(self) -> Path:
        """State folder of the device."""
        return self.folder / self.device.state

    @property
    def ledger(self) -> DeviceLedger:
        """Ledger on which decisions are acts."""
        return DeviceLedger(self.state / LEDGERS, device_name(self.device), self.policy.cap)

    @property
    def paused(self) -> bool:
        """Whether the owner has paused the device."""
        return is_paused(self.decisions)

    @property
    def waiting(self) -> list[OwnerRequest]:
        """Requests that wait for a decision, newest first."""
        return [request for request, standing in self.requests if standing is Standing.WAITING]

    def request(self, subject: str) -> OwnerRequest:
        """Return the request with this id. Refusal if there is none, or several."""
        same = [request for request, _ in self.requests if request.id == subject]
        if len(same) != 1:
            remedy = "is no request of this device; its id is shown by fedveil client pending FOLDER"
            raise Refusal("request", subject, remedy)
        return same[0]

    def end(self, request: OwnerRequest) -> datetime:
        """Return the time at which a request that waits counts as refused."""
        return datetime.fromisoformat(request.at) + self.policy.patience


def read_desk(folder: Path) -> OwnerDesk:
    """Return the desk of the device in a bundle.

    Raises:
      Refusal: the folder holds no client's bundle, or its policy or decisions cannot be read.
    """
    device, policy = read_device_file(folder), read_toml(OwnerPolicy, folder / POLICY)
    state, now = folder / device.state, datetime.now(UTC)
    decisions = read_decisions(state / LEDGERS)
    change = roster_changes.pending(state) if policy.approve_rosters else None
    rosters = [] if change is None else [roster_request(change)]
    requests = [*rosters, *reversed(read_requests(state))]
    standings = tuple((each, standing_of(each, decisions, policy, now)) for each in requests)
    return OwnerDesk(folder, device, policy, standings, decisions, now)


def decide(folder: Path, verdict: OwnerVerdict, subject: str, reason: str, role: str = ROLES[0]) -> str:
    """Decide, and return a line that says so; the running agent follows the decision before it begins anything else.

    Args:
      folder: of the bundle.
      verdict: of the decision.
      subject: id of the request; for a stop the name of a run or question, for a pause or its end nothing.
      reason: recorded with the decision.
      role: in which it is made.

    Raises:
      Refusal: there is no such request, no reason, or the decision cannot be written.
    """
    REASON.check(str, "reason", reason)
    desk = read_desk(folder)
    draft = replace(_draft(desk, verdict, subject), reason=reason, role=role)
    require_role(desk, draft)
    if draft.kind == ROSTER and verdict is OwnerVerdict.REFUSED:
        roster_changes.withdraw(desk.state)
    decision = add_decision(desk.state / LEDGERS, draft)
    where = "on the ledger"
    try:
        desk.ledger.record_decisions((*desk.decisions, decision))
    except Refusal as refusal:
        if refusal.field != "ledger":
            raise
        where = "the running client writes it to its ledger before its next answer"
    if draft.kind == ROSTER and verdict is OwnerVerdict.APPROVED:
        roster_changes.approve(desk.state, draft.digest)
    return f"{decision}; {where}"


def require_role(desk: OwnerDesk, draft: OwnerDecision) -> None:
    """Refuse to take back what an officer decided, in any other role."""
    if draft.verdict not in LIFTS or draft.role == OFFICER:
        return
    for number, each in enumerate(desk.decisions):
        if each.role != OFFICER or each.verdict in LIFTS or not each.is_lifted_by(draft):
            continue
        later = desk.decisions[number + 1 :]  # what others decided since does not count
        if not any(
            lift.role == OFFICER and lift.verdict in LIFTS and each.is_lifted_by(lift) for lift in later
        ):
            remedy = f"the officer decided ({each.verdict}: {each.reason}), and alone takes it back"
            raise Refusal("role", draft.role, remedy)


def _draft(desk: OwnerDesk, verdict: OwnerVerdict, subject: str) -> OwnerDecision:
    """Return a decision without its reason and author."""
    if verdict in (OwnerVerdict.PAUSED, OwnerVerdict.RESUMED):
        if desk.paused == (verdict is OwnerVerdict.PAUSED):
            remedy = f"the device is {'paused already' if desk.paused else 'not paused'}"
            raise Refusal("device", desk.device.name, remedy)
        return OwnerDecision(verdict, DEVICE, desk.device.name)
    SUBJECT.check(str, "request", subject)
    if verdict is OwnerVerdict.STOPPED:
        same = [request for request, _ in desk.requests if subject in (request.name, request.id)]
        if not same or same[0].kind == ROSTER:
            raise Refusal(
                "run", subject, "is no run or question of this device; see fedveil client pending FOLDER"
            )
        return OwnerDecision(verdict, same[0].kind, same[0].name)
    request = desk.request(subject)
    return OwnerDecision(verdict, request.kind, request.name, request.digest, request.noise)


def show_pending(folder: Path, *, as_json: bool = False) -> int:
    """Print what waits for the owner, what was settled and what was decided."""
    desk = read_desk(folder)
    if as_json:
        print(json.dumps(desk_in_json(desk)))
    else:
        print("\n".join(_lines(desk)))
    return 0


def summary(folder: Path) -> dict[str, object]:
    """Return, for the status, whether the device is paused and what waits by id; None where files cannot be read."""
    with suppress(Refusal):
        desk = read_desk(folder)
        return {"paused": desk.paused, "waiting": [each.id for each in desk.waiting]}
    return {"paused": None, "waiting": None}


def desk_in_json(desk: OwnerDesk) -> dict[str, object]:
    """Return a desk as plain data."""
    requests = [
        {
            **plain_of(request),
            "id": request.id,
            "standing": str(standing),
            "until": desk.end(request).isoformat(),
        }
        for request, standing in desk.requests
    ]
    return {
        "device": desk.device.name,
        "paused": desk.paused,
        "requests": requests,
        "decisions": [plain_of(each) for each in desk.decisions],
    }


def _lines(desk: OwnerDesk) -> Iterator[str]:
    """Yield the lines of a desk, for 80 columns."""
    pause = "paused; to go on: fedveil client resume FOLDER" if desk.paused else "not paused"
    yield f"{desk.device.name} of {desk.device.federation}: {pause}"
    yield f"{len(desk.waiting)} wait for a decision"
    for request in desk.waiting:
        yield ""
        yield f"{request.id}  {request.kind} {request.name}"
        end = desk.end(request).isoformat(timespec="minutes")
        for name, text in {**request.terms, "since": request.at, "counts as refused from": end}.items():
            yield from _term(name, text)
    settled = [(request, standing) for request, standing in desk.requests if standing is not Standing.WAITING]
    if settled:
        yield "\nsettled:"
    for request, standing in settled[:SHOWN]:
        yield _cut(f"  {request.id}  {standing:8}  {request.kind} {request.name}")
    if desk.decisions:
        yield "\ndecisions, newest first:"
    for decision in desk.decisions[: -SHOWN - 1 : -1]:
        yield from textwrap.wrap(str(decision), WIDTH, initial_indent="  ", subsequent_indent="    ")
    if desk.waiting:
        yield '\ndecide: fedveil client approve FOLDER ID --reason "..."   (or refuse)'


def _term(name: str, text: str) -> list[str]:
    """Return the lines of one term."""
    lead = f"  {name:{TERM_WIDTH}}"
    return textwrap.wrap(f"{lead}{text}", WIDTH, subsequent_indent=" " * len(lead), drop_whitespace=True)


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
