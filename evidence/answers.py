"""Answers of clients for a report: each question with its purpose and cost, each figure with its interval.

`fedveil ask` keeps the record of an answer, one JSON file for each inquiry. A figure is None if the noise drowns it.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any, cast

from ..base.refusal import Refusal
from ..privacy.budget import UNLIMITED_EPSILON
from ..privacy.ledger.ledger_state import read_entries, verify
from ..privacy.statistics.evaluation import BY_METRIC
from ..privacy.statistics.inquiry import ATTRIBUTION
from ..run.files import OF_RECORDS
from ..run.run_files import LEDGER, Fields
from .ledger_history import describe_verification, questions_on
from .page_text import UNSAID

BINS = "histogram"  # also the kind of an evaluation's clients by metric, whose record names none
OF_COUNTS = ("count", BINS, "crosstable", "top")  # kinds whose figures are drawn from 0 to the largest
OF_SIGNS = ("correlation",)  # from -1 to 1
OF_COLUMNS = "attributions"  # one for each column, and the number of rows
OF_SHARES = ("fairness", "survival", "discrimination")  # from 0 to 1, in percent
EVALUATED = ("round", "epsilon", "noise_multiplier", "clients", "share", "confidence", "reason")
COPIED = (  # fields that a report takes from a record as they are
    "name",
    "purpose",
    "released",
    "unit",
    "adjacency",
    "epsilon",
    "delta",
    "noise_multiplier",
    "epsilon_after",
    "cohort",
    "clients",
    "rng",
    "confidence",
    "message_bytes",
)
FORMAT = "fedveil answers 1"


def read_answers(folder: Path, charged: Sequence[str]) -> list[dict[str, Any]]:
    """Return the answers in a folder of records, in a report's form.

    Args:
      folder: of the records; where there is none, nothing was answered.
      charged: names of the questions on the ledger that is reported, in whose order the answers are; others come last.

    Raises:
      Refusal: a record cannot be read.
    """
    ranks = {name: rank for rank, name in enumerate(charged)}
    answers = [answer for path in sorted(folder.glob("*.json")) for answer in _answer_in(path, ranks)]
    return sorted(answers, key=lambda each: (ranks.get(each["name"], len(ranks)), each["name"]))


def describe_answers(answers: Iterable[Fields], questions: Sequence[Fields] = ()) -> list[dict[str, Any]]:
    """Return answers in a report's form, each with the scale of its charts.

    Args:
      answers: as the record of an inquiry or of an evaluation has them.
      questions: that they answer, in the same order; empty for an evaluation, whose record has none.
    """
    rows: list[dict[str, Any]] = []
    for answer, question in zip(answers, chain(questions, repeat({})), strict=False):
        kind = question.get("kind") or (BINS if answer["name"].startswith(BY_METRIC) else None)
        figures = [_figure(each) for each in answer["figures"]]
        rows.append(
            {
                "name": answer["name"],
                "kind": kind and kind.replace("_", " "),
                "criterion": question.get("criterion") and question["criterion"].replace("_", " "),
                "of": _columns(question),
                "figures": figures,
                "clipped": answer.get("clipped"),
                "scale": scale_of(kind, figures),
                "form": "share" if kind in OF_SHARES else "figure",
            }
        )
    return rows


def _figure(figure: Fields) -> dict[str, Any]:
    """Return a figure in a report's form: with its words only where it has some of its own."""
    words = figure.get("said", UNSAID)
    own = {} if words == UNSAID else {"said": words}
    return {**{name: figure.get(name) for name in ("name", "value", "low", "high")}, **own}


def scale_of(kind: str | None, figures: Sequence[Fields]) -> list[float] | None:
    """Return the ends of the axis for the figures of an answer to a kind of question; None if it has no bars."""
    if kind in OF_SIGNS:
        return [-1.0, 1.0]
    if kind in OF_SHARES:
        return [0.0, 1.0]
    if kind == OF_COLUMNS:  # the number of rows has no bar
        figures = [each for each in figures if each["name"].startswith(ATTRIBUTION)]
    elif kind not in OF_COUNTS:
        return None
    highest = max((each["high"] for each in figures if each["value"] is not None), default=0.0)
    return [0.0, highest] if highest > 0 else None


def describe_evaluations(evaluations: Iterable[Fields]) -> list[dict[str, Any]]:
    """Return clients' evaluations on their own records in a report's form, a row for each round."""
    return [
        {**{name: each.get(name) for name in EVALUATED}, "answers": describe_answers(each["answers"])}
        for each in evaluations
    ]


def _describe(record: Fields, charged: Collection[str]) -> dict[str, Any]:
    """Return the record of an answer in a report's form; `charged` has the names of the questions on its ledger."""
    question: Fields = record["question"]
    target, traffic = record.get("target_epsilon"), record.get("bytes")
    return {
        **{name: record.get(name) for name in COPIED},
        "why": question.get("why") or None,
        "reason": record.get("reason"),
        "bytes": traffic and {**traffic, **{way: sum(traffic[way].values()) for way in ("down", "up")}},
        "against": ", ".join(record["adversaries"]),
        "target_epsilon": target if target is not None and target < UNLIMITED_EPSILON else None,
        "on_this_ledger": record["name"] in charged,
        "answers": describe_answers(record["answers"], question["ask"]),
    }


def _answer_in(path: Path, charged: Collection[str]) -> list[dict[str, Any]]:
    """Return a list of the answer in a JSON file, in a report's form; an empty list for another kind of file."""
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or "question" not in fields:
            return []
        return [_describe(cast("Fields", fields), charged)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        remedy = f"cannot be read as an answer ({type(problem).__name__}: {problem}); restore it"
        raise Refusal("file", str(path), remedy) from None


def _columns(question: Fields) -> str | None:
    """Return the columns of a question as text; None if it is about rows."""
    of = question.get("of")
    columns = list(cast("Mapping[str, Any]", of)) if isinstance(of, Mapping) else [of]
    names = [*columns, question.get("event"), question.get("by"), question.get("label"), question.get("said")]
    return ", ".join(str(each) for each in names if each is not None) or None


def report_of_answers(folder: Path) -> dict[str, Any]:
    """Return the report of a folder of answers, as JSON; the same folder gives the same. Refuse one without answers."""
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
    """Return the state of a ledger and its questions, in a report's form."""
    entries = read_entries(path)
    identity = json.loads(entries[0].payload)
    questions = questions_on(entries)
    return {
        "unit": identity.get("unit"),
        "adjacency": identity.get("adjacency"),
        "simulated": identity.get("simulated"),
        "entries": len(entries),
        "head": {"seq": entries[-1].seq, "hash": entries[-1].hash},
        "verified": describe_verification(verify(path)),
        "releases": sum(each["times"] for each in questions),
        "questions": questions,
    }


def _missing(answers: Sequence[Fields], ledgers: Sequence[Fields]) -> list[str]:
    """Return what the folder cannot show, a sentence each."""
    if not ledgers:
        return [
            "No ledger lies in this folder. What the answers cost is charged where the clients' ledger is kept."
        ]
    answered = {each["name"] for each in answers}
    charged = [each["name"] for ledger in ledgers for each in ledger["questions"]]
    names = {
        "Charged elsewhere": [each["name"] for each in answers if not each["on_this_ledger"]],
        "Charged, and without an answer here": [name for name in charged if name not in answered],
    }
    return [f"{flaw}: {', '.join(each)}." for flaw, each in names.items() if each]
