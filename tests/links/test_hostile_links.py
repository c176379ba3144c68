"""Strangers, liars and repeaters on the links between a federation's ends: docs/evidence/reliability.md has the table."""

import json
import logging
import random
import runpy
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedveil.base.refusal import Refusal
from fedveil.deployment.settings import server_settings
from fedveil.links.grpc import grid as grid_module
from fedveil.links.grpc import server_end as switchboard
from fedveil.links.grpc.device_end import Endpoint
from fedveil.links.grpc.grid import LinkGrid, ServerEndpoint, open_link
from fedveil.links.roster_watch import admitted_in
from fedveil.links.server_bundle import read_server_bundle
from fedveil.messages.frames import METHOD, Ack, Hello, frames_of, read
from fedveil.messages.message_codec import pack, unpack
from fedveil.messages.secure_wire import messages_of, read_position
from fedveil.messages.wire import (
    DROP_REASONS,
    OWNERS_POLICY,
    UNREADABLE,
    Exchange,
    instruct,
    read_round,
    sum_of,
    view,
)
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.ledger.ledger_state import RESERVE

HERE = Path(__file__).parents[1]
MADE = runpy.run_path(str(HERE / "faults" / "link_ends.py"))
free_port = MADE["free_port"]
Federation, RawClient = MADE["Federation"], MADE["RawClient"]
asking, moved, until = (MADE[name] for name in ("asking", "moved", "until"))
DEVICES = runpy.run_path(str(HERE / "faults" / "devices.py"))
BAD = runpy.run_path(str(HERE / "messages/test_wire.py"))
NODES = (2, 3)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Federation(tmp_path_factory.mktemp("federation"), NODES)


@pytest.fixture
def grid(federation: Any) -> Iterator[LinkGrid]:
    with open_link(federation.door()) as opened:
        yield opened


# --- the network ------------------------------------------------------------------------------------------------


def test_the_link_has_no_plain_text_and_no_setting_for_it(grid: LinkGrid, federation: Any) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{grid.port}") as channel:
        call = channel.stream_stream(METHOD)(iter([]), timeout=10)
        with pytest.raises(grpc.RpcError) as failed:
            next(call)
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Refusal, match="insecure"):
        server_settings(["task=digits", "link.insecure=true"])


@pytest.mark.parametrize("wrong", ["expired", "another host"])
def test_server_with_an_invalid_certificate_is_not_followed(federation: Any, wrong: str) -> None:
    said: list[str] = []
    own = federation.authority._pair("server", 0) if wrong == "expired" else federation.server
    with open_link(replace(federation.door(), credentials=lambda: own)) as grid:
        host = "127.0.0.1" if wrong == "expired" else "localhost"  # which it does not name
        endpoint = Endpoint(f"{host}:{grid.port}", 2, lambda: federation.pairs[2])
        with federation.following(endpoint, moved, said):
            until(lambda: len(said) >= 2)
            assert not grid.connected and all("not connected" in line for line in said)


def test_silent_strangers_hold_up_nobody(
    grid: LinkGrid, federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switchboard, "HELLO_SECONDS", 0.3)
    own = federation.pairs[3]
    credentials = grpc.ssl_channel_credentials(own.ca, own.key, own.certificate)
    with ExitStack() as opened:
        for _ in range(200):
            opened.enter_context(socket.create_connection(("127.0.0.1", grid.port), 20))
        channel = opened.enter_context(grpc.secure_channel(f"127.0.0.1:{grid.port}", credentials))
        mute = channel.stream_stream(METHOD)(iter(SimpleQueue().get, None), timeout=20)
        opened.callback(mute.cancel)
        with federation.following(federation.endpoint(2, grid.port), moved):
            [reply] = grid.send_and_receive([asking(2)], timeout=20)
        assert view(reply.content["arrays"]["x"])[0] == 1.0
        assert mute.details() == "a stream begins with a hello"


# A list in lists, 544 bytes long as a message; a map; and a header that says less than it holds.
BOMBS = (b"\x91" * 500 + b"\x01", b"\x81\xa5bytes" * 500 + b"\x01", b"\xdd\xff\xff\xff\xff")


def bomb(request: Message, value: bytes) -> bytes:
    """Return a reply to a request whose one setting is that value, in the bytes of the link."""
    content = RecordDict({"c": ConfigRecord({"k": 7})})
    good = pack(Message(content, reply_to=request))
    at = 4 + int.from_bytes(good[:4], "little") - 1
    assert good[at] == 7
    header = good[4:at] + value
    return len(header).to_bytes(4, "little") + header + bytes(-(4 + len(header)) % 8)


@pytest.mark.parametrize("value", BOMBS)
def test_bomb_of_a_reply_costs_that_reply(grid: LinkGrid, federation: Any, value: bytes) -> None:
    client = RawClient(federation.endpoint(3, grid.port))
    assert isinstance(client.next(), Hello)
    with ThreadPoolExecutor(1) as pool, federation.following(federation.endpoint(2, grid.port), moved):
        future = pool.submit(list, grid.send_and_receive([asking(2), asking(3)], timeout=20))
        begin, chunk = client.next(), client.next()
        client.send(*frames_of(begin.id, [bomb(unpack(chunk.data), value)]))
        replies = {reply.metadata.src_node_id: reply for reply in future.result()}
    client.close()
    assert replies[3].error.code == UNREADABLE and not replies[2].has_error()


@pytest.mark.parametrize("value", BOMBS)
def test_bomb_of_an_instruction_costs_that_instruction(
    grid: LinkGrid, federation: Any, value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = grid_module.segments
    with federation.following(federation.endpoint(2, grid.port), moved):
        asked = asking(2)
        monkeypatch.setattr(grid_module, "segments", lambda head, body: [bomb(asked, value)])
        assert not list(grid.send_and_receive([asked], timeout=1))
        monkeypatch.setattr(grid_module, "segments", sound)
        [reply] = grid.send_and_receive([asking(2)], timeout=20)
    assert not reply.has_error()


# --- what comes again, later, or in another order -----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_replies_shuffled_doubled_and_replayed_count_once_each(
    grid: LinkGrid, federation: Any, seed: int
) -> None:
    draw, client, rounds = random.Random(seed), RawClient(federation.endpoint(2, grid.port)), 6
    assert isinstance(client.next(), Hello)
    earlier: list[list[bytes]] = []
    with ThreadPoolExecutor(1) as pool:
        for exchange in range(2):
            before = grid.counts.get("duplicate", 0)
            asked = [asking(2, value=float(k), run="r", round=k, exchange=exchange) for k in range(rounds)]
            future = pool.submit(list, grid.send_and_receive(asked, timeout=20))
            told = [(client.next(), client.next()) for _ in range(rounds)]
            sends = [
                list(frames_of(begin.id, [pack(moved(unpack(chunk.data)))])) for begin, chunk in told
            ] * 2 + draw.sample(earlier, min(len(earlier), rounds))
            draw.shuffle(sends)
            for frames in sends:
                client.send(*frames)
            got = sorted(float(view(reply.content["arrays"]["x"])[0]) for reply in future.result())
            assert got == [k + 1.0 for k in range(rounds)]
            until(lambda: grid.counts.get("duplicate", 0) == before + len(sends) - rounds)  # noqa: B023
            assert [client.next() for _ in sends] == [Ack(read(frames[0]).id) for frames in sends]
            earlier = sends
    client.close()


@pytest.mark.parametrize("seed", range(2))
def test_repeated_instructions_change_no_round_and_cost_nothing(tmp_path: Path, seed: int) -> None:
    """Before each instruction a device is told some of what it was told before, and after it the same once more."""
    draw = random.Random(seed)
    clients = DEVICES["make_federation"](tmp_path) / "clients"
    devices = {node: DEVICES["device_of"](clients / f"c{node - 2}") for node in range(2, 7)}
    seen: dict[int, list[Message]] = {node: [] for node in devices}
    vectors: Counter[tuple[int, int, int]] = Counter()

    def repeating(message: Message) -> Message:
        node = message.metadata.dst_node_id
        for each in draw.sample(seen[node], min(len(seen[node]), 3)):
            devices[node].answer(each)
        reply = devices[node].answer(message)
        again = devices[node].answer(message)
        seen[node].append(message)
        place = read_position(message.content)
        if place.exchange is Exchange.INBOX:
            assert b"out_of_order" in messages_of(again.content)[0]
            vectors[node, place.round, place.attempt] += not reply.has_error()
        return reply

    grid = DEVICES["Devices"](devices, repeating)
    for number in (1, 2):
        opened = DEVICES["masked_sum"](grid, number)
        assert (opened.survivors, opened.dropped) == (5, {})
    for node, device in devices.items():
        left = sorted((row, attempt) for who, row, attempt in vectors if who == node)
        keys = [json.loads(e.key) for e in read_entries(device.ledger.path) if e.kind == RESERVE]
        assert sorted((row, int(name.split()[1])) for _, row, name in keys) == left == [(1, 0), (2, 0)]
    assert set(vectors.values()) == {1}


# --- updates and orders over the link ---------------------------------------------------------------------------


# Bytes that no packer makes, and kinds that no frame has a name for: messages/test_message_codec.py.
BYTES = ("objects", "complex", "a giant header", "fewer bytes", "more bytes", "a pickle", "no bytes")


def test_every_bad_update_is_dropped_by_name_on_its_way_over_the_link(
    grid: LinkGrid, federation: Any
) -> None:
    names = [name for name in BAD["BAD"] if name not in BYTES]

    def lying(message: Message) -> Message:
        made = BAD["BAD"][names[read_round(message.content)[1]]][0]()
        return Message(made.error if made.has_error() else made.content, reply_to=message)

    def honest(message: Message) -> Message:
        return Message(BAD["vector_reply"](BAD["GOOD"]).content, reply_to=message)

    ends = [federation.endpoint(node, grid.port) for node in NODES]
    with federation.following(ends[0], lying), federation.following(ends[1], honest):
        for number, name in enumerate(names):
            content = instruct(asking(2).content, BAD["SPEC"], "r", number)
            asked = [Message(content, node, "train") for node in NODES]
            summed = sum_of(grid.send_and_receive(asked, timeout=20), BAD["SPEC"], BAD["SIZE"], 2)
            assert summed.total.tolist() == BAD["GOOD"].tolist(), name
            assert summed.dropped in ({BAD["BAD"][name][1]: 1}, {DROP_REASONS[UNREADABLE]: 1}), name


def test_demand_above_the_owners_allowance_is_refused_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = DEVICES["make_federation"](tmp_path, free_port())
    device = DEVICES["device_of"](made / "clients" / "c0")
    order = DEVICES["CENTRAL"]
    weaker = replace(order, client=replace(order.client, noise_multiplier=0.5))  # the owner's least is 1
    bundle = read_server_bundle(made / "server")
    door = ServerEndpoint(
        bundle.listen, lambda: bundle.credentials, lambda: (2,), admitted_in(bundle.admitted, lambda: (2,))
    )
    endpoint = Endpoint(bundle.listen, 2, lambda: device.bundle.credentials)
    with (
        open_link(door) as grid,
        Federation.following(SimpleNamespace(folder=tmp_path), endpoint, device.answer),
    ):
        with caplog.at_level(logging.WARNING, "fedveil.client"):
            [reply] = grid.send_and_receive([DEVICES["in_the_clear"](weaker)], timeout=20)
        assert reply.error.code == OWNERS_POLICY and not device.ledger.path.exists()
        assert "noise_multiplier" in caplog.text and "owner's policy" in caplog.text
        [reply] = grid.send_and_receive([DEVICES["in_the_clear"](order)], timeout=20)
        assert not reply.has_error() and device.ledger.path.exists()
