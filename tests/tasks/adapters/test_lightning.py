"""Adapters: what other libraries' models say of their training is followed, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedveil as fv

pytestmark = pytest.mark.usefixtures("fast_runs")

L = pytest.importorskip("pytorch_lightning")

from fedveil.client.dp_sgd.train import PrivateSteps, train_privately
from fedveil.client.training import sgd
from fedveil.messages.local_training import LocalTraining
from fedveil.privacy.budget import Adjacency, Unit
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.plan import Plan
from fedveil.strategies.record_plan import poisson_batches
from fedveil.tasks.adapters.lightning import LightningTask
from fedveil.tasks.data import as_data
from fedveil.tasks.independence import check_independence
from fedveil.tasks.optimizers import optimizer_of


class Net(L.LightningModule):  # type: ignore[name-defined,misc]
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        loss = 3 * nn.functional.cross_entropy(self(inputs), targets)  # a loss that no default has
        self.log("secret", loss)
        return {"loss": loss}

    def validation_step(self, batch: Any) -> None:
        inputs, targets = batch
        self.log_dict({"right": (self(inputs).argmax(1) == targets).float().mean(), "rows": len(targets)})

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def shop(number: int) -> TensorDataset:
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(number))
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())


def task_of(module: Callable[[], Any] = Net) -> LightningTask:
    return LightningTask(module, [shop(n) for n in range(3)], shop(99), simulated=True)


def with_methods(**methods: Any) -> type:
    return type("Net2", (Net,), methods)


@pytest.mark.parametrize("privacy", [fv.Record(target_delta=1e-2), fv.NoPrivacy()])
def test_a_lightning_module_learns_at_both_levels(privacy: Any) -> None:
    run = fv.simulate(task_of(), privacy=privacy, cohort="all", num_rounds=8, local_epochs=2, quiet=True)
    assert run.metrics["right"] > 0.8 and run.metrics["rows"] == 40
    assert "secret" not in str(run.history) + str(run.result)
    assert run.result["task"] == "Net"


def test_two_models_of_one_task_are_alike_under_any_random_state() -> None:
    torch.manual_seed(1)
    one = task_of()
    torch.manual_seed(2)
    for a, b in zip(one.model().parameters(), task_of().model().parameters(), strict=True):
        assert torch.equal(a, b) and a is not b


def test_a_lightning_training_is_that_of_a_loop_with_the_same_steps() -> None:
    task, training = task_of(), LocalTraining(batch_size=40)
    model = task.model().train()
    optimizer = optimizer_of(task, list(model.parameters()), training)
    inputs, targets = task.client_data(0).batch(torch.arange(40))
    plain = task.model().module
    own = plain.configure_optimizers()
    for _ in range(3):
        optimizer.zero_grad()
        task.loss(model(*inputs), targets).backward()
        optimizer.step()
        own.zero_grad()
        (3 * nn.functional.cross_entropy(plain(inputs[0]), targets)).backward()
        own.step()
    assert torch.equal(model.module.out.weight, plain.out.weight)


def test_groups_and_states_of_an_optimizer_belong_to_its_model() -> None:
    def configure(self: Any) -> Any:
        groups = [{"params": [self.out.weight]}, {"params": [self.out.bias], "lr": 0.5}]
        return torch.optim.Adagrad(groups, lr=0.1)  # its state is made at once

    task = task_of(with_methods(configure_optimizers=configure))
    model = task.model()
    made = task.optimizer(list(model.parameters()))
    assert made.param_groups[0]["params"][0] is model.module.out.weight
    assert [group["lr"] for group in made.param_groups] == [0.1, 0.5]
    assert set(made.state) == set(model.parameters())


@pytest.mark.parametrize("several", [True, False])
def test_a_schedule_of_steps_is_followed(several: bool) -> None:
    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = {
            "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1),
            "interval": "step",
            "frequency": 2,
        }
        return ([optimizer], [schedule]) if several else {"optimizer": optimizer, "lr_scheduler": schedule}

    task = task_of(with_methods(configure_optimizers=configure))
    model = task.model()
    made, rates = task.optimizer(list(model.parameters())), []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(4):
        made.step()
        rates.append(made.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 0.1, 0.1, 0.01])


def by_epochs(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]


def rates_of(
    task: LightningTask, monkeypatch: pytest.MonkeyPatch, train: Callable[[nn.Module], None]
) -> list[float]:
    """Return the rate of each step of a training."""
    rates: list[float] = []
    made = LightningTask.optimizer

    def optimizer(self: LightningTask, parameters: Any) -> torch.optim.Optimizer:
        own = made(self, parameters)
        own.register_step_pre_hook(lambda own, *_: rates.append(own.param_groups[0]["lr"]))
        return own

    monkeypatch.setattr(LightningTask, "optimizer", optimizer)
    train(task.model())
    return rates


def test_a_schedule_by_epochs_falls_after_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    task, training = (
        task_of(with_methods(configure_optimizers=by_epochs)),
        LocalTraining(local_epochs=3, batch_size=15),
    )

    def plain(model: nn.Module) -> None:
        sgd.train(model, task, as_data(task.client_data(0)), training, 0, 1)

    assert rates_of(task, monkeypatch, plain) == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 3)


def test_schedule_by_epochs_falls_after_expected_poisson_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, training = (
        task_of(with_methods(configure_optimizers=by_epochs)),
        LocalTraining(local_epochs=2, batch_size=20),
    )
    plan = Plan(Unit.RECORD, Adjacency.ZERO_OUT, poisson_batches(40, 20, 2), 1.0, 1, 1.0)

    def private(model: nn.Module) -> None:
        source = Randomness(5)
        steps = PrivateSteps(plan, source.stream("a"), source.stream("b"))
        train_privately(model, task, as_data(task.client_data(0)), training, steps, "one_by_one")

    assert rates_of(task, monkeypatch, private) == pytest.approx([1, 1, 0.1, 0.1])


def test_a_schedule_by_epochs_is_refused_where_a_round_has_one() -> None:
    task = task_of(with_methods(configure_optimizers=by_epochs))
    with pytest.raises(fv.Refusal, match="local_epochs=1: the task's optimizer has a schedule by epochs"):
        fv.simulate(task, privacy=fv.NoPrivacy(), cohort="all", num_rounds=1, quiet=True)
    run = fv.simulate(
        task, privacy=fv.Record(target_delta=1e-2), cohort="all", num_rounds=1, local_epochs=2, quiet=True
    )
    assert run.status == "completed"


def test_a_schedule_that_has_ended_leaves_its_last_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    task, training = task_of(with_methods(configure_optimizers=configure)), LocalTraining(batch_size=5)

    def plain(model: nn.Module) -> None:
        sgd.train(model, task, as_data(task.client_data(0)), training, 0, 1)

    rates = rates_of(task, monkeypatch, plain)
    assert len(rates) == 8 and rates[0] > rates[1] > rates[2] and len(set(rates[2:])) == 1


def manual(self: Any) -> None:
    Net.__init__(self)
    self.automatic_optimization = False


def by_batches(self: Any) -> Any:
    [optimizer], [scheduler] = by_epochs(self)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "batch"}}


def watching(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
    watched = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": watched, "monitor": "val_loss"}}


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"__init__": manual}, "Net2.automatic_optimization=False"),
        ({"on_train_epoch_end": lambda self: None}, "Net2='on_train_epoch_end'"),
        ({"optimizer_step": lambda self, *a, **k: None}, "Net2='optimizer_step'"),
        ({"configure_gradient_clipping": lambda self, *a: None}, "configure_gradient_clipping"),
        ({"configure_optimizers": lambda self: None}, r"configure_optimizers=\['NoneType'\]"),
        (
            {"configure_optimizers": lambda self: [torch.optim.SGD(self.parameters(), lr=1)] * 2},
            r"\['SGD', 'SGD'\]",
        ),
        ({"configure_optimizers": by_batches}, "StepLR by batch"),
        ({"configure_optimizers": watching}, "ReduceLROnPlateau"),
        (
            {"configure_optimizers": lambda self: self.trainer.estimated_stepping_batches},
            "configure_optimizers='self.trainer'",
        ),
        ({"training_step": lambda self, batch: self.trainer.world_size}, "training_step='self.trainer'"),
        ({"training_step": lambda self, batch: None}, "training_step='returned NoneType'"),
    ],
)
def test_features_of_a_trainer_are_refused_by_name(methods: dict[str, Any], said: str) -> None:
    with pytest.raises(fv.Refusal, match=said):
        task_of(with_methods(**methods))


def with_a_centred_loss(self: Any, batch: Any) -> Tensor:
    inputs, targets = batch
    losses = nn.functional.cross_entropy(self(inputs), targets, reduction="none")
    return (
        losses * (losses > losses.mean().detach())
    ).mean()  # hard examples alone: whose part depends on all


def after_a_threshold(self: Any, batch: Any) -> Tensor:
    inputs, targets = batch
    loss = nn.functional.cross_entropy(self(inputs), targets)
    return loss * (2.0 if inputs.abs().max() > 50 else 1.0)  # of one odd example in the batch


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (with_a_centred_loss, "the mean of the examples' losses"),
        (after_a_threshold, "once an example is replaced"),
    ],
)
def test_mixing_training_step_is_refused_at_record_level(step: Any, said: str) -> None:
    task = task_of(with_methods(training_step=step))
    with pytest.raises(fv.Refusal, match=said):
        check_independence(task.model(), task, task.client_data(0))


def test_module_of_dictionary_batches_gets_all_their_fields() -> None:
    def step(self: Any, batch: dict[str, Tensor]) -> Tensor:
        assert set(batch) == {"pixels", "label"}
        return nn.functional.cross_entropy(self(batch["pixels"]), batch["label"])

    items = [{"pixels": x, "label": y} for x, y in shop(0)]
    made = with_methods(training_step=step, validation_step=step)
    task = LightningTask(made, [items], items, simulated=True)
    run = fv.simulate(task, privacy=fv.Record(target_delta=1e-2), cohort="all", num_rounds=1, quiet=True)
    assert run.status == "completed"


def test_a_released_lightning_model_predicts_from_inputs_alone() -> None:
    run = fv.simulate(task_of(), privacy=fv.NoPrivacy(), cohort="all", num_rounds=2, quiet=True)
    inputs = shop(5).tensors[0]
    assert torch.equal(run.model(inputs), run.model.module(inputs))
