"""Forms that people sign: NIST SP 800-226, GDPR article 35(7), EU AI Act annex IV and article 27(1).

Items that follow from the run are filled in. Items that only the organisation can answer are fields of
`assessment.yaml`, empty at first. A completed form is no statement of legal compliance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.bounded_decoding import format_number
from ..base.refusal import Refusal, real
from ..run.files import ASSESSMENT
from ..run.run_files import Assessment, Fields
from .page_text import text_of

MAX_ANSWER = 4000  # characters of one answer, so that the page stays a page


@dataclass(frozen=True)
class Item:
    """Item of a form."""

    field: str  # of the answer in `assessment.yaml`
    form: str  # title of the form
    number: str  # of the item in it, such as "(a)"
    asks: str  # what the item demands


GDPR, ANNEX, RIGHTS = "GDPR, article 35(7)", "EU AI Act, annex IV", "EU AI Act, article 27(1)"
QUESTIONS = {  # demands of a form by their numbers; by the form and the begin of its fields' names
    (GDPR, "gdpr_35_7"): {
        "a": "Description of the processing, its purposes, and the legitimate interest if any",
        "b": "Necessity and proportionality of the processing in relation to the purposes",
        "c": "Risks to the rights and freedoms of the people whose data these are",
        "d": "Measures against the risks, with safeguards and security",
    },
    (ANNEX, "ai_annex_iv"): {
        "1": "General description: intended purpose, provider, versions, hardware",
        "2": "Elements and development: methods, design, data, oversight, validation, security",
        "3": "Monitoring, functioning and control: capabilities, limits, foreseeable harm",
        "4": "Appropriateness of the performance metrics",
        "5": "Risk management system of article 9",
        "6": "Changes made through the lifecycle",
        "7": "Harmonised standards applied, or the solutions in their place",
        "8": "EU declaration of conformity",
        "9": "Post-market monitoring, with the plan of article 72",
    },
    (RIGHTS, "ai_27_1"): {
        "a": "The deployer's processes in which the system is used",
        "b": "Period of time and frequency of use",
        "c": "Categories of people and groups likely to be affected",
        "d": "Specific risks of harm to them",
        "e": "Measures of human oversight",
        "f": "Measures if risks materialise: governance and complaints",
    },
}
ITEMS = tuple(
    Item(f"{prefix}_{number}", form, number if number.isdigit() else f"({number})", asks)
    for (form, prefix), items in QUESTIONS.items()
    for number, asks in items.items()
)
FIELDS = tuple(each.field for each in ITEMS)
WATTS, CARBON, KWH = "watts_of_core", "grams_co2_of_kwh", "price_of_kwh"
GIGABYTE, NETWORK = "price_of_gigabyte", "joules_of_gigabyte"
PRICES = {  # prices and powers by their fields
    WATTS: "Power of one busy core of the machine, in watts",
    CARBON: "Carbon dioxide of its electricity, in grams for a kilowatt hour",
    KWH: "Price of a kilowatt hour",
    GIGABYTE: "Price of a gigabyte that is sent or received, in the same currency",
    NETWORK: "Energy of the network for a gigabyte, in joules",
}
HEADER = """\
# What only the organisation knows, for the forms on the page of this run. Answer between the quotes, or with a block
# (field: |), and make the report again. An empty answer stays an empty field that the page counts.
"""


def empty_assessment() -> str:
    """Return the text of an `assessment.yaml` without answers."""
    lines = [f"# {each.form} {each.number}: {each.asks}\n{each.field}: ''\n" for each in ITEMS]
    lines += [f"# {asks}; a number\n{name}:\n" for name, asks in PRICES.items()]
    return HEADER + "\n" + "\n".join(lines)


def read_assessment(path: Path) -> Assessment:
    """Return the answers of an `assessment.yaml`, without the empty ones; none without the file.

    Raises:
      Refusal: it cannot be read, names an unknown field, an answer is no text, or a price no number of at least 0.
    """
    if not path.is_file():
        return Assessment()
    import yaml

    from ..configs.yaml_guard import check_file

    check_file(path)
    fields: Any = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    if not isinstance(fields, dict):
        remedy = "holds no fields; start from the file that fedveil report writes"
        raise Refusal(ASSESSMENT, str(path), remedy)
    values = {name: value for name, value in fields.items() if value is not None}
    answers = {name: _answer(name, value) for name, value in values.items() if name not in PRICES}
    prices = {name: _price(name, values[name]) for name in PRICES if name in values}
    return Assessment({name: answer for name, answer in answers.items() if answer}, prices)


def _answer(name: str, value: object) -> str:
    """Return the answer in a field of an `assessment.yaml`; refuse an unknown field, or what is no short text."""
    if name not in FIELDS:
        raise Refusal(ASSESSMENT, name, f"is not a field; use {', '.join((*FIELDS, *PRICES))}")
    if not isinstance(value, str):
        raise Refusal(f"{ASSESSMENT} {name}", value, "give text, in quotes")
    if len(value) > MAX_ANSWER:
        raise Refusal(f"{ASSESSMENT} {name}", f"{value[:20]}...", f"give at most {MAX_ANSWER} characters")
    return value.strip()


def _price(name: str, value: object) -> float:
    """Return the price or power in a field of an `assessment.yaml`; refuse what is no number of at least 0."""
    price = real(f"{ASSESSMENT} {name}", value)
    if price < 0:
        raise Refusal(f"{ASSESSMENT} {name}", value, "give a number of at least 0")
    return price


def forms(answers: Mapping[str, str], run_facts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the forms, each with its items: facts of the run, and answers of the organisation.

    Args:
      answers: of the organisation, by field.
      run_facts: the run's, by field.
    """
    return [
        {
            "form": form,
            "items": [
                {
                    "number": each.number,
                    "asks": each.asks,
                    "field": each.field,
                    "run": run_facts.get(each.field),
                    "organisation": answers.get(each.field),
                }
                for each in ITEMS
                if each.form == form
            ],
        }
        for form in (GDPR, ANNEX, RIGHTS)
    ]


def count_items(filled: Sequence[Fields]) -> dict[str, int]:
    """Return how many items there are, and how many the run fills, the organisation answers or leaves empty."""
    items = [item for form in filled for item in form["items"]]
    answered = sum(item["organisation"] is not None for item in items)
    return {
        "items": len(items),
        "run": sum(item["run"] is not None for item in items),
        "organisation": answered,
        "empty": len(items) - answered,
    }


def facts_of_run(report: Fields) -> dict[str, str]:
    """Return a run's facts for the forms' items, a few sentences each, by field."""
    run, stamps, promise = report["run"], report["stamps"], " ".join(report["promise"])
    software = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    clients = "clients" if run["clients"] is None else f"{run['clients']} clients"
    storage = "This is a simulation: one machine held all records"
    if run["deployed"]:
        storage = "Their records stayed at the clients"
    description = (
        f"A model for the task {run['task']} was trained by federated learning over {clients}. {storage}; the table of "
        "guarantees bounds what others may learn from their updates."
    )
    measured = _measured(stamps)
    limits = "; ".join(
        each["limit"].lower() for each in report["not_covered"] if each["state"] == "not covered"
    )
    metrics, names = _metrics(report), ", ".join(each["name"] for each in report["metrics"])
    quality = f"On held-out data: {metrics}." if metrics else "No metric was computed on held-out data."
    return {
        "gdpr_35_7_a": description,
        "gdpr_35_7_c": f"{promise} {measured} Not covered: {limits}.",
        "gdpr_35_7_d": f"{_mechanism(report)} {_bounded(report)}",
        "ai_annex_iv_1": f"Task {run['task']}, model of {run['parameters'] or 'unknown'} parameters. Software: {software}.",
        "ai_annex_iv_2": f"{_mechanism(report)} The configuration, the seeds and the commands are in the last part. {quality}",
        "ai_annex_iv_3": f"{quality} {_groups(report)} Noise tends to cost small groups most (arXiv:1905.12101).",
        "ai_annex_iv_4": f"Metrics that were computed: {names or 'none'}.",
        "ai_annex_iv_6": _changes(report),
        "ai_27_1_d": f"Leakage of one unit's contribution: {promise} {measured}",
    }


def _metrics(report: Fields) -> str:
    """Return the metrics on held-out data with their values as text; empty without any."""
    return ", ".join(f"{each['name']} {each['value']:.4g}" for each in report["metrics"])


def _measured(stamps: Fields) -> str:
    """Return a sentence on the measured leakage, or why none was measured."""
    measurement: Fields | None = stamps["measured"]
    if measurement is None:
        return f"No leak was measured: {stamps['said']}."
    size, low, high = (format_number(measurement[name], ".2f") for name in ("epsilon", "low", "high"))
    return f"An attack with canaries measured epsilon {size}, between {low} and {high}: {stamps['verdict']}."


def _mechanism(report: Fields) -> str:
    """Return a sentence with the mechanisms of the guarantees."""
    kinds = dict.fromkeys(row["mechanism"] for row in report["privacy"] if row["mechanism"] != "none")
    if not report["privacy"]:
        return "Nothing has been released yet."
    if not kinds:
        return "No noise was added."
    return "Differential privacy: " + "; ".join(kinds) + "."


def _bounded(report: Fields) -> str:
    """Return a sentence on how releases are charged."""
    ledger = report["ledger"]
    if ledger is None:
        return "Every release is charged on the ledgers of its owners before it leaves."
    return f"Every release is charged before it leaves, on a ledger of {ledger['entries']} entries in a chain of hashes."


def _changes(report: Fields) -> str:
    """Return a sentence on the other runs and questions on the same data."""
    ledger = report["ledger"]
    if ledger is None:
        return "Earlier runs on the same data are on ledgers that are not in this folder."
    runs = sum(not each["question"] for each in ledger["runs"])
    questions = len(ledger["runs"]) - runs
    contents = f"{runs} run{'s' * (runs != 1)}"
    if questions:
        contents += f" and {questions} question{'s' * (questions != 1)}"
    return f"The ledger holds {contents} on these data, with their times and their costs."


def _groups(report: Fields) -> str:
    """Return a sentence about the availability of figures by group."""
    sources = ["by a figure of each on public held-out data"] if report["groups"] else []
    kinds = {answer["kind"] for each in report["answers"] for answer in each["answers"]}
    sources += ["by questions to the clients"] if "fairness" in kinds else []
    return f"Groups were measured {' and '.join(sources)}." if sources else "Groups were not measured."


def _checked(ledger: Fields | None) -> str:
    """Return a sentence on the verification of the ledger."""
    if ledger is None:
        return "There is no ledger of all clients in this folder."
    if ledger["verified"]["ok"]:
        return "The ledger's hashes and recomputed epsilon are correct."
    return f"The ledger is not correct: {ledger['verified']['problem']}."


def nist_blocks(report: Fields) -> list[dict[str, Any]]:
    """Return the blocks of NIST SP 800-226's pyramid, from its top down, each with this run's facts and who must answer."""
    by_unit: dict[str, Fields] = {}  # the first row of each unit that is hidden
    for row in report["privacy"]:
        if row["epsilon"] != "infinity":
            by_unit.setdefault(row["unit"], row)
    nothing = "There is no guarantee." if report["privacy"] else "Known after the first round."
    epsilons, units = list[str](), list[str]()
    for unit, row in by_unit.items():
        name = text_of(unit, "unit")
        epsilon = f"{text_of(row['epsilon'], 'epsilon')} at delta {text_of(row['delta'])}"
        epsilons.append(f"{epsilon} for one {name}" if len(by_unit) > 1 else epsilon)
        units.append(f"One {name}: {row['hides']}; neighbours by {row['adjacency']}.")
    finding = report["stamps"]["said"]
    relies = dict.fromkeys(row["relies_on"] for row in report["privacy"] if row["relies_on"])
    trust = "There are no assumptions, because there is no guarantee."
    if relies:
        trust = "Relies on " + "; on ".join(relies) + "."
    elif not report["privacy"]:
        trust = f"There are no assumptions yet. {nothing}"
    bound = f"At most {', and '.join(epsilons)}." if epsilons else nothing
    quality = f"Held-out metrics: {_metrics(report) or 'none computed'}. {_groups(report)}"
    access = (
        "The files with public read access are known. fedveil does not know who has access to the machines."
    )
    mine, yours = "this run", "the organisation"
    return [
        {"block": block, "says": sentence, "who": author, "where": where}
        for block, sentence, author, where in (
            ("Epsilon", bound, mine, "stamps"),
            ("Unit of privacy", " ".join(units) or nothing, mine, "promise"),
            ("Algorithms", f"{_mechanism(report)} {_checked(report['ledger'])}", mine, "ledger"),
            ("Utility and bias", quality, mine, "scientist"),
            ("Correct implementation", f"{finding[:1].upper()}{finding[1:]}.", mine, "scientist"),
            ("Trust model", trust, mine, "promise"),
            ("Security and access control", access, yours, "forms"),
            (
                "Data collection exposure",
                "fedveil does not know how the records were collected.",
                yours,
                "forms",
            ),
        )
    ]
