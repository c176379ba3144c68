"""Verification of a run folder or bundle: every hash, signature, entry, epsilon and number, with one line for each check.

Every statement of a bundle is recomputed from its content. This module needs no torch, Flower or Hydra, and the bundle
contains `recompute_ledger.py` for verifiers that do not trust this program.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...base.refusal import Refusal
from ...privacy.accounting.epsilon import GATE_INTERVAL, PUBLISH_INTERVAL
from ...privacy.accounting.renyi_filter import counted
from ...privacy.audit.summary import UNCLAIMED
from ...privacy.budget import Adjacency, Adversary, Unit
from ...privacy.ledger.book import RESERVE, Book, event_of, repeated, run_of, verify_entries
from ...privacy.ledger.caps import ledger_folder
from ...privacy.ledger.client_sums import lost_by_records
from ...privacy.ledger.export import entries_from, read_export
from ...privacy.ledger.hash_chain import Entry, Head
from ...privacy.ledger.ledger import read_entries
from ...privacy.secagg.rollover import Rollover
from ...privacy.secagg.roster import Roster
from ...run.files import (
    AUDIT_ROWS,
    BLAME,
    CONFIG,
    MANIFEST,
    METRICS,
    PAGE,
    RECEIPTS,
    REPORT,
    RESULT,
    SAVED,
    TIME_STAMP,
    WITNESSES,
    locate_ledger,
)
from ...run.manifest import LATER_FILES, Manifest, audit_hash, read_manifest, sha256_of
from ...run.run_files import read_config
from ...server.query_rows import round_of
from .blame import claims_of, require_proved
from .bundle import CLIENT_LEDGERS, LEDGER, LIST, RECOMPUTE, Contents, Listed, read_list
from .page import require_page
from .receipts import Receipts, checked_roster, fewest_receipts, read_receipts, require_opened, signers_in
from .signatures import FILE as SIGNATURES
from .signatures import SHOWN, check, read_signatures
from .time_stamp import STAMPS, stamped_at
from .witnesses import checked_witnesses

# Two machines may add in different orders; printed numbers have fewer digits.
SAME = 1e-6
AUDIT_NOTE = "audit"  # mechanism of the note that commits to an audit's canaries
BINDS = ("signatures", "close", "receipts")  # checks by which something outside a run's files binds them
GO_ON = ("interrupted", "paused")  # a run that ended so is not closed
BATCHES = "poisson batches"  # `sampling` of what is on the clients' ledgers begins with it
TAKEN_PART = f"{BATCHES}, in the rounds taken part in"
FAULTS = (
    Refusal,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    ArithmeticError,
)


class Wrong(Exception):
    """A check failed; the message says why."""


class NotShown(Exception):
    """These files cannot decide a check; the message says why."""


@dataclass(frozen=True)
class CheckLine:
    """One line of the list.

    Attributes:
      name: of the check.
      ok: the result; None if these files cannot show it.
      finding: finding, a clause.
    """

    name: str
    ok: bool | None
    finding: str


@dataclass(frozen=True)
class Knowledge:
    """Independent knowledge of the verifier.

    Attributes:
      keys: public keys in hexadecimal, each of which must have signed the bundle, or the roster of its receipts.
      head: an entry that the ledger must contain.
      device: folder of a device's ledgers, and of the openings of its receipts.
      roster: hash of the roster whose members gave the receipts, in hexadecimal.
      receipts: number of receipts that are needed; None needs those of all members, of the roster that is known.
      rollovers: chains of authorities, whose newest keys are among `keys`.
      witnesses: Ed25519 keys in hexadecimal, each of which must have co-signed the log that holds the manifest.
      time_stamps: file of certificates in PEM, of authorities for time stamps that the verifier trusts.
    """

    keys: Sequence[str] = ()
    head: Head | None = None
    device: Path | None = None
    roster: str | None = None
    receipts: int | None = None
    rollovers: Sequence[Sequence[Rollover]] = ()
    witnesses: Sequence[str] = ()
    time_stamps: Path | None = None


@dataclass(frozen=True)
class BoundFolder:
    """Folder of a run or bundle; its parts are read on first use.

    Attributes:
      folder: of the files.
      bundled: whether it is a bundle.
    """

    folder: Path
    bundled: bool

    @cached_property
    def listed(self) -> Listed:
        """The bundle's list of its content."""
        return read_list(self.folder)

    @cached_property
    def manifest(self) -> Manifest:
        """The run's manifest."""
        return read_manifest(self.folder)

    @cached_property
    def run(self) -> str:
        """The run's name on its ledger; for a run without a manifest, from its own file."""
        return (
            str(json.loads((self.folder / SAVED).read_bytes())["run"]) if _open(self) else self.manifest.run
        )

    @cached_property
    def result(self) -> dict[str, Any]:
        """The run's result."""
        try:
            return dict(json.loads((self.folder / RESULT).read_bytes()))
        except ValueError as problem:
            raise Wrong(f"{RESULT} cannot be read: {problem}") from None

    @cached_property
    def rounds(self) -> list[dict[str, Any]]:
        """The run's rounds, from its metrics lines."""
        return [json.loads(line) for line in (self.folder / METRICS).read_text(encoding="utf-8").splitlines()]

    @property
    def charged(self) -> bool:
        """Whether the run is charged on a ledger of its own."""
        return self.result["ledger_head"] is not None

    @property
    def ledger(self) -> Path:
        """Path of the run's ledger."""
        return self.folder / LEDGER if self.bundled else locate_ledger(self.folder, self.result["ledger"])

    @cached_property
    def entries(self) -> list[Entry]:
        """The entries of the run's ledger, whose chain holds."""
        if not self.charged:
            raise NotShown("the run has no ledger of its own")
        return _entries(self.ledger)

    @cached_property
    def book(self) -> Book:
        """The ledger's content."""
        return _book(self.entries, str(self.ledger))

    @cached_property
    def clients(self) -> dict[str, list[Entry]]:
        """The entries of the clients' ledgers that the manifest names."""
        if not self.manifest.heads:
            return {}
        if not self.bundled:
            return {name: _entries(self.folder / "client_ledgers" / name) for name in self.manifest.heads}
        whole = json.loads((self.folder / CLIENT_LEDGERS).read_bytes())
        return {name: entries_from(whole[name], name) for name in self.manifest.heads}


def verify_folder(folder: Path, asked: Knowledge) -> list[CheckLine]:
    """Check a run folder or a bundle; return one line for each check.

    Args:
      folder: of a bundle, if it contains a bundle's list, else of a run.
      asked: independent knowledge of the verifier.

    Raises:
      Refusal: the run has not ended.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # it logs a line for each order of RDP left out
    held = BoundFolder(folder, (folder / LIST).exists() or (folder / SIGNATURES).exists())
    if not held.bundled and not (folder / RESULT).exists() and not (folder / MANIFEST).exists():
        remedy = "has not ended, so nothing binds it yet; fedveil verify LEDGER checks what it has spent"
        raise Refusal("run", str(folder), remedy)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("manifest", lambda: _manifest(held)),
        ("ledger", lambda: _ledger(held)),
        ("close", lambda: _close(held)),
        ("known head", lambda: _known_heads(held, asked.head)),
        ("epsilon", lambda: _epsilon(held)),
        ("epsilon of each round", lambda: _once_bound(held, _epsilon_of_rounds)),
        ("client ledgers", lambda: _once_bound(held, _client_ledgers)),
        ("receipts", lambda: _receipts(held, asked)),
        ("blame", lambda: _blame(held, asked)),
        ("audit", lambda: _audit(held)),
        ("page", lambda: _page(held)),
    ]
    if held.bundled:
        first = [("files", lambda: _files(held)), ("signatures", lambda: _signatures(held, asked))]
        checks = [*first, *checks]
    elif set(asked.keys) - _authorities(held, asked):
        checks.append(("signatures", _unsigned))
    if asked.witnesses or (folder / WITNESSES).exists():
        checks.append(("witnesses", lambda: _witnesses(held, asked)))
    if asked.time_stamps is not None or (folder / TIME_STAMP).exists():
        checks.append(("time stamp", lambda: _time_stamp(held, asked.time_stamps)))
    return [_line(name, test) for name, test in checks]


def is_bound(lines: Iterable[CheckLine]) -> bool:
    """Return whether a signature, a ledger or a device's receipt binds the files: whoever made them all anew lacks it."""
    return any(line.ok for line in lines if line.name in BINDS)


def contents_of(run: Path) -> tuple[Contents, list[CheckLine]]:
    """Return the content for a bundle of this run, and the results of its verification.

    Raises:
      Refusal: a check fails; the sentence names it.
    """
    lines = verify_folder(run, Knowledge())
    wrong = next((line for line in lines if line.ok is False), None)
    if wrong is not None:
        raise Refusal("run", str(run), f"check {wrong.name} failed: {wrong.finding}")
    held = BoundFolder(run, bundled=False)
    entries = held.entries[: held.book.closes[held.manifest.run].seq] if held.charged else []
    return Contents(run, held.manifest, entries, held.clients), lines


def _line(name: str, test: Callable[[], str]) -> CheckLine:
    try:
        return CheckLine(name, True, test())
    except NotShown as why:
        return CheckLine(name, None, str(why))
    except Wrong as wrong:
        return CheckLine(name, False, str(wrong))
    except FAULTS as problem:
        return CheckLine(name, False, str(problem) or type(problem).__name__)


def _entries(path: Path) -> list[Entry]:
    return read_export(path.read_bytes(), str(path)) if path.suffix == ".json" else read_entries(path)


def _book(entries: Sequence[Entry], source: str) -> Book:
    book = Book()
    for entry in entries:
        book.take(entry, source)
    return book


# --- files and signatures -----------------------------------------------------------------------------------------


def _files(held: BoundFolder) -> str:
    """Check that every listed file is unchanged, and that there is no other file."""
    there = {path.name for path in held.folder.iterdir()} - {LIST, SIGNATURES}
    listed = held.listed.files
    for name in sorted(there ^ set(listed)):
        raise Wrong(f"{name} is {'not listed' if name in there else 'missing'}")
    for name, digest in sorted(listed.items()):
        path = held.folder / name
        if path.is_symlink() or not path.is_file() or sha256_of(path) != digest:
            raise Wrong(f"{name} differs from the bundled file")
    own, its = Path(__file__).parent / RECOMPUTE, held.folder / RECOMPUTE
    strange = its.is_file() and sha256_of(its) != sha256_of(own)
    beware = f"; {RECOMPUTE} is not this installation's: read it before you run it" if strange else ""
    return f"{len(listed)} files match the bundle's list{beware}"


def _signatures(held: BoundFolder, asked: Knowledge) -> str:
    found = read_signatures(held.folder)
    check((held.folder / LIST).read_bytes(), found)
    for key in asked.keys:
        if key not in _signers(held) | _authorities(held, asked):
            raise Wrong(f"the key {key[:SHOWN]} has not signed, nor the roster of {RECEIPTS}")
    if not found:
        raise NotShown("there is no signature, so these files may be forged")
    said = "; ".join(
        f"{each.role}, {each.date}, key {next(iter(each.keys.values()))[:SHOWN]}" for each in found
    )
    known = "" if asked.keys else "; compare the keys with those you know, or give --key"
    return f"{said}{known}"


def _signers(held: BoundFolder) -> set[str]:
    """Return the keys of a bundle's signatures, which another check verifies."""
    found = read_signatures(held.folder) if held.bundled else ()
    return {public for each in found for public in each.keys.values()}


def _authorities(held: BoundFolder, asked: Knowledge) -> set[str]:
    """Return the keys that stand for the authority of the receipts, which another check verifies; none without receipts.

    They are its own and, by rollovers that both sides signed, those before it and after it.
    """
    try:
        receipts = read_receipts(held.folder)
    except Refusal:
        return set()
    found = {own := receipts.authority.hex()}
    for chain in (receipts.rollovers, *asked.rollovers):
        keys = {key for each in chain for key in (each.old, each.new)}
        found |= keys if own in keys else set()
    return found


def _require_in_force(held: BoundFolder, receipts: Receipts, asked: Knowledge) -> None:
    """Require that the authority of the receipts was not replaced, or that the run ended before the overlap did."""
    own = receipts.authority.hex()
    for each in (each for chain in (receipts.rollovers, *asked.rollovers) for each in chain):
        if each.old == own and not 0 < _seconds_of_end(held) < each.until:
            raise Wrong(
                f"the authority {own[:SHOWN]} was replaced, and the run did not end before the overlap with its successor"
            )


def _once_bound(held: BoundFolder, test: Callable[[BoundFolder], str]) -> str:
    """Return the result of a check that needs a manifest; a run that may continue has none, which another line reports."""
    if _open(held):
        raise NotShown("the run can still be resumed")
    return test(held)


def _open(held: BoundFolder) -> bool:
    unbound = not held.bundled and not (held.folder / MANIFEST).exists()
    return unbound and held.result["status"] in GO_ON


def _unsigned() -> str:
    raise Wrong("a run folder has no signatures; make a bundle of it")


def _manifest(held: BoundFolder) -> str:
    """Check that every file of the run matches its manifest."""
    if _open(held):
        raise Wrong(f"the run was {held.result['status']} and is not bound: resume the run, which closes it")
    later: list[str] = []
    for name, digest in held.manifest.files.items():
        path = held.folder / name
        if name == AUDIT_ROWS and held.bundled and not path.exists():
            continue
        if path.is_file() and digest == (audit_hash(held.folder) if name == AUDIT_ROWS else sha256_of(path)):
            continue
        if name not in LATER_FILES:
            raise Wrong(f"{name} is {'not the file in the manifest' if path.exists() else 'missing'}")
        later.append(name)
    missing = {RESULT, METRICS} - set(held.manifest.files)
    if missing:
        raise Wrong(f"the manifest lacks {', '.join(sorted(missing))}")
    if held.manifest.status != held.result["status"]:
        raise Wrong(
            f"the status is {held.manifest.status} in the manifest and {held.result['status']} in the result"
        )
    made = f"; made again since: {', '.join(later)}" if later else ""
    return f"{len(held.manifest.files)} files match the manifest{made}"


# --- the ledger ---------------------------------------------------------------------------------------------------


def _ledger(held: BoundFolder) -> str:
    """Check that every entry chains to the one before, and that the spent epsilon stayed within the budget."""
    entries = held.entries
    found = verify_entries(entries, held.ledger.name)
    if not found.ok:
        raise Wrong(str(found.problem))
    said = f"{found.entries} entries, every hash is correct, all spending was granted"
    spent = found.epsilon is not None and found.delta is not None
    return f"{said}: epsilon {found.epsilon:.4g} at delta {found.delta:.3g}" if spent else said


def _close(held: BoundFolder) -> str:
    """Check that the run's last entry binds this manifest."""
    if _open(held):
        raise NotShown("the run can still be resumed")
    try:
        entries = held.entries
    except NotShown as why:
        if held.bundled and held.listed.close is not None:
            raise Wrong("the bundle names the closing entry, but holds no ledger") from None
        also = ", and by the receipts of devices" if (held.folder / RECEIPTS).exists() else " alone"
        raise NotShown(f"{why}: its files are bound by a signature{also}") from None
    run = held.manifest.run
    entry = held.book.closes.get(run)
    if entry is None:
        went_on = any(each.kind == "close" and run_of(each) == run for each in entries)
        raise Wrong(
            "the run continued after it was closed; resume it"
            if went_on
            else "the run was never closed: nothing binds its files; resume it"
        )
    said = json.loads(entry.payload)
    if said["manifest"] != held.manifest.hash:
        raise Wrong(f"entry {entry.seq} closed the run with files other than those of {MANIFEST}")
    if said["status"] != held.manifest.status:
        raise Wrong(
            f"the status is {said['status']} in entry {entry.seq} and {held.manifest.status} in {MANIFEST}"
        )
    if held.bundled and (held.listed.close != entry.head or entries[-1] != entry or held.listed.run != run):
        raise Wrong(f"the bundle was made from a closing entry other than {entry.seq}")
    return f"entry {entry.seq} binds the run's files, {entry.hash[:SHOWN]}"


def _known_heads(held: BoundFolder, head: Head | None) -> str:
    """Check that the ledger contains the entries known to the result and to the verifier."""
    entries = held.entries
    known = [("the result", Head(*held.result["ledger_head"]))] + ([("--head", head)] if head else [])
    for who, each in known:
        if each.seq > len(entries) or each.seq < 1 or entries[each.seq - 1].hash != each.hash:
            raise Wrong(f"the ledger lacks entry {each.seq} of {who}")
    return "the ledger holds " + " and ".join(f"entry {each.seq} of {who}" for who, each in known)


# --- epsilon ------------------------------------------------------------------------------------------------------


def _epsilon(held: BoundFolder) -> str:
    """Recompute the result's epsilon against each adversary, and compare it with the budget."""
    head = Head(*held.result["ledger_head"]) if held.charged else None
    book = _book([each for each in held.entries if head is None or each.seq <= head.seq], held.ledger.name)
    rows = {
        row["adversary"]: row
        for row in held.result["privacy"]
        if row["unit"] == book.identity["unit"] and row["sampling"] != "none"
    }
    seen = _told_by(held) or set(rows) & {str(who) for who in book.spent}
    if set(rows) != seen:
        why = f"the adversaries are {', '.join(sorted(rows))} in the result and {', '.join(sorted(seen))} on the ledger"
        raise Wrong(why)
    told: list[str] = []
    for name, row in sorted(rows.items()):
        adversary, claimed = Adversary(name), _number(row["epsilon"])
        granted = book.granted[adversary]
        found = counted(
            book.events(adversary),
            row["delta"],
            Adjacency(row["adjacency"]),
            book.filter_order,
            PUBLISH_INTERVAL,
        )
        if book.filter_order is None and not _same(found, claimed):
            raise Wrong(
                f"epsilon against the {name} is {claimed:.6g} in the result and {found:.6g} by the ledger"
            )
        if found > claimed * (1 + SAME):
            why = f"epsilon {found:.6g} is spent against the {name}, and {claimed:.6g} is claimed"
            raise Wrong(why)
        if (row["delta"], row["adjacency"]) != (granted.target_delta, str(granted.adjacency)) and (
            row["delta"] < granted.target_delta or row["adjacency"] != str(granted.adjacency)
        ):
            raise Wrong(f"adjacency or delta against the {name} differs between the result and the budget")
        if claimed > granted.target_epsilon * (1 + SAME):
            why = f"epsilon {claimed:.6g} against the {name} exceeds the budget {granted.target_epsilon:.6g}"
            raise Wrong(why)
        limited, most = granted.target_epsilon < 1e6, f"{granted.target_epsilon:.4g}"
        told.append(f"{claimed:.4g} of {most if limited else 'an unlimited budget'} against the {name}")
    if (lost := held.result.get("record_by_sums")) is not None:
        found = lost_by_records(book, lost["delta"])
        if found is None or not _same(found, _number(lost["epsilon"])):
            raise Wrong(f"a record has lost {lost['epsilon']} in the result and {found} by the ledger")
    return f"recomputed and within the budget: {'; '.join(told)}" if told else "nothing was released"


def _told_by(held: BoundFolder) -> set[str]:
    """Return the adversaries of a run's releases; runs on one ledger may differ. Empty for a run that released nothing."""
    mine = (each for each in held.entries if each.kind == RESERVE and run_of(each) == held.run)
    return {who for each in mine for who in json.loads(each.payload)["events"]}


def _number(value: float | str) -> float:
    return math.inf if value == "infinity" else float(value)


def _same(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=SAME, abs_tol=SAME)


def _epsilon_of_rounds(held: BoundFolder) -> str:
    """Recompute the epsilon in each round's line from the entries up to that round."""
    column = (
        "epsilon_client" if held.entries and held.book.identity["unit"] == Unit.CLIENT else "epsilon_record"
    )
    snapshots = dict(_after_each_round(held.entries, held.manifest.run))
    budget = next(iter(held.book.granted.values()), None)
    checked, known = 0, {}
    for row in held.rounds:
        if row["round"] not in snapshots or row[column] is None or budget is None:
            continue
        counts, order = snapshots[row["round"]]
        key = (tuple(sorted(counts.items())), order)
        if key not in known:
            events = [repeated(event_of(text), count) for text, count in counts.items()]
            known[key] = counted(events, budget.target_delta, budget.adjacency, order, GATE_INTERVAL)
        if not _same(known[key], _number(row[column])):
            why = f"round {row['round']} has epsilon {_number(row[column]):.6g}, and the ledger {known[key]:.6g}"
            raise Wrong(why)
        checked += 1
    if not checked:
        raise NotShown("no round has entries under the last name of the run")
    return f"{checked} of {len(held.rounds)} rounds recomputed"


def _after_each_round(
    entries: Sequence[Entry], run: str
) -> Iterator[tuple[int, tuple[Counter[str], float | None]]]:
    """Yield (round, events of the adversary `model`, filter's order) after each round and its evaluation."""
    book = Book()
    for entry in entries:
        book.apply(entry)
        if entry.kind not in ("reserve", "commit", "void"):
            continue
        number = round_of(run, run_of(entry), int(json.loads(entry.key)[1]))
        if number is not None:
            seen = +book.spent.get(Adversary.MODEL, Counter[str]())
            yield number, (seen, book.filter_order)


def _client_ledgers(held: BoundFolder) -> str:
    """Check that the clients' ledgers match the end of the run and that no record lost more than the result states."""
    if not held.manifest.heads:
        own = any(row["sampling"].startswith(BATCHES) for row in held.result["privacy"])
        if not own:
            raise NotShown("the run has none")
        return _ledgers_of_this_machine(held)
    for name, entries in held.clients.items():
        head = held.manifest.heads[name]
        if head.seq > len(entries) or entries[head.seq - 1].head != head:
            raise Wrong(f"{name} lacks entry {head.seq} of the manifest")
    most = _most_lost(each[: held.manifest.heads[name].seq] for name, each in held.clients.items())
    for claimed in _of_records(held):
        if not _same(most, claimed):
            raise Wrong(f"the result states {claimed:.6g} for records, and the ledgers give {most:.6g}")
    return f"{len(held.clients)} ledgers are correct, epsilon at most {most:.4g}"


def _ledgers_of_this_machine(held: BoundFolder) -> str:
    """Check the ledgers of real clients on this machine up to their last entry of the run; those of others stay there."""
    own = (
        path for path in sorted(_home(held).glob("*.ledger")) if "-" not in path.stem
    )  # each of one client
    found = [_until_the_end(_entries(path), held.run) for path in own]
    found = [entries for entries in found if entries]
    if not found:
        raise NotShown("no ledger of this run's clients is on this machine")
    most = _most_lost(found)
    for claimed in _of_records(held):
        if most > claimed * (1 + SAME):
            raise Wrong(
                f"the result states {claimed:.6g} for records, and a ledger on this machine {most:.6g}"
            )
    return f"{len(found)} ledgers on this machine are correct, epsilon at most {most:.4g}"


def _home(held: BoundFolder) -> Path:
    """Return the folder of this machine's ledgers of real data; a verifier without OmegaConf has the usual one."""
    try:
        configured = read_config(held.folder / CONFIG)[0]
    except ImportError:
        configured = {}
    return ledger_folder("ledger.dir", configured.get("ledger", {}).get("dir"))


def _until_the_end(entries: Sequence[Entry], run: str) -> Sequence[Entry]:
    """Return a ledger's entries up to the last one of a run; none if it has none."""
    return entries[: max((each.seq for each in entries if run_of(each) == run), default=0)]


def _most_lost(ledgers: Iterable[Sequence[Entry]]) -> float:
    """Return the largest epsilon of clients' ledgers, of which those with the same charges are recomputed once."""
    seen: dict[tuple[str, ...], Sequence[Entry]] = {}
    for entries in ledgers:
        reserved = (each.payload.partition(',"time"')[0] for each in entries if each.kind == RESERVE)
        seen[tuple(sorted(reserved))] = entries
    found = [verify_entries(entries, "a client's ledger") for entries in seen.values()]
    problem = next((each.problem for each in found if not each.ok), None)
    if problem is not None:
        raise Wrong(problem)
    return max((each.epsilon or 0.0 for each in found), default=0.0)


def _of_records(held: BoundFolder) -> list[float]:
    """Return the epsilon that the result states for records that took part."""
    rows = (row for row in held.result["privacy"] if row["adversary"] == "server")
    return [_number(row["epsilon"]) for row in rows if row["sampling"] == TAKEN_PART]


def _receipts(held: BoundFolder, asked: Knowledge) -> str:
    """Check the devices' signatures over this run's description, and compare a device's ledgers with its receipt."""
    if not (held.folder / RECEIPTS).exists():
        demanded = (asked.device, asked.roster, asked.receipts) != (None, None, None)
        if demanded or (held.bundled and RECEIPTS in held.listed.files):
            raise Wrong(f"{RECEIPTS} is missing")
        deployed = held.result.get("rosters")
        raise NotShown(
            "the run has none, or they stay with its operator" if deployed else "no device took part"
        )
    receipts = read_receipts(held.folder)
    if receipts.description.manifest != held.manifest.hash:
        raise Wrong(f"they belong to another run than {MANIFEST}")
    roster = checked_roster(receipts)
    _require_roster(held, roster, asked.roster)
    _require_in_force(held, receipts, asked)
    authority, same = receipts.authority.hex(), _authorities(held, asked)
    known = bool(same & {*asked.keys}) or asked.roster is not None
    demanded = (
        asked.roster is not None or asked.receipts is not None or bool(same & {*asked.keys} - _signers(held))
    )
    vouched = "" if known else f"; compare the authority's key, {authority[:SHOWN]}"
    opened = ""
    if asked.device is not None:
        opened = f"; the ledgers of node {require_opened(receipts, asked.device)} match its receipt"
    signed = f"{len(receipts.signed)} of {len(roster.members)} members have signed the run's files"
    said = f"{signed}, by roster version {roster.version}{opened}"
    short = _lacking(held, receipts, roster, asked.receipts)
    if short and demanded:
        raise Wrong(f"{said}; {short}")
    if short:
        raise NotShown(f"{said}; {short}{vouched}")
    if asked.roster is None and asked.receipts is None:
        raise NotShown(f"{said}{vouched}; an older roster may have fewer: give --roster, or --receipts")
    return f"{said}{vouched}"


def _require_roster(held: BoundFolder, roster: Roster, expected: str | None) -> None:
    """Require the roster from which the last round was drawn, or one that the authority made of it."""
    if expected is not None and roster.hash.hex() != expected:
        raise Wrong(f"they use roster {roster.hash.hex()}, and --roster is {expected}")
    last = [each["hash"] for each in held.result.get("rosters", ())][-1:]
    if last and last[0] not in {each.hex() for each in (roster.hash, *roster.earlier)}:
        raise Wrong(f"they use roster version {roster.version}, which was not in force when the run ended")


def _lacking(held: BoundFolder, receipts: Receipts, roster: Roster, asked: int | None) -> str:
    """Return why the receipts are too few to bind a run; empty if they are enough.

    Who answered in the last round is the server's word. All members are needed, unless the verifier names a number.
    """
    counted = signers_in(receipts, roster, _seconds_of_end(held))
    least = fewest_receipts(roster, (held.result.get("secagg") or {}).get("colluders_assumed", 0))
    if asked is not None and asked < least:
        return f"--receipts {asked} may all collude: name at least {least}"
    needed = max(len(roster.members), least) if asked is None else asked
    if len(counted) >= needed:
        return ""
    without = sorted(each.node for each in receipts.signed if each.node not in counted)
    unsound = f" (nodes {without} ended, or compared nothing, as in earlier releases)" if without else ""
    fewer = f"; --receipts names fewer, at least {least}" if asked is None and least < needed else ""
    return f"{needed} are needed, and {len(counted)} count{unsound}{fewer}"


def _seconds_of_end(held: BoundFolder) -> int:
    """Return the Unix second of the close, or else of the last roster; 0 if the files name neither."""
    try:
        at = json.loads(held.book.closes[held.run].payload)["time"]
    except NotShown:
        at = next((each["at"] for each in reversed(held.result.get("rosters", ()))), None)
    return 0 if at is None else int(datetime.fromisoformat(at).timestamp())


def _witnesses(held: BoundFolder, asked: Knowledge) -> str:
    """Check the co-signatures of the log that holds this manifest."""
    if not (held.folder / WITNESSES).exists():
        raise Wrong(f"{WITNESSES} is missing, and --witness is given")
    receipts = read_receipts(held.folder) if (held.folder / RECEIPTS).exists() else None
    federation = None if receipts is None else receipts.description.federation
    found = checked_witnesses(held.folder, held.manifest, federation)
    for key in asked.witnesses:
        if key not in found:
            raise Wrong(f"the witness {key[:SHOWN]} has not co-signed the log of this run")
        if key in _authorities(held, asked):
            raise Wrong(f"the witness {key[:SHOWN]} is the authority")
    told = [f"{public[:SHOWN]} at {_second(each.at)}" for public, each in sorted(found.items())]
    known = "" if asked.witnesses else "; compare the keys with those you know, or give --witness"
    return f"the log with this manifest is co-signed by {len(found)}: {', '.join(told)}{known}"


def _second(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _time_stamp(held: BoundFolder, trusted: Path | None) -> str:
    """Check the time stamp of this manifest against the certificates that the verifier trusts."""
    if not (held.folder / TIME_STAMP).exists():
        raise Wrong(f"{TIME_STAMP} is missing, and --tsa is given")
    if trusted is None:
        raise NotShown("give --tsa with the root certificate of its authority, to check it")
    if find_spec(STAMPS) is None:
        raise NotShown("rfc3161-client is not installed: pip install 'fedveil[timestamps]'")
    at = stamped_at((held.folder / TIME_STAMP).read_bytes(), held.manifest.text.encode(), trusted)
    return f"{MANIFEST} was there at {at.isoformat(timespec='seconds')}, by an authority in {trusted}"


def _blame(held: BoundFolder, asked: Knowledge) -> str:
    """Check the evidence against every member that the run names, with the members' public keys."""
    claims = claims_of(held.rounds, held.result.get("blamed") or {})
    if not claims:
        raise NotShown("no member is named")
    if not (held.folder / BLAME).exists() and not _open(held) and BLAME not in held.manifest.files:
        raise NotShown(
            "members are named without evidence, as in earlier releases: this is the server's word"
        )
    given, same = {*asked.keys} - _signers(held), _authorities(held, asked)
    keys = given | same if given & same or not given else given
    said, undecided = require_proved(held.folder, held.run, claims, held.result, keys)
    if undecided:
        raise NotShown(f"{said}; {undecided}")
    if held.result["data"] != "simulation" and not given:
        raise NotShown(f"{said}, if their keys are the members': give the authority's key with --key")
    return said


# --- audit and page -----------------------------------------------------------------------------------------------


def _audit(held: BoundFolder) -> str:
    """Recompute the audit; its canaries must match the commitment on the ledger before round 1."""
    told = held.result["audit"]
    if told is None:
        raise NotShown("the run had none")
    from ...audit.result import audit_fields, weigh  # an extension, which other runs do without

    if held.bundled and not (held.folder / AUDIT_ROWS).exists():
        if AUDIT_ROWS in held.listed.files:
            raise Wrong(f"{AUDIT_ROWS} is missing")
        raise NotShown("its rows reveal the number of participants and stay with the operator")
    fields = audit_fields(held.folder)
    if "commitment" in fields and held.charged:
        _require_commitment(held, str(fields["commitment"]))
    if fields["terms"]["canaries"] and "opened" not in fields:
        raise NotShown("its canaries are opened when the run ends, and the run may continue")
    if told.get("verdict") is None and "measured" not in told:
        raise NotShown(str(told["said"]))
    found = weigh(held.folder).to_json()
    for name, value in json.loads(json.dumps(found)).items():
        if not _alike(value, told.get(name)):
            raise Wrong(f"its {name} is {value!r} when recomputed, and {told.get(name)!r} in the result")
    if told["verdict"] is None:
        raise NotShown("it looked at whole clients alone" if told["said"] == UNCLAIMED else str(told["said"]))
    return f"recomputed: {told['verdict']}, {told['said']}"


def _require_commitment(held: BoundFolder, commitment: str) -> None:
    notes = [
        json.loads(payload)["commitment"]
        for key, payload in held.book.notes.items()
        if json.loads(key)[::2] == [held.run, AUDIT_NOTE]
    ]
    if notes != [commitment]:
        raise Wrong("its canaries do not match the ledger's commitment from before the first round")


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return set(one) == set(other) and all(_alike(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return _same(one, other)
    return one == other


def _page(held: BoundFolder) -> str:
    """Check that the page is the one that the report makes, and that the report agrees with the result."""
    page, report = held.folder / PAGE, held.folder / REPORT
    if not report.exists() and not page.exists():
        raise NotShown("there is no page; fedveil report makes it")
    if report.exists() != page.exists():
        raise Wrong(f"{(page if report.exists() else report).name} is missing beside the other")

    def bound() -> bool:
        listed = held.listed.files.get(PAGE) if held.bundled and read_signatures(held.folder) else None
        return sha256_of(page) in (held.manifest.files.get(PAGE), listed)

    said, undecided = require_page(held.folder, held.result, held.rounds, bound)
    if undecided:
        raise NotShown(undecided)
    return said
