"""Data sets by the names that their owners declare: their ledgers, and the charges that follow changed data.

A ledger of real data belongs to people. It is named by the data set's declared name, `data_id`, and, at the record
level, by the client. So a new order, split or preprocessing continues the same ledgers. Fingerprints of the clients'
data only detect a change. After a change a person may be at another client, so each client's ledger is raised to the
maximum over the ledgers of all of them, separately for each kind of release. A file that cannot be read or written is
refused.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...base.bounded_decoding import read_json
from ...base.durable_files import replace_file
from ...base.refusal import Refusal, refusing, unreadable
from ..arms import charged
from ..budget import UNLIMITED_EPSILON, Adversary, Budget, Release, Unit
from .caps import FINGERPRINT, NAME_LENGTH, POPULATION, RECORDS, WAIT_SECONDS, caps_on, ledger_file
from .client_sums import RecordsBudget, as_records, charge_records, pending_drafts
from .hash_chain import START, Head, Lock, heads_of, require_heads
from .ledger import BudgetExhausted, Ledger
from .ledger_state import (
    LedgerState,
    ReleaseState,
    event_of,
    identity_of,
    read_ledger,
    repeated,
    require_unit,
    state_at,
)
from .question_caps import EARLIER, spent_by_questions

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

FILE = "data_sets.json"
MECHANISM = "earlier data"  # begins the mechanism of charges that follow changed data or an adopted ledger
Charges = dict[
    Adversary, "Counter[str]"
]  # how often each event, as canonical JSON, is charged against each adversary


@dataclass(frozen=True)
class DataSet:
    """Entry of one data set in a folder of ledgers.

    Attributes:
      fingerprints: fingerprints of the clients' data in the last run that protected records, in the clients' order.
      adopted: names of earlier ledgers of the same people that are still to be charged here.
      records: the mode that charges the records, because another mode would keep a second budget; empty before a first
        charge.
      heads: heads of its ledgers after the last run or question, by the ledgers' file names.
    """

    fingerprints: tuple[str, ...] = ()
    adopted: tuple[str, ...] = ()
    records: str = ""
    heads: Mapping[str, Head] = field(default_factory=dict[str, Head])


def population_ledger(data_id: str) -> str:
    """Return the name of the ledger of all clients of a data set together, 64 hexadecimal digits."""
    return hashlib.sha256(f"data set {data_id}".encode()).hexdigest()


def client_ledgers(data_id: str, fingerprints: Sequence[str]) -> list[str]:
    """Return the name of each client's ledger, 64 hexadecimal digits; clients with equal data share one, and its budget.

    Arguments as of `pending_for_clients`.
    """
    firsts = {fingerprint: client for client, fingerprint in reversed(list(enumerate(fingerprints)))}
    names = (f"data set {data_id}, client {firsts[fingerprint]}" for fingerprint in fingerprints)
    return [hashlib.sha256(name.encode()).hexdigest() for name in names]


def read_data_sets(folder: Path) -> dict[str, DataSet]:
    """Return the data sets of a folder, by their names; none if the folder has no such file. Refuse an unreadable one."""
    path = folder / FILE
    try:
        document = read_json(path.read_bytes())
        return {
            name: DataSet(
                tuple(each["fingerprints"]),
                tuple(each["adopted"]),
                str(each.get("records", "")),
                {file: Head(int(seq), str(text)) for file, (seq, text) in each.get("heads", {}).items()},
            )
            for name, each in document.items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        remedy = unreadable(error, "restore it, for it says which ledgers belong together")
        raise Refusal("ledger", str(path), remedy) from error


def data_set(folder: Path, data_id: str) -> DataSet:
    """Return a folder's entry of one data set; an empty one if it has none."""
    return read_data_sets(folder).get(data_id, DataSet())


def _change(folder: Path, data_id: str, change: Callable[[DataSet], DataSet]) -> None:
    """Replace a folder's entry of one data set by what `change` returns for it, under a lock."""
    with Lock(folder / FILE, WAIT_SECONDS):
        sets = read_data_sets(folder)
        sets[data_id] = change(sets.get(data_id, DataSet()))
        text = json.dumps({name: asdict(each) for name, each in sets.items()}, indent=1) + "\n"
        with refusing("ledger", folder / FILE, "cannot be written"):
            replace_file(folder / FILE, text.encode())


@contextmanager
def exclusive_access(folder: Path, data_id: str) -> Generator[None]:
    """Lock a data set's ledgers for the block: require the stored heads before it, and store the new ones after it.

    Arguments as of `pending_for_clients`; the folder must exist.

    Raises:
      Refusal: another process holds the lock, or a ledger is missing, cut short, rolled back or another one.
    """
    with Lock(folder / population_ledger(data_id)[:NAME_LENGTH], wait=0):
        require_heads(folder, data_set(folder, data_id).heads)
        try:
            yield
        finally:
            with suppress(Refusal):  # of a full disk, or a replaced ledger: the stored heads stay
                before = data_set(folder, data_id).heads
                require_heads(folder, before)
                paths = (population_path(folder, data_id), *record_paths(folder, data_id))
                heads = {**before, **heads_of(path for path in paths if path.exists())}
                if heads != before:
                    _change(folder, data_id, lambda now: replace(now, heads=heads))


def keep_head(ledger: Ledger, data_id: str) -> None:
    """Store the head of a data set's ledger, closed or open, if it is newer; later runs then refuse an older copy."""
    folder, name, head = ledger.path.parent, ledger.path.name, ledger.head
    if head > data_set(folder, data_id).heads.get(name, START):
        _change(folder, data_id, lambda now: replace(now, heads={**now.heads, name: head}))


def claim_records(folder: Path, data_id: str, mode: str) -> None:
    """Store the mode that charges a data set's records, under a lock; refuse it if another mode charges them.

    Arguments as of `pending_for_clients`; the folder must exist.
    """

    def claimed(now: DataSet) -> DataSet:
        require_records(now, mode)
        return replace(now, records=mode)

    _change(folder, data_id, claimed)


def require_records(stored: DataSet, mode: str) -> None:
    """Refuse a mode that would spend a second budget of the same records."""
    for other in sorted(_charged_by(stored) - {mode}):
        remedy = f"these records are charged by privacy={other}, on ledgers that this mode does not charge"
        raise Refusal("privacy", mode, f"{remedy}; go on with that")


def _charged_by(stored: DataSet) -> set[str]:
    """Return the modes that charge the records: as stored or, of runs before modes were stored, by the ledgers' names."""
    modes = {stored.records} - {""}
    if stored.fingerprints and not stored.records:
        modes.add("record")
    for old in stored.adopted:
        if _has_fingerprint(old, ""):
            modes.add("record")
        elif _has_fingerprint(old, POPULATION + RECORDS):
            modes.add("record_distributed")
    return modes


def adopt(folder: Path, old: str, data_id: str) -> None:
    """Assign an older ledger to a data set; the next run charges its releases first.

    Args:
      folder: folder of the ledgers.
      old: name of the ledger's file, without its ending.
      data_id: name of the data set.

    Raises:
      Refusal: there is no such ledger, or it cannot be read.
    """
    path = folder / f"{old}.ledger"
    if not path.exists():
        raise Refusal("ledger", str(path), "there is none; name one as its file is called, without .ledger")
    read_ledger(path)
    stored = data_set(folder, data_id)
    if old not in stored.adopted:
        _change(folder, data_id, lambda now: replace(now, adopted=(*now.adopted, old)))


@dataclass(frozen=True)
class PendingCharges:
    """Charges that the ledgers of a data set lack, for `settle` to write before the next run.

    Attributes:
      charges: what each ledger lacks, by the ledger's name.
      changed: whether the clients' data are not those of the last run.
      after: the entry of the data set after the charges.
      questions: the part of the charges that is for questions, by the ledger's name: caps on questions count it.
      clients: ledger of all clients together, whose sums are charged to their records by `charge_client_sums`.
    """

    charges: Mapping[str, Charges]
    changed: bool
    after: DataSet
    questions: Mapping[str, Charges] = field(default_factory=dict[str, Charges])
    clients: Path = Path()

    def events(self, name: str, adversary: Adversary) -> list[DpEvent]:
        """Return the charges to the ledger of this name as events, without those for sums of whole clients."""
        counts = self.charges.get(name, {}).get(adversary, Counter[str]())
        return [repeated(event_of(text), count) for text, count in counts.items()]


def pending_for_clients(folder: Path, data_id: str, fingerprints: Sequence[str]) -> PendingCharges:
    """Return the charges that the clients' ledgers lack; nothing is written.

    Each is charged what adopted ledgers hold and, if the clients' data have changed, what it lacks of the maximum over all.

    Args:
      folder: folder of the ledgers.
      data_id: name of the data set.
      fingerprints: fingerprint of each client's data, in the clients' order.
    """
    stored, prints = data_set(folder, data_id), tuple(fingerprints)
    adopted = [each for each in stored.adopted if _has_fingerprint(each, "")]
    owed = _max_counts(folder, adopted, _spent)  # by every client
    changed = bool(stored.fingerprints) and stored.fingerprints != prints
    earlier = client_ledgers(data_id, stored.fingerprints)
    charges = dict.fromkeys((*client_ledgers(data_id, prints), *earlier), owed)
    if changed:  # each ledger is raised to the maximum over the earlier ones
        max_counts = _max_counts(folder, earlier, _spent_on_records)
        for name in charges:
            missing = _difference(max_counts, _spent_on_records(ledger_file(folder, name)))
            charges[name] = _sum(missing, owed)
    remaining = tuple(each for each in stored.adopted if each not in adopted)
    return PendingCharges(
        {name: each for name, each in charges.items() if any(each.values())},
        changed,
        replace(stored, fingerprints=prints, adopted=remaining),
        clients=population_path(folder, data_id),
    )


def pending_for_population(folder: Path, data_id: str, prefix: str = POPULATION) -> PendingCharges:
    """Return the charges that the ledger of all clients together lacks, those of adopted ledgers; nothing is written.

    Arguments as of `pending_for_clients`, with the prefix of the ledger's file.
    """
    stored = data_set(folder, data_id)
    adopted = [each for each in stored.adopted if _has_fingerprint(each, prefix)]
    total: Charges = {}
    questions: Charges = {}
    for each in adopted:
        path = folder / f"{each}.ledger"
        total = _sum(total, _spent(path))
        questions = _sum(questions, spent_by_questions(state_at(path)))
    remaining = tuple(each for each in stored.adopted if each not in adopted)
    name = population_ledger(data_id)
    charges = {name: total} if any(total.values()) else {}
    return PendingCharges(charges, False, replace(stored, adopted=remaining), {name: questions})


def settle(folder: Path, data_id: str, pending: PendingCharges, budget: Budget, prefix: str = "") -> None:
    """Charge pending releases durably, then store the data set's new entry; a crash in between charges nothing twice.

    Args:
      folder: folder of the ledgers; it must exist.
      data_id: name of the data set.
      pending: to be charged.
      budget: budget of the run that is about to begin; its unit, delta and adjacency are the ledgers'.
      prefix: prefix of the ledgers' files.

    Raises:
      Refusal: a ledger cannot be written, or its owner's cap is below the amount already spent.
    """
    sets = read_data_sets(folder)
    stored = sets.get(data_id, DataSet())
    for old in set(stored.adopted) - set(pending.after.adopted):
        path = folder / f"{old}.ledger"
        require_unit(path, identity_of(path).get("unit"), str(budget.unit))
    # What has left is charged, whatever a run may spend.
    unlimited = replace(budget, target_epsilon=UNLIMITED_EPSILON)
    for name, charges in pending.charges.items():
        path, questions = ledger_file(folder, name, prefix), pending.questions.get(name, {})
        _charge(path, name, _difference(charges, questions), unlimited, _run_of(stored), MECHANISM)
        _charge(path, name, questions, unlimited, _run_of(stored), EARLIER)  # which caps on questions count
    if pending.after != stored or data_id not in sets:
        _change(folder, data_id, lambda now: replace(pending.after, records=now.records, heads=now.heads))


def population_path(folder: Path, data_id: str) -> Path:
    """Return the ledger of all clients of a data set together, which need not exist."""
    return ledger_file(folder, population_ledger(data_id), POPULATION)


def together_path(folder: Path, data_id: str) -> Path:
    """Return the ledger of all records of a data set together, which need not exist."""
    return ledger_file(folder, population_ledger(data_id), f"{POPULATION}{RECORDS}")


def record_paths(folder: Path, data_id: str) -> list[Path]:
    """Return the existing ledgers of a data set's records: one of all of them, or one for each client."""
    names = client_ledgers(data_id, data_set(folder, data_id).fingerprints)
    paths = (together_path(folder, data_id), *(ledger_file(folder, name) for name in names))
    return [path for path in dict.fromkeys(paths) if path.exists()]


def charge_client_sums(path: Path, owner: str, clients: Path, budget: Budget) -> None:
    """Charge a ledger of records with the sums of whole clients that it lacks.

    Args:
      path: path of the ledger, which is created if there is something to charge.
      owner: owner of the ledger.
      clients: path of the ledger of all clients together, which need not exist.
      budget: budget of the records; its unit and adjacency are the ledger's.
    """
    if pending_drafts(state_at(clients), state_at(path), budget):
        with Ledger.open(path, budget, owner=owner, simulated=False, wait=WAIT_SECONDS) as ledger:
            charge_records(ledger, clients, budget)


def budgets_of_records(folder: Path, data_id: str, clients: LedgerState) -> tuple[RecordsBudget, ...]:
    """Return the budgets of records that sums of whole clients spend too, after earlier sums are charged to their ledgers.

    Arguments as of `pending_for_clients`, and the state of the ledger of all clients together.
    """
    budgets: dict[tuple[object, ...], RecordsBudget] = {}
    for path in record_paths(folder, data_id):
        budget = _granted(read_ledger(path))
        charge_client_sums(path, identity_of(path)["owner"], population_path(folder, data_id), budget)
        book = read_ledger(path)
        spent = json.dumps({adversary: sorted(counts.items()) for adversary, counts in book.spent.items()})
        # Equal budgets, with equal charges and caps, are checked once.
        budgets[budget, spent, str(caps_on(path))] = RecordsBudget(path, budget, book)
    if budgets:
        return tuple(budgets.values())
    path = together_path(folder, data_id)
    if not caps_on(path):
        return ()  # nothing limits the records yet; their first plan counts the sums of whole clients
    budget = Budget(Unit.RECORD, UNLIMITED_EPSILON, 0.5)
    return (RecordsBudget(path, budget, as_records(clients, LedgerState(), budget)),)


def _granted(book: LedgerState) -> Budget:
    """Return the budget of the last run that protected these records, not of carried-over charges; else no limit."""
    unit, adjacency = book.identity["unit"], book.identity["adjacency"]
    for key, booked in reversed(book.releases.items()):
        if booked.source is None and not json.loads(key)[2].startswith((MECHANISM, EARLIER)):
            return Budget(unit, adjacency=adjacency, **json.loads(booked.entry.payload)["budget"])
    delta = min((each.target_delta for each in book.granted.values()), default=0.5)
    return Budget(unit, UNLIMITED_EPSILON, delta, adjacency)


def _charge(path: Path, owner: str, charges: Charges, budget: Budget, run: str, mechanism: str) -> None:
    """Charge a ledger by one release for each kind of event; the mechanism of a release ends with the event's hash."""
    kinds = sorted({text for counts in charges.values() for text in counts})
    try:
        with Ledger.open(path, budget, owner=owner, simulated=False, wait=WAIT_SECONDS) as ledger:
            for text in kinds:
                events = {
                    adversary: repeated(event_of(text), counts[text])
                    for adversary, counts in charges.items()
                    if counts[text]
                }
                hashed = f"{mechanism} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
                release = Release(budget.unit, run, 1, hashed, events, "system")
                if ledger.state(release.key) is None:  # not charged before a crash
                    ledger.reserve(release)
                    ledger.commit(release.key)
    except BudgetExhausted as spent:
        remedy = "the cap on this ledger does not allow what the same people have spent already; raise it"
        raise Refusal("ledger", str(path), remedy) from spent


def _has_fingerprint(stem: str, prefix: str) -> bool:
    """Return whether a ledger's file name, without its ending, is a prefix and a fingerprint."""
    return stem.startswith(prefix) and FINGERPRINT.fullmatch(stem.removeprefix(prefix)) is not None


def _run_of(stored: DataSet) -> str:
    """Return the run of pending charges on a ledger: the same until the data set's entry is replaced."""
    before = {"fingerprints": stored.fingerprints, "adopted": stored.adopted}
    return "carried over " + hashlib.sha256(json.dumps(before).encode()).hexdigest()[:16]


def _spent(path: Path) -> Charges:
    """Return what a ledger has spent."""
    return {adversary: +counts for adversary, counts in state_at(path).spent.items()}


def _spent_on_records(path: Path) -> Charges:
    """Return what a ledger has spent on records alone: sums of whole clients are charged to each ledger under their keys."""
    book = state_at(path)
    mine = [
        each for each in book.releases.values() if each.source is None and each.state is not ReleaseState.VOID
    ]
    return {
        adversary: charged((each.events[adversary], each.arm) for each in mine if adversary in each.events)
        for adversary in book.spent
    }


def _max_counts(folder: Path, names: Sequence[str], spent: Callable[[Path], Charges]) -> Charges:
    """Return the maximum count of each event over the ledgers of these names."""
    max_counts: Charges = {}
    for name in names:
        for adversary, counts in spent(ledger_file(folder, name)).items():
            max_counts[adversary] = max_counts.get(adversary, Counter()) | counts
    return max_counts


def _difference(charges: Charges, part: Charges) -> Charges:
    """Return by how much each count exceeds that in `part`; events that do not exceed it are left out."""
    return {each: counts - part.get(each, Counter()) for each, counts in charges.items()}


def _sum(one: Charges, other: Charges) -> Charges:
    return {key: one.get(key, Counter()) + other.get(key, Counter()) for key in {*one, *other}}
