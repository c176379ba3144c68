"""Model of a run on its page and its card."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from shared.reports import edited, texts_of, validated
from shared.runs import json_lines

from fedveil.evidence.card import card_of
from fedveil.evidence.content import report_of
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import differences
from fedveil.run.run_files import Assessment, read_run
from fedveil.tasks.shapes import read_shapes

OF_RECORDS = {"target_epsilon": 2.0, "target_delta": 1e-5, "adjacency": "zero-out", "per_person": None}


HOSPITALS = """label: num
columns:
  age: {low: 20, high: 90}
  pain: {categories: ["FALSE", "TRUE"]}
  num: {categories: [healthy, ill]}
"""


def of_tables(kept: Path) -> None:
    """Let a kept run be one of tables, whose rows were hidden."""
    config = yaml.safe_load((kept / "config.yaml").read_text())
    task = {
        "name": "csv",
        "folder": "/home/somebody/hospitals",
        "data_id": None,
        "model": "mlp",
        "hidden": [8, 4],
    }
    privacy = {"name": "record", "max_grad_norm": 0.75, **OF_RECORDS}
    (kept / "config.yaml").write_text(yaml.safe_dump(config | {"task": task, "privacy": privacy}))
    (kept / "schema.yaml").write_text(HOSPITALS)
    edited(kept, "result.json", lambda result: result.update(confusion=[[5, 1], [2, 7]]))
    lines = json_lines(kept / "metrics.jsonl")
    rows = [json.dumps({**row, "clipping_norm": None, "balanced_accuracy": 0.662}) for row in lines]
    (kept / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    edited(kept, "result.json", lambda result: result["metrics"].update(balanced_accuracy=0.662))


def test_page_and_card_describe_the_model(kept: Path) -> None:
    of_tables(kept)
    report = validated(report_of(read_run(kept, Assessment({"ai_annex_iv_1": "Sorts letters."}))))
    page, card = page_of(report), card_of(report)
    assert differences(page, report) == []
    shown = texts_of(page)
    assert shown["/model/title"] == "num of hospitals" and "# num of hospitals" in card
    assert (
        shown["/model/architecture"] == "mlp, hidden layers of 8, 4" and "mlp, hidden layers of 8, 4" in card
    )
    assert [shown[f"/model/inputs/{at}/values"] for at in (0, 1)] == ["20 to 90", "FALSE, TRUE"]
    assert shown["/model/classes/1"] == "ill" and "- Classes: healthy, ill" in card
    assert shown["/model/data"] == "task csv, folder hospitals" and "held-out data of task csv" in card
    assert shown["/model/reads"] == "2 columns: age, pain" and shown["/model/predicts"] == "num: healthy, ill"
    assert shown["/model/intended"] == "Sorts letters." and "- Intended use: Sorts letters" in card
    assert shown["/model/confusion/1/counts/0"] == "2" and "| ill | 2 | 7 |" in card
    assert shown["/model/max_grad_norm"] == "0.75" and "Clipping norm</th>" not in page
    assert "balanced accuracy 0.6620" in card
    assert {"balanced accuracy", "0.6620"} <= set(shown.values()) and "0.662" not in shown.values()


def test_page_begins_with_the_data_the_promise_and_the_accuracy(golden: dict[str, Any]) -> None:
    page = page_of(golden)
    head, _, rest = page.partition('class="readers"')
    assert all(
        f'data-ref="{each}"' in head for each in ("/model/data", "/model/about", "/promise/0", "/promise/1")
    )
    assert "scikit-learn" in golden["model"]["about"] and "/promise/" not in rest
    assert '<h2 id="quality">' in head


def test_page_and_card_say_what_predictions_rest_on(kept: Path) -> None:
    of_tables(kept)
    rows = [{"column": "pain", "mean": 0.75}, {"column": "age", "mean": 0.25}]
    figures = {"rows": 15, "confidence": 0.95, "figures": [], "attributions": rows}
    edited(kept, "result.json", lambda result: result.update(held_out=figures))
    report = validated(report_of(read_run(kept)))
    page = page_of(report)
    assert "Columns that predictions rest on" in page and differences(page, report) == []
    assert page.index(">pain</text>") < page.index(">age</text>") and "- pain: 0.75" in card_of(report)


def test_model_that_a_run_chose_is_the_one_of_its_schema(kept: Path) -> None:
    of_tables(kept)
    config = yaml.safe_load((kept / "config.yaml").read_text())
    (kept / "config.yaml").write_text(yaml.safe_dump(config | {"task": {**config["task"], "model": "auto"}}))
    assert report_of(read_run(kept))["model"]["architecture"] == "linear"
    (kept / "schema.yaml").write_text(HOSPITALS.replace("high: 90", "high: 90, edges: [50]"))
    assert report_of(read_run(kept))["model"]["architecture"] == "gam"


@pytest.mark.parametrize(
    ("label", "shown", "classes"),
    [
        ("{kind: survival, time: age, event: pain}", "age, pain (survival)", None),
        ("{kind: several, columns: [num, pain]}", "num, pain (several)", None),
        ("{kind: ordinal, column: num}", "num (ordinal)", ["healthy", "ill"]),
    ],
    ids=["survival", "several", "ordinal"],
)
def test_page_names_a_label_of_another_kind(
    label: str, shown: str, classes: list[str] | None, kept: Path
) -> None:
    of_tables(kept)
    (kept / "schema.yaml").write_text(HOSPITALS.replace("label: num", f"label: {label}"))
    report = validated(report_of(read_run(kept)))
    assert report["model"]["label"] == shown and report["model"]["classes"] == classes
    inputs = {each["column"] for each in report["model"]["inputs"]}
    assert inputs == {"age", "pain", "num"} - set(shown.partition(" (")[0].split(", "))
    assert differences(page_of(report), report) == [] and shown in card_of(report)


def test_model_of_little_evidence_claims_nothing(kept: Path) -> None:
    report = report_of(read_run(kept))
    assert report["model"]["confusion"] is None and report["model"]["inputs"] == []
    card = card_of(report)
    assert "- Intended use: not stated" in card and "Confusion matrix" not in page_of(report)
    assert "arrays bias 10, weight 10 x 64" in card and "- Parameters: 650" in card


def test_accuracy_comes_before_the_forms(golden: dict[str, Any]) -> None:
    page = page_of(golden)
    assert (
        page.index("What is promised to whom")
        < page.index("Accuracy and its epsilon")
        < page.index("Forms of impact")
    )


def test_linear_model_of_tables_shows_the_part_of_each_column(kept: Path) -> None:
    of_tables(kept)
    weight = np.array([[0, 0, 0], [0.5, -1.0, 2.0]], np.float32)  # age, and the two words of pain
    save_file({"weight": weight, "bias": np.zeros(2, np.float32)}, kept / "model.safetensors")
    report = validated(
        report_of(read_run(kept), shapes=read_shapes(kept / "schema.yaml", kept / "model.safetensors"))
    )
    shown = {each["column"]: each for each in report["shapes"]["shapes"]}
    assert shown["age"]["edges"] == [20, 90] and shown["age"]["values"] == [-0.5, 0.5]
    assert shown["pain"]["values"] == [-1.5, 1.5] and shown["age"]["missing"] is None
    page = page_of(report)
    assert differences(page, report) == [] and "a number without bins adds a straight line" in page
