"""Verbs of fedveil ledger on folders, locks and damaged files."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from fedveil.privacy.budget import Budget, Unit
from fedveil.privacy.ledger.ledger import Ledger

run: Callable[[list[str]], int] = import_module("fedveil.__main__").run


def test_ledgers_are_verified_by_a_pattern_without_their_neighbours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder, tmp_path = tmp_path, tmp_path / "client_ledgers"
    tmp_path.mkdir()
    for name in ("a.ledger", "b.ledger"):
        Ledger.open(tmp_path / name, Budget(Unit.CLIENT, 1.0, 1e-5), owner="0" * 32, simulated=False).close()
    (tmp_path / "a.ledger.lock").write_text("17")
    (tmp_path / "caps.json").write_text("{}")
    assert run(["ledger", "verify", *map(str, sorted(tmp_path.iterdir()))]) == 0
    output = " ".join(capsys.readouterr().out.split())  # a long path wraps its line
    assert output.count("every hash is correct") == 2 and "DAMAGED" not in output
    assert run(["ledger", "verify", str(tmp_path / "a.ledger.lock")]) == 2
    assert "is a lock or journal" in capsys.readouterr().err
    for folder in (tmp_path, run_folder):
        assert run(["ledger", "verify", str(folder)]) == run(["ledger", "show", str(folder)]) == 0
        assert " ".join(capsys.readouterr().out.split()).count("every hash is correct") == 2
    assert run(["ledger", "export", str(tmp_path)]) == 2
    assert "is a folder; give the path of one ledger in it" in capsys.readouterr().err
    (tmp_path / "b.ledger").write_bytes(b"nothing")
    assert run(["ledger", "verify", "--json", *map(str, sorted(tmp_path.glob("*")))]) == 1
    assert [json.loads(line)["ok"] for line in capsys.readouterr().out.splitlines()] == [True, False]
