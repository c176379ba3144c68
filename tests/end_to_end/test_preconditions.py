"""Preconditions of the guarantee, through the real command: what would leak more than is printed is refused."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent
from flwr.app import ConfigRecord, Message, RecordDict
from shared.runs import json_lines
from torch import Tensor, nn

import fedveil.client.dp_sgd.train
import fedveil.simulations.simulate  # noqa: F401 (before any fork, so that children need not import it)
from fedveil.base.refusal import Refusal
from fedveil.client.app import train_round
from fedveil.client.training.cohort_training import can_vectorise
from fedveil.client.training.in_place import begin
from fedveil.client.workbench import Workbench
from fedveil.configs.settings import settings_from_overrides
from fedveil.engines.settings import Ray
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.flower_adapter import claim_identity
from fedveil.messages.training_order import LocalTraining
from fedveil.messages.wire import instruct, memory_arrays, only_arrays, view
from fedveil.privacy.accounting.epsilon import epsilon
from fedveil.privacy.budget import Adversary, Budget, Release, Unit
from fedveil.privacy.ledger import data_sets
from fedveil.privacy.ledger.hash_chain import Lock
from fedveil.privacy.ledger.ledger import Ledger, read_entries, verify
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.simulations.engines import require_one_machine
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
    own = [
        "task=custom",
        "task.target=hospitals:Hospitals",
        "allow_modules=[hospitals]",
        "task.data_id=wards",
    ]
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


# --- whose data they are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["record", "client_central", "record_distributed"])
@pytest.mark.parametrize("named", [[], ["task.data_id=null"]], ids=["nothing", "null"])
def test_real_data_without_a_name_are_refused_and_nothing_is_written(
    mode: str, named: list[str], tmp_path: Path, commands: Any
) -> None:
    write_task(tmp_path)
    own = [
        each
        for each in asked(tmp_path, f"privacy={mode}", "num_rounds=1", "cohort=all")
        if "data_id" not in each
    ]
    code, command = commands.run("simulate", *own, *named)
    assert code == 2 and command.err == (
        "task.data_id=None: name these real data, the same in every run, since it identifies their budget, as in "
        "task.data_id=wards-2026\n"
    )
    assert not (tmp_path / "ledgers").exists() and not (tmp_path / "run").exists()


def test_a_task_may_name_its_data_and_the_run_has_the_last_word(tmp_path: Path, commands: Any) -> None:
    write_task(tmp_path)
    source = tmp_path / "hospitals.py"
    source.write_text(source.read_text().replace("simulated = False", "simulated, data_id = False, 'a b'"))
    own = [each for each in asked(tmp_path, *RECORD) if "data_id" not in each]
    code, command = commands.run("simulate", *own)
    assert code == 2 and "task.data_id='a b': must be a name of letters" in command.err
    source.write_text(source.read_text().replace("a b", "clinics"))
    assert commands.run("simulate", *own)[0] == 0
    assert commands.run("simulate", *asked(tmp_path, *RECORD, "hydra.run.dir=second"))[0] == 0
    assert sorted(data_sets.read_data_sets(tmp_path / "ledgers")) == ["clinics", "wards"]


def test_real_data_that_nothing_hides_need_no_name(tmp_path: Path, commands: Any) -> None:
    write_task(tmp_path)
    own = [
        each
        for each in asked(tmp_path, "privacy=none", "num_rounds=1", "cohort=all")
        if "data_id" not in each
    ]
    code, command = commands.run("simulate", *own)
    assert code == 0, command.err


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
        assert isinstance(begun.train(client), dict)
    return read_arrays(bench.model)


def by_messages(bench: Workbench, clients: list[int]) -> dict[str, Any]:
    claim_identity(run_id=1)
    content = order_for(bench)
    replies = [train_round(Message(content, 0, "train"), k, bench, bench.settings) for k in clients]
    return {name: np.array(view(array)) for name, array in only_arrays(replies[-1].content).items()}


@pytest.mark.parametrize("where", ["buffer", "number", "list", "late"])
@pytest.mark.parametrize("engine", [in_place, by_messages])
def test_memory_of_one_client_does_not_reach_the_next(engine: Any, where: str) -> None:
    alone, after = engine(bench_of(where), [1]), engine(bench_of(where), [0, 1])
    assert alone.keys() == after.keys()
    for name, value in alone.items():
        np.testing.assert_array_equal(after[name], value)


CENTRAL = (
    "privacy=client_central",
    "privacy.target_epsilon=8",
    "privacy.allow_large_delta=true",
    "accept_vacuous=true",
)
WATCHED = """class Watched(nn.Sequential):
    def forward(self, inputs):
        LARGE[0] = int(float(inputs.detach().abs().min(1).values.max()) > 5e6)
        return super().forward(inputs)


class Hospitals"""
REMEMBERING = {
    "a loss that keeps a mean": (
        "F.cross_entropy(outputs - self.mean(outputs), targets)",
        """
    kept = 0.0

    def mean(self, outputs):
        self.kept = 0.9 * self.kept + 0.1 * float(outputs.detach().mean())
        return torch.tensor([self.kept, 0.0])
""",
    ),
    "a list of the module": (
        "F.cross_entropy(outputs * seen(targets), targets)",
        """

SEEN = [1.0]


def seen(targets):
    SEEN[0] += float(targets.sum())
    return 1 / SEEN[0]
""",
    ),
    "an object that is used late": (
        "F.cross_entropy(outputs * LATE.of(targets), targets)",
        """

class Late:
    __slots__ = ("batches", "seen")

    def __init__(self):
        self.batches, self.seen = 0, 1.0

    def of(self, targets):
        self.batches, self.seen = self.batches + 1, self.seen + float(targets.sum())
        return 1 / self.seen if self.batches > 50 else 1.0


LATE = Late()
""",
    ),
}


@pytest.mark.parametrize("mode", [CENTRAL, ("privacy=none",)], ids=["hidden", "not hidden"])
@pytest.mark.parametrize("memory", REMEMBERING)
def test_a_task_that_carries_one_client_to_the_next_is_refused(
    memory: str, mode: tuple[str, ...], tmp_path: Path, commands: Any
) -> None:
    loss, members = REMEMBERING[memory]
    write_task(tmp_path, loss=loss)
    source = tmp_path / "hospitals.py"
    source.write_text(source.read_text() + members)
    code, command = commands.run("simulate", *asked(tmp_path, *mode, "num_rounds=1", "cohort=all"))
    if mode != CENTRAL:
        assert code == 0, command.err
        return
    assert code == 2 and "task='Hospitals': a client gives another vector" in command.err, command.err
    assert not list(tmp_path.rglob("*.ledger"))


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, "F.cross_entropy(F.dropout(outputs), targets)"])
def test_a_task_that_carries_nothing_trains(loss: str, tmp_path: Path, commands: Any) -> None:
    write_task(tmp_path, loss=loss)
    code, command = commands.run("simulate", *asked(tmp_path, *CENTRAL, "num_rounds=1", "cohort=all"))
    assert code == 0, command.err


def test_records_of_each_client_are_measured(tmp_path: Path, commands: Any) -> None:
    """A layer mixes the last client's records alone, whose second input is out of the others' range."""
    write_task(tmp_path, layer="h = h - (h - h.mean(0)) * (self.training and bool(LARGE[0]))")
    source = tmp_path / "hospitals.py"
    large = "LARGE = [0]\n\n\nclass Layer"
    text = source.read_text().replace("class Layer", large)
    text = text.replace("return nn.Sequential(", "return Watched(").replace("class Hospitals", WATCHED)
    text = text.replace("return Examples(inputs,", "inputs += 1e7 * (seed == 2); return Examples(inputs,")
    source.write_text(text)
    code, command = commands.run("simulate", *asked(tmp_path, *RECORD))
    assert code == 2 and "one example's output changes" in command.err, command.err


@pytest.mark.parametrize("where", ["buffer", "number", "list", "late"])
def test_a_model_with_a_memory_is_not_trained_many_clients_at_once(where: str) -> None:
    assert not can_vectorise(bench_of(where))


# --- nothing that is printed is a release ---------------------------------------------------------------------------

WARDS = """\
import os
import torch
from torch import nn
from fedveil.tasks.data import Examples

TARGET = 5  # its inputs are zero, so the model's update and every noised sum are the same with and without it


class Wards:
    simulated, num_clients = True, 8

    def model(self):
        layer = nn.Linear(4, 2, bias=False)
        nn.init.zeros_(layer.weight)
        return layer

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return dict(accuracy=float((outputs.argmax(1) == targets).float().mean()))

    def client_data(self, client):
        begun = os.path.exists("run/config.yaml")  # before that the data are looked at, in the owner's sight
        if client == TARGET and begun and os.environ["CASE"] == "central fails":
            raise ValueError("the record of Erika Mustermann")
        inputs = torch.randn(30, 4, generator=torch.Generator().manual_seed(client))
        return Examples(inputs * (client != TARGET), (inputs.sum(1) > 0).long())

    def held_out(self):
        return self.client_data(0)
"""
SECRETS = {
    "central": (
        "privacy=client_central",
        "privacy.target_epsilon=8",
        "privacy.metrics_share=0",
        "privacy.allow_large_delta=true",
    ),
    "both": (
        "privacy=record_and_client",
        "privacy.client.target_epsilon=8",
        "privacy.client.metrics_share=0",
        "privacy.client.allow_large_delta=true",
        "privacy.record.target_epsilon=8",
    ),
}


def fixed_names() -> None:
    """Take chance and the clock out of the names that a run gives to itself and its ledger."""
    import uuid

    from fedveil.privacy.ledger import ledger

    ledger._now, ledger.token_hex = lambda: "2026-01-01T00:00:00+00:00", lambda size: "0" * size
    names = iter(range(1, 100))
    uuid.uuid4 = lambda: uuid.UUID(int=next(names))


def drawing(mode: str, case: str) -> Any:
    """Return what arranges that the target is drawn in the rounds of odd numbers, or never; nobody else's coin changes."""

    def arrange() -> None:
        import os

        from fedveil.client.dp_sgd import rounds as dp_sgd
        from fedveil.client.dp_sgd import stacked
        from fedveil.strategies.cohorts import Poisson

        fixed_names()
        os.environ["CASE"] = f"{mode} {case}"
        draw, rounds = Poisson.draw, iter(range(1, 100))

        def with_the_target(self: Poisson, population: Any, stream: Any, earlier: Any = ()) -> list[int]:
            others = [node for node in draw(self, population, stream, earlier) if node != population[5]]
            return sorted([*others, *([population[5]] if case != "out" and next(rounds) % 2 else [])])

        Poisson.draw = with_the_target

        def without_noise(model: Any, loss: Any, records: Examples, *_: Any) -> None:
            if case == "fails" and not records.inputs.any():
                raise ValueError("the record of Erika Mustermann")

        dp_sgd.train_privately = without_noise  # a client's own noise would be in the sum
        stacked.can_stack = lambda bench: False

    return arrange


def told(folder: Path, command: Any) -> dict[str, bytes]:
    """Return what others than the owner of a run can read of it, by file."""
    known = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "run").rglob("*"))
        if path.is_file() and path.stat().st_mode & 0o077
    }
    known |= {"stdout": command.out.encode(), "stderr": command.err.encode()}
    return {name: data.replace(str(folder).encode(), b"") for name, data in known.items()}


@dataclass
class Wards:
    """Runs of two modes, with the target drawn, failing or left out: each once."""

    folder: Path
    ran: dict[Path, tuple[int, dict[str, bytes]]] = field(default_factory=dict[Path, Any])

    def run(self, commands: Any, mode: str, case: str) -> tuple[int, dict[str, bytes]]:
        folder = self.folder / mode / case
        if folder not in self.ran:
            folder.mkdir(parents=True)
            (folder / "wards.py").write_text(WARDS)
            own = ["task=custom", "task.target=wards:Wards", "allow_modules=[wards]", "hydra.run.dir=run"]
            settings = ["num_rounds=4", "cohort=poisson", "cohort.rate=0.5", "batch_size=10", *SECRETS[mode]]
            here, first = replace(commands, folder=folder), drawing(mode, case)
            code, command = here.run("simulate", *own, *settings, first=first)
            self.ran[folder] = code, told(folder, command)
        return self.ran[folder]


@pytest.fixture(scope="module")
def wards(tmp_path_factory: pytest.TempPathFactory) -> Wards:
    return Wards(tmp_path_factory.mktemp("wards"))


@pytest.mark.parametrize("case", ["in", "fails"])
@pytest.mark.parametrize("mode", SECRETS)
def test_public_outputs_of_a_run_do_not_depend_on_the_draw(
    mode: str, case: str, wards: Wards, commands: Any
) -> None:
    (code, without), (other, drawn) = (wards.run(commands, mode, each) for each in ("out", case))
    assert code == other == 0, drawn["stderr"]
    assert {
        "run/metrics.jsonl",
        "run/result.json",
        "run/curve.svg",
        "run/model.safetensors",
        "stdout",
    } <= without.keys()
    assert without.keys() == drawn.keys()
    for name, data in without.items():
        assert data == drawn[name], name


@pytest.mark.parametrize("mode", SECRETS)
def test_operator_alone_reads_the_draw_and_the_failures(mode: str, wards: Wards, commands: Any) -> None:
    for case in ("fails", "out"):
        wards.run(commands, mode, case)
    failed, without = (wards.folder / mode / case / "run" / "operator.jsonl" for case in ("fails", "out"))
    lines = json_lines(failed)
    assert [line["dropped"] for line in lines[:4]] == [{"failed": 1}, {}, {"failed": 1}, {}]
    others = [json.loads(line)["invited"] for line in without.read_text().splitlines()[:4]]
    assert [line["invited"] for line in lines[:4]] == [
        n + k for n, k in zip(others, (1, 0, 1, 0), strict=True)
    ]
    assert lines[4]["seconds"] > 0 and lines[4]["cpu_seconds"] > 0 and failed.stat().st_mode & 0o077 == 0
    log = wards.folder / mode / "fails" / "run" / "clients.log"
    assert "Erika" in log.read_text() and log.stat().st_mode & 0o077 == 0


# --- how many there are ---------------------------------------------------------------------------------------------

CROWD = """\
import torch
from torch import nn
from fedveil.tasks.data import Examples


class Crowd:
    simulated = True

    def __init__(self, num_clients=CLIENTS):
        self.num_clients = num_clients

    def model(self):
        layer = nn.Linear(100, 2, bias=False)
        nn.init.zeros_(layer.weight)
        return layer

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return dict(accuracy=float((outputs.argmax(1) == targets).float().mean()))

    def client_data(self, client):
        return Examples(torch.zeros(5, 100), torch.zeros(5, dtype=torch.int64))

    def held_out(self):
        return Examples(torch.ones(5, 100), torch.zeros(5, dtype=torch.int64))
"""
HIDDEN = (
    "privacy=client_central",
    "privacy.adjacency=add-or-remove-one",
    "privacy.target_epsilon=8",
    "num_rounds=2",
)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("cohort=poisson",), "declare a public number instead, population=..."),
        (("cohort=all",), "declare a public number instead, population=..."),
        (("cohort=fixed", "cohort.size=5"), "replaces a client that leaves"),
        (("cohort=fixed", "cohort.size=5", "population=20"), "divides by its size"),
        (("cohort=all", "population=20", "task.num_clients=20"), "task.num_clients reveals the number"),
    ],
)
def test_a_hidden_number_of_clients_is_not_the_divisor(
    given: tuple[str, ...], sentence: str, tmp_path: Path, commands: Any
) -> None:
    (tmp_path / "crowd.py").write_text(CROWD.replace("CLIENTS", "20"))
    own = ["task=custom", "task.target=crowd:Crowd", "allow_modules=[crowd]", "hydra.run.dir=run"]
    code, command = commands.run("simulate", *own, *HIDDEN, *given, "privacy.allow_large_delta=true")
    assert code == 2 and sentence in command.err and "Traceback" not in command.err
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize("cohort", ["poisson", "all"])
def test_additional_client_of_a_declared_population_changes_no_output(
    cohort: str, tmp_path: Path, commands: Any
) -> None:
    """The clients' updates are zero: what is left is noise, whose scale told how many there were."""
    known: list[dict[str, bytes]] = []
    for clients in (20, 19):
        folder = tmp_path / str(clients)
        folder.mkdir()
        (folder / "crowd.py").write_text(CROWD.replace("CLIENTS", str(clients)))
        own = ["task=custom", "task.target=crowd:Crowd", "allow_modules=[crowd]", "hydra.run.dir=run"]
        asked = [*own, *HIDDEN, f"cohort={cohort}", "population=25", "privacy.metrics_share=0"]
        code, command = replace(commands, folder=folder).run(
            "simulate", *asked, "privacy.allow_large_delta=true", first=fixed_names
        )
        assert code == 0, command.err
        known.append(told(folder, command))
    assert known[0] == known[1]
    assert b"25 clients" in known[0]["stdout"] and b'"population": 25' in known[0]["run/result.json"]


# --- what an earlier run left ---------------------------------------------------------------------------------------


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return json_lines(folder / "metrics.jsonl")


def record_run(commands: Any, tmp_path: Path, name: str, *given: str) -> tuple[int, Any, Path]:
    folder = tmp_path / name
    code, command = commands.run("simulate", *asked(tmp_path, *RECORD, f"hydra.run.dir={folder}", *given))
    return code, command, folder


def test_real_records_need_one_ledger_for_all_machines() -> None:
    """On a cluster a client trains on another machine each time, whose folder of ledgers knows nothing of the others."""
    here = settings_from_overrides(["task=heart", "privacy=record"])
    cluster = here.model_copy(update={"engine": Ray(address="ray://head:10001")})

    def looked_at(settings: Any, simulated: bool) -> Any:
        mode = SimpleNamespace(client_budget=settings.privacy)
        return SimpleNamespace(settings=settings, mode=mode, simulated=simulated)

    require_one_machine(looked_at(here, simulated=False))
    require_one_machine(looked_at(cluster, simulated=True))
    with pytest.raises(Refusal, match=r"engine\.address='ray://head:10001': .*ledgers of its own"):
        require_one_machine(looked_at(cluster, simulated=False))


def test_second_run_on_records_plans_from_the_rest_of_the_first(tmp_path: Path, commands: Any) -> None:
    write_task(tmp_path)
    noise: list[float] = []
    for name, target, rounds in (("first", 1.0, 3), ("second", 1.2, 3)):
        given = (f"privacy.target_epsilon={target}", f"num_rounds={rounds}")
        code, command, folder = record_run(commands, tmp_path, name, *given)
        assert code == 0, command.err
        lines = rounds_of(folder)
        assert [line["replies"] for line in lines] == [3] * rounds
        assert 0.99 * target < lines[-1]["epsilon_record"] <= target
        entries = read_entries(next((tmp_path / "ledgers").glob("*.ledger")))
        noise.append(json.loads([e for e in entries if e.kind == "reserve"][-1].payload)["events"]["model"]["event"]
                     ["event"]["noise_multiplier"])  # fmt: skip
    assert noise[1] > noise[0]  # less is left, for as many rounds
    lock = Lock(tmp_path / "ledgers" / data_sets.population_ledger("wards")[:32], wait=0)
    code, command, folder = record_run(commands, tmp_path, "beside", "privacy.target_epsilon=2")
    lock.release()
    assert code == 2 and "in use by process" in command.err  # of two at once neither would carry over all
    assert not list(folder.glob("*"))
    code, command, folder = record_run(commands, tmp_path, "third", "privacy.target_epsilon=1.2")
    assert code == 2 and "already spent" in command.err and "Traceback" not in command.err
    assert not list(folder.glob("*"))
    code, command, folder = record_run(
        commands, tmp_path, "fourth", "privacy.target_epsilon=1.2", "privacy.noise_multiplier=2"
    )
    assert code == 2 and "not even one round fits the rest" in command.err
    other = ("privacy.target_epsilon=9", "privacy.adjacency=replace-one")
    code, command, folder = record_run(commands, tmp_path, "fifth", *other)
    assert code == 2 and "are kept for zero-out" in command.err
    assert not list(folder.glob("*"))


def test_a_run_ends_with_the_round_in_which_every_client_refuses(tmp_path: Path, commands: Any) -> None:
    write_task(tmp_path)
    given = ("privacy.noise_multiplier=2", "privacy.target_epsilon=3", "num_rounds=40")
    code, command, folder = record_run(commands, tmp_path, "run", *given)
    assert code == 3, command.err
    lines = rounds_of(folder)
    assert len(lines) < 40 and [line["replies"] for line in lines[-2:]] == [3, 0]
    assert "no invited client's ledger affords another round" in command.out


# --- people, not bytes ----------------------------------------------------------------------------------------------


def ledgers_of(folder: Path) -> dict[str, float]:
    found = sorted((folder / "ledgers").glob("*.ledger"))
    return {path.stem: verify(path).epsilon or 0.0 for path in found}


@pytest.mark.parametrize(
    "change",
    [
        ("return Examples(inputs,", "inputs = inputs.flip(0); return Examples(inputs,"),
        *(
            pytest.param(change, marks=pytest.mark.campaign)
            for change in (
                ("return self._examples(client, 60)", "return self._examples((client + 1) % 3, 60)"),
                ("return self._examples(client, 60)", "return self._examples(client, 60 if client else 0)"),
                ("num_clients = 3", "num_clients = 5"),
                ("inputs = torch.randn", "inputs = 2 * torch.randn"),
            )
        ),
    ],
    ids=["order", "split", "an empty client", "number", "preprocessing"],
)
def test_same_people_have_one_budget_under_any_bytes(
    change: tuple[str, str], tmp_path: Path, commands: Any
) -> None:
    write_task(tmp_path)
    source = (tmp_path / "hospitals.py").read_text()
    assert record_run(commands, tmp_path, "first", "privacy.target_epsilon=1")[0] == 0
    before = ledgers_of(tmp_path)
    assert len(before) == 3 and all(0.99 < spent <= 1 for spent in before.values())
    (tmp_path / "hospitals.py").write_text(source.replace(*change))
    code, command, _ = record_run(commands, tmp_path, "second", "privacy.target_epsilon=1")
    assert code == 2 and "already spent" in command.err
    code, command, folder = record_run(commands, tmp_path, "third", "privacy.target_epsilon=1.3")
    assert code == 0 and "are not those of the last run" in command.err, command.err
    empty = "else 0" in change[1]
    assert [line["replies"] for line in rounds_of(folder)] == [5 if "= 5" in change[1] else 3 - empty] * 3
    after = ledgers_of(tmp_path)
    assert before.keys() <= after.keys()
    assert all(1.28 < spent <= 1.3 for spent in sorted(after.values())[empty:])


def test_client_is_charged_the_others_loss_after_a_data_change(tmp_path: Path, commands: Any) -> None:
    prints, budget = ["a", "b"], Budget(Unit.RECORD, 100.0, 1e-5)
    events = [GaussianDpEvent(5.0), GaussianDpEvent(7.0)]
    data_sets.settle(tmp_path, "clinics", data_sets.pending_for_clients(tmp_path, "clinics", prints), budget)
    names = data_sets.client_ledgers("clinics", prints)
    for name, event, times in zip(names, events, (3, 2), strict=True):
        charge(tmp_path / f"{name[:32]}.ledger", name, event, times, budget)
    charge(tmp_path / f"{OLD}.ledger", "bytes", GaussianDpEvent(9.0), 1, budget)
    code, command = commands.run("budget", "adopt", OLD, "clinics", f"--ledger-dir={tmp_path}")
    assert code == 0 and "clinics: the next run is charged the entries" in command.out, command.err
    assert commands.run("budget", "adopt", "none", "clinics", f"--ledger-dir={tmp_path}")[0] == 2
    for _ in range(2):  # a second time nothing is owed
        owed = data_sets.pending_for_clients(tmp_path, "clinics", ["c", "a", "b"])
        data_sets.settle(tmp_path, "clinics", owed, budget)
    whole = [GaussianDpEvent(5.0)] * 3 + [GaussianDpEvent(7.0)] * 2 + [GaussianDpEvent(9.0)]
    expected = epsilon(whole, 1e-5)
    for name in data_sets.client_ledgers("clinics", ["c", "a", "b"]):
        found = verify(tmp_path / f"{name[:32]}.ledger", 1e-5)
        assert found.epsilon == pytest.approx(expected, rel=1e-3)
    assert data_sets.read_data_sets(tmp_path)["clinics"].adopted == ()
    assert "clinics, client 2" in commands.run("budget", "show", f"--ledger-dir={tmp_path}")[1].out


OLD = "0123456789abcdef" * 2


def charge(path: Path, owner: str, event: Any, times: int, budget: Budget) -> None:
    with Ledger.open(path, budget, owner=owner, simulated=False) as ledger:
        for number in range(1, times + 1):
            events = dict.fromkeys((Adversary.SERVER, Adversary.CLIENTS, Adversary.MODEL), event)
            ledger.reserve_new(Release(Unit.RECORD, "run", number, "dp_sgd", events, "system"))


def test_failing_task_in_an_encrypted_sum_is_anonymous(tmp_path: Path, commands: Any) -> None:
    """Epsilon hides what each client holds: whether a client answers may not hang on that."""
    source = CROWD.replace("CLIENTS", "12").replace(
        "return Examples(torch.zeros(5, 100)", "return Examples(torch.eye(5, 100) * (client == 3)"
    )
    failing = "def loss(self, outputs, targets):\n        assert float(outputs.abs().max()) < 1e-3\n"
    source = source.replace("def loss(self, outputs, targets):\n", failing).replace(
        "nn.init.zeros_(layer.weight)", "layer.weight.data.zero_()[:, 2] = 1"
    )
    (tmp_path / "crowd.py").write_text(source.replace("torch.ones", "torch.zeros"))
    given = ("task=custom", "task.target=crowd:Crowd", "allow_modules=[crowd]", "audit=off", "cohort=all")
    hidden = ("privacy=client_distributed", "privacy.allow_large_delta=true", "num_rounds=1")
    code, command = commands.run("simulate", *given, *hidden, f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 0, command.err
    assert [line["replies"] for line in rounds_of(tmp_path / "run")] == [
        12
    ] and "12/12 clients" in command.out
    assert "a zero update" in (tmp_path / "run" / "clients.log").read_text()
