"""Run of a federation, simulated or real: its rounds on any grid, from its parts to a folder of results."""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from ..base.durable_files import open_for_owner
from ..base.refusal import Refusal, refusing
from ..client.extra import extra_clients
from ..configs.settings import publishable_keys
from ..messages.flower_adapter import quiet_flower
from ..messages.traffic import NOTHING, Carried, Tally
from ..messages.wire import DROP_REASONS, MIXES
from ..modes.federation import Federation
from ..privacy.audit.alarms import Level
from ..privacy.ledger.ledger import LedgerUnavailable
from ..server.checkpoint import State
from ..server.participants import Participants
from ..server.private_grid import PrivateGrid
from ..server.round_terms import Answers, Round, SumTerms
from ..server.rounds import Ending, Loop, Pace, Status, Unscored, run_rounds
from ..tasks.arrays import emptied, holding
from ..tasks.data import Examples, batches_of, derived, figures_of, group_figures, held_out_of, run_on
from ..tasks.hardware import device_of, placed, precision
from ..tasks.independence import Mixing
from ..tasks.memory import give_back, stop_keeping
from ..tasks.protocol import GroupedTask
from .average import average_after
from .callbacks import Callback, RunEnd, RunStart, frozen, guarded, read_only_model
from .client_instructions import order_of
from .files import CLIENTS_LOG
from .log_file import LogFile, written_by
from .machine_time import machine_time, time_since
from .observer import Demand
from .opening import lock_records, opened
from .prepare import make_strategy_of, prepare
from .prepared_run import NEW_RUN, Run
from .progress import Progress, keep, read_progress, record_round
from .queries import Reach, queries_of, with_everybody
from .result import cannot_write, finish
from .round_lines import Lines, metric_means
from .run_files import MIXED
from .saved import read_saved
from .tuning import order_of_round, require_arms

if TYPE_CHECKING:
    from .display import Display

Arrays = dict[str, NDArray[np.generic]]

MAX_CLASSES = 32  # of a confusion matrix
EXIT_CODES = {
    Status.COMPLETED: 0,
    Status.FAILED: 1,
    Status.EXHAUSTED: 3,
    Status.ALARMED: 5,
    Status.PAUSED: 5,
    Status.INTERRUPTED: 130,
}
_UNCONFIRMED = 4  # exit code for a test that is too weak, as in fedveil audit


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
      exit_code: of the command that ran it.
      result: the content of its result.json.
      folder: of its files.
      carried: bytes exchanged with its clients by this process until the result was made.
      signal: number of the signal that interrupted it, or 0.
    """

    exit_code: int
    result: dict[str, Any]
    folder: Path
    carried: Carried = NOTHING
    signal: int = 0


def order_here(run: Run) -> Mapping[str, str]:
    """Return the order of every round to simulated clients, which have the settings: empty unless rounds differ.

    It names no run: each has a new name, and encrypted sums rotate vectors by a hash of the instruction.
    """
    return order_of(replace(run, name="simulation")) if run.tuning.values else {}


@dataclass(frozen=True)
class Environment:
    """Surroundings of a run's rounds.

    Attributes:
      grid: context manager that opens the grid to the clients.
      order: the training order of every round; simulated clients need none.
      pace: of the rounds.
      callbacks: in addition to those of the settings; an error of one of these ends the run.
      objects: the user's own callbacks; their errors do not end the run.
      renew: called before each round; returns the federation with its current clients, or raises a Refusal, which ends
        the run.
      tally: of the bytes exchanged with the clients.
    """

    grid: Callable[[Run], AbstractContextManager[Grid]]
    order: Callable[[Run], Mapping[str, str]] = order_here
    pace: Pace = field(default_factory=Pace)
    callbacks: Sequence[Callback] = ()
    objects: Sequence[Callback] = ()
    renew: Callable[[Federation], Federation] = lambda federation: federation
    tally: Tally = field(default_factory=Tally)


def run_federation(
    federation: Federation, folder: Path, around: Environment, quiet: bool = False
) -> RunResult:
    """Run the federation's rounds, simulated or real, and write the results into its folder.

    Args:
      federation: its parts.
      folder: the run folder; ignored if the settings name a run to resume.
      around: surroundings of the rounds.
      quiet: show nothing.

    Raises:
      Refusal: before anything is spent.
    """
    quiet_flower()
    begin = machine_time()
    resumed = federation.settings.resume
    folder = Path(resumed) if resumed else folder
    saved = read_saved(folder) if resumed else NEW_RUN
    for query in queries_of(federation.settings) if resumed else ():
        federation = query.answered(federation, folder)
    callbacks = guarded(around.objects, federation.settings.callbacks)
    prepared = prepare(federation, folder, saved)
    display: tuple[Display, ...] = ()
    if not quiet:
        from .display import Display

        display = (Display(),)
    watching = (Lines(folder), *display, *around.callbacks, *callbacks)
    with (
        lock_records(federation),
        opened(prepared, partial(_ask_first, around)) as (run, observer),
        _client_log(federation, folder),
        closing(display[0]) if display else nullcontext(),
    ):
        strategy = make_strategy_of(federation)
        strategies = [strategy, *(make_strategy_of(federation) for _ in range(run.tuning.arms - 1))]
        meter = run.client_ledgers.meter()
        with refusing(federation.population.words.folder, folder, "cannot be read or written"):
            progress = read_progress(run, strategies, observer, meter, around.tally)
        give_back()  # memory of planning
        with around.grid(run) as grid:
            ending = _run_on(progress, strategies, around, grid, watching)
        stop_keeping()
        state = ending.state
        averaged = evaluator(run.federation)(state.model, state.round) if state.average.models else {}
        title = title_of(progress.run.federation)
        confused = confusion(run.federation, state.model)
        with refusing(federation.population.words.folder, folder, "cannot be read or written"):
            result = finish(progress, ending, time_since(begin), title, averaged, confused)
        model = read_only_model(state.model)
        run_end = RunEnd(result["status"], result["reason"], folder, frozen(result), model)
        for each in watching:
            each.end(run_end)
    return RunResult(exit_code_of(result), result, folder, progress.reported_bytes, ending.signal)


def _ask_first(around: Environment, run: Run) -> Run:
    """Ask the queries due before the first round, once clients are connected; return the run as the answers change it."""
    first = [query for query in queries_of(run.federation.settings) if query.first]
    if run.resumed or not first:
        return run
    reason = around.pace.ready(threading.Event())
    if reason is not None:
        raise Refusal("link.clients", None, reason)
    for query in first:
        run = query.before(run, around.grid, _reach_of_all(run.federation, around.pace.deadline))
    return run


def _reach_of_all(federation: Federation, timeout: float) -> Reach:
    """Return the terms on which all clients answer, independent of the cohort."""
    return Reach(answers_of(with_everybody(federation)), timeout, federation.randomness)


def exit_code_of(result: Mapping[str, Any]) -> int:
    """Return the exit code for a result; not 0 if an alarm of its audit is unconfirmed."""
    audit = result.get("audit")
    levels = set[str]()
    if audit is not None and audit["on_alarm"] != "note":
        levels = {each["level"] for each in audit["alarms"]}
    doubt = Level.ORANGE in levels and Level.RED not in levels
    return EXIT_CODES[Status(result["status"])] or (_UNCONFIRMED if doubt else 0)


@contextmanager
def _client_log(federation: Federation, folder: Path) -> Generator[None]:
    """Write simulated clients' errors into the run folder; real clients keep theirs to themselves."""
    path = folder / CLIENTS_LOG
    with refusing(federation.population.words.folder, path, "cannot be written"):
        open_for_owner(path).close()
        log = LogFile(path)
    try:
        with written_by(logging.getLogger("fedveil.client"), log):
            yield
    finally:
        with suppress(OSError):  # a disk that fails has ended the run with its own sentence
            if path.exists() and not path.stat().st_size:
                path.unlink()


def _run_on(
    progress: Progress,
    strategies: Sequence[Strategy],
    around: Environment,
    grid: Grid,
    watching: Sequence[Callback],
) -> Ending:
    run, state = progress.run, progress.state
    federation = run.federation
    private = PrivateGrid(
        _participants(run, grid),
        privacy=run.privacy,
        randomness=federation.randomness,
        run=run.name,
        masking=federation.masking,
        terms=SumTerms(
            federation.mode.metrics, run.client.canaries_of_step.count, federation.compression, run.tuning
        ),
    )
    if progress.meter.counts and federation.seed is not None:
        private.skip_to(state.round, state.choices)
        for number in range(1, state.round + 1):
            cohort = progress.meter.clients(private.participants, private.draw(number))
            heard = progress.history[number - 1]["replies"] != 0
            progress.meter.add(cohort if heard else run.client_ledgers.charged(run.name, number, cohort))

    def ready(stop: threading.Event) -> str | None:
        return around.pace.ready(stop) or _renewed(progress, private, around)

    order, down = around.order(run), federation.settings.compress.down
    loop = Loop(
        strategies=strategies,
        num_rounds=state.round if run.spent else federation.settings.steps,
        evaluate=evaluator(federation),
        after_round=partial(_after_round, progress, private, watching, around.pace.deadline),
        train_config=partial(order_of_round, run, order),
        pace=replace(around.pace, ready=ready),
        average_after=average_after(run),
        tuning=run.tuning,
        score=partial(_scored, progress, private, around.pace.deadline)
        if federation.settings.scored_at_clients
        else None,
        difference_bits=down if isinstance(down, int) else None,
        buffers=frozenset(name for name, _ in federation.task.model().named_buffers()),
    )
    del state  # frees the first model
    ending = _ended(progress, _rounds(progress, private, loop, watching))
    progress.meter.add_unfinished(progress.meter.clients(private.participants, private.current_cohort))
    if ending.status is Status.INTERRUPTED:
        return replace(ending, reason=f"{federation.population.resumption(run.folder)} goes on from here")
    return ending


def _evaluate_last(progress: Progress, grid: PrivateGrid, pace: Pace) -> None:
    """Make the evaluation that is still owed to a run whose remaining rounds cannot be paid: it was planned."""
    last, federation = progress.history[-1:], progress.run.federation
    is_due = last and "evaluation" not in last[0] and federation.settings.query_fields
    if not is_due or pace.ready(threading.Event()) is not None:
        return
    if (answer := _answer_after(progress, grid, pace.deadline, progress.state, last=True)) is not None:
        last[0].update({**metric_means(answer), "evaluation": answer})


def _answer_after(
    progress: Progress, grid: PrivateGrid, deadline: float, state: State, last: bool = False
) -> dict[str, Any] | None:
    """Ask the query due after a round, and return the record of the answer; None if none is due."""
    run = progress.run
    reach = _reach_of_all(run.federation, deadline)
    answers = (
        query.after(run, grid.participants, reach, state, last)
        for query in queries_of(run.federation.settings)
    )
    return next((answer for answer in answers if answer is not None), None)


def _ended(progress: Progress, ending: Ending) -> Ending:
    """Return the ending; a resumed run that lacks only rounds that were paid for and lost in a crash is completed."""
    run, settings, rounds = progress.run, progress.run.federation.settings, ending.state.round
    if run.spent and ending.status is Status.COMPLETED:
        ending = replace(ending, status=Status.EXHAUSTED, reason=run.spent)
    lost = run.checkpoint.run and settings.steps - rounds <= settings.checkpoint_every
    if ending.status is not Status.EXHAUSTED or not lost:
        return ending
    reason = f"{rounds} of {settings.steps} rounds; the budget is spent, in part on rounds that were lost when the run was stopped"
    return replace(ending, status=Status.COMPLETED, reason=reason)


def _start_of(progress: Progress) -> RunStart:
    federation = progress.run.federation
    return RunStart(
        federation.population.run_name(progress.run.folder),
        title_of(federation),
        progress.run.folder,
        federation.settings.steps,
        frozen(budgets_of(federation)),
        frozen(publishable_keys(federation.settings.source)),
        frozen(progress.history),
        progress.observer.line,
    )


def _rounds(progress: Progress, grid: PrivateGrid, loop: Loop, watching: Sequence[Callback]) -> Ending:
    """Run the rounds; an error of the disk or the ledger ends the run after the last recorded round."""
    try:
        ended = _obey(grid, progress.observer.resume(progress.state))
        if progress.run.spent and not ended:
            _evaluate_last(progress, grid, loop.pace)
        started = _start_of(progress)
        for each in watching:
            each.start(started)
        return ended or run_rounds(grid, loop, progress.state)
    except LedgerUnavailable as problem:
        last = progress.state
        return Ending(Status.FAILED, f"stopped after round {last.round}: {problem}", last)
    except Mixing as problem:
        return Ending(Status.FAILED, f"{MIXED}; {problem}", progress.state)
    except OSError as problem:
        return Ending(Status.FAILED, cannot_write(progress, problem), progress.state)


def _participants(run: Run, grid: Grid) -> Participants:
    federation, extra = run.federation, run.client.canary_clients
    apart = not federation.population.reads_data  # otherwise they are nodes of the grid
    return Participants(
        grid,
        federation.cohort,
        federation.num_clients,
        answers_of(federation),
        federation.extra_clients,
        partial(extra_clients().add_canaries, extra) if extra.count and apart else None,
        federation.settings.population,
        names=federation.population.names,
    )


def _renewed(progress: Progress, grid: PrivateGrid, around: Environment) -> str | None:
    """Use the current clients for the next round; return why that is impossible, or None."""
    before = progress.run.federation
    try:
        federation = around.renew(before)
        if progress.state.winner is None:
            require_arms(federation, progress.run.tuning)
    except Refusal as refusal:
        return str(refusal)
    if federation is not before:
        names = federation.population.names or {}
        for roster in federation.population.rosters:
            from .rosters_in_force import note_roster  # of real clients alone

            note_roster(progress.run.folder, roster, progress.state.round + 1)
        progress.run = replace(progress.run, federation=federation)
        grid.renew(list(names), federation.masking, answers_of(federation), names)
    return None


def _scored(
    progress: Progress, grid: PrivateGrid, deadline: float, models: Sequence[Arrays], number: int
) -> tuple[float, ...]:
    """Return each arm's score by its clients; minus infinity if it cannot be estimated.

    Raises:
      Unscored: no arm's score can be estimated.
    """
    run = progress.run
    reach = _reach_of_all(run.federation, deadline)
    queries = queries_of(run.federation.settings)
    records = [r for query in queries for r in query.scores(run, grid.participants, reach, models, number)]
    scores = [
        figures[0]["value"] if (figures := each["answers"] and each["answers"][0]["figures"]) else None
        for each in records
    ]
    if all(value is None for value in scores):
        reasons = sorted({str(each.get("reason", "it cannot be said")) for each in records})
        raise Unscored(f"no arm could be scored by its clients: {'; '.join(reasons)}")
    progress.scores = records
    return tuple(-math.inf if value is None else value for value in scores)


def _after_round(
    progress: Progress,
    grid: PrivateGrid,
    watching: Sequence[Callback],
    deadline: float,
    state: State,
    round_: Round,
    measure: Callable[[], dict[str, float]],
) -> Ending | None:
    observer, federation = progress.observer, progress.run.federation
    observer.observe(state, grid.released)
    grid.released = None  # it takes as much room as two models
    metrics = measure()
    cohort = progress.meter.clients(grid.participants, grid.current_cohort)
    if cohort and not round_.replies:
        cohort = progress.run.client_ledgers.charged(progress.run.name, round_.number, cohort)
    evaluated = _answer_after(progress, grid, deadline, state)
    round_end = record_round(progress, state, round_, metrics, cohort, evaluated)
    lines, *others = watching
    lines.round(round_end)
    keep(progress, state)  # before callbacks, which may be slow: a charged round must not be lost
    for each in others:
        each.round(round_end)
    if federation.population.reads_data and DROP_REASONS[MIXES] in round_.dropped:
        return Ending(Status.FAILED, f"{MIXED}; see {CLIENTS_LOG}", state)
    return _obey(grid, observer.demand(state))


def _obey(grid: PrivateGrid, demand: Demand) -> Ending | None:
    """Meet an observer's demand; return the run's ending, if it is to end."""
    if demand.noise != 1:
        grid.account.noise_factor = demand.noise
    return demand.ending


def answers_of(federation: Federation) -> Answers:
    """Return the answers that a round needs."""
    return federation.population.answers(federation.cohort.expected_size(federation.num_clients))


def title_of(federation: Federation) -> str:
    """Return a description of the run in one line."""
    s = federation.settings
    kind = federation.population.words.title
    clients = f"{federation.declared_clients} clients"
    if federation.extra_clients:
        clients += f" and {federation.extra_clients} canaries"
    strategy = s.strategy.name if s.strategy.target is None else s.strategy.target.partition(":")[2]
    return f"{federation.task_name} ({kind}): {clients}, {strategy}, privacy={federation.mode.name}"


def budgets_of(federation: Federation) -> dict[str, float | None]:
    """Return the target epsilon of each unit."""
    budgets = {str(each.unit): each.target_epsilon for each in federation.mode.promises}
    return {"client": None, "record": None, **budgets}


def evaluator(federation: Federation) -> Callable[[Arrays, int], dict[str, float]]:
    """Return the function that evaluates arrays on public held-out examples; private ones would need a release."""
    if not federation.held_out_public:
        return lambda arrays, number: {}
    task, engine = federation.task, federation.settings.engine
    device, model = _evaluated_on(federation)
    public = held_out_of(task)
    give_back()  # models that were made to look at them
    held_out, groups = placed(public, device), public.groups if isinstance(public, Examples) else None

    def evaluate(arrays: Arrays, _: int) -> dict[str, float]:
        if not len(held_out):  # real clients' rows are not held out: a metric on them would be a release
            return {}
        model.eval()
        with holding(model, arrays), torch.no_grad():
            means: dict[str, float] = defaultdict(float)
            for inputs, targets in batches_of(held_out):
                with precision(device, engine.dtype):
                    outputs = run_on(model, inputs)
                    loss = float(task.loss(outputs, targets))
                figures = {**figures_of(task, outputs, targets), "loss": loss}
                if groups and isinstance(task, GroupedTask):
                    figures |= group_figures(outputs, targets, groups, task.group_words)
                for name, value in figures.items():
                    means[name] += value * len(targets) / len(held_out)
            return derived(task, means)

    return evaluate


def _evaluated_on(federation: Federation) -> tuple[torch.device, torch.nn.Module]:
    """Return the device of evaluations, and a model on it without values."""
    engine = federation.settings.engine
    # A process that has used a GPU cannot fork workers that use it, so with such workers it evaluates on the CPU.
    single = getattr(engine, "workers", 1) == 1
    device = device_of(engine.device if single else "cpu")
    return device, emptied(federation.task.model().to(device))


def confusion(federation: Federation, arrays: Arrays) -> list[list[int]] | None:
    """Return how many public held-out examples of each class the model gives each class; None without such classes."""
    task = federation.task
    if not federation.held_out_public or not arrays:
        return None
    device, model = _evaluated_on(federation)
    counts, classes = torch.zeros(0, dtype=torch.int64), 0
    with holding(model.eval(), arrays), torch.no_grad():
        for inputs, targets in batches_of(placed(held_out_of(task), device)):
            with precision(device, federation.settings.engine.dtype):
                outputs = run_on(model, inputs)
            if not isinstance(outputs, torch.Tensor) or outputs.dim() != 2 or targets.dim() != 1:
                return None
            classes = outputs.shape[1]
            if targets.is_floating_point() or not 2 <= classes <= MAX_CLASSES or (targets < 0).any():
                return None
            # Targets of tables may say a group as well.
            cells = targets.long() % classes * classes + outputs.argmax(1)
            cell_counts = torch.bincount(cells, minlength=classes**2).cpu()
            counts = cell_counts + counts if len(counts) else cell_counts
    return counts.reshape(classes, classes).tolist() if len(counts) else None
