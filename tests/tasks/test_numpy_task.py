"""Training functions of one's own, and models that are arrays: their updates are clipped like any other."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.client.training.cohort_training import can_vectorise
from fedveil.client.training.sgd import train
from fedveil.client.workbench import Workbench
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.local_training import LocalTraining, Optimizer
from fedveil.tasks import as_task, load_task
from fedveil.tasks.mislabelled import mislabelled
from fedveil.tasks.optimizers import check_optimizer

pytestmark = pytest.mark.usefixtures("fast_runs")

SEEN: list[Any] = []


def data_of(client: int, examples: int = 30) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    generator = np.random.default_rng(client)
    inputs = generator.normal(size=(examples, 4)).astype(np.float32)
    return inputs, (inputs.sum(1) > 0).astype(np.int64)


@dataclass
class Own:
    """Task that trains with a loop of its own; `then` is done to the model afterwards."""

    then: Any = None
    loss_told: float | None = 0.5
    simulated: bool = True
    num_clients: int = 6
    calls: list[str] = field(default_factory=list)

    def model(self) -> nn.Module:
        net = nn.Linear(4, 2)
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
        return net

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}

    def client_data(self, client: int) -> fv.Examples:
        inputs, targets = data_of(client)
        return fv.Examples(torch.from_numpy(inputs), torch.from_numpy(targets))

    def held_out(self) -> fv.Examples:
        return self.client_data(99)

    def train(self, model: nn.Module, data: Any, training: LocalTraining) -> float | None:
        assert model.training
        SEEN.append(sum(float(p.detach().abs().sum()) for p in model.parameters()))
        optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate)
        inputs, targets = data.batch(torch.arange(len(data)))
        for _ in range(training.local_epochs):
            optimizer.zero_grad()
            self.loss(model(inputs), targets).backward()
            optimizer.step()
        if self.then is not None:
            self.then(model)
        return self.loss_told


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


@pytest.mark.parametrize("then", [None, replace_weight, freeze, hook])
def test_only_the_arrays_of_a_model_are_sent(then: Any) -> None:
    task, plain = Own(then), Own()
    model, expected = task.model(), plain.model()
    assert train(model, task, task.client_data(0), TRAINING, 0, 1) == 0.5
    plain.train(expected, plain.client_data(0), TRAINING)
    moved = 1.0 if then is replace_weight else 0.0
    torch.testing.assert_close(model.weight, expected.weight + moved)
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
    SEEN.clear()
    run = fv.simulate(Own(), cohort="all", num_rounds=3, quiet=True, local_epochs=5, **privacy(keys))
    assert run.status == "completed"
    assert SEEN or "engine" in keys
    if keys == {"privacy": "none"}:
        assert run.metrics["accuracy"] > 0.9


def privacy(keys: dict[str, Any]) -> dict[str, Any]:
    name = keys.get("privacy", "client_central")
    level = {} if name == "none" else {"target_epsilon": 100.0, "target_delta": 0.01}
    return {**keys, "privacy": {"name": name, **level}}


@pytest.mark.parametrize("then", [enlarge, diverge])
def test_an_update_that_is_none_drops_the_client(then: Any) -> None:
    run = fv.simulate(Own(then), privacy="none", cohort="all", num_rounds=1, quiet=True)
    assert run.history[0]["replies"] == 0
    assert all(float(p.detach().abs().sum()) == 0 for p in run.model.parameters())


def test_loss_is_optional() -> None:
    for name in ("none", "client_central"):
        keys = privacy({"privacy": name})
        run = fv.simulate(Own(loss_told=None), cohort="all", num_rounds=2, quiet=True, **keys)
        assert run.status == "completed"


def test_clip_holds_for_any_training() -> None:
    huge = fv.simulate(
        Own(lambda model: nn.init.constant_(model.bias, 1e6)),
        privacy=fv.ClientCentral(target_epsilon=None, noise_multiplier=1e-3, clipping_norm=0.5, metrics_share=0.0),
        cohort="all",
        num_rounds=1,
        quiet=True,
    )  # fmt: skip
    moved = torch.cat([p.detach().flatten() for p in huge.model.parameters()])
    assert 0.4 < float(moved.norm()) < 0.51


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
    kind: Any = np.float64
    forget: bool = False

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {self.names[0]: np.zeros(4, self.kind), self.names[1]: np.zeros(1, self.kind)}

    def fit(self, arrays: Any, inputs: NDArray[Any], targets: NDArray[Any], training: LocalTraining) -> Any:
        weight, bias = (arrays[name] for name in self.names)
        for _ in range(training.local_epochs):
            wrong = 1 / (1 + np.exp(-(inputs @ weight + bias))) - targets
            weight = weight - training.learning_rate * inputs.T @ wrong / len(wrong)
            bias = bias - training.learning_rate * wrong.mean(keepdims=True)
        return {self.names[0]: weight} | ({} if self.forget else {self.names[1]: bias})

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


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_a_task_of_arrays_trains_evaluates_and_gives_its_model_back(kind: Any) -> None:
    keys: dict[str, Any] = {"cohort": "all", "num_rounds": 4, "local_epochs": 20, "learning_rate": 1.0}
    run = fv.simulate(Logistic(kind=kind), privacy="none", quiet=True, **keys)
    assert run.metrics["accuracy"] > 0.9 and run.metrics["loss"] < 0.3
    inputs, targets = data_of(5)
    outputs = run.model(torch.from_numpy(inputs)).numpy()
    assert ((outputs > 0) == targets).mean() > 0.8
    for options in (
        {"engine": {"workers": 2}},
        {"privacy": {"name": "client_distributed", "target_delta": 0.01}},
    ):
        told: Any = {"privacy": {"name": "client_central", "target_delta": 0.01}, **options}
        assert fv.simulate(Logistic(kind=kind), quiet=True, **keys, **told).status == "completed"


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
    run = fv.simulate(Logistic(forget=True), privacy="none", cohort="all", num_rounds=1, quiet=True)
    assert run.history[0]["replies"] == 0
