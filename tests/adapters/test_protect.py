"""`protect`: its gate, where its ledger lies, what it says of a round, and how a run ends on it."""

import logging
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    Krum,
    Result,
    Strategy,
)
from shared.runs import json_lines, reservations

from fedveil.adapters.protect import NobodyAnswered, ProtectedGrid, protect
from fedveil.base.refusal import Refusal
from fedveil.client.private_update import private_update
from fedveil.messages.wire import WEIGHT
from fedveil.privacy.accounting.epsilon import epsilon
from fedveil.privacy.accounting.events import Gaussian
from fedveil.privacy.budget import Adversary, Budget, Release
from fedveil.privacy.ledger.caps import Cap, default_folder, set_cap
from fedveil.privacy.ledger.client_sums import RecordsBudget
from fedveil.privacy.ledger.data_sets import together_path
from fedveil.privacy.ledger.ledger import Ledger, read_entries, verify
from fedveil.questions.evaluations import ClientEvaluation
from fedveil.questions.private_evaluation import private_evaluation
from fedveil.simulations.in_process import InProcessGrid
from fedveil.strategies.cohorts import All, Cohort, Fixed, MinSeparation, Poisson

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

CLIENTS = 40
BUDGET = Budget("client", target_epsilon=8.0, target_delta=1e-2)  # pyright: ignore[reportArgumentType]
TERMS: dict[str, Any] = {
    "data_id": "shops",
    "population": CLIENTS,
    "cohort": All(),
    "budget": BUDGET,
    "clipping_norm": 1.0,
    "num_rounds": 3,
}
LOUD: dict[str, Any] = {"budget": replace(BUDGET, target_epsilon=1000.0), "accept_vacuous": True}
Trains = Callable[[int], bool]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home and a working folder of their own."""
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(logging.getLogger("flwr"), "level", logging.INFO)  # another test may have silenced it
    return tmp_path


def app_of(trains: Trains) -> ClientApp:
    """An app whose training fails where it is told to, by the round."""
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        if not trains(int(message.content["config"]["server-round"])):  # pyright: ignore
            raise RuntimeError("the data of this client are not there")
        weights = message.content["arrays"]["w"].numpy() + 0.1  # pyright: ignore
        metrics = MetricRecord({WEIGHT: 1, "train_loss": 0.5})
        records = RecordDict({"arrays": ArrayRecord({"w": Array(weights)}), "metrics": metrics})
        return Message(records, reply_to=message)

    return app


def grid_of(trains: Trains = lambda _: True, clients: int = CLIENTS) -> InProcessGrid:
    return InProcessGrid(app_of(trains), clients, {})


def run(grid: Any, rounds: int = 3, **terms: Any) -> tuple[Result, ProtectedGrid]:
    start = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
    with protect(grid, **TERMS | terms) as protected:
        return FedAvg().start(protected, start, num_rounds=rounds), protected


def measured(number: int, arrays: ArrayRecord) -> MetricRecord:
    return MetricRecord({"round": number, "first": float(arrays["w"].numpy()[0])})


@pytest.mark.parametrize("strategy", [FedAvg, FedAdam])
def test_held_out_data_are_measured_only_if_they_are_public(strategy: type[FedAvg], home: Path) -> None:
    start, own = ArrayRecord({"w": Array(np.zeros(2, np.float32))}), strategy.start
    with protect(grid_of(), **TERMS) as protected:
        with pytest.raises(Refusal, match=r"evaluate_fn='measured': the held-out data count as private"):
            strategy().start(grid=protected, initial_arrays=start, num_rounds=1, evaluate_fn=measured)
        with pytest.raises(Refusal, match="evaluate_fn"):
            strategy().start(protected, start, 1, 3600, None, None, measured)
        assert not protected.grid.rounds.count
    assert strategy.start is own
    with protect(grid_of(), **TERMS, held_out="public") as protected:
        result = strategy().start(protected, start, num_rounds=1, evaluate_fn=measured)
    assert sorted(result.evaluate_metrics_serverapp) == [0, 1]
    with (
        pytest.raises(Refusal, match="held_out='mine': must be public or private"),
        protect(grid_of(), **TERMS, held_out="mine"),
    ):
        pass


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (Krum(), "strategy='Krum': it must see single clients"),
        (DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 40), "its noise is on no ledger"),
        (FedAvg(weighted_by_key="n"), "weighted_by_key='n': a sum is one reply, weighted by num-examples"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_strategy_that_a_sum_cannot_serve_does_not_start(strategy: Strategy, said: str) -> None:
    with protect(grid_of(), **TERMS) as protected:
        with pytest.raises(Refusal, match=said):
            strategy.start(protected, ArrayRecord({"w": Array(np.zeros(2, np.float32))}), num_rounds=1)
        assert not protected.grid.rounds.count


@pytest.mark.parametrize("strategy", [FedAvg, FedAdam])
def test_a_counter_of_batches_takes_no_part_in_the_clipping(strategy: type[FedAvg]) -> None:
    app, told = ClientApp(), list[str]()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        weight, batches = (message.content["arrays"][name].numpy() for name in "wn")  # pyright: ignore
        told.append(batches.dtype.name)
        arrays = ArrayRecord({"w": Array(weight + 0.1), "n": Array(np.asarray(batches + 1000))})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({WEIGHT: 1})}), reply_to=message)

    start = ArrayRecord({"w": Array(np.zeros(2, np.float32)), "n": Array(np.array(0))})
    with protect(InProcessGrid(app, CLIENTS, {}), **TERMS | LOUD) as protected:
        arrays = strategy().start(protected, start, num_rounds=3).arrays
    assert set(told) == {"int64"} and float(arrays["n"].numpy()) == 0
    assert float(arrays["w"].numpy().min()) > 0.2


def ledgers(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.ledger"))


# --- the gate -----------------------------------------------------------------------------------------------------


def budget(delta: float = 1e-2, **kinds: str) -> Budget:
    return Budget(**{"unit": "client", **kinds}, target_epsilon=8.0, target_delta=delta)  # pyright: ignore


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        (
            {"budget": budget(0.9)},
            r"target_delta=0\.9: with 40 clients it permits to publish one .* set allow_large_delta=true",
        ),
        ({"budget": budget(0.026)}, r"target_delta=0\.026: with 40 clients"),
        (
            {"budget": budget(adjacency="add-or-remove-one"), "cohort": Poisson(0.5)},
            r"budget\.adjacency='add-or-remove-one': the population makes the number",
        ),
        ({"budget": budget(unit="record")}, r"budget\.unit='record': .* hides whole clients"),
        (
            {"population": 29, "cohort": All()},
            r"population=29: this guarantee is vacuous with 29 clients, fewer than 30: .*, give parameters= of a small",
        ),
        (
            {"population": 29, "cohort": All(), "parameters": 10_000},
            "with 29 clients, fewer than 30: .*, and over all rounds .* times as long as their updates together can be",
        ),
        ({"parameters": 0}, "parameters=0: give the number of the model's parameters, at least 1"),
        ({"cohort": Poisson(0.01), "accept_vacuous": False}, r"population=40: this guarantee is vacuous"),
        ({"cohort": Fixed(41)}, r"cohort\.size=41: there are 40 clients"),
        (
            {"cohort": MinSeparation(10, 4, 3)},
            "cohort='no sampling .*: here each round is its own release",
        ),
        ({"clipping_norm": -1.0}, r"clipping_norm=-1\.0: give a number above 0"),
        ({"clipping_norm": float("nan")}, "clipping_norm=nan: give a finite number"),
        ({"num_rounds": 0}, "num_rounds=0: plan at least one round"),
        ({"population": 0, "cohort": All()}, "population=0: give the number of clients"),
        ({"data_id": "../shops"}, r"data_id='\.\./shops': must be a name"),
        ({"data_id": "shops\n"}, "must be a name"),
        ({"ledger_dir": "ledgers"}, "ledger_dir='ledgers': give an absolute folder"),
    ],
)
def test_protect_makes_the_refusals_of_the_command_line(
    home: Path, terms: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(Refusal, match=sentence):
        run(grid_of(), **terms)
    assert not list(home.glob("home/**/*")) and not list(Path().iterdir())


def test_explicitly_accepted_run_trains(caplog: pytest.LogCaptureFixture) -> None:
    run(grid_of(), budget=budget(0.9), allow_large_delta=True)
    assert "target_delta=0.9 permits to publish one of the 40 clients in full" in caplog.text
    result, _ = run(grid_of(clients=20), population=20, accept_vacuous=True, data_id="few")
    assert result.arrays["w"].numpy().shape == (2,)


def test_a_small_model_learns_from_few_clients() -> None:
    result, _ = run(grid_of(clients=20), population=20, cohort=All(), parameters=2, data_id="small")
    assert result.arrays["w"].numpy().shape == (2,)


def test_more_clients_than_were_declared_are_refused() -> None:
    """The delta was weighed against the population: with twice as many clients it is too large."""
    with pytest.raises(Refusal, match="population=40: 80 clients are connected"):
        run(grid_of(clients=80))
    assert not [entry for entry in read_entries(ledgers(default_folder())[0]) if entry.kind == "reserve"]


# --- the ledger ---------------------------------------------------------------------------------------------------


def test_restart_in_another_folder_uses_the_same_ledger(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(grid_of())
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    with pytest.raises(Refusal, match="already spent"):
        run(grid_of())
    (path,) = ledgers(home)
    assert path.parent == default_folder() and path.is_absolute()
    assert 7.9 < verify(path).epsilon <= 8.0


def test_data_of_another_name_have_a_budget_of_their_own(home: Path) -> None:
    run(grid_of())
    run(grid_of(), data_id="clinics", ledger_dir=home / "own")
    assert len(ledgers(default_folder())) == len(ledgers(home / "own")) == 1


def test_a_cap_of_the_owner_holds_for_records_too(caplog: pytest.LogCaptureFixture) -> None:
    """All rounds are planned within it; records pay for each as for half its noise."""
    set_cap(default_folder(), Cap("all", 2.0, 1e-3))
    _, protected = run(grid_of(), accept_vacuous=True)
    assert protected.grid.rounds.count == 3 and protected.ended is None
    assert protected.budget.target_epsilon == 2.0
    ledger = protected.privacy.ledger
    (shared,) = ledger.shared
    assert isinstance(shared, RecordsBudget)
    of_records = epsilon(shared.book.events(Adversary.MODEL), 1e-3)
    assert 1.98 < of_records <= 2.0 and verify(ledger.path).epsilon < of_records


def test_rounds_that_records_cannot_pay_for_are_refused_before_any() -> None:
    records = Budget("record", target_epsilon=4.0, target_delta=1e-2)  # pyright: ignore[reportArgumentType]
    path = together_path(default_folder(), "shops")
    path.parent.mkdir(parents=True)
    with Ledger.open(path, records, owner="shops", simulated=False) as ledger:
        ledger.reserve_new(Release(records.unit, "a", 1, "x", {Adversary.MODEL: Gaussian(8.0)}, "system"))
    with pytest.raises(Refusal, match=r"budget\.target_epsilon=8\.0: records of .*; give at most") as refused:
        run(grid_of())
    at_most = float(str(refused.value).rpartition(" ")[2])
    assert all(
        entry.kind != "reserve"
        for each in ledgers(default_folder())
        if each != path
        for entry in read_entries(each)
    )
    _, protected = run(grid_of(), budget=replace(BUDGET, target_epsilon=at_most), accept_vacuous=True)
    assert protected.grid.rounds.count == 3 and protected.ended is None


# --- the rounds ---------------------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What fedveil says of rounds and their end."""
    said = [record.getMessage() for record in caplog.records if record.name == "flwr.fedveil"]
    return [line for line in said if line.startswith(("round", "the run ends"))]


def operators(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("*.operator.jsonl")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return json_lines(path)


@pytest.mark.parametrize("cohort", [All(), Poisson(0.5), Poisson(0.5, secret=False)])
def test_list_of_answering_clients_is_for_the_operator_alone(
    home: Path, caplog: pytest.LogCaptureFixture, cohort: Cohort
) -> None:
    """An epsilon may rely on the draw, and a client's failure depend on its data."""
    with caplog.at_level(logging.INFO, "flwr"):
        _, protected = run(grid_of(), cohort=cohort)
    told = lines(caplog)
    assert told[-1].startswith("round 3: ") and "of 8 at delta 0.01" in told[-1]
    assert all(f"{cohort.expected_size(40):g} clients planned; epsilon" in line for line in told)
    assert not any(word in line for line in told for word in ("invited", "replied", "failed"))
    assert [row["invited"] for row in operators(home)] == [
        done.invited for done in protected.grid.rounds.newest
    ]


def test_rounds_beyond_the_budget_leave_the_model_and_say_why(caplog: pytest.LogCaptureFixture) -> None:
    result, protected = run(grid_of(), rounds=6)
    assert protected.grid.rounds.count == 3 and len(result.train_metrics_clientapp) == 3
    assert protected.ended is not None and protected.ended.startswith("the client budget is spent")
    assert lines(caplog)[3:] == [f"the run ends here: {protected.ended}; the model stays unchanged"]


def test_a_strategy_that_finds_no_round_left_returns_no_empty_model() -> None:
    with protect(grid_of(), **TERMS) as protected:
        first = FedAvg().start(protected, ArrayRecord({"w": Array(np.zeros(2, np.float32))}), num_rounds=3)
        for _ in range(2):
            with pytest.raises(Refusal, match="none is left for this strategy': the client budget is spent"):
                FedAdam().start(protected, first.arrays, num_rounds=1)
    assert protected.grid.rounds.count == 3


@pytest.mark.parametrize("cohort", [All(), Poisson(0.5)])
def test_a_run_that_nobody_ever_answers_is_no_run(cohort: Cohort) -> None:
    with pytest.raises(NobodyAnswered, match=r"no client answered in round 1 \(failed\)"):
        run(grid_of(lambda _: False), cohort=cohort)
    entries = read_entries(ledgers(default_folder())[0])
    assert len([entry for entry in entries if entry.kind == "reserve"]) == 1


def test_run_without_answers_keeps_the_last_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    result, protected = run(grid_of(lambda number: number < 2), rounds=3)
    assert protected.ended is not None and "no client answered in round 2 (failed)" in protected.ended
    assert protected.grid.rounds.count == 2 and list(result.train_metrics_clientapp) == [1]
    assert any("the run ends here: no client answered" in line for line in lines(caplog))


def test_a_draw_of_nobody_does_not_end_a_run() -> None:
    """Four clients a round: nobody is drawn once in 70 rounds, so that an end after one would tell of the draw."""
    _, protected = run(grid_of(lambda number: number != 2), cohort=Poisson(0.1), accept_vacuous=True)
    assert protected.ended is None and protected.grid.rounds.count == 3


def test_clients_are_not_sent_evaluations_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    result, _ = run(grid_of())
    assert not result.evaluate_metrics_clientapp
    assert caplog.text.count("clients do not evaluate, since") == 1


@pytest.mark.parametrize("error", [Refusal("target_epsilon", 8.0, "already spent"), NobodyAnswered("nobody")])
def test_flower_reports_outside_faults_in_a_sentence(
    caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    run(grid_of())
    caplog.clear()
    for each in (error, RuntimeError("a fault")):
        logging.getLogger("flwr").error("%s raised an exception", "ServerApp", exc_info=each)
    assert [record.getMessage() for record in caplog.records] == [str(error), "ServerApp raised an exception"]
    assert [record.exc_info is None for record in caplog.records] == [True, False]


# --- evaluation at the clients ------------------------------------------------------------------------------------


def evaluating(accuracy: Callable[[int], float | None]) -> InProcessGrid:
    """An app whose evaluation function says so, by the client; None: it has no examples for that."""
    app = app_of(lambda _: True)

    @app.evaluate(mods=[private_evaluation])
    def evaluate(message: Message, context: Context) -> Message:
        said = accuracy(int(str(context.node_config["partition-id"])))
        metrics = (
            {WEIGHT: 0} if said is None else {WEIGHT: 3, "eval_acc": said, "eval_loss": 1.0, "secret": 7.0}
        )
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return InProcessGrid(app, CLIENTS, {})


EXACT = {"noise_multiplier": 0.02}
PLENTY = Budget("client", target_epsilon=1e5, target_delta=1e-2)  # pyright: ignore[reportArgumentType]


def test_an_app_that_evaluates_at_clients_has_a_metric_again(caplog: pytest.LogCaptureFixture) -> None:
    grid = evaluating(lambda client: None if client % 4 == 0 else 0.5 + 0.01 * client)
    with caplog.at_level(logging.INFO, "flwr"):
        result, protected = run(grid, evaluate=ClientEvaluation("eval_acc", every=2, **EXACT), budget=PLENTY)
    assert list(result.evaluate_metrics_clientapp) == [2, 3]
    told = result.evaluate_metrics_clientapp[3]
    truth = np.mean([0.5 + 0.01 * client for client in range(CLIENTS) if client % 4])
    assert told["eval_acc"] == pytest.approx(truth, abs=0.01) and "secret" not in told
    assert told["eval_acc/low"] <= told["eval_acc"] <= told["eval_acc/high"]
    assert told["loss"] == pytest.approx(1.0, abs=0.05)
    assert "the clients after round 2: eval_acc 0." in caplog.text
    assert protected.ended is None


def test_evaluations_are_charged_within_the_budget(home: Path) -> None:
    asked = ClientEvaluation("eval_acc")
    result, protected = run(evaluating(lambda _: 0.5), evaluate=asked)
    assert set(result.evaluate_metrics_clientapp) <= {
        3
    }  # in one run of some twenty its noise leaves nothing to say
    assert protected.grid.rounds.count == 3
    (path,) = ledgers(default_folder())
    reserved = reservations(path)
    assert [each.get("kind") for each in reserved] == [None, None, None, "question"]
    assert set(reserved[-1]["segments"].values()) == {"evaluation"}
    assert 7.9 < verify(path).epsilon <= 8.0
    alone = protected.privacy.plan.epsilon(1e-2)
    assert alone < 7.99


def test_too_coarse_evaluation_is_refused_before_writing(home: Path) -> None:
    asked = ClientEvaluation("eval_acc", resolution=0.01)
    with pytest.raises(Refusal, match=r"resolution=0\.01: is planned to .* clients would suffice"):
        run(evaluating(lambda _: 0.5), evaluate=asked)
    assert not ledgers(home)


def test_owner_without_leave_for_evaluation_is_not_evaluated(home: Path) -> None:
    set_cap(default_folder(), Cap("all", 8.0, 1e-2, purposes=("statistics",)))
    with pytest.raises(
        Refusal, match="purpose='evaluation': the owner of the data lets questions be asked for statistics"
    ):
        run(evaluating(lambda _: 0.5), evaluate=ClientEvaluation("eval_acc"))
    assert not ledgers(home)


def test_a_mod_refuses_evaluations_that_nobody_pays_for() -> None:
    grid = evaluating(lambda _: 0.5)
    arrays = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
    (reply,) = grid.send_and_receive([Message(RecordDict({"arrays": arrays}), 2, "evaluate")])
    assert reply.has_error()


@pytest.mark.parametrize(
    "said",
    [
        {"metric": "loss"},
        {"every": 0},
        {"figures": ("all",)},
        {"bound": -1.0},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"resolution": 0.0},
    ],
)
def test_a_mistaken_evaluation_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match="evaluate"):
        ClientEvaluation(**{"metric": "eval_acc", **said})
