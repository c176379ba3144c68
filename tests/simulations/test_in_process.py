"""The in-process engine keeps the isolation and the answers of processes that share nothing."""

import os
import time
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.client.private_update import private_update
from fedveil.client.workbench import Workbench
from fedveil.configs.settings import settings_from_overrides
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.wire import instruct, memory_arrays, view
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.run.build import build
from fedveil.simulations import engines, warmup
from fedveil.simulations.in_process import FIRST_NODE, InProcessGrid, Stacks
from fedveil.simulations.warmup import Warmup

SPEC = SumSpec(100.0)
SIZE = 4


def app_of(behave: Any) -> ClientApp:
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        client = int(str(context.node_config["partition-id"]))
        moved = behave(client, message, context)
        return Message(
            RecordDict({"a": memory_arrays({"w": moved}), "m": MetricRecord({})}), reply_to=message
        )

    return app


def order() -> Message:
    arrays = memory_arrays({"w": np.zeros(SIZE, np.float32)})
    content = instruct(RecordDict({"arrays": arrays, "config": ConfigRecord({"x": 1})}), SPEC, "run", 1)
    return Message(content, 0, "train")


def grid_of(app: ClientApp, workers: int, clients: int = 8, deadline: float = 30.0) -> InProcessGrid:
    return InProcessGrid(app, clients, {}, workers=workers, deadline=deadline)


def total(grid: InProcessGrid, clients: int = 8) -> Any:
    try:
        return grid.sum_replies(order(), [FIRST_NODE + k for k in range(clients)], SPEC, SIZE)
    finally:
        grid.close()


def numbered(client: int, message: Message, context: Context) -> np.ndarray:
    return message.content.array_records["arrays"]["w"].numpy() + client


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_sum_does_not_depend_on_the_workers(workers: int) -> None:
    result = total(grid_of(app_of(numbered), workers))
    assert result.replies == 8
    np.testing.assert_allclose(result.total * SPEC.step, sum(range(8)), atol=0.01)


def vandal(client: int, message: Message, context: Context) -> np.ndarray:
    seen = message.content.array_records["arrays"]["w"].numpy()
    assert message.content.config_records["config"]["x"] == 1
    message.content.config_records["config"]["x"] = 2
    before = seen.copy()
    seen += 1e6
    view(message.content.array_records["arrays"]["w"])
    del message.content.array_records["arrays"]["w"]
    message.content["arrays"] = memory_arrays({"w": before})
    return before + 1


def test_clients_cannot_see_each_others_changes() -> None:
    result = total(grid_of(app_of(vandal), 1))
    assert result.replies == 8


@pytest.mark.parametrize("workers", [1, 2])
def test_a_client_past_its_deadline_is_dropped_and_the_round_goes_on(workers: int) -> None:
    def slow(client: int, message: Message, context: Context) -> np.ndarray:
        if client == 3:
            time.sleep(20)
        return numbered(client, message, context)

    result = total(grid_of(app_of(slow), workers, deadline=2))
    assert (result.replies, result.dropped) == (7, {"late": 1})


@pytest.mark.parametrize("workers", [1, 2])
def test_a_client_that_raises_is_dropped(workers: int) -> None:
    def failing(client: int, message: Message, context: Context) -> np.ndarray:
        if client == 3:
            raise RuntimeError("no")
        return numbered(client, message, context)

    result = total(grid_of(app_of(failing), workers))
    assert (result.replies, result.dropped) == (7, {"failed": 1})


def test_dying_worker_takes_only_its_share_and_is_replaced() -> None:
    def deadly(client: int, message: Message, context: Context) -> np.ndarray:
        if client == 3:
            os.kill(os.getpid(), 9)
        return numbered(client, message, context)

    grid = grid_of(app_of(deadly), 2)
    nodes = [FIRST_NODE + k for k in range(8)]
    try:
        first = grid.sum_replies(order(), nodes, SPEC, SIZE)
        assert (first.replies, first.dropped) == (4, {"worker died": 4})
        second = grid.sum_replies(order(), [n for n in nodes if n != FIRST_NODE + 3], SPEC, SIZE)
        assert second.replies == 7
    finally:
        grid.close()


def counting(client: int, message: Message, context: Context) -> np.ndarray:
    visits = context.state.metric_records.get("visits", MetricRecord({"n": 0}))
    count = int(str(visits["n"])) + 1
    context.state["visits"] = MetricRecord({"n": count})
    return message.content.array_records["arrays"]["w"].numpy() + count


@pytest.mark.parametrize("workers", [1, 2])
def test_a_clients_state_stays_with_it(workers: int) -> None:
    grid = grid_of(app_of(counting), workers)
    nodes = [FIRST_NODE + k for k in range(8)]
    try:
        sums = [grid.sum_replies(order(), nodes[r:], SPEC, SIZE).total[0] * SPEC.step for r in range(3)]
    finally:
        grid.close()
    np.testing.assert_allclose(sums, [8 * 1, 7 * 2, 6 * 3], atol=0.01)


def test_clients_with_state_stay_in_the_process_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "WARMUP_SECONDS", 0.0)
    monkeypatch.setattr("threading.active_count", lambda: 1)  # whatever earlier tests left
    stateless, stateful = (grid_of(app_of(each), 1) for each in (numbered, counting))
    for grid, workers in ((stateless, 2), (stateful, 1)):
        grid.warmup = Warmup(2, idle=1e9)
        try:
            sums = [total(grid).total[0] for _ in range(3)]
            assert grid.workers == workers
        finally:
            grid.close()
        growth = np.diff(sums) * SPEC.step
        np.testing.assert_allclose(growth, 8.0 if grid is stateful else 0.0, atol=0.01)


@pytest.mark.parametrize(
    ("said", "stacks", "most"),
    [
        ("cohort=fixed cohort.size=3", None, 3),
        ("cohort=fixed cohort.size=9", None, 6),
        ("cohort.rate=0.01", None, 1),
        ("cohort=fixed cohort.size=9", Stacks(10, 20), 1),
        ("cohort=fixed cohort.size=9", Stacks(4, 20), 2),
        ("cohort=fixed cohort.size=9", Stacks(10, 2), 5),
    ],
)
def test_a_trial_ends_in_no_more_workers_than_shares(
    said: str, stacks: Stacks | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.simulations.clients.cores", lambda: 6)
    federation = build(settings_from_overrides(["task=digits", "task.num_clients=10", *said.split()]))
    told = ClientSettings("digits", LocalTraining())
    clients = engines.clients_of(federation, told, 10, at_once=True)
    assert federation.settings.engine.workers is None
    assert clients.most_workers(stacks) == most


@pytest.mark.parametrize(
    ("clients", "size"), [(0, 1), (1, 1), (95, 95), (96, 48), (128, 64), (129, 65), (300, 75), (1000, 125)]
)
def test_stacks_follow_from_the_cohort_alone(clients: int, size: int) -> None:
    assert Stacks(48, 128).size(clients) == size


def test_training_process_reuses_its_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr("fedveil.client.workbench.keep_freed", lambda: kept.append(1))
    settings = ClientSettings("digits", LocalTraining(), {"num_clients": 10})
    assert Workbench(settings).model is not None and kept == [1]
