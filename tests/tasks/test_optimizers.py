"""Optimisers and schedules of a client: torch's by name, the task's own, on every path and below DP-SGD's noise."""

import inspect
import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from shared.tasks import Classes
from torch import Tensor, nn

import fedveil as fv
from fedveil.audit import record_canaries
from fedveil.base.refusal import Refusal
from fedveil.client.app import SETTINGS_KEY, make_client_app
from fedveil.client.dp_sgd import train as dp_sgd
from fedveil.client.training.batches import shuffled_batches
from fedveil.client.training.cohort_training import can_vectorise, sum_cohort
from fedveil.client.training.in_place import begin
from fedveil.client.workbench import Workbench
from fedveil.configs.compose import compose_overrides
from fedveil.configs.optimizers import CLASSES, keywords_of
from fedveil.configs.reference import help_text
from fedveil.configs.schema import SimulationSettings
from fedveil.configs.settings import settings_from_overrides
from fedveil.deployment.device import linear
from fedveil.messages.client_settings import TRAIN_LOSS, ClientSettings, training_settings
from fedveil.messages.flower_adapter import claim_identity, client_context
from fedveil.messages.local_training import OPTIMIZERS, LocalTraining, Optimizer, Schedule
from fedveil.messages.training_order import ModeName, TrainingOrder
from fedveil.messages.wire import WEIGHT, add_reply, instruct, memory_arrays
from fedveil.privacy.budget import Adjacency, Unit
from fedveil.privacy.mechanisms.discrete_gaussian import sample
from fedveil.privacy.mechanisms.private_sum import CohortSum
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec
from fedveil.privacy.plan import Plan
from fedveil.strategies.record_plan import PoissonBatches
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.data import Examples
from fedveil.tasks.mislabelled import mislabelled
from fedveil.tasks.optimizers import ELEMENTWISE, AdamBC, check_optimizer, optimizer_of

FEATURES, LABELS = 6, 3
SIZES = (4, 7, 7, 12, 4, 1)
PLAIN = SumSpec(None, (Segment(TRAIN_LOSS, 5.0), Segment(WEIGHT, 1e9)))
HOW = {"foreach", "maximize", "capturable", "differentiable", "fused", "params", "lr"}
WORDS = {"adjust_lr_fn"}  # a keyword that is neither a number nor a switch
OF_TORCH = [name for name in OPTIMIZERS if name not in ("auto", "dp_adambc")]


@pytest.fixture(autouse=True)
def identity() -> None:
    claim_identity(run_id=1)


def perceptron(*, bias: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(FEATURES, 5, bias=bias), nn.Tanh(), nn.Linear(5, LABELS, bias=bias))


@dataclass
class Made(Classes):
    """Random examples, as many for each client as SIZES says."""

    num_clients: int = len(SIZES)
    held_out_client: int = 3
    bias: bool = True

    def model(self) -> nn.Module:
        return perceptron(bias=self.bias)

    def client_data(self, client: int) -> Examples:
        generator = torch.Generator().manual_seed(client)
        inputs = torch.randn(SIZES[client], FEATURES, generator=generator)
        return Examples(inputs, torch.randint(LABELS, (SIZES[client],), generator=generator))


@dataclass
class WithOwn(Made):
    """Task whose optimiser has a rate of its own for biases."""

    def optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        groups = [{"params": [p for p in parameters if p.dim() == d], "lr": 0.1 * d} for d in (1, 2)]
        return torch.optim.Adam([group for group in groups if group["params"]])


@dataclass
class WithClosure(Made):
    def optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters)


@dataclass
class WithSomethingElse(Made):
    def optimizer(self, parameters: list[Tensor]) -> Any:
        return list(parameters)


class WithOneForAll(Made):
    """Task that makes its optimiser once, for the parameters of the first model that it sees."""

    made: torch.optim.Optimizer | None = None

    def optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        self.made = self.made or torch.optim.SGD(parameters, 0.1, momentum=0.9)
        return self.made


class WithOwnParameters(Made):
    def optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(perceptron().parameters(), 0.1)


def settings_with(name: str, rate: float = 0.05, mu: float = 0.0, **options: Any) -> ClientSettings:
    training = LocalTraining(rate, 2, 5, mu, Optimizer(name, tuple(options.items())))
    return ClientSettings("made", training, seed=3)


def instruction(task: Made, number: int = 1, **config: float) -> RecordDict:
    arrays = memory_arrays(read_arrays(task.model()))
    return instruct(
        RecordDict({"arrays": arrays, "config": ConfigRecord(dict(config))}), PLAIN, "run", number
    )


def by_hand(task: Made, settings: ClientSettings, make: Any, mu: float = 0.0) -> np.ndarray:
    """The sum of the clients' weighted updates by a loop as anybody writes it, with a new optimiser for each."""
    key = int(Randomness(settings.seed).stream("training", 1).uint64(1)[0])
    total = 0
    for client in range(task.num_clients):
        model, examples, training = task.model(), task.client_data(client), settings.training
        start = [p.detach().clone() for p in model.parameters()]
        optimizer = make(list(model.parameters()))
        for batch in shuffled_batches(len(examples), 5, 2, client=client, key=key):
            rows = torch.from_numpy(batch)
            optimizer.zero_grad()
            task.loss(model(examples.inputs[rows]), examples.targets[rows]).backward()
            for p, origin in zip(model.parameters(), start, strict=True):
                p.grad += training.proximal_mu * (p.detach() - origin)
            optimizer.step()
        moved = [(p.detach() - s).flatten() for p, s in zip(model.parameters(), start, strict=True)]
        total = total + len(examples) * torch.cat(moved).double().numpy()
    return total


def on_path(path: str, task: Made, settings: ClientSettings, **config: float) -> np.ndarray:
    bench = Workbench(settings, task)
    content, clients = instruction(task, **config), list(range(task.num_clients))
    size = sum(p.numel() for p in task.model().parameters()) + len(PLAIN.segments)
    total = CohortSum(np.zeros(size))
    if path == "vectorised":
        assert can_vectorise(bench)
        total = sum_cohort(bench, content, clients, PLAIN, size)
    elif path == "in place":
        begun = begin(bench, content)
        for client in clients:
            scalars = begun.train(client)
            assert isinstance(scalars, dict)
            begun.add(total, scalars, PLAIN)
    else:
        app = make_client_app(lambda context: "", bench=bench)
        for client in clients:
            message = Message(content, client + 2, "train")
            message.metadata.__dict__["_message_id"] = "1"
            context: Context = client_context(1, client, len(clients), {SETTINGS_KEY: ""})
            add_reply(total, app(message, context), PLAIN)
    assert total.replies == len(clients)
    assert all(p.grad is None for p in bench.model.parameters())
    return total.total[: -len(PLAIN.segments)]


CASES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "adam": {"betas": (0.8, 0.9), "amsgrad": True},
    "adamw": {"weight_decay": 0.3},
    "nadam": {},
    "adagrad": {"lr_decay": 0.1},
    "rmsprop": {"momentum": 0.5, "centered": True},
    "adadelta": {"rho": 0.5},
    "asgd": {},
    "rprop": {"etas": (0.4, 1.3)},
    "adamax": {},
    "radam": {"decoupled_weight_decay": True, "weight_decay": 0.1},
}


@pytest.mark.parametrize("path", ["vectorised", "in place", "messages"])
@pytest.mark.parametrize("name", CASES)
def test_each_path_takes_the_steps_of_torchs_own_class(name: str, path: str) -> None:
    task, settings, options = Made(), settings_with(name, **CASES[name]), CASES[name]
    found = on_path(path, task, settings)
    expected = by_hand(task, settings, lambda p: CLASSES[name](p, lr=0.05, **options))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5)
    assert float(np.abs(expected).max()) > 1e-3


@pytest.mark.parametrize("path", ["vectorised", "in place", "messages"])
def test_the_pull_of_fedprox_goes_through_the_optimizer(path: str) -> None:
    task, settings = Made(), settings_with("sgd", 0.05, 0.7, momentum=0.9)
    told = replace(settings, training=replace(settings.training, proximal_mu=0.0))
    found = on_path(path, task, told, **{"proximal-mu": 0.7})
    expected = by_hand(task, settings, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_optimizer_of_whole_matrices_goes_client_by_client(name: str) -> None:
    task, settings = Made(bias=False), settings_with(name)
    assert name not in ELEMENTWISE and not can_vectorise(Workbench(settings, task))
    expected = by_hand(task, settings, lambda p: CLASSES[name](p, lr=0.05))
    for path in ("in place", "messages"):
        np.testing.assert_allclose(on_path(path, task, settings), expected, rtol=1e-4, atol=1e-5)


def test_tasks_own_optimizer_is_the_default() -> None:
    task, own = WithOwn(), settings_with("auto")
    assert not can_vectorise(Workbench(own, task))
    found = on_path("in place", task, own)
    np.testing.assert_allclose(found, by_hand(task, own, task.optimizer), rtol=1e-4, atol=1e-5)
    named = settings_with("sgd")
    found = on_path("vectorised", task, named)
    expected = by_hand(task, named, lambda p: torch.optim.SGD(p, lr=0.05))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_task_with_planted_examples_keeps_its_optimizer() -> None:
    task = mislabelled(WithOwn(), 0)
    assert task.optimizer is not None and mislabelled(Made(), 0).optimizer is None
    shape = torch.Size([LABELS])
    assert record_canaries.WatchedLoss(WithOwn(), shape, 1.0).optimizer is not None


@pytest.mark.parametrize(
    ("task", "training", "said"),
    [
        (WithClosure(), LocalTraining(), "closure"),
        (WithSomethingElse(), LocalTraining(), "returned a list"),
        (WithOneForAll(), LocalTraining(), "make a new one from those given"),
        (WithOwnParameters(), LocalTraining(), "make a new one from those given"),
        (Made(), LocalTraining(optimizer=Optimizer("sgd", (("nesterov", True),))), "Nesterov"),
        (Made(), LocalTraining(optimizer=Optimizer("adam", (("betas", (1.0, 0.9)),))), "Invalid beta"),
        (Made(), LocalTraining(optimizer=Optimizer("adam", (("eps", 0.0),))), "not finite"),
        (Made(), LocalTraining(optimizer=Optimizer("muon")), "2D"),
        (WithOwn(), LocalTraining(schedule=Schedule("cosine", 3)), "schedule='cosine': the task's own"),
        (
            WithOwn(),
            LocalTraining(schedule=Schedule(rounds=3, warmup=1)),
            "schedule='constant': the task's own",
        ),
        (Made(), LocalTraining(optimizer=Optimizer("dp_adambc")), "privacy=record"),
    ],
)
def test_optimizer_unfit_for_the_model_is_refused(task: Made, training: LocalTraining, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        check_optimizer(task, training)


def test_a_refused_optimizer_leaves_nothing_behind(tmp_path: Any) -> None:
    for given in ({"task": WithClosure()}, {"task": Made(), "optimizer": {"name": "sgd", "nesterov": True}}):
        with pytest.raises(Refusal, match="optimizer"):
            fv.simulate(**given, num_rounds=1, folder=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# --- names and options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_TORCH)
def test_the_keywords_and_the_usual_rate_are_those_of_torch(name: str) -> None:
    taken = inspect.signature(CLASSES[name]).parameters
    assert set(keywords_of(name)) == taken.keys() - HOW - WORDS
    assert OPTIMIZERS[name] == (None if name == "sgd" else taken["lr"].default)


def test_adam_without_the_bias_of_noise_has_its_steps_keywords() -> None:
    read = set(re.findall(r'group\["(\w+)"\]', inspect.getsource(AdamBC.step))) - {"params", "lr"}
    assert read == set(keywords_of("dp_adambc")) < set(keywords_of("adam"))


def test_every_class_of_torch_that_needs_only_gradients_has_a_name() -> None:
    found = {name for name, each in vars(torch.optim).items() if inspect.isclass(each)}
    assert found - {"Optimizer", "LBFGS", "SparseAdam"} == {CLASSES[name].__name__ for name in OF_TORCH}


@pytest.mark.parametrize("name", OF_TORCH)
def test_torchs_defaults_may_be_written_down(name: str) -> None:
    plain = {key: value for key, value in keywords_of(name).items() if (name, key) != ("adafactor", "eps")}
    given = [f"optimizer.{key}={json.dumps(value)}" for key, value in plain.items()]
    told = settings_from_overrides([f"optimizer={name}", *given]).local_training
    assert dict(told.optimizer.options) == plain
    check_optimizer(Made(bias=False), told)


def test_help_tells_the_keywords_and_defaults_of_torchs_class() -> None:
    told = help_text(compose_overrides(["optimizer=adam", "optimizer.eps=1e-4"]).config, SimulationSettings)
    for row in ("optimizer.betas=[0.9, 0.999]", "optimizer.eps=0.0001", "optimizer.amsgrad=false"):
        assert told.count(f"\n  {row}") == 1
    assert "\n  optimizer.betas" not in help_text(compose_overrides([]).config, SimulationSettings)


def test_order_of_another_release_is_the_same() -> None:
    nulls = [f"++optimizer.{key}=null" for key in keywords_of("adam")]
    was, now = (
        settings_from_overrides(["optimizer=adam", *nulls]),
        settings_from_overrides(["optimizer=adam"]),
    )
    assert was.local_training == now.local_training
    told = settings_from_overrides(["optimizer=sgd", "optimizer.momentum=0", "optimizer.weight_decay=1"])
    order = TrainingOrder("r", ModeName.NONE, told.local_training).to_json()
    assert '"optimizer":{"name":"sgd","options":[["momentum",0.0],["weight_decay",1.0]]}' in order.replace(
        " ", ""
    )
    muon = settings_from_overrides(["optimizer=muon", "optimizer.ns_steps=7"]).local_training.optimizer
    assert repr(muon.options) == "(('ns_steps', 7),)"


def test_an_order_names_no_keyword_that_torch_has_for_other_ends() -> None:
    for key, value in (("maximize", True), ("foreach", True), ("params", 1), ("lr", 1.0), ("momentum", 0.9)):
        with pytest.raises(Refusal, match=f"optimizer.{key}"):
            check_optimizer(Made(), LocalTraining(optimizer=Optimizer("adam", ((key, value),))))
    with pytest.raises(Refusal, match="sgd has no such keyword"):
        check_optimizer(Made(), LocalTraining(optimizer=Optimizer("sgd", (("nothing", 0.0),))))
    for value in ((0.1,) * 99, (0.1,), 0.1, True):
        with pytest.raises(Refusal, match=r"optimizer\.betas"):
            check_optimizer(Made(), LocalTraining(optimizer=Optimizer("adam", (("betas", value),))))
    for name in ("adam", "dp_adambc"):
        ordered = LocalTraining(optimizer=Optimizer(name, (("maximize", True),)))
        with pytest.raises(Refusal, match="no keyword maximize"):
            optimizer_of(Made(), list(perceptron().parameters()), ordered, 1.0)
    with pytest.raises(Refusal, match="takes no betas"):
        Optimizer("auto", (("betas", (0.9, 0.99)),))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer=lbfgs"], "optimizer='lbfgs': there is no such option"),
        (
            ["optimizer=adam", "optimizer.momentum=0.9"],
            "optimizer.momentum=0.9: adam has no such keyword; known: ",
        ),
        (
            ["optimizer=adam", "+optimizer.beta=[0.9,0.99]"],
            "optimizer.beta=[0.9, 0.99]: adam has no such keyword; did you mean 'betas'?",
        ),
        (
            ["optimizer=adam", "+optimizer.beta=null"],
            "optimizer.beta=None: adam has no such keyword; leave it out",
        ),
        (["optimizer.momentum=0.9"], "optimizer=muon and optimizer=rmsprop and optimizer=sgd have it"),
        (
            ["optimizer=adam", "optimizer.betas=[0.9,1]"],
            "optimizer.betas=[0.9, 1]: torch refuses it (Invalid beta parameter at index 1",
        ),
        (
            ["optimizer=adam", "optimizer.betas=0.9"],
            "optimizer.betas=0.9: give a value of the kind of torch's own, which is (0.9, 0.999)",
        ),
        (
            ["optimizer=adam", "optimizer.amsgrad=1"],
            "optimizer.amsgrad=1: give a value of the kind of torch's own, which is False",
        ),
        (
            ["optimizer=adam", "optimizer.eps=true"],
            "optimizer.eps=True: give a value of the kind of torch's own, which is 1e-08",
        ),
        (["optimizer=muon", "optimizer.ns_steps=2.5"], "optimizer.ns_steps=2.5: give a whole number"),
        (["optimizer=sgd", "optimizer.nesterov=true"], "optimizer.nesterov=True: torch refuses it (Nesterov"),
        (
            ["optimizer=adam", "optimizer.eps=-1", "optimizer.weight_decay=-1"],
            "optimizer.eps=-1: torch refuses it (Invalid epsilon",
        ),
        (["optimizer=adam", f"optimizer.eps=1{'0' * 400}"], "(401 characters): give a finite number"),
        (["optimizer=adam", "optimizer.eps=small"], "optimizer.eps='small': give a finite number"),
        (["optimizer=adam", "optimizer.lr=0"], "optimizer.lr=0: must be above 0"),
        (["optimizer=adam", "optimizer.betas=[0.9,nan]"], "optimizer.betas"),
        (["optimizer=dp_adambc"], "privacy=record"),
        (["schedule=cosine", "schedule.floor=2"], "schedule.floor=2: must be at least 0 and at most 1"),
        (["schedule=exponential"], "schedule='exponential': there is no such option"),
        (["schedule.warmup=100"], "schedule.warmup=100: takes the whole run of 100 rounds"),
    ],
)
def test_unknown_or_out_of_range_value_is_refused_by_name(overrides: list[str], said: str) -> None:
    with pytest.raises(Refusal) as refused:
        settings_from_overrides(overrides)
    assert said in str(refused.value)


def test_the_configuration_says_how_a_client_trains() -> None:
    def told(*overrides: str) -> LocalTraining:
        return settings_from_overrides(list(overrides)).local_training

    assert told().optimizer.plain and told().learning_rate == 20
    assert told("optimizer=sgd").optimizer.plain and told("optimizer=sgd").learning_rate == 20
    assert told("optimizer=adamw").learning_rate == 0.001
    assert told("optimizer=adamw", "learning_rate=0.1").learning_rate == 0.1
    assert told("optimizer=adamw", "optimizer.lr=0.2").learning_rate == 0.2
    assert told("optimizer=adam", "optimizer.betas=[0.5,0.6]").optimizer.options == (("betas", (0.5, 0.6)),)
    assert told("privacy=record", "optimizer=dp_adambc").optimizer.name == "dp_adambc"
    assert told("schedule=step", "num_rounds=7").schedule == Schedule("step", 7, 0, 0.0, 30, 0.1)


# --- schedules ----------------------------------------------------------------------------------------------------


def test_a_schedule_gives_each_round_its_rate() -> None:
    def rates(schedule: Schedule) -> list[float]:
        return [round(schedule.factor(number), 4) for number in range(1, schedule.rounds + 2)]

    assert rates(Schedule("constant", 3)) == [1, 1, 1, 1]
    assert rates(Schedule("constant", 4, warmup=3)) == [0.25, 0.5, 0.75, 1, 1]
    assert rates(Schedule("linear", 4)) == [1, 0.75, 0.5, 0.25, 0.25]
    assert rates(Schedule("linear", 4, floor=0.5)) == [1, 0.875, 0.75, 0.625, 0.625]
    assert rates(Schedule("cosine", 4)) == [1, 0.8536, 0.5, 0.1464, 0.1464]
    assert rates(Schedule("step", 5, every=2, gamma=0.5)) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_a_client_takes_the_rate_of_its_round() -> None:
    settings = settings_with("adam", 0.4)
    settings = replace(settings, training=replace(settings.training, schedule=Schedule("linear", 4)))
    rates = [training_settings(instruction(Made(), n), settings).learning_rate for n in (1, 2, 4)]
    assert rates == pytest.approx([0.4, 0.3, 0.1])
    assert ClientSettings.from_json(settings.to_json()) == settings


def test_an_order_tells_optimizer_and_schedule() -> None:
    training = LocalTraining(
        0.1, 2, 32, 0.0, Optimizer("adam", (("eps", 1e-6), ("betas", (0.9, 0.99)))), Schedule("cosine", 9, 2)
    )
    text = TrainingOrder("r", ModeName.NONE, training).to_json()
    again = TrainingOrder.from_json(text)
    assert again.training == training and hash(again.training) == hash(training) and again.to_json() == text
    for path, value in (
        (("optimizer", "name"), "lbfgs"),
        (("optimizer", "options"), [["eps", [0.1, "small"]]]),
        (("optimizer", "options"), [["eps", math.nan]]),
        (("optimizer", "options"), [["eps", "small"]]),
        (("optimizer", "options"), 3),
        (("optimizer", "more"), 1),
        (("schedule", "gamma"), 2.0),
        (("schedule", "rounds"), 0),
        (("schedule", "name"), "plateau"),
        (("schedule",), "constant"),
    ):
        plain = json.loads(text)
        where = plain
        for part in path[:-1]:
            where = where[part]
        where[path[-1]] = value
        with pytest.raises(Refusal):
            TrainingOrder.from_json(json.dumps(plain))


def test_linear_device_refuses_unsupported_optimizers() -> None:
    task = linear.LinearTask(linear.Table(np.ones((1, 1), np.float32), np.array([0])), 0)
    task.check_order(TrainingOrder("r", ModeName.NONE, LocalTraining(schedule=Schedule("cosine", 9))), None)
    with pytest.raises(Refusal, match="plain SGD"):
        task.check_order(TrainingOrder("r", ModeName.NONE, LocalTraining(optimizer=Optimizer("adam"))), None)


# --- record level -------------------------------------------------------------------------------------------------


def privately(task: Made, training: LocalTraining, noise: float, steps: int = 5) -> list[Tensor]:
    model, examples = task.model(), task.client_data(3)
    start = [p.detach().clone() for p in model.parameters()]
    plan = Plan(Unit.RECORD, Adjacency.ZERO_OUT, PoissonBatches(0.5, steps), 0.4, 1, noise)
    streams = Randomness(0).stream("batches"), Randomness(0).stream("noise")
    dp_sgd.train_privately(model, task, examples, training, dp_sgd.PrivateSteps(plan, *streams))
    return [p.detach() - s for p, s in zip(model.parameters(), start, strict=True)]


class Replayed(DPOptimizer):
    """Opacus' optimiser with the noise of our stream."""

    def add_noise(self) -> None:
        sizes = [p.numel() for p in self.params]
        sigma, step = dp_sgd.lattice_of(self.noise_multiplier, self.max_grad_norm, sum(sizes))
        drawn = torch.from_numpy(sample(sigma, sum(sizes), self.generator) * step).float()
        for p, part in zip(self.params, drawn.split(sizes), strict=True):
            p.grad = (p.summed_grad + part.view(p.shape)).view_as(p)


@pytest.mark.parametrize(
    ("name", "options"),
    [("adam", {}), ("sgd", {"momentum": 0.9}), ("adamw", {"weight_decay": 0.2}), ("rmsprop", {})],
)
def test_any_optimizer_steps_as_opacus_own_does_on_the_same_noise(name: str, options: dict[str, Any]) -> None:
    task, training = Made(), settings_with(name, **options).training
    ours = privately(task, training, 0.7)
    theirs, examples = task.model(), task.client_data(3)
    before = [p.detach().clone() for p in theirs.parameters()]
    hooks = GradSampleHooks(theirs, batch_first=True, loss_reduction="mean")
    inner = CLASSES[name](theirs.parameters(), lr=0.05, **options)
    optimizer = Replayed(inner, noise_multiplier=0.7, max_grad_norm=0.4, expected_batch_size=6)
    optimizer.generator = Randomness(0).stream("noise")  # type: ignore[assignment]
    for batch in PoissonBatches(0.5, 5).draw(len(examples), Randomness(0).stream("batches")):
        optimizer.zero_grad()
        rows = torch.from_numpy(batch)
        task.loss(theirs(examples.inputs[rows].requires_grad_()), examples.targets[rows]).backward()
        optimizer.step()
    hooks.cleanup()
    for mine, p, b in zip(ours, theirs.parameters(), before, strict=True):
        torch.testing.assert_close(mine, p.detach() - b, rtol=1e-3, atol=1e-5)


def test_adambc_without_noise_is_adam_above_its_floor() -> None:
    def moved(make: Any) -> Tensor:
        p = torch.zeros(50, requires_grad=True)
        optimizer, generator = make([p]), torch.Generator().manual_seed(1)
        for _ in range(4):
            p.grad = torch.randn(50, generator=generator)
            optimizer.step()
        return p.detach()

    ours = moved(lambda p: AdamBC(p, 0.0, lr=0.1, eps=1e-12, weight_decay=0.1))
    theirs = moved(lambda p: torch.optim.AdamW(p, lr=0.1, eps=1e-12, weight_decay=0.1))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_adambc_takes_the_variance_of_the_noise_out() -> None:
    """Gradients of 1 below noise of 3: Adam divides by the root of 10, and steps a third of what it would unnoised."""

    def moved(make: Any) -> float:
        p = torch.zeros(20_000, requires_grad=True)
        optimizer, generator = make([p]), torch.Generator().manual_seed(1)
        for _ in range(400):
            p.grad = 1 + 3 * torch.randn(len(p), generator=generator)
            optimizer.step()
        return -float(p.detach().mean()) / 400

    assert moved(lambda p: torch.optim.Adam(p, lr=1.0)) == pytest.approx(10**-0.5, rel=0.05)
    assert moved(lambda p: AdamBC(p, 9.0, lr=1.0, eps=0.05)) > 0.8


def test_dp_adambc_knows_the_noise_of_the_mean() -> None:
    """Replayed by hand on the released gradients: noise std 0.4 * 0.7 on the sum, 6 examples expected in a batch."""
    seen: list[Tensor] = []
    task, training = Made(), settings_with("dp_adambc", eps=1e-3).training
    model, examples = task.model(), task.client_data(3)
    plan = Plan(Unit.RECORD, Adjacency.ZERO_OUT, PoissonBatches(0.5, 3), 0.4, 1, 0.7)
    streams = Randomness(0).stream("batches"), Randomness(0).stream("noise")

    def note() -> None:
        seen.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))  # type: ignore[union-attr]

    dp_sgd.train_privately(model, task, examples, training, dp_sgd.PrivateSteps(plan, *streams, note))
    value = torch.cat([p.detach().flatten() for p in task.model().parameters()])
    mean = square = torch.zeros_like(value)
    for step, gradient in enumerate(seen, 1):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        left = (square / (1 - 0.999**step) - (0.4 * 0.7 / 6) ** 2).clamp(min=1e-3)
        value = value - 0.05 * mean / (1 - 0.9**step) / left.sqrt()
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in model.parameters()]), value)


def test_a_task_of_ones_own_trains_with_its_optimizer_at_record_level() -> None:
    moved = privately(WithOwn(), LocalTraining(0.05, 1, 5), 0.0001, steps=1)
    # Adam's first step is its rate: 0.2 for matrices, 0.1 for biases.
    for each in moved:
        torch.testing.assert_close(each.abs(), torch.full_like(each, 0.1 * each.dim()), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer": "adamw", "schedule": {"name": "cosine", "warmup": 1}},
        {"optimizer": {"name": "sgd", "momentum": 0.5}, "engine": {"workers": 2}},
        {"optimizer": "dp_adambc", "privacy": "record"},
        {"optimizer": "adagrad", "privacy": "record_and_client"},
        {"optimizer": {"name": "adam", "lr": 0.1}, "privacy": "client_distributed", "num_rounds": 1},
    ],
)
def test_result_names_the_optimizer(keys: dict[str, Any]) -> None:
    run = fv.simulate("digits", **{"num_rounds": 2, "quiet": True, **keys})
    assert run.status == "completed" and 0 < run.metrics["accuracy"] <= 1
