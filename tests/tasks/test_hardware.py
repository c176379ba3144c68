"""Devices and precision: every path on a second device, equal to the processor's; what is not there is refused."""

import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from torch import nn

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.client.app import SETTINGS_KEY, make_client_app
from fedveil.client.dp_sgd.train import ENGINES
from fedveil.client.training.cohort_training import sum_cohort
from fedveil.client.training.in_place import begin
from fedveil.client.workbench import Workbench
from fedveil.configs.settings import settings_from_overrides
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.flower_adapter import claim_identity, client_context
from fedveil.messages.record_settings import RecordPrivacy
from fedveil.messages.training_order import RecordTerms
from fedveil.messages.wire import add_reply
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.mechanisms.private_sum import CohortSum
from fedveil.run.build import build
from fedveil.run.held_out_metrics import evaluator
from fedveil.tasks import hardware
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.data import Examples, LazyExamples
from fedveil.tasks.hardware import check_device, device_of, placed

pytestmark = pytest.mark.usefixtures("fast_runs")

HERE = Path(__file__).parents[1]
OTHER = runpy.run_path(str(HERE / "faults" / "other_device.py"))
OPTIMIZERS = runpy.run_path(str(HERE / "tasks/test_optimizers.py"))
Made, PLAIN, instruction, settings_with = (
    OPTIMIZERS[name] for name in ("Made", "PLAIN", "instruction", "settings_with")
)
CLIENTS = list(range(6))


@pytest.fixture
def copies() -> Iterator[Any]:
    claim_identity(run_id=1)
    with OTHER["other_device"]() as counted:
        yield counted


def summed(path: str, settings: ClientSettings, task: Any = None) -> np.ndarray:
    task = task or Made()
    bench, content = Workbench(settings, task), instruction(task)
    size = sum(p.numel() for p in task.model().parameters()) + len(PLAIN.segments)
    total = CohortSum(np.zeros(size))
    if path == "vectorised":
        total = sum_cohort(bench, content, CLIENTS, PLAIN, size)
    elif path == "in place":
        begun = begin(bench, content)
        for client in CLIENTS:
            scalars = begun.train(client)
            assert isinstance(scalars, dict)
            begun.add(total, scalars, PLAIN)
    else:
        app = make_client_app(lambda context: "", bench=bench)
        for client in CLIENTS:
            message = Message(content, client + 2, "train")
            message.metadata.__dict__["_message_id"] = "1"
            context: Context = client_context(1, client, len(CLIENTS), {SETTINGS_KEY: ""})
            add_reply(total, app(message, context), PLAIN)
    assert total.replies == len(CLIENTS), "a tensor was made on the wrong device"
    assert all(p.device.type == bench.settings.accelerator for p in bench.model.parameters())
    return total.total


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("path", ["vectorised", "in place", "messages"])
def test_a_cohort_on_another_device_gives_the_processors_sum(path: str, name: str, copies: Any) -> None:
    settings = settings_with(name)
    there = summed(path, replace(settings, accelerator="meta"))
    assert copies.there > 0 and copies.back > 0
    np.testing.assert_allclose(there, summed(path, settings), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("apart", "groups", "steps"), [(True, 1, 2 * 3), (False, 4, 2 * (1 + 1 + 2 + 3))])
def test_a_stack_is_moved_once_and_comes_back_once(
    apart: bool, groups: int, steps: int, copies: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings_with("sgd"), accelerator="meta")
    monkeypatch.setattr(Workbench, "isolates_examples", lambda bench, data: apart)
    summed("vectorised", settings)
    # Inputs and targets of each stack, its batches' positions and what their examples weigh, and four parameters with the
    # instruction.
    assert copies.there <= 2 * groups + (2 if apart else 1) * steps + 8
    assert copies.back == 2 * groups  # updates and losses


def test_client_in_place_is_moved_once_and_its_update_returns_once(copies: Any) -> None:
    settings = replace(settings_with("sgd"), accelerator="meta")
    summed("in place", settings)
    parameters = 4
    assert copies.there <= 2 * len(CLIENTS) + 2 * parameters
    assert copies.back == (parameters + 1) * len(CLIENTS)  # and the losses


def test_data_that_are_read_lazily_are_moved_batch_by_batch(copies: Any) -> None:
    class Lazy(Made):
        def client_data(self, client: int) -> Any:
            own = super().client_data(client)
            return LazyExamples([(own.inputs[i], own.targets[i]) for i in range(len(own))])

    settings = settings_with("sgd")
    there = summed("in place", replace(settings, accelerator="meta"), Lazy())
    np.testing.assert_allclose(there, summed("in place", settings, Lazy()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("canaries", [0, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_dp_sgd_on_another_device_has_the_same_noise_and_model(
    engine: str, canaries: int, copies: Any, tmp_path: Path
) -> None:
    found: list[np.ndarray] = []
    for device in ("cpu", "meta"):
        record = RecordPrivacy(
            RecordTerms(1e6, 0.5, 1.0, Adjacency.ZERO_OUT, gradients=engine),
            ((0, 0.5),),
            str(tmp_path / device),
            True,
            canaries,
        )
        found.append(summed("messages", replace(settings_with("adam"), record=record, accelerator=device)))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_evaluation_happens_on_the_device(copies: Any) -> None:
    settings = settings_from_overrides(["task=digits", "task.num_clients=5"])
    federation = build(settings)
    arrays = read_arrays(federation.task.model())
    for array in arrays.values():
        array += np.random.default_rng(0).normal(size=array.shape).astype(array.dtype)
    here = evaluator(federation)(arrays, 0)
    engine = settings.engine.model_copy(update={"device": "meta"})
    elsewhere = replace(federation, settings=settings.model_copy(update={"engine": engine}))
    evaluate = evaluator(elsewhere)
    before = copies.there
    assert evaluate(arrays, 1) == pytest.approx(here) and evaluate(arrays, 2) == pytest.approx(here)
    assert copies.there - before == 2 * len(arrays), "the held-out data are moved once"


def test_second_device_refuses_like_a_gpu(copies: Any) -> None:
    there = torch.ones(3).to("meta")
    assert (there + 1).cpu().tolist() == [2, 2, 2] and float(there.sum()) == 3
    for wrong in (lambda: there + torch.ones(3), lambda: torch.cat([there, torch.ones(3)]), there.numpy):
        with pytest.raises(RuntimeError):
            wrong()
    assert copies.there == 1 and copies.back == 1


def test_absent_device_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name, said in (("cuda", "use cpu"), ("cuda:7", "GPUs that torch can use"), ("mps", "Apple GPU")):
        if name == "cuda" and torch.cuda.device_count():
            continue
        with pytest.raises(Refusal, match=f"engine.device='{name}'.*{said}"):
            fv.simulate("digits", engine={"device": name}, folder=tmp_path / "run", num_rounds=1, quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(Refusal, match="cuda:N"):
        check_device("tpu")


class Elsewhere(Made):
    """A task whose model has no values yet: a library that loads lazily leaves it on torch's meta device."""

    def model(self) -> nn.Module:
        return super().model().to("meta")


@pytest.mark.parametrize("privacy", ["client_central", "record"])
def test_model_on_a_wrong_device_is_refused_before_writing(privacy: str, tmp_path: Path) -> None:
    said = "model='.*weight on meta': a task must create its model on the CPU"
    with pytest.raises(Refusal, match=said):
        fv.simulate(Elsewhere(), privacy=privacy, folder=tmp_path / "run", num_rounds=1, quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(Refusal, match=said):  # as a device's agent does, when it starts
        _ = Workbench(settings_with("sgd"), Elsewhere()).model


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.device=gpu"], "engine.device='gpu': must be auto, cpu, mps, cuda, or one GPU as cuda:N"),
        (
            ["engine.dtype=float16"],
            "engine.dtype='float16': must be one of float32, bfloat16; float16 would need",
        ),
        (["engine.dtype=bfloat16", "privacy=record"], "engine.dtype='bfloat16': the norms of examples"),
        (["engine.device=mps", "privacy=record_and_client"], "engine.device='mps': has no double precision"),
        (["engine=ray", "engine.device=cuda"], "engine.device='cuda': there is no such key"),
    ],
)
def test_unsupported_precision_is_refused_by_name(overrides: list[str], said: str) -> None:
    with pytest.raises(Refusal) as refused:
        settings_from_overrides(overrides)
    assert said in str(refused.value)


def test_workers_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = []
    for number in range(4):
        monkeypatch.setattr(hardware, "_WORKER", [0])
        hardware.be_worker(number)
        found.append(str(device_of("auto")))
    assert found == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert str(device_of("cuda:1")) == "cuda:1"
    check_device("cuda:1")
    with pytest.raises(Refusal, match=r"there are 2 \(cuda:0 to cuda:1\)"):
        check_device("cuda:2")


def test_auto_is_the_processor_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_of("auto").type == "cpu"
    data = Examples(torch.ones(2, 1), torch.zeros(2))
    assert placed(data, torch.device("cpu")) is data


@pytest.mark.parametrize("task", ["digits", "mnist5k"])
def test_bfloat16_trains_with_updates_in_float32(task: str) -> None:
    keys: dict[str, Any] = {"num_rounds": 3, "privacy": "none", "quiet": True, "cohort": "all"}
    half = fv.simulate({"name": task, "num_clients": 20}, engine={"dtype": "bfloat16"}, **keys)
    full = fv.simulate({"name": task, "num_clients": 20}, **keys)
    for a, b in zip(half.model.parameters(), full.model.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert not torch.equal(a, b)
    assert half.metrics["accuracy"] > full.metrics["accuracy"] - 0.1


def test_a_loss_is_evaluated_in_the_precision_in_which_it_trains() -> None:
    class Weighed(Made):
        def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs, targets, weight=torch.ones(outputs.shape[1]))

    run = fv.simulate(Weighed(), engine={"dtype": "bfloat16"}, privacy="none", num_rounds=1, quiet=True)
    assert run.metrics["loss"] > 0


def test_a_task_that_trains_itself_chooses_its_own_precision() -> None:
    class Own(Made):
        def train(self, model: nn.Module, data: Any, training: Any) -> None: ...

    with pytest.raises(Refusal, match=r"engine.dtype='bfloat16': a task that trains by itself"):
        fv.simulate(Own(), engine={"dtype": "bfloat16"}, num_rounds=1, quiet=True)
