"""Before a budget is spent: what cannot be of use is refused on real data, and a run is planned as one of several."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from flwr.serverapp.strategy import FedAvg
from shared.tasks import RealPoints
from torch import nn

import fedveil as fv
from fedveil.configs.settings import settings_from_overrides
from fedveil.messages.training_order import RecordTerms
from fedveil.privacy.accounting.epsilon import epsilon
from fedveil.privacy.budget import Adversary, Release
from fedveil.run.record_ledgers import read_events
from fedveil.server.accounts import Protected
from fedveil.tasks.classification import softmax_regression

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")

CLINICS = """
from tests_clinics import Clinics

class Few(Clinics):
    simulated, num_clients = False, 3
"""


class Clinics(RealPoints):
    """Clinics with 40 patients each."""

    data_id, rows, held_out_client = "clinics", 40, 10_000

    def __init__(self, num_clients: int = 3, simulated: bool = False) -> None:
        self.num_clients, self.simulated = num_clients, simulated

    def model(self) -> nn.Module:
        return softmax_regression(4, 2)


def of_real_data(folder: Path, clients: int = 3, **keys: Any) -> fv.FinishedRun:
    asked = {"num_rounds": 3, "ledger": {"dir": str(folder / "ledgers")}, "quiet": True, **keys}
    return fv.simulate(Clinics(clients), folder=folder / "run", **asked)


@pytest.mark.parametrize(
    ("clients", "keys", "sentence"),
    [
        (
            3,
            {"privacy": fv.ClientCentral(target_delta=1e-3)},
            r"privacy='client_central': is vacuous with 3 clients",
        ),
        (
            40,
            {"privacy": fv.ClientCentral(target_epsilon=0.1), "cohort": fv.Poisson(0.1)},
            "is vacuous with 40 clients: the noise on the mean",
        ),
        (3, {"privacy": "record", "cohort": fv.Poisson(0.1)}, r"cohort.rate=0.1: leaves 73% of the rounds"),
    ],
    ids=["few clients", "much noise", "empty cohorts"],
)
def test_useless_run_on_real_data_is_refused_until_accepted(
    clients: int, keys: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(fv.Refusal, match=sentence) as refused:
        of_real_data(tmp_path, clients, **keys)
    assert "accept it with --accept-vacuous" in str(refused.value)
    assert str(refused.value).count("use ") == 1 and not any(tmp_path.iterdir())
    assert of_real_data(tmp_path, clients, **keys, accept_vacuous=True).status == "completed"


def test_simulated_data_are_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    fv.simulate(
        Clinics(3, simulated=True), privacy=fv.ClientCentral(target_delta=1e-3), num_rounds=1, quiet=True
    )
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: privacy='client_central': is vacuous with 3 clients")
    assert said.endswith("use privacy=record_distributed")


def test_useful_run_is_neither_refused_nor_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert of_real_data(tmp_path, privacy="record", cohort="all").status == "completed"
    assert capsys.readouterr().err == ""


def test_the_flag_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedveil.__main__ import run

    (tmp_path / "tests_clinics.py").write_text(Path(__file__).read_text())
    (tmp_path / "few_clinics.py").write_text(CLINICS)
    monkeypatch.syspath_prepend(tmp_path)
    asked = [
        *(
            "simulate",
            "task=custom",
            "task.target=few_clinics:Few",
            "allow_modules=[few_clinics]",
            "num_rounds=1",
        ),
        *("privacy.target_delta=1e-3", f"ledger.dir={tmp_path / 'ledgers'}", "--json"),
    ]
    assert run([*asked, f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    assert "use privacy=record_distributed, or accept it with --accept-vacuous" in capsys.readouterr().err
    assert run([*asked, f"hydra.run.dir={tmp_path / 'run'}", "--accept-vacuous"]) == 0


# --- one of several runs ------------------------------------------------------------------------------------------


def test_twelve_runs_of_real_data_compose_to_the_whole_budget(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "privacy": fv.ClientCentral(target_delta=1e-3),
        "cohort": fv.Poisson(0.5),
        "num_rounds": 2,
    }
    keys |= {
        "budget": {"runs": 3},
        "ledger": {"dir": str(tmp_path / "ledgers")},
        "quiet": True,
        "accept_vacuous": True,
    }
    runs = [fv.simulate(Clinics(40), folder=tmp_path / str(k), **keys) for k in range(3)]
    noises = {run.result["noise_multiplier"] for run in runs}
    spent = [run.epsilon for run in runs]
    assert len(noises) == 1 and {run.status for run in runs} == {"completed"}
    assert spent[0] < spent[1] < spent[2] <= 3 < spent[2] * 1.02
    assert spent[0] > 1.2  # more than a third: it composes, and does not divide
    assert runs[0].result["budget_runs"] == 3 and runs[0].privacy[0]["target_epsilon"] in (3.0, None)
    with pytest.raises(fv.Refusal, match="target_epsilon"):
        fv.simulate(Clinics(40), folder=tmp_path / "more", **keys)


def test_a_record_run_is_one_of_several_too(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"privacy": "record", "cohort": "all", "num_rounds": 2}
    whole = fv.plan(Clinics(simulated=True), **keys)[0]
    share = fv.plan(Clinics(simulated=True), **keys, budget={"runs": 6})[0]
    assert share.noise_multiplier > whole.noise_multiplier and share.runs == 6
    assert share.epsilon[-1][1] < whole.epsilon[-1][1] <= 3
    assert 2.9 < share.runs_epsilon <= 3 and share.affordable_rounds >= 12
    run = of_real_data(tmp_path, **keys, budget={"runs": 6})
    (ledger, *_) = Path(run.result["ledger"]).glob("*.ledger")
    events = read_events(ledger, Adversary.MODEL)
    assert epsilon([*events] * 6, 1e-5, "zero-out") == pytest.approx(share.runs_epsilon, rel=0.01)
    assert run.epsilon == pytest.approx(share.epsilon[-1][1], rel=0.01)


@pytest.mark.parametrize(
    "more",
    [
        ["privacy.noise_multiplier=1"],
        ["privacy=none"],
        ["privacy.noise_schedule=adaptive"],
        ["cohort=min_separation", "cohort.size=4"],
        ["num_rounds=60000"],
    ],
)
def test_a_run_that_has_no_share_is_refused(more: list[str]) -> None:
    with pytest.raises(fv.Refusal, match=r"budget\.runs=2"):
        settings_from_overrides(["task=digits", "budget.runs=2", *more])


def test_an_order_says_how_many_runs_there_are() -> None:
    assert RecordTerms(3.0, 1e-5, 1.0, "zero-out", 20, runs=12).runs == 12
    with pytest.raises(fv.Refusal, match="runs"):
        RecordTerms(3.0, 1e-5, 1.0, "zero-out", 20, runs=0)


def test_clients_of_a_large_population_are_sampled_evenly(tmp_path: Path) -> None:
    asked = set[int]()

    class Watched(Clinics):
        def client_data(self, client: int) -> fv.Examples:
            asked.add(client)
            return super().client_data(client % 7)

    task = Watched(20_000, simulated=True)
    keys = {"privacy": fv.ClientCentral(target_delta=1e-6), "cohort": fv.Poisson(0.001), "quiet": True}
    run = fv.simulate(task, num_rounds=1, seed=1, folder=tmp_path / "run", **keys)
    assert run.status == "completed"
    assert set(range(0, 20_000, 20)) < asked and len(asked) < 1100


class Interrupted(FedAvg):
    """Ctrl-C once the clients of round 2 have trained."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        if server_round == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().aggregate_train(server_round, replies)


@pytest.mark.parametrize("goes_on", [False, True], ids=["from the start", "after it went on"])
def test_audit_separates_earlier_runs_from_the_charges_of_this_one(goes_on: bool, tmp_path: Path) -> None:
    """A ledger of real data holds earlier runs, which cost more than one round that is charged too little."""
    level = fv.ClientCentral(noise_multiplier=1.0, target_epsilon=None, target_delta=1e-3)
    keys: dict[str, Any] = {"privacy": level, "cohort": fv.Poisson(0.5), "audit": "light"}
    keys["ledger"], keys["num_rounds"], keys["strategy"] = {"dir": str(tmp_path / "ledgers")}, 4, FedAvg()
    reserved = Protected._release

    def too_cheap(account: Protected, *of_round: Any) -> Release:
        release = reserved(account, *of_round)
        less = PoissonSampledDpEvent(0.5, GaussianDpEvent(2.0))
        return replace(release, events=dict.fromkeys(release.events, less))

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert of_real_data(first, 200, **keys).status == "completed"
    if goes_on:
        stopped = of_real_data(second, 200, **keys | {"strategy": Interrupted()})
        assert stopped.status == "interrupted"
    with patch.object(Protected, "_release", too_cheap):
        if goes_on:
            run = fv.simulate(Clinics(200), strategy=FedAvg(), resume=second / "run", quiet=True)
        else:
            run = of_real_data(second, 200, **keys)
    assert run.status == "alarmed"
    said = json.loads((second / "run" / "result.json").read_text())["audit"]["alarms"]
    assert [(each["test"], each["round"]) for each in said] == [("books", 1 + 2 * goes_on)]


def test_books_of_a_resumed_run_are_right_after_earlier_runs(tmp_path: Path) -> None:
    level = fv.ClientCentral(noise_multiplier=1.0, target_epsilon=None, target_delta=1e-3)
    keys: dict[str, Any] = {"privacy": level, "cohort": fv.Poisson(0.5), "audit": "light", "num_rounds": 4}
    keys["ledger"] = {"dir": str(tmp_path / "ledgers")}
    (tmp_path / "first").mkdir()
    assert of_real_data(tmp_path / "first", 200, **keys).status == "completed"
    of_real_data(tmp_path, 200, strategy=Interrupted(), **keys)
    run = fv.simulate(Clinics(200), strategy=FedAvg(), resume=tmp_path / "run", quiet=True)
    assert run.status == "completed"


@pytest.mark.parametrize("tuned", [False, True], ids=["turns", "arms"])
def test_clients_that_are_in_other_places_when_a_run_goes_on(tuned: bool, tmp_path: Path) -> None:
    """One more table, or another name, moves clients: it would be a second turn too soon, or a second arm uncharged."""
    level = fv.ClientCentral(noise_multiplier=1.0, target_epsilon=None, target_delta=1e-3)
    keys: dict[str, Any] = {"privacy": level, "cohort": fv.Poisson(0.5), "num_rounds": 4}
    keys["tune"] = {"name": "learning_rate", "values": [1, 2, 3], "rounds": 1}
    if not tuned:
        level = fv.ClientCentral(target_delta=1e-3, noise="correlated")
        keys = {"privacy": level, "cohort": fv.MinSeparation(20, 2, 2), "num_rounds": 4}

    class Moved(Clinics):
        def client_data(self, client: int) -> fv.Examples:
            return super().client_data((client + 1) % 200 if client < 200 else client)

    of_real_data(tmp_path, 200, strategy=Interrupted(), accept_vacuous=True, **keys)
    began = json.loads((tmp_path / "run" / "run.json").read_text())
    again: dict[str, Any] = {"strategy": FedAvg(), "resume": tmp_path / "run", "quiet": True}
    if not tuned:
        with pytest.raises(fv.Refusal, match="started with other tables or another order"):
            fv.simulate(Moved(200), **again)
        assert fv.simulate(Clinics(200), **again).status == "completed"
        return
    run = fv.simulate(Moved(200), **again)
    assert run.result["tuning"]["deal"] != began["deal"]
    (event,) = read_events(Path(run.result["ledger"]), Adversary.MODEL)
    assert "count=5" in str(event), (
        "who moved has been in an arm before, is in one now, and in three rounds more"
    )
