"""Model card: those who read it can read it, and nothing given by a user becomes markup."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedveil.evidence.card import card_of, contradicts, plain

EVIL = "x|y\n---\n# <script>alert(1)</script> [a](javascript:b) `c`"


def test_hugging_face_reads_the_card(golden: dict[str, Any]) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCardData(
        **yaml.safe_load(card_of(golden).split("---\n")[1]), ignore_metadata_errors=False
    )
    (accuracy, loss) = data.eval_results
    assert accuracy.metric_type == "accuracy" and accuracy.metric_value == golden["metrics"][0]["value"]
    assert loss.metric_type == "loss" and data.library_name == "fedveil"


def test_the_card_says_the_promise(golden: dict[str, Any]) -> None:
    card = re.sub(r"\\(.)", r"\1", card_of(golden))
    for sentence in golden["promise"]:
        assert sentence in card
    assert "| recipients of the model | everything that one client contributes | 3.00 | 0.0001 |" in card
    assert all(each["said"] in card for each in golden["not_covered"] if each["state"] == "not covered")


def test_a_card_of_a_better_guarantee_contradicts_its_report(golden: dict[str, Any], tmp_path: Path) -> None:
    assert not contradicts(tmp_path, golden)
    for text, expected in ((card_of(golden), False), (card_of(golden).replace(r"3\.00", r"0\.10"), True)):
        (tmp_path / "CARD.md").write_text(text)
        assert contradicts(tmp_path, golden) is expected


def test_a_name_is_no_markdown_and_no_yaml(golden: dict[str, Any]) -> None:
    honest = card_of(golden)
    golden["model"]["title"] = golden["model"]["intended"] = golden["run"]["task"] = EVIL
    golden["metrics"][0]["name"] = golden["not_covered"][0]["said"] = EVIL
    card = card_of(golden)
    front = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert front["model-index"][0]["results"][0]["task"]["name"] == EVIL
    body = card.split("\n---\n\n", 1)[1]
    assert len(body.splitlines()) == len(honest.split("\n---\n\n", 1)[1].splitlines())
    assert not re.search(r"(?<!\\)[<`]", body.replace("`report.html`", "").replace("`report.json`", ""))


def test_a_plain_text_is_one_line() -> None:
    assert plain("a\nb\u2028c *d*") == r"a b c \*d\*"
