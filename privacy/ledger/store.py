"""Store of many ledgers in one SQLite file: those of a simulation's clients, of which each round charges a cohort.

A ledger in a store has the path that a file of its own would have, and is a hash chain of its own. A second chain runs
through the entries of all ledgers in the order in which they were written: each link is the SHA-256 of the link before
and the entry's hash. Its head, stored in a checkpoint, shows that no entry of any ledger is missing. Several processes
of one machine may write to a store at once; SQLite's write-ahead log cannot be shared by several machines.
"""

import contextlib
import hashlib
import os
import sqlite3
import threading
from collections.abc import Generator, Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Self

from ...base.refusal import Refusal
from .hash_chain import (
    GUARDS,
    START,
    Chain,
    Draft,
    Entry,
    EntryChain,
    EntryFile,
    Head,
    chained,
    entries_after,
    refusing_ledger,
    regular,
)

FILE = "ledgers.sqlite"  # in the folder of the ledgers
SUFFIX = ".ledger"
TABLE = """
CREATE TABLE entries (
    row INTEGER PRIMARY KEY, ledger TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL,
    payload TEXT NOT NULL, hash BLOB NOT NULL, link BLOB NOT NULL, UNIQUE (ledger, seq)
) STRICT""".strip()


class Store(EntryFile):
    """Store of the ledgers of one folder.

    A child that is forked from the process that opened it must open it anew, and must keep this object: closing it there
    would end what SQLite does for the parent.
    """

    schema = (TABLE, *GUARDS)

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self._process, self._is_open = os.getpid(), True
        self._threads = threading.RLock()  # held by a thread of this process in its transaction
        self._last: Head | None = None  # what `head` returns; None where a transaction must read it

    @classmethod
    def for_writing(cls, folder: Path) -> Self:
        """Open the store of a folder, or create it; what it holds survives the end of the process, not a power cut.

        Raises:
          Refusal: not a store, damaged, or cannot be written.
        """
        return cls.create_or_open(folder / FILE, lambda store: None, durable=False)

    @classmethod
    def in_memory(cls, path: Path) -> Self:
        """Return an empty store, which is not on disk."""
        store = cls(path, "mode=memory")
        for statement in cls.schema:
            store._db.execute(statement)
        return store

    @property
    def is_held(self) -> bool:
        """Whether this process has the store open."""
        return self._is_open and self._process == os.getpid()

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """Write the whole block to disk before returning, or none of it; within another block, when that one ends."""
        with self._threads:
            if not self._db.in_transaction:
                self._last = None  # another process may have written
            with self._part() if self._db.in_transaction else super().transaction():
                yield

    @contextlib.contextmanager
    def _part(self) -> Generator[None]:
        """Write the block with the transaction that it is a part of; none of it if it fails."""
        self._db.execute("SAVEPOINT part")
        try:
            yield
        except BaseException:
            self._last = None
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK TO part")
                self._db.execute("RELEASE part")
            raise
        self._db.execute("RELEASE part")

    def chain(self, path: Path, first: Draft) -> "StoredChain":
        """Return the chain of the ledger with this path, which begins with the entry `first` if it is new."""
        with refusing_ledger(self.path, "is not a store or is damaged"):
            if not self.holds(path.stem):
                with self.transaction():
                    if not self.holds(path.stem):  # no other process has begun it meanwhile
                        self.append(path.stem, [first], START)
        return StoredChain(self, path)

    def append(self, ledger: str, drafts: Iterable[Draft], before: Head) -> list[Entry]:
        """Write entries of a ledger, and return them; within a `transaction`.

        Args:
          ledger: name of the ledger.
          drafts: the entries.
          before: head that they follow.
        """
        number, text = self._last or self.head()
        link, entries = bytes.fromhex(text), entries_after(drafts, before)
        for entry in entries:
            digest = bytes.fromhex(entry.hash)
            number, link = number + 1, _link(link, digest)
            row = (number, ledger, entry.seq, entry.kind, entry.key, entry.payload, digest, link)
            self._db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        self._last = Head(number, link.hex())
        return entries

    def after(self, ledger: str, head: Head) -> Iterator[tuple[object, ...]]:
        """Yield a ledger's head, unless it is `START`, and the entries after it as rows, which are not checked; see `chained`."""
        query = "SELECT seq, kind, key, payload, hash FROM entries WHERE ledger = ? AND seq >= ? ORDER BY seq"
        before = START.hash
        for *fields, digest in self._db.execute(query, (ledger, head.seq)):
            yield *fields, before, (before := digest.hex())

    def last(self, ledger: str) -> Head:
        """Return the head of a ledger, `START` without entries; no hash is checked, which `StoredChain.after` does."""
        query = "SELECT seq, hash FROM entries WHERE ledger = ? ORDER BY seq DESC LIMIT 1"
        for seq, digest in self._db.execute(query, (ledger,)):
            return Head(seq, digest.hex())
        return START

    def hash_at(self, ledger: str, seq: int) -> str:
        """Return the hash of an entry of a ledger; empty if there is none."""
        query = "SELECT hash FROM entries WHERE ledger = ? AND seq = ?"
        with refusing_ledger(self.path, "cannot be read as a store"):
            return "".join(digest.hex() for (digest,) in self._db.execute(query, (ledger, seq)))

    def holds(self, ledger: str) -> bool:
        """Return whether the store has a ledger with this name."""
        return self.hash_at(ledger, 1) != ""

    def names(self) -> list[str]:
        """Return the names of all ledgers, without their suffix, in order."""
        with refusing_ledger(self.path, "cannot be read as a store"):
            return [
                name for (name,) in self._db.execute("SELECT DISTINCT ledger FROM entries ORDER BY ledger")
            ]

    def heads(self) -> dict[str, Head]:
        """Return the head of each ledger by its file's name; no hash is checked, which `StoredChain.after` does."""
        query = "SELECT ledger, max(seq), hash FROM entries GROUP BY ledger ORDER BY ledger"
        with refusing_ledger(self.path, "cannot be read as a store"):
            return {
                f"{name}{SUFFIX}": Head(seq, digest.hex()) for name, seq, digest in self._db.execute(query)
            }

    def head(self) -> Head:
        """Return number and link of the last entry of all; no link is checked, which `require` does."""
        with refusing_ledger(self.path, "cannot be read as a store"):
            for number, link in self._db.execute("SELECT row, link FROM entries ORDER BY row DESC LIMIT 1"):
                return Head(number, link.hex())
        return START

    def require(self, head: Head) -> None:
        """Refuse a store that lacks a known head, or an entry before it."""
        number, link = 0, bytes.fromhex(START.hash)
        with refusing_ledger(self.path, "cannot be read as a store"):
            query = "SELECT hash FROM entries WHERE row <= ? ORDER BY row"
            for (digest,) in self._db.execute(query, (head.seq,)):
                number, link = number + 1, _link(link, digest)
        if head != (number, link.hex()):
            remedy = f"does not hold the known entry {head.seq}: cut short, rolled back or another store"
            raise Refusal("ledger", str(self.path), f"{remedy}; restore a true copy")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._is_open = False
        super().close()


class StoredChain:
    """Entries of one ledger in a store, which are checked as they are read; methods as of `EntryChain`."""

    def __init__(self, store: Store, path: Path) -> None:
        self.path, self._name = path, path.stem
        self._store = store

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        return self._store.transaction()

    def append(self, drafts: Iterable[Draft], before: Head) -> list[Entry]:
        return self._store.append(self._name, drafts, before)

    def after(self, head: Head) -> Iterator[Entry]:
        with refusing_ledger(self.path, f"cannot be read after entry {head.seq}"):
            if self._store.last(self._name) == head:  # which takes less time than to read the entry
                return
            rows = self._store.after(self._name, head)
            if head != START:
                self._require(head, [(row[0], row[-1]) for row in islice(rows, 1)])
            yield from chained(rows, head, str(self.path))

    def require(self, head: Head) -> None:
        if head != START:
            self._require(head, [(head.seq, self._store.hash_at(self._name, head.seq))])

    def _require(self, head: Head, entries: list[tuple[object, object]]) -> None:
        """Refuse a chain if the entry in it is not the head; `entries` has its number and hash, or is empty."""
        if entries != [head]:
            remedy = f"does not hold the known entry {head.seq}: cut short, rolled back or another ledger"
            raise Refusal("ledger", str(self.path), f"{remedy}; restore a true copy")


def _link(before: bytes, digest: bytes) -> bytes:
    """Return the link of an entry with this hash that follows another link."""
    return hashlib.sha256(before + digest).digest()


@contextlib.contextmanager
def store_in(folder: Path) -> Generator[Store]:
    """Open the store of a folder for reading; an empty one in memory if the folder has none."""
    path = folder / FILE
    opened = Store.for_reading(path) if regular(path) else Store.in_memory(path)
    with contextlib.closing(opened) as store:
        yield store


@contextlib.contextmanager
def reading(path: Path) -> Generator[EntryChain]:
    """Open a ledger for reading: a file of its own, or one in the store of its folder.

    Raises:
      Refusal: there is none, or it is not a ledger.
    """
    if not path.exists():
        with store_in(path.parent) as store:
            if store.holds(path.stem):
                yield StoredChain(store, path)
                return
    with contextlib.closing(Chain.for_reading(path)) as chain:
        yield chain


def chains_of(paths: Iterable[Path]) -> Iterator[EntryChain]:
    """Yield those of many ledgers that exist, each open for reading until the next; a folder's store is opened once.

    Args:
      paths: of the ledgers, those of a folder in turn.
    """
    for folder, group in groupby(paths, key=lambda path: path.parent):
        with store_in(folder) as store:
            for path in group:
                if path.exists():
                    with contextlib.closing(Chain.for_reading(path)) as chain:
                        yield chain
                elif store.holds(path.stem):
                    yield StoredChain(store, path)


def ledger_exists(path: Path) -> bool:
    """Return whether there is a ledger at a path: a file of its own, or one in the store of its folder."""
    if path.exists():
        return True
    with store_in(path.parent) as store:
        return store.holds(path.stem)


def ledgers_in(folder: Path) -> list[Path]:
    """Return the paths of all ledgers in a folder, in order: files of their own, and those of its store."""
    with store_in(folder) as store:
        names = store.names()
    return sorted({*folder.glob(f"*{SUFFIX}"), *(folder / f"{name}{SUFFIX}" for name in names)})
