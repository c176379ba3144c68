"""Fixtures of the tests of the command line."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from shared.console import Console, completed

run: Callable[[list[str]], int] = import_module("fedveil.__main__").run


@pytest.fixture
def console(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Console:
    monkeypatch.chdir(tmp_path)
    console = Console(capsys, monkeypatch, tmp_path)
    console.simulator(lambda settings, folder: (0, completed(0.9, 2.98)))
    return console


@pytest.fixture
def say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def command(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return command
