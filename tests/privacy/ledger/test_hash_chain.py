"""Hash chain of a ledger: damage, heads, files in the way, and files that change while they are open."""

import os
import shutil
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from shared.ledgers import (
    filled,
    opened,
    release,
    tamper,
)

from fedveil.base.refusal import Refusal
from fedveil.privacy.ledger.hash_chain import (
    heads_of,
    holds_head,
    require_heads,
)
from fedveil.privacy.ledger.ledger import (
    Head,
    LedgerUnavailable,
    read_entries,
    verify,
)


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


def test_entries_cannot_be_changed_by_accident(tmp_path):
    filled(tmp_path / "ledger")
    with closing(sqlite3.connect(tmp_path / "ledger")) as database:
        for statement in ("UPDATE entries SET payload = '{}'", "DELETE FROM entries"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                database.execute(statement)


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
