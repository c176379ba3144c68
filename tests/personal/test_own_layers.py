"""Layers that stay at their client: what travels, what a client stores, and that a run that goes on has the same bits."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from shared.runs import reservations, resume, run_quietly
from shared.tasks import Points, RealPoints
from torch import Tensor, nn

import fedveil as fv
from fedveil.audit.membership_attacks import attack_on
from fedveil.base.refusal import Refusal
from fedveil.client.workbench import Workbench
from fedveil.configs.settings import settings_from_overrides
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.training_order import HEAD, ModeName, OwnLayers, RecordTerms, TrainingOrder
from fedveil.personal.own_layers import (
    MAX_RUNS,
    layers_folder,
    load_own,
    own_arrays,
    own_names_of,
    store_own,
    whole_model,
    with_own_layers,
    without_own_layers,
)
from fedveil.personal.simulation import own_path
from fedveil.personal.state import read_own
from fedveil.privacy.budget import Adjacency
from fedveil.run.build import build
from fedveil.run.released import model_of, task_of
from fedveil.server import checkpoint
from fedveil.tasks.arrays import (
    agreement_of,
    base_of,
    dimension_of,
    emptied,
    holding,
    load_arrays,
    own_state,
    read_arrays,
    sent_state,
)
from fedveil.tasks.data import data_of
from fedveil.tasks.held_back import held_back_of
from fedveil.tasks.protocol import Task

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")

CLIENTS, ROUNDS = 8, 4
HEAD_LAYER = OwnLayers(("head.*",), 1)
HEAD_ONLY, NORM_AND_HEAD = ("personal.layers=[head.*]",), ("personal.layers=[norm.*,head.*]",)
ONE_BATCH = ("batch_size=1000", "local_epochs=1", "learning_rate=0.5")


class Headed(nn.Module):
    """A body that all clients share, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(inputs)))


class Normed(Headed):
    """The same with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.body(inputs))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight = self.body.weight


def overrides(*more: str, model: str = "Headed") -> list[str]:
    of_model = [f"task.model={__name__}:{model}", f"allow_modules=[{__name__}]"]
    size = ["task=digits", f"task.num_clients={CLIENTS}", "partition=shards", f"num_rounds={ROUNDS}"]
    return [*size, *of_model, "cohort=all", "privacy=none", "audit=off", "personal=layers", *more]


def marked(layers: OwnLayers = HEAD_LAYER) -> nn.Module:
    return digits(*layers.patterns).model()


def digits(*patterns: str) -> Task:
    keys = [f"personal.layers=[{','.join(patterns or ('head.*',))}]"]
    return build(settings_from_overrides(overrides(*keys))).task


def whole(folder: Path, task: Task, client: int) -> nn.Module:
    """Return a client's own model after a run."""
    model = task.model()
    shared = load_file(folder / "model.safetensors")
    arrays = whole_model(model, shared, layers_folder(folder / "personal", client))
    load_arrays(model, arrays)
    return model.eval()


def stored(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("0*.safetensors")}


def newest(folder: Path) -> dict[str, bytes]:
    """Return what each client would begin the next round with."""
    files = sorted(folder.rglob("0*.safetensors"))
    return {each.parent.name: each.read_bytes() for each in files}


# --- what travels -----------------------------------------------------------------------------------------------


def test_own_layers_are_neither_sent_nor_of_the_base() -> None:
    model = marked()
    assert set(sent_state(model)) == {"body.weight", "body.bias"}
    assert set(own_state(model)) == {"head.weight", "head.bias"}
    assert not base_of(model)
    assert dimension_of(digits()) == 64 * 16 + 16


def test_an_emptied_model_keeps_its_own_layers() -> None:
    model = marked()
    arrays, own = read_arrays(model), own_arrays(model)
    with holding(emptied(model), arrays):
        assert model(torch.ones(1, 64)).shape == (1, 10)
    assert model.get_parameter("body.weight").numel() == 0
    assert all(np.array_equal(own[name], value) for name, value in own_arrays(model).items())


def test_a_server_and_devices_disagree_on_other_layers() -> None:
    def of(patterns: tuple[str, ...]) -> str | None:
        class Predicting(Points):
            def beside_the_model(self) -> dict[str, bytes]:
                return {}

            def encode(self, data: object) -> Tensor:
                return torch.zeros(1, 4)

            def decode(self, outputs: Tensor) -> dict[str, Any]:
                return {}

        task = Predicting()
        task.model = Headed  # type: ignore[method-assign]
        return agreement_of(with_own_layers(task, {"patterns": list(patterns), "rounds": 1}))

    assert of(("head.*",)) == of(("head.weight", "head.bias")) != of(("head.bias",))


@pytest.mark.parametrize(
    ("model", "patterns", "words"),
    [
        (Headed, ("head.*", "neck.*"), "matches nothing that trains; the names are body.weight"),
        (Headed, ("*",), "leaves nothing that travels"),
        (Normed, ("body.*", "head.*", "norm.[wbr]*"), "leaves nothing that travels"),
        (Tied, ("head.*",), "head.weight is body.weight, which travels"),
    ],
)
def test_patterns_that_do_not_suit_the_model_are_refused(
    model: type[nn.Module], patterns: tuple[str, ...], words: str
) -> None:
    with pytest.raises(Refusal, match=words.replace("*", "[*]")):
        own_names_of(model(), patterns)


# --- what a client stores -----------------------------------------------------------------------------------------


def here(folder: Path) -> ClientSettings:
    """Return the settings of a device whose layers lie in the folder."""
    return ClientSettings("digits", LocalTraining(), device="d" * 64, own_folder=str(folder))


def change(model: nn.Module, value: float) -> None:
    model.get_parameter("head.bias").data.fill_(value)


def bias(model: nn.Module) -> float:
    return float(model.get_parameter("head.bias").detach()[0])


def test_a_round_begins_with_the_newest_layers_before_it(tmp_path: Path) -> None:
    model = marked()
    for number in (1, 2, 5):
        change(model, number)
        store_own(model, here(tmp_path), 0, "run", number)
    load_own(model, here(tmp_path), 0, "run", 9)
    assert bias(model) == 5
    load_own(model, here(tmp_path), 0, "run", 5)  # once more, after a kill
    assert bias(model) == 2


def test_layers_of_the_rounds_since_a_checkpoint_stay(tmp_path: Path) -> None:
    model = marked(OwnLayers(("head.*",), 1))
    model.fedveil_own_rounds = 3  # pyright: ignore[reportAttributeAccessIssue]
    for number in range(1, 9):
        store_own(model, here(tmp_path), 0, "run", number)
    names = sorted(each.name for each in layers_folder(tmp_path, 0, "run").iterdir())
    assert names == [f"{number:06}.safetensors" for number in (5, 6, 7, 8)]


def test_layers_of_undone_rounds_are_deleted(tmp_path: Path) -> None:
    model = marked()
    for number in (4, 5, 3):
        change(model, number)
        store_own(model, here(tmp_path), 0, "run", number)
    load_own(model, here(tmp_path), 0, "run", 9)
    assert bias(model) == 3


def test_layers_belong_to_one_run_and_one_client(tmp_path: Path) -> None:
    model = marked()
    change(model, 7)
    store_own(model, here(tmp_path), 0, "run@first", 1)
    for client, run, expected in ((0, "run@again", 7), (1, "run@first", 0), (0, "other", 0)):
        change(model, 0)
        load_own(model, here(tmp_path), client, run, 2)
        assert bias(model) == expected


def test_layers_of_earlier_runs_are_dropped(tmp_path: Path) -> None:
    model = marked()
    for number in range(MAX_RUNS + 3):
        store_own(model, here(tmp_path), 0, f"run {number}", 1)
        os.utime(layers_folder(tmp_path, 0, f"run {number}").parent, ns=(number, number))
    runs = [each for each in (tmp_path / "layers").iterdir()]
    assert len(runs) == MAX_RUNS
    assert layers_folder(tmp_path, 0, f"run {MAX_RUNS + 2}").is_dir()


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_damaged_layers_are_refused(content: bytes, tmp_path: Path) -> None:
    model = marked()
    store_own(model, here(tmp_path), 0, "run", 1)
    (layers_folder(tmp_path, 0, "run") / "000001.safetensors").write_bytes(content)
    with pytest.raises(Refusal, match="is damaged"):
        load_own(model, here(tmp_path), 0, "run", 2)


def test_layers_of_another_model_are_refused(tmp_path: Path) -> None:
    store_own(marked(), here(tmp_path), 0, "run", 1)
    with pytest.raises(Refusal, match="the layers of another model"):
        load_own(marked(OwnLayers(("body.*",), 1)), here(tmp_path), 0, "run", 2)


def test_no_layers_reach_the_next_client(tmp_path: Path) -> None:
    settings = ClientSettings("digits", LocalTraining(), own_folder=str(tmp_path))
    bench = Workbench(settings, digits("head.*"))
    start, initial = read_arrays(bench.model), own_arrays(bench.model)
    bench.receive(start)
    bench.load_own(0, "run", 1)
    change(bench.model, 7)
    bench.store_own(0, "run", 1)
    bench.receive(start)
    bench.load_own(1, "run", 1)
    assert all(np.array_equal(initial[name], value) for name, value in own_arrays(bench.model).items())


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_is_what_its_clients_train_by_hand(tmp_path: Path) -> None:
    run_quietly(overrides(*HEAD_ONLY, *ONE_BATCH), tmp_path)
    task = digits()
    torch.manual_seed(0)
    model = task.model()
    shared, heads = read_arrays(model), [own_arrays(model) for _ in range(CLIENTS)]
    data = [data_of(task, client) for client in range(CLIENTS)]
    weights = np.array([len(each) for each in data]) / sum(map(len, data))
    for _ in range(ROUNDS):
        updates: list[dict[str, Any]] = []
        for client in range(CLIENTS):
            load_arrays(model, {**shared, **heads[client]})
            inputs, targets = data[client].batch(torch.arange(len(data[client])))
            model.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            with torch.no_grad():
                for each in model.parameters():
                    assert each.grad is not None
                    each -= 0.5 * each.grad
            heads[client] = own_arrays(model)
            updates.append(read_arrays(model))
        shared = {
            name: np.sum([w * u[name] for w, u in zip(weights, updates, strict=True)], 0) for name in shared
        }
    released = load_file(tmp_path / "model.safetensors")
    assert set(released) == set(shared)
    for name, value in shared.items():
        np.testing.assert_allclose(released[name], value, atol=1e-5)
    for client, head in enumerate(heads):
        own = own_arrays(whole(tmp_path, task, client))
        for name, value in head.items():
            np.testing.assert_allclose(own[name], value, atol=1e-5)


def test_heads_of_one_sided_clients_beat_a_shared_one(tmp_path: Path) -> None:
    long = ("num_rounds=10", "learning_rate=0.3", "local_epochs=4", "batch_size=10", "task.num_clients=20")
    run_quietly(overrides(*HEAD_ONLY, *long), tmp_path / "layers")
    shared = run_quietly([*overrides(*long), "personal=none"], tmp_path / "shared")
    task = digits()
    held_out = task.held_out()
    figures: list[float] = []
    settings = settings_from_overrides(overrides(*HEAD_ONLY, *long))
    task = build(settings).task
    for client in range(20):
        data = data_of(task, client)
        shares = torch.bincount(data.batch(torch.arange(len(data)))[1], minlength=10) / len(data)
        with torch.no_grad():
            right = whole(tmp_path / "layers", task, client)(held_out.inputs).argmax(1) == held_out.targets
        by_kind = [right[held_out.targets == kind].float().mean() for kind in range(10)]
        figures.append(float((shares * torch.stack(by_kind)).sum()))  # on rows like the client's own
    assert np.mean(figures) > 0.9
    assert np.mean(figures) > shared.result["metrics"]["accuracy"] + 0.1


def test_columns_are_of_whole_models_and_of_local_ones(tmp_path: Path) -> None:
    keys = overrides(*HEAD_ONLY, "num_rounds=10", "learning_rate=0.3", "local_epochs=4")
    result = run_quietly(keys, tmp_path).result
    task, right, count = build(settings_from_overrides(keys)).task, 0, 0
    plain = without_own_layers(task).model().eval()
    for client in range(CLIENTS):
        own = read_own(own_path(tmp_path, client))
        assert own is not None
        load_arrays(plain, own.arrays)
        held_out = held_back_of(task, client)
        assert held_out is not None
        inputs, targets = held_out.batch(torch.arange(len(held_out)))
        with torch.no_grad():
            outputs = plain(inputs)
            assert torch.equal(outputs, whole(tmp_path, task, client)(inputs))
        right, count = right + int((outputs.argmax(1) == targets).sum()), count + len(targets)
    assert result["metrics"]["personal/accuracy"] == pytest.approx(right / count)
    assert result["metrics"]["personal/accuracy"] > 0.8
    assert 0.5 < result["metrics"]["local_only/accuracy"] <= 1
    assert result["personal"]["columns"]["shared"] == {}
    assert result["personal"]["rows"] == count
    assert not {"accuracy", "loss", "shared/accuracy"} & result["metrics"].keys()


@pytest.mark.parametrize(
    "keys",
    [
        ("engine.workers=2",),
        ("secagg=masked",),
        ("faults.dropout=0.000000001",),  # by messages
    ],
)
def test_every_path_stores_the_same_layers(keys: tuple[str, ...], tmp_path: Path) -> None:
    same = (*NORM_AND_HEAD, *ONE_BATCH, "learning_rate=0.1")
    run_quietly(overrides(*same, model="Normed"), tmp_path / "alone")
    run_quietly(overrides(*same, *keys, model="Normed"), tmp_path / "other")
    expected, other = newest(tmp_path / "alone"), newest(tmp_path / "other")
    assert len(expected) == CLIENTS
    if "secagg=masked" not in keys:  # whose sums are of whole numbers
        assert other == expected
    released, again = (load_file(tmp_path / each / "model.safetensors") for each in ("alone", "other"))
    assert set(released) == {"body.weight", "body.bias"}
    for name, value in released.items():
        np.testing.assert_allclose(again[name], value, atol=1e-3)


@pytest.mark.parametrize("mode", ["client_central", "client_distributed"])
def test_layers_that_stay_cost_nothing(mode: str, tmp_path: Path) -> None:
    noisy = (
        *(f"privacy={mode}", "privacy.noise_multiplier=2", "privacy.target_epsilon=null", "num_rounds=2"),
        *(
            "privacy.allow_large_delta=true",
            "privacy.target_delta=0.001",
            "accept_vacuous=true",
            "audit=light",
        ),
    )
    layers = run_quietly(overrides(*NORM_AND_HEAD, *noisy, *ONE_BATCH, model="Normed"), tmp_path / "layers")
    shared = run_quietly([*overrides(*noisy, *ONE_BATCH), "personal=none"], tmp_path / "shared")
    assert layers.result["privacy"] == shared.result["privacy"]
    assert set(load_file(tmp_path / "layers" / "model.safetensors")) == {"body.weight", "body.bias"}
    ledgers = [next((tmp_path / each).glob("ledger")) for each in ("layers", "shared")]
    events = [[each["events"] for each in reservations(ledger)] for ledger in ledgers]
    assert events[0] == events[1]
    state = checkpoint.read(tmp_path / "layers")
    assert state is not None
    assert set(state.state.arrays) == {"body.weight", "body.bias"}


def killed_after(count: int) -> Callable[[], None]:
    """Return what makes this process kill itself when a client stores its layers for the `count`-th time."""

    def arrange() -> None:
        from fedveil.personal import own_layers

        calls, true = 0, own_layers.store_own

        def deadly(*args: Any) -> None:
            nonlocal calls
            calls += 1
            true(*args)
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)

        own_layers.store_own = deadly

    return arrange


@pytest.mark.parametrize("every", [1, 3])
def test_a_killed_run_goes_on_with_the_same_layers(every: int, commands: Any, tmp_path: Path) -> None:
    keys = overrides(*HEAD_ONLY, f"checkpoint_every={every}")
    run_quietly(keys, tmp_path / "calm")
    folder = commands.folder / "run"
    code, command = commands.run(
        "simulate", *keys, f"hydra.run.dir={folder}", first=killed_after(2 * CLIENTS + 3)
    )
    assert code == -signal.SIGKILL, command.err
    done = checkpoint.read(folder)
    assert (0 if done is None else done.state.round) == 2 // every * every
    assert resume(folder).exit_code == 0
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "calm/model.safetensors").read_bytes()
    assert newest(folder) == newest(tmp_path / "calm")


def test_clients_evaluate_their_whole_models(tmp_path: Path) -> None:
    loud = ("privacy=client_central", "privacy.target_epsilon=100000", "privacy.allow_large_delta=true")
    asked = ("evaluate.clients=final", "evaluate.noise_multiplier=0.01", "evaluate.figures=[metric]")
    keys = overrides(*HEAD_ONLY, *loud, *asked, "accept_vacuous=true", "num_rounds=8", "learning_rate=1")
    result = run_quietly(keys, tmp_path).result
    task, figures = build(settings_from_overrides(keys)).task, list[float]()
    for client in range(CLIENTS):
        held_out = held_back_of(task, client)
        assert held_out is not None
        inputs, targets = held_out.batch(torch.arange(len(held_out)))
        with torch.no_grad():
            right = whole(tmp_path, task, client)(inputs).argmax(1) == targets
        figures.append(float(right.float().mean()))
    answer = result["evaluations"][-1]["answers"][0]["figures"][0]
    assert abs(answer["value"] - np.mean(figures)) < 0.02, answer


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("privacy=record",), "have seen a record before its noise"),
        (("privacy=record_distributed",), "use personal=after"),
        (("privacy=record_and_client",), "have seen a record before its noise"),
        (("tune=learning_rate",), "arms would train these layers with different values"),
        (("privacy=client_central", "audit=full"), "probes would score a model without these layers"),
        (
            ("privacy=client_central", "privacy.noise=correlated", "cohort=cyclic_poisson"),
            "for which correlated noise is not accounted",
        ),
        (("engine=ray", "engine.address=10.0.0.1:6379"), "each machine would store layers of its own"),
        (("task.held_out=public",), "the released model lacks the layers"),
    ],
)
def test_runs_that_cannot_be_true_are_refused(keys: tuple[str, ...], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        settings_from_overrides(overrides(*HEAD_ONLY, *keys))


def test_a_batch_that_cannot_be_normalised_is_refused(tmp_path: Path) -> None:
    keys = overrides(*NORM_AND_HEAD, model="Normed")
    size = len(data_of(build(settings_from_overrides(keys)).task, 3)) - 1
    with pytest.raises(Refusal, match="a batch of one record"):
        run_quietly([*keys, f"batch_size={size}"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_real_clients_on_one_machine_are_refused(tmp_path: Path) -> None:
    layers = {"name": "layers", "layers": ["weight"]}
    with pytest.raises(Refusal, match="deploy them"):
        fv.simulate(RealPoints(), personal=layers, privacy="none", num_rounds=1, folder=tmp_path / "run")


def test_a_model_without_its_layers_is_neither_attacked_nor_loaded(tmp_path: Path) -> None:
    run_quietly(overrides(*HEAD_ONLY, "num_rounds=1"), tmp_path)
    with pytest.raises(Refusal, match="an attack on it would show nothing"):
        attack_on(tmp_path, 1)
    with pytest.raises(Refusal, match="or lacks layers that stay at its clients"):
        model_of(tmp_path, task_of(tmp_path, (__name__,)))


def order(**fields: Any) -> TrainingOrder:
    return TrainingOrder("run", ModeName.NONE, LocalTraining(), own_layers=HEAD_LAYER, **fields)


def test_an_order_names_the_layers() -> None:
    text = order().to_json()
    assert TrainingOrder.from_json(text) == order()
    assert TrainingOrder("run", ModeName.NONE, LocalTraining()).to_json().find("own_layers") == -1


def test_an_order_for_records_names_no_layers() -> None:
    terms = RecordTerms(8, 1e-5, 1, Adjacency.ZERO_OUT)
    with pytest.raises(Refusal, match=HEAD[:30]):
        TrainingOrder("run", ModeName.RECORD, LocalTraining(), record=terms, own_layers=HEAD_LAYER)
