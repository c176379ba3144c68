"""Golden report of a run that is kept: the same run gives the same bytes.

Where a report is changed on purpose, `python tests/evidence/test_page.py` writes the golden files anew.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from fedveil.evidence.answers import report_of_answers
from fedveil.evidence.content import report_of, to_json
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import differences, references
from fedveil.run.run_files import Assessment, read_run

KEPT = Path(__file__).parents[1] / "fixtures" / "reported_run"
GOLDEN = KEPT / "golden"
ASKED = KEPT.with_name("asked_questions")
COMMANDS = ("fedveil simulate task=digits audit=full audit.looks=3 num_rounds=6", "fedveil report RUN")
ANSWERS = Assessment({"gdpr_35_7_b": "Digits are read by a <b>machine</b>, because nobody else wants to."})


def made() -> dict[str, Any]:
    return report_of(read_run(KEPT, ANSWERS), COMMANDS)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return made()


def test_the_same_run_gives_the_same_bytes(report: dict[str, Any]) -> None:
    assert to_json(report) == (GOLDEN / "report.json").read_text()
    assert page_of(report) == (GOLDEN / "report.html").read_text()


def test_the_same_answers_give_the_same_bytes() -> None:
    report = report_of_answers(ASKED)
    page = page_of(report)
    assert to_json(report) == (ASKED / "golden" / "report.json").read_text()
    assert page == (ASKED / "golden" / "report.html").read_text() == page_of(json.loads(to_json(report)))
    assert differences(page, report) == [] and len(references(page)) > 150
    shown = {each.pointer: each.text for each in references(page)}
    assert shown["/answers/0/answers/0/figures/2/value"] == "cannot be said"
    assert shown["/answers/0/epsilon"] == "1.00" and shown["/answers/0/answers/0/figures/0/low"] == "57 %"
    for outside in ("<script", "http://", "https://", "<link", "<img", "@import", "url("):
        assert outside not in page, outside


def test_page_follows_from_the_json_alone(report: dict[str, Any]) -> None:
    assert page_of(json.loads(to_json(report))) == page_of(report)


def test_page_shows_the_values_of_the_json(report: dict[str, Any]) -> None:
    page = page_of(report)
    assert differences(page, report) == []
    assert len(references(page)) > 300
    assert len(page.encode()) < 300_000
    for outside in ("<script", "http://", "https://", "<link", "<img", "@import", "url("):
        assert outside not in page, outside


def test_the_page_tells_the_whole_story(report: dict[str, Any]) -> None:
    shown = {each.pointer for each in references(page_of(report))}
    for pointer in (
        "/stamps/claimed/epsilon",
        "/stamps/measured/low",
        "/stamps/ceiling",
        "/promise/0",
        "/promise/1",
    ):
        assert pointer in shown
    every = [
        *(f"/not_covered/{place}/said" for place in range(len(report["not_covered"]))),
        *(f"/nist/{place}/says" for place in range(len(report["nist"]))),
        *(f"/config/{place}/value" for place in range(len(report["config"]))),
        *(
            f"/forms/{place}/items/{item}/asks"
            for place, form in enumerate(report["forms"])
            for item in range(len(form["items"]))
        ),
    ]
    assert set(every) <= shown
    assert report["forms_counted"] == {"items": 19, "run": 9, "organisation": 1, "empty": 18}


def rewrite() -> None:
    report = made()
    for folder, each in ((GOLDEN, report), (ASKED / "golden", report_of_answers(ASKED))):
        folder.mkdir(exist_ok=True)
        (folder / "report.json").write_text(to_json(each))
        (folder / "report.html").write_text(page_of(each))


if __name__ == "__main__":
    rewrite()
