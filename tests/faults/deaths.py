"""A process of a federation that dies by SIGKILL at a named stage of a round, and randomness that repeats.

What a command calls is wrapped before the command begins, in the child of commands.py alone: the code that is shipped
knows nothing of it.
"""

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedveil.client import app
from fedveil.client import secure_update as secure_mod
from fedveil.deployment.device import agent, device, device_ledger
from fedveil.links import device_answers
from fedveil.links.flower import device_end as fleet
from fedveil.links.flower import fleet_calls as flower_fleet
from fedveil.links.grpc import device_end as link
from fedveil.messages.secure_wire import USUAL, read_position
from fedveil.messages.wire import Exchange
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.privacy.mechanisms.randomness import Randomness, Stream
from fedveil.run import progress as recording
from fedveil.run import result as results
from fedveil.run import run as running
from fedveil.run.files import RESULT
from fedveil.server import checkpoint, masked_sums, private_grid
from fedveil.server.secure_sum import Attempt, SecureSums

SEED = 5
EXCHANGES = [each.name.lower() for each in USUAL]
Dies = Callable[..., bool]


def arrange(stage: str, number: int) -> None:
    """Let this process die at a stage of round `number`, if one is named; its noise repeats in any case."""
    Randomness.stream = _repeated  # type: ignore[method-assign]
    for each in (masked_sums, secure_mod):  # else a rotation by the run's name, which is new after each kill
        assert callable(each.rotation_seed)
        each.rotation_seed = lambda _, row: bytes([row]) * 32
    _hasten()
    _keep_models()
    if stage in SERVER:
        SERVER[stage](number)
    elif stage:
        _follow_messages()
        (CLIENT | SUPERNODE)[stage](number)


def _repeated(source: Randomness, *purpose: str | int, _true: Any = Randomness.stream) -> Stream:
    if purpose[0] == "share":  # whichever attempt it is
        purpose = (*purpose[:2], 0, *purpose[3:])
    return _true(Randomness(SEED), *purpose)


def _hasten() -> None:
    """Let a device on Flower's link look often, and come back soon: its SuperLink believes in it for two heartbeats."""
    flower_fleet.HEARTBEAT_SECONDS, fleet.BEAT_SECONDS = 10, 4.0  # as often as Flower lets it
    fleet.LONGEST_POLL_SECONDS, device_answers.LONGEST_WAIT_SECONDS = 0.5, 2.0


def _keep_models() -> None:
    """Leave the checkpoint of each round beside the last one, so that the noise of each can be measured."""
    true = recording.save

    def kept(progress: Any, state: Any, *given: Any) -> None:
        true(progress, state, *given)
        folder = progress.run.folder
        shutil.copyfile(folder / checkpoint.NAME, folder / f"{state.round}.safetensors")

    recording.save = kept


def _die(*given: Any, **named: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: Any, name: str, dies: Dies, after: bool = False) -> None:
    true = getattr(owner, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        if not after and dies(*given, **named):
            _die()
        result = true(*given, **named)
        if after and dies(*given, **named):
            _die()
        return result

    setattr(owner, name, wrapped)


def before(owner: Any, name: str, dies: Callable[[int], Dies]) -> Callable[[int], None]:
    """Return what arranges a death before a call, given the round."""
    return lambda number: _wrap(owner, name, dies(number))


def after(owner: Any, name: str, dies: Callable[[int], Dies]) -> Callable[[int], None]:
    """Return what arranges a death after a call, given the round."""
    return lambda number: _wrap(owner, name, dies(number), after=True)


# --- the server ---------------------------------------------------------------------------------------------------


def _at(exchange: str) -> Callable[[int], Dies]:
    step = Exchange[exchange.upper()]
    return lambda number: lambda attempt, *_: attempt.step is step and attempt.request.row == number


def _second(number: int) -> Dies:
    return lambda _, second, *rest, **named: second == number


def _of_state(number: int) -> Dies:
    return lambda _, state, *rest: state.round == number


def _of_the_result(path: Path, *given: Any, **named: Any) -> bool:
    return path.name == RESULT


def _within_the_checkpoint(number: int) -> None:
    def dies(_: Any, state: Any, *given: Any) -> bool:
        if state.round == number:
            _wrap(checkpoint, "write_aside", lambda *_: True, after=True)
        return False

    _wrap(recording, "save", dies)


SERVER: dict[str, Callable[[int], None]] = {
    "before the reservation": before(private_grid.PrivateGrid, "reserve", _second),
    "after the reservation": after(private_grid.PrivateGrid, "reserve", _second),
    **{f"asking: {each}": before(Attempt, "send", _at(each)) for each in EXCHANGES},
    **{f"first reply: {each}": before(Attempt, "hear", _at(each)) for each in EXCHANGES},
    **{f"all replies: {each}": before(Attempt, "advance", _at(each)) for each in EXCHANGES},
    "after the sum": after(SecureSums, "sum", lambda number: lambda *given: given[2].row == number),
    "before the commit": before(Ledger, "commit", lambda number: lambda _, key, **__: key[1] == number),
    "after the commit": after(Ledger, "commit", lambda number: lambda _, key, **__: key[1] == number),
    "before the line": before(running, "record_round", _of_state),
    "before the checkpoint": before(recording, "save", _of_state),
    "within the checkpoint": _within_the_checkpoint,
    "after the checkpoint": after(recording, "save", _of_state),
    "before the result": before(running, "finish", lambda _: lambda *__: True),
    "between model and result": before(results, "replace_file", lambda _: _of_the_result),
    "before the close": before(results, "close", lambda _: lambda *__: True),
    "within the close": before(results, "write_manifest", lambda _: lambda *__: True),
}


# --- a client -----------------------------------------------------------------------------------------------------

_hand: list[tuple[int, str]] = [(0, "")]  # round and exchange of the message in hand


def _place(message: Message) -> tuple[int, str]:
    place = read_position(message.content)
    return place.round, place.exchange.name.lower()


def _follow_messages() -> None:
    true = agent.Agent.handle

    def followed(keeper: Any, message: Message) -> Message:
        _hand[0] = _place(message)
        return true(keeper, message)

    agent.Agent.handle = followed  # type: ignore[method-assign]


def _told(exchange: str) -> Callable[[int], Dies]:
    return lambda number: lambda _, message, *__: _place(message) == (number, exchange)


def _hands(exchange: str) -> Callable[[int], Dies]:
    return lambda number: lambda *_, **__: _hand[0] == (number, exchange)


def _before_it_is_noted(exchange: str) -> Callable[[int], None]:
    def arranged(number: int) -> None:
        for each in (link, fleet):
            _wrap(each, "handle_once", _told(exchange)(number))

    return arranged


def _acknowledged(exchange: str) -> Callable[[int], None]:
    def arranged(number: int) -> None:
        _wrap(link.DeviceStream, "_settle", _line_is_rid_of(exchange)(number), after=True)
        hands = _hands(exchange)(number)
        _wrap(fleet.ReplyMemory, "settle", lambda answers, _: answers.unsent is None and hands(), after=True)

    return arranged


def _line_is_rid_of(exchange: str) -> Callable[[int], Dies]:
    wanted = str(Exchange[exchange.upper()].value)

    def dies(number: int, line: Any) -> bool:
        names = [name.split("/") for name in line._replies if name not in line._unacknowledged]
        return any((name[1], name[3]) == (str(number), wanted) for name in names)

    return lambda number: partial(dies, number)


CLIENT: dict[str, Callable[[int], None]] = {
    **{f"told: {each}": _before_it_is_noted(each) for each in EXCHANGES},
    **{f"begun: {each}": before(agent.Agent, "handle", _told(each)) for each in EXCHANGES},
    "before its reservation: inbox": before(device_ledger.DeviceLedger, "_reserve", _hands("inbox")),
    "after its reservation: inbox": after(device_ledger.DeviceLedger, "_reserve", _hands("inbox")),
    "training: inbox": before(app, "train_round", _hands("inbox")),
    "trained: inbox": after(app, "train_round", _hands("inbox")),
    "after its commit: inbox": after(device_ledger, "_commit", _hands("inbox")),
    **{f"before its memory: {each}": before(device, "replace_file", _hands(each)) for each in EXCHANGES},
    **{f"answered: {each}": after(agent.Agent, "handle", _told(each)) for each in EXCHANGES},
    **{f"acknowledged: {each}": _acknowledged(each) for each in EXCHANGES},
}
SUPERNODE: dict[str, Callable[[int], None]] = {  # Flower's link alone announces a reply before its parts
    f"announced: {each}": before(flower_fleet, "push_objects", _hands(each)) for each in EXCHANGES
}
