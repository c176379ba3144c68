"""The server's end of the link: delivery, who is let in, and what hostile clients cannot do."""

import runpy
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedveil.base.refusal import Refusal
from fedveil.configs.bundle_files import Credentials
from fedveil.links.grpc import grid as link_grid
from fedveil.links.grpc.grid import LinkGrid, open_link
from fedveil.links.roster_watch import admitted_in
from fedveil.messages.frames import PROTOCOL_VERSION, Ack, Begin, Chunk, Hello, frames_of, write
from fedveil.messages.message_codec import pack, unpack
from fedveil.messages.wire import UNREADABLE, view

MADE = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "link_ends.py"))
Authority, Federation, RawClient = (MADE[name] for name in ("MadeAuthority", "Federation", "RawClient"))
asking, moved, until = (MADE[name] for name in ("asking", "moved", "until"))
NODES = (2, 3, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Federation(tmp_path_factory.mktemp("federation"), NODES)


@pytest.fixture(scope="module")
def opened(made: Any) -> Iterator[LinkGrid]:
    with open_link(made.door()) as grid:
        yield grid


@pytest.fixture
def grid(opened: LinkGrid) -> Iterator[LinkGrid]:
    yield opened
    until(lambda: not opened.connected)


@pytest.fixture
def federation(made: Any) -> Iterator[Any]:
    yield made
    made.admit(*NODES)


def values(reply: Message) -> np.ndarray:
    return view(reply.content["arrays"]["x"])


# --- delivery ---------------------------------------------------------------------------------------------------


def test_replies_come_as_they_are_ready_under_their_node(grid: LinkGrid, federation: Any) -> None:
    free = threading.Event()

    def slow(message: Message) -> Message:
        assert free.wait(20)
        return moved(message, 2.0)

    ends = [federation.endpoint(node, grid.port) for node in (2, 3)]
    with federation.following(ends[0], slow), federation.following(ends[1], moved):
        replies = iter(grid.send_and_receive([asking(2), asking(3)], timeout=20))
        first = next(replies)
        free.set()
        second = next(replies)
        assert [first.metadata.src_node_id, second.metadata.src_node_id] == [3, 2]
        assert values(first)[0] == 1.0 and values(second)[0] == 2.0
        assert list(replies) == []


def test_node_within_the_timeout_gets_its_message_and_a_later_one_not(
    grid: LinkGrid, federation: Any
) -> None:
    replies = grid.send_and_receive([asking(2), asking(3)], timeout=20)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, replies)
        time.sleep(0.2)
        with federation.following(federation.endpoint(2, grid.port), moved):
            assert first.result().metadata.src_node_id == 2
    replies.close()
    assert list(grid.send_and_receive([asking(3)], timeout=0.2)) == []
    assert list(grid.get_node_ids()) == list(NODES)


def test_forty_megabytes_go_out_and_come_back(grid: LinkGrid, federation: Any) -> None:
    with federation.following(federation.endpoint(2, grid.port), moved):
        before = sum(grid.tally.total().down.values())
        [reply] = grid.send_and_receive([asking(2, 10_000_000, 3.0)], timeout=60)
        assert values(reply).shape == (10_000_000,) and values(reply).min() == values(reply).max() == 4.0
        assert sum(grid.tally.total().down.values()) - before == pytest.approx(40e6, rel=1e-2)
        until(lambda: grid.connected.get(2) == grid.traffic[2].connected_since)


def test_the_same_question_has_the_same_id_and_another_one_has_not(grid: LinkGrid, federation: Any) -> None:
    handled: list[str] = []

    def handle(message: Message) -> Message:
        handled.append(message.metadata.message_id)
        return moved(message)

    place = {"run": "a", "round": 3}
    with federation.following(federation.endpoint(2, grid.port), handle):
        for message in (
            asking(2, **place),
            asking(2, **place),  # answered from memory
            asking(2, value=1.0, **place),  # another content
            asking(2, run="a", round=4),
            asking(2, attempt=1, **place),
            asking(2),  # of no run
            asking(2),
        ):
            [reply] = grid.send_and_receive([message], timeout=20)
            assert values(reply)[0] == view(message.content["arrays"]["x"])[0] + 1.0
    assert len(handled) == len(set(handled)) == 6
    assert handled[0].startswith("a/3/0/0/2/") and handled[3].startswith("a/3/1/0/2/")


def test_caller_with_enough_answers_may_stop_and_later_ones_count(grid: LinkGrid, federation: Any) -> None:
    begun, free = threading.Event(), threading.Event()

    def slow(message: Message) -> Message:
        begun.set()
        assert free.wait(20)
        return moved(message)

    late = grid.counts.get("late", 0)
    ends = [federation.endpoint(node, grid.port) for node in (2, 3)]
    with federation.following(ends[0], slow), federation.following(ends[1], moved):
        replies = iter(grid.send_and_receive([asking(2), asking(3)], timeout=20))
        assert next(replies).metadata.src_node_id == 3
        assert begun.wait(20)
        replies.close()  # type: ignore[attr-defined]
        free.set()
        until(lambda: grid.counts.get("late", 0) == late + 1)


def test_occupied_address_is_refused(grid: LinkGrid, federation: Any) -> None:
    with pytest.raises(Refusal, match="listen"), open_link(federation.door(f"127.0.0.1:{grid.port}")):
        pass


# --- who is let in ------------------------------------------------------------------------------------------------


def turned_away(endpoint: Any, **options: Any) -> tuple[str, str]:
    client = RawClient(endpoint, **options)
    try:
        return client.ended()
    finally:
        client.close()


def test_client_without_a_valid_certificate_is_barred(grid: LinkGrid, federation: Any) -> None:
    mine = federation.pairs[2]
    other = replace(Authority().client(2), ca=mine.ca)
    strangers = [other, federation.authority.client(2, days=0), Credentials(mine.ca, b"", b"")]
    for pair in strangers:
        assert turned_away(federation.endpoint(2, grid.port, pair))[0] == "UNAVAILABLE"
    assert not grid.connected


def test_a_key_that_is_not_admitted_is_refused_by_name(grid: LinkGrid, federation: Any) -> None:
    pair = federation.authority.client(2)  # signed, but nobody admitted it
    endpoint = federation.endpoint(2, grid.port, pair)
    status, words = turned_away(endpoint)
    assert (status, words.endswith("is not admitted")) == ("PERMISSION_DENIED", True)


def test_a_node_cannot_speak_as_another_and_versions_must_agree(grid: LinkGrid, federation: Any) -> None:
    endpoint = federation.endpoint(2, grid.port)
    assert turned_away(endpoint, hello=Hello(PROTOCOL_VERSION, 3, [])) == (
        "INVALID_ARGUMENT",
        "this key is that of node 2",
    )
    status, words = turned_away(endpoint, hello=Hello(9, 2, []))
    assert status == "FAILED_PRECONDITION" and "protocol 1" in words and "client 9" in words
    assert turned_away(endpoint, hello=Ack("x"))[0] == "INVALID_ARGUMENT"


def test_one_key_on_two_devices_the_second_is_refused(grid: LinkGrid, federation: Any) -> None:
    endpoint = federation.endpoint(2, grid.port)
    with federation.following(endpoint, moved):
        until(lambda: 2 in grid.connected)
        assert turned_away(endpoint) == ("ALREADY_EXISTS", "node 2 is connected already")
        assert len(list(grid.send_and_receive([asking(2)], timeout=20))) == 1


def test_revoked_client_is_disconnected_and_may_be_admitted_again(grid: LinkGrid, federation: Any) -> None:
    said: list[str] = []
    with federation.following(federation.endpoint(2, grid.port), moved, said):
        until(lambda: 2 in grid.connected)
        federation.admit(3, 4)
        until(lambda: 2 not in grid.connected)
        until(lambda: any("not admitted" in line for line in said))
        assert any("was revoked" in line for line in said)
        federation.admit(*NODES)
        until(lambda: 2 in grid.connected)


def test_leaver_of_the_roster_is_not_waited_for_within_an_exchange(federation: Any) -> None:
    nodes = list(NODES)
    door = replace(federation.door(), nodes=lambda: nodes)
    with open_link(door) as grid, federation.following(federation.endpoint(2, grid.port), moved):
        begun = time.monotonic()
        replies = grid.send_and_receive([asking(node) for node in NODES], timeout=60)
        assert next(replies).metadata.src_node_id == 2
        nodes.remove(4)
        nodes.remove(3)
        assert list(replies) == [] and time.monotonic() - begun < 30
        assert list(grid.get_node_ids()) == [2]


def test_late_reply_of_a_leaver_of_the_roster_is_dropped(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_grid, "PRESENCE_SECONDS", 0.1)
    nodes, replied = list(NODES), threading.Event()

    def late(message: Message) -> Message:
        replied.set()
        return moved(message)

    with (
        open_link(replace(federation.door(), nodes=lambda: nodes)) as grid,
        federation.following(federation.endpoint(2, grid.port), moved),
        ThreadPoolExecutor(1) as pool,
    ):
        replies = grid.send_and_receive([asking(node) for node in NODES], timeout=60)
        assert next(replies).metadata.src_node_id == 2
        nodes.remove(3)
        rest = pool.submit(list[Message], replies)
        time.sleep(1.0)  # the exchange notices
        with federation.following(federation.endpoint(3, grid.port), late):
            until(replied.is_set)
            with federation.following(federation.endpoint(4, grid.port), moved):
                assert [each.metadata.src_node_id for each in rest.result(30)] == [4]


def test_grpc_gets_a_certificate_again_only_after_a_change(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It frees the one before, which connections that come at the same time still use: the process would crash.

    The pause lets those take their references that asked before.
    """
    held, asked = [federation.server], list[Any]()
    monkeypatch.setattr(link_grid, "RENEWAL_SECONDS", 0.3)
    true = grpc.dynamic_ssl_server_credentials

    def noted(first: Any, fetch: Any, **more: Any) -> Any:
        asked.append(fetch)
        return true(first, fetch, **more)

    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", noted)
    with open_link(replace(federation.door(), credentials=lambda: held[0])):
        [fetch] = asked
        assert fetch() is None
        held[0] = federation.authority._pair("server", 30)
        begun = time.monotonic()
        assert fetch() is not None
        assert time.monotonic() - begun >= 0.3
        assert fetch() is None


def test_new_server_certificate_is_used_and_nobody_is_cut_off(
    federation: Any,
) -> None:
    held, said = [federation.server], list[str]()
    door = replace(federation.door(), credentials=lambda: held[0])
    with open_link(door) as grid:

        def shown() -> str:
            return ssl.get_server_certificate(("127.0.0.1", grid.port))

        assert shown().encode() == federation.server.certificate
        with federation.following(federation.endpoint(2, grid.port), moved, said):
            until(lambda: 2 in grid.connected)
            held[0] = federation.authority.server()
            assert shown().encode() == held[0].certificate != federation.server.certificate
            with federation.following(federation.endpoint(3, grid.port), moved):
                until(lambda: 3 in grid.connected)
                assert len(list(grid.send_and_receive([asking(2), asking(3)], timeout=20))) == 2
            assert len([line for line in said if line.startswith("connected")]) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", '{"short": 2}', '{"' + "0" * 64 + '": 1}', '{"' + "0" * 64 + '": true}']
)
def test_a_damaged_list_admits_nobody_until_it_is_mended(tmp_path: Path, text: str) -> None:
    path = tmp_path / "admitted.json"
    admitted = admitted_in(path, lambda: [2, 3])
    assert admitted() == {}
    path.write_text('{"' + "0" * 64 + '": 2}')
    assert admitted() == {"0" * 64: 2}
    path.write_text('{"' + "0" * 64 + '": 4}')  # a list that is newer than the roster, or older
    assert admitted() == {}
    path.write_text(text)
    assert admitted() == {}


# --- hostile clients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames",
    [
        [b"garbage"],
        [b"\x00" * 5000],
        [write(Chunk(b"of nothing"))],
        [write(Begin("id", 0))],
        [write(Begin("id", 1 << 40))],
        [write(Begin("id", 8)), write(Begin("id", 8))],
        [write(Begin("id", 8)), write(Chunk(bytes(9)))],
        [write(Hello(1, 2, []))],
        [write(Ack("id"))],
    ],
    ids=range(9),
)
def test_frames_that_are_none_or_out_of_order_end_the_stream(
    grid: LinkGrid, federation: Any, frames: list[bytes]
) -> None:
    client = RawClient(federation.endpoint(2, grid.port))
    client.send(*frames)
    assert client.ended()[0] == "INVALID_ARGUMENT"
    client.close()


def test_a_frame_beyond_the_limit_is_not_read(grid: LinkGrid, federation: Any) -> None:
    client = RawClient(federation.endpoint(2, grid.port))
    client.send(bytes(1 << 24))
    assert client.ended()[0] == "RESOURCE_EXHAUSTED"
    client.close()


def test_endless_replies_without_acknowledgements_end_the_stream(grid: LinkGrid, federation: Any) -> None:
    client = RawClient(federation.endpoint(2, grid.port))
    frames, before = list(frames_of("x" * 250, [b"y"])), grid.counts.get("invalid_argument", 0)
    for _ in range(4000):
        client.send(*frames)
    until(lambda: grid.counts.get("invalid_argument", 0) > before and not grid.connected)
    client.close()


class Answering:
    """A raw client of node 2 that has one instruction at hand; the others that are asked are away."""

    def __init__(
        self, grid: LinkGrid, federation: Any, nodes: tuple[int, ...] = (2,), run: str = "r"
    ) -> None:
        self.client = RawClient(federation.endpoint(2, grid.port))
        self.journal = federation.folder / "journal-2"
        assert isinstance(self.client.next(), Hello)
        self.got: list[Message] = []
        asked = [asking(node, run=run, round=1) for node in nodes]
        self._asking = threading.Thread(
            target=lambda: self.got.extend(grid.send_and_receive(asked, timeout=20))
        )
        self._asking.start()
        begin, chunk = self.client.next(), self.client.next()
        self.name, self.message = begin.id, unpack(chunk.data)

    def reply(self, data: bytes, name: str | None = None) -> None:
        """Answer, and remember it as a device does: one that does not is taken for a restored one."""
        with open(self.journal, "a") as journal:
            journal.write(f"\n{self.name}")
        self.client.send(*frames_of(name or self.name, [data]))

    def end(self) -> list[Message]:
        self._asking.join(30)
        self.client.close()
        return self.got


def test_the_first_reply_counts_and_a_second_one_is_counted_as_that(grid: LinkGrid, federation: Any) -> None:
    before = grid.counts.get("duplicate", 0)
    answering = Answering(grid, federation, nodes=(2, 3))
    for by in (1.0, 5.0):
        answering.reply(pack(moved(answering.message, by)))
    assert [answering.client.next(), answering.client.next()] == [Ack(answering.name)] * 2
    with federation.following(federation.endpoint(3, grid.port), lambda message: moved(message, 3.0)):
        assert [values(reply)[0] for reply in answering.end()] == [1.0, 3.0]
    assert grid.counts["duplicate"] == before + 1


def test_replies_to_other_messages_and_to_others_are_not_delivered(grid: LinkGrid, federation: Any) -> None:
    before = grid.counts.get("late", 0)
    answering = Answering(grid, federation)
    older = answering.name.replace("r/1/0", "r/0/0")
    other = answering.name.replace("/2/", "/3/")
    for name in (older, other, "unheard of"):
        answering.reply(pack(moved(answering.message, 5.0)), name)
    answering.reply(pack(moved(answering.message)))
    assert [values(reply)[0] for reply in answering.end()] == [1.0]
    assert grid.counts["late"] == before + 3


def test_claims_of_a_reply_about_itself_do_not_count(grid: LinkGrid, federation: Any) -> None:
    answering = Answering(grid, federation)
    reply = moved(answering.message)
    reply.metadata.__dict__["_src_node_id"] = 3
    answering.reply(pack(reply))
    assert [reply.metadata.src_node_id for reply in answering.end()] == [2]


@pytest.mark.parametrize("wrong", ["garbage", "other message"])
def test_a_reply_that_cannot_be_read_drops_the_client_at_once(
    grid: LinkGrid, federation: Any, wrong: str
) -> None:
    answering = Answering(grid, federation)
    reply = moved(answering.message)
    reply.metadata.__dict__["_reply_to_message_id"] = "another"
    answering.reply(pack(reply) if wrong == "other message" else b"garbage")
    [got] = answering.end()
    assert got.error.code == UNREADABLE and got.metadata.src_node_id == 2
    assert got.metadata.reply_to_message_id == answering.name


def test_a_reply_larger_than_its_instruction_allows_ends_the_stream(grid: LinkGrid, federation: Any) -> None:
    answering = Answering(grid, federation, run="large")
    answering.client.send(write(Begin(answering.name, (1 << 20) + 5000)))
    assert answering.client.ended()[0] == "INVALID_ARGUMENT"
    with federation.following(federation.endpoint(2, grid.port), moved):
        assert [values(reply)[0] for reply in answering.end()] == [1.0]


def test_an_errors_text_does_not_travel(grid: LinkGrid, federation: Any) -> None:
    def failing(message: Message) -> Message:
        return Message(Error(1001, "row 17 is unusual"), reply_to=message)

    with federation.following(federation.endpoint(2, grid.port), failing):
        [reply] = grid.send_and_receive([asking(2)], timeout=20)
    assert (reply.error.code, reply.error.reason) == (1001, None)


def test_settings_and_bytes_arrive(grid: LinkGrid, federation: Any) -> None:
    def echo(message: Message) -> Message:
        return Message(RecordDict({"c": message.content["c"]}), reply_to=message)

    record = ConfigRecord({"lr": 0.1, "messages": [b"a" * 100_000, b""], "on": True, "names": ["é"]})
    with federation.following(federation.endpoint(2, grid.port), echo):
        [reply] = grid.send_and_receive([Message(RecordDict({"c": record}), 2, "train")], timeout=20)
    assert reply.content["c"] == record
