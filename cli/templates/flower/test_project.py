"""The app runs and learns, and its ledger holds every round within the budget."""

from pathlib import Path

import pytest
import run
import server_app

from fedveil.privacy.ledger.caps import default_folder
from fedveil.privacy.ledger.ledger import verify

BUDGET = 8.0


def test_it_learns_within_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    run.main()
    assert server_app.accuracy("model.pt") > 0.6
    (ledger,) = default_folder().glob("*.ledger")
    verification = verify(ledger)
    assert verification.ok and verification.epsilon <= BUDGET
