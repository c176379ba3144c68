"""``engine=ray``: the same apps on Flower's own runtime. Ray starts once for all tests of this file."""

import gc
import json
import os
import runpy
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import fedveil as fv
from fedveil.configs.schema import Ray
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.audit import round_rows
from fedveil.privacy.audit.canary_clients import coins_of
from fedveil.privacy.ledger.caps import default_folder
from fedveil.privacy.ledger.ledger import verify
from fedveil.server.secure_sum import SecureSums
from fedveil.simulations.deadline import LATE, within
from fedveil.simulations.flower_grid import FlowerGrid
from fedveil.simulations.ray import ray_grid
from fedveil.simulations.simulate import simulate
from fedveil.strategies.secure_wire import SECURE_RECORD, USUAL, Exchange, read_place
from fedveil.strategies.wire import FAILED

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'fedveil[ray]'"),
    # Ray leaves files and pipes of the processes it starts to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Halving(FedAvg):
    """Takes half of what the clients' arrays come to."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        halved = {name: Array(array.numpy() * np.float32(0.5)) for name, array in arrays.items()}
        return ArrayRecord(halved), metrics


DOCUMENTED: dict[str, Any] = runpy.run_path(str(Path(__file__).parent / "examples" / "documented.py"))
SETTINGS = Ray(deadline=20.0, num_cpus=1.0)


@pytest.fixture(scope="module", autouse=True)
def ray_starts_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep Ray running between the tests; its workers find the documented app on their path."""
    import ray

    folder = tmp_path_factory.mktemp("documented")
    DOCUMENTED["write_app"](folder, DOCUMENTED["documented_edits"]())
    with pytest.MonkeyPatch.context() as patch:
        shutdown = ray.shutdown
        patch.setattr(ray, "shutdown", lambda: None)
        patch.setenv("PYTHONPATH", str(folder))
        yield folder
        shutdown()
        gc.collect()


def model_of(folder: Path, *overrides: str) -> tuple[bytes, dict[str, Any]]:
    common = [
        "task=digits",
        "task.num_clients=20",
        "num_rounds=3",
        "faults.dropout=0.1",
        "faults.corrupt=0.1",
    ]
    outcome = simulate(settings_from_overrides([*common, *overrides]), folder, quiet=True)
    return (folder / "model.safetensors").read_bytes(), outcome.result


def test_ray_and_the_in_process_engine_train_the_same_model_bit_for_bit(tmp_path: Path) -> None:
    """Faults keep the in-process engine from training the cohort at once, which is equal to tolerance only."""
    here, expected = model_of(tmp_path / "here")
    ray, result = model_of(tmp_path / "ray", "engine=ray", "engine.num_cpus=1")
    assert ray == here
    for key in ("status", "rounds_completed", "privacy", "metrics", "noise_multiplier"):
        assert result[key] == expected[key]
    told, also = (
        (tmp_path / name / "operator.jsonl").read_text().splitlines()[:-1] for name in ("here", "ray")
    )
    assert told == also and any(json.loads(line)["dropped"] for line in told)


@pytest.mark.campaign
def test_a_strategy_object_on_ray_combines_as_in_one_process() -> None:
    """The strategy stays in the process that called; only the clients' app goes to Ray's workers."""
    strategy = Halving(fraction_evaluate=0.0)
    keys: dict[str, Any] = {"strategy": strategy, "num_rounds": 2, "quiet": True, "faults": {"dropout": 0.1}}
    here = fv.simulate({"name": "digits", "num_clients": 20}, **keys)
    ray = fv.simulate({"name": "digits", "num_clients": 20}, engine={"name": "ray", "num_cpus": 1}, **keys)
    assert (ray.status, ray.result["strategy"]) == ("completed", "object:Halving")
    assert (ray.folder / "model.safetensors").read_bytes() == (here.folder / "model.safetensors").read_bytes()
    plain = fv.simulate({"name": "digits", "num_clients": 20}, **{**keys, "strategy": None})
    assert ray.metrics["loss"] != plain.metrics["loss"]


@pytest.mark.campaign
def test_canary_clients_on_ray_show_what_they_show_in_one_process(tmp_path: Path) -> None:
    """Noise so small that all leaks: the audit sees it, and the same in both places, bit for bit."""
    canaries = ("audit=full", "audit.canaries=20", "audit.looks=1", "audit.on_alarm=note", "cohort=all")
    small = ("privacy.noise_multiplier=0.05", "privacy.target_epsilon=null", "privacy.target_delta=0.01")
    here, expected = model_of(tmp_path / "here", *canaries, *small)
    ray, result = model_of(tmp_path / "ray", "engine=ray", "engine.num_cpus=1", *canaries, *small)
    assert ray == here
    assert result["audit"] == expected["audit"] and result["audit"]["canaries"] == 20
    (row,) = round_rows.read(tmp_path / "ray" / "audit.npy", 20)[:1]
    coins = coins_of(
        bytes.fromhex(json.loads((tmp_path / "ray" / "audit.json").read_text())["opened"]["seed"]), 20
    )
    assert row["along"][row["taken"] & coins].mean() > 0.5 > row["along"][~coins].mean()
    assert (tmp_path / "ray" / "audit.npy").read_bytes() == (tmp_path / "here" / "audit.npy").read_bytes()


@pytest.mark.campaign
@pytest.mark.parametrize("secagg", ["auto", "masked"])
def test_records_hidden_together_on_ray_are_those_of_one_process(tmp_path: Path, secagg: str) -> None:
    """Canary records are in the sums as well, and show the same."""
    together = ("privacy=record_distributed", "audit=full", "audit.looks=1", f"secagg={secagg}")
    here, expected = model_of(tmp_path / "here", *together)
    ray, result = model_of(tmp_path / "ray", "engine=ray", "engine.num_cpus=1", *together)
    assert ray == here and result["status"] == "completed"
    for key in ("privacy", "metrics", "noise_multiplier", "audit"):
        assert result[key] == expected[key]
    assert result["audit"]["records"]["claimed"] == pytest.approx(3.0, abs=0.01)


@pytest.mark.campaign
def test_an_interrupted_run_ends_in_order(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt_after_a_round() -> None:
        end = time.monotonic() + 60
        while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_after_a_round, daemon=True).start()
    overrides = ["engine=ray", "engine.num_cpus=1", "task=digits", "task.num_clients=20", "num_rounds=200"]
    outcome = simulate(settings_from_overrides(overrides), tmp_path, quiet=True)
    assert outcome.exit_code == 130
    assert 0 < outcome.result["rounds_completed"] < 200
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_late_and_a_failing_client_answer_with_an_error_and_a_failing_server_is_heard() -> None:
    app = ClientApp()

    @app.train(mods=[within(1.0)])
    def train(message: Message, context: Context) -> Message:
        match context.node_config["partition-id"]:
            case 0:
                time.sleep(30)
            case 1:
                raise RuntimeError("down")
        return Message(RecordDict({"m": MetricRecord({"client": 2})}), reply_to=message)

    codes: dict[int, int] = {}
    with pytest.raises(ArithmeticError, match="of the server"), ray_grid(app, 3, SETTINGS) as grid:
        nodes = list(grid.get_node_ids())
        assert nodes == [2, 3, 4]
        for node in nodes:
            (reply,) = grid.send_and_receive([Message(RecordDict(), node, "train")], timeout=120.0)
            codes[node - 2] = reply.error.code if reply.has_error() else 0
        raise ArithmeticError("of the server")
    assert codes[0] == LATE
    assert codes[1] not in (0, LATE)
    assert codes[2] == 0


def answered(grid: FlowerGrid, node: int, seconds: float) -> bool:
    """Whether a node answers within so many seconds, however often it takes to ask."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        (reply,) = grid.send_and_receive([Message(RecordDict(), node, "train")], timeout=120.0)
        if not reply.has_error() or reply.error.code == FAILED:  # of the app, which is there
            return True
    return False


@pytest.mark.campaign
def test_a_worker_that_is_killed_costs_a_message_and_is_replaced(tmp_path: Path) -> None:
    app, note = ClientApp(), tmp_path / "killed"

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Message(RecordDict(), reply_to=message)

    with ray_grid(app, 2, SETTINGS) as grid:
        (reply,) = grid.send_and_receive([Message(RecordDict(), 2, "train")], timeout=120.0)
        assert reply.has_error()
        assert answered(grid, 3, 30) and answered(grid, 2, 1)


@pytest.mark.campaign
def test_a_worker_killed_at_any_stage_of_secure_aggregation(tmp_path: Path) -> None:
    """A round for each exchange; in it the worker dies once, in the hands of the third client."""
    masked = runpy.run_path(str(Path(__file__).parent / "faults" / "masked_clients.py"))
    asked, everybody = masked["wanted"](3.0), list(range(2, 2 + masked["CLIENTS"]))

    def die(message: Message, client: int) -> None:
        if SECURE_RECORD not in message.content:  # of `answered`
            return
        place = read_place(message.content)
        note = tmp_path / f"{place.round}"
        if client == 2 and place.exchange == place.round - asked.row and not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with ray_grid(masked["app_of"](die), len(everybody), SETTINGS) as grid:
        sums = SecureSums(grid, masked["masking"]())
        for stage in USUAL:
            opened = sums.sum(everybody, replace(asked, row=asked.row + stage), 60.0)
            print(stage.name, opened.survivors, opened.dropped, opened.attempts)
            assert (tmp_path / f"{asked.row + stage}").exists() and answered(grid, 2, 30)
        last = sums.sum(everybody, replace(asked, row=asked.row + len(Exchange)), 60.0)
    assert last.survivors == len(everybody)


def test_a_runtime_that_fails_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: more CPUs for a client than there are."""
    monkeypatch.setattr("fedveil.simulations.ray.CLIENT_RESOURCES", {"num_cpus": 64, "num_gpus": 0.0})
    with pytest.raises(RuntimeError, match="runtime failed"), ray_grid(ClientApp(), 3, SETTINGS) as grid:
        list(grid.send_and_receive([Message(RecordDict(), 2, "train")], timeout=120.0))


@pytest.mark.campaign
def test_the_documented_app_runs_on_ray(
    ray_starts_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    app, config = DOCUMENTED["import_app"](ray_starts_once), DOCUMENTED["RUN_CONFIG"]
    stock = app.client

    def client(message: Message, context: Context) -> Message:
        # As `flwr run` gives it; without it every client fails. Flower wants its own context back as it was.
        given = Context(context.run_id, context.node_id, context.node_config, context.state, config)
        return stock(message, given)

    with ray_grid(cast(ClientApp, client), 40, SETTINGS) as grid:
        app.run(grid)
    (ledger,) = default_folder().glob("*.ledger")
    assert 7.9 < verify(ledger).epsilon <= 8.0
    assert (tmp_path / "final_model.pt").exists()
