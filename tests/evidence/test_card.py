"""Model card and bill of materials: read by those who read them, and nothing given by a user becomes markup."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedveil.evidence.card import card_of, contradicts, plain
from fedveil.evidence.materials import materials_of

GOLDEN = Path(__file__).parents[1] / "fixtures" / "reported_run" / "golden" / "report.json"
EVIL = "x|y\n---\n# <script>alert(1)</script> [a](javascript:b) `c`"


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


def test_hugging_face_reads_the_card(report: dict[str, Any]) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCardData(
        **yaml.safe_load(card_of(report).split("---\n")[1]), ignore_metadata_errors=False
    )
    (accuracy, loss) = data.eval_results
    assert accuracy.metric_type == "accuracy" and accuracy.metric_value == report["metrics"][0]["value"]
    assert loss.metric_type == "loss" and data.library_name == "fedveil"


def test_the_card_says_the_promise(report: dict[str, Any]) -> None:
    card = re.sub(r"\\(.)", r"\1", card_of(report))
    for sentence in report["promise"]:
        assert sentence in card
    assert "| recipients of the model | everything that one client contributes | 3.00 | 0.0001 |" in card
    assert all(each["said"] in card for each in report["not_covered"] if each["state"] == "not covered")


def test_a_card_of_a_better_guarantee_contradicts_its_report(report: dict[str, Any], tmp_path: Path) -> None:
    assert not contradicts(tmp_path, report)
    for text, expected in ((card_of(report), False), (card_of(report).replace(r"3\.00", r"0\.10"), True)):
        (tmp_path / "CARD.md").write_text(text)
        assert contradicts(tmp_path, report) is expected


def test_a_name_is_no_markdown_and_no_yaml(report: dict[str, Any]) -> None:
    honest = card_of(report)
    report["model"]["title"] = report["model"]["intended"] = report["run"]["task"] = EVIL
    report["metrics"][0]["name"] = report["not_covered"][0]["said"] = EVIL
    card = card_of(report)
    front = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert front["model-index"][0]["results"][0]["task"]["name"] == EVIL
    body = card.split("\n---\n\n", 1)[1]
    assert len(body.splitlines()) == len(honest.split("\n---\n\n", 1)[1].splitlines())
    assert not re.search(r"(?<!\\)[<`]", body.replace("`report.html`", "").replace("`report.json`", ""))


def test_a_plain_text_is_one_line() -> None:
    assert plain("a\nb\u2028c *d*") == r"a b c \*d\*"


def test_the_bill_of_materials_is_cyclonedx(report: dict[str, Any]) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    for task in (report["run"]["task"], EVIL):
        report["run"]["task"] = task
        assert validator.validate_str(materials_of(report)) is None


def test_bill_names_the_model_and_its_tools(report: dict[str, Any]) -> None:
    bill = json.loads(materials_of(report))
    model = bill["metadata"]["component"]
    assert model["hashes"] == [{"alg": "SHA-256", "content": report["run"]["model_sha256"]}]
    assert {each["name"] for each in bill["components"]} == set(report["versions"])
    told = {each["name"]: each["value"] for each in model["modelCard"]["properties"]}
    assert float(told["fedveil:client:model:epsilon"]) == report["privacy"][2]["epsilon"]
    assert "time" not in json.dumps(bill["metadata"]).split('"modelCard"')[0]
