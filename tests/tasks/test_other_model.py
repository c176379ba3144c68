"""Other models of a task: the small one that it ships with, and a class that somebody names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from shared.runs import run_quietly
from shared.tasks import Classes
from torch import nn

from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.export.export import Order, export
from fedveil.run.build import build
from fedveil.tasks import load_task
from fedveil.tasks.arrays import dimension_of
from fedveil.tasks.shipped.fashion_mnist import FEATURES as FASHION
from fedveil.tasks.shipped.fashion_mnist import student as fashion_student
from fedveil.tasks.shipped.low_frequencies import cosines
from fedveil.tasks.shipped.mnist5k import student

HERE = __name__
FEW = ("task.num_clients=40", "num_rounds=2", "privacy.allow_large_delta=true")


class Tiny(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10))


class Pictures(Classes):
    """Task of one's own whose model is large."""

    held_out_client = 99

    def __init__(self, num_clients: int = 6) -> None:
        self.num_clients = num_clients

    def model(self) -> nn.Module:
        return nn.Linear(64, 10)

    def client_data(self, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.Generator().manual_seed(client)
        return torch.rand(8, 64, generator=rows), torch.randint(0, 10, (8,), generator=rows)


class Chosen(Pictures):
    """Task that takes a model by its name."""

    def __init__(self, num_clients: int = 6, model: str = "large") -> None:
        super().__init__(num_clients)
        self.taken = model


# --- what ships ---------------------------------------------------------------------------------------------------


def test_students_have_an_eighth_of_the_parameters_and_start_at_zero() -> None:
    whole = load_task("mnist5k")
    small = load_task("mnist5k", {"model": "student"})
    assert dimension_of(small) == 310 and 8 * dimension_of(small) <= dimension_of(whole)
    count = sum(each.numel() for each in fashion_student().parameters())
    assert count == 4870 and 8 * count <= FASHION * 10 + 10
    assert set(student().state_dict()) == {"head.weight", "head.bias"}  # the transform does not travel
    assert not any(value.any() for value in student().state_dict().values())


def test_low_frequencies_are_those_of_a_2d_cosine_transform() -> None:
    rows = cosines(8, 8)
    torch.testing.assert_close(rows @ rows.T, torch.eye(8))
    model, inputs = student(), torch.rand(3, 256)
    torch.nn.init.eye_(model.head.weight)  # type: ignore[arg-type]
    square = inputs.reshape(3, 4, 8, 8)
    across = (square[:, 0] - square[:, 2]) * 2**0.5
    expected = torch.stack([rows @ each @ rows.T for each in across])
    kept = [expected[:, u, v] for u in range(5) for v in range(5 - u)]
    torch.testing.assert_close(model(inputs), torch.stack(kept, -1)[:, :10])
    torch.testing.assert_close(model(inputs[None])[0], model(inputs))


@pytest.mark.parametrize("privacy", ["client_central", "record", "record_distributed"])
def test_a_student_trains_in_every_mode_and_its_export_agrees(tmp_path: Path, privacy: str) -> None:
    asked = ["task.model=student", f"privacy={privacy}", *FEW]
    run = tmp_path / "run"
    assert run_quietly(asked, run).result["status"] == "completed"
    folder, card = export(run, Order("int8"))
    assert card["agreement"] > 0.95
    np.save(tmp_path / "inputs.npy", np.random.default_rng(0).random((2, 256), dtype=np.float32))
    said = subprocess.run(
        [sys.executable, str(folder / "predict.py"), str(tmp_path / "inputs.npy")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(said.stdout.splitlines()) == 3


# --- a class of one's own -----------------------------------------------------------------------------------------


def test_a_named_class_takes_the_place_of_a_tasks_model() -> None:
    for name in ("digits", f"{HERE}:Pictures"):
        task = load_task(name, {"model": f"{HERE}:Tiny", "num_clients": 6}, (HERE,))
        assert isinstance(task.model(), Tiny)
        first, again = task.model().state_dict(), task.model().state_dict()
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert len(task.client_data(0)) > 1
    taken = load_task(f"{HERE}:Chosen", {"model": "student"}, (HERE,))
    assert taken.taken == "student" and isinstance(taken.model(), nn.Linear)  # type: ignore[attr-defined]


def test_a_run_of_another_model_is_exported_as_that_model(tmp_path: Path) -> None:
    asked = [
        "task=custom",
        f"task.target={HERE}:Pictures",
        f"task.model={HERE}:Tiny",
        f"allow_modules=[{HERE}]",
        "num_rounds=2",
        "privacy=none",
        "cohort=all",
    ]
    run = tmp_path / "run"
    assert run_quietly(asked, run).result["status"] == "completed"
    _, card = export(run, Order("safetensors", allow_modules=(HERE,)))
    assert card["agreement"] == 1.0


@pytest.mark.parametrize("asked, said", [
    (["task=digits", "task.model=student"], "is small already"),
    (["task=mnist5k", "task.model=tiny"], "must be student, or name a class"),
    (["task=mnist5k", f"task.model={HERE}:Tiny"], "is not among the modules you allow"),
    (["task=mnist5k", f"task.model={HERE}:Missing", f"allow_modules=[{HERE}]"], "takes no arguments"),
    (["task=mnist5k", f"task.model={HERE}:Path", f"allow_modules=[{HERE}]"], "must make a torch.nn.Module"),
    (
        ["task=custom", f"task.target={HERE}:Pictures", "task.model=student", f"allow_modules=[{HERE}]"],
        "name a class of your own",
    ),
])  # fmt: skip
def test_invalid_model_is_refused(asked: list[str], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        build(settings_from_overrides(asked))


def test_a_module_that_nobody_allowed_is_not_imported() -> None:
    with pytest.raises(Refusal, match=r"list its module among the allowed ones \(now: none\)"):
        load_task("digits", {"model": f"{HERE}:Tiny"})
