import os
import shutil
import sqlite3
import stat
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.epsilon import epsilon, within
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Release, Unit
from fedveil.privacy.ledger import data_sets
from fedveil.privacy.ledger import ledger_state as book
from fedveil.privacy.ledger.hash_chain import (
    SCHEMA,
    Draft,
    canonical,
    heads_of,
    holds_head,
    linked,
    require_heads,
)
from fedveil.privacy.ledger.ledger import (
    BudgetExhausted,
    Head,
    Ledger,
    LedgerUnavailable,
    ReleaseState,
    read_entries,
    verify,
)

BUDGET = Budget(Unit.CLIENT, target_epsilon=1.0, target_delta=1e-5)
EVENT = GaussianDpEvent(10.0)
SAMPLED = PoissonSampledDpEvent(0.5, GaussianDpEvent(6.0))
AFFORDABLE = next(n for n in range(1, 100) if not within({EVENT: n + 1}, BUDGET))
COLUMNS = "seq, kind, key, payload, prev_hash, hash"


def release(
    round=1, event=EVENT, *, mechanism="update", rng="system", unit=Unit.CLIENT, sees=(Adversary.MODEL,)
):
    return Release(unit, "run", round, mechanism, dict.fromkeys(sees, event), rng)


def opened(path, budget=BUDGET, *, owner="population", simulated=False, durable=False, **more):
    return Ledger.open(path, budget, owner=owner, simulated=simulated, durable=durable, **more)


def filled(path, rounds=3):
    """A closed ledger of `rounds` committed rounds; returns its last head."""
    with opened(path) as ledger:
        for number in range(rounds):
            ledger.commit(reserved(ledger, release(number)))
        return ledger.head


def reserved(ledger, wanted):
    ledger.reserve(wanted)
    return wanted.key


def kinds(path):
    return [entry.kind for entry in read_entries(path)]


def tamper(path, *statements):
    """Rewrites the file as an attacker would, the guards put back in place afterwards."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for event in ("UPDATE", "DELETE"):
            database.execute(f"DROP TRIGGER no_{event}")
        for statement in statements:
            database.execute(statement)
        for guard in SCHEMA[1:]:
            database.execute(guard)


# --- states


def test_reserved_and_committed_count_void_does_not(tmp_path):
    with opened(tmp_path / "ledger") as ledger:
        for number in (1, 2, 3):
            ledger.reserve(release(number))
        ledger.commit(release(2).key)
        ledger.void(release(3).key, "the process had sent nothing")
        assert [ledger.state(release(n).key) for n in (1, 2, 3, 4)] == [
            ReleaseState.RESERVED,
            ReleaseState.COMMITTED,
            ReleaseState.VOID,
            None,
        ]
        assert ledger.epsilon() == epsilon([EVENT, EVENT], BUDGET.target_delta)
        assert ledger.epsilon(1e-7) == epsilon([EVENT, EVENT], 1e-7)


def test_states_survive_reopening(tmp_path):
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.commit(reserved(ledger, release(1)))
        ledger.void(reserved(ledger, release(2)), "nothing was sent")
        ledger.reserve(release(3))
        before = (ledger.head, ledger.epsilon())
    with opened(path) as ledger:
        assert (ledger.head, ledger.epsilon()) == before
        states = [ledger.state(release(number).key) for number in (1, 2, 3)]
    assert states == [ReleaseState.COMMITTED, ReleaseState.VOID, ReleaseState.RESERVED]
    assert kinds(path) == ["open", "reserve", "commit", "reserve", "void", "reserve"]


def test_reserving_again_costs_nothing(tmp_path):
    with opened(tmp_path / "ledger") as ledger:
        first = ledger.reserve(release(1))
        head = ledger.head
        assert ledger.reserve(release(1)) == first
        ledger.commit(release(1).key)
        assert ledger.reserve(release(1)) == first
        assert ledger.head.seq == head.seq + 1
        assert ledger.epsilon() == epsilon([EVENT], BUDGET.target_delta)


@pytest.mark.parametrize(
    "other",
    [
        release(1, GaussianDpEvent(20.0)),
        release(1, sees=(Adversary.MODEL, Adversary.CLIENTS)),
        release(1, sees=(Adversary.SERVER,)),
    ],
)
def test_the_same_key_with_other_events_is_refused(tmp_path, other):
    with opened(tmp_path / "ledger") as ledger:
        ledger.reserve(release(1))
        head = ledger.head
        with pytest.raises(Refusal, match="other events"):
            ledger.reserve(other)
        assert ledger.head == head


def test_commit_and_void_are_idempotent_and_exclude_each_other(tmp_path):
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        left, stayed = reserved(ledger, release(1)), reserved(ledger, release(2))
        for _ in range(2):
            ledger.commit(left)
            ledger.void(stayed, "nothing was sent")
        with pytest.raises(Refusal, match="was committed"):
            ledger.void(left, "no")
        with pytest.raises(Refusal, match="was voided"):
            ledger.commit(stayed)
        with pytest.raises(Refusal, match="was voided"):
            ledger.reserve(release(2))
        with pytest.raises(Refusal, match="never reserved"):
            ledger.commit(release(9).key)
        with pytest.raises(Refusal, match="never reserved"):
            ledger.void(release(9).key, "no")
        with pytest.raises(Refusal, match="proof"):
            ledger.void(release(1).key, " ")
    assert kinds(path) == ["open", "reserve", "reserve", "commit", "void"]


def test_a_held_back_commit_travels_with_the_next_reservation(tmp_path):
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.commit(reserved(ledger, release(1)), durable=False)
        assert ledger.state(release(1).key) is ReleaseState.COMMITTED
        assert kinds(path) == ["open", "reserve"]
        with pytest.raises(Refusal, match="was committed"):
            ledger.void(release(1).key, "no")
        ledger.commit(reserved(ledger, release(2)), durable=False)
        assert kinds(path) == ["open", "reserve", "commit", "reserve"]
    assert kinds(path) == ["open", "reserve", "commit", "reserve", "commit"]


# --- the budget


@pytest.mark.parametrize("event", [EVENT, SAMPLED], ids=["plain", "sampled"])
def test_the_budget_is_spent_to_the_last_round_and_not_beyond(tmp_path, event):
    path = tmp_path / "ledger"
    affordable = next(n for n in range(1, 100) if not within({event: n + 1}, BUDGET))
    with opened(path) as ledger:
        for number in range(affordable):
            ledger.reserve(release(number, event))
        head = ledger.head
        with pytest.raises(BudgetExhausted, match="budget is spent") as caught:
            ledger.reserve(release(affordable, event))
        assert caught.value.budget == BUDGET
        assert caught.value.adversary is Adversary.MODEL
        assert ledger.epsilon() <= BUDGET.target_epsilon < caught.value.would_be
        assert ledger.head == head
        assert ledger.state(release(affordable, event).key) is None
        ledger.void(release(0, event).key, "nothing was sent")
        ledger.reserve(release(affordable, event))
    assert len(read_entries(path)) == affordable + 3


def test_too_large_release_writes_nothing_of_the_transaction(tmp_path):
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.commit(reserved(ledger, release(1)), durable=False)
        with pytest.raises(BudgetExhausted) as caught:
            ledger.reserve(release(2, NonPrivateDpEvent()))
        assert caught.value.would_be == float("inf")
        assert kinds(path) == ["open", "reserve"]
    assert kinds(path) == ["open", "reserve", "commit"]


def test_every_adversary_is_checked_and_the_worst_is_reported(tmp_path):
    costly = PoissonSampledDpEvent(1.0, GaussianDpEvent(2.0))
    both = Release(
        Unit.CLIENT, "run", 1, "update", {Adversary.MODEL: EVENT, Adversary.SERVER: costly}, "system"
    )
    with opened(tmp_path / "tight") as ledger:
        with pytest.raises(BudgetExhausted) as caught:
            ledger.reserve(both)
        assert caught.value.adversary is Adversary.SERVER
        assert ledger.epsilon() == 0.0
    with opened(tmp_path / "wide", Budget(Unit.CLIENT, 5.0, 1e-5)) as ledger:
        ledger.reserve(both)
        ledger.reserve(release(2))
        assert ledger.epsilon() == epsilon(ledger.events(Adversary.SERVER), 1e-5) == epsilon([costly], 1e-5)
        assert epsilon(ledger.events(Adversary.MODEL), 1e-5) == epsilon([EVENT, EVENT], 1e-5)
        assert ledger.events(Adversary.CLIENTS) == []


def test_releases_that_do_not_belong_are_refused(tmp_path):
    with opened(tmp_path / "real") as ledger:
        with pytest.raises(Refusal, match="counts by client"):
            ledger.reserve(release(unit=Unit.RECORD))
        with pytest.raises(Refusal, match="noise on real data"):
            ledger.reserve(release(rng="seeded"))
        assert ledger.head.seq == 1
    with opened(tmp_path / "simulated", simulated=True) as ledger:
        ledger.reserve(release(rng="seeded"))
    assert '"rng":"seeded"' in read_entries(tmp_path / "simulated")[1].payload


# --- durability


def test_a_durable_ledger_is_synced_in_full_and_private(tmp_path):
    path = tmp_path / "ledger"
    for durable, level in ((True, 2), (False, 1)):
        with opened(path, durable=durable) as ledger:
            ledger.reserve(release(level))
            database = ledger._chain._db
            assert database.execute("PRAGMA synchronous").fetchone() == (level,)
            assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            for name in os.listdir(tmp_path):
                assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_a_reservation_is_in_the_file_before_reserve_returns(tmp_path):
    path = tmp_path / "ledger"
    with opened(path, durable=True) as ledger:
        entry = ledger.reserve(release(1))
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as other:
            row = other.execute(f"SELECT {COLUMNS} FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        assert row == (entry.seq, entry.kind, entry.key, entry.payload, entry.prev_hash, entry.hash)
        assert not ledger._chain._db.in_transaction


def test_a_full_disk_refuses_and_closes(tmp_path):
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.reserve(release(1))
        pages = ledger._chain._db.execute("PRAGMA page_count").fetchone()[0]
        ledger._chain._db.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(LedgerUnavailable, match="nothing may leave"):
            ledger.reserve(release(2, mechanism="m" * 100_000))
        with pytest.raises(Refusal, match="closed"):
            ledger.reserve(release(3))
    with opened(path) as ledger:
        assert ledger.epsilon() == epsilon([EVENT], BUDGET.target_delta)


def test_a_closed_ledger_refuses(tmp_path):
    ledger = opened(tmp_path / "ledger")
    ledger.close()
    ledger.close()
    for use in (
        lambda: ledger.reserve(release(1)),
        lambda: ledger.commit(release(1).key),
        lambda: ledger.void(release(1).key, "nothing was sent"),
    ):
        with pytest.raises(Refusal, match="closed"):
            use()


def test_entries_cannot_be_changed_by_accident(tmp_path):
    filled(tmp_path / "ledger")
    with closing(sqlite3.connect(tmp_path / "ledger")) as database:
        for statement in ("UPDATE entries SET payload = '{}'", "DELETE FROM entries"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                database.execute(statement)


# --- damage: every row must refuse on opening, and verify must say so

SWAPPED = "INSERT INTO entries SELECT {}, kind, key, payload, prev_hash, hash FROM entries WHERE seq = {}"
DAMAGE = {
    "edited payload": (
        ["UPDATE entries SET payload = replace(payload, '10.0', '99.0') WHERE seq = 4"],
        "entry 4 ",
    ),
    "edited key": (['UPDATE entries SET key = \'["run",7,"update"]\' WHERE seq = 2'], "entry 2 "),
    "edited hash": (["UPDATE entries SET hash = '00' WHERE seq = 3"], "entry 3 "),
    "cut in the middle": (["DELETE FROM entries WHERE seq = 4"], "entry 4 "),
    "cut at the start": (["DELETE FROM entries WHERE seq = 1"], "entry 1 "),
    "cut and closed up": (
        ["DELETE FROM entries WHERE seq = 4", "UPDATE entries SET seq = seq - 1 WHERE seq > 4"],
        "entry 4 ",
    ),
    "duplicated": (
        [
            "INSERT INTO entries SELECT 8, kind, key || ' ', payload, prev_hash, hash FROM entries WHERE seq = 6",
        ],
        "entry 8 ",
    ),
    "reordered": (
        [
            "UPDATE entries SET seq = 100 WHERE seq = 4",
            "UPDATE entries SET seq = 4 WHERE seq = 6",
            "UPDATE entries SET seq = 6 WHERE seq = 100",
        ],
        "entry 4 ",
    ),
    "not text": (["UPDATE entries SET payload = CAST(x'ff' AS TEXT) WHERE seq = 4"], "cannot be read"),
    "emptied": (["DELETE FROM entries"], "kept for version None"),
    "another table": (["CREATE TABLE more (x)"], "tables or guards were changed"),
    "guard rewritten": (
        ["CREATE TRIGGER later AFTER INSERT ON entries BEGIN SELECT 1; END"],
        "tables or guards were changed",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(tmp_path, name):
    path = tmp_path / "ledger"
    statements, message = DAMAGE[name]
    filled(path)
    tamper(path, *statements)
    with pytest.raises(Refusal, match=message) as caught:
        opened(path)
    assert caught.value.field == "ledger"
    assert not verify(path).ok


def test_a_missing_guard_is_refused(tmp_path):
    path = tmp_path / "ledger"
    filled(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TRIGGER no_DELETE")
    with pytest.raises(Refusal, match="guards were changed"):
        opened(path)


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


def test_flipped_bits_never_change_the_content(tmp_path):
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    filled(path)
    truth, whole = read_entries(path), path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 149):
        copy.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            opened(copy).close()
            assert read_entries(copy) == truth
        except Refusal:
            refused += 1
    assert refused > 10


# --- what only a head kept elsewhere shows


def test_head_is_recognised_again(tmp_path):
    path = tmp_path / "ledger"
    head = filled(path)
    with opened(path, expect=head) as ledger:
        ledger.reserve(release(7))
    opened(path, expect=head).close()


def test_a_truncated_tail_is_refused(tmp_path):
    path = tmp_path / "ledger"
    head = filled(path)
    tamper(path, f"DELETE FROM entries WHERE seq = {head.seq}")
    with pytest.raises(Refusal, match=f"known entry {head.seq}: cut short"):
        opened(path, expect=head)


def test_an_old_copy_is_refused(tmp_path):
    path = tmp_path / "ledger"
    filled(path, rounds=2)
    shutil.copy(path, tmp_path / "old")
    with opened(path) as ledger:
        ledger.reserve(release(5))
        head = ledger.head
    shutil.copy(tmp_path / "old", path)
    with pytest.raises(Refusal, match="rolled back"):
        opened(path, expect=head)
    with opened(path) as ledger:
        ledger.reserve(release(6))
        assert ledger.head.seq == head.seq
    with pytest.raises(Refusal, match="rolled back"):
        opened(path, expect=head)


def test_the_ledger_of_another_run_is_refused(tmp_path):
    head = filled(tmp_path / "mine")
    filled(tmp_path / "other")
    with pytest.raises(Refusal, match="another ledger"):
        opened(tmp_path / "other", expect=head)


@pytest.mark.parametrize("empty", [True, False])
def test_missing_ledger_is_not_started_anew(tmp_path, empty):
    path = tmp_path / "ledger"
    if empty:
        path.touch()
    with pytest.raises(Refusal, match="missing, though entry 4"):
        opened(path, expect=Head(4, "00"))
    assert os.listdir(tmp_path) == (["ledger"] if empty else [])


def test_a_journal_without_its_ledger_is_refused(tmp_path):
    with opened(tmp_path / "ledger") as ledger:
        ledger.reserve(release(1))
        shutil.copy(tmp_path / "ledger-wal", tmp_path / "copy-wal")
    with pytest.raises(Refusal, match="gone, yet its -wal"):
        opened(tmp_path / "copy")


def test_a_torn_last_write_was_never_acknowledged(tmp_path):
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    with opened(path) as ledger:
        ledger.reserve(release(1))
        before = ledger.head
        ledger.reserve(release(2))
        after = ledger.head
        shutil.copy(path, copy)
        journal = Path(f"{path}-wal").read_bytes()
    Path(f"{copy}-wal").write_bytes(journal[:-1])
    with opened(copy, expect=before) as ledger:
        assert ledger.state(release(2).key) is None
    with pytest.raises(Refusal, match="cut short"):
        opened(copy, expect=after)


def test_a_ledger_that_shrinks_while_open_is_refused(tmp_path):
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.reserve(release(1))
        tamper(path, "DELETE FROM entries WHERE seq = 2")
        with pytest.raises(Refusal, match="rolled back"):
            ledger.reserve(release(2))


# --- whose ledger, and what kind of file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": Budget(Unit.RECORD, 1.0, 1e-5)}, "unit 'client', not 'record'"),
        ({"budget": Budget(Unit.CLIENT, 1.0, 1e-5, Adjacency.REPLACE_ONE)}, "adjacency 'zero-out'"),
        ({"owner": "others"}, "owner 'population', not 'others'"),
        ({"simulated": True}, "simulated False, not True"),
    ],
)
def test_another_identity_is_refused(tmp_path, change, message):
    filled(tmp_path / "ledger")
    with pytest.raises(Refusal, match=message):
        opened(tmp_path / "ledger", **change)


@pytest.mark.parametrize("harm", ["deleted", "rolled back"])
def test_a_data_set_knows_the_heads_that_were_left_on_its_ledgers(tmp_path, harm):
    path, owner = data_sets.population_path(tmp_path, "wards"), data_sets.population_ledger("wards")
    with data_sets.exclusive_access(tmp_path, "wards"), opened(path, owner=owner) as ledger:
        ledger.reserve(release(1))
    earlier = path.read_bytes()
    with data_sets.exclusive_access(tmp_path, "wards"), opened(path, owner=owner) as ledger:
        ledger.reserve(release(2))
    newest, known = path.read_bytes(), (tmp_path / data_sets.FILE).read_bytes()
    path.unlink() if harm == "deleted" else path.write_bytes(earlier)
    with pytest.raises(Refusal, match=r"missing, though entry 3|known entry 3: cut short, rolled back"):
        data_sets.exclusive_access(tmp_path, "wards").__enter__()
    with data_sets.exclusive_access(tmp_path, "others"):  # another data set of the folder
        pass
    assert path.exists() == (harm != "deleted") and (tmp_path / data_sets.FILE).read_bytes() == known
    path.write_bytes(newest)
    with data_sets.exclusive_access(tmp_path, "wards"), opened(path, owner=owner) as ledger:
        ledger.reserve(release(3))
    assert data_sets.read_data_sets(tmp_path)["wards"].heads[path.name].seq == 4


@pytest.mark.parametrize("kept", ["before this run", "within this run"])
def test_ledger_replaced_within_a_run_does_not_count_afterwards(tmp_path, kept):
    path, owner = data_sets.population_path(tmp_path, "wards"), data_sets.population_ledger("wards")
    with data_sets.exclusive_access(tmp_path, "wards"), opened(path, owner=owner) as ledger:
        ledger.reserve(release(1))
    older, newest = tmp_path / "older", tmp_path / "newest"
    shutil.copy(path, older)
    with data_sets.exclusive_access(tmp_path, "wards"), opened(path, owner=owner) as ledger:
        ledger.reserve(release(2))
    with data_sets.exclusive_access(tmp_path, "wards"):
        with opened(path, owner=owner) as ledger:
            ledger.reserve(release(3))
        if kept == "within this run":
            shutil.copy(path, older)
            with opened(path, owner=owner) as ledger:
                ledger.reserve(release(4))
            data_sets.keep_head(ledger, "wards")
        shutil.copy(path, newest)
        os.replace(older, path)
    with pytest.raises(Refusal, match="rolled back"):
        data_sets.exclusive_access(tmp_path, "wards").__enter__()
    os.replace(newest, path)
    with data_sets.exclusive_access(tmp_path, "wards"):
        pass


def test_a_ledger_that_is_damaged_behind_its_first_page_is_refused(tmp_path):
    path = tmp_path / "ledger"
    filled(path)
    with opened(path) as ledger:
        for number in range(40):
            ledger.note(("run", number, "page"), {"text": "x" * 100})
        head = ledger.head
    pages = bytearray(path.read_bytes())
    pages[4096:] = b"\xff" * len(pages[4096:])
    path.write_bytes(pages)
    for read in (lambda: heads_of([path]), lambda: holds_head(path, head)):
        with pytest.raises(Refusal, match="cannot be read as a ledger"):
            read()
    with pytest.raises(Refusal, match="cannot be read as a ledger"):
        require_heads(tmp_path, {path.name: head})


def moved(path, other):
    path.rename(path.with_suffix(".old"))


def replaced(path, other):
    os.replace(other, path)


def folder_moved(path, other):
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.mkdir()
    shutil.copy(other, path)


def log_removed(path, other):
    path.with_name(f"{path.name}-wal").unlink()


@pytest.mark.parametrize("harm", [moved, replaced, folder_moved, log_removed])
def test_moved_or_replaced_open_ledger_takes_no_charge(tmp_path, harm):
    (tmp_path / "home").mkdir()
    path, other = tmp_path / "home" / "ledger", tmp_path / "older"
    filled(path, 1)
    shutil.copy(path, other)
    with opened(path) as ledger:
        ledger.reserve(release(5))
        harm(path, other)
        with pytest.raises(Refusal, match="moved or replaced"):
            ledger.reserve(release(6))


def test_a_ledger_that_is_moved_within_a_reservation_is_refused(tmp_path):
    with opened(tmp_path / "ledger") as ledger:
        with pytest.raises(LedgerUnavailable, match="moved or replaced"):
            ledger.charge(lambda _: (moved(ledger.path, None), [])[1])
        assert not ledger.is_open


def test_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fedveil.privacy.ledger.ledger.VERSION", 2)
    filled(tmp_path / "ledger")
    monkeypatch.undo()
    with pytest.raises(Refusal, match="version 2, not 1"):
        opened(tmp_path / "ledger")


def test_a_larger_budget_continues_the_same_ledger(tmp_path):
    filled(tmp_path / "ledger", AFFORDABLE)
    with opened(tmp_path / "ledger", Budget(Unit.CLIENT, 2.0, 1e-5)) as ledger:
        ledger.reserve(release(AFFORDABLE))
    with opened(tmp_path / "ledger") as ledger, pytest.raises(BudgetExhausted):
        ledger.reserve(release(AFFORDABLE + 1))


def test_an_empty_file_is_a_new_ledger(tmp_path):
    path = tmp_path / "ledger"
    path.touch(mode=0o644)
    with opened(path) as ledger:
        ledger.reserve(release(1))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def symlink(path):
    filled(path.with_name("real"))
    path.symlink_to("real")


def read_only(path):
    filled(path)
    path.chmod(0o400)


STRANGE = {
    "symlink": symlink,
    "dangling symlink": lambda path: path.symlink_to("nowhere"),
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "read-only": read_only,
    "text": lambda path: path.write_text("epsilon: 3\n" * 500),
    "another database": lambda path: sqlite3.connect(path).execute("CREATE TABLE t (x)").connection.close(),
    "lock is a symlink": lambda path: Path(f"{path}.lock").symlink_to("elsewhere"),
    "journal is a fifo": lambda path: os.mkfifo(f"{path}-wal"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_files_are_refused_and_left_alone(tmp_path, name):
    path = tmp_path / "ledger"
    STRANGE[name](path)
    before = sorted(set(os.listdir(tmp_path)) | {"ledger.lock"})
    with pytest.raises(Refusal) as caught:
        opened(path)
    assert caught.value.field == "ledger"
    assert sorted(set(os.listdir(tmp_path)) | {"ledger.lock"}) == before


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/nowhere/at/all/ledger"])
def test_devices_and_missing_folders_are_refused(path):
    with pytest.raises(Refusal):
        opened(path)


# --- verification


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


# --- any order of operations, against a model

ROUNDS = st.integers(0, AFFORDABLE + 2)


class AnyOrder(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "ledger"
        self.ledger = opened(self.path)
        self.model: dict[int, ReleaseState] = {}
        self.held_back: set[int] = set()

    def spent(self):
        return sum(state is not ReleaseState.VOID for state in self.model.values())

    @rule(number=ROUNDS)
    def reserve(self, number):
        state = self.model.get(number)
        if state is ReleaseState.VOID:
            with pytest.raises(Refusal):
                self.ledger.reserve(release(number))
        elif state is None and self.spent() == AFFORDABLE:
            with pytest.raises(BudgetExhausted):
                self.ledger.reserve(release(number))
        else:
            self.ledger.reserve(release(number))
            self.model.setdefault(number, ReleaseState.RESERVED)
            self.held_back.clear()

    @rule(number=ROUNDS, durable=st.booleans())
    def commit(self, number, durable):
        if self.model.get(number) in (None, ReleaseState.VOID):
            with pytest.raises(Refusal):
                self.ledger.commit(release(number).key, durable)
            return
        self.ledger.commit(release(number).key, durable)
        if self.model[number] is ReleaseState.RESERVED:
            self.held_back.add(number)
        self.model[number] = ReleaseState.COMMITTED
        if durable:
            self.held_back.clear()

    @rule(number=ROUNDS)
    def void(self, number):
        if self.model.get(number) in (None, ReleaseState.COMMITTED):
            with pytest.raises(Refusal):
                self.ledger.void(release(number).key, "nothing was sent")
            return
        self.ledger.void(release(number).key, "nothing was sent")
        self.held_back.clear()
        self.model[number] = ReleaseState.VOID

    @rule()
    def reopen(self):
        head = self.ledger.head
        self.ledger.close()
        self.ledger = opened(self.path, expect=head)
        self.held_back.clear()

    @rule()
    def crash(self):
        """What a killed process leaves is what its files hold now."""
        head, left = self.ledger.head, self.path.with_name(self.path.name + "'")
        for suffix in ("", "-wal"):
            shutil.copy(f"{self.path}{suffix}", f"{left}{suffix}")
        self.ledger.close()
        self.path = left
        self.ledger = opened(self.path, expect=head)
        self.model.update(dict.fromkeys(self.held_back, ReleaseState.RESERVED))
        self.held_back.clear()

    @invariant()
    def agrees(self):
        states = {number: self.ledger.state(release(number).key) for number in range(AFFORDABLE + 3)}
        assert {number: state for number, state in states.items() if state} == self.model
        assert self.ledger.epsilon() == epsilon({EVENT: self.spent()}, BUDGET.target_delta)
        assert self.ledger.epsilon() <= BUDGET.target_epsilon

    def teardown(self):
        if hasattr(self, "ledger"):
            self.ledger.close()
            shutil.rmtree(self.folder)


def in_any_order(examples, steps):
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(max_examples=examples, stateful_step_count=steps),
    )


def test_any_order_of_operations_agrees_with_the_model():
    in_any_order(30, 30)


@pytest.mark.campaign
def test_ten_thousand_orders_of_operations_agree_with_the_model():
    in_any_order(10_000, 20)
