"""Personal models of tasks of all kinds: tables, texts with adapters, lazily read data, and layers that keep statistics."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared.texts import write_letters
from torch import nn

import fedveil as fv
from fedveil.personal.own_model import Rows, own_model
from fedveil.personal.state import read_own
from fedveil.personal.training import OwnTraining, train_own
from fedveil.tasks.arrays import read_arrays


class Signs:
    """Task of two classes whose model has layers that keep statistics and draw."""

    simulated, num_clients = True, 3

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {"accuracy": float((outputs.argmax(1) == targets).float().mean())}

    def client_data(self, client: int) -> Any:
        inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(client))
        return fv.Examples(inputs, (inputs[:, client] > 0).long())

    def held_out(self) -> Any:
        return self.client_data(0)


class Lazy(Signs):
    """The same, read from a data set on access, by persons with two rows each."""

    def client_data(self, client: int) -> Any:
        data = super().client_data(client)
        items = [
            {"inputs": x, "label": int(y)} for x, y in zip(data.inputs.tolist(), data.targets, strict=True)
        ]
        names = [f"p{row // 2}" for row in range(len(items))]
        return fv.LazyExamples(items, "inputs", transform=_as_tensor, persons=names)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 2))


def _as_tensor(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "inputs": torch.tensor(item["inputs"])}


@pytest.mark.parametrize("task", [Signs(), Lazy()], ids=["statistics", "lazy"])
def test_clients_that_differ_have_better_models(task: Any, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"learning_rate": 0.5, "num_rounds": 3, "audit": "off", "quiet": True}
    run = fv.simulate(task, privacy="none", cohort="all", personal="after", folder=tmp_path / "run", **keys)
    assert run.metrics["personal/accuracy"] > run.metrics["shared/accuracy"]


def test_a_client_on_which_the_task_fails_has_the_shared_model() -> None:
    class Picky(Signs):
        def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such label")

    task, own = Picky(), OwnTraining(steps=5, learning_rate=0.1, batch_size=10)
    data, shared = task.client_data(0), read_arrays(task.model())
    arrays, choice = own_model(task, task.model(), Rows(data, data), shared, own, 0)
    assert (choice.name, choice.rows, choice.columns) == ("shared", 0, {})
    assert arrays is shared


def test_statistics_of_layers_that_do_not_train_stay() -> None:
    task = Signs()
    model, shared = task.model(), read_arrays(task.model())
    own = OwnTraining(steps=5, learning_rate=0.1, batch_size=10, layers=("3.*",))
    train_own(task, model, task.client_data(0), shared, own, 0)
    changed = {name for name, value in read_arrays(model).items() if not np.array_equal(value, shared[name])}
    assert changed == {"3.weight", "3.bias"}


def test_one_client_leaves_nothing_to_the_next() -> None:
    task = Signs()
    own = OwnTraining(steps=5, learning_rate=0.1, batch_size=10)
    shared = read_arrays(task.model())

    def of_client(client: int, model: nn.Module) -> bytes:
        data = task.client_data(client)
        arrays, _ = own_model(task, model, Rows(data, data), shared, own, 1)
        return b"".join(np.ascontiguousarray(value).tobytes() for value in arrays.values())

    model = task.model()
    of_client(0, model)
    assert of_client(1, model) == of_client(1, task.model())


def test_texts_have_adapters_of_their_own(tiny_base: Path, tmp_path: Path) -> None:
    letters = write_letters(tmp_path / "letters")
    keys = {"folder": str(letters), "base": str(tiny_base), "simulated": True, "tokens": 8, "base_bits": 32}
    adapter = {"name": "lora", "rank": 2, "modules": ["q_proj"]}
    run = fv.simulate(
        {"name": "text", **keys, "adapter": adapter},
        privacy="none",
        personal={"name": "after", "steps": 2},
        num_rounds=1,
        learning_rate=0.5,
        folder=tmp_path / "run",
        quiet=True,
        audit="off",
    )
    assert run.metrics["personal/perplexity"] > 0
    own = read_own(tmp_path / "run" / "personal" / "client-000.safetensors")
    assert own is not None
    assert own.arrays and all(".q_proj." in name for name in own.arrays)


def test_tables_of_hospitals_have_models_of_their_own(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for number in range(3):
        age, dose = draw.normal(60, 10, 60), draw.normal(0, 1, 60)
        ill = (dose * (-1) ** number + draw.normal(0, 0.2, 60) > 0).astype(int)
        rows = [f"{a:.1f},{d:.3f},{y}" for a, d, y in zip(age, dose, ill, strict=True)]
        folder = tmp_path / "hospitals"
        folder.mkdir(exist_ok=True)
        (folder / f"hospital-{number}.csv").write_text("age,dose,ill\n" + "\n".join(rows) + "\n")
    task = {"name": "csv", "folder": str(tmp_path / "hospitals"), "label": "ill", "simulated": True}
    run = fv.simulate(
        task, privacy="none", personal="after", num_rounds=5, quiet=True, audit="off", folder=tmp_path / "run"
    )
    assert run.metrics["personal/accuracy"] > run.metrics["shared/accuracy"] + 0.1
    assert run.metrics["personal/accuracy"] > 0.8
