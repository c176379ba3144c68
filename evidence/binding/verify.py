"""Verification of a run folder or bundle: every hash, signature, entry, epsilon and number, with one line for each check.

Every statement of a bundle is recomputed from its content. No check needs torch, Flower or Hydra. A verifier who does not
trust this program runs `recompute_ledger.py`, which stands alone and is in every bundle of a ledger.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.refusal import Refusal
from ...privacy.audit.summary import UNCLAIMED
from ...privacy.secagg.roster import Roster
from ...run.files import AUDIT_ROWS, MANIFEST, METRICS, RECEIPTS, RESULT, TIME_STAMP, WITNESSES
from ...run.manifest import LATER_FILES, audit_hash, sha256_of
from .blame import check_blame
from .bound_folder import BoundFolder, Knowledge, NotShown, Wrong, is_close
from .bundle import LIST, RECOMPUTE, Contents
from .ledger_checks import (
    check_client_ledgers,
    check_close,
    check_epsilon,
    check_epsilon_of_rounds,
    check_known_heads,
    check_ledger,
)
from .page import check_page
from .receipts import Receipts, fewest_receipts, require_opened, signers_in, verify_roster
from .signatures import FILE as SIGNATURES
from .signatures import SHORT, UNREADABLE, check
from .time_stamp import check_time_stamp
from .witnesses import check_witnesses

AUDIT_NOTE = "audit"  # mechanism of the note that commits to an audit's canaries
BINDS = ("signatures", "close", "receipts")  # checks by which something outside a run's files binds them
FAULTS = (Refusal, ArithmeticError, *UNREADABLE)  # a check that raises one has failed


@dataclass(frozen=True)
class CheckLine:
    """Result of one check."""

    name: str  # of the check
    ok: bool | None  # whether it passed; None if these files cannot decide it
    finding: str  # what was compared, or why the check failed or was left undecided; a clause


def verify_folder(path: Path, knowledge: Knowledge) -> list[CheckLine]:
    """Check a run folder or a bundle; return one line for each check.

    Args:
      path: of a bundle, if it contains a bundle's list, else of a run.
      knowledge: independent knowledge of the verifier.

    Raises:
      Refusal: the run has not ended.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # it logs a line for each order of RDP left out
    bundled = (path / LIST).exists() or (path / SIGNATURES).exists()
    if not bundled and not (path / RESULT).exists() and not (path / MANIFEST).exists():
        remedy = "has not ended, so nothing binds it yet; fedveil verify LEDGER checks what it has spent"
        raise Refusal("run", str(path), remedy)
    folder = BoundFolder(path, bundled, knowledge)
    return [_run_check(name, check, folder) for name, check in _checks_of(folder).items()]


def is_bound(lines: Iterable[CheckLine]) -> bool:
    """Return whether a signature, a ledger or a device's receipt binds the files, so that nobody can replace them all."""
    return any(line.ok for line in lines if line.name in BINDS)


def contents_of(run: Path) -> tuple[Contents, list[CheckLine]]:
    """Return the content of a run's bundle and the results of its verification; refuse a run that fails a check."""
    lines = verify_folder(run, Knowledge())
    for line in lines:
        if line.ok is False:
            raise Refusal("run", str(run), f"check {line.name} failed: {line.finding}")
    folder = BoundFolder(run, bundled=False)
    entries = folder.entries[: folder.ledger_state.closes[folder.run].seq] if folder.has_ledger else []
    return Contents(run, folder.manifest, entries, folder.client_entries), lines


Check = Callable[[BoundFolder], str]  # returns the finding of a check that passes, and raises otherwise


def _checks_of(folder: BoundFolder) -> dict[str, Check]:
    """Return the checks of a folder by name, in the order of their lines."""
    path, knowledge = folder.path, folder.knowledge
    checks: dict[str, Check] = {}
    if folder.bundled:
        checks |= {"files": _check_files, "signatures": _check_signatures}
    checks |= {
        "manifest": _check_manifest,
        "ledger": check_ledger,
        "close": check_close,
        "known head": check_known_heads,
        "epsilon": check_epsilon,
        "epsilon of each round": check_epsilon_of_rounds,
        "client ledgers": check_client_ledgers,
        "receipts": _check_receipts,
        "blame": check_blame,
        "audit": _check_audit,
        "page": check_page,
    }
    if not folder.bundled and not folder.authorities.issuperset(knowledge.keys):
        checks["signatures"] = _check_signatures
    if knowledge.witnesses or (path / WITNESSES).exists():
        checks["witnesses"] = check_witnesses
    if knowledge.time_stamps is not None or (path / TIME_STAMP).exists():
        checks["time stamp"] = check_time_stamp
    return checks


def _run_check(name: str, check: Check, folder: BoundFolder) -> CheckLine:
    """Return the line of a check that passes, stays undecided, or fails, also by an exception of `FAULTS`."""
    try:
        return CheckLine(name, True, check(folder))
    except NotShown as why:
        return CheckLine(name, None, str(why))
    except Wrong as wrong:
        return CheckLine(name, False, str(wrong))
    except FAULTS as problem:
        return CheckLine(name, False, str(problem) or type(problem).__name__)


def _check_files(folder: BoundFolder) -> str:
    """Check that every listed file of a bundle is unchanged, and that there is no other file."""
    names = {path.name for path in folder.path.iterdir()} - {LIST, SIGNATURES}
    digests = folder.listing.files
    for name in sorted(names ^ set(digests)):
        raise Wrong(f"{name} is {'not listed' if name in names else 'missing'}")
    for name, digest in sorted(digests.items()):
        path = folder.path / name
        if path.is_symlink() or not path.is_file() or sha256_of(path) != digest:
            raise Wrong(f"{name} differs from the bundled file")
    finding = f"{len(digests)} files match the bundle's list"
    installed, bundled = Path(__file__).parent / RECOMPUTE, folder.path / RECOMPUTE
    if bundled.is_file() and sha256_of(bundled) != sha256_of(installed):
        return f"{finding}; {RECOMPUTE} is not this installation's: read it before you run it"
    return finding


def _check_signatures(folder: BoundFolder) -> str:
    """Check the signatures over a bundle's list; each key of the verifier must have signed it, or its receipts' roster."""
    if not folder.bundled:
        raise Wrong("a run folder has no signatures; make a bundle of it")
    signatures, keys = folder.signatures, folder.knowledge.keys
    check((folder.path / LIST).read_bytes(), signatures)
    for key in keys:
        if key not in folder.signers | folder.authorities:
            raise Wrong(f"the key {key[:SHORT]} has not signed, nor the roster of {RECEIPTS}")
    if not signatures:
        raise NotShown("there is no signature, so these files may be forged")
    signers = "; ".join(
        f"{each.role}, {each.date}, key {next(iter(each.keys.values()))[:SHORT]}" for each in signatures
    )
    advice = "" if keys else "; compare the keys with those you know, or give --key"
    return f"{signers}{advice}"


def _check_manifest(folder: BoundFolder) -> str:
    """Check that every file of the run matches its manifest, but for LATER_FILES, which may be made again or be missing."""
    if folder.is_resumable:
        status = folder.result["status"]
        raise Wrong(f"the run was {status} and is not bound: resume the run, which closes it")
    manifest, later = folder.manifest, list[str]()
    for name, digest in manifest.files.items():
        path = folder.path / name
        if name == AUDIT_ROWS and folder.bundled and not path.exists():
            continue  # they stay with the operator
        if path.is_file() and digest == (audit_hash(folder.path) if name == AUDIT_ROWS else sha256_of(path)):
            continue
        if name not in LATER_FILES:
            raise Wrong(f"{name} is {'not the file in the manifest' if path.exists() else 'missing'}")
        later.append(name)
    missing = {RESULT, METRICS} - set(manifest.files)
    if missing:
        raise Wrong(f"the manifest lacks {', '.join(sorted(missing))}")
    status = folder.result["status"]
    if manifest.status != status:
        raise Wrong(f"the status is {manifest.status} in the manifest and {status} in the result")
    suffix = f"; made again since: {', '.join(later)}" if later else ""
    return f"{len(manifest.files)} files match the manifest{suffix}"


def _check_receipts(folder: BoundFolder) -> str:
    """Check the devices' signatures over this run's description, and compare a device's ledgers with its receipt.

    Too few fail only where the verifier gives the roster, their number, or an authority's key that did not sign the
    bundle. Enough pass only with one of the first two, since an older roster may have fewer members. Else: undecided.
    """
    knowledge = folder.knowledge
    if not (folder.path / RECEIPTS).exists():
        is_required = (knowledge.device, knowledge.roster, knowledge.receipts) != (None, None, None)
        if is_required or (folder.bundled and RECEIPTS in folder.listing.files):
            raise Wrong(f"{RECEIPTS} is missing")
        if folder.result.get("rosters"):
            raise NotShown("the run has none, or they stay with its operator")
        raise NotShown("no device took part")
    receipts = folder.receipts
    if receipts.description.manifest != folder.manifest.hash:
        raise Wrong(f"they belong to another run than {MANIFEST}")
    roster = verify_roster(receipts)
    _require_roster(folder, roster)
    _require_in_force(folder, receipts)
    finding = f"{len(receipts.signed)} of {len(roster.members)} members have signed the run's files, by roster version {roster.version}"
    if knowledge.device is not None:
        node = require_opened(receipts, knowledge.device)
        finding = f"{finding}; the ledgers of node {node} match its receipt"
    says_who_signs = (knowledge.roster, knowledge.receipts) != (None, None)
    keys_of_authority = folder.authorities & {*knowledge.keys}
    shortage = _shortage(folder, receipts, roster)
    if shortage and (says_who_signs or keys_of_authority - folder.signers):
        raise Wrong(f"{finding}; {shortage}")
    advice = f"; compare the authority's key, {receipts.authority.hex()[:SHORT]}"
    if keys_of_authority or knowledge.roster is not None:
        advice = ""
    if shortage:
        raise NotShown(f"{finding}; {shortage}{advice}")
    if not says_who_signs:
        raise NotShown(f"{finding}{advice}; an older roster may have fewer: give --roster, or --receipts")
    return f"{finding}{advice}"


def _require_roster(folder: BoundFolder, roster: Roster) -> None:
    """Require the roster from which the last round was drawn, or one that the authority made of it."""
    expected = folder.knowledge.roster
    if expected is not None and roster.hash.hex() != expected:
        raise Wrong(f"they use roster {roster.hash.hex()}, and --roster is {expected}")
    rosters = folder.result.get("rosters")
    if rosters and rosters[-1]["hash"] not in {each.hex() for each in (roster.hash, *roster.earlier)}:
        raise Wrong(f"they use roster version {roster.version}, which was not in force when the run ended")


def _require_in_force(folder: BoundFolder, receipts: Receipts) -> None:
    """Require that the authority of the receipts was not replaced, or that the run ended before the overlap did."""
    authority = receipts.authority.hex()
    for chain in (receipts.rollovers, *folder.knowledge.rollovers):
        for rollover in chain:
            if rollover.old == authority and not 0 < folder.seconds_of_end < rollover.until:
                fault = f"the authority {authority[:SHORT]} was replaced, and the run did not end before the overlap with its successor"
                raise Wrong(fault)


def _shortage(folder: BoundFolder, receipts: Receipts, roster: Roster) -> str:
    """Return why the receipts are too few to bind a run; empty if they are enough.

    Who answered in the last round is the server's word. All members are needed, unless the verifier names a number.
    """
    requested = folder.knowledge.receipts
    signers = signers_in(receipts, roster, folder.seconds_of_end)
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


def _check_audit(folder: BoundFolder) -> str:
    """Recompute the audit; its canaries must match the commitment on the ledger before round 1."""
    stated = folder.result["audit"]
    if stated is None:
        raise NotShown("the run had none")
    from ...audit.result import audit_fields, recompute_audit  # an extension, which other runs do without

    if folder.bundled and not (folder.path / AUDIT_ROWS).exists():
        if AUDIT_ROWS in folder.listing.files:
            raise Wrong(f"{AUDIT_ROWS} is missing")
        raise NotShown("its rows reveal the number of participants and stay with the operator")
    fields = audit_fields(folder.path)
    if "commitment" in fields and folder.has_ledger:
        _require_commitment(folder, str(fields["commitment"]))
    if fields["terms"]["canaries"] and "opened" not in fields:
        raise NotShown("its canaries are opened when the run ends, and the run may continue")
    verdict, sentence = stated.get("verdict"), str(stated["said"])
    if verdict is None and "measured" not in stated:
        raise NotShown(sentence)
    recomputed = json.loads(json.dumps(recompute_audit(folder.path).to_json()))
    for name, value in recomputed.items():
        if not _is_alike(value, stated.get(name)):
            raise Wrong(f"its {name} is {value!r} when recomputed, and {stated.get(name)!r} in the result")
    if verdict is None:
        raise NotShown("it looked at whole clients alone" if sentence == UNCLAIMED else sentence)
    return f"recomputed: {verdict}, {sentence}"


def _require_commitment(folder: BoundFolder, commitment: str) -> None:
    """Require that the ledger has one note of the run's audit, made before round 1, with this commitment."""
    notes = [
        json.loads(payload)["commitment"]
        for key, payload in folder.ledger_state.notes.items()
        if json.loads(key)[::2]
        == [folder.run, AUDIT_NOTE]  # of (run, round, mechanism); alarms have other mechanisms
    ]
    if notes != [commitment]:
        raise Wrong("its canaries do not match the ledger's commitment from before the first round")


def _is_alike(one: Any, other: Any) -> bool:
    """Return whether two values of JSON are the same, up to rounding of their numbers."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return set(one) == set(other) and all(_is_alike(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_alike, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return is_close(one, other)
    return one == other
