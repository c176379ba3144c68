"""Instructions to devices that wait for their owners: sent again within the exchange, and counted at its end."""

import runpy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message

from fedveil.links import repeats
from fedveil.links.flower.grid import open_supernodes
from fedveil.links.grpc import grid as link_grid
from fedveil.links.grpc.grid import LinkGrid, open_link
from fedveil.links.grpc.server_end import Letter
from fedveil.messages.flower_adapter import claim_identity
from fedveil.messages.wire import NOT_ELIGIBLE, WAITING

FAULTS = Path(__file__).parents[1] / "faults"
MADE = runpy.run_path(str(FAULTS / "link_ends.py"))
Federation, asking, moved = (MADE[name] for name in ("Federation", "asking", "moved"))
PLAYED = runpy.run_path(str(Path(__file__).parent / "flower" / "test_grid.py"))["Played"]
NODES = (2, 3)
ROUND = {"run": "spring", "round": 1}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(link_grid, "PRESENCE_SECONDS", 0.02)


@pytest.fixture
def federation(tmp_path: Path) -> Any:
    return Federation(tmp_path, NODES)


@pytest.fixture
def grid(federation: Any) -> Iterator[LinkGrid]:
    with open_link(federation.door()) as opened:
        yield opened


def undecided(times: int, code: int = WAITING) -> tuple[Callable[[Message], Message], list[str]]:
    """Return a device whose owner decides after so many requests, and the ids of what it was sent."""
    ids: list[str] = []

    def handle(message: Message) -> Message:
        ids.append(message.metadata.message_id)
        if len(ids) > times:
            return moved(message)
        return Message(Error(code, "the client did not train"), reply_to=message)

    return handle, ids


def test_late_decision_is_followed_in_the_same_exchange(grid: LinkGrid, federation: Any) -> None:
    handle, ids = undecided(2)
    with (
        federation.following(federation.endpoint(2, grid.port), handle),
        federation.following(federation.endpoint(3, grid.port), moved),
    ):
        messages = [asking(node, **ROUND) for node in NODES]
        replies = list(grid.send_and_receive(messages, timeout=20))
    assert sorted(each.metadata.src_node_id for each in replies) == [2, 3]
    assert not any(each.has_error() for each in replies)
    assert len({*ids}) == len(ids) == 3  # a device answers the same id from memory


def test_undecided_device_is_counted_at_the_deadline(grid: LinkGrid, federation: Any) -> None:
    handle, ids = undecided(10_000)
    with federation.following(federation.endpoint(2, grid.port), handle):
        replies = list(grid.send_and_receive([asking(2, **ROUND)], timeout=2.0))
    assert [each.error.code for each in replies] == [WAITING] and len(ids) >= 2


def test_answered_letters_are_released_while_a_device_waits(
    grid: LinkGrid, federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device may wait for a day, and each letter has a model."""
    monkeypatch.setattr(repeats, "LONGEST_SECONDS", 0.02)
    letters, alive = list[weakref.ref[Letter]](), list[int]()
    write = grid._write_letters

    def noted(*arguments: Any) -> Any:
        fresh = write(*arguments)
        letters.extend(weakref.ref(letter) for letter, _ in fresh.values())
        alive.append(sum(each() is not None for each in letters))
        return fresh

    monkeypatch.setattr(grid, "_write_letters", noted)
    handle, _ = undecided(12)
    with federation.following(federation.endpoint(2, grid.port), handle):
        [reply] = grid.send_and_receive([asking(2, **ROUND)], timeout=20)
    assert (
        reply.has_content() and len(alive) == 13 and max(alive) <= 3
    )  # a new one, and those that the loops have in hand


def test_other_errors_are_not_sent_again(grid: LinkGrid, federation: Any) -> None:
    handle, ids = undecided(1, NOT_ELIGIBLE)
    with federation.following(federation.endpoint(2, grid.port), handle):
        replies = list(grid.send_and_receive([asking(2, **ROUND)], timeout=20))
    assert [each.error.code for each in replies] == [NOT_ELIGIBLE] and len(ids) == 1


def test_device_that_left_the_roster_is_not_sent_again(grid: LinkGrid, federation: Any) -> None:
    waiting = repeats.Repeats()
    request = asking(2, **ROUND)
    handle, _ = undecided(1)
    assert waiting.take(request, handle(request)) and waiting.pending
    MADE["until"](lambda: waiting._due[0][0] <= repeats.time.monotonic())
    assert waiting.due(lambda: (3,)) == [] and not waiting.pending


@pytest.mark.parametrize("times", [0, 2])
def test_flowers_link_sends_again_as_well(times: int) -> None:
    handle, ids = undecided(times)
    played = PLAYED(NODES, handle)

    @contextmanager
    def open_run() -> Iterator[Any]:
        yield played

    keys = {f"key {node}": node for node in NODES}
    assert claim_identity(7)
    with open_supernodes(open_run, lambda: (2,), lambda: keys) as grid:
        replies = list(grid.send_and_receive([asking(2, **ROUND)], timeout=20))
    assert [each.has_error() for each in replies] == [False] and len(ids) == times + 1
