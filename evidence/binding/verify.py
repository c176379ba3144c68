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
from ...privacy.accounting.renyi_filter import spent_epsilon
from ...privacy.audit.summary import UNCLAIMED
from ...privacy.budget import Adjacency, Adversary, Unit
from ...privacy.ledger.caps import ledger_folder
from ...privacy.ledger.client_sums import lost_by_records
from ...privacy.ledger.export import entries_from, read_export
from ...privacy.ledger.hash_chain import Entry, Head
from ...privacy.ledger.ledger import read_entries
from ...privacy.ledger.ledger_state import RESERVE, LedgerState, event_of, repeated, run_of, verify_entries
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
from .bundle import CLIENT_LEDGERS, LEDGER, LIST, RECOMPUTE, Contents, Listing, read_list
from .page import require_page
from .receipts import Receipts, fewest_receipts, read_receipts, require_opened, signers_in, verify_roster
from .signatures import FILE as SIGNATURES
from .signatures import SHORT, UNREADABLE, check, read_signatures
from .time_stamp import STAMPS, time_of_stamp
from .witnesses import verify_witnesses

# Two machines may add in different orders; printed numbers have fewer digits.
SAME = 1e-6
AUDIT_NOTE = "audit"  # mechanism of the note that commits to an audit's canaries
BINDS = ("signatures", "close", "receipts")  # checks by which something outside a run's files binds them
GO_ON = ("interrupted", "paused")  # a run that ended so is not closed
BATCHES = "poisson batches"  # begin of `sampling` in rows that the clients' ledgers account for
PARTICIPATION = f"{BATCHES}, in the rounds taken part in"
FAULTS = (Refusal, ArithmeticError, *UNREADABLE)


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
      path: of the files.
      bundled: whether it is a bundle.
    """

    path: Path
    bundled: bool

    @cached_property
    def listing(self) -> Listing:
        """The bundle's list of its content."""
        return read_list(self.path)

    @cached_property
    def manifest(self) -> Manifest:
        """The run's manifest."""
        return read_manifest(self.path)

    @cached_property
    def run(self) -> str:
        """The run's name on its ledger; for a run without a manifest, from its own file."""
        return (
            str(json.loads((self.path / SAVED).read_bytes())["run"]) if _is_open(self) else self.manifest.run
        )

    @cached_property
    def result(self) -> dict[str, Any]:
        """The run's result."""
        try:
            return dict(json.loads((self.path / RESULT).read_bytes()))
        except ValueError as problem:
            raise Wrong(f"{RESULT} cannot be read: {problem}") from None

    @cached_property
    def rounds(self) -> list[dict[str, Any]]:
        """The run's rounds, from its metrics lines."""
        return [json.loads(line) for line in (self.path / METRICS).read_text(encoding="utf-8").splitlines()]

    @property
    def charged(self) -> bool:
        """Whether the run is charged on a ledger of its own."""
        return self.result["ledger_head"] is not None

    @property
    def ledger(self) -> Path:
        """Path of the run's ledger."""
        return self.path / LEDGER if self.bundled else locate_ledger(self.path, self.result["ledger"])

    @cached_property
    def entries(self) -> list[Entry]:
        """The entries of the run's ledger, whose chain holds."""
        if not self.charged:
            raise NotShown("the run has no ledger of its own")
        return _entries(self.ledger)

    @cached_property
    def book(self) -> LedgerState:
        """The ledger's content."""
        return _book(self.entries, str(self.ledger))

    @cached_property
    def clients(self) -> dict[str, list[Entry]]:
        """The entries of the clients' ledgers that the manifest names."""
        if not self.manifest.heads:
            return {}
        if not self.bundled:
            return {name: _entries(self.path / "client_ledgers" / name) for name in self.manifest.heads}
        whole = json.loads((self.path / CLIENT_LEDGERS).read_bytes())
        return {name: entries_from(whole[name], name) for name in self.manifest.heads}


def verify_folder(path: Path, knowledge: Knowledge) -> list[CheckLine]:
    """Check a run folder or a bundle; return one line for each check.

    Args:
      path: of a bundle, if it contains a bundle's list, else of a run.
      knowledge: independent knowledge of the verifier.

    Raises:
      Refusal: the run has not ended.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # it logs a line for each order of RDP left out
    folder = BoundFolder(path, (path / LIST).exists() or (path / SIGNATURES).exists())
    if not folder.bundled and not (path / RESULT).exists() and not (path / MANIFEST).exists():
        remedy = "has not ended, so nothing binds it yet; fedveil verify LEDGER checks what it has spent"
        raise Refusal("run", str(path), remedy)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("manifest", lambda: _manifest(folder)),
        ("ledger", lambda: _ledger(folder)),
        ("close", lambda: _close(folder)),
        ("known head", lambda: _known_heads(folder, knowledge.head)),
        ("epsilon", lambda: _epsilon(folder)),
        ("epsilon of each round", lambda: _once_bound(folder, _epsilon_of_rounds)),
        ("client ledgers", lambda: _once_bound(folder, _client_ledgers)),
        ("receipts", lambda: _receipts(folder, knowledge)),
        ("blame", lambda: _blame(folder, knowledge)),
        ("audit", lambda: _audit(folder)),
        ("page", lambda: _page(folder)),
    ]
    if folder.bundled:
        first = [("files", lambda: _files(folder)), ("signatures", lambda: _signatures(folder, knowledge))]
        checks = [*first, *checks]
    elif set(knowledge.keys) - _authorities(folder, knowledge):
        checks.append(("signatures", _unsigned))
    if knowledge.witnesses or (path / WITNESSES).exists():
        checks.append(("witnesses", lambda: _witnesses(folder, knowledge)))
    if knowledge.time_stamps is not None or (path / TIME_STAMP).exists():
        checks.append(("time stamp", lambda: _time_stamp(folder, knowledge.time_stamps)))
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
    folder = BoundFolder(run, bundled=False)
    entries = folder.entries[: folder.book.closes[folder.manifest.run].seq] if folder.charged else []
    return Contents(run, folder.manifest, entries, folder.clients), lines


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


def _book(entries: Sequence[Entry], source: str) -> LedgerState:
    book = LedgerState()
    for entry in entries:
        book.take(entry, source)
    return book


# --- files and signatures -----------------------------------------------------------------------------------------


def _files(folder: BoundFolder) -> str:
    """Check that every listed file is unchanged, and that there is no other file."""
    names = {path.name for path in folder.path.iterdir()} - {LIST, SIGNATURES}
    digests = folder.listing.files
    for name in sorted(names ^ set(digests)):
        raise Wrong(f"{name} is {'not listed' if name in names else 'missing'}")
    for name, digest in sorted(digests.items()):
        path = folder.path / name
        if path.is_symlink() or not path.is_file() or sha256_of(path) != digest:
            raise Wrong(f"{name} differs from the bundled file")
    installed, bundled = Path(__file__).parent / RECOMPUTE, folder.path / RECOMPUTE
    strange = bundled.is_file() and sha256_of(bundled) != sha256_of(installed)
    beware = f"; {RECOMPUTE} is not this installation's: read it before you run it" if strange else ""
    return f"{len(digests)} files match the bundle's list{beware}"


def _signatures(folder: BoundFolder, knowledge: Knowledge) -> str:
    signatures = read_signatures(folder.path)
    check((folder.path / LIST).read_bytes(), signatures)
    for key in knowledge.keys:
        if key not in _signers(folder) | _authorities(folder, knowledge):
            raise Wrong(f"the key {key[:SHORT]} has not signed, nor the roster of {RECEIPTS}")
    if not signatures:
        raise NotShown("there is no signature, so these files may be forged")
    signers = "; ".join(
        f"{each.role}, {each.date}, key {next(iter(each.keys.values()))[:SHORT]}" for each in signatures
    )
    advice = "" if knowledge.keys else "; compare the keys with those you know, or give --key"
    return f"{signers}{advice}"


def _signers(folder: BoundFolder) -> set[str]:
    """Return the keys of a bundle's signatures, which another check verifies."""
    signatures = read_signatures(folder.path) if folder.bundled else ()
    return {public for each in signatures for public in each.keys.values()}


def _authorities(folder: BoundFolder, knowledge: Knowledge) -> set[str]:
    """Return the keys that stand for the authority of the receipts, which another check verifies; none without receipts.

    They are its own and, by rollovers that both sides signed, those before it and after it.
    """
    try:
        receipts = read_receipts(folder.path)
    except Refusal:
        return set()
    authorities = {authority := receipts.authority.hex()}
    for chain in (receipts.rollovers, *knowledge.rollovers):
        keys = {key for each in chain for key in (each.old, each.new)}
        authorities |= keys if authority in keys else set()
    return authorities


def _require_in_force(folder: BoundFolder, receipts: Receipts, knowledge: Knowledge) -> None:
    """Require that the authority of the receipts was not replaced, or that the run ended before the overlap did."""
    authority = receipts.authority.hex()
    for rollover in (each for chain in (receipts.rollovers, *knowledge.rollovers) for each in chain):
        if rollover.old == authority and not 0 < _seconds_of_end(folder) < rollover.until:
            raise Wrong(
                f"the authority {authority[:SHORT]} was replaced, and the run did not end before the overlap with its successor"
            )


def _once_bound(folder: BoundFolder, test: Callable[[BoundFolder], str]) -> str:
    """Return the result of a check that needs a manifest; a run that may continue has none, which another line reports."""
    if _is_open(folder):
        raise NotShown("the run can still be resumed")
    return test(folder)


def _is_open(folder: BoundFolder) -> bool:
    unbound = not folder.bundled and not (folder.path / MANIFEST).exists()
    return unbound and folder.result["status"] in GO_ON


def _unsigned() -> str:
    raise Wrong("a run folder has no signatures; make a bundle of it")


def _manifest(folder: BoundFolder) -> str:
    """Check that every file of the run matches its manifest."""
    if _is_open(folder):
        raise Wrong(
            f"the run was {folder.result['status']} and is not bound: resume the run, which closes it"
        )
    later: list[str] = []
    for name, digest in folder.manifest.files.items():
        path = folder.path / name
        if name == AUDIT_ROWS and folder.bundled and not path.exists():
            continue
        if path.is_file() and digest == (audit_hash(folder.path) if name == AUDIT_ROWS else sha256_of(path)):
            continue
        if name not in LATER_FILES:
            raise Wrong(f"{name} is {'not the file in the manifest' if path.exists() else 'missing'}")
        later.append(name)
    missing = {RESULT, METRICS} - set(folder.manifest.files)
    if missing:
        raise Wrong(f"the manifest lacks {', '.join(sorted(missing))}")
    status = folder.result["status"]
    if folder.manifest.status != status:
        raise Wrong(f"the status is {folder.manifest.status} in the manifest and {status} in the result")
    suffix = f"; made again since: {', '.join(later)}" if later else ""
    return f"{len(folder.manifest.files)} files match the manifest{suffix}"


# --- the ledger ---------------------------------------------------------------------------------------------------


def _ledger(folder: BoundFolder) -> str:
    """Check that every entry chains to the one before, and that the spent epsilon stayed within the budget."""
    entries = folder.entries
    verification = verify_entries(entries, folder.ledger.name)
    if not verification.ok:
        raise Wrong(str(verification.problem))
    finding = f"{verification.entries} entries, every hash is correct, all spending was granted"
    epsilon, delta = verification.epsilon, verification.delta
    if epsilon is None or delta is None:
        return finding
    return f"{finding}: epsilon {epsilon:.4g} at delta {delta:.3g}"


def _close(folder: BoundFolder) -> str:
    """Check that the run's last entry binds this manifest."""
    if _is_open(folder):
        raise NotShown("the run can still be resumed")
    try:
        entries = folder.entries
    except NotShown as reason:
        if folder.bundled and folder.listing.close is not None:
            raise Wrong("the bundle names the closing entry, but holds no ledger") from None
        also = ", and by the receipts of devices" if (folder.path / RECEIPTS).exists() else " alone"
        raise NotShown(f"{reason}: its files are bound by a signature{also}") from None
    run = folder.manifest.run
    entry = folder.book.closes.get(run)
    if entry is None:
        went_on = any(each.kind == "close" and run_of(each) == run for each in entries)
        raise Wrong(
            "the run continued after it was closed; resume it"
            if went_on
            else "the run was never closed: nothing binds its files; resume it"
        )
    payload = json.loads(entry.payload)
    if payload["manifest"] != folder.manifest.hash:
        raise Wrong(f"entry {entry.seq} closed the run with files other than those of {MANIFEST}")
    if payload["status"] != folder.manifest.status:
        raise Wrong(
            f"the status is {payload['status']} in entry {entry.seq} and {folder.manifest.status} in {MANIFEST}"
        )
    if folder.bundled and (
        folder.listing.close != entry.head or entries[-1] != entry or folder.listing.run != run
    ):
        raise Wrong(f"the bundle was made from a closing entry other than {entry.seq}")
    return f"entry {entry.seq} binds the run's files, {entry.hash[:SHORT]}"


def _known_heads(folder: BoundFolder, head: Head | None) -> str:
    """Check that the ledger contains the entries known to the result and to the verifier."""
    entries = folder.entries
    heads = [("the result", Head(*folder.result["ledger_head"]))] + ([("--head", head)] if head else [])
    for source, each in heads:
        if each.seq > len(entries) or each.seq < 1 or entries[each.seq - 1].hash != each.hash:
            raise Wrong(f"the ledger lacks entry {each.seq} of {source}")
    return "the ledger holds " + " and ".join(f"entry {each.seq} of {source}" for source, each in heads)


# --- epsilon ------------------------------------------------------------------------------------------------------


def _epsilon(folder: BoundFolder) -> str:
    """Recompute the result's epsilon against each adversary, and compare it with the budget."""
    head = Head(*folder.result["ledger_head"]) if folder.charged else None
    entries = [each for each in folder.entries if head is None or each.seq <= head.seq]
    book = _book(entries, folder.ledger.name)
    rows = {
        row["adversary"]: row
        for row in folder.result["privacy"]
        if row["unit"] == book.identity["unit"] and row["sampling"] != "none"
    }
    adversaries = _adversaries_of(folder) or set(rows) & set(map(str, book.spent))
    if set(rows) != adversaries:
        fault = f"the adversaries are {', '.join(sorted(rows))} in the result and {', '.join(sorted(adversaries))} on the ledger"
        raise Wrong(fault)
    findings: list[str] = []
    for name, row in sorted(rows.items()):
        adversary, claimed = Adversary(name), float(row["epsilon"])
        granted = book.granted[adversary]
        spent = spent_epsilon(
            book.events(adversary),
            row["delta"],
            Adjacency(row["adjacency"]),
            book.filter_order,
            PUBLISH_INTERVAL,
        )
        if book.filter_order is None and not _is_close(spent, claimed):
            raise Wrong(
                f"epsilon against the {name} is {claimed:.6g} in the result and {spent:.6g} by the ledger"
            )
        if spent > claimed * (1 + SAME):
            fault = f"epsilon {spent:.6g} is spent against the {name}, and {claimed:.6g} is claimed"
            raise Wrong(fault)
        if (row["delta"], row["adjacency"]) != (granted.target_delta, str(granted.adjacency)) and (
            row["delta"] < granted.target_delta or row["adjacency"] != str(granted.adjacency)
        ):
            raise Wrong(f"adjacency or delta against the {name} differs between the result and the budget")
        if claimed > granted.target_epsilon * (1 + SAME):
            fault = (
                f"epsilon {claimed:.6g} against the {name} exceeds the budget {granted.target_epsilon:.6g}"
            )
            raise Wrong(fault)
        limited, limit = granted.target_epsilon < 1e6, f"{granted.target_epsilon:.4g}"
        findings.append(f"{claimed:.4g} of {limit if limited else 'an unlimited budget'} against the {name}")
    if (lost := folder.result.get("record_by_sums")) is not None:
        spent = lost_by_records(book, lost["delta"])
        if spent is None or not _is_close(spent, float(lost["epsilon"])):
            raise Wrong(f"a record has lost {lost['epsilon']} in the result and {spent} by the ledger")
    return f"recomputed and within the budget: {'; '.join(findings)}" if findings else "nothing was released"


def _adversaries_of(folder: BoundFolder) -> set[str]:
    """Return the adversaries of a run's releases; runs on one ledger may differ. Empty for a run that released nothing."""
    releases = (each for each in folder.entries if each.kind == RESERVE and run_of(each) == folder.run)
    return {adversary for each in releases for adversary in json.loads(each.payload)["events"]}


def _is_close(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=SAME, abs_tol=SAME)


def _epsilon_of_rounds(folder: BoundFolder) -> str:
    """Recompute the epsilon in each round's line from the entries up to that round."""
    of_clients = folder.entries and folder.book.identity["unit"] == Unit.CLIENT
    column = "epsilon_client" if of_clients else "epsilon_record"
    snapshots = dict(_after_each_round(folder.entries, folder.manifest.run))
    budget = next(iter(folder.book.granted.values()), None)
    checked, epsilons = 0, {}
    for row in folder.rounds:
        if row["round"] not in snapshots or row[column] is None or budget is None:
            continue
        counts, order = snapshots[row["round"]]
        key = (tuple(sorted(counts.items())), order)
        if key not in epsilons:
            events = [repeated(event_of(text), count) for text, count in counts.items()]
            epsilons[key] = spent_epsilon(events, budget.target_delta, budget.adjacency, order, GATE_INTERVAL)
        if not _is_close(epsilons[key], float(row[column])):
            reason = f"round {row['round']} has epsilon {float(row[column]):.6g}, and the ledger {epsilons[key]:.6g}"
            raise Wrong(reason)
        checked += 1
    if not checked:
        raise NotShown("no round has entries under the last name of the run")
    return f"{checked} of {len(folder.rounds)} rounds recomputed"


def _after_each_round(
    entries: Sequence[Entry], run: str
) -> Iterator[tuple[int, tuple[Counter[str], float | None]]]:
    """Yield (round, events of the adversary `model`, filter's order) after each round and its evaluation."""
    book = LedgerState()
    for entry in entries:
        book.apply(entry)
        if entry.kind not in ("reserve", "commit", "void"):
            continue
        number = round_of(run, run_of(entry), int(json.loads(entry.key)[1]))
        if number is not None:
            events = +book.spent.get(Adversary.MODEL, Counter[str]())
            yield number, (events, book.filter_order)


def _client_ledgers(folder: BoundFolder) -> str:
    """Check that the clients' ledgers match the end of the run and that no record lost more than the result states."""
    heads = folder.manifest.heads
    if not heads:
        draws_batches = any(row["sampling"].startswith(BATCHES) for row in folder.result["privacy"])
        if not draws_batches:
            raise NotShown("the run has none")
        return _ledgers_of_this_machine(folder)
    for name, entries in folder.clients.items():
        head = heads[name]
        if head.seq > len(entries) or entries[head.seq - 1].head != head:
            raise Wrong(f"{name} lacks entry {head.seq} of the manifest")
    largest = _largest_epsilon(each[: heads[name].seq] for name, each in folder.clients.items())
    for claimed in _of_records(folder):
        if not _is_close(largest, claimed):
            raise Wrong(f"the result states {claimed:.6g} for records, and the ledgers give {largest:.6g}")
    return f"{len(folder.clients)} ledgers are correct, epsilon at most {largest:.4g}"


def _ledgers_of_this_machine(folder: BoundFolder) -> str:
    """Check the ledgers of real clients on this machine up to their last entry of the run; those of others stay there."""
    paths = (
        path for path in sorted(_home(folder).glob("*.ledger")) if "-" not in path.stem
    )  # each of one client
    ledgers = [_until_the_end(_entries(path), folder.run) for path in paths]
    ledgers = [entries for entries in ledgers if entries]
    if not ledgers:
        raise NotShown("no ledger of this run's clients is on this machine")
    largest = _largest_epsilon(ledgers)
    for claimed in _of_records(folder):
        if largest > claimed * (1 + SAME):
            raise Wrong(
                f"the result states {claimed:.6g} for records, and a ledger on this machine {largest:.6g}"
            )
    return f"{len(ledgers)} ledgers on this machine are correct, epsilon at most {largest:.4g}"


def _home(folder: BoundFolder) -> Path:
    """Return the folder of this machine's ledgers of real data; a verifier without OmegaConf has the usual one."""
    try:
        configured = read_config(folder.path / CONFIG)[0]
    except ImportError:
        configured = {}
    return ledger_folder("ledger.dir", configured.get("ledger", {}).get("dir"))


def _until_the_end(entries: Sequence[Entry], run: str) -> Sequence[Entry]:
    """Return a ledger's entries up to the last one of a run; none if it has none."""
    return entries[: max((each.seq for each in entries if run_of(each) == run), default=0)]


def _largest_epsilon(ledgers: Iterable[Sequence[Entry]]) -> float:
    """Return the largest epsilon of clients' ledgers, of which those with the same charges are recomputed once."""
    distinct: dict[tuple[str, ...], Sequence[Entry]] = {}
    for entries in ledgers:
        reserved = (each.payload.partition(',"time"')[0] for each in entries if each.kind == RESERVE)
        distinct[tuple(sorted(reserved))] = entries
    verifications = [verify_entries(entries, "a client's ledger") for entries in distinct.values()]
    problem = next((each.problem for each in verifications if not each.ok), None)
    if problem is not None:
        raise Wrong(problem)
    return max((each.epsilon or 0.0 for each in verifications), default=0.0)


def _of_records(folder: BoundFolder) -> list[float]:
    """Return the epsilon that the result states for records that took part."""
    rows = (row for row in folder.result["privacy"] if row["adversary"] == "server")
    return [float(row["epsilon"]) for row in rows if row["sampling"] == PARTICIPATION]


def _receipts(folder: BoundFolder, knowledge: Knowledge) -> str:
    """Check the devices' signatures over this run's description, and compare a device's ledgers with its receipt."""
    if not (folder.path / RECEIPTS).exists():
        is_required = (knowledge.device, knowledge.roster, knowledge.receipts) != (None, None, None)
        if is_required or (folder.bundled and RECEIPTS in folder.listing.files):
            raise Wrong(f"{RECEIPTS} is missing")
        deployed = folder.result.get("rosters")
        raise NotShown(
            "the run has none, or they stay with its operator" if deployed else "no device took part"
        )
    receipts = read_receipts(folder.path)
    if receipts.description.manifest != folder.manifest.hash:
        raise Wrong(f"they belong to another run than {MANIFEST}")
    roster = verify_roster(receipts)
    _require_roster(folder, roster, knowledge.roster)
    _require_in_force(folder, receipts, knowledge)
    authority, authorities = receipts.authority.hex(), _authorities(folder, knowledge)
    is_trusted = bool(authorities & {*knowledge.keys}) or knowledge.roster is not None
    is_required = (
        knowledge.roster is not None
        or knowledge.receipts is not None
        or bool(authorities & {*knowledge.keys} - _signers(folder))
    )
    advice = "" if is_trusted else f"; compare the authority's key, {authority[:SHORT]}"
    opened = ""
    if knowledge.device is not None:
        opened = f"; the ledgers of node {require_opened(receipts, knowledge.device)} match its receipt"
    signed = f"{len(receipts.signed)} of {len(roster.members)} members have signed the run's files"
    finding = f"{signed}, by roster version {roster.version}{opened}"
    shortage = _shortage(folder, receipts, roster, knowledge.receipts)
    if shortage and is_required:
        raise Wrong(f"{finding}; {shortage}")
    if shortage:
        raise NotShown(f"{finding}; {shortage}{advice}")
    if knowledge.roster is None and knowledge.receipts is None:
        raise NotShown(f"{finding}{advice}; an older roster may have fewer: give --roster, or --receipts")
    return f"{finding}{advice}"


def _require_roster(folder: BoundFolder, roster: Roster, expected: str | None) -> None:
    """Require the roster from which the last round was drawn, or one that the authority made of it."""
    if expected is not None and roster.hash.hex() != expected:
        raise Wrong(f"they use roster {roster.hash.hex()}, and --roster is {expected}")
    last = [each["hash"] for each in folder.result.get("rosters", ())][-1:]
    if last and last[0] not in {each.hex() for each in (roster.hash, *roster.earlier)}:
        raise Wrong(f"they use roster version {roster.version}, which was not in force when the run ended")


def _shortage(folder: BoundFolder, receipts: Receipts, roster: Roster, requested: int | None) -> str:
    """Return why the receipts are too few to bind a run; empty if they are enough.

    Who answered in the last round is the server's word. All members are needed, unless the verifier names a number.
    """
    signers = signers_in(receipts, roster, _seconds_of_end(folder))
    minimum = fewest_receipts(roster, (folder.result.get("secagg") or {}).get("colluders_assumed", 0))
    if requested is not None and requested < minimum:
        return f"--receipts {requested} may all collude: name at least {minimum}"
    needed = max(len(roster.members), minimum) if requested is None else requested
    if len(signers) >= needed:
        return ""
    without = sorted(each.node for each in receipts.signed if each.node not in signers)
    unsound = f" (nodes {without} ended, or compared nothing, as in earlier releases)" if without else ""
    fewer = f"; --receipts names fewer, at least {minimum}" if requested is None and minimum < needed else ""
    return f"{needed} are needed, and {len(signers)} count{unsound}{fewer}"


def _seconds_of_end(folder: BoundFolder) -> int:
    """Return the Unix second of the close, or else of the last roster; 0 if the files name neither."""
    try:
        at = json.loads(folder.book.closes[folder.run].payload)["time"]
    except NotShown:
        at = next((each["at"] for each in reversed(folder.result.get("rosters", ()))), None)
    return 0 if at is None else int(datetime.fromisoformat(at).timestamp())


def _witnesses(folder: BoundFolder, knowledge: Knowledge) -> str:
    """Check the co-signatures of the log that holds this manifest."""
    if not (folder.path / WITNESSES).exists():
        raise Wrong(f"{WITNESSES} is missing, and --witness is given")
    receipts = read_receipts(folder.path) if (folder.path / RECEIPTS).exists() else None
    federation = None if receipts is None else receipts.description.federation
    cosignatures = verify_witnesses(folder.path, folder.manifest, federation)
    for key in knowledge.witnesses:
        if key not in cosignatures:
            raise Wrong(f"the witness {key[:SHORT]} has not co-signed the log of this run")
        if key in _authorities(folder, knowledge):
            raise Wrong(f"the witness {key[:SHORT]} is the authority")
    signers = [f"{public[:SHORT]} at {_second(each.at)}" for public, each in sorted(cosignatures.items())]
    advice = "" if knowledge.witnesses else "; compare the keys with those you know, or give --witness"
    return f"the log with this manifest is co-signed by {len(cosignatures)}: {', '.join(signers)}{advice}"


def _second(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _time_stamp(folder: BoundFolder, trusted: Path | None) -> str:
    """Check the time stamp of this manifest against the certificates that the verifier trusts."""
    if not (folder.path / TIME_STAMP).exists():
        raise Wrong(f"{TIME_STAMP} is missing, and --tsa is given")
    if trusted is None:
        raise NotShown("give --tsa with the root certificate of its authority, to check it")
    if find_spec(STAMPS) is None:
        raise NotShown("rfc3161-client is not installed: pip install 'fedveil[timestamps]'")
    at = time_of_stamp((folder.path / TIME_STAMP).read_bytes(), folder.manifest.text.encode(), trusted)
    return f"{MANIFEST} was there at {at.isoformat(timespec='seconds')}, by an authority in {trusted}"


def _blame(folder: BoundFolder, knowledge: Knowledge) -> str:
    """Check the evidence against every member that the run names, with the members' public keys."""
    claims = claims_of(folder.rounds, folder.result.get("blamed") or {})
    if not claims:
        raise NotShown("no member is named")
    if not (folder.path / BLAME).exists() and not _is_open(folder) and BLAME not in folder.manifest.files:
        raise NotShown(
            "members are named without evidence, as in earlier releases: this is the server's word"
        )
    trusted, authorities = {*knowledge.keys} - _signers(folder), _authorities(folder, knowledge)
    keys = trusted | authorities if trusted & authorities or not trusted else trusted
    finding, undecided = require_proved(folder.path, folder.run, claims, folder.result, keys)
    if undecided:
        raise NotShown(f"{finding}; {undecided}")
    if folder.result["data"] != "simulation" and not trusted:
        raise NotShown(f"{finding}, if their keys are the members': give the authority's key with --key")
    return finding


# --- audit and page -----------------------------------------------------------------------------------------------


def _audit(folder: BoundFolder) -> str:
    """Recompute the audit; its canaries must match the commitment on the ledger before round 1."""
    findings = folder.result["audit"]
    if findings is None:
        raise NotShown("the run had none")
    from ...audit.result import audit_fields, recompute_audit  # an extension, which other runs do without

    if folder.bundled and not (folder.path / AUDIT_ROWS).exists():
        if AUDIT_ROWS in folder.listing.files:
            raise Wrong(f"{AUDIT_ROWS} is missing")
        raise NotShown("its rows reveal the number of participants and stay with the operator")
    fields = audit_fields(folder.path)
    if "commitment" in fields and folder.charged:
        _require_commitment(folder, str(fields["commitment"]))
    if fields["terms"]["canaries"] and "opened" not in fields:
        raise NotShown("its canaries are opened when the run ends, and the run may continue")
    if findings.get("verdict") is None and "measured" not in findings:
        raise NotShown(str(findings["said"]))
    recomputation = recompute_audit(folder.path).to_json()
    for name, value in json.loads(json.dumps(recomputation)).items():
        if not _is_alike(value, findings.get(name)):
            raise Wrong(f"its {name} is {value!r} when recomputed, and {findings.get(name)!r} in the result")
    if findings["verdict"] is None:
        unclaimed = findings["said"] == UNCLAIMED
        raise NotShown("it looked at whole clients alone" if unclaimed else str(findings["said"]))
    return f"recomputed: {findings['verdict']}, {findings['said']}"


def _require_commitment(folder: BoundFolder, commitment: str) -> None:
    notes = [
        json.loads(payload)["commitment"]
        for key, payload in folder.book.notes.items()
        if json.loads(key)[::2] == [folder.run, AUDIT_NOTE]
    ]
    if notes != [commitment]:
        raise Wrong("its canaries do not match the ledger's commitment from before the first round")


def _is_alike(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return set(one) == set(other) and all(_is_alike(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_alike, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return _is_close(one, other)
    return one == other


def _page(folder: BoundFolder) -> str:
    """Check that the page is the one that the report makes, and that the report agrees with the result."""
    page, report = folder.path / PAGE, folder.path / REPORT
    if not report.exists() and not page.exists():
        raise NotShown("there is no page; fedveil report makes it")
    if report.exists() != page.exists():
        raise Wrong(f"{(page if report.exists() else report).name} is missing beside the other")

    def bound() -> bool:
        listed = folder.listing.files.get(PAGE) if folder.bundled and read_signatures(folder.path) else None
        return sha256_of(page) in (folder.manifest.files.get(PAGE), listed)

    finding, undecided = require_page(folder.path, folder.result, folder.rounds, bound)
    if undecided:
        raise NotShown(undecided)
    return finding
