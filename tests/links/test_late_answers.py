"""Answers that come one round late: counted once, in the next round and in no later one; busy clients are left alone."""

import runpy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedveil.links.grpc.grid import LinkGrid, open_link
from fedveil.links.late_answers import LateAnswers
from fedveil.messages.wire import SPEC_RECORD, view

MADE = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "link_ends.py"))
asking, moved, until = (MADE[name] for name in ("asking", "moved", "until"))
NODES = (2, 3)


@pytest.fixture
def federation(tmp_path: Path) -> Any:
    return MADE["Federation"](tmp_path, NODES)


@pytest.fixture
def grid(federation: Any) -> Iterator[LinkGrid]:
    with open_link(federation.door()) as opened:
        yield opened


class Slow:
    """A client that begins an instruction and waits until it is let go on; it notes the rounds that it began."""

    def __init__(self) -> None:
        self.rounds: list[int] = []
        self.free = threading.Semaphore(0)

    def __call__(self, message: Message) -> Message:
        self.rounds.append(int(str(message.content[SPEC_RECORD]["round"])))
        assert self.free.acquire(timeout=20)
        return moved(message)


def asked(number: int, staleness: int = 1) -> list[Message]:
    """Return an instruction of a round to both clients, whose array says the round."""
    place = {"run": "a", "round": number, "staleness": staleness}
    return [asking(node, value=10.0 * number, **place) for node in NODES]


def first(grid: LateAnswers | LinkGrid, messages: list[Message], count: int = 1) -> list[tuple[int, float]]:
    """Return the first answers to an exchange, as (node, value), and end it."""
    replies: Any = iter(grid.send_and_receive(messages, timeout=20))
    answers = [next(replies) for _ in range(count)]
    replies.close()
    return [(each.metadata.src_node_id, value_of(each)) for each in answers]


def value_of(reply: Any) -> float:
    return float(view(reply.content["arrays"]["x"])[0])


def with_both(federation: Any, grid: LinkGrid, slow: Callable[[Message], Message]) -> tuple[Any, Any]:
    ends = [federation.endpoint(node, grid.port) for node in NODES]
    return federation.following(ends[0], moved), federation.following(ends[1], slow)


def test_late_answer_counts_in_the_next_round_once(federation: Any, grid: LinkGrid) -> None:
    slow, late = Slow(), LateAnswers(grid)
    quick_end, slow_end = with_both(federation, grid, slow)
    with quick_end, slow_end:
        assert first(late, asked(1)) == [(2, 11.0)]
        until(lambda: slow.rounds == [1])
        slow.free.release()
        assert sorted(first(late, asked(2), 2)) == [(2, 21.0), (3, 11.0)]
        assert slow.rounds == [1]  # it was not asked again meanwhile
        slow.free.release()
        assert sorted(first(late, asked(3), 2)) == [(2, 31.0), (3, 31.0)]
    assert slow.rounds == [1, 3]


def test_answer_of_two_rounds_ago_is_dropped(federation: Any, grid: LinkGrid) -> None:
    slow, late = Slow(), LateAnswers(grid)
    quick_end, slow_end = with_both(federation, grid, slow)
    with quick_end, slow_end:
        for number in (1, 2):
            assert first(late, asked(number)) == [(2, 10.0 * number + 1)]
        until(lambda: slow.rounds == [1])
        slow.free.release(2)
        assert sorted(first(late, asked(3), 2)) == [(2, 31.0), (3, 31.0)]
    assert slow.rounds == [1, 3]


def test_unread_answer_counts_in_the_next_round(federation: Any, grid: LinkGrid) -> None:
    slow, late = Slow(), LateAnswers(grid)
    quick_end, slow_end = with_both(federation, grid, slow)
    with quick_end, slow_end:
        assert first(late, asked(1)) == [(2, 11.0)]
        slow.free.release()
        until(lambda: not grid._arrived.empty())  # pyright: ignore[reportPrivateUsage]
        assert first(late, asked(2)) == [(3, 11.0)]


def test_without_staleness_an_answer_is_late(federation: Any, grid: LinkGrid) -> None:
    slow, late = Slow(), LateAnswers(grid)
    quick_end, slow_end = with_both(federation, grid, slow)
    with quick_end, slow_end:
        assert first(late, asked(1, staleness=0)) == [(2, 11.0)]
        until(lambda: slow.rounds == [1])
        slow.free.release(2)
        assert sorted(first(late, asked(2, staleness=0), 2)) == [(2, 21.0), (3, 21.0)]
    assert grid.counts["late"] == 1


def test_a_client_that_is_invited_anew_counts_once(federation: Any, grid: LinkGrid) -> None:
    """All are at work, so they are asked anew: the answers to both letters come, and one of them counts, in one round."""
    slow, late = Slow(), LateAnswers(grid)
    quick_end, slow_end = with_both(federation, grid, slow)
    with quick_end, slow_end:
        first(late, asked(1))
        until(lambda: slow.rounds == [1])
        slow.free.release(2)
        answers = late.send_and_receive([asked(2)[1]], timeout=3)
        assert [(each.metadata.src_node_id, value_of(each)) for each in answers] == [(3, 11.0)]
        assert slow.rounds == [1, 2]
        slow.free.release()
        assert sorted(first(late, asked(3), 2)) == [(2, 31.0), (3, 31.0)]
