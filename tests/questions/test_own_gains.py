"""Gains of the clients' own models in their last evaluation: the exact means, charged, and refused where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared.reports import validated
from shared.runs import reservations

from fedveil.base.refusal import Refusal
from fedveil.cli.compare import format_table, read_rows
from fedveil.cli.plan import show_plan
from fedveil.configs.settings import settings_from_overrides
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import verify_folder
from fedveil.evidence.content import report_of, to_json
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import differences
from fedveil.modes.federation import Federation
from fedveil.personal.state import read_own
from fedveil.questions.evaluation_plan import evaluation_of, evaluation_plan
from fedveil.run.build import build
from fedveil.run.run_files import read_run
from fedveil.run.unit_plan import unit_plans
from fedveil.simulations.simulate import run_simulation

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")

GIVEN = ("task=digits", "task.num_clients=30", "num_rounds=2", "audit=off", "seed=3", "accept_vacuous=true")
HIDES = ("privacy=client_central", "privacy.target_delta=0.005", "privacy.allow_large_delta=true")
# Nobody is hidden: what is answered is compared with the truth.
FREE = ("privacy.target_epsilon=1000000", "evaluate.noise_multiplier=0.002")
SHIFTED = ("partition=shards",)


def federation(*overrides: str) -> Federation:
    return build(settings_from_overrides([*GIVEN, *HIDES, "evaluate.clients=final", *overrides]))


def answers_of(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {each["name"]: each["figures"] for each in record["answers"]}


@pytest.mark.parametrize(
    ("personal", "masked"), [("after", ()), ("ditto", ("privacy=client_distributed", "secagg=masked"))]
)
def test_sums_without_noise_are_the_exact_gains(
    tmp_path: Path, personal: str, masked: tuple[str, ...]
) -> None:
    result = run_simulation(
        federation(*SHIFTED, *masked, *FREE, f"personal={personal}"), tmp_path, quiet=True
    ).result
    (record,) = result["evaluations"]
    answers = answers_of(record)
    owns = [read_own(path) for path in sorted((tmp_path / "personal").iterdir())]
    columns = [own.choice.columns for own in owns if own is not None]
    assert len(columns) == 30
    accuracies = {name: np.array([each[name]["accuracy"] for each in columns]) for name in columns[0]}
    shared, mine, local = (accuracies[name] for name in ("shared", "personal", "local_only"))
    for name, other in (("personal - shared", shared), ("personal - local only", local)):
        mean, gain, loss, _ = answers[name]
        # Masks have a least noise, whose standard deviation is half of the interval over 1.96.
        room = {each["name"]: max(0.003, 2.6 * (each["high"] - each["low"]) / 2) for each in (mean, gain)}
        assert mean["value"] == pytest.approx((mine - other).mean(), abs=room[mean["name"]])
        assert gain["value"] == pytest.approx((mine > other).mean(), abs=room[gain["name"]])
        assert loss["value"] == pytest.approx((mine < other).mean(), abs=room[gain["name"]])
        assert max(room.values()) < 0.12
    assert (mine - shared).mean() > 0.1  # clients of two digits each
    questions = [each for each in reservations(Path(result["ledger"])) if each.get("kind") == "question"]
    assert [set(each["segments"]) >= {"personal - shared", "personal - local only"} for each in questions]
    assert [line for line in verify_folder(tmp_path, Knowledge()) if line.ok is False] == []
    header = format_table(read_rows([tmp_path])).splitlines()[0]
    assert "clients/personal - shared" in header and "clients/personal - local only" in header
    report = validated(json.loads(to_json(report_of(read_run(tmp_path)))))
    page = page_of(report)
    assert differences(page, report) == [] and "what this model gains over the shared one" in page


def test_plan_has_the_width_of_the_mean_gain(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*GIVEN, *HIDES, "evaluate.clients=final", "personal=after"]
    show_plan(settings_from_overrides(overrides))
    shown = " ".join(capsys.readouterr().out.split())
    assert "The mean gain of their own models will be known to +-" in shown


def test_gains_cost_nothing_more_and_widen_the_intervals() -> None:
    plain, gains = federation(), federation("personal=after")
    assert evaluation_of(gains, "e").figures == (*evaluation_of(plain, "e").figures, "personal", "local_only")
    narrow, wide = (evaluation_plan(each) for each in (plain, gains))
    assert narrow is not None and wide is not None and narrow.half_width is not None
    assert narrow.epsilon == wide.epsilon
    assert wide.half_width == pytest.approx(narrow.half_width * np.sqrt(6 / 4))
    (before,), (after,) = (unit_plans(each) for each in (plain, gains))
    assert before.noise_multiplier == after.noise_multiplier


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("evaluate.clients=every:1",), "which are trained from the final model; use final"),
        (("privacy=record_distributed",), "each of which depends on all records of its client"),
        (("evaluate.metric=personal",), "is a name of another figure"),
    ],
)
def test_gains_that_cannot_be_measured_are_refused(overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence):
        evaluation_plan(federation("personal=after", *overrides))


def test_evaluation_of_devices_says_nothing_of_own_training() -> None:
    """Their owners decide; a server that asks for a million steps finds no ear."""
    evaluation = evaluation_of(federation("personal=after"), "e")
    assert evaluation.own == "" and "own" not in json.loads(evaluation.text)
