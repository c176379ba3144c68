"""Answers of clients in reports: figures with intervals and prices, fairness by group, shapes, evaluations, receipts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from shared.reports import ASKED, set_fields, texts_of, validated
from shared.runs import json_lines

from fedveil.base.refusal import Refusal
from fedveil.cli.report import report as make_report
from fedveil.cli.verify import verify
from fedveil.evidence.answers import describe_answers, read_answers, report_of_answers
from fedveil.evidence.content import report_of, to_json
from fedveil.evidence.page import MAX_FIGURES, PAGE, page_of
from fedveil.evidence.page_text import differences
from fedveil.privacy.accounting.epsilon import epsilon
from fedveil.privacy.accounting.events import event_from_json, event_to_json
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Release
from fedveil.privacy.ledger.ledger import Ledger, read_entries
from fedveil.run.run_files import read_run
from fedveil.tasks.shapes import read_shapes


def evaluated(number: int, accuracy: float | None) -> dict[str, Any]:
    ends = (
        {"low": None, "high": None} if accuracy is None else {"low": accuracy - 0.1, "high": accuracy + 0.1}
    )
    bins = [
        {"name": f"{at / 20:g} to {(at + 1) / 20:g}", "value": 3.0, "low": 1.0, "high": 5.0}
        for at in range(20)
    ]
    answers = [
        {"name": "accuracy", "figures": [{"name": "accuracy", "value": accuracy, **ends}]},
        {"name": "clients by accuracy", "figures": bins},
        {"name": "spread", "figures": [{"name": "worst decile", "value": 0.4, "low": 0.3, "high": 0.5}]},
    ]
    return {"round": number, "epsilon": 0.1, "noise_multiplier": 5.0, "clients": 400, "answers": answers}


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASKED, tmp_path / "questions", ignore=shutil.ignore_patterns("golden")))


# --- a folder of answers ---


def test_folder_of_answers_has_its_schema_with_the_runs_parts(asked: Path) -> None:
    report = validated(json.loads(to_json(report_of_answers(asked))), "answers")
    assert [each["name"] for each in report["answers"]] == [
        "treated-alike",
        "intake-2026",
    ]  # as they were charged
    assert report["ledgers"][0]["releases"] == report["answered"] == 2 and report["missing"] == []
    of_runs, of_answers = (
        json.loads((PAGE / f"{name}.schema.json").read_text()) for name in ("report", "answers")
    )
    assert {name: of_runs["$defs"][name] for name in of_answers["$defs"]} == of_answers["$defs"]


def test_fairness_has_bars_intervals_and_a_price(asked: Path) -> None:
    record = json.loads((asked / "treated-alike.json").read_text())
    rows = {"name": "rows, yes, f", "value": 1480.0, "low": 1400.0, "high": 1560.0}
    record["answers"][0]["figures"].append(rows)  # a number among shares
    set_fields(asked / "treated-alike.json", answers=record["answers"])
    page = page_of(report_of_answers(asked))
    shown = texts_of(page)
    women, men, nobody, apart = (f"/answers/0/answers/0/figures/{place}" for place in range(4))
    assert shown[f"{women}/name"] == "true positive rate, f" and shown[f"{women}/value"] == "59.4 %"
    assert shown[f"{men}/low"] == "76.4 %" and shown[f"{men}/high"] == "82 %"
    assert shown[f"{nobody}/value"] == "cannot be said" and f"{nobody}/low" not in shown
    assert shown[f"{apart}/name"] == "true positive rate, difference"
    assert shown[f"/answers/0/answers/0/figures/{len(record['answers'][0]['figures']) - 1}/value"] == "1480"
    assert shown["/answers/0/why"] == "Are women who are ill treated as often as men who are?"
    assert shown["/answers/0/epsilon"] == "1.00" and shown["/answers/0/epsilon_after"] == "1.00"
    fair = page.split("intake-2026")[0]
    assert fair.count('<svg class="bar"') == 3  # what cannot be said has none


def test_figures_of_several_units_have_no_bars(asked: Path) -> None:
    (inquiry,) = (each for each in report_of_answers(asked)["answers"] if each["name"] == "intake-2026")
    assert {each["kind"]: each["scale"] is not None for each in inquiry["answers"]} == {
        "histogram": True,
        "variance": False,
        "quantiles": False,
        "crosstable": True,
    }


def test_attributions_are_drawn_with_intervals_and_without_rows(asked: Path) -> None:
    path = asked / "intake-2026.json"
    record = json.loads(path.read_text())
    names = ("rows", "attribution age", "attribution sex")
    values = ((7000.0, 6900.0, 7100.0), (0.4, 0.3, 0.5), (0.2, 0.1, 0.3))
    figures = [
        {"name": name, "value": value, "low": low, "high": high}
        for name, (value, low, high) in zip(names, values, strict=True)
    ]
    record["question"]["ask"] = [
        {"name": "adds", "kind": "attributions", "of": {"age": [0, 1], "sex": [0, 1]}}
    ]
    record["answers"] = [{**record["answers"][0], "name": "adds", "figures": figures}]
    path.write_text(json.dumps(record))
    report = validated(report_of_answers(asked), "answers")
    (answer,) = next(each["answers"] for each in report["answers"] if each["name"] == "intake-2026")
    assert answer["scale"] == [0.0, 0.5]
    page = page_of(report)
    assert page.count('<svg class="bar"') == 3 + 2  # those of fairness beside them
    assert differences(page, report) == []


def test_folder_names_its_gaps(asked: Path) -> None:
    (asked / "intake-2026.json").unlink()
    set_fields(asked / "treated-alike.json", name="another")
    report = validated(report_of_answers(asked), "answers")
    assert report["missing"] == [
        "Charged elsewhere: another.",
        "Charged, and without an answer here: treated-alike, intake-2026.",
    ]
    (asked / "ledger").unlink()
    report = validated(report_of_answers(asked), "answers")
    assert report["ledgers"] == [] and "No ledger lies in this folder" in report["missing"][0]
    assert differences(page_of(report), report) == []


def test_a_folder_may_hold_a_ledger_of_clients_and_one_of_records(asked: Path) -> None:
    (asked / "records").mkdir()
    shutil.copy(asked / "ledger", asked / "records" / "ledger")
    report = validated(report_of_answers(asked), "answers")
    page = page_of(report)
    assert len(report["ledgers"]) == 2 and differences(page, report) == []
    assert texts_of(page)["/ledgers/1/verified/epsilon"] == "1.49"
    set_fields(asked / "treated-alike.json", epsilon_after=None, unit="record")
    assert "on each client's own ledger" in page_of(report_of_answers(asked))


def test_question_without_an_answer_states_its_spending(asked: Path) -> None:
    set_fields(asked / "treated-alike.json", released=False, reason="too few clients answered", answers=[])
    report = validated(report_of_answers(asked), "answers")
    assert report["answered"] == 1
    assert (
        "No answer: " in page_of(report)
        and texts_of(page_of(report))["/answers/0/reason"] == "too few clients answered"
    )


@pytest.mark.parametrize("text", ["{", '{"question": 1}', '{"question": {"ask": []}, "answers": []}'])
def test_a_record_that_cannot_be_read_is_refused(asked: Path, text: str) -> None:
    (asked / "broken.json").write_text(text)
    with pytest.raises(Refusal, match=r"broken\.json"):
        report_of_answers(asked)


def test_a_folder_without_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(Refusal, match="holds no run and no answer"):
        report_of_answers(tmp_path)


def test_a_long_answer_is_cut_on_the_page_and_whole_in_the_json(asked: Path) -> None:
    record = json.loads((asked / "treated-alike.json").read_text())
    figure = {"name": "word", "value": 1.0, "low": 0.0, "high": 2.0}
    answers = [{**record["answers"][0], "figures": [{**figure, "name": f"word {at}"} for at in range(200)]}]
    set_fields(asked / "treated-alike.json", answers=answers)
    report = report_of_answers(asked)
    page = page_of(report)
    assert f"word {MAX_FIGURES - 1}<" in page and f"word {MAX_FIGURES}<" not in page
    assert "More figures are omitted" in page and len(report["answers"][0]["answers"][0]["figures"]) == 200


# --- the report of a run ---


def test_report_of_a_run_shows_answers_and_their_ledger_charge(kept: Path, asked: Path) -> None:
    report = validated(report_of(read_run(kept, questions=asked)))
    assert [each["on_this_ledger"] for each in report["answers"]] == [False, False]
    page = page_of(report)
    assert "It is charged on another ledger" in page and "this run has no answers about groups" not in page
    assert (
        "Groups were measured by questions to the clients." in page
        and "not measured." not in page.split("NIST")[1]
    )
    assert differences(page, report) == []
    assert "this run has no answers about groups" in page_of(report_of(read_run(kept)))


def test_the_officer_reads_which_questions_the_ledger_charged(kept: Path, asked: Path) -> None:
    identity = json.loads(read_entries(kept / "ledger")[0].payload)
    parts = {"opportunity": "fairness", "opportunity: clipped": "fairness"}
    with Ledger.open(
        kept / "ledger", Budget("client", 9.0, 1e-4), owner=identity["owner"], simulated=True
    ) as ledger:
        ledger.purpose = "Are all treated alike?"
        events = dict.fromkeys((Adversary.MODEL, Adversary.CLIENTS), _gaussian(4.0))
        ledger.reserve_new(
            Release(
                "client", "treated-alike", 1, "question", events, "seeded", segments=parts, kind="question"
            )
        )
    report = validated(report_of(read_run(kept, questions=asked)))
    (question,) = report["ledger"]["questions"]
    assert (question["name"], question["purposes"]) == ("treated-alike", "fairness")
    assert 0.5 < question["epsilon"] < 1.5
    assert [each["on_this_ledger"] for each in report["answers"]] == [True, False]
    shown = texts_of(page_of(report))
    assert shown["/ledger/questions/0/why"] == "Are all treated alike?"
    place = next(at for at, each in enumerate(report["ledger"]["releases"]) if each["what"] == "question")
    assert (
        shown[f"/ledger/releases/{place}/parts"] == "opportunity (fairness), opportunity: clipped (fairness)"
    )


def _gaussian(noise: float) -> Any:
    from dp_accounting.dp_event import GaussianDpEvent

    return GaussianDpEvent(noise)


def test_measurements_of_clients_have_intervals(kept: Path) -> None:
    set_fields(kept / "result.json", evaluations=[evaluated(3, 0.7), evaluated(6, 0.8)])
    report = validated(report_of(read_run(kept)))
    page = page_of(report)
    assert "chart-evaluations" in page and differences(page, report) == []
    shown = texts_of(page)
    assert shown["/evaluations/1/answers/0/figures/0/value"] == "0.8"
    assert shown["/evaluations/1/answers/1/figures/19/name"] == "0.95 to 1"
    assert page.count('<svg class="bar"') == 20  # the histogram of clients
    assert shown["/evaluations/1/epsilon"] == "0.10"


def test_evaluation_drowned_in_noise_has_no_figure(kept: Path) -> None:
    (kept / "result.json").unlink()
    lines = json_lines(kept / "metrics.jsonl")
    lines[-1] |= {"evaluation": evaluated(6, None), "clients/accuracy": 0.5, "clients/accuracy/low": 0.4}
    (kept / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    report = validated(report_of(read_run(kept)))
    assert not [each for each in report["metrics"] if each["name"].startswith("clients/")]
    assert texts_of(page_of(report))["/evaluations/0/answers/0/figures/0/value"] == "cannot be said"


def test_evaluation_belongs_to_its_run_and_a_question_to_none(kept: Path) -> None:
    run = read_run(kept)
    identity = json.loads(run.entries[0].payload)
    events = dict.fromkeys((Adversary.MODEL, Adversary.CLIENTS), _gaussian(4.0))
    with Ledger.open(
        kept / "ledger", Budget("client", 9.0, 1e-4), owner=identity["owner"], simulated=True
    ) as ledger:
        for name, number in ((f"{run.name} evaluation", 1), (f"{run.name} evaluation", 2), ("ages", 1)):
            segments = {"x": "evaluation"}
            ledger.reserve_new(
                Release(
                    "client", name, number, "question", events, "seeded", segments=segments, kind="question"
                )
            )
    report = validated(report_of(read_run(kept)))
    assert [(each["run"], each["question"]) for each in report["ledger"]["runs"]] == [
        (run.name, False),
        ("ages", True),
    ]
    assert [(each["name"], each["times"]) for each in report["ledger"]["questions"]] == [
        ("evaluation", 2),
        ("ages", 1),
    ]
    told_events = [each for each in report["ledger"]["events"] if each["adversary"] == "model"]
    assert [each["count"] for each in told_events if each["event"] == event_to_json(_gaussian(4.0))] == [2]
    with open(kept / "config.yaml", "a") as config:
        config.write("evaluate: {clients: 'every:3'}\n")
    (mark, size), rounds = report_of(read_run(kept))["plan"][-1], len(run.rounds)
    events = {event_from_json(told_events[0]["event"]): rounds, _gaussian(4.0): 2}
    assert mark == rounds and size == pytest.approx(epsilon(events, 1e-4, Adjacency.ZERO_OUT, 1e-4), abs=2e-3)
    said = next(each["said"] for each in report["not_covered"] if each["limit"].startswith("Questions"))
    assert "The ledger holds 1 run and 1 question on these data" in page_of(report)
    assert "evaluation, 2 times, for evaluation; ages, for evaluation" in said
    assert differences(page_of(report), report) == []


def test_the_shapes_are_read_from_schema_and_model(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    schema, model = tmp_path / "schema.yaml", tmp_path / "model.safetensors"
    assert read_shapes(schema, model) is None
    schema.write_text(
        "label: y\ncolumns:\n  age: {low: 0, high: 80, edges: [40]}\n  y: {categories: [a, b]}\n"
    )
    save_file({"weight": np.array([[0, 0], [1, -1]], np.float32), "bias": np.zeros(2, np.float32)}, model)
    found = read_shapes(schema, model)
    assert found is not None and found["shapes"][0]["values"] == [[1.0, -1.0]]
    save_file({"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32)}, model)
    assert read_shapes(schema, model) is None
    save_file({"0.weight": np.zeros((2, 2), np.float32)}, model)
    assert read_shapes(schema, model) is None
    schema.write_text("label: y\ncolumns:\n  age: {low: 0, high: 80}\n  y: {categories: [a, b]}\n")
    save_file({"weight": np.zeros((2, 1), np.float32), "bias": np.zeros(2, np.float32)}, model)
    linear = read_shapes(schema, model)
    assert linear is not None and linear["shapes"][0]["values"] == [[0.0, 0.0]]


# --- receipts ---


# --- the commands ---


def test_page_of_a_folder_is_written_and_verified(asked: Path, commands: Any) -> None:
    code, said = commands.run("report", str(asked))
    assert code == 0 and "2 answers" in said.out, said.err
    page = asked / "report" / "report.html"
    assert (asked / "report" / "report.json").read_text() == (ASKED / "golden" / "report.json").read_text()
    code, said = commands.run("verify", str(asked))
    assert code == 0 and "page: " in said.out, said.out
    before = page.read_text()
    assert before.count(">59.4 %<") == 1
    page.write_text(before.replace(">59.4 %<", ">69.4 %<"))
    code, said = commands.run("verify", str(asked))
    assert code == 2 and "/answers/0/answers/0/figures/0/value" in said.out
    page.write_text(before)
    (asked / "report" / "report.json").unlink()
    code, said = commands.run("verify", str(asked))
    assert code == 2 and "page" in said.out


def test_a_report_is_not_believed_against_the_answers_themselves(
    asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_report(asked) == 0 and verify(asked, ()) == 0
    assert "2 answers\n" in capsys.readouterr().out
    text = (asked / "treated-alike.json").read_text()
    (asked / "treated-alike.json").write_text(text.replace("0.59", "0.69"))
    assert verify(asked, ()) == 2
    assert "differs from the answers" in capsys.readouterr().out
    (asked / "treated-alike.json").unlink()
    assert make_report(asked) == 0
    assert "1 answer\n" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[" * 20_000 + "]" * 20_000, '{"format": []}', "[1]", "null"], ids=len)
def test_a_report_that_is_none_fails_its_check(asked: Path, text: str, capsys: Any) -> None:
    assert make_report(asked) == 0
    (asked / "report" / "report.json").write_text(text)
    assert verify(asked, ()) == 2 and "failed: page" in capsys.readouterr().out


def test_page_of_answers_holds_nothing_beyond_its_report(asked: Path, capsys: Any) -> None:
    assert make_report(asked) == 0 and verify(asked, ()) == 0
    page = asked / "report" / "report.html"
    page.write_text(page.read_text().replace("</body>", "<div>epsilon 0.01, approved</div></body>"))
    assert verify(asked, ()) == 2 and "failed: page" in capsys.readouterr().out


def test_options_of_a_run_are_refused_for_answers(asked: Path, kept: Path, commands: Any) -> None:
    for option in ("--assessment", "--answers"):
        code, said = commands.run("report", str(asked), option, str(asked))
        assert code == 2 and option in said.err
    code, said = commands.run("report", str(kept), "--answers", str(kept / "nowhere"))
    assert code == 2 and "does not exist" in said.err
    code, said = commands.run("report", str(kept), "--answers", str(asked), "--json")
    assert code == 0 and len(json.loads(said.out)["answers"]) == 2


def test_records_stand_in_the_order_of_the_ledger(asked: Path) -> None:
    for charged in (["intake-2026", "treated-alike"], ["treated-alike"], []):
        names = [each["name"] for each in read_answers(asked, charged)]
        assert names == [
            *charged,
            *(name for name in ("intake-2026", "treated-alike") if name not in charged),
        ]
    assert describe_answers([]) == []


def test_survival_is_drawn_with_its_curves_and_its_words(asked: Path) -> None:
    path = asked / "intake-2026.json"
    record = json.loads(path.read_text())
    figures: list[dict[str, Any]] = [
        {"name": "log-rank p", "value": 0.01, "low": 0.01, "high": 0.01, "said": "the curves differ"},
        {"name": "median, a", "value": None, "low": None, "high": None, "said": "not reached by 24"},
    ]
    for group, fall in (("a", 0.1), ("b", 0.3)):
        for number, end in enumerate((12, 24), 1):
            value = 1 - fall * number
            ends = {"value": value, "low": value - 0.05, "high": value + 0.05}
            figures.append({"name": f"survival at {end}, {group}", **ends})
    record["question"]["ask"] = [
        {"name": "time", "kind": "survival", "of": "months", "event": "died", "by": "arm"}
    ]
    record["answers"] = [{**record["answers"][0], "name": "time", "figures": figures}]
    path.write_text(json.dumps(record))
    report = validated(report_of_answers(asked), "answers")
    at = next(at for at, each in enumerate(report["answers"]) if each["name"] == "intake-2026")
    page = page_of(report)
    shown = texts_of(page)
    first = f"/answers/{at}/answers/0/figures"
    assert shown[f"{first}/0/said"] == "the curves differ" and shown[f"{first}/0/value"] == "0.01"
    assert shown[f"{first}/1/said"] == "not reached by 24" and shown[f"{first}/2/value"] == "90 %"
    picture = page[page.index("chart-survival") :]
    assert picture.count('<path class="line') == 3 and picture.count('<path class="interval measured') == 4
    assert not differences(page, report)
