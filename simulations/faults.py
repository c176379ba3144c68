"""Faults that a simulation injects into its clients, each with a probability per client and round.

One mod around the app, so that every engine injects the same faults; which client fails in which round derives from the
seed, so that a run repeats. In secure aggregation a fault can hit any exchange; a client that dropped out does not
return in the round.
"""

from __future__ import annotations

import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod

from ..configs.schema import FaultSettings
from ..messages.secure_wire import USUAL, answer, messages_of, read_position
from ..messages.wire import VECTOR, VECTOR_RECORD, only_arrays, read_round, sum_spec_of, view
from ..privacy.mechanisms.packing import Packed, width_of
from ..privacy.mechanisms.randomness import Randomness


def inject(faults: FaultSettings, randomness: Randomness, deadline: float) -> Mod:
    """Return the mod that injects these faults; only the mod of the deadline may be around it.

    Args:
      faults: their probabilities, per client and round.
      randomness: from which the faults of each client and round derive.
      deadline: seconds that one client may take; a straggler takes longer.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        client = int(str(context.node_config["partition-id"]))
        if messages_of(message.content) is not None:
            return _in_exchange(faults, randomness, deadline, client, message, context, call_next)
        _, number = read_round(message.content)
        generator = randomness.stream("faults", number, client).generator()
        fault = pick_fault(faults, generator.random())
        if fault == "dropout":
            return Message(Error(1, "dropped out"), reply_to=message)
        if fault == "straggler":
            time.sleep(deadline + 1)
        reply = call_next(message, context)
        if fault == "failure":
            raise RuntimeError("injected failure")
        return _corrupted(reply, message, int(generator.integers(4))) if fault == "corrupt" else reply

    return mod


def pick_fault(faults: FaultSettings, chance: float) -> str | None:
    """Return the fault that a random number, uniform in [0, 1), selects by the faults' probabilities, or None."""
    for name in ("dropout", "failure", "straggler", "corrupt"):
        probability = float(getattr(faults, name))
        if chance < probability:
            return name
        chance -= probability
    return None


def _in_exchange(
    faults: FaultSettings,
    randomness: Randomness,
    deadline: float,
    client: int,
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
) -> Message:
    """Return a client's reply in an exchange of secure aggregation, with the fault of its attempt, if it has one.

    The fault comes in a random exchange; after a dropout the client does not answer the later ones either.
    """
    position = read_position(message.content)
    generator = randomness.stream("faults", position.round, client, position.attempt).generator()
    fault = pick_fault(faults, generator.random())
    exchange = USUAL[int(generator.integers(len(USUAL)))]
    if fault == "dropout" and position.exchange >= exchange:
        return Message(Error(1, "dropped out"), reply_to=message)
    if fault is None or position.exchange is not exchange:
        return call_next(message, context)
    if fault == "straggler":
        time.sleep(deadline + 1)
    reply = call_next(message, context)
    if fault == "failure":
        raise RuntimeError("injected failure")
    if fault == "corrupt":
        messages = messages_of(reply.content) if not reply.has_error() else None
        changed = [generator.bytes(len(each)) for each in messages or []]
        return Message(answer(changed), reply_to=message)
    return reply


def _corrupted(reply: Message, message: Message, kind: int) -> Message:
    """Return a reply whose vector is, by its kind: 0 NaN, 1 too short, 2 complex, 3 a thousand times too long."""
    if reply.has_error():
        return reply
    vector, width = view(only_arrays(reply.content)[VECTOR]), width_of(sum_spec_of(message.content))
    if width is not None:  # unpacked, since a packed coordinate has no bits for a wrong value
        vector = Packed(vector.astype(np.uint8, copy=False), 8 * vector.size // width, width).numbers()
    wide = vector.astype(np.int64 if vector.dtype.kind == "i" else np.float64)
    broken = (np.full(wide.shape, np.nan), wide[:-1], wide.astype("complex64"), wide * 1000)[kind]
    record = ArrayRecord({VECTOR: Array(broken)})
    return Message(RecordDict({VECTOR_RECORD: record}), reply_to=message)
