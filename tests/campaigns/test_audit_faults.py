"""Faults put into the running loop, each caught, and correct runs that stay silent.

`python -m pytest -m campaign tests/campaigns/test_audit_faults.py` takes about five minutes.
"""

import runpy
from pathlib import Path
from typing import Any

import pytest

from fedveil.configs.settings import settings_from_overrides
from fedveil.run.build import build

FAULTS: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "oracles" / "audit_faults.py"))
CAUGHT_BY = {
    "noise x0.98": "norm",
    "noise x0.8": "norm",
    "noise halved": "norm",
    "no noise": "canaries",
    "clip skipped": "canaries",
    "weights by example": "canaries",
    "biases (10 numbers) without noise": "norm",
    "the same noise in every round": "reuse",
    "accounted rate half of the real": "draw",
    "accounted rate a quarter of the real": "canaries",
    "sampling fixed, accounted as Poisson": "draw",
    "encrypted sums that drop the noise": "norm",
    "records, noise halved": "records",
    "records, accounted sample_rate a quarter of the real": "records",
}
# Too small for so few canaries in so few steps; of more steps, `test_client_record_canaries` sees it.
BEYOND = {
    "records, one local step accounted of many",
    "records, noise x0.8",
}


def test_every_fault_is_detected_or_listed_as_undetectable() -> None:
    correct = {"none", "encrypted sums, none", "records, none"}
    assert set(CAUGHT_BY) | BEYOND | correct == set(FAULTS["FAULTS"])


def test_every_fault_has_its_target() -> None:
    """The campaign is seldom run: a name that has moved shows here."""
    for fault, replaced in FAULTS["FAULTS"].items():
        settings = settings_from_overrides(FAULTS["asked"](fault))
        with FAULTS["injected"](replaced):
            assert build(settings).task.num_clients >= 10
    assert {"alarms", "verdict", "accuracy"} <= FAULTS["audited"](
        "none", "num_rounds=2", "audit.looks=1"
    ).keys()


@pytest.mark.campaign
@pytest.mark.parametrize("fault", CAUGHT_BY)
def test_a_fault_is_caught(fault: str) -> None:
    found = FAULTS["audited"](fault)
    assert found["verdict"] == "violated"
    assert CAUGHT_BY[fault] in {alarm["test"] for alarm in found["alarms"]}


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("epsilon", [3, 8])
def test_ten_biases_without_noise_are_caught_on_every_seed(epsilon: int, seed: int) -> None:
    asked = (f"privacy.target_epsilon={epsilon}", f"seed={seed}")
    found = FAULTS["audited"]("biases (10 numbers) without noise", *asked)
    reds = [alarm["round"] for alarm in found["alarms"] if alarm["level"] == "red"]
    assert found["verdict"] == "violated" and reds[0] <= 10


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("overrides", FAULTS["CORRECT"], ids=str)
def test_a_correct_run_raises_no_alarm(overrides: tuple[str, ...], seed: int) -> None:
    found = FAULTS["audited"]("none", f"seed={seed}", *overrides)
    assert found["alarms"] == [] and found["verdict"] != "violated"


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(5))
def test_canaries_cost_less_than_a_point_of_accuracy(seed: int) -> None:
    with_canaries, plain = (FAULTS["audited"]("none", f"seed={seed}", a) for a in ("audit=full", "audit=off"))
    assert with_canaries["accuracy"] > plain["accuracy"] - 0.01
