"""Store of ledgers: many chains in one file, which no process, fork or loss confuses."""

import os
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.ledgers import AFFORDABLE, BUDGET, EVENT, kinds, opened, release, reserved, tamper

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.epsilon import epsilon
from fedveil.privacy.budget import Adversary
from fedveil.privacy.ledger.hash_chain import START, Draft
from fedveil.privacy.ledger.ledger import BudgetExhausted, Ledger, ReleaseState, read_entries, verify
from fedveil.privacy.ledger.ledger_state import identity_of, read_events, state_at
from fedveil.privacy.ledger.store import FILE, Store, ledger_exists, ledgers_in, store_in

NAMES = [letter * 32 for letter in "abc"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.for_writing(tmp_path)) as made:
        yield made


def path_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.ledger"


def stored(store: Store, name: str) -> Ledger:
    return Ledger.stored(store, path_of(store.path.parent, name), BUDGET, owner=name)


def charged(folder: Path) -> None:
    """Charge each ledger three rounds, in turns."""
    with closing(Store.for_writing(folder)) as made:
        for number in range(3):
            for name in NAMES:
                ledger = stored(made, name)
                ledger.commit(reserved(ledger, release(number)))


# --- entries of many ledgers are written at once


def test_block_of_a_store_is_written_whole_or_not(tmp_path: Path) -> None:
    with closing(Store.for_writing(tmp_path)) as made:
        ledgers = [stored(made, name) for name in NAMES]
        with pytest.raises(ZeroDivisionError), made.transaction():
            reserved(ledgers[0], release(0))
            raise ZeroDivisionError
        assert made.heads() == {each.path.name: stored(made, each.path.stem).head for each in ledgers}
        with made.transaction():
            first = stored(made, NAMES[0])
            reserved(first, release(0))
            with pytest.raises(ZeroDivisionError), made.transaction():  # a part of it
                made.append(NAMES[1], [Draft("note", "x", "{}")], ledgers[1].head)
                raise ZeroDivisionError
            assert [len(read_entries(each.path)) for each in ledgers[:2]] == [1, 1]  # as others see it
            reserved(first, release(1))
        assert [len(read_entries(each.path)) for each in ledgers[:2]] == [3, 1]
        made.require(made.head())


# --- a ledger in a store is a ledger


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, AFFORDABLE + 1), st.booleans()), max_size=25)
)
def test_ledgers_of_a_store_equal_those_of_own_files(steps):
    """Every release has the same outcome, and the entries differ in id and time alone."""
    folder = Path(tempfile.mkdtemp())
    own = {name: opened(path_of(folder, name), owner=name, simulated=True) for name in NAMES}
    (folder / "store").mkdir()
    with closing(Store.for_writing(folder / "store")) as store:
        for name, number, commits in steps:
            outcomes = []
            for ledger in (own[name], stored(store, name)):
                try:
                    ledger.reserve(release(number))
                    if commits:
                        ledger.commit(release(number).key)
                except BudgetExhausted as spent:
                    outcomes.append(spent.would_be)
                outcomes.append(ledger.state(release(number).key))
            assert outcomes[: len(outcomes) // 2] == outcomes[len(outcomes) // 2 :]
        for ledger in own.values():
            ledger.close()
        for name in {name for name, _, _ in steps}:
            path, other = path_of(folder / "store", name), path_of(folder, name)
            assert kinds(path) == kinds(other) and verify(path).ok
            assert [each.key for each in read_entries(path)] == [each.key for each in read_entries(other)]
            assert read_events(path, Adversary.MODEL) == read_events(other, Adversary.MODEL)
            assert identity_of(path)["owner"] == name
    shutil.rmtree(folder)


def test_stored_ledger_is_read_by_its_path(tmp_path):
    charged(tmp_path)
    paths = [path_of(tmp_path, name) for name in NAMES]
    with opened(path_of(tmp_path, "d" * 32)) as ledger:
        ledger.reserve(release())
    assert ledgers_in(tmp_path) == [*paths, path_of(tmp_path, "d" * 32)]
    assert all(map(ledger_exists, ledgers_in(tmp_path))) and not paths[0].exists()
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {
        FILE,
        "d" * 32 + ".ledger",
    }
    for path in paths:
        assert verify(path).epsilon == epsilon([EVENT] * 3, BUDGET.target_delta)
        with pytest.raises(Refusal, match="does not exist"):
            read_entries(path.with_stem("e" * 32))
    with store_in(tmp_path) as store:
        assert store.heads() == {path.name: read_entries(path)[-1].head for path in paths}
    assert not ledger_exists(path_of(tmp_path, "e" * 32)) and not ledger_exists(
        tmp_path / "none" / "x.ledger"
    )
    assert state_at(path_of(tmp_path, "e" * 32)).head == START and ledgers_in(tmp_path / "none") == []


def test_ledger_of_other_data_is_refused(store):
    stored(store, NAMES[0])
    with pytest.raises(Refusal, match="kept for owner"):
        Ledger.stored(store, path_of(store.path.parent, NAMES[0]), BUDGET, owner="another")


# --- what is missing or changed shows


HARMS = {
    "last entries": "DELETE FROM entries WHERE row > 15",
    "one client": f"DELETE FROM entries WHERE ledger = '{NAMES[1]}'",
    "one client's last": f"DELETE FROM entries WHERE ledger = '{NAMES[1]}' AND seq > 5",
    "all": "DELETE FROM entries",
    "a hash": "UPDATE entries SET hash = zeroblob(32) WHERE row = 7",
    "two swapped": "UPDATE entries SET row = -row WHERE row IN (4, 5);"
    "UPDATE entries SET row = 9 + row WHERE row < 0",
}


@pytest.mark.parametrize("harm", HARMS)
def test_head_shows_that_no_entry_is_missing(tmp_path, harm):
    charged(tmp_path)
    with store_in(tmp_path) as store:
        head = store.head()
        assert head.seq == 21
        store.require(head)
    tamper(tmp_path / FILE, *HARMS[harm].split(";"))
    with store_in(tmp_path) as store, pytest.raises(Refusal, match="does not hold the known entry 21"):
        store.require(head)


def test_earlier_head_holds_as_the_store_grows(store):
    heads = [store.head()]
    for number in range(4):
        for name in NAMES:
            reserved(stored(store, name), release(number))
            heads.append(store.head())
    for head in heads:
        store.require(head)
        with pytest.raises(Refusal, match="rolled back or another store"):
            store.require(head._replace(hash="1" * 64))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET payload = replace(payload, '10.0', '99.0') WHERE seq = 4",
        "UPDATE entries SET hash = zeroblob(32) WHERE seq = 4",
        "DELETE FROM entries WHERE seq = 4",
        f"UPDATE entries SET ledger = 'd' || substr(ledger, 2) WHERE seq > 3 AND ledger = '{NAMES[0]}'",
    ],
)
def test_changed_entry_of_a_stored_ledger_is_refused(tmp_path, statement):
    charged(tmp_path)
    tamper(tmp_path / FILE, statement)
    assert not all(verify(path).ok for path in ledgers_in(tmp_path))


def test_store_is_append_only_and_its_owners(tmp_path):
    charged(tmp_path)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as database:
        for statement in ("UPDATE entries SET payload = '{}'", "DELETE FROM entries"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                database.execute(statement)
        database.execute("DROP TRIGGER no_DELETE")
    with pytest.raises(Refusal, match="guards were changed"):
        Store.for_writing(tmp_path)
    with pytest.raises(Refusal, match="guards were changed"):
        ledgers_in(tmp_path)


# --- processes


def in_child(work) -> int:
    """Fork a process that does the work, and exits with 0 if it raised nothing; return its id."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(sys.exc_info()[0] is not None)
    return process


def status(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_processes_write_at_once_and_share_each_budget(tmp_path):
    """Each of four tries all rounds that the budget affords, of ledgers that all of them open."""

    def work(child: int) -> None:
        with closing(Store.for_writing(tmp_path)) as own:
            for number in range(AFFORDABLE):
                for name in NAMES:
                    try:
                        stored(own, name).reserve(release(number, mechanism=f"of {child}"))
                    except BudgetExhausted:
                        continue

    children = [in_child(lambda child=child: work(child)) for child in range(4)]
    assert [status(child) for child in children] == [0] * 4
    for name in NAMES:
        assert kinds(path_of(tmp_path, name)) == ["open", *["reserve"] * AFFORDABLE]
        assert verify(path_of(tmp_path, name)).ok
    with store_in(tmp_path) as store:
        store.require(store.head())


def test_forked_process_opens_the_store_anew(store):
    ledger = stored(store, NAMES[0])
    ledger.reserve(release(1))

    def work() -> None:
        assert not store.is_held
        with pytest.raises(Refusal, match="opened by the parent process"):
            ledger.reserve(release(2))
        with closing(Store.for_writing(store.path.parent)) as own:
            stored(own, NAMES[0]).reserve(release(3))

    assert status(in_child(work)) == 0
    ledger.reserve(release(4))
    assert [ledger.state(release(n).key) is None for n in (1, 2, 3, 4)] == [False, True, False, False]
    assert verify(path_of(store.path.parent, NAMES[0])).ok


def test_killed_process_loses_no_reservation(tmp_path):
    def work() -> None:
        own = Store.for_writing(tmp_path)
        for name in NAMES:
            stored(own, name).reserve(release(1))
        os.kill(os.getpid(), signal.SIGKILL)

    assert status(in_child(work)) == -signal.SIGKILL
    states = [each.state for path in ledgers_in(tmp_path) for each in state_at(path).releases.values()]
    assert states == [ReleaseState.RESERVED] * 3
    with closing(Store.for_writing(tmp_path)) as own:
        own.require(own.head())
    assert [path.name for path in tmp_path.iterdir()] == [FILE], "no journal is left"
