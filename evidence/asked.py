"""Content of the report of a folder of answers: each inquiry with its figures, and the ledgers that charged them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.refusal import Refusal
from ..privacy.ledger.book import read_entries, verify
from ..run.files import OF_RECORDS
from ..run.run_files import LEDGER, Fields
from .answers import read_answers
from .ledger_history import questions_on, verified

FORMAT = "fedveil answers 1"


def report_of_answers(folder: Path) -> dict[str, Any]:
    """Return the report of a folder of answers, as JSON; the same folder gives the same bytes.

    Raises:
      Refusal: it holds no answer, or one that cannot be read.
    """
    ledgers = [_ledger(path) for path in ledgers_of(folder)]
    answers = read_answers(folder, [each["name"] for ledger in ledgers for each in ledger["questions"]])
    if not answers:
        raise Refusal("RUN", str(folder), "holds no run and no answer; name the folder of one")
    return {
        "format": FORMAT,
        "answers": answers,
        "answered": sum(each["released"] for each in answers),
        "ledgers": ledgers,
        "missing": _missing(answers, ledgers),
    }


def ledgers_of(folder: Path) -> list[Path]:
    """Return the ledgers in a folder of answers: of questions at the client level, and at the record level."""
    return [path for path in (folder / LEDGER, folder / OF_RECORDS / LEDGER) if path.is_file()]


def _ledger(path: Path) -> dict[str, Any]:
    entries = read_entries(path)
    identity = json.loads(entries[0].payload)
    questions = questions_on(entries)
    return {
        "unit": identity.get("unit"),
        "adjacency": identity.get("adjacency"),
        "simulated": identity.get("simulated"),
        "entries": len(entries),
        "head": {"seq": entries[-1].seq, "hash": entries[-1].hash},
        "verified": verified(verify(path)),
        "releases": sum(each["times"] for each in questions),
        "questions": questions,
    }


def _missing(answers: Sequence[Fields], ledgers: Sequence[Fields]) -> list[str]:
    """Return what the folder cannot show, a sentence each."""
    if not ledgers:
        return [
            "No ledger lies in this folder. What the answers cost is charged where the clients' ledger is kept."
        ]
    told = {each["name"] for each in answers}
    elsewhere = [each["name"] for each in answers if not each["on_this_ledger"]]
    lost = [each["name"] for ledger in ledgers for each in ledger["questions"] if each["name"] not in told]
    found: list[str] = []
    if elsewhere:
        found.append(f"Charged elsewhere: {', '.join(elsewhere)}.")
    if lost:
        found.append(f"Charged, and without an answer here: {', '.join(lost)}.")
    return found
