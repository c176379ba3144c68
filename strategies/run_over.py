"""Last message of a run, which says to each client that it is over, how it ended, and what its final model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from .flower_adapter import records_of
from .wire import memory_arrays, view

OVER, MODEL, MESSAGE_TYPE = "run over", "model", "query"
LONGEST = 64  # characters of a text


@dataclass(frozen=True)
class RunOver:
    """Run that is over.

    Attributes:
      run: what people call it.
      status: how it ended, as in result.json.
      rounds: that it completed.
      model: the released model's arrays by name; empty where the run left none to be used.
      agreement: hash of the schema and model that the run had, as its orders bear it; empty where it has no schema.
    """

    run: str
    status: str
    rounds: int
    model: Mapping[str, NDArray[np.generic]]
    agreement: str = ""


def message_to(node: int, over: RunOver) -> Message:
    """Return the message that tells a node."""
    said = ConfigRecord({"run": over.run, "status": over.status, "rounds": over.rounds})
    if over.agreement:
        said["agreement"] = over.agreement
    return Message(RecordDict({OVER: said, MODEL: memory_arrays(dict(over.model))}), node, MESSAGE_TYPE)


def read_over(message: Message) -> RunOver | None:
    """Return what a message says of a run that is over; None if it is another message, or none that can be read."""
    if message.metadata.message_type != MESSAGE_TYPE or message.has_error():
        return None
    said = records_of(message.content, ConfigRecord).get(OVER)
    arrays = records_of(message.content, ArrayRecord).get(MODEL)
    if said is None or arrays is None:
        return None
    run, status, rounds = said.get("run"), said.get("status"), said.get("rounds")
    agreement = said.get("agreement", "")
    if not (_is_word(run) and _is_word(status) and type(rounds) is int):
        return None
    if agreement != "" and not _is_word(agreement):
        return None
    model = {name: view(each) for name, each in arrays.items()}
    return RunOver(str(run), str(status), rounds, model, str(agreement))


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST
