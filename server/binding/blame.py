"""Blame of a run: the file BLAME of its folder holds the evidence against each member that the run names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...privacy.ledger.durable_files import append_line
from ...privacy.refusal import Refusal
from ...privacy.secagg.evidence import AttemptEvidence, convicted, evidence_from
from ...privacy.secagg.refusal import Refused
from ...privacy.secagg.roster import Roster, read_roster, roster_in, write_roster
from ...privacy.secagg.transcript import run_number
from ...reports.files import BLAME, CONFIG
from ...reports.run_files import read_config
from ...strategies.training_order import NEW
from ..evaluations import FIRST_ROW, name_of
from ..masking import Masking

Claim = tuple[int, str, str]  # round, name of the member, fault


def evidence_rows(
    evidence: Iterable[AttemptEvidence], run: str, number: int, masking: Masking
) -> Iterator[dict[str, Any]]:
    """Yield the lines of a round's attempts.

    Args:
      evidence: of each attempt.
      run: its name in the terms of these attempts.
      number: of the round.
      masking: with the roster; where nobody has signed it, as in a simulation, a key that is thrown away does.
    """
    for each in evidence:
        roster = masking.signed_roster or write_roster(masking.roster, Ed25519PrivateKey.generate())
        yield {"run": run, "round": number % FIRST_ROW, "roster": roster.hex(), **each.to_json()}


def note_evidence(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append lines to a run's evidence.

    Raises:
      OSError: the folder cannot be written.
    """
    for row in rows:
        append_line(folder / BLAME, row)


def claims_of(rounds: Iterable[Mapping[str, Any]], named: Mapping[str, Sequence[str]]) -> list[Claim]:
    """Return whom the lines of METRICS name, and for what.

    Args:
      rounds: the lines.
      named: whom the result names, by name.

    Raises:
      Refusal: the two differ.
    """
    told = ((row["round"], each) for row in rounds for each in (row, row.get("evaluation") or {}))
    claims = [(number, name, fault) for number, row in told for name, fault in row.get("blamed", {}).items()]
    for name in {*named, *(name for _, name, _ in claims)}:
        if sorted(named.get(name, ())) != sorted(fault for _, who, fault in claims if who == name):
            raise Refusal("blamed", name, "is not named alike in the rounds and in the result")
    return claims


def require_proved(
    folder: Path, run: str, claims: Sequence[Claim], result: Mapping[str, Any], keys: Iterable[str]
) -> str:
    """Return a clause that says how the evidence proves every claim.

    Args:
      folder: of the run.
      run: its name.
      claims: see `claims_of`.
      result: of the run.
      keys: public keys in hexadecimal, one of which may be the authority's.

    Raises:
      Refusal: a claim has no evidence, or none that proves it.
    """
    path, simulated = folder / BLAME, result["data"] == "simulation"
    known = {each["hash"] for each in result.get("rosters") or ()}
    collusion = _collusion(folder)
    found: set[Claim] = set()
    vouched = True
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        try:
            roster, signed = _roster(bytes.fromhex(row["roster"]), keys)
            if not simulated and roster.hash.hex() not in known:
                raise Refusal("blamed", f"roster version {roster.version}", "was not in force in the run")
            evidence = evidence_from(row)
            told = convicted(evidence, roster, collusion)
        except Refused as refused:
            raise Refusal("blamed", BLAME, f"holds evidence that proves nothing ({refused})") from None
        terms = evidence.proposal.terms
        # A crash may have lost rows of the ledger, so that the round is an earlier one than its row.
        ours = _of_this_run(row["run"], run) and terms.run == run_number(row["run"])
        if not ours or row["round"] > terms.round % FIRST_ROW:
            raise Refusal(
                "blamed", f"round {row['round']}", f"is not the one that its evidence in {BLAME} is of"
            )
        vouched &= signed or simulated
        found |= {(row["round"], roster.name_of(node), str(fault)) for node, fault in told}
    for number, name, fault in claims:
        if (number, name, fault) not in found:
            why = f"{fault}, says round {number}, and nothing in {BLAME} proves it"
            raise Refusal("blamed", name, why)
    beware = "" if vouched else "; compare the authority's key, or give --key"
    return f"{len(claims)} faults are proved by what members signed{beware}"


def _of_this_run(name: str, run: str) -> bool:
    """Return whether a name is that of a run or its evaluations; a deployed run has a new one after each restart."""
    given, new, _ = run.partition(NEW)
    return name in (run, name_of(run)) or (bool(new) and name.startswith(given + NEW))


def _collusion(folder: Path) -> float:
    """Return the assumed collusion; for a verifier without OmegaConf all, so that complaints alone convict nobody."""
    try:
        return float(read_config(folder / CONFIG)[0]["secagg"]["collusion"])
    except ImportError:
        return 1.0


def _roster(signed: bytes, keys: Iterable[str]) -> tuple[Roster, bool]:
    """Return the roster in a line, and whether one of these keys has signed it."""
    for key in filter(None, keys):
        try:
            return read_roster(signed, bytes.fromhex(key)), True
        except (Refused, ValueError):
            continue
    return roster_in(signed), False
