"""Requests as an owner sees them: their names, their identities, and their terms."""

from dataclasses import replace
from typing import Any

from fedveil.deployment.device.owner_requests import (
    MAX_REQUESTS,
    OwnerRequest,
    _of_all_rounds,
    read_requests,
    request_name,
    roster_request,
    store_request,
)
from fedveil.privacy.secagg.roster_change import RosterChange
from fedveil.privacy.statistics.inquiry import read_inquiry

REQUEST = OwnerRequest("run", "spring", "ab" * 32, 3.0, {"task": "digits"}, "2026-12-01T10:00:00+00:00")


def test_rounds_of_a_search_for_words_are_one_question() -> None:
    ask = [{"kind": "top", "name": "words", "of": "note", "alphabet": "ab", "longest": 3}]
    first = read_inquiry({"name": "w", "purpose": "statistics", "why": "", "records": 4, "ask": ask})
    assert _of_all_rounds(first) == _of_all_rounds(first.following(["a"]))


def test_name_leaves_out_what_a_resumed_run_adds() -> None:
    assert request_name("spring@5f evaluation") == "spring evaluation"
    assert request_name("spring") == "spring" and request_name("spring@5f0c") == "spring"


def test_id_is_of_kind_name_terms_and_noise_and_not_of_the_time() -> None:
    others = [
        replace(REQUEST, **change) for change in ({"kind": "question"}, {"name": "autumn"}, {"noise": 2.0})
    ]
    assert len({each.id for each in (REQUEST, *others, replace(REQUEST, digest="cd" * 32))}) == 5
    assert replace(REQUEST, at="2026-12-02T10:00:00+00:00").id == REQUEST.id


def test_stored_request_keeps_the_time_of_its_first_sight(tmp_path: Any) -> None:
    later = replace(REQUEST, at="2026-12-02T10:00:00+00:00")
    assert store_request(tmp_path, REQUEST) == REQUEST == store_request(tmp_path, later)
    for number in range(MAX_REQUESTS):
        store_request(tmp_path, replace(REQUEST, name=f"run {number}"))
    assert REQUEST not in read_requests(tmp_path) and len(read_requests(tmp_path)) == MAX_REQUESTS


def test_roster_that_waits_names_who_comes_and_who_goes() -> None:
    change = RosterChange(5, "ab" * 32, 4, 6, ("eve ff", "eli dd"), (), "2026-12-01T10:00:00+00:00")
    request = roster_request(change)
    assert (request.kind, request.name, request.digest) == ("roster", "version 5", change.hash)
    assert request.terms == {"members": "6", "added": "eve ff; eli dd", "removed": "nobody"}
