"""Hash chain of entries in one SQLite file with one writer: the half of the ledger that knows no privacy.

Each entry's SHA-256 covers the hash before it, so an edit, a cut in the middle, a duplicate or a swap breaks
the chain. A cut at the end leaves a shorter chain that is whole; only a head kept elsewhere shows it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import sqlite3
import stat
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from ...base.durable_files import sync_folder
from ...base.refusal import Refusal, unreadable

BUSY_SECONDS = 30.0  # that SQLite waits for another connection to the file
LOCK_POLL_SECONDS = 0.02
# A holder locks first and writes its pid after. A lock without a pid is waited for this long: its holder just came.
ARRIVAL_SECONDS = 1.0

COLUMNS = "seq, kind, key, payload, prev_hash, hash"
TABLE = """
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, key TEXT NOT NULL, payload TEXT NOT NULL,
    prev_hash TEXT NOT NULL, hash TEXT NOT NULL, UNIQUE (kind, key)
) STRICT""".strip()
GUARD = """
CREATE TRIGGER no_{event} BEFORE {event} ON entries
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""".strip()
GUARDS = tuple(GUARD.format(event=event) for event in ("UPDATE", "DELETE"))
SCHEMA = (TABLE, *GUARDS)
STATUS_SECONDS = 2.0  # wait of `exclusive_lock`, because `lock_holder` takes the lock for a moment


class LedgerUnavailable(Refusal):
    """Refusal because the ledger could not be written (disk full, I/O error): nothing may be released on it."""


class Head(NamedTuple):
    """Number and hash of one entry; stored outside the ledger it proves that no earlier entry is missing."""

    seq: int
    hash: str


START = Head(0, "0" * 64)


@dataclass(frozen=True)
class Draft:
    """Entry before it is numbered: its kind, key and JSON payload."""

    kind: str
    key: str
    payload: str


class Entry(NamedTuple):
    """Line of the ledger: `seq` counts from 1, `payload` is JSON, `hash` covers everything before it."""

    seq: int
    kind: str
    key: str
    payload: str
    prev_hash: str
    hash: str

    @property
    def head(self) -> Head:
        """Number and hash of the entry."""
        return Head(self.seq, self.hash)


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def canonical(value: object) -> str:
    """Return the one JSON text of a value: keys sorted, no spaces, ASCII.

    Raises:
      ValueError: NaN or infinity.
    """
    return _encode(value)


def linked(draft: Draft, before: Head) -> Entry:
    """Return a draft as the entry that follows a head."""
    entry = Entry(before.seq + 1, draft.kind, draft.key, draft.payload, before.hash, hash="")
    return entry._replace(hash=_digest(entry))


def entries_after(drafts: Iterable[Draft], before: Head) -> list[Entry]:
    """Return drafts as the entries that follow a head."""
    entries = list[Entry]()
    for draft in drafts:
        entries.append(linked(draft, before))
        before = entries[-1].head
    return entries


def _digest(entry: Entry) -> str:
    """Return the SHA-256 of all fields before the hash, as JSON: that of `canonical`, in a third of the time."""
    texts = ",".join(map(encode_basestring_ascii, entry[1:-1]))
    return hashlib.sha256(f"[{entry.seq},{texts}]".encode()).hexdigest()


def chained(rows: Iterable[Any], head: Head, source: str) -> Iterator[Entry]:
    """Yield rows as the entries that follow a head, each checked against the one before.

    Args:
      rows: (seq, kind, key, payload, prev_hash, hash) each.
      head: head that the first row must follow.
      source: file or name of the rows, for a refusal.

    Raises:
      Refusal: a row is not the entry that follows.
    """
    seq, last = head
    for entry in map(Entry._make, rows):
        seq += 1
        if entry.seq != seq or entry.prev_hash != last or not _holds(entry):
            remedy = f"entry {seq} was changed, removed or moved; restore a true copy"
            raise Refusal("ledger", source, remedy)
        yield entry
        last = entry.hash


def _holds(entry: Entry) -> bool:
    """Return whether an entry's hash is that of its other fields."""
    try:
        return entry.hash == _digest(entry)
    except TypeError:  # a damaged file may hold something other than text
        return False


@contextlib.contextmanager
def refusing_ledger(path: Path, what: str) -> Generator[None]:
    """Turn an error of the operating system or of SQLite about a file into a Refusal.

    Raises:
      Refusal: instead of OSError and sqlite3.Error.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        remedy = unreadable(error, "restore the file or its permissions", what)
        raise Refusal("ledger", str(path), remedy) from error


class Lock:
    """Exclusive flock on `<path>.lock`, which holds the pid of the process that has it.

    The file stays when the lock goes: removing it would let two processes lock two files of one name.
    """

    def __init__(self, path: Path, wait: float) -> None:
        """Take the lock.

        Args:
          path: path of the locked file.
          wait: seconds to wait for another holder.

        Raises:
          Refusal: another process holds it, or it cannot be written.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with refusing_ledger(path, "cannot be locked"):
            self._fd = os.open(_sibling(path, ".lock"), flags, 0o600)
            try:
                self._take(path, wait)
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, str(os.getpid()).encode(), 0)
            except BaseException:
                os.close(self._fd)
                raise
        self.is_held = True
        _locks.add(self)

    def _take(self, path: Path, wait: float) -> None:
        """Wait for the lock; refuse, and name the holder, once the time is over. Arguments as of the class."""
        deadline = time.monotonic() + wait
        while True:
            try:
                return fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._fd, 20, 0).decode("ascii", "replace")
            if time.monotonic() >= deadline + (0.0 if holder else ARRIVAL_SECONDS):
                remedy = f"in use by process {holder or '(unknown)'}; wait for it to end, or stop it"
                raise Refusal("ledger", str(path), remedy)
            time.sleep(LOCK_POLL_SECONDS)

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self.is_held:
            with contextlib.suppress(OSError):  # a stale pid does no harm
                os.ftruncate(self._fd, 0)
            self.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.release()

    def forget(self) -> None:
        """Close this process's descriptor, as a forked child does: that ends no lock which the parent holds."""
        self.is_held = False
        _locks.discard(self)
        os.close(self._fd)


_locks: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_locks):
        lock.forget()


# A forked worker that outlives its killed parent would otherwise keep the ledger locked in a dead process's name.
os.register_at_fork(after_in_child=_forget_all)


def holds_entries(path: Path) -> bool:
    """Return whether there is a chain at a path, and check that one can be written there; an empty file holds none.

    Raises:
      Refusal: file or lock is not a regular file that this user may read and write, or the folder is not writable.
    """
    size = _size(path)
    _size(_sibling(path, ".lock"))
    if not _writable(path.parent, os.W_OK | os.X_OK):
        raise Refusal("ledger", str(path), "its folder is missing or not writable; create the folder")
    return size > 0


def _size(name: Path) -> int:
    """Return the size in bytes of a writable file; 0 if there is none."""
    status = regular(name)
    if status is None:
        return 0
    # Root could write a read-only file; the ledger respects the mode.
    if not status.st_mode & stat.S_IWUSR or not _writable(name, os.R_OK | os.W_OK):
        raise Refusal("ledger", str(name), "cannot be read and written; mend its permissions")
    return status.st_size


def _writable(name: Path, access: int) -> bool:
    """Return whether this user has an access of `os.access`; refuse a disk that is mounted read-only."""
    if os.access(name, access):
        return True
    with (
        refusing_ledger(name, "cannot be written"),
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
    ):
        if os.statvfs(name).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))
    return False


def regular(name: Path) -> os.stat_result | None:
    """Return the status of a regular file; None if there is no file.

    Raises:
      Refusal: it is not a regular file.
    """
    with refusing_ledger(name, "cannot be reached"):
        try:
            status = os.lstat(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
    if not stat.S_ISREG(status.st_mode):
        raise Refusal("ledger", str(name), "not a regular file; give the path of the ledger itself")
    return status


@contextlib.contextmanager
def exclusive_lock(path: Path, field: str) -> Generator[None]:
    """Hold a lock for the block, such as that of a folder in which one server or one agent may run.

    Args:
      path: path of the locked file.
      field: name of the process in a refusal.

    Raises:
      Refusal: another process holds it.
    """
    try:
        lock = Lock(path, STATUS_SECONDS)
    except Refusal as refusal:
        raise Refusal(field, str(path.parent), refusal.remedy) from refusal
    with lock:
        yield


def lock_holder(path: Path) -> int | None:
    """Return the id of the process that holds the lock of the file at `path`; None if nobody does. It tries the lock."""
    file = _sibling(path, ".lock")
    if not file.exists():
        return None
    try:
        Lock(path, 0.0).release()
        return None
    except Refusal:
        text = file.read_text()
        return int(text) if text.isdigit() else None


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


class EntryChain(Protocol):
    """Entries of one ledger: of a file of its own (`Chain`), or in a store of many (`store.StoredChain`)."""

    @property
    def path(self) -> Path:
        """Path of the ledger."""
        ...

    def transaction(self) -> AbstractContextManager[None]:
        """Return the context in which drafts are appended: all of them are written, or none."""
        ...

    def append(self, drafts: Iterable[Draft], before: Head) -> list[Entry]:
        """Write drafts as the entries that follow a head, and return these; within a `transaction`."""
        ...

    def after(self, head: Head) -> Iterator[Entry]:
        """Yield the entries after a head, each checked against the one before; refuse a chain without that head."""
        ...

    def require(self, head: Head) -> None:
        """Refuse a chain that does not contain a head."""
        ...


class EntryFile:
    """SQLite file to which entries can only be added; `mode` is the query of SQLite's file URI.

    Attributes:
      path: of the file.
      schema: statements of its table and of the guards, without which a file is refused.
    """

    schema: ClassVar[tuple[str, ...]]

    def __init__(self, path: Path, mode: str) -> None:
        self.path = path
        # Device and inode of the file and of its write-ahead log; empty until it is prepared for writing.
        self._file, self._file_ids = path.absolute(), list[tuple[int, int] | None]()
        address = f"{self._file.as_uri()}?{mode}"
        with refusing_ledger(path, "cannot be opened"):
            # The ledger serialises its own threads.
            self._db = sqlite3.connect(
                address, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True
            )

    @classmethod
    def create_or_open(cls, path: Path, begin: Callable[[Self], object], *, durable: bool) -> Self:
        """Open a file for writing, or create one.

        Args:
          path: path of the file.
          begin: writes the first entries of a new file.
          durable: whether a transaction survives a power cut, not just the end of the process.

        Raises:
          Refusal: not a ledger, damaged, or cannot be written.
        """
        has_entries = holds_entries(path)
        journal = max(_size(_sibling(path, suffix)) for suffix in ("-wal", "-shm"))
        if journal and not has_entries:
            raise Refusal("ledger", str(path), "gone, yet its -wal file is there; restore the ledger")
        with refusing_ledger(path, "cannot be created"):
            if not path.exists():
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            os.chmod(path, 0o600)
        opened = cls(path, "mode=rw")
        try:
            with refusing_ledger(path, "is not a ledger or is damaged"):
                opened._prepare(begin, durable)
        except BaseException:
            opened.close()
            raise
        return opened

    @classmethod
    def for_reading(cls, path: Path) -> Self:
        """Open a file without a lock, and without creating files unless a process is writing to it.

        Raises:
          Refusal: there is none, or it is not a ledger.
        """
        if regular(path) is None:
            raise Refusal("ledger", str(path), "does not exist; give the path of a ledger")
        # Without a write-ahead log nobody has the file open, and SQLite may read it without a lock or a file of its own.
        opened = cls(path, "mode=ro" if _sibling(path, "-wal").exists() else "immutable=1")
        try:
            with refusing_ledger(path, "cannot be read as a ledger"):
                opened._require_schema()
        except BaseException:
            opened.close()
            raise
        return opened

    def _prepare(self, begin: Callable[[Self], object], durable: bool) -> None:
        """Set up the database for writing; arguments as of `create_or_open`."""
        self._db.execute("PRAGMA trusted_schema=OFF")
        self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        self._db.execute("PRAGMA journal_mode=WAL")
        with self.transaction():
            if not self._schema():
                for statement in self.schema:
                    self._db.execute(statement)
                begin(self)
        self._require_schema()
        if durable:
            sync_folder(self.path.parent)
        self._file_ids = self._current_file_ids()

    def _schema(self) -> set[str]:
        rows = self._db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")
        return {sql for (sql,) in rows}

    def _require_schema(self) -> None:
        if self._schema() != set(self.schema):
            raise Refusal("ledger", str(self.path), "its tables or guards were changed; restore a true copy")

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """Write the whole block to disk before returning, or none of it.

        Raises:
          LedgerUnavailable: another file, or none, is at the path now.
        """
        self._require_same_files()
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
            self._require_same_files()
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def _current_file_ids(self) -> list[tuple[int, int] | None]:
        """Return device and inode of the file and of its write-ahead log, None for a missing one."""
        files = map(regular, (self._file, _sibling(self._file, "-wal")))
        return [None if status is None else (status.st_dev, status.st_ino) for status in files]

    def _require_same_files(self) -> None:
        """Refuse to write into a file that was moved, replaced or removed since it was opened."""
        if self._file_ids and self._file_ids != self._current_file_ids():
            remedy = "was moved or replaced while it was open; put the file back that was there, then go on"
            raise LedgerUnavailable("ledger", str(self.path), remedy)

    def close(self) -> None:
        """Close the file."""
        self._db.close()


class Chain(EntryFile):
    """Entries of one ledger in a file of its own, which are checked as they are read."""

    schema = SCHEMA

    @classmethod
    def for_writing(cls, path: Path, first: Draft, *, durable: bool) -> Self:
        """Open a chain, or start one with the entry `first`; the caller holds the lock. Otherwise as `create_or_open`."""
        return cls.create_or_open(path, lambda chain: chain.append([first], START), durable=durable)

    def append(self, drafts: Iterable[Draft], before: Head) -> list[Entry]:
        """Write drafts as the entries that follow a head, and return these; within a `transaction`."""
        entries = entries_after(drafts, before)
        self._db.executemany(f"INSERT INTO entries ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", entries)
        return entries

    def after(self, head: Head) -> Iterator[Entry]:
        """Yield the entries after a head, each checked against the one before.

        Raises:
          Refusal: the head is not in the chain, or an entry fails the check.
        """
        with refusing_ledger(self.path, f"cannot be read after entry {head.seq}"):
            self.require(head)
            query = f"SELECT {COLUMNS} FROM entries WHERE seq > ? ORDER BY seq"
            yield from chained(self._db.execute(query, (head.seq,)), head, str(self.path))

    def last(self) -> Head:
        """Return the head as it is in the file; no hash is checked, which `after` does."""
        with refusing_ledger(self.path, "cannot be read as a ledger"):
            row = self._db.execute("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        return START if row is None else Head(*row)

    def holds(self, head: Head) -> bool:
        """Return whether a head is in the chain; `START` is in every chain."""
        with refusing_ledger(self.path, "cannot be read as a ledger"):
            row = self._db.execute("SELECT hash FROM entries WHERE seq = ?", (head.seq,)).fetchone()
        return head == START or row == (head.hash,)

    def require(self, head: Head) -> None:
        """Refuse a chain that does not contain a head."""
        if not self.holds(head):
            remedy = f"does not hold the known entry {head.seq}: cut short, rolled back or another ledger"
            raise Refusal("ledger", str(self.path), f"{remedy}; restore a true copy")


def require_heads(folder: Path, heads: Mapping[str, Head]) -> None:
    """Refuse ledgers if one lacks its known head: it is missing, truncated, rolled back or another one.

    Args:
      folder: folder of the ledgers.
      heads: known heads, by the ledgers' file names.
    """
    for name, head in heads.items():
        path = folder / name
        if regular(path) is None:
            raise Refusal("ledger", str(path), f"missing, though entry {head.seq} of it is known; restore it")
        with contextlib.closing(Chain.for_reading(path)) as chain:
            chain.require(head)


def heads_of(paths: Iterable[Path]) -> dict[str, Head]:
    """Return the heads of ledgers by their file names, read without their locks."""
    heads: dict[str, Head] = {}
    for path in paths:
        with contextlib.closing(Chain.for_reading(path)) as chain:
            heads[path.name] = chain.last()
    return heads


def holds_head(path: Path, head: Head) -> bool:
    """Return whether a ledger, read without its lock, holds an entry.

    Args:
      path: path of the ledger.
      head: number and hash of the entry.
    """
    with contextlib.closing(Chain.for_reading(path)) as chain:
        return chain.holds(head)
