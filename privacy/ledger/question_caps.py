"""Caps on questions: the purposes that owners allow, and the part of the budget that questions may spend."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...base.refusal import Refusal
from ..accounting.epsilon import GATE_INTERVAL
from ..accounting.events import event_from_json, event_to_json
from ..accounting.renyi_filter import spent_epsilon
from ..budget import OF_CLIENT, Adversary, Budget, Release
from .caps import Cap
from .ledger_state import LedgerRelease, LedgerState, ReleaseState, event_of, repeated

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

QUESTION = "question"  # kind of a release
EARLIER = "earlier questions"  # begins the mechanism of charges for questions under an older name of the data


@dataclass(frozen=True)
class LedgerQuestion:
    """Question as recorded on a ledger.

    Attributes:
      name: name of the question.
      purposes: purposes of its segments, each once.
      reason: its explanation, in the asker's words; may be empty.
      segments: names of its segments.
      epsilon: cost of its answer alone, at the delta of its budget, against the adversary with the largest loss.
      time: time of its reservation, UTC.
      state: state of its release.
    """

    name: str
    purposes: tuple[str, ...]
    reason: str
    segments: tuple[str, ...]
    epsilon: float
    time: str
    state: str


def require_purposes(purposes: Iterable[str], cap: Cap) -> None:
    """Refuse a question for a purpose that an owner does not allow."""
    for purpose in sorted({*purposes}):
        if cap.purposes is not None and purpose not in cap.purposes:
            allowed = ", ".join(cap.purposes) or "no purpose"
            raise Refusal("purpose", purpose, f"the owner of the data lets questions be asked for {allowed}")


def question_excess(release: Release, caps: Iterable[Cap], book: LedgerState, budget: Budget) -> str:
    """Return a clause that says how a question exceeds the caps on questions; empty if it does not, or is no question.

    Args:
      release: about to be reserved.
      caps: caps that apply to the ledger.
      book: state of the ledger.
      budget: budget of the ledger; questions are counted at its delta.

    Raises:
      Refusal: the purpose of the question is not allowed.
    """
    if release.kind != QUESTION:
        return ""
    for cap in caps:
        require_purposes((release.segments or {}).values(), cap)
        if cap.questions is None:
            continue
        for adversary, event in release.events.items():
            earlier = spent_by_questions(book).get(adversary, Counter[str]())
            events: list[DpEvent] = [repeated(event_of(text), count) for text, count in earlier.items()]
            events.append(event_from_json(event_to_json(event)))
            spent = spent_epsilon(events, budget.target_delta, budget.adjacency, None, GATE_INTERVAL)
            if spent > cap.questions:
                return f"questions may spend epsilon {cap.questions:g}, and would have spent {spent:.4g}"
    return ""


def ledger_questions(book: LedgerState) -> list[LedgerQuestion]:
    """Return the questions on a ledger, in their order, without those that only its client's ledger lists."""
    questions: list[LedgerQuestion] = []
    for booked in book.releases.values():
        payload = _question_payload(booked)
        if not payload or booked.source == OF_CLIENT:
            continue
        delta, adjacency = payload["budget"]["target_delta"], book.identity["adjacency"]
        costs = [
            spent_epsilon([event_of(text)], delta, adjacency, None, GATE_INTERVAL)
            for text in booked.events.values()
        ]
        segments: dict[str, str] = payload.get("segments", {})
        questions.append(
            LedgerQuestion(
                name=json.loads(booked.entry.key)[0],
                purposes=tuple(sorted(set(segments.values()))),
                reason=str(payload.get("purpose", "")),
                segments=tuple(segments),
                epsilon=max(costs),
                time=str(payload["time"]),
                state=str(booked.state),
            )
        )
    return questions


def spent_by_questions(book: LedgerState) -> dict[Adversary, Counter[str]]:
    """Return the count of each event of questions, as canonical JSON, by adversary; also of older names of the data."""
    spent: dict[Adversary, Counter[str]] = {}
    for booked in book.releases.values():
        if booked.state is not ReleaseState.VOID and (is_question(booked) or _is_earlier(booked)):
            for adversary, text in booked.events.items():
                spent.setdefault(adversary, Counter())[text] += 1
    return spent


def is_question(booked: LedgerRelease) -> bool:
    """Return whether a release is the answer to a question."""
    return bool(_question_payload(booked))


def _is_earlier(booked: LedgerRelease) -> bool:
    """Return whether a release stands for the questions under an older name of the data."""
    key = booked.entry.key
    return EARLIER in key and str(json.loads(key)[2]).startswith(EARLIER)


def _question_payload(booked: LedgerRelease) -> dict[str, Any]:
    """Return the payload of a question's reservation; empty for any other release."""
    if f'"kind":"{QUESTION}"' not in booked.entry.payload:  # most are no questions, and need not be parsed
        return {}
    payload = json.loads(booked.entry.payload)
    return payload if payload.get("kind") == QUESTION else {}
