"""Arguments of one's own task: one spelling on the command line, in Python, in files and on the device."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fedveil as fv
from fedveil.__main__ import run
from fedveil.configs.strict import read_group
from fedveil.deployment.device.client_bundle import TaskChoice
from fedveil.tasks import DEALT, load_task

pytestmark = pytest.mark.usefixtures("fast_runs")

MODULE = '''\
"""A task with arguments."""

from pathlib import Path

import torch
from torch import nn


class Wards:
    simulated = True

    def __init__(self, folder, hidden=4, sizes=(20, 30), shift=None, wide=False):
        self.words = Path(folder, "words.txt").read_text().split()
        self.hidden, self.sizes, self.shift, self.wide = hidden, list(sizes), shift, wide
        self.num_clients = len(self.sizes)

    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 2))

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return {"hidden": float(self.hidden), "accuracy": (outputs.argmax(1) == targets).float().mean().item()}

    def client_data(self, client):
        inputs = torch.randn(self.sizes[client], 3, generator=torch.Generator().manual_seed(client))
        return inputs, (inputs.sum(1) > 0).long()

    def held_out(self):
        return self.client_data(0)


class Named(Wards):
    name = "wards of the north"


class Open(Wards):
    def __init__(self, num_clients, folder=".", **rest):
        super().__init__(folder)
        self.rest, self.num_clients = rest, num_clients
        self.sizes = [20] * num_clients
'''
ASKED = ("task=custom", "task.target=wards:Wards", "allow_modules=[wards]", "privacy=none", "cohort=all")
RUN = ("num_rounds=1", "hydra.run.dir=run")


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "wards.py").write_text(MODULE)
    (tmp_path / "words.txt").write_text("one two")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield
    sys.path[:] = before
    sys.modules.pop("wards", None)


def result(folder: str = "run") -> dict[str, Any]:
    return json.loads(Path(folder, "result.json").read_text())


def test_the_command_line_gives_a_task_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("task.args.folder=.", "task.args.hidden=6", "task.args.sizes=[8,9,10]", "task.args.shift=null")
    assert run(["simulate", *ASKED, *given, *RUN]) == 0
    found = result()
    assert found["task"] == "Wards"
    assert found["target"] == "wards:Wards"
    assert found["args"] == {"folder": ".", "hidden": 6, "sizes": [8, 9, 10], "shift": None}
    assert found["metrics"]["hidden"] == 6
    assert found["population"] == 3
    assert "Wards (simulation): 3 clients" in capsys.readouterr().out
    assert run(["simulate", "resume=run"]) == 0
    model: Any = fv.load("run", allow_modules=["wards"]).model
    assert model[0].out_features == 6


def test_a_sweep_goes_over_arguments() -> None:
    swept = ["task.args.folder=.", "task.args.hidden=2,3", "num_rounds=1", "hydra.sweep.dir=sweep"]
    assert run(["simulate", "-m", *ASKED, *swept]) == 0
    assert [result(f"sweep/{n}")["metrics"]["hidden"] for n in (0, 1)] == [2, 3]


def test_python_spells_them_the_same() -> None:
    sys.path.append(".")
    found = fv.simulate(
        "wards:Named",
        args={"folder": Path(), "sizes": (8, 9), "shift": None, "wide": True},
        allow_modules=["wards"],
        privacy="none",
        num_rounds=1,
        quiet=True,
    )
    assert found.result["task"] == "wards of the north"
    assert found.result["args"] == {"folder": ".", "sizes": [8, 9], "shift": None, "wide": True}
    with pytest.raises(fv.Refusal, match="the task is an object already"):
        fv.simulate(__import__("wards").Wards("."), args={"hidden": 2}, privacy="none", quiet=True)


def test_a_file_of_ones_own_holds_target_and_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own/task").mkdir(parents=True)
    Path("own/task/hosp.yaml").write_text("target: wards:Wards\nargs:\n  folder: .\n  hidden: 5\n")
    asked = ["--config-dir", "own", "task=hosp", "allow_modules=[wards]", "privacy=none", "cohort=all"]
    assert run(["simulate", *asked, *RUN]) == 0
    assert (result()["task"], result()["metrics"]["hidden"]) == ("hosp", 5)
    assert run(["simulate", *asked, "task.args.hidden=7", "num_rounds=1", "hydra.run.dir=other"]) == 0
    assert result("other")["metrics"]["hidden"] == 7
    capsys.readouterr()
    planned = ["cohort=poisson", "privacy=client_central", "privacy.target_delta=0.1"]
    assert run(["plan", *asked[:4], *planned, "num_rounds=2"]) == 0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            ["task.args.folder=.", "task.args.hiden=3"],
            "task.args.hiden=3: wards:Wards takes no such argument; did you mean 'hidden'?",
        ),
        (["task.args.hidden=3"], "task.args.folder=None: wards:Wards needs it"),
        (
            ["task.args.folder=.", "task.num_clients=100"],
            "task.num_clients=100: wards:Wards does not accept it",
        ),
        (["task.args.folder=nowhere"], "it cannot be made: FileNotFoundError"),
        (["task.args.folder=.", "task.args.hidden={a: 1}"], "task.args.hidden"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", *ASKED, *given, *RUN]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not list(Path().glob("run/*"))


def test_a_task_that_takes_its_number_of_clients_has_it() -> None:
    given = ["task.target=wards:Open", "task.num_clients=5", "task.args.planted=1"]
    assert run(["simulate", *[each for each in ASKED if "target" not in each], *given, *RUN]) == 0
    assert result()["population"] == 5


def test_the_device_reads_them_and_refuses_them_without_a_target() -> None:
    own = {"target": "wards:Wards", "allow_modules": ["wards"], "args": {"folder": "/data", "sizes": [1, 2]}}
    assert read_group(TaskChoice, {"client": 0, **own}, "task").args == own["args"]
    with pytest.raises(fv.Refusal, match="belong to a target"):
        read_group(TaskChoice, {"client": 0, "name": "heart", "args": {"a": 1}}, "task")
    with pytest.raises(fv.Refusal, match=r"task\.args\.a=\[\[\]\]"):
        read_group(TaskChoice, {"client": 0, **own, "args": {"a": [[]]}}, "task")


POOL = """


class Pooled:
    simulated = True

    def model(self):
        net = nn.Linear(3, 4)
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
        return net

    loss, metrics = Wards.loss, Wards.metrics
    hidden = 0

    def pool(self):
        inputs = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
        return inputs, torch.arange(200) % 4

    def labels(self):
        return self.pool()[1]

    def held_out(self):
        return self.pool()


class Grouped(Pooled):
    def groups(self):
        return ["north", "south", "west", "west"] * 50


class Ragged(Grouped):
    def groups(self):
        return ["north"]


class Read(Pooled):
    def pool(self):
        return torch.utils.data.TensorDataset(*super().pool())

    def labels(self):
        return torch.arange(200) % 4
"""


@pytest.mark.parametrize("name", ["Pooled", "Read"])
def test_a_partition_deals_the_pool_of_ones_own_task(name: str) -> None:
    Path("wards.py").write_text(MODULE + POOL)
    asked = [
        "task=custom",
        f"task.target=wards:{name}",
        "allow_modules=[wards]",
        "privacy=none",
        "cohort=all",
    ]
    more = ["partition=shards", "task.num_clients=20"]
    assert run(["simulate", *asked, *more, *RUN]) == 0
    assert (result()["population"], result()["partition"]) == (20, "shards")
    model: Any = fv.load("run", allow_modules=["wards"]).model
    assert model.in_features == 3
    module: Any = sys.modules["wards"]
    task: Any = getattr(module, name)()
    task.num_clients = 5
    found = fv.simulate(task, partition="dirichlet", privacy="none", num_rounds=1, quiet=True)
    assert found.result["population"] == 5


def test_the_natural_partition_deals_a_pool_by_its_groups(capsys: pytest.CaptureFixture[str]) -> None:
    Path("wards.py").write_text(MODULE + POOL)
    asked = ["task=custom", "allow_modules=[wards]", "privacy=none", "cohort=all", "partition=natural"]
    assert run(["simulate", *asked, "task.target=wards:Grouped", *RUN]) == 0, capsys.readouterr().err
    assert (result()["population"], result()["partition"]) == (3, "natural")
    module: Any = sys.modules["wards"]
    found = load_task(
        "wards:Grouped",
        {DEALT: {"name": "natural", "num_clients": None, "alpha": 1.0, "seed": 0}},
        ("wards",),
    )
    assert [len(found.client_data(client)) for client in range(3)] == [50, 50, 100]
    assert torch.equal(found.client_data(0).inputs, module.Pooled().pool()[0][::4])
    capsys.readouterr()
    other = ["num_rounds=1", "hydra.run.dir=other"]
    assert run(["simulate", *asked, "task.target=wards:Grouped", "task.num_clients=5", *other]) == 2
    assert "the natural partition has 3 clients" in capsys.readouterr().err
    assert run(["simulate", *asked, "task.target=wards:Ragged", *other]) == 2
    assert "groups=(1,): must have one for each of the pool's 200 examples" in capsys.readouterr().err


def test_a_partition_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("wards.py").write_text(MODULE + POOL)
    assert run(["simulate", *ASKED, "task.args.folder=.", "partition=dirichlet", *RUN]) == 2
    assert "partition='dirichlet': this task gives each client its own data" in capsys.readouterr().err
    asked = ["task=custom", "task.target=wards:Pooled", "allow_modules=[wards]", "privacy=none"]
    assert run(["simulate", *asked, "partition=iid", *RUN]) == 2
    assert "task.num_clients=None: give the number of clients to deal the pool to" in capsys.readouterr().err
    assert run(["simulate", *asked, "task.num_clients=5", *RUN]) == 2
    assert "choose iid, dirichlet or shards" in capsys.readouterr().err


FLWR = "partition=flwr partition.target=flwr_datasets.partitioner."
DEALS = [
    ("DirichletPartitioner partition.args.alpha=0.5 task.num_clients=5", 5),
    ("IidPartitioner task.num_clients=7", 7),
    ("LinearPartitioner task.num_clients=4", 4),
    ("PathologicalPartitioner partition.args.num_classes_per_partition=2 task.num_clients=4", 4),
    ("ShardPartitioner partition.args.num_shards_per_partition=2 task.num_clients=4", 4),
    ("SizePartitioner partition.args.partition_sizes=[50,100,50]", 3),
    ("NaturalIdPartitioner", 3),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("how", "clients"), DEALS)
def test_a_partitioner_of_flwr_datasets_deals_a_pool(how: str, clients: int) -> None:
    pytest.importorskip("flwr_datasets")
    Path("wards.py").write_text(MODULE + POOL)
    task = "task=custom task.target=wards:Grouped allow_modules=[wards] privacy=none cohort=all"
    assert run(["simulate", *task.split(), *f"{FLWR}{how}".split(), *RUN]) == 0
    assert (result()["population"], result()["partition"]) == (clients, "flwr")
    assert fv.load("run", allow_modules=["wards"]).model is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (
            "DirichletPartitioner partition.args.alpha=0.5",
            "task.num_clients=None: give the number of clients",
        ),
        (
            "DirichletPartitioner task.num_clients=5",
            "partition.args.alpha=None: DirichletPartitioner needs it",
        ),
        ("DirichletPartitioner partition.args.alhpa=1 task.num_clients=5", "did you mean 'alpha'?"),
        (
            "DirichletPartitioner partition.args.alpha=-1 task.num_clients=5",
            "refuses these arguments or data",
        ),
        ("IidPartitioner task.num_clients=500", "refuses these arguments or data"),
        ("NaturalIdPartitioner task.num_clients=5", "deals to 3 clients"),
        ("IidPartitioner task.target=wards:Wards task.args.folder=.", "this task gives each client its own"),
    ],
)
def test_data_beyond_a_partitioner_are_refused(
    capsys: pytest.CaptureFixture[str], how: str, reason: str
) -> None:
    pytest.importorskip("flwr_datasets")
    Path("wards.py").write_text(MODULE + POOL)
    task = "task=custom task.target=wards:Grouped allow_modules=[wards] privacy=none cohort=all"
    assert run(["simulate", *task.split(), *f"{FLWR}{how}".split(), *RUN]) == 2
    assert reason in capsys.readouterr().err
    assert not Path("run").exists()


def test_only_partitioners_are_named_where_examples_are_dealt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("wards.py").write_text(MODULE + POOL)
    task = ["task=custom", "task.target=wards:Grouped", "allow_modules=[wards]", "privacy=none", *RUN]
    assert run(["simulate", *task, "partition=flwr", "partition.target=os.system"]) == 2
    assert "partition.target='os.system': must be one of flwr_datasets" in capsys.readouterr().err
    assert run(["simulate", "task=digits", *f"{FLWR}IidPartitioner".split(), *RUN]) == 2
    assert "partitions your own task's pool or simulated tables" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    assert run(["simulate", *task, *f"{FLWR}IidPartitioner".split()]) == 2
    assert "is not installed; pip install flwr-datasets" in capsys.readouterr().err
