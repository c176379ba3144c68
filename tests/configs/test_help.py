"""Help on keys: sections, the texts that are shipped, and the keys that have to be composed."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from fedveil.configs import help as keys_help
from fedveil.configs.compose import compose_overrides
from fedveil.configs.help import FILE, SECTIONS, heading, shipped_text
from fedveil.configs.reference import help_text, shipped_json, source_digest
from fedveil.configs.schema import SimulationSettings

run: Callable[[list[str]], int] = import_module("fedveil.__main__").run


def test_the_shipped_help_has_these_models() -> None:
    assert json.loads(FILE.read_text("utf-8"))["made_from"] == source_digest(), (
        "run: python docs/make_reference.py"
    )


@pytest.mark.campaign
def test_the_shipped_help_is_that_of_the_models() -> None:
    assert FILE.read_text(encoding="utf-8") == shipped_json(), "run: python docs/make_reference.py"


@pytest.mark.parametrize("words", [[], ["task=csv"], ["privacy=record"], ["optimizer=adamw"]], ids=str)
def test_shipped_help_is_what_would_be_composed(words: list[str]) -> None:
    assert shipped_text("config", words) == help_text(compose_overrides(words).config, SimulationSettings)


@pytest.mark.parametrize("words", [["task=csv", "privacy=none"], ["num_rounds=3"], ["task=mine"]], ids=str)
def test_help_of_other_overrides_is_composed(words: list[str]) -> None:
    assert shipped_text("config", words) == ""


def test_keys_of_the_task_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "task=csv", "--help"]) == 0
    out = capsys.readouterr().out
    keys = [
        line.split("=")[0].strip() for line in out.splitlines() if line.startswith("  task") and "=" in line
    ]
    assert keys[:3] == ["task", "task.folder", "task.label"]
    assert out.index("\n  task=csv") < out.index("\n  privacy=record ") < out.index("\n  num_rounds=")


def test_composed_help_has_the_values_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--help", "num_rounds=7", "task=digits"]) == 0
    out = capsys.readouterr().out
    assert "\n  num_rounds=7 " in out and "\n  task=digits " in out


@pytest.mark.parametrize("name", ["config", "server"])
def test_every_key_has_a_section(name: str) -> None:
    sections = {key for keys in SECTIONS.values() for key in keys}
    parts = {part for rows in json.loads(FILE.read_text("utf-8"))[name].values() for part in rows}
    others = {part for part in parts - sections if not part.startswith("metrics_")}  # of a server alone
    assert others == set()


def test_help_imports_neither_hydra_nor_rich() -> None:
    script = (
        "import sys; from fedveil.__main__ import run; code = run(['simulate', 'task=csv', '--help']);"
        "print(sorted({'torch', 'hydra', 'pydantic', 'rich', 'numpy'} & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_help_is_composed_where_an_extension_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(keys_help, "PACKAGE", tmp_path)
    assert shipped_text("config", []) == ""


@pytest.mark.parametrize(("no_color", "bold"), [("", True), ("1", False)], ids=["plain", "NO_COLOR"])
def test_headings_are_bold_on_a_terminal_alone(no_color: str, bold: bool) -> None:
    assert heading("Run:") == "Run:"
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "fedveil", "--help"]
    environment = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm", "COLUMNS": "80"}
    subprocess.run(command, stdout=terminal, env=environment, check=True)
    shown = os.read(main, 65536)
    os.close(terminal)
    os.close(main)
    assert (b"\x1b[1mRun:\x1b[0m" in shown) == bold
    assert b"Run:" in shown
