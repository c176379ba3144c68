"""Clients that vanish, fail, dawdle or answer nonsense: the round goes on, they are counted, the budget is charged."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shared.runs import json_lines, run_quietly

from fedveil.configs.schema import FaultSettings
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.simulations import faults as injected
from fedveil.simulations.deadline import PastDeadline
from fedveil.simulations.faults import pick_fault

pytestmark = pytest.mark.usefixtures("fast_runs")

ROUNDS = 3
COMMON = (
    "task=digits",
    "task.num_clients=12",
    f"num_rounds={ROUNDS}",
    "cohort=all",
    "batch_size=100",
    "local_epochs=1",
    "privacy.noise_multiplier=1",
    "privacy.target_epsilon=null",
    "privacy.allow_large_delta=true",
)
EVERY_KIND = (
    "faults.dropout=0.1",
    "faults.failure=0.1",
    "faults.corrupt=0.3",
    "faults.straggler=0.05",
    "engine.deadline=50",
)


def run(folder: Path, *overrides: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    outcome = run_quietly([*COMMON, *overrides], folder)
    told = json_lines(folder / "operator.jsonl")
    rows = json_lines(folder / "metrics.jsonl")
    return outcome.result, [row | more for row, more in zip(rows, told, strict=False)]


def dropped(rows: list[dict[str, Any]]) -> Counter[str]:
    return sum((Counter(row["dropped"]) for row in rows), Counter())


def reserved(folder: Path) -> int:
    return sum(entry.kind == "reserve" for entry in read_entries(folder / "ledger"))


@pytest.mark.parametrize(
    ("fault", "reasons"),
    [
        ("dropout", {"failed"}),
        ("failure", {"failed"}),
        ("straggler", {"late"}),
        ("corrupt", {"dtype", "shape"}),
    ],
)
def test_each_fault_is_counted_under_its_reason(tmp_path: Path, fault: str, reasons: set[str]) -> None:
    deadline = 0.25 if fault == "straggler" else 20  # which nobody misses, however busy the machine
    result, rows = run(tmp_path, f"faults.{fault}=0.3", f"engine.deadline={deadline}")
    assert result["status"] == "completed"
    assert dropped(rows).total() > 0 and set(dropped(rows)) <= reasons
    for row in rows:
        assert row["invited"] == 12
        assert row["replies"] + sum(row["dropped"].values()) == 12
        assert math.isfinite(row["accuracy"])
    assert reserved(tmp_path) == ROUNDS


def test_same_seed_draws_the_same_faults_on_one_and_on_two_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late_at_once(seconds: float) -> None:
        assert seconds > 50
        raise PastDeadline

    monkeypatch.setattr(injected, "time", SimpleNamespace(sleep=late_at_once))
    _, rows_of_one = run(tmp_path / "one", *EVERY_KIND)
    _, rows_of_two = run(tmp_path / "two", *EVERY_KIND, "engine.workers=2")
    assert {"late", "failed", "dtype", "shape"} <= set(dropped(rows_of_one))
    assert rows_of_two == rows_of_one
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert models[0] == models[1]


def test_another_seed_draws_other_faults(tmp_path: Path) -> None:
    results = [run(tmp_path / seed, "faults.corrupt=0.4", f"seed={seed}") for seed in ("0", "1")]
    assert [row["dropped"] for row in results[0][1]] != [row["dropped"] for row in results[1][1]]


def test_round_in_which_nobody_answers_is_charged_and_releases_noise(tmp_path: Path) -> None:
    result, rows = run(tmp_path, "faults.failure=1")
    assert (result["status"], result["rounds_completed"]) == ("failed", ROUNDS)
    assert result["reason"] == "no client ever replied (failed)"
    assert [row["replies"] for row in rows] == [0] * ROUNDS
    assert len({row["loss"] for row in rows}) == ROUNDS
    assert reserved(tmp_path) == ROUNDS


def test_incredible_values_stay_out_of_the_mean(tmp_path: Path) -> None:
    overrides = [*COMMON[:6], "privacy=none", "faults.corrupt=0.6"]
    outcome = run_quietly(overrides, tmp_path)
    assert {"shape", "not finite", "dtype"} <= set(outcome.result["dropped"])
    assert math.isfinite(outcome.result["metrics"]["loss"])


def test_an_update_that_is_far_too_long_is_clipped_again(tmp_path: Path) -> None:
    _, rows = run(tmp_path, "faults.corrupt=1", "num_rounds=2")
    assert sum(row["clipped_again"] for row in rows) == sum(row["replies"] for row in rows) > 0


def test_clients_with_a_spent_budget_are_dropped(tmp_path: Path) -> None:
    record = ("privacy=record", "privacy.noise_multiplier=1", "privacy.target_epsilon=8")
    outcome = run_quietly([*COMMON[:6], *record], tmp_path)
    rows = json_lines(tmp_path / "metrics.jsonl")
    assert outcome.exit_code == 3
    assert rows[0]["dropped"] == {}
    assert rows[-1]["dropped"] == {"budget spent": 12}
    assert 0 < outcome.result["privacy"][0]["epsilon"] <= 8


def test_probabilities_share_one_uniform_number() -> None:
    faults = FaultSettings(dropout=0.1, failure=0.2, straggler=0.3, corrupt=0.2)
    picks = [pick_fault(faults, (k + 0.5) / 1000) for k in range(1000)]
    assert Counter(picks) == {"dropout": 100, "failure": 200, "straggler": 300, "corrupt": 200, None: 200}


def test_failures_are_independent_of_round_and_client() -> None:
    faults, randomness = FaultSettings(dropout=0.5), Randomness(0)
    picks = [
        [
            pick_fault(faults, randomness.stream("faults", number, client).generator().random())
            for client in range(64)
        ]
        for number in range(8)
    ]
    assert len({tuple(row) for row in picks}) == 8
    assert 150 < sum(pick == "dropout" for row in picks for pick in row) < 362
