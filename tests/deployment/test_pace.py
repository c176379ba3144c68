"""Pace of a server's rounds: what a round waits for."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from fedveil.deployment import pace as pace_module
from fedveil.deployment.open_link import Link, Presence
from fedveil.deployment.pace import pace_of
from fedveil.deployment.settings import LinkSettings
from fedveil.privacy.secagg.roster import Member, Roster


def test_rounds_wait_for_certificates_that_have_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five members one has ended; then the server's own, whose word no device takes."""
    now = int(time.time())
    members = tuple(
        Member(node, f"c{node}", bytes(31) + bytes([node]), now + (-1 if node == 6 else 1000))
        for node in range(2, 7)
    )
    here, waited, ends = {2: 0.0, 3: 0.0, 4: 0.0, 6: 0.0}, list[int](), [now + 1000]
    nothing: Any = None
    link = Link(nothing, lambda: Presence(here))
    settings = LinkSettings(name="grpc", clients=0.8, wait=0.2)
    rosters = (Roster(1, members), b"")

    def required(federation: Any, clients: int, valid: int) -> int:
        return valid

    def certificate_end_of(bundle: Any) -> Callable[[], int]:
        return lambda: ends[0]

    monkeypatch.setattr(pace_module, "required_clients", required)
    monkeypatch.setattr(pace_module, "certificate_end_of", certificate_end_of)
    pace = pace_of(nothing, nothing, lambda: rosters, settings, link, waited.append)
    stop = threading.Event()
    why = pace.ready(stop)
    assert why == "3 of 4 clients that a round needs were connected after 0.2 s" and set(waited) == {4}
    here[5] = 0.0
    assert pace.ready(stop) is None and waited[-1] == 0
    ends[0] = now - 1
    why = pace.ready(stop)
    assert why == "the server's own certificate had expired and was not renewed after 0.2 s"
    ends[0] = now + 1000
    assert pace.ready(stop) is None
