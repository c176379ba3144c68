"""Protection of whole clients for a user's Flower app, in one call."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..base.durable_files import open_for_owner
from ..base.refusal import Refusal
from ..messages.flower_adapter import report_in_sentences, start_checked
from ..messages.grids import PassingGrid
from ..messages.wire import WEIGHT, common_content
from ..privacy.budget import Budget
from ..privacy.ledger.caps import capped, caps_on
from ..privacy.ledger.ledger import BudgetExhausted, Ledger
from ..privacy.ledger.question_caps import require_purposes
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.plan import Plan
from ..privacy.statistics.evaluation import EVALUATION
from ..questions.evaluations import ClientEvaluation, events_of, means_of, noise_of, planned_half_width
from ..questions.sums import Charge, ask_cohort
from ..questions.wire import with_evaluation
from ..server.participants import Participants
from ..server.private_grid import PrivateGrid
from ..server.query_rows import name_of, row_after
from ..server.round_terms import Round, SumPrivacy
from ..strategies.cohorts import All, Cohort, tossed_rate
from ..strategies.registry import check_averages
from .population_budget import (
    ADVERSARIES,
    NobodyAnswered,
    check_terms,
    fitted,
    ledger_path,
    open_ledger,
    require_use,
    round_line,
)

# File next to the ledger with facts about rounds that only a trusted server may read, such as counts of replies.
OPERATOR = ".operator.jsonl"
# The probability that empty draws alone end a run for lack of answers is at most this times delta. The end is public and
# adds at most e^epsilon times that to delta.
BY_CHANCE = 1e-6

logger = logging.getLogger("flwr.fedveil")  # below Flower's logger, whose output users read


@contextmanager
def protect(
    grid: Grid,
    *,
    data_id: str,
    population: int,
    cohort: Cohort,
    budget: Budget,
    clipping_norm: float,
    num_rounds: int,
    ledger_dir: Path | str | None = None,
    allow_large_delta: bool = False,
    accept_vacuous: bool = False,
    parameters: int | None = None,
    held_out: Literal["public", "private"] = "private",
    evaluate: ClientEvaluation | None = None,
) -> Generator[ProtectedGrid]:
    """Wrap a Flower grid so that a strategy's rounds stay within the budget; use it in a `with` block.

    The noise is the smallest with which `num_rounds` more rounds fit the ledger's remaining budget. The clients' apps
    need the mod `fedveil.client.private_update.private_update`. Noise and draws come from the operating system.

    Args:
      grid: reaches the clients.
      data_id: names the clients' data, and so their ledger; a later run with the same name continues the same budget,
        from any working folder. Letters, digits, `-`, `_` and `.`, at most 64.
      population: number of clients, a public number.
      cohort: draws the clients of each round; the strategy's own sampling has no effect.
      budget: at the client level, for all releases on this ledger.
      clipping_norm: L2 norm of the largest update, all parameters together.
      num_rounds: rounds to plan for; a further round is refused once the budget is spent.
      ledger_dir: an absolute folder for the ledger; None is the user's default, which `fedveil budget` reads.
      allow_large_delta: accept a delta above one over the population.
      accept_vacuous: accept a vacuous guarantee, or rounds with empty cohorts.
      parameters: number of the model's, at least 1. A small model learns from fewer than 30 clients; None refuses these.
      held_out: whether the data of the strategy's `evaluate_fn` are public. Metrics on private data are a release that
        no budget covers, so a strategy with such data does not start.
      evaluate: lets all clients evaluate the model in a private sum of its own; its charge is planned with the rounds.
        Their apps need the mod `fedveil.questions.private_evaluation.private_evaluation`, and the strategy a
        `fraction_evaluate` above 0. None evaluates at no client.

    Returns:
      A context manager of the protected grid.

    Raises:
      Refusal: an argument is invalid, or the budget is spent before the first round.
      LedgerUnavailable: another process has the ledger open, or it cannot be written.
      NobodyAnswered: no client ever answered.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> import fedveil as fv
      >>> from fedveil.simulations.in_process import InProcessGrid
      >>> from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
      >>> from flwr.clientapp import ClientApp
      >>> from flwr.serverapp.strategy import FedAvg
      >>> app = ClientApp()
      >>> @app.train(mods=[fv.private_update])
      ... def train(message, context):
      ...     weights = message.content["arrays"]["w"].numpy() + 0.1
      ...     metrics = MetricRecord({"num-examples": 1})
      ...     arrays = ArrayRecord({"w": Array(weights)})
      ...     return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
      >>> grid = InProcessGrid(app, num_clients=100, run_config={})
      >>> private = fv.protect(
      ...     grid,
      ...     data_id="shops-2026",
      ...     population=100,
      ...     cohort=fv.Poisson(0.25),
      ...     budget=fv.Budget("client", target_epsilon=8.0, target_delta=1e-3),
      ...     clipping_norm=1.0,
      ...     num_rounds=3,
      ...     ledger_dir=tempfile.mkdtemp(),
      ... )
      >>> start = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
      >>> with private as protected:
      ...     result = FedAvg().start(grid=protected, initial_arrays=start, num_rounds=3)
      >>> result.arrays["w"].numpy().shape
      (2,)
    """
    report_in_sentences(Refusal, NobodyAnswered)
    if held_out not in ("public", "private"):
        raise Refusal("held_out", held_out, "must be public or private")
    if warning := check_terms(budget, cohort, population, allow_large_delta, parameters):
        logger.warning(warning)
    path = ledger_path(data_id, ledger_dir)
    budget = capped(path, budget)
    plan = Plan(budget.unit, budget.adjacency, cohort, clipping_norm, num_rounds, adversaries=ADVERSARIES)
    evaluating, other_events = None, []
    if evaluate is not None:
        for cap in caps_on(path):
            require_purposes([EVALUATION], cap)
        evaluating = _evaluation_terms(evaluate, plan, population, budget)
        other_events = events_of(evaluating.plan, len(evaluating.rounds))
    # Planned at first as if nothing was spent, so that a bad plan is refused before a folder or a ledger is made.
    plan = plan.calibrate(budget, other_events)
    expected = cohort.expected_size(population)
    if not accept_vacuous:
        require_use(plan, expected, cohort.coin, population, parameters)
    with open_ledger(path, data_id, budget) as ledger:
        plan = fitted(plan, budget, ledger, other_events)
        if not accept_vacuous:
            require_use(plan, expected, cohort.coin, population, parameters)
        privacy = SumPrivacy(plan, ledger)
        inner = PrivateGrid(Participants(grid, cohort, population, declared=True), privacy=privacy)
        protected = ProtectedGrid(inner, privacy, budget, evaluating)
        with start_checked(partial(_check_start, protected, held_out)):
            yield protected


# --- evaluation at the clients ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationTerms:
    """Evaluations at the clients in a run, planned with its rounds."""

    terms: ClientEvaluation  # as the user gave them
    plan: Plan  # of one evaluation: the noise, and all clients
    rounds: tuple[int, ...]  # numbers of the rounds after which the clients evaluate
    name: str  # of the releases on the ledger, new for every run


def _evaluation_terms(
    terms: ClientEvaluation, plan: Plan, population: int, budget: Budget
) -> EvaluationTerms:
    """Return the terms of a run's evaluations; refuse too wide an interval. `plan` is that of the training rounds."""
    rounds = terms.rounds(plan.num_rounds)
    noise = noise_of(terms.noise_multiplier, len(rounds))
    plan_of_one = replace(plan, sampling=All(), num_rounds=1, noise_multiplier=noise)
    name = name_of(uuid.uuid4().hex)
    planned_half_width(terms.asked(name), plan_of_one, population, terms.resolution, budget.target_delta)
    return EvaluationTerms(terms, plan_of_one, rounds, name)


def _evaluate(
    evaluating: EvaluationTerms,
    grid: PrivateGrid,
    ledger: Ledger,
    messages: list[Message],
    timeout: float | None,
) -> list[Message]:
    """Charge the ledger, let all clients evaluate the model, and return their means and intervals as one reply.

    The list is empty if the budget does not allow it, or if no mean can be estimated; the run goes on.
    """
    number = grid.rounds.newest[-1].number
    evaluation = evaluating.terms.asked(evaluating.name)
    charge = Charge(evaluating.plan, ledger, evaluation, Randomness(), row_after(number))
    try:
        charge.reserve()
    except BudgetExhausted as spent:
        logger.error("clients do not evaluate: %s", spent)
        return []
    content = with_evaluation(common_content(messages), evaluation)
    everybody = replace(grid.participants, cohort=All())
    _, mean = ask_cohort(everybody, charge, content, None, timeout, messages[0].metadata.message_type)
    if mean is None:
        return []
    charge.settle()
    means = means_of(dict(evaluation.answers(mean.counts, mean.noise, everybody.clients)))
    texts = [f"{name} {each.value:.4f} ({each.low:.4f} to {each.high:.4f})" for name, each in means.items()]
    summary = ", ".join(texts)
    logger.info("the clients after round %d: %s", number, summary or "no mean can be estimated")
    if not means:
        return []
    ends = {f"{name}/{end}": getattr(each, end) for name, each in means.items() for end in ("low", "high")}
    metrics = {name: each.value for name, each in means.items()} | ends
    return [Message(RecordDict({"metrics": MetricRecord({**metrics, WEIGHT: 1})}), reply_to=messages[0])]


# --- the gate -----------------------------------------------------------------------------------------------------


def _check_start(
    protected: ProtectedGrid, held_out: str, strategy: Strategy, grid: object, evaluate_fn: object
) -> None:
    """Refuse, before `Strategy.start`, a strategy that needs single replies or measures on private data.

    A strategy on another grid passes; for one on this grid the `start_round` is set.
    """
    if grid is not protected:
        return
    check_averages(strategy)
    protected.start_round = protected.grid.rounds.count
    if evaluate_fn is not None and held_out == "private":
        remedy = 'the held-out data count as private; if they are public, pass held_out="public" to protect, otherwise leave it out'
        raise Refusal("evaluate_fn", getattr(evaluate_fn, "__name__", "given"), remedy)


# --- the rounds ---------------------------------------------------------------------------------------------------


@dataclass
class ProtectedGrid(PassingGrid):
    """Grid that `protect` yields: it logs one line per round, and does nothing after the end of the run.

    Attributes:
      grid: grid that makes one private sum of a round.
      privacy: plan of the sums, and the open ledger that pays for them.
      budget: budget of the ledger, lowered to the caps of the data's owner.
      evaluating: terms of the evaluations; None without evaluations.
      ended: reason why the run has ended; None while it continues.
      start_round: number of rounds before the present strategy started.
    """

    grid: PrivateGrid
    privacy: SumPrivacy
    budget: Budget
    evaluating: EvaluationTerms | None = None
    ended: str | None = None
    start_round: int = 0
    _warned_of_evaluation: bool = False

    def __post_init__(self) -> None:
        super().__init__(self.grid)

    def get_node_ids(self) -> Iterable[int]:
        """Return stand-in nodes, as `PrivateGrid` does; before the first round, warn if clients are not connected."""
        nodes, everybody = self.grid.get_node_ids(), self.grid.participants
        connected, clients = len(everybody.first_nodes(everybody.clients)), everybody.clients
        if connected < clients and not self.grid.rounds.count:
            logger.warning("%d of %d clients are connected: later ones take no part", connected, clients)
        return nodes

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run one private sum and return it as one reply; nothing after the end of the run, so that the model is unchanged.

        Messages that evaluate start an evaluation instead. Arguments as of `PrivateGrid.send_and_receive`;
        NobodyAnswered if no client ever answered, Refusal if the run ends before this strategy had a round.
        """
        messages, rounds_before = list(messages), self.grid.rounds.count
        if any(m.metadata.message_type.split(".")[0] == "evaluate" for m in messages):
            return self._evaluate(messages, timeout)
        if self.ended is not None:
            return [] if rounds_before > self.start_round else self._end(self.ended)
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        if self.grid.exhausted is not None:
            return self._end(str(self.grid.exhausted))
        if self.grid.rounds.count == rounds_before:  # no message of training, and the grid sends no others
            return replies
        self._log_round(self.grid.rounds.newest[-1])
        reason = self._silence_reason()
        if reason is None:
            return replies
        if not self.grid.rounds.answered:
            raise NobodyAnswered(reason)
        return self._end(reason)

    def _evaluate(self, messages: list[Message], timeout: float | None) -> list[Message]:
        """Return the reply of an evaluation that is due after the last round, or nothing."""
        if self.evaluating is None:
            self._warn_of_evaluation()
            return []
        rounds = self.grid.rounds
        if (
            self.ended is not None
            or not rounds.count
            or rounds.newest[-1].number not in self.evaluating.rounds
        ):
            return []
        return _evaluate(self.evaluating, self.grid, self.privacy.ledger, messages, timeout)

    def _end(self, reason: str) -> list[Message]:
        """End the run and return no replies, so that the model stays; refuse a strategy that had no round."""
        self.ended = reason
        if self.grid.rounds.count == self.start_round:  # Flower would return an empty model
            raise Refusal("num_rounds", "none is left for this strategy", reason)
        logger.error("the run ends here: %s; the model stays unchanged", reason)
        return []

    def _log_round(self, round_: Round) -> None:
        """Log a round's result; exact counts, which may depend on a client's data, go to the operator's file."""
        ledger = self.privacy.ledger
        counts = {name: getattr(round_, name) for name in ("invited", "replies", "dropped")}
        with open_for_owner(ledger.path.with_name(ledger.path.stem + OPERATOR)) as file:
            file.write((json.dumps({"round": round_.number, **counts}) + "\n").encode())
        logger.info(round_line(round_.number, self.grid.participants.expected, self.budget, ledger))

    def _warn_of_evaluation(self) -> None:
        if not self._warned_of_evaluation:
            logger.warning(
                "clients do not evaluate, since no budget covers their metrics: pass evaluate=ClientEvaluation(...) "
                "to protect, or give the strategy an evaluate_fn, and fraction_evaluate=0"
            )
        self._warned_of_evaluation = True

    def _silence_reason(self) -> str | None:
        """Return why the run ends if no client answered for more rounds than empty draws explain; else None."""
        silent = self.grid.rounds.silent
        if silent.count < self._patience():
            return None
        reasons = sorted(silent.reasons)
        first, end = silent.first, self.grid.rounds.newest[-1].number
        rounds = f"round {end}" if first == end else f"rounds {first} to {end}"
        return (
            f"no client answered in {rounds} ({', '.join(reasons) or 'nobody was drawn'}): read a client's log for "
            "an exception, and check that its training has the mod private_update; these rounds' cost is spent"
        )

    def _patience(self) -> int:
        """Return the least number n of rounds that are all empty with (1 - rate)^(clients n) <= BY_CHANCE delta."""
        rate = tossed_rate(self.grid.participants.cohort)
        if rate >= 1:
            return 1
        log_of_empty_round = self.grid.participants.clients * math.log1p(-rate)
        return math.ceil(math.log(BY_CHANCE * self.budget.target_delta) / log_of_empty_round)
