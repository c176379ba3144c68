"""Answers on record: given once, to the clients that were asked, and by one process."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest
from shared.questions import FREE, Ages, Few, federation, inquiry
from shared.runs import reservations

from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.modes.federation import Federation
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.ledger.ledger_state import RESERVE
from fedveil.privacy.statistics.inquiry import read_inquiry
from fedveil.questions import ask as asks
from fedveil.questions.question_plan import Spend
from fedveil.questions.simulated import ask_here
from fedveil.run.build import build


def test_repeated_question_is_answered_from_the_record(tmp_path: Path) -> None:
    parts = federation()
    first = ask_here(parts, inquiry(), FREE, tmp_path)
    again = ask_here(parts, inquiry(), FREE, tmp_path)
    assert again == {**first, "from_record": True} and len(reservations(tmp_path / "ledger")) == 1
    with pytest.raises(Refusal, match="use a new name"):
        ask_here(parts, inquiry(resolution=50, at_least=400), FREE, tmp_path)
    assert len(reservations(tmp_path / "ledger")) == 1


def test_an_answer_of_other_clients_is_no_answer(tmp_path: Path) -> None:
    def digits(clients: int, seed: int = 0) -> Federation:
        given = ["task=digits", f"task.num_clients={clients}", f"seed={seed}", "cohort=all"]
        return build(settings_from_overrides(given))

    labels = read_inquiry({"name": "labels", "records": 5, "ask": [{"kind": "count", "name": "rows"}]})
    spend = Spend(epsilon=1.0)
    first = ask_here(digits(60), labels, spend, tmp_path)
    assert ask_here(digits(60), labels, spend, tmp_path) == {**first, "from_record": True}
    for others in (digits(80), digits(60, seed=1)):
        with pytest.raises(Refusal, match="asked of other clients"):
            ask_here(others, labels, spend, tmp_path)


def test_real_answer_with_a_lost_record_is_not_repeated(tmp_path: Path) -> None:
    class Real(Ages):
        simulated, data_id = False, "ages-2026"

    where = f"ledger.dir={tmp_path / 'ledgers'}"
    parts = federation(where, "task.held_out=public", task=Real())
    record = ask_here(parts, inquiry(), FREE, tmp_path)
    assert record["rng"] == "system"
    (tmp_path / "ages.json").unlink()
    with pytest.raises(Refusal, match="take a new key"):
        ask_here(parts, inquiry(), FREE, tmp_path)


def test_question_answered_by_another_process_is_not_charged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = f"ledger.dir={tmp_path / 'ledgers'}", "task.held_out=public", "accept_vacuous=true"
    once, alone = partial(ask_here, spend=Spend(epsilon=2), folder=tmp_path / "q"), asks.lock_records

    def waiting(parts: Federation) -> AbstractContextManager[None]:
        monkeypatch.setattr(asks, "lock_records", alone)
        assert not once(federation(*given, task=Few()), inquiry())["from_record"]
        return alone(parts)

    monkeypatch.setattr(asks, "lock_records", waiting)
    assert once(federation(*given, task=Few()), inquiry())["from_record"]
    (ledger,) = (tmp_path / "ledgers").glob("*.ledger")
    assert sum(each.kind == RESERVE for each in read_entries(ledger)) == 1
