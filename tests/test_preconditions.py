"""Preconditions of the guarantee, through the real command: what would leak more than is printed is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor, nn

import fedveil.client.dp_sgd.train
import fedveil.simulations.simulate  # noqa: F401 (before any fork, so that children need not import it)
from fedveil.client.app import Workbench, train_round
from fedveil.client.training.cohort_training import can_vectorise
from fedveil.client.training.in_place import begin
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.strategies.client_settings import ClientSettings
from fedveil.strategies.flower_adapter import claim_identity
from fedveil.strategies.training_order import LocalTraining
from fedveil.strategies.wire import instruct, memory_arrays, only_arrays, view
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.data import Examples

TASK = '''\
import torch
from torch import nn
from torch.nn import functional as F
from fedveil.tasks.data import Examples


class Layer(nn.Module):
    """LAYER"""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("hidden", torch.zeros(6), persistent=False)

    def forward(self, h):
        {layer}
        return h


class Hospitals:
    simulated = False
    num_clients = 3

    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), Layer(), nn.Linear(6, 2))

    def loss(self, outputs, targets):
        return {loss}

    def metrics(self, outputs, targets):
        return dict(accuracy=float((outputs.argmax(1) == targets).float().mean()))

    def _examples(self, seed, count):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(count, 4, generator=generator)
        return Examples(inputs, (inputs.sum(1) > 0).long())

    def client_data(self, client):
        return self._examples(client, 60)

    def held_out(self):
        return self._examples(9, 50)
'''
CROSS_ENTROPY = "F.cross_entropy(outputs, targets)"
LEAKS = {
    "a loss that is a sum": ("pass", "F.cross_entropy(outputs, targets, reduction='sum')", "Hospitals.loss"),
    "class weights": (
        "pass",
        "F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 9.0], dtype=outputs.dtype))",
        "Hospitals.loss",
    ),
    "centring": ("h = h - h.mean(0)", CROSS_ENTROPY, "1: Layer"),
    "an own running mean": (
        "self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0); h = h - self.mean",
        CROSS_ENTROPY,
        "1: Layer",
    ),
    "a hidden buffer": (
        "self.hidden = self.hidden + h.detach().mean(0); h = h - self.hidden",
        CROSS_ENTROPY,
        "1: Layer",
    ),
    "an attribute": ("self.last = float(h.detach().sum())", CROSS_ENTROPY, "1.last"),
}
RECORD = ("privacy=record", "privacy.target_epsilon=1", "num_rounds=3", "cohort=all", "batch_size=20")


def write_task(folder: Path, layer: str = "pass", loss: str = CROSS_ENTROPY) -> None:
    (folder / "hospitals.py").write_text(TASK.replace("{layer}", layer).replace("{loss}", loss))


def asked(folder: Path, *more: str) -> list[str]:
    own = ["task=custom", "task.target=hospitals:Hospitals", "allow_modules=[hospitals]"]
    return [*own, f"ledger.dir={folder / 'ledgers'}", f"hydra.run.dir={folder / 'run'}", *more]


@pytest.mark.parametrize("leak", LEAKS)
def test_a_task_that_mixes_records_is_refused_and_nothing_is_spent(
    leak: str, tmp_path: Path, commands: Any
) -> None:
    layer, loss, part = LEAKS[leak]
    write_task(tmp_path, layer, loss)
    code, command = commands.run("simulate", *asked(tmp_path, *RECORD))
    assert code == 2 and part in command.err and "Traceback" not in command.err
    assert not list(tmp_path.rglob("*.ledger"))


def test_the_same_task_without_the_leak_trains(tmp_path: Path, commands: Any) -> None:
    write_task(tmp_path)
    code, command = commands.run("simulate", *asked(tmp_path, *RECORD))
    assert code == 0, command.err
    assert len(list(tmp_path.rglob("*.ledger"))) == 3


# --- clients in one process -----------------------------------------------------------------------------------------


class Remembering(nn.Module):
    """A layer whose memory is no array of the model: it travels nowhere, and must not reach the next client."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.zeros(1), persistent=False)
        self.where, self.number, self.seen = where, 0.0, [0.0]

    def forward(self, inputs: Tensor) -> Tensor:
        mean = inputs.detach().mean()
        match self.where:
            case "buffer":
                self.hidden = self.hidden + mean
                return inputs * (1 + self.hidden)
            case "number":
                self.number += float(mean)
                return inputs * (1 + self.number)
            case "late":
                self.late = getattr(self, "late", 0.0) + float(mean)
                return inputs * (1 + self.late)
            case _:
                self.seen[0] += float(mean)
                return inputs * (1 + self.seen[0])


class Pair:
    """Two clients, and a model with a memory."""

    simulated, num_clients = False, 2

    def __init__(self, where: str) -> None:
        self.where = where

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 6), Remembering(self.where), nn.Linear(6, 2))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {}

    def client_data(self, client: int) -> Examples:
        generator = torch.Generator().manual_seed(client)
        inputs = torch.randn(10, 4, generator=generator) + 3 * client
        return Examples(inputs, torch.arange(10) % 2)

    def held_out(self) -> Examples:
        return self.client_data(0)


def bench_of(where: str) -> Workbench:
    bench = Workbench(ClientSettings("pair", LocalTraining(0.1, local_epochs=2, batch_size=5), seed=3))
    bench.__dict__["task"] = Pair(where)
    return bench


def order_for(bench: Workbench) -> RecordDict:
    arrays = {name: value + 0.01 for name, value in read_arrays(bench.task.model()).items()}
    content = RecordDict({"arrays": memory_arrays(arrays), "config": ConfigRecord({})})
    return instruct(content, SumSpec(100.0), "run", 1)


def in_place(bench: Workbench, clients: list[int]) -> dict[str, Any]:
    begun = begin(bench, order_for(bench))
    for client in clients:
        assert begun.train(client) is not None
    return read_arrays(bench.model)


def by_messages(bench: Workbench, clients: list[int]) -> dict[str, Any]:
    claim_identity(run_id=1)
    content = order_for(bench)
    replies = [train_round(Message(content, 0, "train"), k, bench, bench.settings) for k in clients]
    return {name: np.array(view(array)) for name, array in only_arrays(replies[-1].content).items()}


@pytest.mark.parametrize("where", ["buffer", "number", "list", "late"])
@pytest.mark.parametrize("engine", [in_place, by_messages])
def test_what_a_model_remembers_of_one_client_does_not_reach_the_next(engine: Any, where: str) -> None:
    alone, after = engine(bench_of(where), [1]), engine(bench_of(where), [0, 1])
    assert alone.keys() == after.keys()
    for name, value in alone.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize("where", ["buffer", "number", "list", "late"])
def test_a_model_with_a_memory_is_not_trained_many_clients_at_once(where: str) -> None:
    assert not can_vectorise(bench_of(where))
