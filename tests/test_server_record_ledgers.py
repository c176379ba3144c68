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
from torch import Tensor, nn

import fedveil as fv
from fedveil.privacy.accounting.epsilon import epsilon
from fedveil.privacy.accounting.events import gaussian_scale
from fedveil.privacy.budget import Adversary
from fedveil.privacy.ledger.book import read_events
from fedveil.server.run import federation, record_ledgers
from fedveil.server.run.federation import MOST_LOOKED_AT
from fedveil.tasks.classification import softmax_regression
from fedveil.tasks.data import fingerprint

MANY = 20_000


class Crowd:
    """Clients whose data differ, with five to eight records each; counts how often each client's are made."""

    simulated = True

    def __init__(self, num_clients: int = MANY) -> None:
        self.num_clients, self.made = num_clients, Counter[int]()

    def model(self) -> nn.Module:
        return softmax_regression(4, 2)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}

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
    keys: dict[str, Any] = {
        "privacy": level,
        "cohort": fv.Poisson(10 / task.num_clients),
        "num_rounds": 2,
    } | more
    seed = 3 if task.simulated else None
    run = fv.simulate(task, seed=seed, folder=folder, quiet=True, batch_size=4, **keys)
    assert run.status == status
    return json.loads((folder / "result.json").read_text())


def lost_by(task: Crowd, folder: Path, number: int) -> float:
    path = folder / "client_ledgers" / f"{fingerprint(task.client_data(number))[:32]}.ledger"
    return epsilon(read_events(path, Adversary.MODEL), 1e-3) if path.exists() else 0.0


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the data sets whose fingerprints the server takes."""
    found: list[int] = []

    def noted(data: fv.Examples) -> str:
        found.append(len(data))
        return fingerprint(data)

    monkeypatch.setattr(federation, "fingerprint", noted)
    return found


def test_a_run_makes_and_names_the_data_of_who_takes_part(tmp_path: Path, named: list[int]) -> None:
    task = SizedCrowd()
    result = ran(task, tmp_path / "run")
    ledgers = list((tmp_path / "run" / "client_ledgers").glob("*.ledger"))
    assert 10 < len(ledgers) < 40
    assert len(named) == len(ledgers)
    assert len(task.made) < MOST_LOOKED_AT + 50
    lost = result["records"]["epsilon"]
    drawn = [number for number, each in enumerate(lost) if each]
    assert len(lost) == MANY and len(drawn) == len(ledgers)
    assert [lost[each] for each in drawn] == [lost_by(task, tmp_path / "run", each) for each in drawn]


def test_where_nobody_tells_how_many_records_there_are_they_are_made_once_to_be_counted(
    tmp_path: Path,
) -> None:
    task = Crowd()
    ran(task, tmp_path / "run")
    assert task.made.total() < MANY + 2 * MOST_LOOKED_AT


def test_ledgers_of_clients_that_the_run_did_not_note_are_found_by_their_data(
    tmp_path: Path, named: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, add = SizedCrowd(1200), record_ledgers.RecordMeter.add

    def forget_one(meter: record_ledgers.RecordMeter, clients: Sequence[int]) -> None:
        add(meter, clients[1:])

    monkeypatch.setattr(record_ledgers.RecordMeter, "add", forget_one)
    lost = ran(task, tmp_path / "run")["records"]["epsilon"]
    assert lost == [lost_by(task, tmp_path / "run", each) for each in range(1200)]
    assert len(named) >= 1200


def test_a_client_that_shares_its_data_stands_with_what_they_have_lost(tmp_path: Path) -> None:
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


def test_a_run_that_goes_on_knows_who_took_part_before(tmp_path: Path, named: list[int]) -> None:
    whole = ran(SizedCrowd(1200), tmp_path / "whole", strategy=FedAvg(), num_rounds=3)["records"]
    task, half = SizedCrowd(1200), tmp_path / "half"
    stopped = ran(task, half, "interrupted", strategy=Interrupted(), num_rounds=3)["records"]
    assert 0 < sum(map(bool, stopped["epsilon"])) < sum(map(bool, whole["epsilon"]))
    assert fv.simulate(task, strategy=FedAvg(), resume=half, quiet=True).status == "completed"
    assert json.loads((half / "result.json").read_text())["records"] == whole
    assert len(named) < 200


def test_a_task_that_tells_another_size_than_it_makes_is_refused(tmp_path: Path) -> None:
    class Wrong(SizedCrowd):
        def client_size(self, client: int) -> int:
            return super().client_size(client) + (client == 0)

    with pytest.raises(fv.Refusal, match=r"client_size=6: client_data makes 5 examples for client 0"):
        ran(Wrong(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Real(SizedCrowd):
    """The same clients, whose data are real."""

    simulated, held_out_public, data_id = False, True, "crowd"


def longer_by_one(task: SizedCrowd, client: int) -> int:
    return SizedCrowd.client_size(task, client) + (client == 7)


def wider_by_one(task: SizedCrowd, client: int) -> fv.Examples:
    made = SizedCrowd.client_data(task, client)
    return fv.Examples(torch.zeros(len(made), 5), made.targets) if client == 7 else made


@pytest.mark.parametrize(
    ("member", "fault"),
    [("client_size", longer_by_one), ("client_data", wider_by_one)],
    ids=["size", "shape"],
)
def test_of_a_large_real_population_every_client_is_looked_at(
    member: str, fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Real, member, fault)
    task = Real(MOST_LOOKED_AT + 200)
    with pytest.raises(fv.Refusal, match="client 7"):
        ran(task, tmp_path / "run", ledger={"dir": str(tmp_path / "ledgers")})
    assert not list(tmp_path.iterdir())


def test_a_drawn_client_is_charged_for_the_records_that_it_has(tmp_path: Path) -> None:
    class Fewer(SizedCrowd):
        def client_data(self, client: int) -> fv.Examples:
            made = super().client_data(client)
            few = len(made) if client % 2 == 0 else 4
            return fv.Examples(made.inputs[:few], made.targets[:few])

    task = Fewer()
    lost = ran(task, tmp_path / "run")["records"]["epsilon"]
    drawn = [number for number, each in enumerate(lost) if each and number % 2]
    assert drawn
    for number in drawn:
        path = tmp_path / "run" / "client_ledgers" / f"{fingerprint(task.client_data(number))[:32]}.ledger"
        assert set(map(gaussian_scale, read_events(path, Adversary.MODEL))) == {(1.0, 1.0)}
