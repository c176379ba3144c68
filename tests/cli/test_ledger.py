"""Verbs of fedveil ledger on folders, locks and damaged files."""

import csv
import io
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent

from fedveil.privacy.budget import Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.ledger import Ledger

OLD = Path(__file__).parents[1] / "fixtures" / "before_the_rooms" / "run" / "ledger"
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


def test_an_old_ledger_reads_as_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ledger", "show", str(OLD)]) == 0
    shown = capsys.readouterr().out
    assert (
        "epsilon" in shown
        and "started by" not in shown
        and "model " not in shown.split("\n", 1)[1].split(";")[0]
    )


def test_the_newest_entry_comes_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ledger"
    with Ledger.open(path, Budget(Unit.CLIENT, 9.0, 1e-5), owner="p", simulated=True) as ledger:
        ledger.purpose, ledger.origin = "=1+1", {"who": "alice"}
        for name in ("first", "second"):
            release = Release(
                Unit.CLIENT, name, 1, "update", {Adversary.MODEL: GaussianDpEvent(9.0)}, "seeded"
            )
            ledger.commit(ledger.reserve(release) and release.key)
    assert run(["ledger", "show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("run first") < shown.index("run second") < shown.index("     4  ")
    assert run(["ledger", "show", str(path), "--csv", "--run", "second"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["act"], row["who"], row["round"], row["purpose"]) == ("training", "alice", "1", "'=1+1")
    assert 0 < float(row["epsilon"]) < float(row["target_epsilon"]) == 9.0
    assert run(["ledger", "show", str(path), "--csv", "--json"]) == 2
