"""Caps: upper limits, set by the owner of the data, on the spending of the ledgers in one folder.

They are stored in that folder, written by `fedveil budget set` and read by the ledger itself before every reservation.
No message carries a cap, so a message from the network cannot raise one.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from ...base.bounded_decoding import read_json
from ...base.durable_files import replace_file
from ...base.refusal import Refusal, real, unreadable
from ..budget import Budget, Unit
from .acts import CAPS, acting_user
from .hash_chain import Lock, regular

FILE = "caps.json"
VERSION = 1
ALL = "all"  # in the place of a ledger's name: the cap is for every ledger in the folder
NAME_LENGTH = 32  # characters of a fingerprint in the name of a ledger's file
FINGERPRINT = re.compile(f"[0-9a-f]{{{NAME_LENGTH},64}}")
DATA_ID = "[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"  # pattern of a data set's declared name
NO_DATA_ID = "must be a name of letters, digits, '-', '_' and '.', at most 64 of them"
# Prefixes of a ledger's name: of all clients together, of all their records together, and of a device as a client.
POPULATION, RECORDS, CLIENT = "population-", "records-", "client-"
WAIT_SECONDS = 10.0  # for another process that holds a lock
QUESTION_FIELDS = ("questions", "purposes")  # fields of a cap on questions


def default_folder() -> Path:
    """Return where the ledgers of real data lie unless a setting of this machine names another folder."""
    return Path.home() / ".local" / "share" / "fedveil" / "ledgers"


def ledger_file(folder: Path, name: str, prefix: str = "") -> Path:
    """Return the path of the ledger of this name, such as a fingerprint; the prefix is empty for a client's records."""
    return folder / f"{prefix}{name[:NAME_LENGTH]}.ledger"


def ledger_folder(field: str, value: Path | str | None) -> Path:
    """Return the folder of ledgers of real data: the requested one, or the user's default.

    Args:
      field: setting that a refusal names.
      value: an absolute folder; None for the default folder.

    Raises:
      Refusal: the folder is relative.
    """
    folder = default_folder() if value is None else Path(value)
    if not folder.is_absolute():
        remedy = "give an absolute folder: from another working folder it would be another ledger, with a new budget"
        raise Refusal(field, str(value), remedy)
    return folder


class CapEnded(Refusal):
    """Refusal because the last day on which the owner of the data allowed releases is over."""


@dataclass(frozen=True)
class Cap:
    """One decision of the owner; the latest on a data set applies, together with the latest on `all`.

    Attributes:
      data: the ledger's name, or `all` for every ledger in the folder.
      target_epsilon: the largest epsilon that a ledger may spend, as in `Budget`.
      target_delta: the delta of that epsilon, as in `Budget`.
      until: the last day, UTC, on which a release is allowed; None sets no end.
      questions: the part of epsilon that questions may spend, at the ledger's delta; None lets them spend all.
      purposes: purposes for which questions are allowed; None allows any.
      decided: the time of the decision, UTC.
      who: user name of its author, from the operating system.
      reason: reason of the decision in words; None if none was given.

    Raises:
      Refusal: a value is out of range.
    """

    data: str
    target_epsilon: float
    target_delta: float
    until: date | None = None
    decided: str = ""
    who: str = ""
    reason: str | None = None
    questions: float | None = None
    purposes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        Budget(Unit.RECORD, self.target_epsilon, self.target_delta)  # refuses what is out of range
        if self.questions is not None and not real("questions", self.questions) >= 0:
            raise Refusal("questions", self.questions, "give an epsilon of 0 or more")
        if self.data != ALL and not FINGERPRINT.fullmatch(self.data):
            remedy = "give the name of a ledger, as `fedveil budget show` has it under data, or all"
            raise Refusal("data", self.data, remedy)
        object.__setattr__(self, "data", self.data[:NAME_LENGTH])


def set_cap(folder: Path, cap: Cap) -> None:
    """Add a decision to those in a folder; it is on disk when this returns.

    Args:
      folder: folder of the ledgers; created if missing.
      cap: the decision; its time and author are set here.

    Raises:
      Refusal: it cannot be written, or the earlier ones cannot be read.
    """
    path = folder / FILE
    now = datetime.now(UTC).isoformat(timespec="seconds")
    decided = replace(cap, decided=now, who=acting_user())
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with Lock(path, WAIT_SECONDS):
            decisions = [_cap_to_json(each) for each in [*read_caps(folder), decided]]
            text = json.dumps({"version": VERSION, "caps": decisions}, indent=1) + "\n"
            replace_file(path, text.encode())
    except OSError as error:
        remedy = f"cannot be written ({error}); the caps stay as they were"
        raise Refusal("caps", str(path), remedy) from error


def read_caps(folder: Path) -> list[Cap]:
    """Return all decisions in a folder, in their order.

    Raises:
      Refusal: they exist and cannot be read.
    """
    path = folder / FILE
    if regular(path) is None:
        return []
    try:
        document = read_json(path.read_bytes())
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']!r}")
        return [_cap_from_json(fields) for fields in document["caps"]]
    except (OSError, ValueError, LookupError, TypeError, Refusal) as error:
        remedy = unreadable(error, "restore it, or remove it and set the caps anew")
        raise Refusal("caps", str(path), remedy) from error


def caps_on(ledger: Path) -> list[Cap]:
    """Return the decisions that apply to a ledger at this path: the latest on `all`, and the latest on its data."""
    latest = {cap.data: cap for cap in read_caps(ledger.parent)}
    if not latest:
        return []
    name = ledger.stem.removeprefix(POPULATION).removeprefix(RECORDS).removeprefix(CLIENT)[:NAME_LENGTH]
    return [latest[data] for data in (ALL, name) if data in latest]


def cap_acts(ledger: Path) -> list[tuple[tuple[str, int, str], dict[str, Any]]]:
    """Return key and content of an act (`Ledger.act`) for each cap on a ledger, which thus records what applied to it."""
    acts: list[tuple[tuple[str, int, str], dict[str, Any]]] = []
    for cap in caps_on(ledger):
        decision = _cap_to_json(cap)
        del decision["data"]
        acts.append(((CAPS, 0, f"{cap.data} {cap.decided}"), decision))
    return acts


def capped(ledger: Path, budget: Budget) -> Budget:
    """Return a budget lowered to the caps on the ledger at this path.

    Raises:
      CapEnded: a cap has expired.
      Refusal: the caps cannot be read.
    """
    return lowered(budget, caps_on(ledger))


def lowered(budget: Budget, caps: Iterable[Cap]) -> Budget:
    """Return a budget lowered to caps: the smallest epsilon, at the smallest delta.

    Raises:
      CapEnded: a cap has expired.
    """
    for cap in caps:
        if cap.until is not None and datetime.now(UTC).date() > cap.until:
            raise CapEnded("until", str(cap.until), "the owner of the data allows no release after that day")
        size = min(budget.target_epsilon, cap.target_epsilon)
        budget = replace(budget, target_epsilon=size, target_delta=min(budget.target_delta, cap.target_delta))
    return budget


def _cap_to_json(cap: Cap) -> dict[str, Any]:
    fields = {**asdict(cap), "until": cap.until and cap.until.isoformat()}
    # A cap without questions keeps the file's format of earlier releases.
    return {name: value for name, value in fields.items() if name not in QUESTION_FIELDS or value is not None}


def _cap_from_json(fields: dict[str, Any]) -> Cap:
    until, purposes = fields["until"], fields.get("purposes")
    values: dict[str, Any] = {**fields, "until": None if until is None else date.fromisoformat(until)}
    if purposes is not None:
        values["purposes"] = tuple(map(str, purposes))
    return Cap(**values)
