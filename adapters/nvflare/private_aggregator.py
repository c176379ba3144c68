"""Server's half of the private sum: an aggregator of NVFLARE that adds, noises and charges, and the filter of its tasks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from ...base.bounded_decoding import build
from ...base.refusal import Refusal
from ...privacy.ledger.ledger import BudgetExhausted
from ..population_budget import NobodyAnswered
from .exchange import SPEC, Model
from .job_rounds import JobRounds, job_rounds
from .job_terms import JobTerms

COUNT = "nr_aggregated"  # of replies, in the model's meta, which NVFLARE sends to all clients


class PrivateAggregator(ModelAggregator):
    """Aggregator of NVFLARE's `FedAvg` that makes one private sum of a round, and charges it before its task leaves.

    It refuses, and so ends the job, in the controller's own thread: `reset_stats` is called before a round's task exists.

    Args:
      terms: fields of `JobTerms`.
    """

    def __init__(self, terms: dict[str, Any]) -> None:
        super().__init__()
        self.terms = terms
        self._job_terms = build(JobTerms, terms)
        self._open = ExitStack()
        self._rounds: JobRounds | None = None

    @property
    def rounds(self) -> JobRounds:
        """Rounds of the job; before the first one is charged there are none, which is refused."""
        if not self._rounds:
            raise Refusal("round", 0, "no release of it is reserved, so no task leaves")
        return self._rounds

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Hide the exact count of replies from the clients, and close the ledger at the job's end.

        Args:
          event_type: of NVFLARE.
          fl_ctx: context of the event.
        """
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.AFTER_AGGREGATION:
            result = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT)
            if isinstance(result, FLModel):
                cast("dict[str, Any]", result.meta)[COUNT] = self._job_terms.clients
        elif event_type == EventType.END_RUN:
            self._open.close()

    def reset_stats(self) -> None:
        """Reserve the next round on the ledger, which the first call opens.

        Raises:
          Refusal: the terms are invalid, or the budget is spent.
          BudgetExhausted: the round does not fit.
          LedgerUnavailable: the ledger is in use, or cannot be written.
        """
        try:
            if not self._rounds:
                self._rounds = self._open.enter_context(job_rounds(self._job_terms))
            engine: Any = self._context.get_engine()
            self._rounds.reserve(len(engine.get_clients()))
        except (Refusal, BudgetExhausted) as refused:
            self.system_panic(str(refused), self._context)
            raise

    def accept_model(self, model: FLModel) -> None:
        """Add one client's vector, or say in the server's log why it is not used.

        Args:
          model: a reply of `UpdateFilter`.
        """
        meta, arrays = cast(Model, model.meta), cast(Model, model.params)
        client = str(meta.get("client_name"))
        if reason := self.rounds.take(client, arrays, meta.get(SPEC)):
            self.warning(f"the reply of {client} is not used: {reason}")

    def aggregate_model(self) -> FLModel:
        """Return the model plus the noised mean; raise Refusal or NobodyAnswered where there is none."""
        try:
            model = self.rounds.release()
        except NobodyAnswered as nobody:
            self.system_panic(str(nobody), self._context)
            raise
        return FLModel(params_type=ParamsType.FULL, params=model, meta={})

    @property
    def _context(self) -> FLContext:
        return cast(FLContext, self.fl_ctx)


class ReservedTask(Filter):
    """Filter of a server's tasks, which lets only those leave that the ledger has paid for.

    Args:
      task_name: the one task of the job.
      controller_id: of the controller with the `PrivateAggregator`.
    """

    def __init__(self, task_name: str = "train", controller_id: str = "controller") -> None:
        super().__init__()
        self.task_name = task_name
        self.controller_id = controller_id

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Return the task; raise Refusal if no round of it is reserved, so that NVFLARE does not send it.

        Args:
          shareable: of the task.
          fl_ctx: context of the task.
        """
        task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
        engine: Any = fl_ctx.get_engine()
        aggregator = getattr(engine.get_component(self.controller_id), "aggregator", None)
        if task != self.task_name or not isinstance(aggregator, PrivateAggregator):
            raise Refusal("task", task, "no release covers its results, so it is not sent")
        aggregator.rounds.send(cast(Model, from_shareable(shareable).data))
        return shareable
