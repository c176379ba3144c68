"""Trail of who decided what: purposes, refusals and acts of people stand on the ledger, cost nothing, and read as sentences."""

import json
from pathlib import Path
from typing import Any

import pytest
from shared.runs import run_quietly
from shared.tasks import RealPoints

import fedveil as fv
from fedveil.cli.budget import set_budget
from fedveil.cli.ledger import show
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.ledger.acts import acting_user
from fedveil.privacy.ledger.caps import read_caps
from fedveil.privacy.ledger.ledger import Ledger, read_entries, verify
from fedveil.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

QUICK = ("task=digits", "task.num_clients=20", "batch_size=40", "cohort.rate=0.4", "audit=off")
NOISY = ("privacy.noise_multiplier=1", "privacy.allow_large_delta=true")


class Clinics(RealPoints):
    """Clinics with 40 patients each."""

    data_id, rows = "clinics", 40


def acts(ledger: Path) -> dict[str, dict[str, Any]]:
    usual = ("open", "reserve", "commit", "void", "note", "close")
    return {each.kind: json.loads(each.payload) for each in read_entries(ledger) if each.kind not in usual}


def test_a_refusal_is_an_entry_that_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    more = ("privacy.target_epsilon=8", "num_rounds=50", "purpose='reading the hour'")
    assert run_quietly([*QUICK, *NOISY, *more], run).exit_code == 3
    result, found = json.loads((run / "result.json").read_text()), verify(run / "ledger")
    assert acts(run / "ledger")["refusal"]["reason"] == result["reason"] and found.ok
    assert found.epsilon == pytest.approx(result["privacy"][2]["epsilon"], rel=1e-9)
    for entry in read_entries(run / "ledger"):
        if entry.kind == "reserve":
            assert json.loads(entry.payload)["purpose"] == "reading the hour"
    capsys.readouterr()
    assert show(run) == 0
    told = capsys.readouterr().out
    assert "purpose reading the hour" in told and "was refused at no cost: the client budget is spent" in told
    assert (
        "against the clients and the model; rng seeded; released, model " in told
        and "The run was closed, exhausted" in told
    )


def test_acts_of_people_state_actor_and_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledgers = tmp_path / "ledgers"
    assert set_budget("50", "1e-2", reason="the board of 3 May", ledger_dir=ledgers) == 0
    (cap,) = read_caps(ledgers)
    assert (cap.who, cap.reason) == (acting_user(), "the board of 3 May")
    keys: dict[str, Any] = {"num_rounds": 1, "ledger": {"dir": str(ledgers)}, "quiet": True}
    keys |= {
        "privacy": fv.ClientCentral(target_delta=1e-3, target_epsilon=9),
        "reason": "a trial of the link",
    }
    done = fv.simulate(Clinics(), folder=tmp_path / "run", accept_vacuous=True, **keys)
    assert done.status == "completed"
    found = acts(next(ledgers.glob("population-*.ledger")))
    assert set(found) == {"cap changed", "vacuous promise accepted"}
    assert (
        found["cap changed"]["target_epsilon"] == 50
        and found["cap changed"]["reason"] == "the board of 3 May"
    )
    assert found["vacuous promise accepted"]["who"] == acting_user()
    assert found["vacuous promise accepted"]["reason"] == "a trial of the link"
    capsys.readouterr()
    assert show(ledgers) == 0
    told = capsys.readouterr().out
    assert f"Cap changed by {acting_user()} to epsilon 50 at delta 0.01" in told
    assert f"Vacuous promise accepted by {acting_user()}: a trial of the link." in told


def test_resumption_despite_an_alarm_names_its_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedveil.audit.auditor import Auditor
    from fedveil.privacy.audit.alarms import Alarm, Check, Level

    run, more = tmp_path / "run", ("audit=light", "audit.on_alarm=pause", "num_rounds=2")
    with monkeypatch.context() as patch:
        patch.setattr(Auditor, "take", lambda *_: [Alarm(Level.RED, Check.NORM, 1e-20, 1e-3)])
        settings = settings_from_overrides([*QUICK[:-1], *NOISY, "privacy.target_epsilon=null", *more])
        assert simulate(settings, run, quiet=True).result["status"] == "paused"
    assert acts(run / "ledger") == {}
    again = settings_from_overrides([f"resume={run}", "reason='the alarm was of a test'"])
    assert simulate(again, run, quiet=True).result["status"] == "completed"
    found = acts(run / "ledger")["alarm overridden"]
    assert (found["who"], found["reason"]) == (acting_user(), "the alarm was of a test")


def test_show_lists_the_newest_run_last_and_only_requested_acts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dp_accounting import GaussianDpEvent

    budget = fv.Budget("record", 5.0, 1e-6)
    for run, purpose in (("first", "counting"), ("second", None), ("third", "billing")):
        with Ledger.open(tmp_path / "a.ledger", budget, owner="clinic", simulated=False) as ledger:
            ledger.purpose = purpose
            release = fv.Release("record", run, 1, "mean age", {"model": GaussianDpEvent(9.0)}, rng="system")
            ledger.reserve_new(release)
            ledger.commit(release.key)

    def told(run: str | None = None, unit: str | None = None, purpose: str | None = None) -> list[str]:
        capsys.readouterr()
        show(tmp_path, run, unit, purpose)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]

    assert told() == ["run first, purpose counting", "run second", "run third, purpose billing"]
    assert told("se") == ["run second"]
    assert told(None, "client") == [] and len(told(None, "record")) == 3
    assert told(None, None, "bill") == ["run third, purpose billing"]
    show(tmp_path / "a.ledger", "third", as_json=True)
    assert {json.loads(each["key"])[0] for each in json.loads(capsys.readouterr().out)} == {"third"}
    assert verify(tmp_path / "a.ledger").ok
