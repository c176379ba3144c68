"""Grid that sends a node the difference from its held model, or the whole model, on any link.

A node reports its held model in the reply to the instruction that brought it. This report is not trusted: a device
whose result does not match the instruction's hash reports this, and gets the whole model once the others have answered.
The server's memory is lost when it restarts. Each node then gets the whole model once, as does a node that has not
answered in time: it may hold the model of that round or of the one before.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from .difference_wire import ModelStatement, read_statement, split_report, with_model
from .flower_adapter import delivered_message, records_of
from .grids import PassingGrid
from .model_difference import bytes_of, difference, hash_of
from .traffic import TrafficPurpose, purpose_of
from .wire import NO_BASE, SPEC_RECORD, views

Arrays = Mapping[str, NDArray[np.generic]]

MAX_MODELS, MAX_BYTES = 32, 1 << 29  # of earlier rounds; a client with an older one gets the whole


class ClientModels:
    """Models of the last rounds, and which of them each node holds."""

    def __init__(self) -> None:
        self._models = OrderedDict[str, Arrays]()
        self._by_node = dict[int, str]()
        self._pending_models = dict[int, str]()  # what a node had that was sent a model and has not answered
        self._differences = dict[tuple[str, str], bytes | None]()
        self._last: tuple[ArrayRecord, ModelStatement] | None = None

    def take(self, node: int, model: str) -> None:
        """Record a node's held model; one that is no longer known counts as none."""
        self._pending_models.pop(node, None)
        if model in self._models:
            self._by_node[node] = model
        else:
            self._by_node.pop(node, None)

    def take_back(self, node: int) -> None:
        """Record that a node did not begin an instruction, and still holds its earlier model."""
        if node in self._pending_models:
            self.take(node, self._pending_models[node])

    def encode(self, messages: Sequence[Message], again: bool = False) -> list[Message]:
        """Return the messages to send, each as short as its node's held model allows; shared content stays shared.

        Args:
          messages: at most one to each node.
          again: whether the nodes did not hold the expected model.
        """
        cache = dict[tuple[int, str], RecordDict]()
        return [self._message(each, again, cache) for each in messages]

    def encode_for_storing(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages as `encode` does, for nodes that hold the model of each from then on."""
        encoded = self.encode(messages)
        for message in encoded:
            if (statement := read_statement(message.content)) is not None:
                self.take(message.metadata.dst_node_id, statement.model)
        return encoded

    def _message(self, message: Message, again: bool, cache: dict[tuple[int, str], RecordDict]) -> Message:
        content, head = message.content, message.metadata
        arrays = records_of(content, ArrayRecord)
        trains = purpose_of(content) is TrafficPurpose.TRAINING
        if len(arrays) != 1 or SPEC_RECORD not in content or not trains:
            return message
        ((name, record),) = arrays.items()
        whole = self._state(name, record)
        client_model = self._by_node.pop(head.dst_node_id, "")
        base = self._pending_models[head.dst_node_id] = "" if again else client_model
        key = id(content), base
        if key not in cache:
            change = self._difference(base, whole.model) if base else None
            cache[key] = with_model(content, replace(whole, difference=change or b"", again=again))
        return Message(cache[key], head.dst_node_id, head.message_type, ttl=head.ttl, group_id=head.group_id)

    def _state(self, name: str, record: ArrayRecord) -> ModelStatement:
        """Return a model by its hash, and store it."""
        if self._last is None or self._last[0] is not record:
            arrays = views(record)
            statement = ModelStatement(hash_of(arrays), name, bytes_of(arrays))
            self._last = record, statement
            self._store(statement.model, arrays)
        return self._last[1]

    def _store(self, model: str, arrays: Arrays) -> None:
        self._models[model] = arrays
        self._models.move_to_end(model)
        capacity = min(MAX_MODELS, max(2, MAX_BYTES // max(1, bytes_of(arrays))))
        while len(self._models) > capacity:
            self._models.popitem(last=False)
        self._by_node = {node: model for node, model in self._by_node.items() if model in self._models}
        self._differences.clear()  # of an earlier model

    def _difference(self, base: str, model: str) -> bytes | None:
        if (base, model) not in self._differences:
            self._differences[base, model] = difference(self._models[base], self._models[model])
        return self._differences[base, model]


class DifferenceGrid(PassingGrid):
    """Grid that sends models as differences."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._models = ClientModels()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send the messages, and yield the replies; a node that holds another model is asked again with the whole.

        Arguments as of Flower's `Grid`; at most one message goes to each node.
        """
        end = None if timeout is None else time.monotonic() + timeout
        orders = {message.metadata.dst_node_id: message for message in messages}
        again: list[Message] = []
        for reply in self._grid.send_and_receive(self._models.encode(list(orders.values())), timeout=timeout):
            node = reply.metadata.src_node_id
            if reply.has_error() and reply.error.code == NO_BASE and node in orders:
                again.append(orders[node])
            else:
                yield self._without_report(reply)
        if again:
            rest = None if end is None else max(0.0, end - time.monotonic())
            for reply in self._grid.send_and_receive(self._models.encode(again, again=True), timeout=rest):
                yield self._without_report(reply)

    def _without_report(self, reply: Message) -> Message:
        """Return a reply without the report of its node's held model."""
        if reply.has_error():
            self._models.take_back(reply.metadata.src_node_id)
            return reply
        content, client_model = split_report(reply.content)
        if content is reply.content:
            return reply
        self._models.take(reply.metadata.src_node_id, client_model)
        return delivered_message(content, reply.metadata)
