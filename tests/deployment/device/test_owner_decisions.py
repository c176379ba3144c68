"""Decisions of an owner: what they cover, and which one counts."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from fedveil.deployment.device.owner_decisions import (
    OwnerDecision,
    OwnerVerdict,
    Standing,
    is_paused,
    is_stopped,
    standing_of,
)
from fedveil.deployment.device.owner_requests import OwnerRequest

REQUEST = OwnerRequest("run", "spring", "ab" * 32, 3.0, {}, "2026-12-01T10:00:00+00:00")
NOW = datetime(2026, 12, 1, 10, 30, tzinfo=UTC)
HOUR = 3600.0


def policy(seconds: float = HOUR, **demands: bool) -> Any:
    asks = {"approve_runs": True, "approve_questions": False, "approve_rosters": False, **demands}
    return SimpleNamespace(**asks, patience=timedelta(seconds=seconds))


def decision(verdict: str, request: OwnerRequest = REQUEST) -> OwnerDecision:
    fields = (request.kind, request.name, request.digest, request.noise)
    return OwnerDecision(OwnerVerdict(verdict), *fields)


APPROVED, REFUSED, STOPPED = (decision(word) for word in ("approved", "refused", "stopped"))
OTHERS = {
    "kind": replace(REQUEST, kind="question"),
    "name": replace(REQUEST, name="autumn"),
    "terms": replace(REQUEST, digest="cd" * 32),
}


@pytest.mark.parametrize("part", OTHERS)
def test_decision_is_on_one_request(part: str) -> None:
    assert APPROVED.covers(REQUEST) and REFUSED.covers(REQUEST)
    assert not APPROVED.covers(OTHERS[part]) and not REFUSED.covers(OTHERS[part])
    assert STOPPED.covers(OTHERS[part]) == (part == "terms")


@pytest.mark.parametrize(
    ("noise", "approves", "refuses"), [(2.0, False, True), (3.0, True, True), (4.0, True, False)]
)
def test_approval_holds_for_more_noise_and_a_refusal_for_less(
    noise: float, approves: bool, refuses: bool
) -> None:
    request = replace(REQUEST, noise=noise)
    assert (APPROVED.covers(request), REFUSED.covers(request)) == (approves, refuses)


@pytest.mark.parametrize(
    ("decisions", "standing"),
    [
        ((), Standing.WAITING),
        ((APPROVED,), Standing.APPROVED),
        ((APPROVED, REFUSED), Standing.REFUSED),
        ((REFUSED, APPROVED), Standing.APPROVED),
        ((APPROVED, STOPPED), Standing.REFUSED),
        ((STOPPED, APPROVED), Standing.APPROVED),
        ((decision("approved", OTHERS["terms"]),), Standing.WAITING),
    ],
    ids=[
        "none",
        "approved",
        "refused",
        "approved later",
        "stopped",
        "approved after a stop",
        "of other terms",
    ],
)
def test_last_decision_on_a_request_counts(decisions: tuple[OwnerDecision, ...], standing: Standing) -> None:
    assert standing_of(REQUEST, decisions, policy(), NOW) is standing


def test_silence_is_no_consent_however_long() -> None:
    assert standing_of(REQUEST, (), policy(1801.0), NOW) is Standing.WAITING
    assert standing_of(REQUEST, (), policy(1800.0), NOW) is Standing.EXPIRED
    assert standing_of(REQUEST, (), policy(approve_runs=False), NOW) is Standing.APPROVED


def test_pause_and_stop_end_with_the_decision_that_lifts_them() -> None:
    pause, end = (OwnerDecision(OwnerVerdict(word), "device", "north") for word in ("paused", "resumed"))
    assert is_paused((pause,)) and not is_paused((pause, end)) and is_paused((pause, end, pause))
    assert is_stopped("spring", (STOPPED, pause)) and not is_stopped("spring", (STOPPED, APPROVED))
    assert not is_stopped("autumn", (STOPPED,))
