"""Clients' own ledgers of a large population: what a run looks at of clients that take no part in it."""

import json
import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from shared.runs import json_lines
from shared.tasks import Classes
from torch import Tensor, nn

import fedveil as fv
from fedveil.populations import machine
from fedveil.privacy.accounting.epsilon import epsilon
from fedveil.privacy.budget import Adversary
from fedveil.privacy.ledger.ledger_state import read_events
from fedveil.privacy.ledger.store import ledger_exists, ledgers_in
from fedveil.run import record_ledgers
from fedveil.tasks.classification import softmax_regression
from fedveil.tasks.data import MOST_LOOKED_AT
from fedveil.tasks.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("fast_runs")

MANY = 20_000


class Crowd(Classes):
    """Clients whose data differ, with five to eight records each; counts how often each client's are made."""

    def __init__(self, num_clients: int = MANY) -> None:
        self.num_clients, self.made = num_clients, Counter[int]()

    def model(self) -> nn.Module:
        return softmax_regression(4, 2)

    def held_out(self) -> fv.Examples:
        return fv.Examples(torch.zeros(2, 4), torch.arange(2))

    def client_data(self, client: int) -> fv.Examples:
        self.made[client] += 1
        inputs = torch.full((5 + client % 4, 4), client / MANY)
        return fv.Examples(inputs, torch.arange(len(inputs)) % 2)


class SizedCrowd(Crowd):
    def client_size(self, client: int) -> int:
        return 5 + client % 4


def ran(task: Crowd, folder: Path, status: str = "completed", **more: Any) -> dict[str, Any]:
    level = fv.Record(noise_multiplier=1.0, target_epsilon=None, target_delta=1e-3)
    keys: dict[str, Any] = {"cohort": fv.Poisson(10 / task.num_clients), "num_rounds": 2}
    keys |= more if "privacy" in more else {"privacy": level, "batch_size": 4} | more
    seed = 3 if task.simulated else None
    run = fv.simulate(task, seed=seed, folder=folder, quiet=True, **keys)
    assert run.status == status
    return json.loads((folder / "result.json").read_text())


def lost_by(task: Crowd, folder: Path, number: int) -> float:
    path = folder / "client_ledgers" / f"{fingerprint(task.client_data(number))[:32]}.ledger"
    return epsilon(read_events(path, Adversary.MODEL), 1e-3) if ledger_exists(path) else 0.0


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the data sets whose fingerprints the server takes."""
    found: list[int] = []

    def noted(data: fv.Examples) -> str:
        found.append(len(data))
        return fingerprint(data)

    monkeypatch.setattr(machine, "fingerprint", noted)
    return found


def test_run_makes_and_names_the_data_of_participants(tmp_path: Path, named: list[int]) -> None:
    task = SizedCrowd()
    result = ran(task, tmp_path / "run")
    ledgers = ledgers_in(tmp_path / "run" / "client_ledgers")
    assert 10 < len(ledgers) < 40
    assert len(named) == len(ledgers)
    assert len(task.made) < MOST_LOOKED_AT + 50
    lost = result["records"]["epsilon"]
    drawn = [number for number, each in enumerate(lost) if each]
    assert len(lost) == MANY and len(drawn) == len(ledgers)
    assert [lost[each] for each in drawn] == [lost_by(task, tmp_path / "run", each) for each in drawn]


def test_secret_cohorts_are_stated_by_the_costliest_kind_of_client(tmp_path: Path) -> None:
    """One record more than a batch is a step more, so that clients with the fewest records lose less than others."""
    record = fv.Record(noise_multiplier=1.0, target_epsilon=None, target_delta=1e-3)
    both = fv.RecordAndClient(record=record, client=fv.ClientCentral(target_epsilon=40.0))
    keys: dict[str, Any] = {"privacy": both, "batch_size": 5, "cohort": fv.All(), "accept_vacuous": True}
    task = SizedCrowd(12)
    result = ran(task, tmp_path / "run", **keys)
    lost = [lost_by(task, tmp_path / "run", client) for client in range(4)]
    assert lost[0] < lost[1] and lost[1] == max(lost)
    (stated,) = {row["epsilon"] for row in result["privacy"] if row["unit"] == "record"}
    assert stated == pytest.approx(max(lost), rel=1e-3)
    (planned,) = (each for each in fv.plan(task, num_rounds=2, **keys) if each.unit == "record")
    assert planned.epsilon[-1][1] == pytest.approx(max(lost), rel=1e-3)


def test_unknown_numbers_of_records_are_counted_once(
    tmp_path: Path,
) -> None:
    task = Crowd()
    ran(task, tmp_path / "run")
    assert task.made.total() < MANY + 2 * MOST_LOOKED_AT


def test_unlisted_client_ledgers_are_recognised_by_their_data(
    tmp_path: Path, named: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, add = SizedCrowd(1200), record_ledgers.RecordMeter.add

    def forget_one(meter: record_ledgers.RecordMeter, clients: Sequence[int]) -> None:
        add(meter, clients[1:])

    monkeypatch.setattr(record_ledgers.RecordMeter, "add", forget_one)
    lost = ran(task, tmp_path / "run")["records"]["epsilon"]
    assert lost == [lost_by(task, tmp_path / "run", each) for each in range(1200)]
    assert len(named) >= 1200


def test_client_with_shared_data_stands_with_their_loss(tmp_path: Path) -> None:
    class Twins(Crowd):
        def client_data(self, client: int) -> fv.Examples:
            return super().client_data(client // 2 * 2)

    lost = ran(Twins(MOST_LOOKED_AT), tmp_path / "run")["records"]["epsilon"]
    assert any(lost) and lost[::2] == lost[1::2]


class Interrupted(FedAvg):
    """Ctrl-C once the clients of round 2 have trained."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        if server_round == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().aggregate_train(server_round, replies)


def test_resumed_run_remembers_its_participants(tmp_path: Path, named: list[int]) -> None:
    whole = ran(SizedCrowd(1200), tmp_path / "whole", strategy=FedAvg(), num_rounds=3)["records"]
    task, half = SizedCrowd(1200), tmp_path / "half"
    stopped = ran(task, half, "interrupted", strategy=Interrupted(), num_rounds=3)["records"]
    assert 0 < sum(map(bool, stopped["epsilon"])) < sum(map(bool, whole["epsilon"]))
    assert fv.simulate(task, strategy=FedAvg(), resume=half, quiet=True).status == "completed"
    assert json.loads((half / "result.json").read_text())["records"] == whole
    assert len(named) < 200


class Flawed(SizedCrowd):
    """The same clients; of every second one something does not hold."""

    held_out_public, data_id = True, "crowd"

    def __init__(self, flaw: str, real: bool = False, hidden: int = 10) -> None:
        super().__init__(MOST_LOOKED_AT + 200)
        self.flaw, self.simulated, self.hidden = flaw, not real, hidden

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 2))

    def client_size(self, client: int) -> int:
        return super().client_size(client) + (self.flaw == "size" and client % 2)

    def client_data(self, client: int) -> fv.Examples:
        made = super().client_data(client)
        if client % 2 and self.flaw == "value":
            made.inputs[0, 0] = torch.nan
        if client % 2 and self.flaw == "unreadable":
            raise OSError("unreadable")
        if client % 2 and self.flaw == "inputs":
            return fv.Examples(made.inputs[[0, *range(len(made))]], made.targets)
        return made


@pytest.mark.parametrize("flaw", ["size", "value", "inputs"])
@pytest.mark.parametrize("real", [True, False], ids=["real", "in one step"])
def test_each_client_of_real_or_complete_cohorts_is_looked_at(real: bool, flaw: str, tmp_path: Path) -> None:
    task, keys = Flawed(flaw, real), {"ledger": {"dir": str(tmp_path / "ledgers")}}
    if not real:
        step = fv.RecordDistributed(target_epsilon=4.0, target_delta=1e-6)
        keys = {"privacy": step, "cohort": "all"}
    with pytest.raises(fv.Refusal, match="client 1"):
        ran(task, tmp_path / "run", **keys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flaw", ["size", "value", "inputs", "unreadable"])
def test_drawn_client_with_flawed_data_drops_out_uncharged(flaw: str, tmp_path: Path) -> None:
    lost = ran(Flawed(flaw), tmp_path / "run")["records"]["epsilon"]
    assert any(lost[::2]) and not any(lost[1::2])
    lines = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert any(line["dropped"].get("failed") for line in lines)
    ledgers = ledgers_in(tmp_path / "run" / "client_ledgers")
    assert len(ledgers) == sum(map(bool, lost))


@pytest.mark.parametrize("hidden", [10, 10_000], ids=["stacked", "in place"])
def test_client_with_flawed_data_moves_no_other(hidden: int, tmp_path: Path) -> None:
    """Examples of a stack lie one behind the other: one too many would give each client one of the client before."""
    models: list[dict[str, Tensor]] = []
    for flaw in ("unreadable", "inputs"):
        keys: dict[str, Any] = {"privacy": "none", "cohort": fv.Poisson(0.05), "num_rounds": 1, "seed": 3}
        run = fv.simulate(Flawed(flaw, hidden=hidden), folder=tmp_path / flaw, quiet=True, **keys)
        models.append(run.model.state_dict())
    one, other = models
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("fault", "charged"), [("dropout", False), ("failure", True)])
def test_round_that_nobody_answered_costs_its_ledger_entries(
    tmp_path: Path, fault: str, charged: bool
) -> None:
    """Who drops out has reserved nothing; who fails after its training has."""
    ran(Crowd(10), tmp_path, "failed", cohort="all", faults={fault: 1.0})
    rows = json_lines(tmp_path / "metrics.jsonl")
    assert [(row["replies"], row["epsilon_record"] > 0) for row in rows] == [(0, charged)] * 2
