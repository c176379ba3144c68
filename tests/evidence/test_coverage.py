"""Limits of a guarantee, for each kind of run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from dp_accounting.dp_event import GaussianDpEvent
from shared.reports import set_fields, validated

from fedveil.evidence.content import report_of
from fedveil.evidence.coverage import not_covered
from fedveil.privacy.budget import Adversary, Budget, Release
from fedveil.privacy.ledger.ledger import Ledger, read_entries
from fedveil.run.run_files import read_run


def test_trusted_server_sees_all_despite_the_secrets_of_another_run(kept: Path) -> None:
    (kept / "result.json").unlink()
    identity = json.loads(read_entries(kept / "ledger")[0].payload)
    budget = Budget(identity["unit"], 9.0, 1e-4, adjacency=identity["adjacency"])
    with Ledger.open(kept / "ledger", budget, owner=identity["owner"], simulated=True) as ledger:
        events = dict.fromkeys(Adversary, GaussianDpEvent(50.0))
        ledger.reserve(Release(identity["unit"], "masked", 1, "private_sum", events, rng="system"))
    rows = {row["adversary"]: row["epsilon"] for row in report_of(read_run(kept))["privacy"]}
    assert rows["server"] == "infinity" and rows["model"] > 0


@pytest.mark.parametrize("mode", ["record", "record_and_client", "record_distributed", "client_central"])
def test_rounding_of_gradients_is_not_called_covered(kept: Path, mode: str) -> None:
    run = read_run(kept)
    limits = not_covered(replace(run, config={**run.config, "privacy": {"name": mode}}), [], None)
    (found,) = (each for each in limits if each["limit"] == "Floating-point noise")
    assert (found["state"] == "not covered" and "float32" in found["said"]) is mode.startswith("record")


def test_held_out_data_that_nobody_has_are_not_called_public(kept: Path) -> None:
    (kept / "metrics.jsonl").write_text(
        '{"round": 1, "train/loss": 0.5, "invited": 9.0, "clients/accuracy": 0.5}\n'
    )
    set_fields(kept / "result.json", metrics={"clients/accuracy": 0.5, "train/loss": 0.5}, data="real")
    report = validated(report_of(read_run(kept)))
    (found,) = (each for each in report["not_covered"] if each["limit"] == "Held-out data")
    assert (found["state"], found["said"]) == ("covered", "No metric was computed on held-out data.")
