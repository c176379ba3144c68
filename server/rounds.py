"""Round loop: reserve, configure, train, aggregate, evaluate, checkpoint; the same on every grid.

Flower's `Strategy.start` always begins at round one and loses the model when a round raises. This loop can resume, and
ends in order if the budget is spent or the user interrupts.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType

import numpy as np
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import Strategy

from ..messages.wire import memory_arrays, only_arrays, views
from ..privacy.ledger.ledger import BudgetExhausted
from ..strategies.registry import aggregated
from ..strategies.shared_model import steps_after
from .checkpoint import Arrays, State, Trial, strategy_state
from .private_grid import BUDGET_REASON, PrivateGrid
from .round_terms import Round
from .run_status import Status
from .tuning import NO_TUNING, Tuning

DECLINED = "every owner's policy refuses the server's order; the log of each client names it"
FORKED = (
    "most devices of the round have seen another log of this server, which was restored from an older copy or keeps two logs; "
    "restore its newest copy (docs/backups.md)"
)
MIN_VARIANCE_RATIO = 0.1  # of batch normalisation after a round, as a part of that before it
SPENT = "no invited client's ledger affords another round: this target_epsilon or its owner's budget is spent or over"


class Unscored(Exception):
    """No arm's model could be scored, so no value wins."""


class Interruption(threading.Event):
    """Flag that ends a run after its round; `number` is the signal that set it."""

    number = 0


@dataclass(frozen=True)
class Ending:
    """The last state and why the run ended there; `signal` is the number of the signal that ended it, or 0."""

    status: Status
    reason: str
    state: State
    signal: int = 0


@dataclass(frozen=True)
class Pace:
    """Timing of rounds with clients that come and go.

    Attributes:
      deadline: seconds that an exchange waits for replies.
      ready: waits until the next round may begin, or until the event is set; returns why it may not, or None.
      patience: consecutive abandoned rounds after which the run has failed; 0 never fails for this reason.
    """

    deadline: float = 3600.0
    ready: Callable[[threading.Event], str | None] = lambda stop: None
    patience: int = 0


@dataclass(frozen=True)
class Loop:
    """Steps of every round of a run.

    Attributes:
      strategies: Flower strategies that average, one for each arm with the same settings; a run without arms has one.
      num_rounds: the last round's number.
      evaluate: held-out metrics of the global arrays; it reads public data only.
      after_round: called with the state, the round and the evaluation function of its model; it writes checkpoints and
        shows progress, and returns the run's ending if an audit ends it.
      train_config: the strategy's configuration for the round after a state.
      pace: when a round begins, how long it waits, when the run is abandoned.
      average_after: round after which models are averaged; None for no average.
      tuning: assigns an arm to a round.
      score: measures the arms' models after a round at their clients, higher is better; raises Unscored if there is no
        valid score. None compares them by `evaluate`.
      difference_bits: of a coordinate of the clients' model, for `steps_after`; None rounds nothing.
      buffers: names of the model's arrays that do not train, such as the statistics of batch normalisation.
    """

    strategies: Sequence[Strategy]
    num_rounds: int
    evaluate: Callable[[Arrays, int], dict[str, float]]
    after_round: Callable[[State, Round, Callable[[], dict[str, float]]], Ending | None]
    train_config: Callable[[State], Mapping[str, int | float | str]]
    pace: Pace = field(default_factory=Pace)
    average_after: int | None = None
    tuning: Tuning = NO_TUNING
    score: Callable[[Sequence[Arrays], int], tuple[float, ...]] | None = None
    difference_bits: int | None = None
    buffers: frozenset[str] = frozenset()


def run_rounds(grid: PrivateGrid, loop: Loop, state: State) -> Ending:
    """Run the rounds after `state.round` and return the last state, for any ending."""
    grid.skip_to(state.round, state.choices)
    with interruption() as interrupted:
        while state.round < loop.num_rounds:
            failure = _abandonment(grid, loop.pace) or loop.pace.ready(interrupted)
            if interrupted.is_set():
                return Ending(Status.INTERRUPTED, "interrupted", state, interrupted.number)
            if failure is not None:
                return Ending(Status.FAILED, failure, state)
            grid.account.norm_factor = loop.tuning.norm_factor(state.round + 1, state.winner)
            try:
                grid.reserve(state.round + 1)
            except BudgetExhausted as spent:
                return Ending(Status.EXHAUSTED, str(spent), state)
            try:
                state, ending = _run_round(grid, loop, state)
            except Unscored as unscored:
                return Ending(Status.FAILED, str(unscored), state)
            if ending := ending or _without_clients(grid, state):
                return ending
    return _ending(grid, state)


def _without_clients(grid: PrivateGrid, state: State) -> Ending | None:
    """Return the ending of a run if its clients refuse every later round, or None."""
    if grid.all_spent:
        return Ending(Status.EXHAUSTED, SPENT, state)
    if grid.all_declined:
        return Ending(Status.FAILED, DECLINED, state)
    return Ending(Status.FAILED, FORKED, state) if grid.forked else None


def _abandonment(grid: PrivateGrid, pace: Pace) -> str | None:
    """Return why the run fails if too many rounds in a row were abandoned, or None."""
    abandoned = grid.rounds.abandoned
    if not 0 < pace.patience <= abandoned.count:
        return None
    reasons = ", ".join(sorted(abandoned.reasons)) or "nobody was drawn"
    return f"{abandoned.count} rounds in a row were abandoned ({reasons})"


def _ending(grid: PrivateGrid, state: State) -> Ending:
    """Return the ending of a run that was not stopped: failed if clients were invited and none replied."""
    reasons = grid.rounds.reasons
    if not reasons or grid.rounds.answered:
        return Ending(Status.COMPLETED, f"{state.round} rounds", state)
    if reasons == {BUDGET_REASON}:
        return Ending(Status.EXHAUSTED, SPENT, state)
    listed = ", ".join(sorted(reasons))
    if grid.rounds.untrue:
        return Ending(Status.FAILED, f"no sum was valid ({listed})", state)
    return Ending(Status.FAILED, f"no client ever replied ({listed})", state)


def _run_round(grid: PrivateGrid, loop: Loop, state: State) -> tuple[State, Ending | None]:
    """Train one reserved round; return the state after it, and the run's ending if an audit ends it here.

    A round of an arm starts from the arm's own model, any other round from the global one.
    """
    number = state.round + 1
    arm = loop.tuning.arm_of(number)
    arm_number = arm.number if arm else state.winner
    strategy = loop.strategies[(arm_number or 1) - 1]
    start = state.trials[arm.number - 1] if arm else state
    before, grid.steps = start.arrays, start.steps
    config = ConfigRecord(dict(loop.train_config(state)))
    messages = strategy.configure_train(number, memory_arrays(before), config, grid)
    replies = list(grid.send_and_receive(messages, timeout=loop.pace.deadline))
    del messages  # frees the model's copy in them before the merge makes another
    means = views(only_arrays(replies[0].content)) if replies and loop.buffers else {}
    merged = _merge(before, aggregated(strategy, number, replies), means, loop.buffers)
    del replies
    grid.account.record_model(merged)
    average = state.average
    if loop.average_after is not None and number > loop.average_after:
        average = average.plus(merged)
    bits, values = loop.difference_bits, strategy_state(strategy)
    steps = {} if bits is None else steps_after(before, merged, bits, start.steps)
    state = replace(state, round=number, arrays=merged, steps=steps, strategy=values)
    state = replace(state, choices=grid.choices, average=average)
    if arm is not None:
        state = _record_trial(state, arm.number, loop)
    return state, loop.after_round(state, grid.rounds.newest[-1], partial(loop.evaluate, merged, number))


def _record_trial(state: State, arm: int, loop: Loop) -> State:
    """Store the state of an arm after its round; after the arms' last round, choose the winner and go on with its model."""
    tuning = loop.tuning
    trials, before = list(state.trials), state.trials[arm - 1].average
    average = before.plus(state.arrays) if tuning.counts(state.round) else before
    trials[arm - 1] = Trial(state.arrays, state.strategy, average, state.steps)
    if state.round < tuning.last:
        return replace(state, trials=tuple(trials))
    models = [each.model for each in trials]
    if loop.score is not None:
        scores = loop.score(models, state.round)
    else:
        scores = tuple(tuning.score(loop.evaluate(model, state.round)) for model in models)
    winner = tuning.winner(scores)
    best = trials[winner - 1]
    state = replace(state, arrays=best.model, strategy=best.strategy, steps=best.steps)
    return replace(state, trials=(), scores=scores, winner=winner)


def _merge(before: Arrays, after: Arrays | None, means: Arrays, buffers: frozenset[str]) -> Arrays:
    """Return the model after a round: the strategy's parameters, and of the buffers the clients' means.

    The model's types stay; FedAdam returns others. The momentum of a strategy would take the variance of a batch
    normalisation below 0, and so may noise. Without a result of the strategy the model stays.
    """
    if after is None:
        return before
    after = {**after, **{name: means[name] for name in buffers & means.keys()}}
    for name in buffers & after.keys():
        if name.endswith("running_var"):
            after[name] = np.maximum(after[name], np.multiply(before[name], MIN_VARIANCE_RATIO))
    return {name: after[name].astype(value.dtype, copy=False) for name, value in before.items()}


@contextmanager
def interruption() -> Generator[Interruption]:
    """Turn the first Ctrl-C or SIGTERM into a flag that ends the run after its round; a second one is immediate."""
    flag = Interruption()
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield flag
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if flag.is_set():
            signal.default_int_handler(number, None)
        flag.number = number
        flag.set()
        with suppress(RuntimeError):  # the signal interrupted a write
            print("the run ends after this round; Ctrl-C again ends it now", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
