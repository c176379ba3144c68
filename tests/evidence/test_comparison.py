"""Comparison of two runs: what differs is told once, in the order of the page, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from shared.reports import KEPT

from fedveil.evidence.comparison import compare_reports
from fedveil.evidence.content import report_of
from fedveil.run.run_files import read_run


@pytest.fixture
def other(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(KEPT, tmp_path / "other"))
    config = (folder / "config.yaml").read_text()
    assert "target_epsilon: 3.0" in config
    (folder / "config.yaml").write_text(config.replace("target_epsilon: 3.0", "target_epsilon: 8.0"))
    result = json.loads((folder / "result.json").read_text())
    result["metrics"]["accuracy"] = 0.9
    for row in result["privacy"]:
        row["epsilon"] = row["epsilon"] if row["epsilon"] == "infinity" else 7.123
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_run_does_not_differ_from_itself() -> None:
    report = report_of(read_run(KEPT))
    assert compare_reports(report, report) == []
    whole = compare_reports(report, report, everything=True)
    assert len(whole) > 60 and all(each.first == each.second for each in whole)
    assert len({(each.part, each.name) for each in whole}) == len(whole)


def test_differences_are_the_changed_settings(other: Path) -> None:
    rows = compare_reports(report_of(read_run(KEPT)), report_of(read_run(other)))
    told = {(each.part, each.name): (each.first, each.second) for each in rows}
    assert told["how", "privacy.target_epsilon"] == ("3.0", "8.0")
    assert told["quality", "accuracy"] == ("0.6444", "0.9")
    assert told["promise", "epsilon of one client, against recipients of the model"] == ("3.00", "7.13")
    assert {part for part, _ in told} == {"how", "quality", "promise"}
    assert [each.part for each in rows] == sorted(
        (each.part for each in rows), key=["promise", "quality", "how"].index
    )


def test_a_run_that_goes_on_is_compared_as_well(other: Path) -> None:
    (other / "result.json").unlink()
    rows = compare_reports(report_of(read_run(KEPT)), report_of(read_run(other)))
    told = {(each.part, each.name): each.second for each in rows}
    assert told["run", "status"] == "not ended" and told["how", "seed that was used"] == "not recorded"


def test_the_command_prints_a_table_or_json(other: Path, commands: Any) -> None:
    code, said = commands.run("report", "compare", str(KEPT), str(other))
    assert code == 0 and "privacy.target_epsilon" in said.out and "promise" in said.out
    assert said.out.split()[:2] == [KEPT.name, other.name]
    code, said = commands.run("report", "compare", str(KEPT), str(KEPT))
    assert code == 0 and said.out.strip() == "the reports of both runs are the same"
    code, said = commands.run("report", "compare", str(KEPT), str(other), "--json")
    assert code == 0 and {each["part"] for each in json.loads(said.out)["values"]} == {
        "how",
        "quality",
        "promise",
    }


def test_a_folder_without_a_run_is_refused(tmp_path: Path, commands: Any) -> None:
    code, said = commands.run("report", "compare", str(KEPT), str(tmp_path))
    assert code == 2 and "holds no run" in said.err
