"""History of a ledger in a report: its runs, refusals and heads."""

import json
from pathlib import Path
from typing import Any

from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from shared.reports import edited, validated

from fedveil.evidence.content import report_of
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import differences
from fedveil.privacy.budget import Adversary, Budget, Release
from fedveil.privacy.ledger.acts import acting_user
from fedveil.privacy.ledger.ledger import Ledger, read_entries
from fedveil.run.run_files import read_run


def test_a_budget_that_ended_a_run_is_a_refusal_on_the_page(kept: Path) -> None:
    reason = "the client budget is spent"
    edited(kept, "result.json", lambda fields: fields.update(status="exhausted", reason=reason))
    report = validated(report_of(read_run(kept)))
    assert report["ledger"]["refusals"] == [
        {"run": report["run"]["name"], "round": 7, "said": reason, "seq": None}
    ]
    page = page_of(report)
    assert 'class="cross refused"' in page and reason in page


def test_a_refusal_on_the_ledger_has_its_round(tmp_path: Path, commands: Any) -> None:
    folder = tmp_path / "run"
    overdrawn = ("privacy.noise_multiplier=2.5", "privacy.target_epsilon=0.6")
    code, _ = commands.run("simulate", "task=digits", "num_rounds=9", *overdrawn, f"hydra.run.dir={folder}")
    assert code == 3
    report = validated(report_of(read_run(folder)))
    (refusal,) = report["ledger"]["refusals"]
    assert refusal["round"] == report["run"]["rounds_completed"] + 1 and refusal["seq"]
    assert "is spent" in refusal["said"]
    assert 'class="cross refused"' in page_of(report)


def test_a_ledger_that_lost_its_head_is_named(kept: Path) -> None:
    edited(kept, "result.json", lambda fields: fields.update(ledger_head=[11, "0" * 64]))
    assert any("does not hold the entry" in each for each in report_of(read_run(kept))["missing"])


def test_all_runs_of_a_ledger_are_added_up(kept: Path) -> None:
    identity = json.loads(read_entries(kept / "ledger")[0].payload)
    budget = Budget("client", 9.0, 1e-4)
    with Ledger.open(kept / "ledger", budget, owner=identity["owner"], simulated=True) as ledger:
        for run in ("second", "third"):
            event = PoissonSampledDpEvent(0.25, GaussianDpEvent(2.0))
            events = {Adversary.MODEL: event, Adversary.CLIENTS: event}
            ledger.reserve_new(Release("client", run, 1, "private_sum", events, rng="seeded"))
        ledger.reserve_new(Release("client", "third", 2, "histogram", events, rng="seeded"))
    report = validated(report_of(read_run(kept)))
    runs = report["ledger"]["runs"]
    assert [row["this"] for row in runs] == [True, False, False]
    assert [row["releases"] for row in runs] == [6, 1, 2]
    sizes = [row["epsilon_after"] for row in runs]
    assert sizes == sorted(set(sizes)) and sizes[-1] == report["ledger"]["verified"]["epsilon"]
    assert {row["what"] for row in report["ledger"]["releases"]} == {"round of training", "question"}
    page = page_of(report)
    assert "chart-runs" in page and differences(page, report) == []


def test_run_is_compared_with_its_close(tmp_path: Path, commands: Any) -> None:
    folder = tmp_path / "run"
    code, said = commands.run("simulate", "task=digits", "num_rounds=1", f"hydra.run.dir={folder}")
    assert code == 0, said.err
    report = validated(report_of(read_run(folder)))
    assert report["ledger"]["close"]["held"] is True and report["missing"] == []
    assert report["ledger"]["acts"] == []
    heading, rows = report["ledger"]["trail"][-1].values()
    assert f"started by {acting_user()}, task digits" in heading
    assert [row["said"].split(",")[0] for row in rows] == ["Round 1", "The run was closed"]
    assert "Time line of the ledger" in page_of(report)
    edited(folder, "result.json", lambda fields: fields["metrics"].update(accuracy=1.0))
    report = validated(report_of(read_run(folder)))
    assert report["ledger"]["close"]["changed"] == ["result.json"]
    assert any(each.startswith("CHANGED since the run was closed: result.json") for each in report["missing"])
    edited(folder, "manifest.json", lambda fields: fields["files"].pop("result.json"))
    assert report_of(read_run(folder))["ledger"]["close"]["changed"] == ["manifest.json"]
