"""Own models of a user's Flower app: made by its own functions after the last round, and nothing of them leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import fedveil as fv
from fedveil.adapters.personal_app import PersonalApp
from fedveil.base.refusal import Refusal
from fedveil.personal.choice import LOCAL, SHARED
from fedveil.personal.state import read_own
from fedveil.simulations.in_process import InProcessGrid

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

CLIENTS, ROUNDS, RATE = 12, 3, 0.3
START = ArrayRecord({"w": Array(np.zeros(2, np.float32))})


def target(context: Context) -> np.ndarray:
    """Return what fits a client: a half of the clients has the opposite of the others', and one what is shared."""
    number = int(str(context.node_config["partition-id"]))
    sign = 0 if number == CLIENTS - 1 else (-1) ** number
    return np.float32([sign, 2 * sign])


def weights_of(message: Message) -> np.ndarray:
    return message.content["arrays"]["w"].numpy()  # pyright: ignore


def app_of(folder: Path, fails: bool = False, says: str = "eval_loss") -> tuple[ClientApp, PersonalApp]:
    """Return a regression whose loss is the squared distance to the client's target."""
    app = ClientApp()

    @app.train(mods=[fv.private_update])
    def train(message: Message, context: Context) -> Message:
        if fails:
            raise RuntimeError("patient 17 is not there")
        assert message.content["config"]["rate"] == RATE  # pyright: ignore
        weights = weights_of(message)
        for _ in range(4):
            weights = weights + np.float32(RATE) * (target(context) - weights)
        metrics = MetricRecord({"num-examples": 50, "train_loss": 0.0})
        arrays = ArrayRecord({"w": Array(weights)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate(mods=[fv.private_evaluation])
    def evaluate(message: Message, context: Context) -> Message:
        assert message.metadata.message_type == "evaluate"
        loss = float(np.square(weights_of(message) - target(context)).sum())
        metrics = MetricRecord({says: loss, "num-examples": 40})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app, fv.personal_app(app, train, evaluate, folder=folder)


def grid_of(app: ClientApp) -> InProcessGrid:
    return InProcessGrid(app, CLIENTS, {})


def released(grid: InProcessGrid, home: Path) -> ArrayRecord:
    """Return the final model of a protected run."""
    private = fv.protect(
        grid,
        data_id="shops",
        population=CLIENTS,
        cohort=fv.All(),
        budget=fv.Budget("client", target_epsilon=1000.0, target_delta=1e-2),
        clipping_norm=1.0,
        num_rounds=ROUNDS,
        accept_vacuous=True,
        ledger_dir=home / "ledgers",
    )
    with private as protected:
        strategy = FedAvg(fraction_evaluate=0.0)
        config = ConfigRecord({"rate": RATE})
        result = strategy.start(grid=protected, initial_arrays=START, num_rounds=ROUNDS, train_config=config)
    return result.arrays


def make(grid: InProcessGrid, arrays: ArrayRecord, **more: Any) -> int:
    return fv.make_personal(grid, arrays, config=ConfigRecord({"rate": RATE}), **more)


def own_loss(own: PersonalApp, number: int) -> float:
    """Return the loss of a client's own model; that of a model of zeros is 5 for all but the last client."""
    context = Context(0, number + 2, {"partition-id": number}, RecordDict(), {})
    arrays = own.arrays(context)
    assert arrays is not None
    return float(np.square(arrays["w"].numpy() - target(context)).sum())


def test_a_protected_app_ends_with_an_own_model_at_each_client(tmp_path: Path) -> None:
    app, own = app_of(tmp_path / "own")
    grid = grid_of(app)
    arrays = released(grid, tmp_path)
    assert make(grid, arrays) == CLIENTS
    for number in range(CLIENTS - 1):
        assert own_loss(own, number) < 1
    files = sorted((tmp_path / "own").iterdir())
    assert len(files) == CLIENTS and (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_the_clients_reply_with_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app, _ = app_of(tmp_path / "own")
    grid, replies = grid_of(app), list[Message]()
    send = grid.send_and_receive

    def noted(*given: Any, **more: Any) -> list[Message]:
        replies.extend(send(*given, **more))
        return replies

    monkeypatch.setattr(grid, "send_and_receive", noted)
    assert make(grid, START) == CLIENTS
    assert all(not each.has_error() and not dict(each.content.items()) for each in replies)


def test_a_client_trains_once_a_release(tmp_path: Path) -> None:
    app, own = app_of(tmp_path / "own")
    grid = grid_of(app)
    make(grid, START)
    times = {path: path.stat().st_mtime_ns for path in own.folder.iterdir()}
    make(grid, START)
    assert times == {path: path.stat().st_mtime_ns for path in own.folder.iterdir()}
    make(grid, ArrayRecord({"w": Array(np.float32([5, 5]))}))
    assert all(path.stat().st_mtime_ns > before for path, before in times.items())


def test_choice_is_the_shared_model_or_a_local_one_where_those_fit(tmp_path: Path) -> None:
    app, own = app_of(tmp_path / "own")
    grid = grid_of(app)
    far = ArrayRecord({"w": Array(np.float32([40, 40]))})
    make(grid, far, initial=START)
    names = [read_own(path).choice.name for path in own.folder.iterdir()]  # pyright: ignore
    assert set(names) == {LOCAL}
    fitting = ArrayRecord({"w": Array(np.float32([1, 2]))})  # the even clients' target
    make(grid, fitting, initial=START)
    losses = [own_loss(own, number) for number in range(CLIENTS - 1)]
    assert max(losses) < 0.2 and losses[0] == 0
    stored = read_own(own.folder / "client-0.safetensors")
    assert stored is not None and stored.choice.rows == 40


def test_no_reply_says_whether_functions_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for fails, says in ((True, "eval_loss"), (False, "accuracy")):
        app, own = app_of(tmp_path / "own", fails, says)
        grid = grid_of(app)
        kept: list[Message] = []
        send = grid.send_and_receive
        grid.send_and_receive = lambda *given, send=send, kept=kept, **more: (  # type: ignore[method-assign]
            kept.extend(send(*given, **more)) or kept
        )
        assert make(grid, START) == CLIENTS
        assert all(not each.has_error() and not dict(each.content.items()) for each in kept)
        assert not own.folder.exists()
    assert "patient 17" in caplog.text and "reports no loss" in caplog.text  # on the owner's machine
    assert SHARED not in caplog.text.split()


def test_calls_below_one_are_refused() -> None:
    with pytest.raises(Refusal, match="calls=0"):
        fv.personal_app(ClientApp(), lambda m, c: m, lambda m, c: m, folder="own", calls=0)
