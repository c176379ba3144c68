"""Folder of a run: a line for each round, checkpoints, and finally model, result and curve."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from ..base.bounded_decoding import build, json_number, read_json
from ..base.durable_files import append_line, open_for_owner, replace_file
from ..base.refusal import Refusal, disk_remedy, refusing
from ..base.tensor_file import safetensors_parts
from ..configs.round_line import AT_BOUND, OF_THE_ROUND, TRAIN
from ..configs.settings import publishable_keys
from ..configs.task_settings import CustomTask
from ..messages.traffic import NOTHING, Carried, Tally
from ..modes.federation import Federation
from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.accounting.renyi_filter import spent_epsilon
from ..privacy.adaptation import Choices
from ..privacy.budget import Adversary, Unit
from ..privacy.ledger.ledger import LedgerUnavailable
from ..server import noise_key
from ..server.checkpoint import Checkpoint, State, Trial, restore_strategy, write
from ..server.round_terms import Round
from ..server.rounds import Ending, Status
from ..strategies.cohorts import in_arm, invited_size
from ..tasks.arrays import holds_arrays, read_arrays
from ..tasks.protocol import PredictingTask
from .acts import write_refusal
from .average import early_of
from .callbacks import RoundEnd, RunEnd, RunStart, frozen, read_only_model
from .close import CLOSED, close, head_before_close
from .evaluation_figures import metric_means
from .files import (
    AUDIT_KEY,
    BLAME,
    CONFIG,
    CURVE,
    FAREWELL,
    METRICS,
    MODEL,
    OPERATOR,
    RESULT,
    SAVED,
    SCALING,
    SINGLY,
)
from .learning_rate import rise_of
from .machine_time import MachineTime
from .manifest import TASK_FILES
from .observer import Observer
from .prepared_run import Run, Saved
from .record_ledgers import NoMeter
from .report import encryption, record_by_sums, spent, versions
from .rosters_in_force import note_roster, roster_rows
from .run_files import MIXED, read_object, rows_of
from .tuning import tuning_result

KEPT = ("noise", "filter_order", "turns", "deal", "places")  # beside the name


@dataclass
class Progress:
    """Progress of a run: its mutable state.

    Attributes:
      run: the fixed part; its federation is replaced when clients join or leave.
      state: after the last finished round.
      observer: of the run's released sums.
      meter: of record-level loss.
      history: the finished rounds, as in the file METRICS.
      tally: of this process's bytes to and from the clients.
      reported_bytes: the part of them in recorded rounds.
      before: traffic of earlier processes' rounds.
      remembered: by the observer of the rounds up to `state`; its own memory may be a round ahead.
      scores: records of what the clients of each arm said of its model, for the line of the round that compares them.
    """

    run: Run
    state: State
    observer: Observer
    meter: NoMeter
    history: list[dict[str, Any]]
    tally: Tally = field(default_factory=Tally)
    reported_bytes: Carried = NOTHING
    before: Carried = NOTHING
    remembered: Mapping[str, NDArray[np.float64]] = field(default_factory=dict[str, NDArray[np.float64]])
    scores: Sequence[Mapping[str, Any]] = ()


def read_saved(folder: Path) -> Saved:
    """Return the state that an earlier process left in this run folder.

    Raises:
      Refusal: it left no readable state or result, or an audit or mixed examples have ended the run.
    """
    result = read_object(folder / RESULT)
    if str(result.get("reason")).startswith(MIXED):
        raise Refusal("resume", str(folder), f"{MIXED}; mend the task and start a new run")
    if result.get("status") == Status.ALARMED:
        remedy = "an alarm of its audit ended it; find the cause and start a new run (audit.on_alarm=pause can be resumed)"
        raise Refusal("resume", str(folder), remedy)
    try:
        content = read_json((folder / SAVED).read_bytes())
        return build(Saved, {"name": content["run"], **{key: content.get(key) for key in KEPT}})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, Refusal) as problem:
        remedy = f"its {SAVED} cannot be read ({problem}); start a new run"
        raise Refusal("resume", str(folder), remedy) from problem


def require_free(folder: Path) -> None:
    """Refuse a folder that already holds a run."""
    if (folder / CONFIG).exists():
        raise Refusal("hydra.run.dir", str(folder), "holds a run; choose another folder, or use resume=")


def write_start(run: Run) -> None:
    """Write the state that a resumed run needs, before the first round."""
    noise = run.privacy.plan.noise_multiplier if run.privacy else None
    order = run.privacy.plan.filter_order if run.privacy else None
    cohort = run.federation.cohort
    turns = None if cohort.turns is None else cohort.name
    beside = _beside(run)
    saved = {
        "run": run.name,
        "noise": noise,
        "filter_order": order,
        "turns": turns,
        "deal": run.tuning.key,
        "places": None
        if run.privacy is None
        else run.federation.population.position_digest(run.privacy.noise_key),
        SINGLY: not run.federation.settings.group_equal_rows,
        TASK_FILES: sorted(beside),
        **_told_while_it_goes_on(run),
    }
    setting = run.federation.population.words.folder
    with refusing(setting, run.folder, "it cannot be written; make room, or choose another"):
        replace_file(run.folder / SAVED, json.dumps(saved).encode(), mode=None)
        _write_beside(run, beside)
        for roster in run.federation.population.rosters:
            note_roster(run.folder, roster, run.checkpoint.state.round + 1)
        if not (run.folder / CONFIG).exists():
            replace_file(run.folder / CONFIG, run.federation.settings.source.encode(), mode=None)


def _told_while_it_goes_on(run: Run) -> dict[str, Any]:
    """Return the report's content for a run without a result."""
    arrays = read_arrays(run.federation.task.model())
    return {
        "ledger": None if run.ledger is None else str(run.ledger.path),
        "population": run.federation.declared_clients,
        "parameters": sum(array.size for array in arrays.values()),
    }


def _beside(run: Run) -> Mapping[str, bytes]:
    """Return the files that the task stores with its model, by name."""
    task = run.federation.task
    if not isinstance(task, PredictingTask):
        task = getattr(task, "task", None)  # of a task with planted examples
    beside = task.beside_the_model() if isinstance(task, PredictingTask) else {}
    answer = run.folder / SCALING
    return beside if run.federation.moments is None else {**beside, SCALING: answer.read_bytes()}


def _write_beside(run: Run, beside: Mapping[str, bytes]) -> None:
    """Write the files that the task stores with its model; a resumed run must have the same."""
    resumed = (run.folder / CONFIG).exists()  # otherwise they are left by a start that was killed
    for name, content in beside.items():
        path = run.folder / name
        if resumed and path.exists() and path.read_bytes() != content:
            remedy = f"started with another {name}; restore it, or start a new run"
            raise Refusal("resume", str(run.folder), remedy)
        replace_file(path, content, mode=None)


def begun(
    run: Run, strategies: Sequence[Strategy], observer: Observer, meter: NoMeter, tally: Tally
) -> Progress:
    """Return the run's progress from an earlier process, or at its start.

    Args:
      run: about to begin its rounds.
      strategies: of each arm, or the one of all clients; each restores its own state from the checkpoint.
      observer: of the run.
      meter: without counted rounds.
      tally: of the bytes to and from the clients.

    Raises:
      Refusal: the checkpoint holds another model.
    """
    state = _first_state(run, strategies)
    history = read_history(run.folder, state.round)
    before = carried_in(_rows_until(run.folder / OPERATOR, state.round) or history)
    return Progress(
        run, state, observer, meter, history, tally, before=before, remembered=run.checkpoint.audit
    )


def _first_state(run: Run, strategies: Sequence[Strategy]) -> State:
    arrays, checkpoint = read_arrays(run.federation.task.model()), run.checkpoint
    if not checkpoint.run:
        trials = tuple(Trial(arrays, {}) for _ in run.tuning.values)
        return State(0, arrays, {}, trials=trials)
    state = checkpoint.state
    if not holds_arrays(run.federation.task.model(), state.arrays):
        raise Refusal("resume", str(run.folder), "its checkpoint holds another model; start a new run")
    for place, trial in enumerate(state.trials):
        restore_strategy(strategies[place], trial.strategy)
    if not state.trials:
        restore_strategy(strategies[(state.winner or 1) - 1], state.strategy)
    trials = tuple(
        replace(each, arrays={name: each.arrays[name] for name in arrays}) for each in state.trials
    )
    model = {name: state.arrays[name] for name in arrays}
    return replace(state, arrays=model, choices=_choices_after(run, checkpoint), trials=trials)


def _choices_after(run: Run, checkpoint: Checkpoint) -> Choices | None:
    """Return the choices after the checkpoint's round; under another name the run planned new noise."""
    choices = checkpoint.state.choices
    if choices is None or run.privacy is None or checkpoint.run == run.name:
        return choices
    return replace(run.privacy.adaptation.first(run.privacy.plan), clipping_norm=choices.clipping_norm)


# --- after each round -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lines:
    """Callback that writes METRICS, a line of JSON for each round."""

    folder: Path

    def start(self, run: RunStart) -> None:
        """Delete lines after the last checkpoint, left by a crash."""
        replace_file(self.folder / METRICS, "".join(map(_line, run.rows)).encode(), mode=None)

    def round(self, done: RoundEnd) -> None:
        """Write the round's line."""
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(_line(done.row))

    def end(self, ending: RunEnd) -> None:
        """Do nothing: every line is written."""


def record_round(
    progress: Progress,
    state: State,
    done: Round,
    metrics: dict[str, float],
    cohort: list[int],
    evaluated: Mapping[str, Any] | None = None,
) -> RoundEnd:
    """Add the round to the history, and return the value for callbacks.

    Args:
      progress: before the round.
      state: after the round.
      done: record of the round.
      metrics: of the new model on the held-out examples.
      cohort: numbers of the real clients that were drawn, where records are protected.
      evaluated: record of the clients' evaluation of the new model; None without one.
    """
    metrics = metrics | metric_means(evaluated)
    epsilons = _epsilons(progress, cohort)
    row = {
        "round": done.number,
        **_stated(arm=done.arm),
        **metrics,
        **{f"{TRAIN}{name}": value for name, value in done.scalars.items()},
        **_stated(**{AT_BOUND: _at_bound(progress.run, done)}),
        **_counts(progress, done),
        "abandoned": done.abandoned,
        **_stated(
            exchanges=done.exchanges,
            message_bytes=dict(zip(("down", "up"), done.message_bytes or (), strict=False)),
            blamed=done.blamed,
            cause=done.cause,
            untrue=done.untrue,
            suspected=done.suspected,
            weighed=list(done.weighed),
        ),
        "clipping_norm": done.choices.clipping_norm if done.choices else None,
        "noise_multiplier": done.choices.noise_multiplier if done.choices else None,
        "epsilon_client": json_number(epsilons.get("client")),
        "epsilon_record": json_number(
            next((spent for unit, spent in epsilons.items() if unit != Unit.CLIENT), None)
        ),
        **progress.observer.columns(done.number),
        **_stated(evaluation=evaluated, scores=list(progress.scores)),
    }
    note_evidence(progress.run.folder, done.evidence)
    progress.scores = ()
    progress.history.append(row)
    public = frozen(metrics), frozen(epsilons), frozen(row)
    return RoundEnd(done.number, *public, read_only_model(state.arrays), progress.observer.line)


def keep(progress: Progress, state: State) -> None:
    """Mark the round as finished, and write a checkpoint when one is due.

    Raises:
      OSError: the folder cannot be written.
    """
    settings = progress.run.federation.settings
    remembered = progress.observer.memory
    if state.round % settings.checkpoint_every == 0 or state.round == settings.steps:
        save(progress, state, remembered)
    progress.state, progress.remembered = state, remembered


def _at_bound(run: Run, done: Round) -> list[str]:
    """Return the names of noised figures at an end of their range, where noise carried them beyond it."""
    if run.privacy is None:
        return []
    bounds = {each.name: each.bound for each in run.federation.mode.metrics}
    return [f"{TRAIN}{name}" for name, value in done.scalars.items() if value in (0.0, bounds.get(name, 1.0))]


def _counts(progress: Progress, done: Round) -> dict[str, Any]:
    """Return the public counts of a round; counts for a trusted server only go to its operator's file."""
    federation = progress.run.federation
    counts = {
        "invited": done.invited,
        "replies": done.replies,
        "dropped": dict(sorted(done.dropped.items())),  # independent of the order of replies
        "clipped_again": done.clipped_again,
        "bytes": _carried_since(progress).to_json(),
    }
    if not federation.mode.hides_counts:
        return counts
    _tell_operator(progress.run.folder, {"round": done.number, **counts})
    arms = 1 if done.arm is None else progress.run.tuning.arms
    planned = invited_size(in_arm(federation.cohort, arms), round(federation.declared_clients / arms))
    return {**dict.fromkeys(counts), "invited": planned}


def _carried_since(progress: Progress) -> Carried:
    """Return the traffic since the last recorded round."""
    before, progress.reported_bytes = progress.reported_bytes, progress.tally.total()
    return progress.reported_bytes.minus(before)


def _tell_operator(folder: Path, row: dict[str, Any]) -> None:
    with open_for_owner(folder / OPERATOR) as file:
        file.write(_line(row).encode())


def note_farewell(folder: Path, carried: Carried, *, secret: bool) -> None:
    """Record the traffic after a run was closed: its final model, and receipts.

    Args:
      folder: of the run.
      carried: since the close.
      secret: whether only the operator may read counts.

    Raises:
      OSError: the folder cannot be written.
    """
    if secret:
        return _tell_operator(folder, {"farewell": carried.to_json()})
    replace_file(folder / FAREWELL, (json.dumps(carried.to_json()) + "\n").encode(), mode=None)


def save(progress: Progress, state: State, remembered: Mapping[str, NDArray[np.float64]]) -> None:
    """Write a checkpoint.

    Raises:
      OSError: the folder cannot be written.
    """
    run = progress.run
    head = run.ledger.head if run.ledger is not None else None
    write(run.folder, Checkpoint(run.name, state, head, run.client_ledgers.heads(), remembered))


def _epsilons(progress: Progress, cohort: list[int]) -> dict[str, float]:
    """Return the loss so far by unit, infinite without a guarantee; that of real records is known only to owners."""
    federation, ledger = progress.run.federation, progress.run.ledger
    found: dict[str, float] = {}
    promises = federation.mode.promises
    if ledger is not None:
        events, order, promise = ledger.events(Adversary.MODEL), ledger.filter_order, promises[0]
        found[str(promise.unit)] = spent_epsilon(
            events, promise.target_delta, promise.adjacency, order, GATE_INTERVAL
        )
    if not promises:
        found["client"] = math.inf
    progress.meter.add(cohort)
    return found | progress.meter.epsilons()


def _stated(**values: object) -> dict[str, object]:
    """Return the values of a line that are stated: those that are not empty."""
    return {name: value for name, value in values.items() if value}


def _line(row: Mapping[str, Any]) -> str:
    """Return the row as JSON, with null for the NaN and infinite metrics of a diverged model."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False, default=dict) + "\n"  # frozen mappings are not dictionaries


def read_history(folder: Path, last: int) -> list[dict[str, Any]]:
    """Return the recorded rounds, without a line truncated by a crash."""
    if (folder / OPERATOR).exists():
        replace_file(folder / OPERATOR, "".join(map(_line, _rows_until(folder / OPERATOR, last))).encode())
    return _rows_until(folder / METRICS, last)


def _rows_until(path: Path, last: int) -> list[dict[str, Any]]:
    return [dict(row) for row in rows_of(path) if row["round"] <= last]


# --- after the last round ---------------------------------------------------------------------------------------


def finish(
    progress: Progress,
    ending: Ending,
    used: MachineTime,
    title: str,
    metrics: Mapping[str, float],
    confusion: Sequence[Sequence[int]] | None,
) -> dict[str, Any]:
    """Write model, result and curve, and return the result; a full disk makes the run failed.

    Args:
      progress: after the last round.
      ending: how the run ended, and with which state.
      used: time and energy of this process.
      title: one line above the pictures.
      metrics: of the released model where it is an average; empty where it is that of the last round.
      confusion: of the released model on public held-out examples, by class and answer; None without classes.
    """
    told, folder, ledger = _measured(progress, used), progress.run.folder, progress.run.ledger
    if ledger is not None:
        with suppress(LedgerUnavailable):  # of notes only: what was reserved stays spent
            write_refusal(progress.run, ending)
            ledger.settle()
    result = _result(progress, ending, told)
    last = progress.history[-1] if progress.history else {}
    result["early"] = early_of(last, metrics, result["models_averaged"])
    result["metrics"] |= metrics
    if confusion is not None:
        result["confusion"] = confusion
    try:
        if progress.run.federation.mode.hides_counts:
            _tell_operator(
                folder, {key: told[key] for key in ("records", "seconds", "cpu_seconds", "joules", "bytes")}
            )
        save(progress, ending.state, progress.remembered)
        result["audit"] = progress.observer.end(ending, title)
        _write_results(progress, ending.state, result, title)
        if ending.status in CLOSED:
            _close(progress)
        if ending.status in (Status.COMPLETED, Status.EXHAUSTED, Status.ALARMED):
            noise_key.erase(folder)
            noise_key.erase(folder, AUDIT_KEY)
    except (OSError, LedgerUnavailable) as problem:
        if ending.status is not Status.FAILED:
            result |= {"status": str(Status.FAILED), "reason": cannot_write(progress, problem)}
    return result


def _close(progress: Progress) -> None:
    """Close the run; after a disk error the ledger takes no entry, which a verification reports."""
    run = progress.run
    if run.ledger is None or run.ledger.is_open:
        close(run.folder, run.ledger, run.client_ledgers.heads() if run.federation.simulated else {})


def cannot_write(progress: Progress, problem: OSError | LedgerUnavailable) -> str:
    """Return the sentence for a run whose folder or ledger can no longer be written."""
    said, done = problem.strerror if isinstance(problem, OSError) else None, progress.state.round
    what, mend = said or str(problem), disk_remedy(problem) or "mend it"
    return f"stopped after round {done}: {what}; {mend}, then {again(progress.run)} goes on from there"


def again(run: Run) -> str:
    """Return the command that resumes the run."""
    return run.federation.population.resumption(run.folder)


def _measured(progress: Progress, used: MachineTime) -> dict[str, Any]:
    """Return the parts of a result that depend on the cohorts."""
    progress.reported_bytes = progress.tally.total()
    return {
        "records": progress.run.client_ledgers.spending(progress.meter.took_part),
        "dropped": summed_drops(progress.history),
        "seconds": round(used.wall, 3),
        "cpu_seconds": round(used.cpu, 3),
        "joules": None if used.joules is None else round(used.joules, 1),
        "bytes": {
            "source": progress.run.federation.population.words.traffic,
            **(progress.before + progress.reported_bytes).to_json(),
        },
    }


def carried_in(rows: Sequence[Mapping[str, Any]]) -> Carried:
    """Return the traffic of rounds, from the rows that state it."""
    told = (Carried(**row["bytes"]) for row in rows if row.get("bytes"))
    return sum(told, start=NOTHING)


def _privacy(progress: Progress, ending: Ending) -> list[dict[str, Any]]:
    run, federation = progress.run, progress.run.federation
    if not federation.reported:
        return []
    done, settings, own = ending.state.round, federation.settings, run.client_ledgers
    begun = min(done + 1, settings.steps)  # clients of a round that failed were drawn, too
    draws = own.open_draws(settings.rounds_begun(begun))
    most = progress.meter.secret_events(done >= settings.steps)
    rows = spent(federation, run.ledger, own.files(), draws, most)
    return [row.to_json() for row in rows]


def _result(progress: Progress, ending: Ending, measured: dict[str, Any]) -> dict[str, Any]:
    run, history = progress.run, progress.history
    federation, ledger = run.federation, run.ledger
    final = next((row for row in reversed(history) if row["round"] <= ending.state.round), {})
    return {
        "status": str(ending.status),
        "reason": ending.reason,
        "rounds_completed": ending.state.round,
        "rounds_abandoned": sum(bool(row.get("abandoned")) for row in history),
        "rounds_untrue": sum(bool(row.get("untrue")) for row in history),
        "blamed": named_in(history, "blamed"),
        "suspected": named_in(history, "suspected"),
        "data": federation.population.words.data,
        "rng": federation.randomness.kind,
        **_configured(federation),
        "privacy": _privacy(progress, ending),
        "record_by_sums": record_by_sums(federation, ledger) if federation.reported else None,
        "evaluations": [row["evaluation"] for row in history if "evaluation" in row],
        **_scaling(run),
        "secagg": encryption(federation),
        "rosters": roster_rows(run.folder, names=not federation.mode.hides_counts),
        "audit": None,
        "message_bytes": final.get("message_bytes"),
        "tuning": tuning_result(run, ending.state, history),
        "rise": rise_of(_of_winner(history, ending.state), federation.settings) if history else None,
        "models_averaged": ending.state.average.models if ending.state.average else 1,
        "metrics": {
            k: v for k, v in final.items() if isinstance(v, float) and not k.startswith(OF_THE_ROUND)
        },
        "seed": federation.seed,
        "noise_multiplier": run.privacy.plan.noise_multiplier if run.privacy else None,
        "ledger": str(ledger.path) if ledger else run.client_ledgers.folder,
        "ledger_head": list(head_before_close(ledger, run.name)) if ledger else None,
        "folder": str(run.folder),
        "versions": versions(),
        **dict.fromkeys(measured),
        **({} if federation.mode.hides_counts else measured),
    }


def _scaling(run: Run) -> dict[str, Any]:
    """Return the clients' answer on scaling and its cost; empty without the question."""
    moments = run.federation.moments
    if moments is None:
        return {}
    record = json.loads((run.folder / SCALING).read_text(encoding="utf-8"))
    asked = [each["name"] for each in record["question"]["ask"]]
    told = {name: {"mean": pair[0], "deviation": pair[1]} for name, pair in moments.items()}
    columns = {name: told.get(name) for name in asked}
    price = {key: record[key] for key in ("epsilon", "noise_multiplier", "released")}
    return {"scaling": {"columns": columns, **price}}


def _configured(federation: Federation) -> dict[str, Any]:
    """Return the names of the configuration's groups, and the number of clients."""
    s = federation.settings
    shown = publishable_keys(s.source)["task"]
    own = {name: shown.get(name) for name in ("target", "args")} if isinstance(s.task, CustomTask) else {}
    return {
        "task": federation.task_name,
        **own,
        "population": federation.declared_clients,
        "cohort": s.cohort.name,
        "strategy": s.strategy.target or s.strategy.name,
        "learning_rate": s.local_training.learning_rate,
        "partition": s.partition.name,
        "budget_runs": s.budget.runs,
    }


def _write_results(progress: Progress, state: State, result: dict[str, Any], title: str) -> None:
    folder = progress.run.folder
    model = {name: np.asarray(value, order="C") for name, value in state.model.items()}
    replace_file(folder / MODEL, safetensors_parts(model), mode=None)
    finite = {name: value if math.isfinite(value) else None for name, value in result["metrics"].items()}
    text = json.dumps({**result, "metrics": finite}, indent=2) + "\n"
    replace_file(folder / RESULT, text.encode(), mode=None)
    if progress.history and progress.run.federation.reported:
        from .plots import draw_run

        draw_run(_of_winner(progress.history, state), result["privacy"], folder / CURVE, title)


def _of_winner(history: list[dict[str, Any]], state: State) -> list[dict[str, Any]]:
    """Return the rounds that led to the model; with arms, those of the winner, or of the last arm."""
    arm = state.winner or history[-1].get("arm")
    return [row for row in history if row.get("arm") in (None, arm)]


def named_in(
    history: Sequence[Mapping[str, Any]], column: Literal["blamed", "suspected"]
) -> dict[str, list[str]]:
    """Return the protocol violations of members by name, one per round, or the reasons to suspect them of spoiling sums."""
    found: dict[str, list[str]] = {}
    for told in (told for row in history for told in (row, row.get("evaluation") or {})):
        for name, said in told.get(column, {}).items():
            found.setdefault(name, []).append(said)
    return found


def summed_drops(history: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many were dropped in all of these rounds, by the reason."""
    total: Counter[str] = Counter()
    for row in history:
        total.update(row["dropped"] or {})
    return dict(sorted(total.items()))


def note_evidence(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append lines to a run's evidence.

    Raises:
      OSError: the folder cannot be written.
    """
    for row in rows:
        append_line(folder / BLAME, row)
