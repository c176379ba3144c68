"""Verb `fedveil verify`: checks of a bundle, a run folder, a ledger or a folder of ledgers, from its files alone."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..base.refusal import Refusal
from ..run.files import CONFIG, MANIFEST, OF_ANSWERS, PAGE, REPORT, RESULT
from .grammar import Head, Json, app, argument, option, verb
from .ledger import head_of, ledgers_in, verify_ledger

if TYPE_CHECKING:
    from ..evidence.binding.verify import CheckLine
    from ..privacy.ledger.hash_chain import Head as EntryHead

WRONG, UNBOUND = 2, 6  # exit codes
UNBOUND_WORDS = (
    "no ledger, signature or receipt binds these files, so whoever holds them may have written all of them; make a "
    "bundle that is signed, by fedveil report bundle RUN --key KEY"
)
# Sign and word in ASCII by the result of a check; None is that of one that could not be made.
MARKS = {True: ("\u2713", "ok"), False: ("\u2717", "FAILED"), None: ("\u2013", "-")}


@verb(app, "verify", "Check a run, a bundle or ledgers.", panel="Prove")
def verify(
    path: Annotated[Path, argument("PATH", "A bundle, a run folder, a ledger, or a folder of ledgers.")],
    keys: Annotated[
        list[str] | None,
        option(
            "PUB",
            "Public key of a required signer or of the authority (or its rollovers.json): file or hex.",
            "--key",
        ),
    ] = None,
    head: Head = None,
    device: Annotated[
        Path | None, option("FOLDER", "State folder of a device, to compare its ledgers with its receipt.")
    ] = None,
    roster: Annotated[
        str | None, option("HASH", "Hash of the roster whose members gave the receipts.")
    ] = None,
    receipts: Annotated[
        int | None,
        option("N", "Receipts needed, above the number of assumed colluders; of all members by default."),
    ] = None,
    witnesses: Annotated[
        list[str] | None,
        option("PUB", "Public key that must have co-signed the server's log: a file, or hex.", "--witness"),
    ] = None,
    tsa: Annotated[
        Path | None,
        option("FILE", "Root certificate, in PEM, of the authority of the run's time stamp.", "--tsa"),
    ] = None,
    as_json: Json = False,
) -> int:
    """Check signatures, hashes, every ledger entry, every epsilon, the audit's verdict and every number of the page.

    Example:
      fedveil verify bundle --key federation.key.pub
      fedveil verify runs/2026-01-31/12-00-00

    Exit codes: 0 no check failed, and a ledger, a signature or receipts bind the run; 2 a check failed, which is named,
    or refused; 6 no check failed, but nothing binds the run.
    """
    from ..evidence.binding.bound_folder import Knowledge
    from ..evidence.binding.bundle import LIST
    from ..evidence.binding.signatures import FILE as SIGNATURES
    from ..evidence.binding.signatures import read_public, read_rollovers
    from ..evidence.binding.verify import is_bound, verify_folder
    from ..run.display import hanging

    if not path.exists():
        remedy = "does not exist; name a run folder, a bundle, a ledger or a folder of ledgers"
        raise Refusal("PATH", str(path), remedy)
    if roster is not None and not re.fullmatch("[0-9a-f]{64}", roster := roster.lower()):
        text = "is not 64 hexadecimal digits, as fedveil client roster prints them"
        raise Refusal("--roster", roster, text)
    keys, witnesses = keys or [], witnesses or []
    chains = [read_rollovers(each) for each in keys]  # () of a key that is no file of rollovers
    public = tuple(
        chain[-1].new if chain else read_public(key) for key, chain in zip(keys, chains, strict=True)
    )
    rollovers, witness_keys = tuple(filter(None, chains)), tuple(map(read_public, witnesses))
    ledger_head = head_of(*head) if head else None
    knowledge = Knowledge(public, ledger_head, device, roster, receipts, rollovers, witness_keys, tsa)
    if path.is_dir() and any((path / name).exists() for name in (LIST, SIGNATURES, MANIFEST, RESULT, CONFIG)):
        lines = verify_folder(path, knowledge)
        bound = is_bound(lines)
    else:
        if keys:
            raise Refusal("--key", keys[0], "a ledger is not signed; give the folder of a bundle")
        options = {"--device": device, "--roster": roster, "--receipts": receipts}
        options |= {"--witness": witnesses or None, "--tsa": tsa}
        for name, value in options.items():
            if value is not None:
                remedy = "is of a run, and not of a ledger; give the folder of a run"
                raise Refusal(name, str(value), remedy)
        lines = [*_answers(path), *(_ledger(each, path, ledger_head) for each in ledgers_in(path))]
        bound = True  # by the ledgers themselves
    ok = all(line.ok is not False for line in lines)
    code = WRONG if not ok else 0 if bound else UNBOUND
    if as_json:
        checks = [{"name": line.name, "ok": line.ok, "said": line.finding} for line in lines]
        print(json.dumps({"ok": ok, "bound": bound, "checks": checks}))
        return code
    for line in lines:
        print(hanging(f"{_mark(line.ok)} ", f"{line.name}: {line.finding}"))
    print(hanging(f"{path}: ", _count_checks(lines)))
    if code == UNBOUND:
        print(hanging(f"{path}: ", UNBOUND_WORDS))
    return code


def _count_checks(lines: Sequence[CheckLine]) -> str:
    """Return the numbers of checks that failed, passed and could not be made; all but those that passed are named."""
    names = {ok: [line.name for line in lines if line.ok is ok] for ok in (True, False, None)}
    failed, open_ = (", ".join(names[ok]) for ok in (False, None))
    counts = [f"{len(names[False])} failed: {failed}"] if failed else []
    counts.append(f"{len(names[True])} passed")
    counts += [f"{len(names[None])} could not be made: {open_}"] if open_ else []
    return "; ".join(counts)


def _mark(ok: bool | None) -> str:
    """Return the sign of a check's result, or its word on a terminal that cannot print the sign."""
    sign, word = MARKS[ok]
    try:
        sign.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return word
    return sign


def _answers(folder: Path) -> Iterator[CheckLine]:
    """Yield the check that the page and the report of a folder of answers match the answers; none without a page."""
    from ..evidence.answers import report_of_answers
    from ..evidence.binding.page import ANOTHER, UNMADE, page_again, require_values
    from ..evidence.binding.verify import FAULTS, CheckLine

    page, report = (folder / OF_ANSWERS / name for name in (PAGE, REPORT))
    if not page.exists() and not report.exists():
        return
    try:
        html, fields = page.read_bytes().decode(), json.loads(report.read_bytes())
        count, expected = require_values(html, fields), page_again(fields)  # None if it cannot be made here
        if fields != report_of_answers(folder):
            raise ValueError(f"{REPORT} differs from the answers and their ledger; make it again")
        if expected not in (html, None):
            raise ValueError(ANOTHER)
        ok = True if expected else None
        finding = f"{count} values match the answers{'' if ok else f'; {UNMADE}'}"
    except FAULTS as problem:
        ok, finding = False, str(problem) or type(problem).__name__
    yield CheckLine("page", ok, finding)


def _ledger(path: Path, root: Path, head: EntryHead | None) -> CheckLine:
    """Return the check of one ledger, named by its path below `root`."""
    from ..evidence.binding.verify import CheckLine

    verification = verify_ledger(path, head)
    name = path.name if path == root else str(path.relative_to(root))
    if verification.problem:
        return CheckLine(name, False, verification.problem)
    spent = "nothing was released"
    if verification.delta is not None and verification.epsilon is not None:
        spent = f"epsilon {verification.epsilon:.4g} at delta {verification.delta:.3g}"
    return CheckLine(name, True, f"{verification.entries} entries, every hash is correct; {spent}")
