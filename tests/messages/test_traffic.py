"""Bytes by direction and purpose: what a link counts is what goes over its connections, and a simulation says what would."""

import json
import runpy
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from shared.runs import json_lines

import fedveil as fv
from fedveil.links.grpc.grid import open_link
from fedveil.messages.flower_adapter import claim_identity
from fedveil.messages.notices import RunOver, message_to, renewal_to
from fedveil.messages.secure_wire import Position, ask, with_roster
from fedveil.messages.traffic import (
    Cargo,
    Carried,
    Tally,
    TrafficPurpose,
    cargo_of,
    carried_bytes,
    update_bytes,
)
from fedveil.messages.wire import (
    EVALUATION_KEY,
    LOG_RECORD,
    QUESTION_KEY,
    Exchange,
    instruct,
    memory_arrays,
    reply_with,
)
from fedveil.privacy.mechanisms.sizing import Attendance, size_shares
from fedveil.privacy.mechanisms.sum_spec import SumSpec

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

FAULTS = Path(__file__).parents[1] / "faults"
ENDS = runpy.run_path(str(FAULTS / "link_ends.py"))
Federation, asking, moved, until = (ENDS[name] for name in ("Federation", "asking", "moved", "until"))
counting_relay = runpy.run_path(str(FAULTS / "counting_relay.py"))["counting_relay"]
MODEL = {"arrays": memory_arrays({"w": np.zeros(1000, np.float32)})}
KEYS, CONTROL, TRAINING = TrafficPurpose.KEYS, TrafficPurpose.CONTROL, TrafficPurpose.TRAINING


def sizes_of(carried: Carried) -> dict[str, int]:
    return {"down": sum(carried.down.values()), "up": sum(carried.up.values())}


@pytest.fixture(autouse=True)
def identity() -> None:
    claim_identity(1)


# --- purposes ---


def order(content: Mapping[str, Any]) -> Message:
    return Message(instruct(RecordDict(dict(content)), SumSpec(1.0), "run", 1), 2, "train")


def secure(exchange: Exchange, content: Mapping[str, Any] = {}) -> Message:
    spec = size_shares(SumSpec(1.0), 1000, Attendance(10, 6), 1.0, 16, layered=True)
    asked = with_roster(ask([b"s" * 500], spec, Position("run", 1, 0, exchange)), b"r" * 700)
    return Message(RecordDict({**content, **asked}), 2, "train")


def test_a_model_and_its_update_are_training() -> None:
    cargo = cargo_of(order(MODEL))
    assert set(cargo.down) == {TRAINING} and cargo.up(4000) == {TRAINING: 1.0}


@pytest.mark.parametrize(
    ("key", "purpose"),
    [(QUESTION_KEY, TrafficPurpose.QUESTIONS), (EVALUATION_KEY, TrafficPurpose.EVALUATION)],
)
def test_questions_and_evaluations_are_counted_apart(key: str, purpose: TrafficPurpose) -> None:
    cargo = cargo_of(order({**MODEL, "config": ConfigRecord({key: "how many?"})}))
    assert set(cargo.down) == {purpose} and cargo.purpose == purpose


def test_keys_and_shares_are_counted_apart_from_their_vectors() -> None:
    for exchange in (Exchange.PROPOSAL, Exchange.COHORT, Exchange.PARCELS, Exchange.SURVIVORS):
        cargo = cargo_of(secure(exchange))
        assert cargo.purpose == KEYS and cargo.up(500) == {KEYS: 1.0}
        assert cargo.down[KEYS] > 500 and cargo.down[CONTROL] > 700 and TRAINING not in cargo.down
    cargo = cargo_of(secure(Exchange.INBOX, MODEL))
    assert cargo.down[TRAINING] > 4000 and cargo.down[KEYS] > 500
    assert cargo.vector == 2 * 1000
    assert cargo.up(2300) == {TRAINING: 2000.0, KEYS: 300.0} and cargo.up(60) == {TRAINING: 1.0}


def test_other_bytes_are_control() -> None:
    assert cargo_of(renewal_to(2, "certificate")) == Cargo({CONTROL: 22.0}, CONTROL)
    over = cargo_of(message_to(2, RunOver("run", "completed", 1, {"w": np.zeros(1000, np.float32)})))
    assert over.down[TRAINING] > 4000 and over.purpose == CONTROL  # a receipt
    logged = RecordDict({**order(MODEL).content, LOG_RECORD: ConfigRecord({"leaves": [b"l" * 32] * 10})})
    assert cargo_of(Message(logged, 2, "train")).down[CONTROL] > 320


def test_arrays_beyond_this_link_have_a_size_all_the_same() -> None:
    arrays = memory_arrays({"w": np.zeros(1000, np.complex64)})
    assert 8000 < carried_bytes(order({"arrays": arrays})) < 8500


def test_a_tally_divides_and_loses_nothing() -> None:
    tally = Tally()
    for _ in range(3):
        tally.add("down", {TRAINING: 2.0, KEYS: 1.0}, 100)
    before = tally.total()
    assert before == Carried({"training": 200, "keys": 100}, {})
    tally.add("up", {CONTROL: 1.0}, 7)
    assert tally.total().minus(before) == Carried({}, {"control": 7})
    assert before + tally.total().minus(before) == tally.total()


# --- runs ---


@pytest.mark.parametrize("mode", ["none", "client_central"])
def test_simulation_reports_the_traffic_of_a_link_where_allowed(tmp_path: Path, mode: str) -> None:
    privacy = {"none": fv.NoPrivacy(), "client_central": fv.ClientCentral()}[mode]
    folder = tmp_path / "run"
    run = fv.simulate("digits", num_rounds=2, quiet=True, privacy=privacy, folder=folder)
    result, told = run.result, lines_of(folder / "metrics.jsonl")
    assert all(set(row["message_bytes"]) == {"down", "up"} for row in told)
    if mode == "client_central":  # who was drawn is secret, and bytes count them
        assert result["bytes"] is None and [row["bytes"] for row in told] == [None, None]
        told = [row for row in lines_of(folder / "operator.jsonl") if "round" in row]
        assert not (folder / "operator.jsonl").stat().st_mode & 0o077
    else:
        assert result["bytes"]["source"].startswith("estimated: simulated")
        assert result["bytes"]["down"] == {"training": sum(row["bytes"]["down"]["training"] for row in told)}
    for row in told:
        sizes = result["message_bytes"]
        assert row["bytes"]["down"] == {"training": row["invited"] * sizes["down"]}
        assert row["bytes"]["up"] == {"training": row["replies"] * sizes["up"]}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return json_lines(path)


# --- the gRPC link, held against a relay ---


@pytest.fixture
def federation(tmp_path: Path) -> Any:
    return Federation(tmp_path, (2, 3))


def test_bytes_counted_by_the_grpc_link_pass_a_relay(federation: Any) -> None:
    with open_link(federation.door()) as grid, counting_relay(grid.port) as relay:
        with federation.following(federation.endpoint(2, relay.port), moved):
            until(lambda: grid.connected)
            for number, size in enumerate((5, 5, 5, 1000, 300_000)):
                list(grid.send_and_receive([asking(2, size, run="run", round=number)], timeout=20))
        until(lambda: sizes_of(grid.tally.total()) == pytest.approx(relay.bytes, rel=0.005))
        tally = grid.tally.total()
    assert tally.down["training"] > 4 * 301_000 and tally.up["training"] > 4 * 301_000


def test_a_reply_that_nobody_waits_for_is_lost(federation: Any) -> None:
    begun, free = threading.Event(), threading.Event()

    def late(message: Message) -> Message:
        begun.set()
        assert free.wait(20)
        return moved(message)

    with open_link(federation.door()) as grid:
        ends = [federation.endpoint(node, grid.port) for node in (2, 3)]
        with federation.following(ends[0], late), federation.following(ends[1], moved):
            replies = grid.send_and_receive([asking(2, 1000), asking(3)], timeout=20)
            assert next(replies).metadata.src_node_id == 3
            assert begun.wait(20)
            replies.close()
            free.set()
            until(lambda: grid.tally.total().up.get("lost", 0) > 4000)
        assert grid.tally.total().up["training"] < 1000  # of the other


def test_a_message_has_the_size_that_the_link_counts(federation: Any) -> None:
    spec, vector = SumSpec(1.0), np.zeros(1000, np.int32)
    instruction = order(MODEL)
    with open_link(federation.door()) as grid:
        with federation.following(federation.endpoint(2, grid.port), lambda m: reply_with(vector, spec, m)):
            until(lambda: grid.connected)
            list(grid.send_and_receive([instruction], timeout=20))
        tally = grid.tally.total()
    assert carried_bytes(order(MODEL)) == pytest.approx(tally.down["training"], abs=60)
    assert update_bytes(spec, 1000) == pytest.approx(tally.up["training"], abs=60)


# --- whole runs, held against a relay ---

COMMON = ("task=digits", "num_rounds=3", "batch_size=40", "link.wait=60", "link.clients=1")
RUNS = {
    "clear": ("privacy=record", "privacy.target_epsilon=3"),  # of 80 that owners allow for both
    "masked": (
        "privacy=client_distributed",
        "privacy.target_epsilon=5",
        "privacy.allow_large_delta=true",
        "accept_vacuous=true",
    ),
}


@pytest.fixture(scope="module", params=["grpc", "flower"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = runpy.run_path(str(FAULTS / "served.py"))
    listen = made["free_port"]()
    with (
        counting_relay(listen) as relay,
        made["serving"](
            made["Served"], tmp_path_factory.mktemp("served"), request.param, ports=(relay.port, listen)
        ) as world,
    ):
        yield world, relay


@pytest.mark.parametrize("kind", RUNS)
def test_a_federation_of_the_campaign_is_provisioned_and_begins(tmp_path: Path, kind: str) -> None:
    made = runpy.run_path(str(FAULTS / "served.py"))
    made["begins"](made["make_federation"](tmp_path, link="flower"), [*COMMON, *RUNS[kind], "run=run"])


@pytest.mark.campaign
@pytest.mark.parametrize("kind", RUNS)
def test_the_bytes_of_a_run_are_those_that_a_relay_counts(served: Any, kind: str) -> None:
    world, relay = served
    relay.bytes.clear()
    server = world.hearts / "server"
    process = world.start("server", server, *COMMON, *RUNS[kind], f"run={kind}")
    assert process.wait() == 0, process.said
    folder = server / "runs" / kind
    result, farewell = (json.loads((folder / name).read_text()) for name in ("result.json", "farewell.json"))
    rows = json_lines(folder / "metrics.jsonl")
    counted = {way: sum((*result["bytes"][way].values(), *farewell[way].values())) for way in ("down", "up")}
    print(kind, counted, dict(relay.bytes), relay.connections, result["bytes"], farewell)
    assert counted == pytest.approx(relay.bytes, rel=0.02)
    assert result["bytes"]["source"] == "counted by the link"
    for way in ("down", "up"):
        by_round = sum((Carried(**row["bytes"]) for row in rows), start=Carried())
        assert getattr(by_round, way)["training"] == pytest.approx(result["bytes"][way]["training"], rel=0.01)
    assert ("keys" in result["bytes"]["up"]) == (kind == "masked")
