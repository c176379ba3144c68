"""Jobs of NVFLARE for tests: its own types around a client with the filter, and around a server with the aggregator."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from fedveil.adapters.nvflare.exchange import VECTOR
from fedveil.adapters.nvflare.job_terms import JobTerms
from fedveil.adapters.nvflare.private_aggregator import PrivateAggregator, ReservedTask
from fedveil.adapters.nvflare.update_filter import UpdateFilter

CLIENTS = 3
TERMS = JobTerms("shops", CLIENTS, CLIENTS, 2, 1.0, 1000.0, 1e-2, accept_vacuous=True)
START = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "n": np.array(7),
    "b": np.zeros(2, np.float32),
}
Trains = Callable[[int, dict[str, Any]], dict[str, Any]]


@dataclass
class Engine:
    """The parts of NVFLARE's engine that a component asks, with the clients and the controller of a job."""

    clients: int = CLIENTS
    controller: Any = None
    events: list[str] = field(default_factory=list[str])

    def get_clients(self) -> list[str]:
        return [f"site-{n}" for n in range(self.clients)]

    def get_component(self, name: str) -> Any:
        return self.controller

    def fire_event(self, event: str, fl_ctx: FLContext) -> None:
        reason = fl_ctx.get_prop(FLContextKey.EVENT_DATA) if event == EventType.FATAL_SYSTEM_ERROR else ""
        self.events += [str(reason)] if reason else []


def context_of(engine: Engine, task: str = "train") -> FLContext:
    context = FLContext()
    context.set_prop(ReservedKey.ENGINE, engine, private=True, sticky=False)
    context.set_prop(FLContextKey.TASK_NAME, task, private=True, sticky=False)
    return context


def stepped(number: int, arrays: dict[str, Any]) -> dict[str, Any]:
    """A client's training: steps of different lengths, and a counter that goes on."""
    step = np.float32(0.3 * (number + 1))
    return {k: v + (9 if k == "n" else step) for k, v in arrays.items()}


class Client:
    """A client with the filter on both chains, as NVFLARE builds them: two objects."""

    def __init__(self, clipping_norm: float = 1.0, site: bool = False) -> None:
        self.chains = {}
        for chain in (FilterChainType.TASK_DATA_CHAIN, FilterChainType.TASK_RESULT_CHAIN):
            self.chains[chain] = [UpdateFilter(clipping_norm) for _ in range(2 if site else 1)]
            for each in self.chains[chain]:
                each.set_prop(FilterContextKey.CHAIN_TYPE, chain)

    def answer(self, task: Shareable, result: Shareable, name: str = "train") -> Shareable:
        context = context_of(Engine(), name)
        for each in self.chains[FilterChainType.TASK_DATA_CHAIN]:
            task = each.process(task, context)
        for each in self.chains[FilterChainType.TASK_RESULT_CHAIN]:
            result = each.process(result, context)
        return result


def task_of(model: dict[str, Any]) -> Shareable:
    return DXO(DataKind.WEIGHTS, data=model).to_shareable()


def result_of(model: dict[str, Any], kind: str = DataKind.WEIGHTS) -> Shareable:
    meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: 4321, MetaKey.INITIAL_METRICS: {"accuracy": 0.25}}
    shareable = DXO(kind, data=model, meta=meta).to_shareable()
    shareable.set_header("patients", 17)
    return shareable


def vector_of(reply: Shareable) -> Any:
    return from_shareable(reply).data[VECTOR]


class Server:
    """A server's aggregator and filter, driven as NVFLARE's FedAvg drives them."""

    def __init__(self, terms: JobTerms = TERMS, connected: int = CLIENTS) -> None:
        self.aggregator = PrivateAggregator(asdict(terms))
        self.engine = Engine(connected, SimpleNamespace(aggregator=self.aggregator))
        self.context = context_of(self.engine)
        self.filter = ReservedTask()
        self.aggregator.handle_event(EventType.START_RUN, self.context)

    def send(self, model: dict[str, Any], name: str = "train") -> Shareable:
        return self.filter.process(task_of(model), context_of(self.engine, name))

    def accept(self, number: int, reply: Shareable) -> None:
        model = FLModelUtils.from_shareable(reply)
        model.meta["client_name"] = f"site-{number}"
        self.aggregator.accept_model(model)

    def round(self, model: dict[str, Any], trains: Trains = stepped) -> dict[str, Any]:
        self.aggregator.reset_stats()
        for number in range(CLIENTS):
            task = self.send(model)
            reply = Client().answer(task, result_of(trains(number, model)))
            if reply.get_return_code() == ReturnCode.OK:
                self.accept(number, reply)
        return self.aggregator.aggregate_model().params  # pyright: ignore[reportReturnType]

    def end(self) -> None:
        self.aggregator.handle_event(EventType.END_RUN, self.context)


@contextmanager
def served(terms: JobTerms = TERMS, connected: int = CLIENTS) -> Iterator[Server]:
    server = Server(terms, connected)
    try:
        yield server
    finally:
        server.end()
