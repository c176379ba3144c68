"""``fedveil report``: what it writes, what it refuses, and the commands that it names."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedveil.configs.compose import compose_overrides
from fedveil.configs.settings import publishable_keys
from fedveil.evidence.commands import commands_of
from fedveil.evidence.content import report_of
from fedveil.run.run_files import flat, read_run

MADE = ("report.html", "report.json", "CARD.md", "bom.cdx.json")
KEPT = Path(__file__).parents[1] / "fixtures" / "reported_run"
SIGNED = Path(__file__).parents[1] / "fixtures" / "signed_run" / "run"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("golden")
    return Path(shutil.copytree(KEPT, tmp_path / "kept", ignore=ignored))


def test_it_writes_the_page_the_json_and_the_empty_form(kept: Path, commands: Any) -> None:
    code, said = commands.run("report", str(kept))
    assert code == 0, said.err
    assert "19 fields of assessment.yaml are empty" in said.out
    first = {name: (kept / name).read_bytes() for name in (*MADE, "assessment.yaml")}
    answered = first["assessment.yaml"].decode().replace("gdpr_35_7_a: ''", "gdpr_35_7_a: 'To read digits.'")
    (kept / "assessment.yaml").write_text(answered)
    code, said = commands.run("report", str(kept), "--out", str(kept / "again"))
    assert code == 0, said.err
    assert sorted(path.name for path in (kept / "again").iterdir()) == sorted(MADE)
    assert b"To read digits." in (kept / "again" / "report.html").read_bytes()
    (kept / "assessment.yaml").unlink()
    code, said = commands.run("report", str(kept))
    assert code == 0 and first == {name: (kept / name).read_bytes() for name in first}


def test_its_json_stands_alone(kept: Path, commands: Any) -> None:
    before = sorted(kept.iterdir())
    code, said = commands.run("report", str(kept), "--json")
    assert code == 0, said.err
    assert json.loads(said.out)["format"] == "fedveil report 1"
    assert sorted(kept.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--assessment", "nowhere.yaml"], "does not exist"),
        (["--out", "config.yaml/below"], "cannot be written"),
    ],
)
def test_it_refuses_in_a_sentence(kept: Path, commands: Any, arguments: list[str], says: str) -> None:
    option, value = arguments
    code, said = commands.run("report", str(kept), option, str(kept / value))
    assert code == 2 and says in said.err and not (kept / "report.html").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path, commands: Any) -> None:
    code, said = commands.run("report", str(tmp_path))
    assert code == 2 and "holds no run" in said.err


@pytest.mark.parametrize(
    ("words", "file", "before", "after"),
    [
        (["report"], "metrics.jsonl", '"epsilon_client": ', '"epsilon_client": [], "other": '),
        (["report"], "result.json", '"privacy": [', '"privacy": [7, '),
        (["report", "compare", str(KEPT)], "result.json", '"privacy": [', '"privacy": [7, '),
    ],
)
def test_files_that_no_run_has_written_are_refused(
    kept: Path, commands: Any, words: list[str], file: str, before: str, after: str
) -> None:
    text = (kept / file).read_text()
    (kept / file).write_text(text.replace(before, after))
    code, said = commands.run(*words, str(kept))
    assert before in text and code == 2 and "holds what no run has written" in said.err


def test_the_first_command_makes_the_same_configuration() -> None:
    run = read_run(KEPT)
    words = shlex.split(commands_of(run)[0])
    assert words[:2] == ["fedveil", "simulate"] and len(words) < 20
    again = dict(flat(publishable_keys(compose_overrides(words[2:]).config)))
    kept = dict(flat(run.publishable))  # keys have been added since
    assert {key: again[key] for key in kept} == kept


def test_a_server_is_named_where_it_served(tmp_path: Path) -> None:
    folder = (
        Path(__file__).parents[1] / "fixtures" / "before_the_rooms" / "hearts" / "server" / "runs" / "before"
    )
    run = read_run(folder)
    assert run.deployed and commands_of(run)[0].startswith("fedveil server FOLDER ")
    assert report_of(run)["run"]["deployed"] is True


def test_a_bundle_needs_a_page_with_the_answers(tmp_path: Path, commands: Any) -> None:
    run = Path(shutil.copytree(SIGNED, tmp_path / "run"))
    (run / "ledger").chmod(0o600)
    assert commands.run("report", str(run))[0] == 0
    answers = (run / "assessment.yaml").read_text()
    (run / "assessment.yaml").write_text(answers.replace("gdpr_35_7_c: ''", "gdpr_35_7_c: 'None is known.'"))
    code, said = commands.run("report", "bundle", str(run))
    assert (
        code == 2
        and "its page lacks the answer gdpr_35_7_c of assessment.yaml; run fedveil report RUN again"
        in said.err
    )
    assert not (run / "bundle").exists()
    assert commands.run("report", str(run))[0] == commands.run("report", "bundle", str(run))[0] == 0
    assert "None is known." in (run / "bundle" / "report.html").read_text()


def test_a_bundle_without_a_ledger_has_no_program_for_it(tmp_path: Path, commands: Any) -> None:
    simulate = (
        "simulate",
        "task=digits",
        "privacy=none",
        "num_rounds=1",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert commands.run(*simulate)[0] == commands.run("report", "bundle", str(tmp_path / "run"))[0] == 0
    assert not {"ledger.json", "recompute_ledger.py"} & {
        each.name for each in (tmp_path / "run" / "bundle").iterdir()
    }
    code, said = commands.run("ledger", "show", str(tmp_path / "run"))
    assert code == 2 and "is a run without a ledger of its own" in said.err
