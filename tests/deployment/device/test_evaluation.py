"""A device that evaluates: for its owner's word alone, on rows that it never trains on, charged as one question."""

from __future__ import annotations

import json
import runpy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.numpy import load_file

from fedveil.deployment.device import linear
from fedveil.deployment.device.device_ledger import questions_of
from fedveil.deployment.serve import serve
from fedveil.messages.flower_adapter import name_message
from fedveil.messages.training_order import ORDER_KEY
from fedveil.messages.wire import OWNERS_POLICY, add_reply, instruct, memory_arrays
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.ledger.ledger_state import RESERVE
from fedveil.privacy.mechanisms.private_sum import CohortSum
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.privacy.statistics.evaluation import EVALUATION, Evaluation
from fedveil.questions.measurements import measure_means, measure_rows
from fedveil.questions.wire import evaluation_content
from fedveil.tasks.classification import class_metrics
from fedveil.tasks.data import Examples

FAULTS = Path(__file__).parents[2] / "faults"
MADE, SERVED = (runpy.run_path(str(FAULTS / name)) for name in ("devices.py", "served.py"))
CENTRAL, code_of, device_of = (MADE[name] for name in ("CENTRAL", "code_of", "device_of"))
ASKED = Evaluation("spring evaluation", 0.3)
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("audits_seldom_alarm"),
]


@pytest.fixture
def clients(made: Path) -> Path:
    return made / "clients"


def model() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(5)
    shape = (MADE["CLASSES"], MADE["FEATURES"])
    return {"weight": draw.normal(size=shape).astype(np.float32), "bias": np.zeros(shape[0], np.float32)}


def evaluate(asked: Evaluation = ASKED, spec: SumSpec | None = None, **order: Any) -> Message:
    told = replace(CENTRAL, **{"run": asked.name, "held_out": asked.share, **order})
    content = evaluation_content(asked, memory_arrays(model()), {ORDER_KEY: told.to_json()})
    sent = instruct(content, spec or SumSpec(1.0, asked.segments), asked.name, 1)
    message = Message(sent, 2, "train")
    name_message(message, f"m {asked.name}")
    return message


def test_a_linear_device_evaluates_on_rows_that_it_holds_out(clients: Path) -> None:
    device = device_of(clients / "c0", purposes=("evaluation",))
    told, spec = CohortSum(np.zeros(SumSpec(1.0, ASKED.segments).segment_size)), SumSpec(1.0, ASKED.segments)
    add_reply(told, device.answer(evaluate()), spec)
    table = linear.read_table(clients / "c0" / "device.npz")
    trained, held = linear.parts_of(table, ASKED.share)
    assert 0 < len(held) < len(table) and len(trained) + len(held) == len(table)
    arrays = model()
    right = (held.inputs @ arrays["weight"].T + arrays["bias"]).argmax(1) == held.targets
    accuracy = next(each for each in ASKED.segments if each.name == "accuracy")
    assert told.total[0] * spec.scale(accuracy) == pytest.approx(2 * right.mean() - 1, abs=1e-3)
    (question,) = questions_of(device.ledger.path)
    assert question.purposes == (EVALUATION,)


def test_device_trains_without_the_held_out_rows_of_its_order(
    clients: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    train = linear.train_round
    monkeypatch.setattr(
        linear,
        "train_round",
        lambda message, client, table, told: seen.append(len(table)) or train(message, client, table, told),
    )
    device = device_of(clients / "c0")
    for number, share in enumerate((None, 0.3), 1):
        order = replace(CENTRAL, held_out=share)
        assert code_of(device, MADE["in_the_clear"](order, number)) == 0
    assert seen[0] == MADE["RECORDS"] and seen[1] < 0.9 * MADE["RECORDS"]


@pytest.mark.parametrize("allowed", [(), ("statistics",)])
def test_no_device_evaluates_unless_its_owner_allows_it(
    clients: Path, allowed: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    device = device_of(clients / "c0", purposes=allowed)
    assert code_of(device, evaluate()) == OWNERS_POLICY
    assert "purpose='evaluation'" in caplog.text and not device.ledger.path.exists()


def test_foreign_parts_of_an_evaluation_are_refused(clients: Path) -> None:
    device = device_of(clients / "c0", purposes=("evaluation", "training"))
    wider = (replace(ASKED.segments[0], bound=0.01), *ASKED.segments[1:])
    assert code_of(device, evaluate(spec=SumSpec(1.0, wider))) == OWNERS_POLICY
    relabelled = tuple(replace(each, purpose="training") for each in ASKED.segments)
    assert code_of(device, evaluate(spec=SumSpec(1.0, relabelled))) == OWNERS_POLICY
    assert code_of(device, evaluate(held_out=None)) == OWNERS_POLICY
    assert code_of(device, evaluate(held_out=0.2)) == OWNERS_POLICY
    assert not device.ledger.path.exists()


@pytest.mark.parametrize("targets", [[0, 0, 0], [0, 1, 0], [1]])
def test_record_without_a_metric_makes_no_evaluation_fail(targets: list[int]) -> None:
    """Records of one class have no area under a curve: a failure would tell of the records that are held out."""
    held = Examples(torch.arange(len(targets), dtype=torch.float32)[:, None], torch.tensor(targets))
    task, line = Classes(), torch.nn.Linear(1, 2)
    asked = Evaluation("spring evaluation", 0.3, "auc")
    told = measure_means(held, task, line, nullcontext, asked)
    assert (told is None) == (len(set(targets)) == 1)
    if told is not None:
        outputs = line(held.inputs).detach()
        assert told.metric == class_metrics(outputs, held.targets)["auc"]
        assert told.loss == pytest.approx(float(task.loss(outputs, held.targets)))
    of_each = measure_rows(held, task, line, nullcontext, asked)
    assert np.isnan(of_each.metrics).all() and np.isfinite(of_each.losses).all()


def test_failing_held_out_record_takes_no_other_along() -> None:
    """One record moves a sum of records by its own part, whatever it holds."""
    held = Examples(torch.arange(9.0)[:, None], torch.tensor([0, 1, 0, 1, 7, 0, 1, 0, 1]))
    task, line, asked = Classes(), torch.nn.Linear(1, 2), Evaluation("spring evaluation", 0.3)
    told = measure_rows(held, task, line, nullcontext, asked)
    assert np.flatnonzero(np.isnan(told.metrics) & np.isnan(told.losses)).tolist() == [4]
    assert np.isfinite(told.losses).sum() == np.isfinite(told.metrics).sum() == 8


@pytest.mark.parametrize("limit", ["1", "3", "8"])
@pytest.mark.parametrize("fits", [True, False])
def test_evaluation_at_a_client_passes_few_records_to_the_model(
    limit: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fits:
        monkeypatch.setattr("fedveil.tasks.batch_memory.ALLOWED", 1)
    held, sizes = Examples(torch.arange(20.0)[:, None], torch.arange(20) % 2), list[int]()
    task, line, asked = Classes(), torch.nn.Linear(1, 2), Evaluation("spring evaluation", 0.3)
    means, rows = (each(held, task, line, nullcontext, asked) for each in (measure_means, measure_rows))
    line.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    parts = measure_means(held, task, line, nullcontext, asked, limit)
    assert means is not None and parts is not None
    assert (parts.metric, parts.loss) == pytest.approx((means.metric, means.loss))
    alone = measure_rows(held, task, line, nullcontext, asked, limit)
    np.testing.assert_allclose(alone.losses, rows.losses, rtol=1e-5)
    np.testing.assert_array_equal(alone.metrics, rows.metrics)
    assert max(sizes) == int(limit)


class Classes:
    """Loss and metrics of a classification."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return class_metrics(outputs, targets)


# --- a served federation ----------------------------------------------------------------------------------------


@pytest.fixture
def hearts(tmp_path: Path) -> Path:
    return SERVED["make_federation"](tmp_path)


@pytest.mark.parametrize("privacy", ["client_central", "client_distributed"])
def test_a_served_run_is_evaluated_by_its_clients(hearts: Path, privacy: str) -> None:
    grid = SERVED["Devices"](hearts / "clients")
    given = ["task=digits", f"privacy={privacy}", "cohort=all", "num_rounds=2", "evaluate.clients=every:1"]
    given += ["privacy.allow_large_delta=true", "privacy.target_epsilon=4", "accept_vacuous=true"]
    code = serve(hearts / "server", given, as_json=True, reach=SERVED["reaching"](grid))
    folder = hearts / "server" / "runs" / "run-1"
    result = json.loads((folder / "result.json").read_text())
    assert code == 0 and [each["round"] for each in result["evaluations"]] == [1, 2]
    assert all(each["answers"] for each in result["evaluations"]), result["evaluations"]
    assert result["evaluations"][0]["clients"] == 5
    (ledger,) = (hearts / "server" / "ledgers").glob("*.ledger")
    reserved = [json.loads(each.payload) for each in read_entries(ledger) if each.kind == RESERVE]
    assert [each.get("kind") for each in reserved] == [None, "question", None, "question"]
    assert load_file(folder / "model.safetensors")
    for device in grid.devices.values():
        assert [each.purposes for each in questions_of(device.ledger.path)] == [("evaluation",)] * 2
