"""`fedveil new`: every template makes a project that runs and whose own test passes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.cli.new import COMMANDS, TEMPLATES
from fedveil.tasks.tables import load

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")


def test_every_template_has_a_command_and_a_test() -> None:
    assert {folder.name for folder in TEMPLATES.iterdir()} == set(COMMANDS)
    assert all((TEMPLATES / kind / "test_project.py").exists() for kind in COMMANDS)


# Tables and scikit-learn take the longest.
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.campaign if kind in ("csv", "sklearn") else ())
        for kind in COMMANDS
    ],
)
def test_a_project_runs_and_its_test_passes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    assert run(["new", str(folder), "--from", kind]) == 0
    shown = capsys.readouterr().out
    assert kind == "flower" or 'data_id: "mine"' in (folder / "project.yaml").read_text()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands = [line.partition("&& ")[2] for line in shown.splitlines() if "&&" in line]
    assert commands == [COMMANDS[kind], "python -m pytest"]
    if kind == "csv":  # the tests of the others run their command themselves
        commands[0] += " num_rounds=1"
    else:
        del commands[0]
    for command in commands:
        done = subprocess.run(
            shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_command_installs_pytest_where_it_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.cli.new.find_spec", lambda _: None)
    assert run(["new", str(tmp_path / "my shops"), "--from", "torch"]) == 0
    assert f"pip install pytest && cd '{tmp_path}/my shops' && python -m pytest" in capsys.readouterr().out


def test_draft_names_sites_with_other_words_and_no_run_trains_on_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, draft = tmp_path / "data", tmp_path / "draft"
    data.mkdir()
    for name, words in (("east", "MB"), ("north", "BM"), ("south", ("malignant", "benign")), ("west", "10")):
        rows = "".join(f"{row},{word}\n" for row in range(30) for word in words)
        (data / f"{name}.csv").write_text(f"x,diagnosis\n{rows}")
    assert run(["new", str(draft), "--from", "csv", str(data)]) == 0
    said = (
        "diagnosis has other words in other tables (east.csv, north.csv: B, M; south.csv: benign, malignant; "
    )
    shown = capsys.readouterr().out
    assert said in shown and "Proposed as one: B, 0 -> benign; M, 1 -> malignant." in shown
    schema = draft / "schema.yaml"
    with pytest.raises(Refusal, match=r"task.label='diagnosis': name a column of"):
        load(str(data), schema=str(schema))
    for classes, start in ((2, "#  diagnosis: {categories: {benign"), (6, "#  diagnosis: {categories: [")):
        chosen = tmp_path / f"{classes}.yaml"
        chosen.write_text(schema.read_text().replace(start, start[1:]))
        assert load(str(data), schema=str(chosen)).classes == classes


def test_a_folder_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").touch()
    assert run(["new", str(tmp_path)]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    assert run(["new", str(tmp_path / "x"), "--from", "excel"]) == 2
    assert capsys.readouterr().err == "--from='excel': choose one of csv, torch, sklearn, flower\n"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
