"""The private sum behind Flower's own strategies."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.base.refusal import Refusal
from fedveil.client.private_update import private_update
from fedveil.configs.training_settings import STRATEGIES
from fedveil.messages.wire import FAILED, OWNERS_POLICY, memory_arrays, view
from fedveil.privacy import Adjacency, Budget, BudgetExhausted, Ledger, Plan, Unit
from fedveil.privacy.budget import Adversary
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import Segment
from fedveil.server.participants import Participants
from fedveil.server.private_grid import PrivateGrid
from fedveil.server.round_terms import SumPrivacy, SumTerms
from fedveil.simulations.in_process import InProcessGrid
from fedveil.strategies.cohorts import All, Cohort, Fixed, Poisson
from fedveil.strategies.registry import (
    ONE_REPLY,
    make_strategy,
)

CLIENTS = 20
SHAPES = {"w": (4, 3), "b": (3,)}
START = {name: np.full(shape, 0.5, np.float32) for name, shape in SHAPES.items()}


def shifting_app(shift: float = 0.01, mods: Iterable[Any] = (private_update,)) -> ClientApp:
    """Clients that add `shift` times their number to every coordinate."""
    app = ClientApp()

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        client = int(str(context.node_config["partition-id"]))
        arrays = message.content.array_records["arrays"]
        moved = {name: (array.numpy() + shift * client).astype(np.float32) for name, array in arrays.items()}
        metrics = MetricRecord({"num-examples": client + 1, "loss": 1.0, "secret": 42.0})
        return Message(RecordDict({"a": memory_arrays(moved), "m": metrics}), reply_to=message)

    return app


def grid_of(
    cohort: Cohort, ledger: Ledger | None = None, noise: float = 0.02, clip: float = 1.0, **options: Any
) -> PrivateGrid:
    inner = InProcessGrid(shifting_app(), CLIENTS, {})
    privacy = None
    if ledger is not None:
        plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, cohort, clip, 10, noise)
        privacy = SumPrivacy(plan, ledger, options.pop("metrics_share", 0.0))
    return PrivateGrid(
        Participants(inner, cohort, CLIENTS), privacy=privacy, randomness=Randomness(4), **options
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Iterable[Ledger]:
    budget = Budget(Unit.CLIENT, 1e9, 1e-5)
    with Ledger.open(tmp_path / "ledger", budget, owner="test", simulated=True) as opened:
        yield opened


def one_round(grid: PrivateGrid, strategy: flower.Strategy, arrays: ArrayRecord, number: int = 1) -> Any:
    messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
    return strategy.aggregate_train(number, grid.send_and_receive(messages))


def test_without_privacy_the_sum_is_federated_averaging() -> None:
    arrays, _ = one_round(grid_of(All()), make_strategy("fedavg", {}), memory_arrays(START))
    numbers = np.arange(CLIENTS)
    expected = 0.5 + 0.01 * (numbers * (numbers + 1)).sum() / (numbers + 1).sum()
    np.testing.assert_allclose(view(arrays["w"]), expected, rtol=1e-6)


def test_with_privacy_every_client_weighs_the_same(ledger: Ledger) -> None:
    arrays, _ = one_round(grid_of(All(), ledger), make_strategy("fedavg", {}), memory_arrays(START))
    np.testing.assert_allclose(view(arrays["w"]), 0.5 + 0.01 * np.arange(CLIENTS).mean(), atol=5e-3)


def test_a_dropped_client_is_a_zero_under_the_fixed_denominator(ledger: Ledger) -> None:
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        if int(str(context.node_config["partition-id"])) % 2:
            raise RuntimeError("down")
        moved = {name: array.numpy() + 0.2 for name, array in message.content.array_records["arrays"].items()}
        return Message(
            RecordDict({"a": memory_arrays(moved), "m": MetricRecord({"num-examples": 1})}), reply_to=message
        )

    grid = grid_of(All(), ledger)
    grid.participants.grid = InProcessGrid(app, CLIENTS, {})
    arrays, _ = one_round(grid, make_strategy("fedavg", {}), memory_arrays(START))
    np.testing.assert_allclose(view(arrays["w"]), 0.6, atol=5e-3)
    assert grid.rounds.newest[0].dropped == {"failed": CLIENTS // 2}


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - {"auto", "custom"}))
def test_flowers_strategies_see_one_client_that_replied_with_the_mean(name: str) -> None:
    """Each strategy gives what the same unchanged class gives when it is handed the mean directly."""
    behind_the_sum, direct = make_strategy(name, {}), make_strategy(name, {})
    arrays = memory_arrays(START)
    for number in (1, 2):
        grid = grid_of(All())
        grid.skip_to(number - 1)
        got, _ = one_round(grid, behind_the_sum, arrays, number)
        numbers = np.arange(CLIENTS)
        mean = 0.01 * (numbers * (numbers + 1)).sum() / (numbers + 1).sum()
        handed = memory_arrays({k: (view(a) + mean).astype(np.float32) for k, a in arrays.items()})
        requests = list(direct.configure_train(number, arrays, ConfigRecord(), grid))
        reply = Message(
            RecordDict({"a": handed, "m": MetricRecord({"num-examples": 1})}), reply_to=requests[0]
        )
        wanted, _ = direct.aggregate_train(number, [reply])
        assert wanted is not None
        for key in SHAPES:
            np.testing.assert_allclose(view(got[key]), view(wanted[key]), rtol=1e-6)
        arrays = memory_arrays({k: view(got[k]).astype(np.float32) for k in SHAPES})


def test_a_strategy_that_tells_clients_apart_is_refused() -> None:
    class Personal(flower.FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> list[Message]:
            return [
                Message(RecordDict({"arrays": arrays, "config": ConfigRecord({"you": node})}), node, "train")
                for node in grid.get_node_ids()
            ]

    with pytest.raises(Refusal, match="different"):
        one_round(grid_of(All()), Personal(**ONE_REPLY), memory_arrays(START))


def test_an_empty_cohort_still_releases_noise_and_is_charged(ledger: Ledger) -> None:
    grid = grid_of(Poisson(1e-9), ledger, noise=1.0, clip=1.0)
    arrays, _ = one_round(grid, make_strategy("fedavg", {}), memory_arrays(START))
    assert grid.rounds.newest[0].invited == 0
    assert not np.array_equal(view(arrays["w"]), START["w"])
    assert len(ledger.events(Adversary.MODEL)) == 1


def test_the_reservation_is_durable_before_any_client_is_called(ledger: Ledger, tmp_path: Path) -> None:
    seen: list[int] = []
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        import sqlite3

        with sqlite3.connect(f"file:{tmp_path / 'ledger'}?mode=ro", uri=True) as other:
            seen.append(other.execute("select count(*) from entries where kind = 'reserve'").fetchone()[0])
        other.close()
        return Message(
            RecordDict({"a": message.content.array_records["arrays"], "m": MetricRecord({})}),
            reply_to=message,
        )

    grid = grid_of(All(), ledger, noise=1.0)
    grid.participants.grid = InProcessGrid(app, CLIENTS, {})
    one_round(grid, make_strategy("fedavg", {}), memory_arrays(START))
    assert seen == [1] * CLIENTS


def test_a_spent_budget_stops_before_the_round_and_the_model_stays(tmp_path: Path) -> None:
    budget = Budget(Unit.CLIENT, 3.0, 1e-5)
    with Ledger.open(tmp_path / "small", budget, owner="test", simulated=True) as small:
        grid = grid_of(All(), small, noise=1.5)
        strategy = make_strategy("fedavg", {})
        result = strategy.start(grid, memory_arrays(START), num_rounds=5)
        assert isinstance(grid.exhausted, BudgetExhausted)
        assert grid.rounds.count == 1
        assert view(result.arrays["w"]).shape == (4, 3)
        assert small.epsilon() <= 3.0
        with pytest.raises(BudgetExhausted):
            grid.reserve(2)


def test_no_noise_repeats_between_rounds_and_it_has_the_planned_scale(ledger: Ledger) -> None:
    inner = InProcessGrid(shifting_app(shift=0.0), CLIENTS, {})
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, All(), 0.5, 10, 4.0)
    grid = PrivateGrid(
        Participants(inner, All(), CLIENTS), privacy=SumPrivacy(plan, ledger), randomness=Randomness(4)
    )
    big = memory_arrays({"w": np.zeros(20_000, np.float32)})
    noises = [view(one_round(grid, make_strategy("fedavg", {}), big, r)[0]["w"]) * CLIENTS for r in (1, 2)]
    assert abs(np.corrcoef(noises)[0, 1]) < 0.05
    for noise in noises:
        assert math.isclose(noise.std(), 4.0 * 0.5, rel_tol=0.03)


def test_only_bounded_metrics_leave_and_as_part_of_the_sum(ledger: Ledger) -> None:
    grid = grid_of(All(), ledger, terms=SumTerms((Segment("loss", 5.0),)), metrics_share=0.02)
    _, metrics = one_round(grid, make_strategy("fedavg", {}), memory_arrays(START))
    assert math.isclose(metrics["loss"], 1.0, abs_tol=0.1)
    assert "secret" not in metrics


def test_client_evaluation_is_not_sent() -> None:
    grid = grid_of(All())
    strategy = flower.FedAvg()
    messages = list(strategy.configure_evaluate(1, memory_arrays(START), ConfigRecord(), grid))
    assert messages
    assert grid.send_and_receive(messages) == []


def test_a_mod_without_a_private_sum_answers_nothing() -> None:
    grid = InProcessGrid(shifting_app(), CLIENTS, {})
    request = Message(RecordDict({"arrays": memory_arrays(START)}), 2, "train")
    (reply,) = grid.send_and_receive([request])
    assert reply.has_error()


def test_error_texts_stay_at_the_client() -> None:
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        raise ValueError("patient 17 has glucose 431")

    grid = grid_of(All())
    sent: list[Message] = []
    inner = InProcessGrid(app, CLIENTS, {})
    original = inner.client_app
    inner.client_app = lambda m, c: (sent.append(r := original(m, c)), r)[1]  # type: ignore[assignment]
    grid.participants.grid = inner
    one_round(grid, make_strategy("fedavg", {}), memory_arrays(START))
    assert sent
    assert all("glucose" not in str(reply.error.reason) for reply in sent)


def test_the_plan_and_the_cohort_cannot_drift_apart(ledger: Ledger) -> None:
    inner = InProcessGrid(shifting_app(), CLIENTS, {})
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, Poisson(0.1), 1.0, 10, 1.0)
    with pytest.raises(Refusal, match="another draw"):
        PrivateGrid(Participants(inner, Fixed(2), CLIENTS), privacy=SumPrivacy(plan, ledger))
    uncalibrated = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, All(), 1.0, 10)
    with pytest.raises(Refusal, match="calibrate"):
        PrivateGrid(Participants(inner, All(), CLIENTS), privacy=SumPrivacy(uncalibrated, ledger))


def test_a_seeded_run_draws_a_cohort_of_its_own_in_every_round() -> None:
    grid, rounds = grid_of(Poisson(0.5)), range(1, 201)
    drawn = [tuple(grid.draw(number)) for number in rounds]
    assert drawn == [tuple(grid_of(Poisson(0.5)).draw(number)) for number in rounds]
    # Two independent cohorts agree on a client half of the time: 8 deviations of so many rounds.
    pairs = [set(one) ^ set(other) for one, other in itertools.pairwise(drawn)]
    agreed = 1 - sum(map(len, pairs)) / (CLIENTS * len(pairs))
    assert abs(agreed - 0.5) < 8 * 0.5 / (CLIENTS * len(pairs)) ** 0.5


def test_single_clients_cannot_be_reached() -> None:
    grid = grid_of(All())
    with pytest.raises(Refusal):
        grid.push_messages([])
    with pytest.raises(Refusal):
        grid.pull_messages([])


def test_integer_buffers_are_never_averaged() -> None:
    arrays = {"w": np.zeros((4, 3), np.float32), "steps": np.array(7, np.int64)}
    moved, _ = one_round(grid_of(All()), make_strategy("fedavg", {}), memory_arrays(arrays))
    assert view(moved["steps"]) == 7


@pytest.mark.parametrize("seed", [None, 4])
def test_fresh_noise_is_never_released_under_an_old_key(tmp_path: Path, seed: int | None) -> None:
    budget = Budget(Unit.CLIENT, 1e9, 1e-5)
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, All(), 1.0, 10, 1.0)
    with Ledger.open(tmp_path / "shared", budget, owner="test", simulated=True) as shared:

        def grid(run: str | None) -> PrivateGrid:
            inner, privacy = InProcessGrid(shifting_app(), CLIENTS, {}), SumPrivacy(plan, shared)
            return PrivateGrid(
                Participants(inner, All(), CLIENTS), privacy=privacy, randomness=Randomness(seed), run=run
            )

        grid("one").reserve(1)
        if seed is None:
            with pytest.raises(Refusal, match="cannot be repeated"):
                grid("one").reserve(1)
        else:
            grid("one").reserve(1)  # the same bits again: a resumed simulation pays once
        assert shared.head.seq == 2
        for number in (3, 4):
            grid(None).reserve(1)
            assert shared.head.seq == number


def test_a_run_is_in_vain_once_every_owners_policy_has_refused(ledger: Ledger) -> None:
    """The next round would ask for the same; of a secret draw it is told only if nobody has ever answered."""
    refused = {1, 2}
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        code = OWNERS_POLICY if int(str(context.node_config["partition-id"])) in refused else FAILED
        return Message(Error(code, "no"), reply_to=message)

    for own in (None, ledger):
        for all_refuse in (False, True):
            refused = set(range(CLIENTS)) if all_refuse else {1, 2}
            grid = grid_of(All(), own)
            grid.participants.grid = InProcessGrid(app, CLIENTS, {})
            one_round(grid, make_strategy("fedavg", {}), memory_arrays(START))
            assert grid.all_declined == all_refuse
            grid.rounds.add(
                replace(grid.rounds.newest[0], replies=1)
            )  # with data of somebody, of a secret draw
            assert grid.all_declined == (all_refuse and own is None)
