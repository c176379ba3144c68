"""A device's end of the gRPC link: how it connects again, answers from memory, and refuses to be a copy."""

import json
import runpy
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message

from fedveil.base.refusal import Refusal
from fedveil.links.device_answers import COPIED
from fedveil.links.grpc.grid import open_link
from fedveil.links.grpc.server_end import Traffic
from fedveil.messages.flower_adapter import claim_identity
from fedveil.messages.wire import view

MADE = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "link_ends.py"))
MadeAuthority, Federation = MADE["MadeAuthority"], MADE["Federation"]
asking, moved, until = (MADE[name] for name in ("asking", "moved", "until"))

claim_identity(1)


@pytest.fixture
def federation(tmp_path: Path) -> Any:
    return Federation(tmp_path, (2,))


def test_device_waits_for_an_absent_server_and_leaves_on_order(federation: Any) -> None:
    said: list[str] = []
    with open_link(federation.door()) as grid:
        port = grid.port
    with federation.following(federation.endpoint(2, port), moved, said):
        until(lambda: len(said) >= 3)
        with open_link(federation.door(f"127.0.0.1:{port}")) as grid:
            assert len(list(grid.send_and_receive([asking(2)], timeout=20))) == 1
        until(lambda: sum("not connected" in line for line in said) >= 5)
    assert any("unavailable" in line for line in said) and any("connected" in line for line in said)


def test_a_server_of_another_authority_is_not_followed(federation: Any, tmp_path: Path) -> None:
    other = Federation(tmp_path, (2,))
    said: list[str] = []
    with (
        open_link(other.door()) as grid,
        federation.following(federation.endpoint(2, grid.port), moved, said),
    ):
        until(lambda: any("not this federation's" in line for line in said))
        assert list(grid.send_and_receive([asking(2)], timeout=0.3)) == []


def test_a_server_that_restarts_is_answered_from_memory(federation: Any) -> None:
    """Asked the same again, the client does not train again, and is not sent again what it knows."""
    free, handled = threading.Event(), list[str]()

    def handle(message: Message) -> Message:
        handled.append(message.metadata.message_id)
        assert free.wait(20)
        return moved(message)

    with ExitStack() as stack:
        nodes = [2]
        with open_link(replace(federation.door(), nodes=lambda: nodes)) as grid:
            stack.enter_context(federation.following(federation.endpoint(2, grid.port), handle))
            asked = asking(2, 50_000, run="run", round=1)
            life = threading.Thread(target=lambda: list(grid.send_and_receive([asked], timeout=60)))
            life.start()
            until(lambda: handled)
            nodes.clear()  # so that it waits for nobody
            life.join(20)
        for _ in range(2):  # more lives of the server: in the first, the client is still at work
            threading.Timer(0.3, free.set).start()
            with open_link(federation.door(f"127.0.0.1:{grid.port}")) as grid:
                [reply] = grid.send_and_receive([asking(2, 50_000, run="run", round=1)], timeout=20)
                assert view(reply.content["arrays"]["x"])[0] == 1.0
                assert grid.tally.total().down.keys() == {"control"}
    assert len(handled) == 1


def test_a_reply_at_hand_is_handed_over_before_it_leaves(federation: Any) -> None:
    started, got = threading.Event(), list[Message]()

    def handle(message: Message) -> Message:
        started.set()
        leaving.wait(20)
        return moved(message, 7.0)

    leaving = threading.Event()
    with open_link(federation.door()) as grid:
        ask = threading.Thread(target=lambda: got.extend(grid.send_and_receive([asking(2)], timeout=20)))
        with federation.following(federation.endpoint(2, grid.port), handle):
            ask.start()
            assert started.wait(20)
            threading.Timer(0.2, leaving.set).start()
        ask.join(20)
    assert [view(reply.content["arrays"]["x"])[0] for reply in got] == [7.0]


def test_an_error_is_a_reply_too(federation: Any) -> None:
    def handle(message: Message) -> Message:
        return Message(Error(1004, "hot"), reply_to=message)

    with (
        open_link(federation.door()) as grid,
        federation.following(federation.endpoint(2, grid.port), handle),
    ):
        [reply] = grid.send_and_receive([asking(2)], timeout=20)
    assert reply.error.code == 1004


def test_a_copy_of_a_key_is_refused_named_and_let_in_by_its_owner(federation: Any, tmp_path: Path) -> None:
    """The server's record outlives it; of a copy and the device whoever has answered last is the device."""
    place = {"run": "spring", "attempt": 0, "exchange": 0}
    journal, said = tmp_path / "journal-2", list[str]()
    door = replace(federation.door(), acknowledged=tmp_path / "acknowledged.json")

    def rounds(*numbers: int) -> list[int]:
        """Let the device answer rounds on a server that starts anew; return which it answered within the time."""
        found = list[int]()
        with open_link(door) as grid, federation.following(federation.endpoint(2, grid.port), moved, said):
            for number in numbers:
                asked = [asking(2, value=float(number), round=number, **place)]
                found += [
                    number for reply in grid.send_and_receive(asked, timeout=20) if not reply.has_error()
                ]
        return found

    def refused() -> None:
        said.clear()
        with open_link(door) as grid, federation.following(federation.endpoint(2, grid.port), moved, said):
            until(lambda: 2 in grid.restored)
            until(lambda: any(COPIED in each for each in said))
            assert not any("connected to" in each for each in said)

    assert rounds(1) == [1]
    earlier = journal.read_bytes()
    assert rounds(2) == [2]
    newest = journal.read_bytes()
    for copy in (earlier, b""):  # a backup; the bundle as it was provisioned, on a second machine
        journal.write_bytes(copy)
        refused()
    journal.write_bytes(newest)
    assert rounds(3) == [3]
    journal.write_text("\nrestored")
    with open_link(door) as grid, federation.following(federation.endpoint(2, grid.port), moved, said):
        until(lambda: grid.connected)
        assert not grid.restored
    assert rounds(4) == [4]
    assert "restored" not in journal.read_text()
    assert len(json.loads(door.acknowledged.read_text())) == 1


def test_a_copy_that_refuses_counts_as_connected_once_it_stays(
    federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = set[float]()

    class Counted(Traffic):
        def __setattr__(self, name: str, value: Any) -> None:
            counted.update([value] if name == "connected_since" and value else [])
            super().__setattr__(name, value)

    monkeypatch.setattr("fedveil.links.grpc.server_end.Traffic", Counted)
    place, journal = {"run": "spring", "attempt": 0, "exchange": 0}, tmp_path / "journal-2"
    with open_link(federation.door()) as grid:
        endpoint = federation.endpoint(2, grid.port)
        with federation.following(endpoint, moved, []):
            asked = [asking(2, value=1.0, round=1, **place)]
            assert [reply.has_error() for reply in grid.send_and_receive(asked, timeout=60)] == [False]
        until(lambda: not grid.connected)
        counted.clear()
        journal.write_bytes(b"")
        with federation.following(endpoint, moved, []):
            until(lambda: grid.traffic[2].streams >= 4)
        assert len(counted) == 1  # of the first stream, before it refused
        journal.write_text("\nrestored")
        with federation.following(endpoint, moved, []):
            until(lambda: grid.connected)


def test_a_damaged_record_of_answers_is_refused(federation: Any, tmp_path: Path) -> None:
    (tmp_path / "acknowledged.json").write_text("[")
    with (
        pytest.raises(Refusal, match="restore it, or remove it"),
        open_link(replace(federation.door(), acknowledged=tmp_path / "acknowledged.json")),
    ):
        pass
