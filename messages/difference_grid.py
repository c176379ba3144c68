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

from .flower_adapter import delivered_message, records_of
from .grids import PassingGrid
from .model_difference import bytes_of, difference, hash_of
from .traffic import TrafficPurpose, purpose_of
from .wire import NO_BASE, SPEC_RECORD, ModelStatement, read_statement, split_report, views, with_model

Arrays = Mapping[str, NDArray[np.generic]]

MAX_MODELS, MAX_BYTES = 32, 1 << 29  # stored models; a client with an older one gets the whole model


class ClientModels:
    """Models of the last rounds, and which of them each node holds; a model's name is its hash."""

    def __init__(self) -> None:
        self._models = OrderedDict[str, Arrays]()  # oldest first
        self._by_node = dict[int, str]()  # model that each node holds
        self._before = dict[int, str]()  # model that a node held before the one that it has not answered
        self._differences = dict[tuple[str, str], bytes]()  # to the newest model, by base and model
        self._newest: tuple[ArrayRecord, ModelStatement] | None = None  # record sent last, and its statement

    def take(self, node: int, model: str) -> None:
        """Record a node's held model; one that is no longer stored counts as none."""
        self._before.pop(node, None)
        if model in self._models:
            self._by_node[node] = model
        else:
            self._by_node.pop(node, None)

    def take_back(self, node: int) -> None:
        """Record that a node did not begin an instruction, and still holds its earlier model."""
        if node in self._before:
            self.take(node, self._before[node])

    def encode(self, messages: Sequence[Message], again: bool = False) -> list[Message]:
        """Return the messages to send, each as short as its node's held model allows; shared content stays shared.

        A node then counts as holding no model until `take` or `take_back` is called for its reply.

        Args:
          messages: at most one to each node.
          again: whether the nodes could not apply a difference (`NO_BASE`), so that each gets the whole model.
        """
        contents = dict[tuple[int, str], RecordDict]()  # by identity of the whole content, and base
        return [self._encoded(each, again, contents) for each in messages]

    def encode_for_storing(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages as `encode` does, and record at once that each node holds its model: a simulation has no reports."""
        encoded = self.encode(messages)
        for message in encoded:
            if (statement := read_statement(message.content)) is not None:
                self.take(message.metadata.dst_node_id, statement.model)
        return encoded

    def _encoded(self, message: Message, again: bool, contents: dict[tuple[int, str], RecordDict]) -> Message:
        """Return an instruction to train with its model as a difference, or whole; other messages as they are."""
        content, head = message.content, message.metadata
        arrays = records_of(content, ArrayRecord)
        trains = purpose_of(content) is TrafficPurpose.TRAINING
        if len(arrays) != 1 or SPEC_RECORD not in content or not trains:
            return message
        ((name, record),) = arrays.items()
        whole = self._statement_of(name, record)
        client_model = self._by_node.pop(head.dst_node_id, "")  # until a reply says what the node holds
        base = self._before[head.dst_node_id] = "" if again else client_model
        key = id(content), base
        if key not in contents:
            change = self._difference(base, whole.model) if base else b""
            contents[key] = with_model(content, replace(whole, difference=change, again=again))
        content = contents[key]
        return Message(content, head.dst_node_id, head.message_type, ttl=head.ttl, group_id=head.group_id)

    def _statement_of(self, name: str, record: ArrayRecord) -> ModelStatement:
        """Return the statement of a model that is sent whole, and store the model."""
        if self._newest is None or self._newest[0] is not record:
            arrays = views(record)
            statement = ModelStatement(hash_of(arrays), name, bytes_of(arrays))
            self._newest = record, statement
            self._store(statement.model, arrays)
        return self._newest[1]

    def _store(self, model: str, arrays: Arrays) -> None:
        """Store the newest model, and forget the oldest ones beyond `MAX_MODELS` or `MAX_BYTES`, but not the last two."""
        self._models[model] = arrays
        self._models.move_to_end(model)
        capacity = min(MAX_MODELS, max(2, MAX_BYTES // max(1, bytes_of(arrays))))
        while len(self._models) > capacity:
            self._models.popitem(last=False)
        self._by_node = {node: model for node, model in self._by_node.items() if model in self._models}
        self._differences.clear()  # they lead to an earlier model

    def _difference(self, base: str, model: str) -> bytes:
        """Return the difference between two stored models; empty if the whole model is shorter."""
        if (base, model) not in self._differences:
            change = difference(self._models[base], self._models[model])
            self._differences[base, model] = change or b""
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

        At most one message goes to each node; `timeout` is in seconds for both sendings together, None is no limit.
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
        """Return a reply without the report of its node's held model, and record what the node holds."""
        if reply.has_error():
            self._models.take_back(reply.metadata.src_node_id)
            return reply
        content, client_model = split_report(reply.content)
        if content is reply.content:
            return reply
        self._models.take(reply.metadata.src_node_id, client_model)
        return delivered_message(content, reply.metadata)
