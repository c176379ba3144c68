"""Reports of runs of all kinds: what they say, what they cannot show, and that nothing given by a user becomes markup."""

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from shared.reports import FIXTURES, KEPT, OLD, edited, set_fields, texts_of, validated

from fedveil.base.refusal import Refusal
from fedveil.evidence.answers import report_of_answers
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import verify_folder
from fedveil.evidence.card import card_of
from fedveil.evidence.content import describe_shapes, receipts_of, report_of, to_json
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import differences
from fedveil.privacy.audit.round_rows import row_type
from fedveil.privacy.audit.run_audit import AuditTerms, Evidence
from fedveil.privacy.audit.summary import summarise
from fedveil.run.promise import promise_rows, sentences
from fedveil.run.run_files import read_run

OLD_RUNS = (OLD / "run", OLD / "run_of_records", OLD / "hearts" / "server" / "runs" / "before")


# --- runs of all kinds ---


def test_the_golden_report_is_of_the_schema(golden: dict[str, Any]) -> None:
    validated(golden)


@pytest.mark.parametrize("folder", OLD_RUNS, ids=lambda path: path.name)
def test_older_run_names_its_gaps(folder: Path) -> None:
    report = validated(json.loads(to_json(report_of(read_run(folder)))))
    assert any("stored one point of its guarantee" in each for each in report["missing"])
    page = page_of(report)
    assert differences(page, report) == []
    assert "What this folder cannot show" in page
    if "hearts" in folder.parts:  # two real clients; 100 is what a simulation of this task would have had
        assert report["run"]["clients"] is None and ">100<" not in page.split("<main>")[0]


def test_report_of_hidden_records_says_that_they_were_not_tested(tmp_path: Path) -> None:
    old = OLD / "run_of_records"
    report = report_of(read_run(old))
    said = [report["stamps"]["said"], card_of(report), page_of(report), to_json(report)]
    assert all("the promise for single records was not tested" in each for each in said)
    assert not any("nothing is claimed" in each or "no claim" in each for each in said)
    assert verify_folder(old, Knowledge())[-2].ok is None


@pytest.mark.parametrize(
    ("unit", "more", "clause"),
    [
        ("record", {}, "the promise for single records was not tested: each client adds its own noise"),
        ("person", {}, "the promise for a person's records at one client was not tested: each client"),
        (
            "person_everywhere",
            {"looks": (3,)},
            "the promise for a person's records at all clients was not tested",
        ),
        ("record", {"looks": (3,), "records": True}, "was not tested: too few canary records were drawn"),
        ("record", {"looks": (3,), "losses": True}, "was tested by the losses of planted records alone"),
        ("", {}, "nothing is promised, so there is no claim to test"),
    ],
)
def test_audit_names_its_gaps_in_the_runs_own_unit(unit: str, more: dict[str, Any], clause: str) -> None:
    terms = AuditTerms(3, 0.01, own_noise=unit, **more)
    rows = np.zeros(1, row_type(0))
    rows["records"] = np.nan
    summary = summarise(Evidence(terms, np.zeros(0, bool), rows), [], None)
    assert summary.verdict is None and clause in summary.sentence
    both = summarise(Evidence(replace(terms, delta=1e-5), np.zeros(0, bool), rows), [], None).sentence
    assert "the released sums hold the claimed noise" in both and (clause in both) is bool(unit)


def test_a_run_that_was_refused_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="wrote and spent nothing"):
        read_run(tmp_path)


def test_a_run_that_was_killed_is_not_called_final(kept: Path) -> None:
    (kept / "result.json").unlink()
    lines = (kept / "metrics.jsonl").read_text()
    (kept / "metrics.jsonl").write_text(lines[: len(lines) * 2 // 3])  # cut within a line
    report = validated(report_of(read_run(kept)))
    assert report["run"]["status"] == "not ended"
    assert 0 < report["run"]["rounds_completed"] < 6
    assert report["forms_counted"]["run"] == 0
    page = page_of(report)
    assert "no value is final" in page
    assert differences(page, report) == []


def test_unfinished_run_reports_its_ledger(kept: Path, golden: dict[str, Any]) -> None:
    (kept / "result.json").unlink()
    report = validated(report_of(read_run(kept)))
    told = [(row["adversary"], row["epsilon"], row["relies_on"]) for row in golden["privacy"]]
    so_far = [(row["adversary"], row["epsilon"], row["relies_on"]) for row in report["privacy"]]
    for (who, ended, relies), (other, size, also) in zip(told, so_far, strict=True):
        assert (who, relies) == (other, also)
        assert size == ended if isinstance(ended, str) else math.isclose(size, ended, rel_tol=1e-2)
    assert report["promise"][2] == "The run has not ended: each further round adds to this, up to its budget."
    assert report["stamps"]["measured"]["epsilon"] == golden["looks"][-1]["epsilon"]
    assert ", so far: bound on what" in page_of(report)


def test_a_run_that_has_released_nothing_promises_nothing_yet(kept: Path) -> None:
    for name in ("result.json", "metrics.jsonl", "ledger"):
        (kept / name).unlink()
    report = validated(report_of(read_run(kept)))
    assert report["privacy"] == [] and report["stamps"]["claimed"] is None
    assert report["promise"][0] == "This run has not ended and has released nothing yet."
    page = page_of(report)
    assert "No noise was added" not in page and "nothing was released" in page
    assert differences(page, report) == []


def test_a_run_without_an_audit_says_so(kept: Path) -> None:
    config = yaml.safe_load((kept / "config.yaml").read_text())
    (kept / "config.yaml").write_text(yaml.safe_dump({**config, "audit": {"name": "off"}}))
    set_fields(kept / "result.json", audit=None)
    assert "The run was not audited." in report_of(read_run(kept))["missing"]


def test_an_audit_that_has_not_looked_yet_is_not_called_missing(kept: Path) -> None:
    for name in ("result.json", "metrics.jsonl"):
        (kept / name).unlink()
    page = page_of(report_of(read_run(kept)))
    assert "its audit has no result yet" in page and "no attack with canaries has run yet" in page
    assert "this run had no attack" not in page and "not detected without canaries" not in page
    (kept / "audit.json").unlink()  # which is written when there is something to keep
    assert "its audit has no result yet" in report_of(read_run(kept))["stamps"]["said"]
    config = kept / "config.yaml"
    config.write_text(config.read_text().replace("name: full", "name: 'off'"))
    assert "this run had no audit" in report_of(read_run(kept))["stamps"]["said"]


def test_a_violated_promise_is_called_so(kept: Path, golden: dict[str, Any]) -> None:
    edited(kept, "result.json", lambda fields: fields["audit"].update(verdict="violated"))
    promise = validated(report_of(read_run(kept)))["promise"]
    assert promise == [*golden["promise"], "The audit of this run found that this does not hold."]


OF_RECORDS = {"target_epsilon": 2.0, "target_delta": 1e-5, "adjacency": "zero-out", "per_person": None}


@pytest.mark.parametrize(
    ("privacy", "unit", "epsilon"),
    [
        ({"name": "none"}, "client", "infinity"),
        ({"name": "record", **OF_RECORDS}, "record", 2.0),
        ({"name": "record", **OF_RECORDS, "per_person": 3}, "person", 2.0),
        ({"name": "record_and_client", "record": OF_RECORDS, "client": {}}, "record", 2.0),
    ],
)
def test_values_from_client_ledgers_hold_during_a_run(
    kept: Path, privacy: dict[str, Any], unit: str, epsilon: float | str
) -> None:
    for name in ("result.json", "ledger"):
        (kept / name).unlink()
    config = yaml.safe_load((kept / "config.yaml").read_text()) | {"privacy": privacy}
    (kept / "config.yaml").write_text(yaml.safe_dump(config))
    rows = validated(report_of(read_run(kept)))["privacy"]
    assert [(row["unit"], row["epsilon"]) for row in rows] == [(unit, epsilon)] * 3


def test_without_privacy_nothing_is_promised(kept: Path) -> None:
    def unprotected(fields: dict[str, Any]) -> None:
        for row in fields["privacy"]:
            row.update(epsilon="infinity", target_epsilon=None, curve=None)

    edited(kept, "result.json", unprotected)
    report = validated(report_of(read_run(kept)))
    assert report["stamps"]["claimed"] is None
    assert report["promise"][0] == "This run gives no guarantee."
    assert {row["recognised"] for row in report["privacy"]} == {1.0}
    assert {row["mechanism"] for row in report["privacy"]} == {"none"}
    assert [each["limit"] for each in report["not_covered"]] == ["Everything"]
    assert differences(page_of(report), report) == []


def test_canary_records_are_measured_where_records_are_promised(kept: Path) -> None:
    found = {"epsilon": 2.9, "low": 1.1, "high": 5.0}

    def of_records(fields: dict[str, Any]) -> None:
        for row in fields["privacy"]:
            row.update(unit="record", epsilon=3.0)
        fields["audit"].update(
            measured=None,
            ceiling=None,
            records={"claimed": 3.0, "ceiling": 22.0, "lower_bounds": {}, "measured": found},
        )

    edited(kept, "result.json", of_records)
    line = {"round": 1, "epsilon_record": 3.0, "audit/records/claimed": 3.0, "audit/records/ceiling": 22.0}
    line |= {f"audit/records/{name}": value for name, value in found.items()}
    (kept / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    report = validated(report_of(read_run(kept)))
    assert report["stamps"]["measured"] == {**found, "confidence": 0.95}
    assert report["stamps"]["ceiling"] == 22.0 and report["stamps"]["canaries"] is None
    assert report["looks"] == [{"round": 1, "claimed": 3.0, "ceiling": 22.0, **found}]
    assert "by canary records" in page_of(report)


def test_operators_file_is_not_read(kept: Path, golden: dict[str, Any]) -> None:
    for name in ("operator.jsonl", "checkpoint.safetensors", "audit.npy", "clients.log"):
        (kept / name).write_bytes(b'{"round": 1, "invited": 31337}\n')
    edited(kept, "result.json", lambda result: result.update(data="real"))
    report = report_of(read_run(kept))
    assert "31337" not in to_json(report)
    assert report["cost"]["answers"] == golden["cost"]["answers"]
    assert report["cost"]["answers"]["public"] is False


# --- words ---


def test_a_promise_is_two_sentences_without_symbols(golden: dict[str, Any]) -> None:
    assert len(golden["promise"]) == 2
    for sentence in golden["promise"]:
        assert sentence.endswith(".") and sentence.count(". ") == 0
        assert not re.search(r"[=<>εδ^%]|epsilon|delta", sentence)


def test_a_weak_promise_is_not_called_almost_nothing(golden: dict[str, Any]) -> None:
    rows = [{**row, "recognised": 0.97} for row in golden["privacy"]]
    first, second = sentences(rows, True)
    assert "does not prevent" in first and "97 of 100" in second


def test_the_rows_have_the_names_of_the_registry(golden: dict[str, Any]) -> None:
    names = {"unit", "epsilon", "delta", "adjacency", "mechanism", "accountant", "adversary"}
    assert all(names <= set(row) for row in golden["privacy"])
    assert promise_rows(read_run(KEPT)) == golden["privacy"]


# --- answers of the organisation ---


# --- strings of users ---

INJECTIONS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</text></svg><script>alert(1)</script>",
    "javascript:alert(1)",
    "&lt;script&gt;&#60;script&#62;",
    "{{ 7 * 7 }}{% for x in range(9) %}<b>{% endfor %}",
    "]]><!--<script>--><?php echo 1 ?>",
    "\u202ereversed\u2066 \x00\x1b[31m",
    "a/b~c~0~1",
)
LAYOUT = (
    "/status",
    "/state",
    "/unit",
    "/adversary",
    "/data",
    "/epsilon",
    "/format",
    "/who",
    "/verdict",
    "/what",
    "/form",
)


class Structure(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(tag)

    def handle_comment(self, data: str) -> None:
        self.found.append("comment")

    handle_decl = handle_pi = unknown_decl = handle_comment


def structure(page: str) -> list[object]:
    parser = Structure()
    parser.feed(page)
    return parser.found


def with_strings(value: Any, text: str, at: str = "") -> Any:
    """Return a report whose strings, and names of metrics and versions, are all this text."""
    if isinstance(value, dict):
        named = at.endswith(("/versions", "/metrics"))
        return {
            (f"{name}{text}" if named else name): with_strings(each, text, f"{at}/{name}")
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [with_strings(each, text, f"{at}/{place}") for place, each in enumerate(value)]
    if at == "/metric" or re.fullmatch(r"/metrics/\d+/name", at):
        return f"{value}{text}"
    return text if isinstance(value, str) and not at.endswith(LAYOUT) else value


def everything(golden: dict[str, Any]) -> dict[str, Any]:
    """Return a report that has all that any run's has."""
    asked = report_of_answers(FIXTURES / "asked_questions")
    unanswered = {**asked["answers"][0], "released": False, "reason": "too few", "on_this_ledger": False}
    words = {"column": "sex", "score": "ill", "edges": None, "words": ["f", "m"], "values": [0.1, -0.2]}
    numbers = {"column": "age", "score": "ill", "edges": [18, 40, 90], "words": None, "values": [1.0, -1.0]}
    ends = {"lowest": -1.0, "highest": 1.0, "missing": 0.2}
    answers = asked["answers"][0]["answers"]
    evaluated = {"epsilon": 0.1, "noise_multiplier": 5.0, "clients": 9, "answers": answers}
    evaluated |= {"share": 0.2, "confidence": 0.95, "reason": None}
    return {
        **golden,
        "ledger": {**golden["ledger"], "questions": asked["ledgers"][0]["questions"]},
        "answers": [*asked["answers"], unanswered],
        "groups": {"figures": ["accuracy"], "rows": [{"group": "sex=f", "values": [0.5]}]},
        "evaluations": [{"round": number, **evaluated} for number in (1, 2)],
        "shapes": {"intercept": [0.0], "shapes": [{**each, **ends} for each in (words, numbers)]},
        "receipts": {"public": True, "ended": True, "given": 3, "members": 5, "of_this_run": True},
    }


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("kind", ["run", "answers"])
def test_no_string_becomes_markup(golden: dict[str, Any], text: str, kind: str) -> None:
    whole = (
        everything(golden)
        if kind == "run"
        else {**report_of_answers(FIXTURES / "asked_questions"), "missing": ["x"]}
    )
    report = with_strings(whole, text)
    page = page_of(report)
    assert structure(page) == structure(page_of(with_strings(whole, "x")))
    for tag, names in (each for each in structure(page) if isinstance(each, tuple)):
        assert tag != "script" and not [name for name in names if name.startswith("on")]
    if text.isprintable():  # a browser's parser reads NUL as another character
        assert differences(page, report) == []


# --- the model ---


SERVED = FIXTURES / "before_the_rooms" / "hearts" / "server" / "runs" / "before"


def test_groups_of_held_out_data_have_a_row_each(kept: Path) -> None:
    metrics = {"accuracy": 0.9, "groups/sex=f/accuracy": 0.8, "groups/sex=m/accuracy": 0.95}
    set_fields(kept / "result.json", metrics={**metrics, "groups/sex=m/selection rate": 0.5})
    report = validated(report_of(read_run(kept)))
    assert report["groups"] == {
        "figures": ["accuracy", "selection rate"],
        "rows": [{"group": "sex=f", "values": [0.8, None]}, {"group": "sex=m", "values": [0.95, 0.5]}],
    }
    assert [each["name"] for each in report["metrics"]] == ["accuracy"]
    page = page_of(report)
    assert texts_of(page)["/groups/rows/0/values/0"] == "80 %" and "no such row" in page
    assert differences(page, report) == [] and "accuracy by group is not known" not in page


def test_rounds_of_values_that_lost_are_in_no_mean_of_the_last_rounds(kept: Path) -> None:
    arms = {"key": "learning_rate", "rounds": 1, "metric": "accuracy", "arms": [], "winner": 1, "value": 5.0}
    set_fields(kept / "result.json", tuning=arms)
    rows = [{"round": n, "arm": 1 + (n > 2), "accuracy": 0.5 if n < 3 else 0.1} for n in range(1, 5)]
    rows += [{"round": n, "accuracy": 0.7} for n in range(5, 9)]
    (kept / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    tail = report_of(read_run(kept))["tail"]
    assert tail["low"] == 0.5 and tail["mean"] == pytest.approx((4 * 0.7 + 0.5) / 5)


def served(tmp_path: Path, **result: Any) -> Path:
    run = Path(shutil.copytree(SERVED, tmp_path / "runs" / "before"))
    set_fields(run / "result.json", rosters=[{"version": 1, "members": 5}], **result)
    (run / "manifest.json").write_text("{}")
    receipt = {"node": 1, "commitment": "00", "signature": "00"}
    hashed = read_run(run).manifest
    (run / "receipts.json").write_text(json.dumps({"manifest": hashed, "receipts": [receipt] * 3}))
    return run


def test_receipts_are_counted_where_the_count_is_public(tmp_path: Path) -> None:
    run = served(tmp_path, seconds=3.0)
    wanted = {"public": True, "ended": True, "given": 3, "members": 5, "of_this_run": True}
    assert receipts_of(read_run(run)) == wanted
    page = page_of(validated({**report_of(read_run(run)), "rosters": []}))
    assert texts_of(page)["/receipts/given"] == "3" and texts_of(page)["/receipts/members"] == "5"
    (run / "manifest.json").write_text('{"files": {}}')
    assert receipts_of(read_run(run)) == {**wanted, "of_this_run": False}
    (run / "receipts.json").write_text("[]")
    assert receipts_of(read_run(run)) == {**wanted, "given": 0, "of_this_run": False}
    (run / "receipts.json").unlink()
    assert receipts_of(read_run(run)) == {**wanted, "given": 0, "of_this_run": None}


def test_receipts_of_a_secret_draw_are_their_operators(tmp_path: Path) -> None:
    run = served(tmp_path, seconds=None)
    unknown = {"given": None, "members": None, "of_this_run": None}
    assert receipts_of(read_run(run)) == {"public": False, "ended": True, **unknown}
    page = page_of({**report_of(read_run(run)), "rosters": []})
    assert "only the operator knows the members" in page and "/receipts/given" not in texts_of(page)
    (run / "result.json").unlink()
    assert receipts_of(read_run(run)) == {"public": False, "ended": False, **unknown}
    assert "Devices give receipts when the run ends." in page_of(report_of(read_run(run)))


def test_a_simulation_has_no_receipts() -> None:
    assert receipts_of(read_run(KEPT)) is None


def test_a_pair_has_a_value_for_each_combination_of_levels() -> None:
    levels = [{"column": "age", "edges": [0, 40, 80]}, {"column": "kind", "words": ["p", "q"]}]
    pair = {"column": "age x kind", "range": 1.0, "levels": levels, "values": [[[0.1, -0.1], [-0.1, 0.1]]]}
    content = describe_shapes({"scores": ["yes"], "intercept": [0.0], "shapes": [{**pair, "missing": [0.0]}]})
    assert content is not None
    (shape,) = content["shapes"]
    assert shape["words"] == ["0 to 40, p", "0 to 40, q", "40 to 80, p", "40 to 80, q"]
    assert shape["values"] == [0.1, -0.1, -0.1, 0.1] and shape["missing"] == 0
