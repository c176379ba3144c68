"""Progress of a run: where its rounds begin, the line that each leaves, and its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from ..base.bounded_decoding import json_number
from ..base.durable_files import append_line
from ..base.refusal import Refusal
from ..configs.round_line import AT_BOUND, TRAIN
from ..messages.traffic import NOTHING, Carried, Tally
from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.accounting.renyi_filter import spent_epsilon
from ..privacy.adaptation import Choices
from ..privacy.budget import Adversary, Unit
from ..server.checkpoint import Checkpoint, State, Trial, restore_strategy, write
from ..server.round_terms import Round
from ..strategies.cohorts import in_arm, invited_size
from ..tasks.arrays import holds_arrays, read_arrays
from .callbacks import RoundEnd, frozen, read_only_model
from .files import BLAME, OPERATOR
from .observer import Observer
from .prepared_run import Run
from .record_ledgers import RecordMeter
from .round_lines import History, forget_rounds_after, metric_means, tell_operator
from .run_files import read_rows


@dataclass
class Progress:
    """Progress of a run: its mutable state.

    Attributes:
      run: the fixed part; its federation is replaced when clients join or leave.
      state: state after the last finished round.
      observer: observer of the run's released sums.
      meter: meter of record-level loss.
      history: the finished rounds' lines of METRICS.
      tally: counts this process's bytes to and from the clients.
      reported_bytes: the part of them in recorded rounds.
      before: traffic of earlier processes' rounds.
      remembered: the observer's memory after `state`, for a checkpoint; its current one may be a round ahead.
      scores: records of how the clients of each arm scored its model, for the line of the round that compares them.
    """

    run: Run
    state: State
    observer: Observer
    meter: RecordMeter
    history: History
    tally: Tally = field(default_factory=Tally)
    reported_bytes: Carried = NOTHING
    before: Carried = NOTHING
    remembered: Mapping[str, NDArray[np.float64]] = field(default_factory=dict[str, NDArray[np.float64]])
    scores: Sequence[Mapping[str, Any]] = ()

    def traffic(self) -> Carried:
        """Return the traffic that is not reported yet, and count it as reported: the caller records it with a round."""
        before, self.reported_bytes = self.reported_bytes, self.tally.total()
        return self.reported_bytes.minus(before)


def read_progress(
    run: Run, strategies: Sequence[Strategy], observer: Observer, meter: RecordMeter, tally: Tally
) -> Progress:
    """Return the run's progress from its checkpoint, or at its start; delete the operator's lines of later rounds.

    The strategies, one for each arm or one for all clients, are set to their state in the checkpoint.

    Raises:
      Refusal: the checkpoint holds another model.
    """
    arrays, folder = read_arrays(run.federation.task.model()), run.folder
    state = State(0, arrays, {}, trials=tuple(Trial(arrays, {}) for _ in run.tuning.values))
    if run.checkpoint.run:
        if not holds_arrays(run.federation.task.model(), run.checkpoint.state.arrays):
            raise Refusal("resume", str(folder), "its checkpoint holds another model; start a new run")
        state = _restored(run, strategies, list(arrays))
    forget_rounds_after(folder, state.round)
    history = History(folder, state.round)
    rows = read_rows(folder / OPERATOR) or history
    before = sum((Carried(**row["bytes"]) for row in rows if row.get("bytes")), start=NOTHING)
    audit = run.checkpoint.audit
    return Progress(run, state, observer, meter, history, tally, before=before, remembered=audit)


def _restored(run: Run, strategies: Sequence[Strategy], names: Sequence[str]) -> State:
    """Return the checkpoint's state with the arrays in the model's order; each strategy restores its own."""
    state = run.checkpoint.state
    if not state.trials:
        restore_strategy(strategies[(state.winner or 1) - 1], state.strategy)
    for arm, trial in enumerate(state.trials):
        restore_strategy(strategies[arm], trial.strategy)
    trials = (replace(trial, arrays={name: trial.arrays[name] for name in names}) for trial in state.trials)
    model = {name: state.arrays[name] for name in names}
    return replace(state, arrays=model, choices=_choices_after(run, run.checkpoint), trials=tuple(trials))


def _choices_after(run: Run, checkpoint: Checkpoint) -> Choices | None:
    """Return clip and noise after the checkpoint's round; for a run that got a new name, the noise is that of its new plan."""
    choices = checkpoint.state.choices
    if choices is None or run.privacy is None or checkpoint.run == run.name:
        return choices
    return replace(run.privacy.adaptation.first(run.privacy.plan), clipping_norm=choices.clipping_norm)


def record_round(
    progress: Progress,
    state: State,
    round_: Round,
    metrics: dict[str, float],
    cohort: list[int],
    evaluation: Mapping[str, Any] | None = None,
) -> RoundEnd:
    """Add the round to history and meter, write its evidence and its operator's line, and return the callbacks' value.

    Args:
      progress: before the round.
      state: state after the round.
      round_: record of the round.
      metrics: metrics of the new model on the held-out examples.
      cohort: numbers of the real clients that were drawn, where records are protected.
      evaluation: record of the clients' evaluation of the new model; None without one.
    """
    metrics = metrics | metric_means(evaluation)
    progress.meter.add(cohort)
    epsilons = _epsilons(progress)
    of_records = [
        value for unit, value in epsilons.items() if unit != Unit.CLIENT
    ]  # or of persons; at most one
    row = {
        "round": round_.number,
        **_nonempty(arm=round_.arm),
        **metrics,
        **{f"{TRAIN}{name}": value for name, value in round_.scalars.items()},
        **_nonempty(**{AT_BOUND: _at_bound(progress.run, round_)}),
        **_counts(progress, round_),
        "abandoned": round_.abandoned,
        **_nonempty(
            virtual_time=round_.virtual_time,
            exchanges=round_.exchanges,
            message_bytes=dict(zip(("down", "up"), round_.message_bytes or (), strict=False)),
            blamed=round_.blamed,
            cause=round_.cause,
            untrue=round_.untrue,
            suspected=round_.suspected,
            weighed=list(round_.weighed),
        ),
        "clipping_norm": round_.choices.clipping_norm if round_.choices else None,
        "noise_multiplier": round_.choices.noise_multiplier if round_.choices else None,
        "epsilon_client": json_number(epsilons.get("client")),
        "epsilon_record": json_number(next(iter(of_records), None)),
        **progress.observer.columns(round_.number),
        **_nonempty(evaluation=evaluation, scores=list(progress.scores)),
    }
    for evidence in round_.evidence:
        append_line(progress.run.folder / BLAME, evidence)
    progress.scores = ()
    progress.history.append(row)
    public = frozen(metrics), frozen(epsilons), frozen(row)
    return RoundEnd(round_.number, *public, read_only_model(state.arrays), progress.observer.line)


def _nonempty(**values: object) -> dict[str, object]:
    """Return the columns of a line that have a value; most rounds lack them."""
    return {name: value for name, value in values.items() if value}


def _at_bound(run: Run, round_: Round) -> list[str]:
    """Return the names of noised metrics at an end of their range, to which they were cut because noise carried them beyond."""
    if run.privacy is None:
        return []
    bounds = {metric.name: metric.bound for metric in run.federation.mode.metrics}
    return [
        f"{TRAIN}{name}" for name, value in round_.scalars.items() if value in (0.0, bounds.get(name, 1.0))
    ]


def _counts(progress: Progress, round_: Round) -> dict[str, Any]:
    """Return the public counts of a round; what only a trusted server may know goes to its operator's file."""
    federation = progress.run.federation
    counts = {
        "invited": round_.invited,
        "replies": round_.replies,
        "dropped": dict(sorted(round_.dropped.items())),  # independent of the order of replies
        "clipped_again": round_.clipped_again,
        "bytes": progress.traffic().to_json(),
    }
    if not federation.mode.hides_counts:
        return counts
    tell_operator(progress.run.folder, {"round": round_.number, **counts})
    arms = 1 if round_.arm is None else progress.run.tuning.arms
    clients_of_arm = round(federation.declared_clients / arms)
    planned = invited_size(in_arm(federation.cohort, arms), clients_of_arm)
    return {**dict.fromkeys(counts), "invited": planned}


def _epsilons(progress: Progress) -> dict[str, float]:
    """Return the loss so far by unit, infinite without a guarantee; that of real records is known only to owners."""
    ledger, promises = progress.run.ledger, progress.run.federation.mode.promises
    epsilons = {} if promises else {"client": math.inf}
    if ledger is not None:
        promise, events = promises[0], ledger.events(Adversary.MODEL)
        epsilons[str(promise.unit)] = spent_epsilon(
            events, promise.target_delta, promise.adjacency, ledger.filter_order, GATE_INTERVAL
        )
    return epsilons | progress.meter.epsilons()


def keep(progress: Progress, state: State) -> None:
    """Mark the round as finished, and write a checkpoint when one is due."""
    settings, remembered = progress.run.federation.settings, progress.observer.memory
    if state.round % settings.checkpoint_every == 0 or state.round == settings.steps:
        save(progress, state, remembered)
    progress.state, progress.remembered = state, remembered


def save(progress: Progress, state: State, remembered: Mapping[str, NDArray[np.float64]]) -> None:
    """Write a checkpoint of the run after `state`, with the ledgers' heads, which a resumed run must find."""
    run = progress.run
    head = None if run.ledger is None else run.ledger.head
    write(run.folder, Checkpoint(run.name, state, head, run.client_ledgers.heads(), remembered))
