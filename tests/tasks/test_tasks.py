"""Tasks: what the shipped ones hold, what bad data is told, and tasks of the user's own."""

import sys
import types

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fedveil.base.extras import MODULES
from fedveil.base.refusal import Refusal
from fedveil.tasks import Examples, Task, check_examples, load_task
from fedveil.tasks.classification import classification, softmax_regression
from fedveil.tasks.partition import Partition
from fedveil.tasks.shipped.mnist5k import FEATURES

INSTALLED = ("mnist5k", "digits", "heart")


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: load_task(name) for name in INSTALLED}


@pytest.mark.parametrize(
    ("name", "clients", "train", "held_out"),
    [("mnist5k", 400, 4000, 1000), ("digits", 100, 1437, 360), ("heart", 4, 736, 184)],
)
def test_shipped_tasks_hold_all_of_their_data(
    tasks: dict[str, Task], name: str, clients: int, train: int, held_out: int
) -> None:
    task = tasks[name]
    assert isinstance(task, Task)
    assert task.simulated
    assert task.num_clients == clients
    assert sum(len(task.client_data(client)) for client in range(clients)) == train
    assert len(task.held_out()) == held_out


@pytest.mark.parametrize("name", INSTALLED)
def test_loading_again_gives_the_same_bytes(tasks: dict[str, Task], name: str) -> None:
    torch.rand(3)
    again = load_task(name, {})
    for ours, theirs in (
        (tasks[name].client_data(1), again.client_data(1)),
        (tasks[name].held_out(), again.held_out()),
    ):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.targets, theirs.targets)
    state, other = tasks[name].model().state_dict(), again.model().state_dict()
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_the_held_out_examples_do_not_depend_on_the_seed(tasks: dict[str, Task]) -> None:
    other = load_task("digits", {"seed": 9, "num_clients": 7, "partition": "shards"})
    assert torch.equal(other.held_out().inputs, tasks["digits"].held_out().inputs)
    assert other.num_clients == 7


@pytest.mark.parametrize("name", INSTALLED)
def test_models_take_the_inputs_and_leave_the_random_state_alone(tasks: dict[str, Task], name: str) -> None:
    before = torch.random.get_rng_state()
    model = tasks[name].model()
    assert torch.equal(before, torch.random.get_rng_state())
    data = tasks[name].client_data(0)
    outputs = model(data.inputs)
    loss = tasks[name].loss(outputs, data.targets)
    # A softmax that starts at zero finds all classes equally likely.
    assert loss.item() == pytest.approx(np.log(outputs.shape[1]), rel=1e-5)
    assert 0 <= tasks[name].metrics(outputs, data.targets)["accuracy"] <= 1


@pytest.mark.parametrize(("name", "least"), [("mnist5k", 0.96), ("digits", 0.93), ("heart", 0.75)])
def test_the_pooled_data_can_be_learned(tasks: dict[str, Task], name: str, least: float) -> None:
    task = tasks[name]
    clients = [task.client_data(client) for client in range(task.num_clients)]
    inputs, targets = (torch.cat([getattr(data, part) for data in clients]) for part in ("inputs", "targets"))
    model = task.model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets) + 1e-4 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    held_out = task.held_out()
    with torch.no_grad():
        assert task.metrics(model(held_out.inputs), held_out.targets)["accuracy"] >= least


@pytest.mark.parametrize("client", [-1, 4])
def test_a_client_that_is_not_there_is_refused(tasks: dict[str, Task], client: int) -> None:
    with pytest.raises(Refusal, match="from 0 to 3"):
        tasks["heart"].client_data(client)


def test_mnist_features_have_length_one(tasks: dict[str, Task]) -> None:
    inputs = tasks["mnist5k"].held_out().inputs
    assert inputs.shape[1] == FEATURES
    assert torch.allclose(inputs.norm(dim=1), torch.ones(len(inputs)), atol=1e-5)


GOOD = Examples(torch.zeros(4, 3), torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize(
    ("examples", "reason"),
    [
        (Examples(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), "no examples"),
        (
            Examples(
                torch.tensor([[1.0, float("nan")], [float("nan"), 0.0]]), torch.zeros(2, dtype=torch.int64)
            ),
            "2 NaN",
        ),
        (Examples(torch.tensor([[float("inf")]]), torch.zeros(1, dtype=torch.int64)), "1 NaN or infinite"),
        (Examples(torch.zeros(3, 1), torch.tensor([0, 2, -1])), "2 labels out of range.*from 0 to 1"),
        (Examples(torch.zeros(3, 1), torch.tensor([0, 1])), "equally many"),
    ],
)
def test_bad_data_are_refused_with_the_count(examples: Examples, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        check_examples(examples, 2)
    for train, test in ((examples, GOOD), (GOOD, examples)):
        with pytest.raises(Refusal, match=reason):
            classification(train, test, 2, Partition("iid", 1), lambda: softmax_regression(3, 2))


def test_good_data_pass_unchanged() -> None:
    assert check_examples(GOOD, 2) is GOOD
    words = Examples(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1]))
    assert check_examples(words, 2) is words


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("mnist", {}, "mnist5k, digits, heart, fashion_mnist"),
        ("digits", {"num_client": 3}, "num_client"),
        ("digits", {"partition": "random"}, "natural, iid, dirichlet, shards"),
        ("digits", {"partition": "natural"}, "do not name owners"),
        ("digits", {"num_clients": 1438}, "only 1437 examples"),
        ("my_module:Mine", {}, "its module is not allowed"),
        ("os:system", {}, "its module is not allowed"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(name: str, options: dict[str, object], reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        load_task(name, options)


class Coins:
    """A task as a user writes it: no class of ours above it."""

    simulated = False
    num_clients = 3

    def __init__(self, flips: int = 5) -> None:
        self.flips = flips

    def model(self) -> nn.Module:
        return softmax_regression(1, 2)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}

    def client_data(self, client: int) -> Examples:
        return Examples(
            torch.full((self.flips, 1), float(client)), torch.zeros(self.flips, dtype=torch.int64)
        )

    def held_out(self) -> Examples:
        return self.client_data(0)


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("coins_of_mine")
    module.Coins = Coins  # type: ignore[attr-defined]
    module.Half = type("Half", (), {"simulated": True, "num_clients": 1})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_task_of_ones_own_gets_its_options(own_module: str) -> None:
    task = load_task(f"{own_module}:Coins", {"flips": 7}, allow=(own_module,))
    assert isinstance(task, Coins)
    assert len(task.client_data(2)) == 7


@pytest.mark.parametrize(
    ("attribute", "options", "allow", "reason"),
    [
        ("Coins", {}, ("another",), "allowed: another"),
        ("Coin", {}, ("coins_of_mine",), "cannot be imported"),
        ("Coins", {"flops": 1}, ("coins_of_mine",), "flops"),
        ("Half", {}, ("coins_of_mine",), "lacks client_data, held_out, loss, metrics, model"),
    ],
)
def test_a_task_of_ones_own_that_does_not_fit_is_refused(
    own_module: str, attribute: str, options: dict[str, object], allow: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(Refusal, match=reason):
        load_task(f"{own_module}:{attribute}", options, allow)


def test_an_allowed_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refusal, match="cannot be imported"):
        load_task("no_such_module_here:Task", {}, ("no_such_module_here",))


def test_digits_are_those_of_scikit_learn(tasks: dict[str, Task]) -> None:
    pixels, digits = load_digits(return_X_y=True)
    held_out = np.random.default_rng(1797).permutation(len(digits))[:360]
    found = tasks["digits"].held_out()
    expected = pixels[held_out] / np.linalg.norm(pixels[held_out], axis=1, keepdims=True)
    assert np.array_equal(found.inputs, expected.astype(np.float32))
    assert np.array_equal(found.targets, digits[held_out])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fedveil.tasks.digits", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(Refusal, match=r"scikit-learn.*fedveil\[simulation\]"):
        load_task("digits")


def test_a_task_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, "text", ("tokenizers", "no_such_module"))
    with pytest.raises(Refusal, match=r"task=text needs no_such_module: pip install 'fedveil\[text\]'"):
        load_task("text", {"base": "model"})
