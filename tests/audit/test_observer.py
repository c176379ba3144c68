"""The audit in the real round loop: the real clients' run is untouched, and every path takes canaries along."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from shared.runs import json_lines, run_quietly

from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.audit import round_rows
from fedveil.privacy.audit.canary_clients import coins_of, commitment
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.run.run import RunResult
from fedveil.simulations.simulate import simulate
from fedveil.tasks import load_task
from fedveil.tasks.arrays import read_arrays

pytestmark = pytest.mark.usefixtures("fast_runs")

ROUNDS = 4
SMALL = ("task=digits", "task.num_clients=20", f"num_rounds={ROUNDS}", "cohort.rate=0.5", "batch_size=100")
NOISE = ("privacy.noise_multiplier=1", "privacy.target_epsilon=null", "privacy.target_delta=0.01")
FULL = ("audit=full", "audit.canaries=60", "audit.looks=2", "audit.on_alarm=note")


def run(folder: Path, *overrides: str) -> RunResult:
    given = [
        each for each in SMALL if not (any(o.startswith("cohort=") for o in overrides) and "cohort" in each)
    ]
    return run_quietly([*given, *NOISE, *overrides], folder)


def audit_of(outcome: RunResult) -> dict[str, Any]:
    return json.loads((outcome.folder / "result.json").read_text())["audit"]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tmp_path_factory.mktemp("full") / "run", *FULL)


def test_result_has_claimed_and_measured_epsilon(full: RunResult) -> None:
    found = audit_of(full)
    assert full.exit_code == 0 and found["canaries"] == 60 and found["alarms"] == []
    assert found["claimed"] == pytest.approx(full.result["privacy"][-1]["epsilon"], rel=0.01)
    measured = found["measured"]
    assert measured["low"] <= measured["epsilon"] <= measured["high"]
    assert measured["low"] < found["claimed"]
    assert set(found["lower_bounds"]) >= {"Steinke et al.", "Mahloujifar et al., Gaussian"}
    assert found["verdict"] in ("consistent", "too weak to tell")


def test_audit_changes_only_the_start_model_of_real_clients(full: RunResult, tmp_path: Path) -> None:
    """The same draw, the same charges: canaries are drawn after the real clients, and the mean divides by those."""
    plain = run(tmp_path / "off", "audit=off")
    with_canaries, without = (
        [json.loads(e.payload)["events"] for e in read_entries(each.folder / "ledger") if e.kind == "reserve"]
        for each in (full, plain)
    )
    assert with_canaries == without
    rows = round_rows.read(full.folder / "audit.npy", 60)
    metrics, others = (
        [json.loads(line) for line in (each.folder / "operator.jsonl").read_text().splitlines()[:-1]]
        for each in (full, plain)
    )
    drawn = [int(row["taken"].sum()) for row in rows if row["round"] > 0]
    assert [m["invited"] - n for m, n in zip(metrics, drawn, strict=True)] == [o["invited"] for o in others]


def test_the_coins_were_committed_to_before_the_first_round(full: RunResult) -> None:
    entries = read_entries(full.folder / "ledger")
    notes = [(n, json.loads(e.payload)) for n, e in enumerate(entries) if e.kind == "note"]
    first_release = next(n for n, e in enumerate(entries) if e.kind == "reserve")
    (place, note), *_ = notes
    opened = json.loads((full.folder / "audit.json").read_text())["opened"]
    seed = bytes.fromhex(opened["seed"])
    assert place < first_release
    assert note["commitment"] == commitment(seed, coins_of(seed, 60))
    assert bytes.fromhex(opened["coins"]) == np.packbits(coins_of(seed, 60)).tobytes()
    assert verify(full.folder / "ledger").ok


@pytest.mark.parametrize(
    "overrides",
    [
        ("engine.workers=2",),
        ("task.num_clients=20", "faults.dropout=0.000001"),
        ("cohort=fixed", "cohort.size=10"),
        ("cohort=all",),
        ("cohort=min_separation", "cohort.size=5"),
        ("privacy.adjacency=replace-one",),
        ("compress=mask",),
        ("engine.workers=2", "compress=project"),
    ],
    ids=lambda each: each[-1],
)
def test_canaries_show_on_every_path(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Noise so small that all leaks: the canaries that were in stand out, those that were out do not."""
    outcome = run(tmp_path / "run", *FULL, "privacy.noise_multiplier=0.05", *overrides)
    rows = round_rows.read(outcome.folder / "audit.npy", 60)
    rows = rows[rows["round"] > 0]
    opened = json.loads((outcome.folder / "audit.json").read_text())["opened"]
    coins = coins_of(bytes.fromhex(opened["seed"]), 60)
    inside = np.array([row["along"][row["taken"] & coins] for row in rows], dtype=object)
    values = np.concatenate([np.asarray(each, float) for each in inside])
    assert values.mean() == pytest.approx(1.0, abs=0.25)
    outside = np.concatenate([row["along"][row["taken"] & ~coins] for row in rows])
    expected = -1.0 if "privacy.adjacency=replace-one" in overrides else 0.0
    assert outside.mean() == pytest.approx(expected, abs=0.25)


MASKED = (
    "privacy=client_distributed",
    "cohort=all",
    "secagg.collusion=0.3",
    "audit=full",
    "audit.canaries=6",
    "audit.on_alarm=note",
)


def test_in_an_encrypted_sum_the_mean_divides_by_the_real_clients(tmp_path: Path) -> None:
    """So the model moves as far as it does without dummies, who answer beside the real clients and add next to nothing."""
    quiet = ("num_rounds=1", "privacy.noise_multiplier=0.05")
    with_canaries = run(tmp_path / "run", *MASKED, *quiet)
    plain = run(tmp_path / "plain", *(each for each in MASKED if "audit" not in each), "audit=off", *quiet)
    assert with_canaries.result["audit"]["alarms"] == []
    (row,) = round_rows.read(with_canaries.folder / "audit.npy", 6)[:1]
    assert row["taken"].all()
    first = read_arrays(load_task("digits", {"num_clients": 20}).model())
    moved, expected = (
        np.concatenate([(model[name] - first[name]).ravel() for name in first])
        for model in (load_file(each.folder / "model.safetensors") for each in (with_canaries, plain))
    )
    assert moved @ expected / (expected @ expected) == pytest.approx(1.0, abs=0.05)


def test_light_checks_every_round_and_changes_nothing(tmp_path: Path) -> None:
    light, off = run(tmp_path / "light"), run(tmp_path / "off", "audit=off")
    assert (light.folder / "model.safetensors").read_bytes() == (
        off.folder / "model.safetensors"
    ).read_bytes()
    rows = json_lines(light.folder / "metrics.jsonl")
    assert all(0 < row["audit/norm_p"] <= 1 and 0 < row["audit/reuse_p"] <= 1 for row in rows)
    assert audit_of(light)["verdict"] == "consistent" and off.result["audit"] is None


def test_nothing_is_tested_without_a_claim(tmp_path: Path) -> None:
    found = simulate(
        settings_from_overrides([*SMALL, "privacy=none", "audit=full"]), tmp_path / "run", quiet=True
    )
    assert found.exit_code == 0 and audit_of(found)["verdict"] is None
