"""Evaluation where records are hidden: each held-out record counts once, no other moves its place, one charge hides it."""

from __future__ import annotations

import json
import math
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.dp_event import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from flwr.app import ConfigRecord, Message
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from fedveil import Examples
from fedveil.base.refusal import Refusal
from fedveil.cli.plan import show_plan
from fedveil.configs.settings import settings_from_overrides
from fedveil.deployment.device.device_ledger import questions_of
from fedveil.deployment.serve import serve
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import verify_folder
from fedveil.messages.flower_adapter import name_message, records_of
from fedveil.messages.training_order import ORDER_KEY, ModeName, RecordTerms
from fedveil.messages.wire import OWNERS_POLICY, instruct
from fedveil.modes.federation import Federation
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec
from fedveil.privacy.statistics.evaluation import (
    LOSS_BOUND,
    Evaluation,
    HeldOutRows,
    evaluation_from_json,
)
from fedveil.privacy.statistics.holdout import holdout_mask
from fedveil.questions.evaluation_plan import evaluation_plan
from fedveil.questions.wire import CLIENT_NOISE_KEY, evaluation_content, question_of
from fedveil.run.build import RunObjects, build
from fedveil.run.unit_plan import unit_plans
from fedveil.simulations.simulate import run_simulation
from fedveil.tasks import load_task
from fedveil.tasks.classification import class_metrics
from fedveil.tasks.data import data_of
from fedveil.tasks.held_back import held_back, held_back_of

FAULTS = Path(__file__).parents[1] / "faults"
MADE, SERVED, COINS = (runpy.run_path(str(FAULTS / name)) for name in ("devices.py", "served.py", "coins.py"))
CLIENTS, ROWS = 30, COINS["ROWS"]
FIGURES = ("metric", "loss", "clients")
ASKED = Evaluation("e", 0.2, figures=FIGURES, records=50.0)
FREE = ("privacy.target_epsilon=100000", "evaluate.noise_multiplier=0.02")
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs"),
]


class Points(COINS["Coins"]):
    """Its clients, fewer, with a held-out part that is public."""

    held_out_public = True

    def __init__(self) -> None:
        super().__init__(CLIENTS)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return class_metrics(outputs, targets)


def federation(*overrides: str, task: Points | None = None) -> Federation:
    given = [
        "task=custom",
        "task.target=object:Points",
        "allow_modules=[object]",
        "num_rounds=4",
        "audit=off",
    ]
    hides = ["privacy=record_distributed", "privacy.target_delta=0.001", "privacy.allow_large_delta=true"]
    settings = settings_from_overrides([*given, *hides, "evaluate.clients=final", *overrides])
    return build(settings, objects=RunObjects(task=task or Points()))


def figures(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {each["name"]: each["figures"][0] for each in record["answers"]}


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [(), ("secagg=masked",), ("engine.workers=2",)])
def test_the_figures_are_means_over_the_records_that_are_held_out(
    tmp_path: Path, masked: tuple[str, ...]
) -> None:
    result = run_simulation(federation(*FREE, *masked), tmp_path, quiet=True).result
    (record,) = result["evaluations"]
    parts, model = held_back(Points(), 0.2, alone=True), Points().model()
    arrays = load_file(tmp_path / "model.safetensors")
    model.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    held = [held_back_of(parts, client) for client in range(CLIENTS)]
    inputs, targets = (torch.cat([getattr(each, name) for each in held]) for name in ("inputs", "targets"))
    outputs = model(inputs).detach()
    told = figures(record)
    assert told["held-out records"]["value"] == pytest.approx(len(targets), abs=0.3)
    truth = (outputs.argmax(1) == targets).double().mean().item()
    assert told["accuracy"]["value"] == pytest.approx(truth, abs=0.004)
    losses = torch.nn.functional.cross_entropy(outputs, targets, reduction="none").clamp(max=LOSS_BOUND)
    assert told["loss"]["value"] == pytest.approx(losses.mean().item(), abs=0.02)
    entries = [
        json.loads(each.payload) for each in read_entries(Path(result["ledger"])) if each.kind == "reserve"
    ]
    (asked,) = (each for each in entries if each.get("kind") == "question")
    assert json.loads(read_entries(Path(result["ledger"]))[0].payload)["unit"] == "record"
    assert set(asked["segments"].values()) == {"evaluation"}
    assert [line for line in verify_folder(tmp_path, Knowledge()) if line.ok is False] == []


def test_held_out_records_are_not_trained_on_and_not_counted_openly() -> None:
    narrow, wide = (federation(f"evaluate.share={share}") for share in (0.2, 0.5))
    for client in range(CLIENTS):
        held, trained = held_back_of(narrow.task, client), data_of(narrow.task, client)
        assert held is not None and len(held) + len(trained) == len(Points().client_data(client))
        assert isinstance(held, Examples) and isinstance(trained, Examples)
        seen = {row.numpy().tobytes() for row in trained.inputs}
        assert not seen & {row.numpy().tobytes() for row in held.inputs}
    for parts in (narrow, wide):
        assert parts.mode.records == (CLIENTS - 1) * ROWS + 1 and parts.mode.max_rows == ROWS
    assert narrow.mode.units == wide.mode.units and narrow.mode.num_units == wide.mode.num_units


class CentredWhenEvaluated(torch.nn.Linear):
    """Takes the mean of what it sees off, as adaptation at test time does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input if self.training else input - input.mean(0))


class AdaptedPoints(Points):
    def model(self) -> torch.nn.Module:
        return CentredWhenEvaluated(4, 2)


class RelativePoints(Points):
    """Metrics as those who add up from batch to batch have them."""

    largest = 0.0

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        self.largest = max(self.largest, float(outputs.abs().max()))
        return {"accuracy": float(outputs.abs().mean()) / self.largest}


@pytest.mark.parametrize(
    ("task", "overrides", "named"),
    [
        (AdaptedPoints, (), "CentredWhenEvaluated"),
        (RelativePoints, (), "RelativePoints.metrics"),
        (RelativePoints, ("privacy=client_central",), "RelativePoints.metrics"),
    ],
)
def test_metric_mixing_records_is_refused(
    tmp_path: Path, task: type[Points], overrides: tuple[str, ...], named: str
) -> None:
    """One record of 2 000 moved the accuracy of all by 0.10 under noise of 0.004; nothing is spent here."""
    with pytest.raises(Refusal, match=named):
        run_simulation(federation(*overrides, task=task()), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_loss_of_one_record_has_both_trainings_and_evaluations(tmp_path: Path) -> None:
    (told,) = unit_plans(federation("privacy.target_epsilon=3", "evaluate.clients=every:2"))
    assert told.unit == "record" and told.evaluation is not None
    assert told.epsilon[-1][1] < 2.99 < told.runs_epsilon <= 3.0
    one = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-4)
    noise = told.evaluation.noise_multiplier
    assert noise == pytest.approx(5 * math.sqrt(2))
    epsilon = one.compose(GaussianDpEvent(noise)).get_epsilon(0.001)
    assert told.evaluation.epsilon == pytest.approx(epsilon, rel=1e-3)
    result = run_simulation(
        federation("privacy.target_epsilon=3", "evaluate.clients=every:2"), tmp_path, quiet=True
    ).result
    assert [each["round"] for each in result["evaluations"]] == [2, 4]
    spent = result["privacy"][0]
    assert 2.99 < spent["epsilon"] <= 3.0
    # What several records of one person lose together was planned with the evaluations as well.
    assert [each for _, each in told.groups] == pytest.approx([each for _, each in spent["groups"]], rel=2e-3)


def test_coarse_evaluation_is_refused_with_a_sufficient_number() -> None:
    with pytest.raises(Refusal, match="held-out records would suffice") as refused:
        evaluation_plan(federation("privacy.target_epsilon=3", "evaluate.resolution=0.02"))
    assert refused.value.field == "evaluate.resolution"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("privacy=record",), "record_distributed, which hides records"),
        (("privacy.per_person=1",), "leave privacy.per_person null"),
        (("evaluate.figures=[metric]",), "always asked"),
        (("evaluate.metric=bleu",), "the task has accuracy"),
        (("evaluate.metric=auc",), "the task has accuracy, balanced_accuracy of one record"),
    ],
)
def test_evaluation_hiding_no_record_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(Refusal, match=words):
        run_simulation(federation(*overrides), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "ledger").exists()


def test_plan_states_the_cost_and_the_number_of_records(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = settings_from_overrides(
        [
            "task=digits",
            "task.num_clients=100",
            "num_rounds=5",
            "privacy=record_distributed",
            "evaluate.clients=final",
        ]
    )
    assert show_plan(settings) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "100 clients evaluate the model in the end" in said and "this adds epsilon 0." in said
    assert re.search(
        r"Their mean accuracy over about [0-9]+ held-out records will be known to \+-0\.[0-9]+", said
    )


# --- one record ---------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8, unique=True), st.floats(0.01, 0.99), st.data()
)
def test_a_record_that_is_not_there_moves_no_other(hashes: list[int], share: float, data: Any) -> None:
    gone = data.draw(st.integers(0, len(hashes) - 1))
    all_of_them = holdout_mask(np.array(hashes, np.uint64), share, independent=True)
    others = holdout_mask(np.delete(np.array(hashes, np.uint64), gone), share, independent=True)
    np.testing.assert_array_equal(np.delete(all_of_them, gone), others)


@given(st.floats(), st.floats())
def test_part_of_a_record_is_no_longer_than_its_norm(metric: float, loss: float) -> None:
    part = ASKED.contribution_of_records(HeldOutRows(np.array([metric]), np.array([loss])), 0.25)
    assert np.linalg.norm(np.concatenate([*part.values()])) <= 0.25 * (1 + 1e-12)
    assert ASKED.spec_of_records(0.25).sensitivity(3) < 1.001 * ASKED.spec_of_records(0.25).cells / 50


def test_the_intervals_of_means_over_records_hold_in_95_of_100() -> None:
    draw, noise, draws = np.random.default_rng(3), 3.0, 2000
    metrics, losses = draw.integers(0, 2, 400).astype(float), draw.exponential(0.8, 400)
    clients = [HeldOutRows(*each) for each in zip(np.split(metrics, 40), np.split(losses, 40), strict=True)]
    parts = [ASKED.contribution_of_records(each, 1.0) for each in clients]
    sums = {name: sum(part[name] for part in parts) / ASKED.scale(name) for name in ASKED.layout}
    truth = {
        "accuracy": metrics.mean(),
        "loss": np.minimum(losses, LOSS_BOUND).mean(),
        "held-out records": 400,
    }
    held = dict.fromkeys(truth, 0)
    for _ in range(draws):
        noised = {name: cell + draw.normal(0, ASKED.sigma(noise), 1) for name, cell in sums.items()}
        for name, (figure, *_) in ASKED.answers(noised, noise, 40):
            held[name] += figure.low <= truth[name] <= figure.high
    assert all(0.935 <= count / draws <= 0.965 for count in held.values()), held


def test_only_an_evaluation_of_records_has_more_keys_and_its_model() -> None:
    of_clients = Evaluation("e", 0.2)
    assert "records" not in of_clients.text and evaluation_from_json(of_clients.text) == of_clients
    assert evaluation_from_json(ASKED.text) == ASKED
    model = save({"weight": np.zeros((2, 4), np.float32)})
    content = evaluation_content(ASKED, model, {})
    assert question_of(content) == ASKED
    content["arrays"] = evaluation_content(replace(ASKED, figures=("clients",)), model, {})["arrays"]
    with pytest.raises(Refusal, match="needs exactly the model"):
        question_of(content)
    with pytest.raises(Refusal, match="needs exactly the model"):
        question_of(evaluation_content(of_clients, model, {}))


# --- devices ------------------------------------------------------------------------------------------------------


def test_device_evaluates_records_in_no_sum_of_local_noise(made: Path) -> None:
    device = MADE["device_of"](made / "clients" / "c0", purposes=("evaluation",))
    budget = RecordTerms(8.0, 1e-5, 0.5, Adjacency.ZERO_OUT)
    order = replace(MADE["CENTRAL"], run="e", privacy=ModeName.RECORD, client=None, record=budget)
    asked = replace(ASKED, share=None)
    content = evaluation_content(asked, save({"w": np.zeros(2)}), {ORDER_KEY: order.to_json()})
    records_of(content, ConfigRecord)["config"][CLIENT_NOISE_KEY] = 3.0
    message = Message(instruct(content, SumSpec(None, (Segment("num-examples", 1.0),)), "e", 1), 2, "train")
    name_message(message, "m")
    assert MADE["code_of"](device, message) == OWNERS_POLICY
    assert not device.ledger.records.exists()
    with pytest.raises(Refusal, match="held_out"):
        replace(order, held_out=0.2)


def test_a_served_run_is_evaluated_record_by_record(tmp_path: Path) -> None:
    hearts = SERVED["make_federation"](tmp_path)
    grid = SERVED["Devices"](hearts / "clients")
    options = ["task=digits", "privacy=record_distributed", "num_rounds=2", "evaluate.clients=every:1"]
    options += ["privacy.target_epsilon=15", "privacy.records=1500", "privacy.most_records=400"]
    options += ["privacy.allow_large_delta=true", "cohort=all"]
    code = serve(hearts / "server", options, as_json=True, reach=SERVED["reaching"](grid))
    result = json.loads((hearts / "server" / "runs" / "run-1" / "result.json").read_text())
    assert code == 0 and [each["round"] for each in result["evaluations"]] == [1, 2]
    held = sum(
        len(held_back_of(held_back(device_task, 0.2, alone=True), client) or ())
        for device_task, client in ((load_task("digits", {}), number) for number in range(5))
    )
    told = figures(result["evaluations"][-1])["held-out records"]
    assert abs(told["value"] - held) < 2.5 * (told["high"] - told["low"]) / 2
    for device in grid.devices.values():
        asked = [each for each in questions_of(device.ledger.records) if each.purposes == ("evaluation",)]
        assert len(asked) == 2 and not device.ledger.path.exists()
