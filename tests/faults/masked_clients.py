"""Eight clients that answer secure aggregation on the in-process engine, with hands on every exchange."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.client.secure_update import SEALED_MEMORY, NodeMemory, secure_update
from fedveil.messages.client_settings import Encryption
from fedveil.messages.secure_wire import read_position
from fedveil.messages.wire import WEIGHT, Exchange, memory_arrays
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec
from fedveil.server.masking import Masking, masked_spec
from fedveil.server.round_terms import Sum
from fedveil.server.secure_sum import ATTEMPTS, Opened, SecureSums
from fedveil.simulations.in_process import InProcessGrid
from fedveil.strategies.identity import FIRST_NODE, simulated_identity, simulated_roster

KEY = bytes(range(32)).hex()
CLIENTS = 8
LAYOUT = {"w": (3, 5), "b": (4,)}
ASKED = Encryption(KEY, CLIENTS, 2, 0.125, 0.25, 100.0, 0.0, "malicious")
LOSS = Segment("loss", 5.0)

Fault = Callable[[Message, int], Message | None]


def masking(clients: int = CLIENTS, **changed) -> Masking:
    roster, _ = simulated_roster(KEY, clients)
    return replace(Masking(roster, dropout=0.25, collusion=0.125, max_examples=20), **changed)


def update_of(client: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(client)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in LAYOUT.items()}


def app_of(
    fault: Fault | None = None,
    asked: Encryption = ASKED,
    training=None,
    trained: dict[int, int] | None = None,
    seen: list[tuple[Message, Message]] | None = None,
    memory: NodeMemory = SEALED_MEMORY,
) -> ClientApp:
    """Return the app of nodes that 'train' by adding their update; `fault` may take an exchange from a node."""
    app, trained, seen = ClientApp(), {} if trained is None else trained, [] if seen is None else seen

    def mod(message, context, call_next):
        client = int(str(context.node_config["partition-id"]))
        answer = fault(message, client) if fault else None
        if answer is None:
            identity = simulated_identity(asked, client)
            answer = secure_update(identity, Randomness(7), message, context, call_next, memory=memory)
        seen.append((message, answer))
        return answer

    @app.train(mods=[mod])
    def train(message: Message, context: Context) -> Message:
        client = int(str(context.node_config["partition-id"]))
        trained[client] = trained.get(client, 0) + 1
        if training is not None and (reply := training(message, client)) is not None:
            return reply
        arrays = {k: v.numpy() + update_of(client)[k] for k, v in message.content["arrays"].items()}
        metrics = MetricRecord({WEIGHT: client + 1, "loss": 1.0, "secret": 3.14})
        return Message(RecordDict({"a": memory_arrays(arrays), "m": metrics}), reply_to=message)

    return app


class Clients(InProcessGrid):
    """Such nodes; `trained` counts by node how often the app was called, `seen` keeps all that travelled."""

    def __init__(
        self,
        fault: Fault | None = None,
        asked: Encryption = ASKED,
        training=None,
        workers: int = 1,
        clients: int = CLIENTS,
        memory: NodeMemory = SEALED_MEMORY,
    ) -> None:
        self.trained: dict[int, int] = {}
        self.seen: list[tuple[Message, Message]] = []
        asked = replace(asked, clients=clients)
        app = app_of(fault, asked, training, self.trained, self.seen, memory)
        super().__init__(app, clients, {}, workers)


def content() -> RecordDict:
    arrays = {name: np.full(shape, 0.5, np.float32) for name, shape in LAYOUT.items()}
    return RecordDict({"arrays": memory_arrays(arrays), "config": ConfigRecord({"lr": 0.1})})


def wanted(noise: float = 0.0) -> Sum:
    private = SumSpec(10.0, (LOSS, Segment(WEIGHT, 20.0)), 0.02)
    plain = masked_spec(SumSpec(None, (LOSS, Segment(WEIGHT, 1e9))), masking())
    return Sum("run", 3, content(), "train", private if noise else plain, LAYOUT, noise)


def summed(grid: Clients, asked: Sum, **changed) -> Opened:
    nodes = range(FIRST_NODE, FIRST_NODE + CLIENTS)
    return SecureSums(grid, masking(**changed)).sum(list(nodes), asked, None)


def rounds_of(
    grid: Clients, asked: Sum, count: int, cohorts: Sequence[Sequence[int]] = (), **changed
) -> list[Opened]:
    """Return so many rounds, each of which knows the next one's cohort; all eight nodes where none is given."""
    sums = SecureSums(grid, masking(**changed))
    everybody = list(range(FIRST_NODE, FIRST_NODE + CLIENTS))
    drawn = [*cohorts, *[everybody] * (count + 1 - len(cohorts))]
    return [sums.sum(drawn[i], replace(asked, row=asked.row + i), None, drawn[i + 1]) for i in range(count)]


def gone(since: Exchange, *clients: int, attempts: int = ATTEMPTS) -> Fault:
    def fault(message: Message, client: int) -> Message | None:
        place = read_position(message.content)
        absent = client in clients and place.exchange >= since and place.attempt < attempts
        return Message(Error(1, "gone"), reply_to=message) if absent else None

    return fault
