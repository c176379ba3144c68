"""Blame of a run: the file BLAME of its folder holds the evidence against each member that the run names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.refusal import Refusal
from ...messages.training_order import NEW
from ...privacy.secagg.bindings import attempt_context
from ...privacy.secagg.evidence import convictions, evidence_from
from ...privacy.secagg.refusal import Fault, Refused
from ...privacy.secagg.roster import Roster, read_roster, roster_in
from ...privacy.secagg.transcript import run_number
from ...run.files import BLAME, CONFIG
from ...run.run_files import read_config
from ...server.query_rows import FIRST_ROW, name_of
from .bound_folder import BoundFolder, NotShown
from .receipts import COLLUSION
from .signatures import UNREADABLE

Claim = tuple[int, str, str]  # round, name of the member, fault
UNPROVED = (Refused, Refusal, OverflowError, *UNREADABLE)  # raised by a line that proves nothing


def check_blame(folder: BoundFolder) -> str:
    """Check the evidence against every member that the run names, with the members' public keys."""
    claims = claims_of(folder.rounds, folder.result.get("blamed") or {})
    if not claims:
        raise NotShown("no member is named")
    if not (folder.path / BLAME).exists() and not folder.is_resumable and BLAME not in folder.manifest.files:
        reason = "members are named without evidence, as in earlier releases: this is the server's word"
        raise NotShown(reason)
    # A key of the verifier that did not sign the bundle is an authority's. The authority of the receipts counts with it
    # where the two are one, by rollovers, and also where the verifier knows none.
    trusted = {*folder.knowledge.keys} - folder.signers
    keys = trusted
    if not trusted or trusted & folder.authorities:
        keys = trusted | folder.authorities
    finding = require_proved(folder.path, folder.run, claims, folder.result, keys)
    if folder.result["data"] != "simulation" and not trusted:
        raise NotShown(f"{finding}, if their keys are the members': give the authority's key with --key")
    return finding


def claims_of(rounds: Iterable[Mapping[str, Any]], faults: Mapping[str, Sequence[str]]) -> list[Claim]:
    """Return the claims in the lines of METRICS; refuse them unless `faults` of the result names the same by member."""
    rows = ((row["round"], each) for row in rounds for each in (row, row.get("evaluation") or {}))
    claims = [(number, name, fault) for number, row in rows for name, fault in row.get("blamed", {}).items()]
    for name in {*faults, *(name for _, name, _ in claims)}:
        if sorted(faults.get(name, ())) != sorted(fault for _, member, fault in claims if member == name):
            raise Refusal("blamed", name, "is not named alike in the rounds and in the result")
    return claims


def require_proved(
    folder: Path, run: str, claims: Sequence[Claim], result: Mapping[str, Any], keys: Collection[str]
) -> str:
    """Check that BLAME proves every claim, and return a clause on it.

    A line that cannot be read, as after a crash, or that proves nothing counts as none.

    Args:
      folder: of the run.
      run: its name.
      claims: see `claims_of`.
      result: of the run.
      keys: public keys in hexadecimal, one of which must have signed the roster; none if nobody knows the authority's.

    Raises:
      NotShown: a claim depends on how many members may collude, which cannot be read without OmegaConf.
      Refusal: a claim has no evidence, or none that proves it.
    """
    path, configured = folder / BLAME, _collusion(folder)
    collusion = 1.0 if configured is None else configured  # then no number of complaints proves a bad deal
    roster_hashes = {each["hash"] for each in result.get("rosters") or ()}
    proofs: dict[bytes, Counter[Claim]] = {}
    flaws: list[str] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            context, line_claims = _proof(line, run, roster_hashes, keys, collusion)
            proofs.setdefault(context, line_claims)  # a copy of one attempt proves nothing more
        except UNPROVED as problem:
            flaws.append(str(problem))
    missing = Counter(claims) - sum(proofs.values(), Counter[Claim]())
    for number, name, fault in missing:
        if configured is None and fault == Fault.BAD_DEAL:
            continue
        reason = f"{fault}, says round {number}, and nothing in {BLAME} proves it"
        raise Refusal("blamed", name, f"{reason} ({flaws[0]})" if flaws else reason)
    finding = f"{len(claims) - missing.total()} faults are proved by what members signed"
    if missing:
        raise NotShown(f"{finding}; how many may collude is in {CONFIG}, which needs OmegaConf")
    return finding


def _proof(
    line: bytes, run: str, roster_hashes: Collection[str], keys: Collection[str], collusion: float
) -> tuple[bytes, Counter[Claim]]:
    """Return the context of a line's attempt, and the claims that it proves, each once.

    Raises:
      Refusal: the line is of another run or round, or its roster was not in force or not signed by the authority.
    """
    row = json.loads(line)
    roster = _roster(bytes.fromhex(row["roster"]), keys)
    if roster_hashes and roster.hash.hex() not in roster_hashes:
        raise Refusal("blamed", f"roster version {roster.version}", "was not in force in the run")
    evidence = evidence_from(row)
    faults = convictions(evidence, roster, collusion)
    terms, number = evidence.proposal.terms, int(row["round"])
    # A crash may have lost rows of the ledger, so that the round is an earlier one than its row.
    ours = _of_this_run(row["run"], run) and terms.run == run_number(row["run"])
    if not ours or number > terms.round % FIRST_ROW:
        raise Refusal("blamed", f"round {number}", f"is not the one that its evidence in {BLAME} is of")
    context = attempt_context(terms, evidence.proposal.candidates, evidence.proposal.server_key)
    return context, Counter({(number, roster.name_of(node), str(fault)): 1 for node, fault in faults})


def _of_this_run(name: str, run: str) -> bool:
    """Return whether a name is that of a run or its evaluations; a deployed run has a new one after each restart."""
    stem, separator, _ = run.partition(NEW)
    return name in (run, name_of(run)) or (bool(separator) and name.startswith(stem + NEW))


def _collusion(folder: Path) -> float | None:
    """Return the share of members that may collude, at least the default, whatever the server wrote.

    It is None without OmegaConf, which reads the configuration.
    """
    try:
        return max(float(read_config(folder / CONFIG)[0]["secagg"]["collusion"]), COLLUSION)
    except ImportError:
        return None


def _roster(signed: bytes, keys: Collection[str]) -> Roster:
    """Return the roster in a line, which one of these keys must have signed, if there are any."""
    if not keys:
        return roster_in(signed)
    for key in keys:
        try:
            return read_roster(signed, bytes.fromhex(key))
        except Refused:
            continue
    raise Refusal("blamed", "roster", f"of the evidence in {BLAME} is not signed by the authority")
