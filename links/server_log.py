"""Transparency log of a server: each roster, round's model, final model and manifest that it sent, in order.

An entry is one line of canonical JSON, made only of values that a device sees itself, so that each device can look up
the entries of its own messages. Entries are the leaves of a Merkle tree.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..base.bounded_decoding import Undecodable, read_json
from ..base.durable_files import PUBLIC, sync_folder, write_at
from ..messages.training_order import NEW, display_name
from ..privacy.ledger.hash_chain import canonical
from ..privacy.merkle import Frontier, leaf_hash
from ..privacy.secagg.roster import Roster

LOG = "log.jsonl"  # in the server's bundle
QUERY_SUFFIXES = (" evaluation", " scaling")  # of a run's name, in the names of its queries


def roster_entry(roster: Roster) -> bytes:
    """Return the entry of a roster."""
    return canonical({"kind": "roster", "version": roster.version, "hash": roster.hash.hex()}).encode()


def model_entry(run: str, number: int, model: bytes) -> bytes:
    """Return the entry of a round's initial model.

    Args:
      run: name of the run.
      number: number of the round.
      model: hash of the model and of the values sent with it, from `messages.secure_wire.model_hash`.
    """
    return canonical({"kind": "model", "run": run, "round": number, "model": model.hex()}).encode()


def final_entry(run: str, model: bytes) -> bytes:
    """Return the entry of a run's final model; `model` is the hash that `model_hash` gives of the message at its end."""
    return canonical({"kind": "final", "run": run, "model": model.hex()}).encode()


def manifest_entry(run: str, manifest: str) -> bytes:
    """Return the entry that binds a run's files.

    Args:
      run: display name of the run.
      manifest: hash of its manifest, in hexadecimal.
    """
    return canonical({"kind": "manifest", "run": run, "hash": manifest}).encode()


def read_entries(path: Path) -> list[bytes]:
    """Return the entries in a file, none without a file; a truncated last line is skipped."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def fields_of(entry: str) -> dict[str, str]:
    """Return an entry's fields as text; none for an entry of unknown form."""
    try:
        fields = read_json(entry)
    except Undecodable:
        return {}
    return {name: str(each) for name, each in fields.items()} if isinstance(fields, dict) else {}


def contradicting_entries(entries: Iterable[str]) -> frozenset[int]:
    """Return the indices of entries that contradict an earlier one: a second model of a round or run, manifest or roster.

    Devices know only hashes of entries, so that a log with two histories looks to them like any other. A run gets a new
    name whenever its noise is drawn afresh, so an honest server never starts a round of one name from two models, and
    never returns to an earlier name of a run.
    """
    first = dict[tuple[str, ...], str]()  # value of the first entry with each key
    names = dict[str, list[str]]()  # by display name and suffix: the names of a run, in their order
    contradictions: set[int] = set()
    for index, entry in enumerate(entries):
        fields = fields_of(entry)
        if fields.get("kind") == "model" and NEW in (name := fields.get("run", "")):
            suffix = next((each for each in QUERY_SUFFIXES if name.endswith(each)), "")
            earlier = names.setdefault(display_name(name) + suffix, [])
            if name not in earlier:
                earlier.append(name)
            elif name != earlier[-1]:
                contradictions.add(index)
        match fields:
            case {"kind": "roster" as kind, "version": version, "hash": value}:
                key = (kind, version)
            case {"kind": "model" | "final" as kind, "run": run, "model": value, **rest}:
                key = (kind, run, rest.get("round", ""))
            case {"kind": "manifest" as kind, "run": run, "hash": value}:
                key = (kind, run)
            case _:
                continue
        if first.setdefault(key, value) != value:
            contradictions.add(index)
    return frozenset(contradictions)


class ServerLog:
    """Log in an append-only file, with an entry on disk before it is sent to a device; `leaves` are the entries' hashes.

    Args:
      path: of the file; created if missing.

    Raises:
      OSError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.leaves: list[bytes] = []
        self._frontier, self._indices = Frontier(), dict[bytes, int]()  # by entry, of its first place
        self._path, self._size = path, 0  # of its whole entries, in bytes
        for entry in read_entries(path):
            self._note(entry)

    @property
    def root(self) -> bytes:
        """Root of the tree, 32 bytes."""
        return self._frontier.root

    def index_of(self, entry: bytes) -> int:
        """Return the index of an entry, from 0; append one that is new, and wait until it is on disk.

        Raises:
          OSError: it cannot be written.
        """
        if entry not in self._indices:
            write_at(self._path, self._size, entry + b"\n", PUBLIC)
            sync_folder(self._path.parent)
            self._note(entry)
        return self._indices[entry]

    def _note(self, entry: bytes) -> None:
        """Add an entry that is on disk."""
        leaf = leaf_hash(entry)
        self._size += len(entry) + 1
        self._indices.setdefault(entry, len(self.leaves))
        self.leaves.append(leaf)
        self._frontier.add([leaf])
