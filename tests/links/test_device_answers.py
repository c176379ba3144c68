"""A device's end of the link: nothing is handled twice, and nothing but being told to stop ends it."""

import json
import runpy
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.links import device_answers
from fedveil.links.device_answers import COPIED, Journal
from fedveil.links.grpc.device_end import answer_instruction
from fedveil.links.grpc.grid import open_link
from fedveil.links.grpc.server_end import Traffic
from fedveil.messages.flower_adapter import claim_identity, name_message
from fedveil.messages.message_codec import pack, unpack
from fedveil.messages.wire import FAILED, HANDLED_BEFORE, NOT_ELIGIBLE, NOT_READY, view

MADE = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "link_ends.py"))
MadeAuthority, Federation = MADE["MadeAuthority"], MADE["Federation"]
asking, moved, until = (MADE[name] for name in ("asking", "moved", "until"))

claim_identity(1)


@pytest.fixture
def federation(tmp_path: Path) -> Any:
    return Federation(tmp_path, (2,))


# --- the journal --------------------------------------------------------------------------------------------------


def test_started_work_is_remembered_after_a_restart(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal")
    first.note("run/1/0/0/2/ab")
    assert "run/1/0/0/2/ab" in first
    second = Journal(tmp_path / "journal")  # the first one was killed
    second.note("run/2/0/0/2/cd")
    third = Journal(tmp_path / "journal")
    assert "run/1/0/0/2/ab" in third and "run/2/0/0/2/cd" in third and "" not in third
    for each in (first, second, third):
        each.close()


@settings(max_examples=40)
@given(
    st.lists(st.text("abc/é ", min_size=1, max_size=6), min_size=1, max_size=6, unique=True),
    st.integers(1, 40),
)
def test_a_line_cut_short_by_a_power_cut_spoils_no_other(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], cut: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal"
    first = Journal(path)
    for name in names:
        first.note(name)
    first.close()
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - cut % (len(names[-1].encode()) + 1))])
    second = Journal(path)
    second.note("later")
    second.close()
    third = Journal(path)
    assert all(name in third for name in [*names[:-1], "later"])
    third.close()


def test_a_journal_keeps_its_latest_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_answers, "JOURNAL_IDS", 3)
    journal = Journal(tmp_path / "journal")
    for number in range(5):
        journal.note(str(number))
    assert [number for number in range(5) if str(number) in journal] == [2, 3, 4]
    journal.close()
    again = Journal(tmp_path / "journal")
    assert (tmp_path / "journal").read_text().split() == ["2", "3", "4"]
    again.close()


def test_a_journal_stays_short_as_long_as_its_device_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_answers, "JOURNAL_IDS", 3)
    journal = Journal(tmp_path / "journal")
    for number in range(40):
        journal.note(str(number))
        journal.note("unbegun")
        journal.take_back("unbegun")
        assert len((tmp_path / "journal").read_text().split()) <= 6
        with closing(Journal(Path(shutil.copy(tmp_path / "journal", tmp_path / "copy")))) as again:
            assert str(number) in again and "unbegun" not in again
            assert number == 0 or str(number - 1) in again
    journal.close()


# --- one instruction ----------------------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal")
    yield journal
    journal.close()


def instruction() -> bytearray:
    message = asking(2)
    name_message(message, "id")
    return bytearray(pack(message))


def reply_to(data: bytearray, handle: Any, begun: Journal) -> Message:
    return unpack(b"".join(answer_instruction("id", data, handle, begun)))


def test_an_instruction_is_written_down_before_it_is_handled(begun: Journal) -> None:
    def handle(message: Message) -> Message:
        assert "id" in begun
        return moved(message)

    assert view(reply_to(instruction(), handle, begun).content["arrays"]["x"])[0] == 1.0


def test_repeated_instruction_is_answered_and_not_handled(begun: Journal) -> None:
    begun.note("id")

    def handle(message: Message) -> Message:
        raise AssertionError("handled twice")

    reply = reply_to(instruction(), handle, begun)
    assert reply.error.code == HANDLED_BEFORE and reply.metadata.reply_to_message_id == "id"


def test_instruction_for_an_unfit_device_was_not_started(begun: Journal, tmp_path: Path) -> None:
    begun.note("earlier")

    def unfit(message: Message) -> Message:
        return Message(Error(NOT_ELIGIBLE, "on battery"), reply_to=message)

    assert reply_to(instruction(), unfit, begun).error.code == NOT_ELIGIBLE
    assert "id" not in begun
    after = Journal(tmp_path / "journal")  # of another process
    assert "earlier" in after and "id" not in after
    assert not reply_to(instruction(), moved, after).has_error()
    assert reply_to(instruction(), moved, after).error.code == HANDLED_BEFORE
    after.close()


def test_a_failure_leaves_as_a_code_and_a_full_disk_trains_nothing(
    begun: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handle(message: Message) -> Message:
        raise RuntimeError("row 17 is unusual")

    assert reply_to(instruction(), handle, begun).error.code == FAILED

    def full(name: str) -> None:
        raise OSError("no space left")

    handled: list[Message] = []
    monkeypatch.setattr(begun, "note", full)
    monkeypatch.setattr(Journal, "__contains__", lambda *_: False)
    assert reply_to(instruction(), lambda m: handled.append(m) or moved(m), begun).error.code == NOT_READY
    assert not handled


def test_an_instruction_that_cannot_be_read_has_no_reply(begun: Journal) -> None:
    assert answer_instruction("id", bytearray(b"garbage"), moved, begun) == ()


# --- the stream ---------------------------------------------------------------------------------------------------


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


# --- a device that was restored or copied -------------------------------------------------------------------------


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
