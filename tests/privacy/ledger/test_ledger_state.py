"""State of a ledger: entries that make no sense, and verification by two accountants."""

import gc
import json
import os
import sqlite3
import tracemalloc
from contextlib import closing

import pytest
from shared.ledgers import (
    AFFORDABLE,
    BUDGET,
    COLUMNS,
    filled,
    opened,
    release,
)

from fedveil.base.refusal import Refusal
from fedveil.privacy.budget import Adjacency, Budget, Unit
from fedveil.privacy.ledger import ledger_state as book
from fedveil.privacy.ledger.hash_chain import (
    Draft,
    Entry,
    canonical,
    linked,
)
from fedveil.privacy.ledger.ledger import (
    BudgetExhausted,
    read_entries,
    verify,
)
from fedveil.privacy.ledger.ledger_state import read_ledger


def append_linked(path, *drafts):
    """Appends entries with a right chain, as whoever has this code could."""
    for draft in drafts:
        entry = linked(draft, read_entries(path)[-1].head)
        row = (entry.seq, entry.kind, entry.key, entry.payload, entry.prev_hash, entry.hash)
        with closing(sqlite3.connect(path)) as database, database:
            database.execute(f"INSERT INTO entries ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", row)


@pytest.mark.parametrize(
    "draft",
    [
        Draft("commit", "unknown", "{}"),
        Draft("void", '["run",1,"update"]', "{}"),
        Draft("refund", "x", "{}"),
        Draft("open", "again", "{}"),
        Draft("reserve", "x", "not JSON"),
        Draft("reserve", "x", '{"events":{"nobody":{}},"budget":{"target_epsilon":1.0,"target_delta":1e-5}}'),
        Draft("reserve", "x", '{"events":{},"budget":{"target_epsilon":-1.0,"target_delta":1e-5}}'),
    ],
)
def test_senseless_entries_with_a_right_chain_are_refused(tmp_path, draft):
    path = tmp_path / "ledger"
    filled(path)
    append_linked(path, draft)
    with pytest.raises(Refusal, match="entry 8 makes no sense"):
        opened(path)
    assert "entry 8" in verify(path).problem


def test_overdrawn_ledger_with_a_right_chain_is_detected(tmp_path):
    path = tmp_path / "ledger"
    filled(path)
    payload = read_entries(path)[1].payload
    append_linked(path, *(Draft("reserve", canonical(["x", n, "y"]), payload) for n in range(AFFORDABLE)))
    found = verify(path)
    assert not found.ok
    assert found.epsilon > BUDGET.target_epsilon
    assert "more is spent against the model" in found.problem
    with opened(path) as ledger, pytest.raises(BudgetExhausted):
        ledger.reserve(release(50))


@pytest.mark.parametrize("adjacency", Adjacency)
def test_verify_recomputes_by_two_accountants(tmp_path, adjacency):
    path = tmp_path / "ledger"
    with opened(path, Budget(Unit.CLIENT, 8.0, 1e-5, adjacency)) as ledger:
        for number in range(5):
            ledger.reserve(release(number))
        expected, head = ledger.epsilon(), ledger.head
        live = verify(path)
    found = verify(path)
    assert found == live
    assert found.ok, found.problem
    assert (found.entries, found.head, found.delta, found.epsilon) == (6, head, 1e-5, expected)
    assert found.epsilon_pld == pytest.approx(expected, rel=0.02)
    if adjacency is Adjacency.REPLACE_ONE:
        assert found.epsilon_rdp is None
    else:
        assert expected < found.epsilon_rdp < 1.3 * expected
    assert verify(path, delta=1e-9).epsilon > expected


def test_verify_leaves_no_trace(tmp_path):
    filled(tmp_path / "ledger")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert verify(tmp_path / "ledger").ok
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_verify_of_an_unspent_and_of_a_missing_ledger(tmp_path):
    opened(tmp_path / "ledger").close()
    assert verify(tmp_path / "ledger").epsilon == 0.0
    missing = verify(tmp_path / "none")
    assert (missing.ok, missing.entries) == (False, 0)


def test_disagreeing_accountants_are_a_problem(tmp_path, monkeypatch):
    filled(tmp_path / "ledger")
    monkeypatch.setattr(book, "spent_epsilon", lambda *_: 0.1)
    monkeypatch.setattr(book, "_epsilons", book._epsilons.__wrapped__)
    found = verify(tmp_path / "ledger")
    assert not found.ok
    assert "accountants disagree" in found.problem


def rounds_after(path, first, last, cohorts):
    """Return the entries of further rounds, each reserved and committed, with a cohort each or none."""
    entries = read_entries(path)
    payload, head = json.loads(entries[1].payload), entries[-1].head
    more = []
    for number in range(first, last):
        key, text = (
            canonical(["run", number, "update"]),
            payload | ({"cohort": [number] * 4} if cohorts else {}),
        )
        for kind, content in (("reserve", text), ("commit", {"time": payload["time"]})):
            more.append(linked(Draft(kind, key, canonical(content)), head))
            head = more[-1].head
    return more


@pytest.mark.parametrize("cohorts", [False, True])
def test_a_release_takes_little_memory(tmp_path, cohorts):
    path = tmp_path / "ledger"
    filled(path)
    state = read_ledger(path)
    texts = [tuple(entry) for entry in rounds_after(path, 100, 3_100, cohorts)]

    def replay(part):
        for each in part:  # as read from a file: no text is another's
            seq, *rest = each
            state.take(Entry(seq, *(text.encode().decode() for text in rest)), "it")

    replay(texts[:2_000])
    tracemalloc.start()
    try:
        replay(texts[2_000:])
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert grown < 2_000 * (850 if cohorts else 550)
    assert state.releases[texts[-1][2]].entry == Entry(*texts[-2])
