"""Somebody else's Flower app: as it is, and after the edits that docs/flower-app.md shows."""

import runpy
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from fedveil.adapters.protect import NobodyAnswered
from fedveil.base.refusal import Refusal
from fedveil.privacy.ledger.caps import default_folder
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.simulations.in_process import InProcessGrid

DOCUMENTED: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "documented.py"))
EDITS = DOCUMENTED["documented_edits"]()
CONFIG = DOCUMENTED["RUN_CONFIG"]
CLIENTS = 40


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, where the app leaves its model, and a home, where its ledger lies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def run(folder: Path, edits: list[Any], name: str = "app", clients: int = CLIENTS) -> None:
    torch.manual_seed(0)
    DOCUMENTED["write_app"](folder / name, edits)
    app = DOCUMENTED["import_app"](folder / name)
    app.run(InProcessGrid(app.client, clients, CONFIG))


def ledgers() -> list[Path]:
    return list(default_folder().glob("*.ledger"))


def with_budget(edits: list[Any], epsilon: str) -> list[Any]:
    return [
        replace(e, after=e.after.replace("target_epsilon=8.0", f"target_epsilon={epsilon}")) for e in edits
    ]


def test_the_page_edits_both_halves_of_the_app() -> None:
    assert [edit.file for edit in EDITS] == ["client_app.py"] * 2 + ["server_app.py"] * 2


def test_the_stock_app_learns_without_privacy(folder: Path) -> None:
    run(folder, [], clients=20)
    assert DOCUMENTED["accuracy"](folder / "final_model.pt") > 0.8
    assert not ledgers()


def test_edited_app_spends_its_budget_once_over_two_runs(folder: Path) -> None:
    run(folder, EDITS, "first")
    (ledger,) = ledgers()
    report = verify(ledger)
    assert report.ok
    assert 7.9 < report.epsilon <= 8.0
    reserved = [entry for entry in read_entries(ledger) if entry.kind == "reserve"]
    assert len(reserved) == CONFIG["num-server-rounds"]
    with pytest.raises(Refusal, match="already spent"):
        run(folder, EDITS, "second")
    assert verify(ledger).entries == report.entries


def test_edited_app_with_little_noise_learns_like_the_stock_app(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.urandom", Random(0).randbytes)  # of the system's cohorts some learn little
    run(folder, with_budget(EDITS, "1e5"))
    assert DOCUMENTED["accuracy"](folder / "final_model.pt") > 0.5


def test_without_the_mod_nothing_of_a_client_enters_the_sum(folder: Path) -> None:
    """Who forgets the mod gets no model, and not one that leaks."""
    server_only = [edit for edit in with_budget(EDITS, "1e5") if edit.file == "server_app.py"]
    with pytest.raises(NobodyAnswered, match=r"round 1 \(layout\): .* has the mod private_update"):
        run(folder, server_only)
    assert not (folder / "final_model.pt").exists()
