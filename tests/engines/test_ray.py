"""``engine=ray``: fedveil's own engine in Ray's actors. Ray starts once for all tests of this file."""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from safetensors.numpy import load_file
from shared.runs import json_lines, run_quietly

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.client.private_update import private_update
from fedveil.engines.ray import DIED, RayGrid, _Shares, _start_ray, ray_grid
from fedveil.engines.settings import Ray
from fedveil.messages.secure_wire import USUAL, read_position
from fedveil.messages.wire import FAILED, LATE, SECURE_RECORD, Exchange, instruct, memory_arrays
from fedveil.privacy.audit import round_rows
from fedveil.privacy.audit.canary_clients import coins_of
from fedveil.privacy.mechanisms.private_sum import CohortSum
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.server.secure_sum import SecureSums
from fedveil.simulations.in_process import InProcessGrid, Stacks

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


SETTINGS = Ray(num_cpus=1.0)
TWO = ("engine=ray", "engine.num_cpus=2")


@pytest.fixture(scope="module", autouse=True)
def ray_starts_once() -> Iterator[None]:
    """Keep Ray running between the tests: as many CPUs as the first asks for would be there, so two are."""
    import ray

    _start_ray(Ray(num_cpus=2.0))
    with pytest.MonkeyPatch.context() as patch:
        shutdown = ray.shutdown
        patch.setattr(ray, "shutdown", lambda: None)
        yield
        shutdown()
        gc.collect()


def clients_of(app: ClientApp, count: int, deadline: float = 20.0) -> Any:
    """Return a recipe of clients that run this app; it goes to the actors by value."""

    def grid() -> InProcessGrid:
        return InProcessGrid(app, count, {}, deadline=deadline)

    return SimpleNamespace(grid=grid, count=count, invited=count, deadline=deadline)


def model_of(folder: Path, *overrides: str) -> tuple[bytes, dict[str, Any]]:
    common = [
        "task=digits",
        "task.num_clients=20",
        "num_rounds=3",
        "faults.dropout=0.1",
        "faults.corrupt=0.1",
        "evaluate.clients=every:2",
    ]
    outcome = run_quietly([*common, *overrides], folder)
    return (folder / "model.safetensors").read_bytes(), outcome.result


def test_ray_and_the_in_process_engine_train_the_same_bits(tmp_path: Path) -> None:
    """Faults keep the in-process engine from training the cohort at once, which is equal to tolerance only."""
    here, expected = model_of(tmp_path / "here")
    ray, result = model_of(tmp_path / "ray", *TWO)
    assert ray == here
    for key in ("status", "rounds_completed", "privacy", "metrics", "noise_multiplier", "evaluations"):
        assert result[key] == expected[key]
    assert [each["round"] for each in result["evaluations"]] == [2, 3]
    told, also = (
        (tmp_path / name / "operator.jsonl").read_text().splitlines()[:-1] for name in ("here", "ray")
    )
    assert told == also and any(json.loads(line)["dropped"] for line in told)


def test_layers_that_stay_on_ray_are_those_of_one_process(tmp_path: Path) -> None:
    common = [
        "task=digits",
        "task.num_clients=20",
        "num_rounds=2",
        "personal=layers",
        "personal.layers=[*bias]",
    ]
    files: list[dict[Path, bytes]] = []
    for name, engine in (("here", ()), ("ray", TWO)):
        run_quietly([*common, *engine], tmp_path / name)
        own = (tmp_path / name / "personal").rglob("0*.safetensors")
        paths = [*own, tmp_path / name / "model.safetensors"]
        files.append({path.relative_to(tmp_path / name): path.read_bytes() for path in paths})
    assert files[0] == files[1]
    assert len(files[0]) > 1


def test_stacked_clients_on_ray_give_their_sum_with_their_only_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks differ, so that the sums agree to rounding; no actor is asked for a sum again."""
    taken: list[list[list[int]]] = []
    take, made = RayGrid._take, RayGrid.__post_init__

    def of_few(self: RayGrid) -> None:
        made(self)
        assert (
            self._stacks and self._stacks.size(20) == 20
        )  # of so small a model one actor would train them all
        self._stacks = Stacks(1, 5)

    def noted(self: RayGrid, added: Any, index: int, shares: _Shares, total: CohortSum) -> bool:
        taken.append([list(given) for given in shares.shares])
        return take(self, added, index, shares, total)

    monkeypatch.setattr(RayGrid, "_take", noted)
    monkeypatch.setattr(RayGrid, "__post_init__", of_few)
    keys: dict[str, Any] = {"num_rounds": 2, "quiet": True, "cohort": "all", "seed": 1}
    here, ray = (
        fv.simulate({"name": "digits", "num_clients": 20}, engine=engine, **keys)
        for engine in ({}, {"name": "ray", "num_cpus": 2})
    )
    first, again = [len(given) for given in taken[0]], [len(given) for given in taken[1]]
    assert len(taken) == 4 and first == [10, 10] and sorted(again) == [0, 10]
    assert (ray.status, ray.result["privacy"]) == ("completed", here.result["privacy"])
    given, expected = (load_file(run.folder / "model.safetensors") for run in (ray, here))
    for name in expected:
        np.testing.assert_allclose(given[name], expected[name], atol=1e-4)


def test_several_stacks_on_ray_train_the_same_bits(tmp_path: Path) -> None:
    job = [
        "task=digits",
        "task.num_clients=140",
        "cohort.rate=0.96",
        "privacy=none",
        "num_rounds=2",
        "seed=1",
    ]
    for name, engine in (("here", ()), ("ray", TWO)):
        run_quietly([*job, *engine], tmp_path / name)
    here, ray = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("here", "ray"))
    assert ray == here


@pytest.mark.campaign
def test_a_strategy_object_on_ray_combines_as_in_one_process() -> None:
    """The strategy stays in the process that called; only the clients' app goes to Ray's workers."""
    strategy = Halving(fraction_evaluate=0.0)
    keys: dict[str, Any] = {"strategy": strategy, "num_rounds": 2, "quiet": True, "faults": {"dropout": 0.1}}
    here = fv.simulate({"name": "digits", "num_clients": 20}, **keys)
    ray = fv.simulate({"name": "digits", "num_clients": 20}, engine={"name": "ray", "num_cpus": 2}, **keys)
    assert (ray.status, ray.result["strategy"]) == ("completed", "object:Halving")
    assert (ray.folder / "model.safetensors").read_bytes() == (here.folder / "model.safetensors").read_bytes()
    plain = fv.simulate({"name": "digits", "num_clients": 20}, **{**keys, "strategy": None})
    assert ray.metrics["loss"] != plain.metrics["loss"]


@pytest.mark.campaign
def test_canary_clients_on_ray_show_the_same_as_in_process(tmp_path: Path) -> None:
    """Noise so small that all leaks: the audit sees it, and the same in both places, bit for bit."""
    canaries = ("audit=full", "audit.canaries=20", "audit.looks=1", "audit.on_alarm=note", "cohort=all")
    small = ("privacy.noise_multiplier=0.05", "privacy.target_epsilon=null", "privacy.target_delta=0.01")
    here, expected = model_of(tmp_path / "here", *canaries, *small)
    ray, result = model_of(tmp_path / "ray", *TWO, *canaries, *small)
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
    # With the usual seed faults spoil the last round of an encrypted sum, and the look at it.
    together = ("privacy=record_distributed", "audit=full", "audit.looks=1", f"secagg={secagg}", "seed=1")
    here, expected = model_of(tmp_path / "here", *together)
    ray, result = model_of(tmp_path / "ray", *TWO, *together)
    assert ray == here and result["status"] == "completed"
    for key in ("privacy", "metrics", "noise_multiplier", "audit"):
        assert result[key] == expected[key]
    assert 2.9 < result["audit"]["records"]["claimed"] < 3.0  # evaluations have the rest


@pytest.mark.campaign
def test_an_interrupted_run_ends_in_order(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt_after_a_round() -> None:
        end = time.monotonic() + 60
        while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_after_a_round, daemon=True).start()
    overrides = [*TWO, "task=digits", "task.num_clients=20", "num_rounds=200"]
    outcome = run_quietly(overrides, tmp_path)
    assert outcome.exit_code == 130
    assert 0 < outcome.result["rounds_completed"] < 200
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_late_and_failing_clients_answer_with_an_error() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        match context.node_config["partition-id"]:
            case 0:
                time.sleep(30)
            case 1:
                raise RuntimeError("down")
        return Message(RecordDict({"m": MetricRecord({"client": 2})}), reply_to=message)

    codes: dict[int, int] = {}
    with (
        pytest.raises(ArithmeticError, match="of the server"),
        ray_grid(clients_of(app, 3, 3.0), SETTINGS) as grid,
    ):
        nodes = list(grid.get_node_ids())
        assert nodes == [2, 3, 4]
        for reply in grid.send_and_receive([Message(RecordDict(), node, "train") for node in nodes]):
            codes[reply.metadata.src_node_id - 2] = reply.error.code if reply.has_error() else 0
        raise ArithmeticError("of the server")
    assert codes[0] == LATE
    assert codes[1] not in (0, LATE)
    assert codes[2] == 0


@pytest.mark.campaign
def test_dying_actor_costs_its_clients_and_is_replaced(tmp_path: Path) -> None:
    """Its part of the sum is lost with it; what others added counts."""
    app, note, spec = ClientApp(), tmp_path / "killed", SumSpec(100.0)

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        client = int(str(context.node_config["partition-id"]))
        if client == 20 and not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        moved = memory_arrays({"w": np.full(4, client, np.float32)})
        return Message(RecordDict({"a": moved, "m": MetricRecord({})}), reply_to=message)

    start = RecordDict({"arrays": memory_arrays({"w": np.zeros(4, np.float32)}), "config": ConfigRecord({})})
    order = Message(instruct(start, spec, "run", 1), 0, "train")
    with ray_grid(clients_of(app, 24), Ray(num_cpus=2.0)) as grid:
        nodes = list(grid.get_node_ids())
        first, again = (grid.sum_replies(order, nodes, spec, 4) for _ in range(2))
    assert first.replies + first.dropped[DIED] == 24 and first.dropped[DIED] >= 1
    assert again.replies == 24 and not again.dropped
    np.testing.assert_allclose(again.total * spec.step, sum(range(24)), atol=0.01)


def test_shares_are_dealt_until_none_is_left_and_state_stays_at_home() -> None:
    shares = _Shares(range(2, 22), {5: 1, 9: 1}, 2)
    assert shares.next(1) == [5, 9]
    sizes = []
    while share := shares.next(len(sizes) % 2):
        sizes.append(len(share))
    assert sizes == sorted(sizes, reverse=True) and sizes[:2] == [7, 3] and sum(sizes) == 18
    assert sorted(shares.shares[0] + shares.shares[1]) == list(range(2, 22))


def test_stacked_clients_are_dealt_in_even_shares_of_which_each_pays() -> None:
    shares = _Shares(range(7), {}, 3, stack=1)
    assert [len(shares.next(index)) for index in (0, 1, 2, 0)] == [3, 3, 1, 0]
    few = _Shares(range(7), {}, 3, stack=4)
    assert [len(few.next(index)) for index in (0, 1, 2)] == [4, 3, 0]


def answered(grid: RayGrid, node: int) -> bool:
    (reply,) = grid.send_and_receive([Message(RecordDict(), node, "train")])
    return not reply.has_error() or reply.error.code == FAILED  # of the app, which is there


@pytest.mark.campaign
def test_an_actor_killed_at_any_stage_of_secure_aggregation(tmp_path: Path) -> None:
    """A round for each exchange; in it the actor dies once, in the hands of the third client."""
    masked = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "masked_clients.py"))
    asked, everybody = masked["wanted"](3.0), list(range(2, 2 + masked["CLIENTS"]))

    def die(message: Message, client: int) -> None:
        if SECURE_RECORD not in message.content:  # of `answered`
            return
        place = read_position(message.content)
        note = tmp_path / f"{place.round}"
        if client == 2 and place.exchange == place.round - asked.row and not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with ray_grid(clients_of(masked["app_of"](die), len(everybody)), Ray(num_cpus=2.0)) as grid:
        sums = SecureSums(grid, masked["masking"]())
        for stage in USUAL:
            opened = sums.sum(everybody, replace(asked, row=asked.row + stage), 60.0)
            print(stage.name, opened.survivors, opened.dropped, opened.attempts)
            assert (tmp_path / f"{asked.row + stage}").exists() and answered(grid, 2)
        last = sums.sum(everybody, replace(asked, row=asked.row + len(Exchange)), 60.0)
    assert last.survivors == len(everybody)


CLUSTER = """
import subprocess, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster

command, rows, lose = sys.argv[3:], Path(sys.argv[1], "metrics.jsonl"), sys.argv[2] == "lose"
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
run = subprocess.Popen([*command, f"engine.address={cluster.address}"])
while lose and run.poll() is None and (not rows.exists() or len(rows.read_text().splitlines()) < 3):
    time.sleep(0.05)
if lose:
    cluster.remove_node(second)
code = run.wait()
cluster.shutdown()
sys.exit(code)
"""


@pytest.mark.campaign
@pytest.mark.parametrize("fate", ["keep", "lose"])
def test_cluster_of_two_nodes_outlives_one_and_trains_the_same_model(tmp_path: Path, fate: str) -> None:
    """Each node has one CPU, and so one of two actors. Faults keep clients from being stacked."""
    folder, rounds = tmp_path / "ray", 6 if fate == "keep" else 40
    job = ["task=digits", "task.num_clients=20", f"num_rounds={rounds}", "faults.corrupt=0.1", "cohort=all"]
    train = [sys.executable, "-m", "fedveil", "simulate", *job]
    told = [str(folder), fate, *train, "engine=ray", f"hydra.run.dir={folder}"]
    ended = subprocess.run(
        [sys.executable, "-c", CLUSTER, *told], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["rounds_completed"]) == ("completed", rounds)
    rows = json_lines(folder / "operator.jsonl")
    lost = [row["dropped"].get(DIED, 0) for row in rows if "dropped" in row]
    if fate == "lose":
        assert sum(count > 0 for count in lost) <= 1 and max(lost) < 20
        return
    assert not any(lost)
    here = run_quietly(job, tmp_path / "here")
    assert here.result["metrics"] == result["metrics"]
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_clients_beyond_any_actor_are_named_and_are_no_lack_of_cpus() -> None:
    def grid() -> InProcessGrid:
        raise ImportError("no module named wards")

    clients: Any = SimpleNamespace(grid=grid, count=2, invited=2, deadline=1.0)
    with (
        pytest.raises(RuntimeError, match="an actor failed: no module named wards"),
        ray_grid(clients, SETTINGS),
    ):
        pass


def test_an_ended_grid_frees_its_cpus_while_it_is_referenced() -> None:
    clients, both = clients_of(ClientApp(), 2), Ray(num_cpus=2.0)
    kept = []
    for _ in range(2):
        with ray_grid(clients, both) as grid:
            kept.append(grid)
    assert [each.actors for each in kept] == [2, 2]


def test_a_ray_that_does_not_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def late(**_: object) -> None:
        raise ConnectionError("The current node timed out.")

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(
        Refusal, match=r"engine='10\.0\.0\.1:1': Ray did not start: The current node timed out"
    ):
        _start_ray(Ray(address="10.0.0.1:1"))


@pytest.mark.parametrize(("late_starts", "starts"), [(2, True), (3, False)])
def test_ray_that_starts_late_is_tried_again(
    late_starts: int, starts: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    attempts: list[object] = []

    def init(**options: object) -> None:
        attempts.append(options)
        if len(attempts) <= late_starts:
            raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with nullcontext() if starts else pytest.raises(Refusal, match="Ray did not start"):
        _start_ray(SETTINGS)
    assert len(attempts) == 3
    assert capsys.readouterr().err.count("trying again: The current node timed out during startup.") == 2


def test_more_actors_than_cpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.engines.ray.START_SECONDS", 2.0)
    with (
        pytest.raises(Refusal, match=r"engine\.num_cpus=3"),
        ray_grid(clients_of(ClientApp(), 3), Ray(num_cpus=3.0)),
    ):
        pass
