"""A device's end of the link: nothing is handled twice, and nothing but being told to stop ends it."""

import runpy
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.links import device_answers
from fedveil.links.device_answers import Journal
from fedveil.links.grpc.device_end import answer_instruction
from fedveil.messages.flower_adapter import claim_identity, name_message
from fedveil.messages.message_codec import pack, unpack
from fedveil.messages.wire import FAILED, HANDLED_BEFORE, NOT_ELIGIBLE, NOT_READY, view

MADE = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "link_ends.py"))
asking, moved, until = (MADE[name] for name in ("asking", "moved", "until"))

claim_identity(1)


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
