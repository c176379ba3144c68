"""Tests of ``held_out_metrics``."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from shared.tasks import RealPoints
from torch import Tensor, nn

from fedveil.configs.settings import settings_from_overrides
from fedveil.modes.federation import Federation
from fedveil.run.build import RunObjects, build
from fedveil.run.held_out_metrics import confusion, evaluator
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.data import Examples

OVERRIDES = ("task.num_clients=null", "privacy=none", "cohort=all", "num_rounds=1")
SETTINGS = settings_from_overrides([*OVERRIDES])


class Uneven(RealPoints):
    """Task whose model answers by the first number of a row."""

    def model(self) -> nn.Module:
        model = nn.Linear(self.width, 2)
        with torch.no_grad():
            model.weight.zero_()
            model.weight[1, 0] = 1.0
            model.bias.zero_()
        return model

    def held_out(self) -> Examples:
        inputs = torch.zeros(5, self.width)
        inputs[:, 0] = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0])
        return Examples(inputs, torch.tensor([0, 1, 1, 1, 0]))


class Private(Uneven):
    """The same with private held-out examples."""

    held_out_public = False


class Real(Uneven):
    """The same with a number to be learned, and so without classes."""

    def held_out(self) -> Examples:
        data = super().held_out()
        return Examples(data.inputs, data.targets.float())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 1] - targets).square().mean()


def federation_of(task: RealPoints) -> Federation:
    return build(SETTINGS, objects=RunObjects(task))


def test_confusion_has_a_row_for_each_true_class() -> None:
    task = Uneven()
    arrays = read_arrays(task.model())
    assert confusion(federation_of(task), arrays) == [[1, 1], [1, 2]]
    assert confusion(federation_of(task), {}) is None  # a run without a model


@pytest.mark.parametrize("task", [Private(), Real()])
def test_without_public_classes_there_is_no_confusion(task: RealPoints) -> None:
    assert confusion(federation_of(task), read_arrays(task.model())) is None


def test_metrics_are_means_over_the_public_examples() -> None:
    task = Uneven()
    outputs, targets = task.model()(task.held_out().inputs), task.held_out().targets
    metrics = evaluator(federation_of(task))(read_arrays(task.model()), 1)
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["loss"] == pytest.approx(nn.functional.cross_entropy(outputs, targets).item())


class Grouped(Uneven):
    """The same with two groups of examples."""

    group_words = {"side": ("a", "b")}  # noqa: RUF012

    def groups(self, client: int) -> Mapping[str, Tensor]:
        return {"side": torch.zeros(len(self.client_data(client)[1]), dtype=torch.int64)}

    def held_out(self) -> Examples:
        data = super().held_out()
        return Examples(data.inputs, data.targets, groups={"side": torch.tensor([0, 0, 1, 1, 1])})


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("limit", ["1", "2", "3"])
def test_evaluation_in_parts_has_the_metrics_of_all(
    limit: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, sizes = Uneven(), list[int]()
    arrays = read_arrays(task.model())
    whole = evaluator(federation_of(task))(arrays, 1)
    matrix = confusion(federation_of(task), arrays)
    if not fits:
        monkeypatch.setattr("fedveil.tasks.batch_memory.ALLOWED", 1)
    settings = settings_from_overrides([*OVERRIDES, f"engine.examples_at_once={limit}"])
    federation = build(settings, objects=RunObjects(task))
    make = task.model

    def watched() -> nn.Module:
        model = make()
        model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
        return model

    monkeypatch.setattr(task, "model", watched)
    assert evaluator(federation)(arrays, 1) == pytest.approx(whole)
    assert confusion(federation, arrays) == matrix
    assert max(sizes) == int(limit) and sum(sizes) == 2 * 5


def test_groups_keep_their_examples_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Grouped()
    arrays = read_arrays(task.model())
    whole = evaluator(federation_of(task))(arrays, 1)
    assert whole["groups/side=a/accuracy"] == pytest.approx(1 / 2)
    settings = settings_from_overrides([*OVERRIDES, "engine.examples_at_once=2"])
    federation = build(settings, objects=RunObjects(task))
    assert evaluator(federation)(arrays, 1) == pytest.approx(whole)
    monkeypatch.setattr("fedveil.tasks.batch_memory.ALLOWED", 1)
    assert evaluator(federation)(arrays, 1)["groups/side=b/accuracy"] == pytest.approx(2 / 3)


def test_private_examples_are_not_evaluated() -> None:
    task = Private()
    assert evaluator(federation_of(task))(read_arrays(task.model()), 1) == {}


def test_an_evaluation_keeps_no_array_of_the_model() -> None:
    task = Uneven()
    evaluate, arrays = evaluator(federation_of(task)), read_arrays(task.model())
    first = evaluate(arrays, 1)
    zeros = {name: np.zeros_like(value) for name, value in arrays.items()}
    assert evaluate(zeros, 2)["accuracy"] != first["accuracy"]
    assert evaluate(arrays, 3) == first
