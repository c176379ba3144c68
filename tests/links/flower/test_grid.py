"""Grid over SuperNodes: nodes have the roster's numbers, and a lost run, node or reply holds up nobody."""

import runpy
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Error, Message

from fedveil.base.refusal import Refusal
from fedveil.links.flower.control_calls import AnnouncedReply
from fedveil.links.flower.grid import SuperNodeGrid, open_supernodes
from fedveil.messages.flower_adapter import claim_identity

MADE = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "flower_ends.py"))
make, node_key, following, asking, until = (
    MADE[name] for name in ("make", "node_key", "following", "asking", "until")
)
NODES = (2, 3, 4)


class Played:
    """A run whose SuperNodes have the ids 1000 + node; each answers as it is told."""

    def __init__(self, here: tuple[int, ...], answer: Callable[[Message], Message | None]) -> None:
        self.run = claim_identity(7)
        self.here, self.answer, self.lost = here, answer, 0
        self.pushed: list[Message] = []

    def online_nodes(self) -> dict[str, int]:
        return {f"key {node}": 1000 + node for node in self.here}

    def push(self, messages: list[Message]) -> list[str]:
        self.pushed += messages
        return [f"id {message.metadata.dst_node_id}" for message in messages]

    def replies(self, questions: list[str]) -> list[AnnouncedReply]:
        if self.lost:
            raise httpx.ConnectError("gone")
        return [AnnouncedReply(question, self.fetch(question)) for question in questions]

    def fetch(self, question: str) -> Callable[[float], Message | None]:
        message = [m for m in self.pushed if f"id {m.metadata.dst_node_id}" == question][-1]
        return lambda seconds: self.answer(message)


@contextmanager
def grid_on(
    *runs: Played, admitted: dict[str, int] | None = None, nodes: Collection[int] = NODES
) -> Iterator[SuperNodeGrid]:
    left = list(runs)

    @contextmanager
    def open_run() -> Iterator[Any]:
        yield left.pop(0)

    keys = {f"key {node}": node for node in NODES} if admitted is None else admitted
    with open_supernodes(open_run, lambda: nodes, lambda: keys) as grid:
        yield grid


def echo(message: Message) -> Message:
    return Message(message.content, reply_to=message)


def exchange(grid: SuperNodeGrid, timeout: float = 5.0) -> list[int]:
    replies = grid.send_and_receive([asking(node) for node in NODES], timeout=timeout)
    return sorted(reply.metadata.src_node_id for reply in replies)


def test_nodes_have_the_rosters_numbers_and_flowers_ids_on_the_way() -> None:
    played = Played(NODES, echo)
    with grid_on(played) as grid:
        assert list(grid.get_node_ids()) == [2, 3, 4]
        assert exchange(grid) == [2, 3, 4]
        assert sorted(grid.connected) == [2, 3, 4]
    assert [message.metadata.dst_node_id for message in played.pushed] == [1002, 1003, 1004]
    assert played.pushed[0].metadata.ttl == pytest.approx(605)


def test_absent_and_unadmitted_nodes_get_no_message() -> None:
    played = Played((2, 4, 9), echo)
    with grid_on(played, admitted={"key 2": 2, "key 3": 3}) as grid:
        replies = grid.send_and_receive([asking(node) for node in NODES], timeout=20)
        assert next(replies).metadata.src_node_id == 2
        replies.close()
        assert [message.metadata.dst_node_id for message in played.pushed] == [1002]
        assert list(grid.get_node_ids()) == [2, 3, 4]


def test_node_within_the_timeout_gets_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.links.flower.grid.PRESENCE_SECONDS", 0.0)
    played = Played((2, 4), echo)
    with grid_on(played) as grid:
        replies = grid.send_and_receive([asking(node) for node in NODES], timeout=20)
        assert {next(replies).metadata.src_node_id for _ in range(2)} == {2, 4}
        played.here = NODES
        assert [reply.metadata.src_node_id for reply in replies] == [3]


def test_answer_of_the_superlink_for_a_node_has_the_nodes_number() -> None:
    def gone(message: Message) -> Message:
        return Message(Error(3, "Node Unavailable"), reply_to=message)

    with grid_on(Played(NODES, gone)) as grid:
        assert exchange(grid) == [2, 3, 4]


def test_a_reply_that_never_comes_holds_up_nobody_beyond_the_timeout() -> None:
    free = threading.Event()

    def answer(message: Message) -> Message | None:
        if message.metadata.dst_node_id == 1003:
            free.wait(20)
            return None
        return echo(message)

    with grid_on(Played(NODES, answer)) as grid:
        begun = time.monotonic()
        assert exchange(grid, timeout=1.5) == [2, 4]
        assert time.monotonic() - begun < 10
        free.set()
        assert exchange(grid) == [2, 4]


def test_lost_run_ends_the_exchange_and_the_next_has_another() -> None:
    first, second = Played(NODES, echo), Played(NODES, echo)
    first.lost = 1
    with grid_on(first, second) as grid:
        assert exchange(grid) == []
        assert grid.counts == {"runs lost": 1}
        assert exchange(grid) == [2, 3, 4]


def test_leaver_of_the_roster_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.links.flower.grid.PRESENCE_SECONDS", 0.0)
    nodes = [*NODES, 5]

    def answer(message: Message) -> Message | None:
        if message.metadata.dst_node_id == 1002:
            nodes[2:] = []  # 5 was never here, and 4 has its instruction
        return echo(message)

    played = Played(NODES, answer)
    given = played.replies
    played.replies = lambda questions: given([each for each in questions if each != "id 1004"])  # type: ignore[method-assign]
    with grid_on(played, nodes=nodes) as grid:
        asked = [asking(node) for node in (*NODES, 5)]
        begun = time.monotonic()
        replies = grid.send_and_receive(asked, timeout=60)
        assert sorted(reply.metadata.src_node_id for reply in replies) == [2, 3]
        assert time.monotonic() - begun < 30
        assert list(grid.get_node_ids()) == [2, 3]


def test_single_clients_cannot_be_reached() -> None:
    with grid_on(Played(NODES, echo)) as grid, pytest.raises(Refusal, match="single clients"):
        grid.push_messages([asking(2)])
