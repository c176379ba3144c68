"""A device as a SuperNode: what it answers twice, what it owes."""

import errno
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Message

from fedveil.base.refusal import Refusal
from fedveil.links.device_answers import Journal
from fedveil.links.flower.device_end import ReplyMemory, read_node_key
from fedveil.messages.flower_adapter import claim_identity, name_message
from fedveil.messages.message_codec import pack_body, question_id
from fedveil.messages.wire import HANDLED_BEFORE, NOT_READY

MADE = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "flower_ends.py"))
asking = MADE["asking"]


@pytest.fixture(autouse=True)
def identity() -> None:
    claim_identity(1)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal")
    yield journal
    journal.close()


class Handler:
    def __init__(self) -> None:
        self.handled = 0

    def __call__(self, message: Message) -> Message:
        self.handled += 1
        return Message(message.content, reply_to=message)


def arriving(name: str, attempt: int = 0) -> Message:
    message: Message = asking(2, attempt)
    name_message(message, name)
    return message


def test_repeated_question_is_answered_from_memory_to_its_asker(
    journal: Journal,
) -> None:
    handler = Handler()
    answers = ReplyMemory(2, handler, journal)
    first, again = answers.reply_to(arriving("a")), answers.reply_to(arriving("b"))
    assert handler.handled == 1
    assert (first.metadata.reply_to_message_id, again.metadata.reply_to_message_id) == ("a", "b")
    assert again.content == first.content
    answers.reply_to(arriving("c", attempt=1))
    assert handler.handled == 2


def test_question_started_before_a_restart_is_not_repeated(tmp_path: Path) -> None:
    for expected in (1, 0):
        journal, handler = Journal(tmp_path / "journal"), Handler()
        reply = ReplyMemory(2, handler, journal).reply_to(arriving("a"))
        assert handler.handled == expected
        journal.close()
    assert reply.error.code == HANDLED_BEFORE


def test_failure_leaves_as_a_code_without_words(journal: Journal) -> None:
    def failing(message: Message) -> Message:
        raise RuntimeError("record 17 is negative")

    reply = ReplyMemory(2, failing, journal).reply_to(arriving("a"))
    assert "17" not in str(reply.error)


def test_instruction_beyond_the_journal_is_not_started(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Handler()
    answers = ReplyMemory(2, handler, journal)
    with monkeypatch.context() as sick:
        sick.setattr(os, "fsync", failing_sync)
        reply = answers.reply_to(arriving("a"))
    assert (handler.handled, reply.error.code) == (0, NOT_READY)
    assert caplog.messages == ["no instruction can be begun (Input/output error); mend its disk"]
    assert not caplog.records[0].exc_info
    answers.reply_to(arriving("b", attempt=1))
    assert handler.handled == 1


def failing_sync(_: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


class Connection:
    def __init__(self, *failures: Exception) -> None:
        self.failures, self.sent = list(failures), list[Message]()

    def send(self, reply: Message) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.sent.append(reply)


def test_undelivered_reply_is_owed_and_an_unwanted_one_is_not(journal: Journal) -> None:
    answers = ReplyMemory(2, Handler(), journal)
    answers.unsent = answers.reply_to(arriving("a"))
    connection: Any = Connection(httpx.ConnectError("gone"))
    with pytest.raises(httpx.ConnectError):
        answers.settle(connection)
    answers.settle(connection)
    answers.settle(connection)
    assert len(connection.sent) == 1
    answers.unsent = answers.reply_to(arriving("b", attempt=1))
    over = httpx.Response(403, request=httpx.Request("POST", "https://localhost"))
    connection = Connection(httpx.HTTPStatusError("over", request=over.request, response=over))
    answers.settle(connection)
    assert answers.unsent is None and connection.sent == []


def test_one_question_has_one_id_however_it_travels() -> None:
    ids = {question_id(m, pack_body(m), 2) for m in (arriving("a"), arriving("b"))}
    assert len(ids) == 1
    assert question_id(arriving("a", 1), pack_body(arriving("a", 1)), 2) not in ids
    assert question_id(arriving("a"), pack_body(arriving("a")), 3) not in ids


def test_a_key_that_is_no_supernodes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "supernode.key"
    path.write_text("nothing")
    path.chmod(0o600)
    with pytest.raises(Refusal, match="not a key"):
        read_node_key(path)
