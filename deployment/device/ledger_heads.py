"""Heads of a device's ledgers after its last answer: a ledger that lacks one was deleted, or restored from an older copy.

Each receipt holds heads as well. A device of an earlier release has none, and its first answer leaves them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...base.bounded_decoding import build, plain_of, read_json
from ...base.durable_files import replace_file
from ...base.refusal import Refusal, disk_failed, refusing, unreadable
from ...messages.message_codec import RUN_LABEL_LENGTH
from ...privacy.ledger.hash_chain import Head, heads_of, require_heads
from ...privacy.ledger.ledger_state import RESERVE, read_entries
from ...privacy.ledger.receipt import read_opening

FILE = "heads.json"
LEDGERS, RECEIPTS = "ledgers", "receipts"  # folders of a device's state
REMEDY = "; if its newest copy is lost: fedveil client forget FOLDER --restored, which charges what it may have missed"


@dataclass(frozen=True)
class StoredHeads:
    """Content of the file of heads.

    Attributes:
      heads: of the ledgers, by their files' names.
      settled: manifests of receipts from before a restore, whose heads the ledgers need not hold.
    """

    heads: Mapping[str, Head] = field(default_factory=dict[str, Head])
    settled: tuple[str, ...] = ()


class LedgerHeads:
    """Heads that a device's ledgers must hold: those after its last answer, and those in receipts.

    Args:
      state: the device's state folder.

    Raises:
      Refusal: the file cannot be read, or the disk or the system fails.
    """

    def __init__(self, state: Path) -> None:
        self._path, self._folder = state / FILE, state / LEDGERS
        stored = _read(self._path)
        self._heads, self._settled = dict(stored.heads), stored.settled
        with refusing("file", state / RECEIPTS, "cannot be read"):
            receipts = sorted((state / RECEIPTS).glob("*.json"))
        for path in receipts:
            if path.stem not in self._settled:
                for name, head in _heads_of_receipt(path).items():
                    self._heads[name] = max(head, self._heads.get(name, head))

    def require(self) -> None:
        """Require that the ledgers hold the heads.

        Raises:
          Refusal: naming the ledger that does not, and the remedy; or one cannot be read.
        """
        try:
            require_heads(self._folder, self._heads)
        except Refusal as refusal:
            if disk_failed(refusal):  # the ledger is whole, and its owner owes nothing
                raise
            raise Refusal(refusal.field, refusal.value, refusal.remedy + REMEDY) from None

    def keep(self) -> None:
        """Store the ledgers' present heads, if they have changed.

        Raises:
          OSError: they cannot be written.
          Refusal: as `require`, or a ledger cannot be read.
        """
        self.require()  # or the heads of a replaced ledger would be stored
        heads = {**self._heads, **heads_of(sorted(self._folder.glob("*.ledger")))}
        if heads != self._heads or not self._path.exists():
            _write(self._path, StoredHeads(heads, self._settled))
            self._heads = heads


def is_charged(state: Path, name: str) -> bool:
    """Return whether a device's ledgers hold a charge in the round of an instruction, which its journal may have lost.

    Args:
      state: folder of the device's state.
      name: the instruction's id, as `question_id` makes it.

    Raises:
      Refusal: a ledger cannot be read.
    """
    run, number, *_ = [*name.rsplit("/", 5), ""]
    ledgers = sorted((state / LEDGERS).glob("*.ledger"))
    keys = (json.loads(each.key) for path in ledgers for each in read_entries(path) if each.kind == RESERVE)
    # A key begins with the run and the round, an id with the beginning of the run's name and the round.
    return any((str(key[0])[:RUN_LABEL_LENGTH], str(key[1])) == (run, number) for key in keys)


def store_heads(state: Path) -> None:
    """Store the ledgers' present heads in the place of earlier ones, and settle all receipts so far.

    Raises:
      OSError: they cannot be written.
      Refusal: a ledger cannot be read.
    """
    settled = tuple(sorted(path.stem for path in (state / RECEIPTS).glob("*.json")))
    _write(state / FILE, StoredHeads(heads_of(sorted((state / LEDGERS).glob("*.ledger"))), settled))


def _heads_of_receipt(path: Path) -> Mapping[str, Head]:
    try:
        return read_opening(path).heads
    except Refusal as refusal:
        if disk_failed(refusal):
            raise
        return {}  # a damaged receipt demands nothing


def _write(path: Path, stored: StoredHeads) -> None:
    replace_file(path, (json.dumps(plain_of(stored)) + "\n").encode())


def _read(path: Path) -> StoredHeads:
    if not path.exists():
        return StoredHeads()
    try:
        return build(StoredHeads, read_json(path.read_bytes()), whole=True)
    except (OSError, ValueError) as problem:
        raise Refusal("file", str(path), unreadable(problem, f"restore it{REMEDY}")) from problem
