"""Three columns of personal models: on the screen, in comparisons, plans and reports."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from shared.reports import validated

import fedveil as fv
from fedveil.cli.compare import format_table, read_rows
from fedveil.cli.plan import show_plan
from fedveil.configs.settings import settings_from_overrides
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import verify_folder
from fedveil.evidence.content import report_of, to_json
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import differences
from fedveil.run.display import own_lines
from fedveil.run.run_files import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("personal") / "run"
    keys: dict[str, Any] = {"task": {"name": "digits", "num_clients": 5}, "personal": "after"}
    fv.simulate(**keys, privacy="none", num_rounds=2, quiet=True, folder=folder)
    return folder


def test_the_screen_shows_three_columns(run: Path) -> None:
    metrics = json.loads((run / "result.json").read_bytes())["metrics"]
    (line,) = own_lines(metrics)
    for column in ("shared", "personal", "local_only"):
        assert f"{column.replace('_', ' ')} accuracy {metrics[f'{column}/accuracy']:.4f}" in line
    assert own_lines({"accuracy": 0.5, "groups/sex=f/accuracy": 0.5}) == []


def test_compare_shows_all_three_columns_or_none(run: Path) -> None:
    header = format_table(read_rows([run])).splitlines()[0].split()
    assert header[1:6] == ["accuracy", "loss", "shared/accuracy", "personal/accuracy", "local_only/accuracy"]


def test_the_page_says_whom_a_personal_model_protects_from(run: Path) -> None:
    report = validated(json.loads(to_json(report_of(read_run(run)))))
    page = page_of(report)
    assert differences(page, report) == []
    assert "A personal model has no privacy towards whoever gets it" in page
    assert [each["name"] for each in report["personal"]["columns"]] == ["accuracy", "loss"]
    assert not [each for each in report["metrics"] if "/" in each["name"]]


def test_verify_finds_a_changed_column_of_a_report(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    report = report_of(read_run(copy))
    report["personal"]["columns"][0]["values"][1] = 1.5
    (copy / "report.json").write_text(to_json(report))
    (copy / "report.html").write_text(page_of(report))
    (line,) = [each for each in verify_folder(copy, Knowledge()) if each.name == "page"]
    assert line.ok is False
    assert "of personal models is [" in str(line)


@pytest.mark.parametrize("mode", ["client_central", "record_and_client"])
def test_a_plan_says_once_that_they_cost_nothing(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(settings_from_overrides([f"privacy={mode}", "task=digits", "personal=after"]))
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("Personal models cost nothing at server, clients and model") == 1
