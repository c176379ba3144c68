"""Evaluation at the clients of a run: planned with the budget, one charged question each, on records that nobody trains on."""

from __future__ import annotations

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
from shared.runs import json_lines, reservations

from fedveil import Examples
from fedveil.__main__ import run as command
from fedveil.base.refusal import Refusal
from fedveil.client import secure_update
from fedveil.client.workbench import Workbench
from fedveil.configs.settings import settings_from_overrides
from fedveil.configs.values import MAX_ROUNDS
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import verify_folder
from fedveil.messages.training_order import ORDER_KEY, TrainingOrder
from fedveil.messages.wire import memory_arrays
from fedveil.modes.federation import Federation
from fedveil.privacy.arms import ArmDeal
from fedveil.privacy.ledger.ledger import verify
from fedveil.privacy.mechanisms.distributed import decode_counts_of, encode_share
from fedveil.privacy.mechanisms.private_sum import add_noise, encode
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.privacy.statistics.evaluation import HeldOutMeans
from fedveil.questions.client import measured_at
from fedveil.questions.evaluation_plan import evaluated_rounds, evaluation_of, evaluation_plan, one_evaluation
from fedveil.questions.question_rounds import question_order
from fedveil.questions.sums import CELLS, Charge
from fedveil.questions.wire import evaluation_content, question_of
from fedveil.run.build import RunObjects, build
from fedveil.run.client_instructions import client_settings
from fedveil.run.unit_plan import unit_plans
from fedveil.server import masked_sums
from fedveil.server.query_rows import FIRST_ROW
from fedveil.simulations.simulate import run_simulation
from fedveil.strategies.identity import FIRST_NODE
from fedveil.tasks.data import data_of, data_of_all
from fedveil.tasks.held_back import held_back, held_back_of

pytestmark = pytest.mark.usefixtures("fast_runs")

Coins = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "coins.py"))["Coins"]
CLIENTS = 40
COARSE = ["privacy.target_delta=0.005", "privacy.allow_large_delta=true"]
FREE = [
    "privacy.target_epsilon=100000",
    "evaluate.noise_multiplier=0.02",
]  # nobody is hidden: held against the truth


class Remembered(Coins):
    """The same, and which points a model was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bytes] = set()

    def train(self, model: torch.nn.Module, data: Any, training: Any) -> float:
        self.seen |= {row.numpy().tobytes() for row in data.batch(torch.arange(len(data)))[0]}
        return 0.5


def federation(*overrides: str, task: object | None = None) -> Federation:
    given = ["task=custom", "task.target=object:Coins", "allow_modules=[object]", "num_rounds=4", "audit=off"]
    settings = settings_from_overrides([*given, *COARSE, *overrides])
    return build(settings, objects=RunObjects(task=task or Coins()))


def ran(folder: Path, *overrides: str, task: object | None = None) -> dict[str, Any]:
    return run_simulation(federation(*overrides, task=task), folder, quiet=True).result


def test_order_of_an_evaluation_names_arm_scaling_and_held_out_rule() -> None:
    parts = federation("privacy=client_central", "evaluate.clients=final", *FREE)
    arm, moments = ArmDeal("5e" * 16, 3).arm(2), {"age": (40.0, 9.5)}
    parts = replace(parts, moments=moments)
    plan = one_evaluation(parts)
    asked = evaluation_of(parts, "e")
    for grouped in (False, True):
        settings = parts.settings.model_copy(update={"group_equal_rows": grouped})
        sent = question_order(replace(parts, settings=settings), asked, plan, arm)
        order = TrainingOrder.from_json(sent[ORDER_KEY])
        assert (order.arm, order.moments, order.held_out) == (arm, moments, asked.share)
        assert order.group_equal_rows == grouped


def means(record: dict[str, Any]) -> dict[str, float]:
    return {each["name"]: each["figures"][0]["value"] for each in record["answers"]}


def questions(ledger: str) -> list[dict[str, Any]]:
    found = reservations(Path(ledger))
    return [each for each in found if each.get("kind") == "question"]


def truth(parts: Federation, model: dict[str, np.ndarray]) -> list[Any]:
    """Return what each client measures of a model by itself."""
    asked = evaluation_of(parts, "e")
    content = evaluation_content(asked, memory_arrays(model), {})
    bench = Workbench(client_settings(parts, Path("none")), parts.task)
    return [measured_at(bench, client, content, asked) for client in range(parts.num_clients)]


def model_of(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "mode", [["privacy=client_central"], ["privacy=client_distributed", "cohort=all"], ["engine.workers=2"]]
)
def test_clients_evaluate_the_model_that_is_released(
    tmp_path: Path, mode: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = ran(tmp_path, "evaluate.clients=final", *FREE, *mode)
    (record,) = result["evaluations"]
    said = [
        each for each in truth(federation("evaluate.clients=final"), model_of(tmp_path)) if each is not None
    ]
    assert record["round"] == 4 and len(said) == CLIENTS - 1  # one has a single point, and holds none out
    assert means(record)["accuracy"] == pytest.approx(np.mean([each.metric for each in said]), abs=0.01)
    # What the interval states is two deviations of the noise, which encrypted sums have more of.
    widest = 1.0 if "cohort=all" in mode else 0.1
    for name, known, width in (
        ("loss", np.mean([each.loss for each in said]), 0.1),
        ("clients", CLIENTS - 1, 1.0),
    ):
        told = next(each["figures"][0] for each in record["answers"] if each["name"] == name)
        half = (told["high"] - told["low"]) / 2
        assert half < widest * width and told["value"] == pytest.approx(known, abs=2 * half)
    histogram = next(each["figures"] for each in record["answers"] if each["name"] == "clients by accuracy")
    bins = np.bincount([min(int(each.metric * 20), 19) for each in said], minlength=20)
    np.testing.assert_allclose(
        [each["value"] for each in histogram], bins, atol=2.5 if "cohort=all" in mode else 0.5
    )
    assert len(questions(result["ledger"])) == 1
    assert verify(Path(result["ledger"])).ok
    assert command(["ledger", "show", result["ledger"]]) == 0
    assert "Round 4, evaluation (question), epsilon " in capsys.readouterr().out


def test_spoiler_of_evaluations_alone_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    true, honest = secure_update.TrainingJob._vector, secure_update.encode_share
    spoils = [False]

    def vector(job: Any, terms: Any, node: Any) -> Any:
        spoils[0] = job.identity.node == FIRST_NODE + 3 and question_of(job.message.content) is not None
        return true(job, terms, node)

    def encode(*given: Any, **options: Any) -> Any:
        words, clipped = honest(*given, **options)
        wild = np.random.default_rng(5).integers(0, 2**31, words.size).astype(words.dtype)
        return wild if spoils[0] else words, clipped

    monkeypatch.setattr(secure_update.TrainingJob, "_vector", vector)
    monkeypatch.setattr(secure_update, "encode_share", encode)
    given = ("privacy=client_distributed", "cohort=all", "evaluate.clients=every:1", "num_rounds=6")
    result = ran(tmp_path, *given, *FREE, task=Coins(8))
    rows = json_lines(tmp_path / "metrics.jsonl")
    assert list(result["suspected"]) == ["simulated client 3"] and not result["rounds_untrue"]
    said = [row["evaluation"]["clients"] for row in rows]
    assert said[:2] == [None, None] and 0 < said[-1] < 8
    (told,) = (row["evaluation"]["suspected"] for row in rows if "suspected" in row["evaluation"])
    assert (
        told["simulated client 3"].endswith("of rounds 1, 2, 3, 4, 5") and str(FIRST_ROW) not in caplog.text
    )
    assert verify(Path(result["ledger"])).ok


def test_no_record_that_is_held_out_is_ever_trained_on(tmp_path: Path) -> None:
    task = Remembered()
    ran(tmp_path, "evaluate.clients=every:2", *FREE, "cohort=all", task=task)
    parts = held_back(Coins(), 0.2)
    held = [held_back_of(parts, client) for client in range(CLIENTS)]
    assert sum(len(each or ()) for each in held) > CLIENTS
    for client, data in enumerate(held):
        assert isinstance(data, Examples)
        own = data_of_all(parts, client)
        assert len(data) + len(data_of(parts, client)) == len(own)
        assert not task.seen & {row.numpy().tobytes() for row in data.inputs}
    assert task.seen


def test_plan_has_the_cost_of_evaluations_within_the_target(tmp_path: Path) -> None:
    given = ("privacy.target_epsilon=3", "evaluate.clients=every:2")
    (told,) = unit_plans(federation(*given))
    assert told.evaluation is not None and told.evaluation.rounds == (2, 4)
    assert told.evaluation.noise_multiplier == pytest.approx(5 * 2**0.5)
    assert told.epsilon[-1][1] < 2.97 < told.runs_epsilon <= 3.0 and told.affordable_rounds >= 4
    result = ran(tmp_path, *given)
    assert [each["round"] for each in result["evaluations"]] == [2, 4]
    spent = next(each["epsilon"] for each in result["privacy"] if each["adversary"] == "model")
    assert 2.97 < spent <= 3.0
    assert [line for line in verify_folder(tmp_path, Knowledge()) if line.ok is False] == []
    rows = json_lines(tmp_path / "metrics.jsonl")
    assert [row["round"] for row in rows if "evaluation" in row] == [2, 4]
    assert rows[1]["clients/accuracy/low"] <= rows[1]["clients/accuracy"] <= rows[1]["clients/accuracy/high"]


def test_one_evaluation_costs_one_gaussian_of_dp_accounting(tmp_path: Path) -> None:
    result = ran(
        tmp_path, "evaluate.clients=final", "privacy.target_epsilon=3", "evaluate.noise_multiplier=5"
    )
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-4).compose(GaussianDpEvent(5.0))
    assert result["evaluations"][0]["epsilon"] == pytest.approx(accountant.get_epsilon(0.005), rel=1e-3)
    (entry,) = questions(result["ledger"])
    assert set(entry["segments"].values()) == {"evaluation"}
    assert set(entry["segments"]) == {"accuracy", "loss", "clients", "clients by accuracy"}


def test_runs_of_one_budget_pay_for_their_evaluations() -> None:
    (told,) = unit_plans(federation("privacy.target_epsilon=3", "evaluate.clients=final", "budget.runs=3"))
    assert 2.97 < told.runs_epsilon <= 3.0


def test_coarse_evaluation_is_refused_with_a_sufficient_change() -> None:
    parts = federation("privacy.target_epsilon=3", "evaluate.clients=final", "evaluate.resolution=0.02")
    with pytest.raises(Refusal) as refused:
        evaluation_plan(parts)
    said = str(refused.value)
    assert "clients would suffice" in said and "noise_multiplier=" in said and "epsilon" in said
    clients = int(said.partition("; ")[2].split()[0])
    assert clients == pytest.approx(CLIENTS * (1.96 * 2**0.5 * 10 / 80) / 0.02, rel=0.01)


def test_a_refused_evaluation_charges_nothing(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="resolution"):
        ran(
            tmp_path / "run",
            "evaluate.clients=final",
            "evaluate.resolution=0.001",
            "privacy.target_epsilon=3",
        )
    assert not (tmp_path / "run" / "ledger").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluate.metric=bleu"], "the task has accuracy"),
        (["privacy=none"], "hidden as a whole"),
        (["privacy=record"], "hidden as a whole"),
        (["evaluate.clients=every:0"], "every:N"),
        (["evaluate.clients=sometimes"], "every:N"),
        (["privacy.noise_schedule=adaptive"], "fixed in advance"),
        (["evaluate.figures=[]"], "figures"),
        (["evaluate.share=1.0"], "share"),
        (["privacy.target_epsilon=0.1"], r"planned evaluations and questions alone bring 0 to \d"),
    ],
)
def test_impossible_evaluation_is_refused_in_a_sentence(
    tmp_path: Path, overrides: list[str], words: str
) -> None:
    given = ["evaluate.clients=final", *overrides]
    with pytest.raises(Refusal, match=words):
        settings = ["task=custom", "task.target=object:Coins", "allow_modules=[object]", "num_rounds=2"]
        coarse = COARSE if not any(each in ("privacy=none",) for each in overrides) else []
        parts = build(settings_from_overrides([*settings, *coarse, *given]), objects=RunObjects(task=Coins()))
        run_simulation(parts, tmp_path, quiet=True)


def test_the_model_of_the_best_arm_is_evaluated(tmp_path: Path) -> None:
    tuned = ("tune=learning_rate", "tune.values=[0.1,0.5]", "tune.rounds=1")
    with pytest.raises(Refusal, match="use final"):
        federation(*tuned, "evaluate.clients=every:2")
    result = ran(tmp_path, "evaluate.clients=final", *FREE, *tuned)
    (record,) = result["evaluations"]
    said = [
        each for each in truth(federation("evaluate.clients=final"), model_of(tmp_path)) if each is not None
    ]
    assert record["round"] == 5 and means(record)["clients"] == pytest.approx(CLIENTS - 1, abs=0.5)
    assert means(record)["accuracy"] == pytest.approx(np.mean([each.metric for each in said]), abs=0.01)


def test_evaluated_rounds_end_with_the_last() -> None:
    every = federation("evaluate.clients=every:3", "num_rounds=7").settings
    assert evaluated_rounds(every) == (3, 6, 7)
    assert evaluated_rounds(federation().settings) == ()


def test_dropout_counts_in_no_figure(tmp_path: Path) -> None:
    result = ran(tmp_path, "evaluate.clients=final", *FREE, "faults.dropout=0.4")
    told = means(result["evaluations"][0])
    said = truth(federation("evaluate.clients=final"), model_of(tmp_path))
    metrics = [each.metric for each in said if each is not None]
    assert told["clients"] < 0.8 * CLIENTS
    # of those who answered: near the mean of all, and far from what zeros would make of it
    assert abs(told["accuracy"] - np.mean(metrics)) < 0.12


def test_masked_evaluation_has_the_bits_of_the_same_vectors_unmasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    decode = masked_sums.decode_counts_of

    def told(total: Any, spec: Any, seed: bytes) -> Any:
        seen.append((total.copy(), spec, seed))
        return decode(total, spec, seed)

    monkeypatch.setattr(masked_sums, "decode_counts_of", told)
    parts = federation(
        "evaluate.clients=final", *FREE, "privacy=client_distributed", "cohort=all", "num_rounds=1"
    )
    result = run_simulation(parts, tmp_path, quiet=True).result
    total, spec, seed = seen[-1]
    asked, unmasked = evaluation_of(parts, "e"), np.zeros(spec.size, spec.dtype)
    assert parts.seed is not None
    drawn, bare = Randomness(parts.seed), replace(spec, layers=())
    for client, said in enumerate(truth(parts, model_of(tmp_path))):
        stream = drawn.stream("share", FIRST_ROW + 1, 0, client + 2)
        layers = [stream.bytes(32) for _ in spec.layers]
        assert len(layers) == len(spec.layers)  # taken from the stream as the client does; all are taken back
        unmasked += encode_share({}, asked.contribution(said), bare, stream, seed)[0]
    np.testing.assert_array_equal(total, unmasked)
    sums = decode_counts_of(unmasked, bare, seed)
    assert result["evaluations"][0]["answers"][2]["figures"][0]["value"] == sums["clients"][0]


def test_a_killed_run_charges_each_evaluation_once(tmp_path: Path) -> None:
    from fedveil.run import run as running

    class Killed(BaseException):
        pass

    given = ("evaluate.clients=every:2", "privacy.target_epsilon=3")
    whole = ran(tmp_path / "whole", *given)
    parts, keep = federation(*given), running.keep
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):

        def killed(progress: Any, state: Any) -> None:
            if state.round == 2:  # the evaluation is charged, and its round is not kept yet
                raise Killed
            keep(progress, state)

        patch.setattr(running, "keep", killed)
        run_simulation(parts, tmp_path / "killed", quiet=True)
    settings = parts.settings.model_copy(update={"resume": str(tmp_path / "killed")})
    again = run_simulation(
        build(settings, objects=RunObjects(task=Coins())), tmp_path / "killed", quiet=True
    ).result
    assert again["evaluations"] == whole["evaluations"]
    assert len(questions(again["ledger"])) == 2
    assert again["privacy"] == whole["privacy"]


def test_canaries_evaluate_nothing(tmp_path: Path) -> None:
    result = ran(tmp_path, "evaluate.clients=final", *FREE, "audit=full", "audit.canaries=8", "cohort=all")
    assert means(result["evaluations"][0])["clients"] == pytest.approx(CLIENTS - 1, abs=0.5)


def test_an_evaluation_has_noise_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round before it has drawn from the same seed: the same draws would let the model's noise be told from figures."""
    rows: list[int] = []
    noised = Charge.noised
    monkeypatch.setattr(
        Charge, "noised", lambda self, total, row, spec: rows.append(row) or noised(self, total, row, spec)
    )
    ran(tmp_path, "evaluate.clients=every:1", "num_rounds=2", *FREE)
    assert len(rows) == 2 and not {*rows} & {*range(MAX_ROUNDS + 1)}


def test_figures_reveal_a_clients_presence_no_better_than_claimed() -> None:
    """Of all clients the one whose vector is longest, by the best threshold along it: half a Gaussian's sensitivity."""
    asked, noise, draws = evaluation_of(federation("evaluate.clients=final"), "e"), 1.0, 4000
    spec = SumSpec(1.0, asked.segments, cells=CELLS)
    own = encode({}, asked.contribution(HeldOutMeans(1.0, 0.0)), spec)[0].astype(float)
    assert 0.999 * spec.cells < np.linalg.norm(own) <= spec.cells
    direction, scores = own / np.linalg.norm(own), []
    for there in (0, 1):
        streams = (Randomness(n).stream("noise", there) for n in range(draws))
        totals = [add_noise(there * own, noise, spec, each)[0] for each in streams]
        scores.append(np.array([each @ direction for each in totals]) / spec.cells)
    thresholds = np.linspace(-1, 2, 61)
    false, found = (np.array([np.mean(s > t) for t in thresholds]) for s in scores)
    assert np.max(found - false) <= 0.3829 + 3 * np.sqrt(
        0.5 / draws
    )  # 2 Phi(1/2) - 1, of a sensitivity of one norm
