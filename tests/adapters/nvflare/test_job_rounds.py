"""Rounds of a job: the bits of the same run under fedveil, and the mean of NumPy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from shared.nvflare_jobs import CLIENTS, START, TERMS, Client, Server, result_of, served, stepped

from fedveil.adapters.nvflare.job_rounds import JobRounds
from fedveil.adapters.nvflare.job_terms import JobTerms
from fedveil.client.private_update import private_update
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.privacy.mechanisms.private_sum import Vector
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import MIN_CELLS
from fedveil.server.participants import Participants
from fedveil.server.private_grid import PrivateGrid
from fedveil.server.round_terms import SumPrivacy
from fedveil.simulations.in_process import InProcessGrid
from fedveil.strategies.cohorts import All


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def of_fedveil(terms: JobTerms, folder: Path, rounds: int) -> dict[str, Any]:
    """The model that fedveil makes of the same clients under Flower, with the same noise."""
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        arrays = {name: each.numpy() for name, each in message.content["arrays"].items()}  # pyright: ignore
        trained = stepped(int(context.node_config["partition-id"]), arrays)
        records = {name: Array(np.asarray(each)) for name, each in trained.items()}
        metrics = MetricRecord({"num-examples": 5})
        return Message(RecordDict({"arrays": ArrayRecord(records), "metrics": metrics}), reply_to=message)

    plan, _ = terms.plan()
    with Ledger.open(folder / "flower", terms.budget, owner="shops", simulated=True) as book:
        clients = Participants(InProcessGrid(app, CLIENTS, {}), All(), CLIENTS)
        grid = PrivateGrid(clients, privacy=SumPrivacy(plan, book), randomness=Randomness(7))
        start = ArrayRecord({name: Array(each) for name, each in START.items()})
        strategy = FedAvg(fraction_evaluate=0)
        arrays = strategy.start(grid, start, num_rounds=rounds).arrays
    return {name: each.numpy() for name, each in arrays.items()}


def test_a_job_has_the_bits_of_the_same_run_under_fedveil(home: Path) -> None:
    terms = replace(TERMS, target_epsilon=20.0)
    plan, _ = terms.plan()
    server, model = Server(terms), dict(START)
    with Ledger.open(home / "own", terms.budget, owner="shops", simulated=True) as book:
        server.aggregator._rounds = JobRounds(terms, plan, book, terms.budget, Randomness(7))
        for _ in range(2):
            model = server.round(model)
    expected = of_fedveil(terms, home, 2)
    assert all(model[name].dtype == np.float32 for name in "wb")
    assert all(model[name].tobytes() == expected[name].tobytes() for name in "wb")
    assert model["n"] == 7 and not np.allclose(model["w"], START["w"])


class NoNoise:
    """Noise of zero, with the event of the plan's."""

    def __init__(self, rounds: JobRounds) -> None:
        self.event = rounds.plan.mechanism.event(rounds.plan.noise_over_clip)

    def add(self, total: Vector, row: int, noise_multiplier: float, spec: Any) -> tuple[Vector, Any]:
        return total, self.event


def test_without_noise_the_mean_is_numpys() -> None:
    def trains(number: int, model: dict[str, Any]) -> dict[str, Any]:
        return {k: v + (0 if k == "n" else np.float64(0.01 * (number + 1))) for k, v in model.items()}

    wide = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in START.items()}
    with served() as server:
        server.aggregator.reset_stats()
        server.aggregator.rounds._noise = NoNoise(server.aggregator.rounds)
        step = 1.0 / MIN_CELLS
        for number in range(CLIENTS):
            reply = Client().answer(server.send(wide), result_of(trains(number, wide)))
            server.accept(number, reply)
        new = server.aggregator.aggregate_model().params
    rounded = [np.rint(0.01 * (number + 1) / step) * step for number in range(CLIENTS)]
    assert new is not None
    np.testing.assert_allclose(new["w"] - wide["w"], np.mean(rounded), rtol=0, atol=1e-12)
