"""The origin of a run: its names of data, roster and model, all of them public."""

import json
from pathlib import Path

import pytest
from shared.runs import run_quietly

from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.ledger.acts import acting_user
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.ledger.store import ledgers_in
from fedveil.run.build import build
from fedveil.run.origin import origin_of


class Roster:
    """Version 7 of a roster."""

    version = 7
    hash = b"\1" * 32


def test_an_origin_has_the_roster_by_version_and_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = build(settings_from_overrides(["task=digits"]))
    monkeypatch.setattr(type(federation.population), "rosters", (Roster(),))
    assert origin_of(federation) == {
        "who": acting_user(),
        "task": "digits",
        "clients": 25,
        "roster": {"version": 7, "hash": "01" * 32},
    }


def test_every_client_ledger_of_a_run_has_its_origin(tmp_path: Path) -> None:
    run_quietly(
        ["task=heart", "privacy=record", "num_rounds=1", "audit=off", "purpose=rates"], tmp_path / "run"
    )
    ledgers = ledgers_in(tmp_path / "run" / "client_ledgers")
    assert len(ledgers) == 4
    for ledger in ledgers:
        payload = json.loads(read_entries(ledger)[1].payload)
        assert (payload["origin"]["who"], payload["origin"]["task"]) == (acting_user(), "heart")
        assert payload["purpose"] == "rates" and "purpose" not in payload["origin"]
