"""Training functions of one's own, and models that are arrays: their updates are clipped like any other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shared.tasks import Classes
from torch import nn

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.client.training.cohort_training import can_vectorise
from fedveil.client.training.sgd import train
from fedveil.client.workbench import Workbench
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.local_training import LocalTraining, Optimizer
from fedveil.tasks import as_task, load_task
from fedveil.tasks.classification import softmax_regression
from fedveil.tasks.mislabelled import mislabelled
from fedveil.tasks.optimizers import check_optimizer

pytestmark = pytest.mark.usefixtures("fast_runs")

NORMS: list[float] = []  # of the model that each call of `Own.train` received


def data_of(client: int, examples: int = 30) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    generator = np.random.default_rng(client)
    inputs = generator.normal(size=(examples, 4)).astype(np.float32)
    return inputs, (inputs.sum(1) > 0).astype(np.int64)


@dataclass
class Own(Classes):
    """Task with its own training loop, after which `change` is applied to the model."""

    change: Callable[[Any], object] = lambda model: None
    mean_loss: float | None = 0.5
    simulated: bool = True
    num_clients: int = 6
    held_out_client = 99

    def model(self) -> nn.Module:
        return softmax_regression(4, 2)

    def client_data(self, client: int) -> fv.Examples:
        inputs, targets = data_of(client)
        return fv.Examples(torch.from_numpy(inputs), torch.from_numpy(targets))

    def train(self, model: nn.Module, data: Any, training: LocalTraining) -> float | None:
        assert model.training
        NORMS.append(sum(float(p.detach().abs().sum()) for p in model.parameters()))
        optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate)
        inputs, targets = data.batch(torch.arange(len(data)))
        for _ in range(training.local_epochs):
            optimizer.zero_grad()
            self.loss(model(inputs), targets).backward()
            optimizer.step()
        self.change(model)
        return self.mean_loss


def leave(model: Any) -> None:
    pass


def replace_weight(model: Any) -> None:
    model.weight = nn.Parameter(model.weight.detach() + 1)


def freeze(model: Any) -> None:
    model.bias.requires_grad_(False)


def hook(model: Any) -> None:
    model.register_forward_hook(lambda *_: pytest.fail("a hook of one client ran at another"))


def enlarge(model: Any) -> None:
    model.weight = nn.Parameter(torch.zeros(3, 4))


def diverge(model: Any) -> None:
    nn.init.constant_(model.bias, torch.nan)


TRAINING = LocalTraining(0.1, 3, 10)


@pytest.mark.parametrize("change", [leave, replace_weight, freeze, hook])
def test_only_the_arrays_of_a_model_are_sent(change: Any) -> None:
    task, plain = Own(change), Own()
    model, expected = task.model(), plain.model()
    assert train(model, task, task.client_data(0), TRAINING, 0, 1) == 0.5
    plain.train(expected, plain.client_data(0), TRAINING)
    difference = 1.0 if change is replace_weight else 0.0
    torch.testing.assert_close(model.weight, expected.weight + difference)
    torch.testing.assert_close(model.bias, expected.bias)
    assert model.bias.requires_grad and not model._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert not can_vectorise(Workbench(ClientSettings("made", TRAINING), task))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"engine": {"workers": 2}},
        {"privacy": "client_distributed"},
        {"privacy": "none"},
        {"faults": {"dropout": 0.01}},
        {"audit": "full"},
    ],
    ids=lambda keys: next(iter(keys), "defaults"),
)
def test_a_run_trains_by_the_tasks_own_function(keys: dict[str, Any]) -> None:
    NORMS.clear()
    run = fv.simulate(Own(), cohort="all", num_rounds=3, quiet=True, local_epochs=5, **privacy(keys))
    assert run.status == "completed"
    assert NORMS or "engine" in keys
    if keys == {"privacy": "none"}:
        assert run.metrics["accuracy"] > 0.9


def privacy(keys: dict[str, Any]) -> dict[str, Any]:
    name = keys.get("privacy", "client_central")
    level = {} if name == "none" else {"target_epsilon": 100.0, "target_delta": 0.01}
    return {**keys, "privacy": {"name": name, **level}}


@pytest.mark.parametrize("change", [enlarge, diverge])
def test_an_update_that_is_none_drops_the_client(change: Any) -> None:
    run = fv.simulate(Own(change), privacy="none", cohort="all", num_rounds=1, quiet=True)
    assert run.history[0]["replies"] == 0
    assert all(float(p.detach().abs().sum()) == 0 for p in run.model.parameters())


def test_loss_is_optional() -> None:
    for name in ("none", "client_central"):
        keys = privacy({"privacy": name})
        run = fv.simulate(Own(mean_loss=None), cohort="all", num_rounds=2, quiet=True, **keys)
        assert run.status == "completed"


def test_clip_holds_for_any_training() -> None:
    huge = fv.simulate(
        Own(lambda model: nn.init.constant_(model.bias, 1e6)),
        privacy=fv.ClientCentral(target_epsilon=None, noise_multiplier=1e-3, clipping_norm=0.5, metrics_share=0.0),
        cohort="all",
        num_rounds=1,
        quiet=True,
    )  # fmt: skip
    update = torch.cat([p.detach().flatten() for p in huge.model.parameters()])
    assert 0.4 < float(update.norm()) < 0.51


def test_unsupported_setting_is_refused_by_name() -> None:
    for privacy_mode in ("record", "record_and_client"):
        with pytest.raises(Refusal, match=r"privacy='record': Own\.train supports only client-level privacy"):
            fv.simulate(Own(), privacy=privacy_mode, num_rounds=1, quiet=True)
    with pytest.raises(Refusal, match=r"optimizer='adam': Own\.train has its own optimizer"):
        fv.simulate(Own(), optimizer="adam", num_rounds=1, quiet=True)
    with pytest.raises(Refusal, match="has its own optimizer"):
        check_optimizer(Own(), LocalTraining(optimizer=Optimizer("sgd")))
    assert mislabelled(Own(), 0).train is not None


# --- arrays -------------------------------------------------------------------------------------------------------


@dataclass
class Logistic:
    """Logistic regression by gradient descent in NumPy."""

    simulated: bool = True
    num_clients: int = 6
    names: tuple[str, str] = ("weight", "bias")
    dtype: Any = np.float64
    omits_bias: bool = False

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {self.names[0]: np.zeros(4, self.dtype), self.names[1]: np.zeros(1, self.dtype)}

    def fit(self, arrays: Any, inputs: NDArray[Any], targets: NDArray[Any], training: LocalTraining) -> Any:
        weight, bias = (arrays[name] for name in self.names)
        for _ in range(training.local_epochs):
            errors = 1 / (1 + np.exp(-(inputs @ weight + bias))) - targets
            weight = weight - training.learning_rate * inputs.T @ errors / len(errors)
            bias = bias - training.learning_rate * errors.mean(keepdims=True)
        return {self.names[0]: weight} | ({} if self.omits_bias else {self.names[1]: bias})

    def predict(self, arrays: Any, inputs: NDArray[Any]) -> NDArray[Any]:
        return inputs @ arrays["weight"] + arrays["bias"]

    def loss(self, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        return float(np.logaddexp(0, -outputs * (2 * targets - 1)).mean())

    def metrics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
        return {"accuracy": ((outputs > 0) == targets).mean()}

    def client_data(self, client: int) -> Any:
        return data_of(client)

    def held_out(self) -> Any:
        return data_of(99)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_task_of_arrays_trains_evaluates_and_gives_its_model_back(dtype: Any) -> None:
    keys: dict[str, Any] = {"cohort": "all", "num_rounds": 4, "local_epochs": 20, "learning_rate": 1.0}
    run = fv.simulate(Logistic(dtype=dtype), privacy="none", quiet=True, **keys)
    assert run.metrics["accuracy"] > 0.9 and run.metrics["loss"] < 0.3
    inputs, targets = data_of(5)
    outputs = run.model(torch.from_numpy(inputs)).numpy()
    assert ((outputs > 0) == targets).mean() > 0.8
    for options in (
        {"engine": {"workers": 2}},
        {"privacy": {"name": "client_distributed", "target_delta": 0.01}},
    ):
        settings: Any = {"privacy": {"name": "client_central", "target_delta": 0.01}, **options}
        assert fv.simulate(Logistic(dtype=dtype), quiet=True, **keys, **settings).status == "completed"


def test_task_of_arrays_loads_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("arrays_of_mine")
    module.Logistic = Logistic  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "arrays_of_mine", module)
    task = load_task("arrays_of_mine:Logistic", allow=("arrays_of_mine",))
    assert task.num_clients == 6 and sorted(dict(task.model().named_parameters())) == ["bias", "weight"]


def test_mistakes_in_a_task_of_arrays_are_reported() -> None:
    with pytest.raises(Refusal, match="without dots"):
        as_task(Logistic(names=("layer.weight", "bias"))).model()  # type: ignore[attr-defined]
    with pytest.raises(Refusal, match="supports only client-level privacy"):
        fv.simulate(Logistic(), privacy="record", num_rounds=1, quiet=True)
    run = fv.simulate(Logistic(omits_bias=True), privacy="none", cohort="all", num_rounds=1, quiet=True)
    assert run.history[0]["replies"] == 0
