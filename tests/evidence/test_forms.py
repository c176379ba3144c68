"""Forms: their facts, their answers, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from fedveil.base.refusal import Refusal
from fedveil.evidence.forms import FIELDS, empty_assessment, nist_blocks, read_assessment
from fedveil.run.run_files import Assessment


def test_the_blocks_of_nist_name_each_unit_that_is_hidden(golden: dict[str, Any]) -> None:
    record = {"unit": "record", "hides": "one example of one client", "epsilon": 1.0, "delta": 1e-5}
    rows = [{**golden["privacy"][-1], **record}, *golden["privacy"]]
    size, unit = (block["says"] for block in nist_blocks({**golden, "privacy": rows})[:2])
    alone = golden["nist"][0]["says"].removesuffix(".").removeprefix("At most ")
    assert size == f"At most 1.00 at delta 1e-05 for one record, and {alone} for one client."
    assert unit.startswith("One record: ") and unit.endswith(golden["nist"][1]["says"])


def test_an_empty_assessment_answers_nothing(tmp_path: Path) -> None:
    path = tmp_path / "assessment.yaml"
    assert read_assessment(path) == Assessment()
    path.write_text(empty_assessment())
    assert read_assessment(path) == Assessment()
    assert all(f"\n{field}: ''\n" in empty_assessment() for field in FIELDS)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gdpr_35_7_z: 'x'", "gdpr_35_7_z"),
        ("gdpr_35_7_a: 3", "gdpr_35_7_a"),
        ("gdpr_35_7_a: {a: b}", "gdpr_35_7_a"),
        ("price_of_kwh: dear", "price_of_kwh"),
        ("price_of_kwh: -1", "at least 0"),
        ("watts_of_core: true", "watts_of_core"),
        ("- a", "holds no fields"),
        (f"gdpr_35_7_a: '{'x' * 4001}'", "at most 4000"),
    ],
)
def test_an_answer_that_is_none_is_refused(tmp_path: Path, text: str, names: str) -> None:
    path = tmp_path / "assessment.yaml"
    path.write_text(text)
    with pytest.raises(Refusal, match=names):
        read_assessment(path)
