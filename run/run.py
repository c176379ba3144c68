"""Run of a federation, simulated or real: its rounds on any grid, from its parts to a folder of results."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..base.durable_files import open_for_owner
from ..base.extensions import extension, installed
from ..base.refusal import Refusal, refusing
from ..client.extra import extra_clients
from ..configs.settings import publishable_keys
from ..messages.flower_adapter import quiet_flower
from ..messages.traffic import NOTHING, Carried, Tally
from ..messages.wire import DROP_REASONS, MIXES
from ..modes.federation import Federation
from ..privacy.audit.alarms import Level
from ..privacy.ledger.ledger import LedgerUnavailable
from ..server.checkpoint import Arrays, State
from ..server.participants import Participants
from ..server.private_grid import PrivateGrid
from ..server.round_terms import Answers, Round, SumTerms
from ..server.rounds import Ending, Loop, Pace, Unscored, run_rounds
from ..server.run_status import Status
from ..tasks.independence import Mixing
from ..tasks.memory import give_back, stop_keeping
from .average import average_after
from .callbacks import Callback, RunEnd, RunStart, frozen, guarded, read_only_model
from .client_instructions import order_of
from .files import CLIENTS_LOG
from .final_model import final_model
from .held_out_metrics import confusion, evaluator
from .log_file import LogFile, written_by
from .machine_time import machine_time, time_since
from .observer import Demand
from .opening import lock_records, opened
from .origin import origin_of
from .prepare import make_strategy_of, prepare
from .prepared_run import NEW_RUN, Run
from .progress import Progress, keep, read_progress, record_round
from .queries import Reach, queries_of, with_everybody
from .result import cannot_write, finish
from .round_lines import Lines, metric_means
from .run_files import MIXED
from .saved import read_saved
from .tuning import order_of_round, require_arms, score_of

if TYPE_CHECKING:
    from .display import Display

EXIT_CODES = {
    Status.COMPLETED: 0,
    Status.FAILED: 1,
    Status.EXHAUSTED: 3,
    Status.ALARMED: 5,
    Status.PAUSED: 5,
    Status.INTERRUPTED: 130,
}
FIGURES = "released figures"  # extension point: from a run and its last state, fields of the result
_UNCONFIRMED = 4  # exit code for a test that is too weak, as in fedveil audit


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
      exit_code: exit code of the command that ran it.
      result: the content of its result.json.
      folder: folder of its files.
      carried: bytes exchanged with its clients by this process until the result was made.
      signal: number of the signal that interrupted it, or 0.
    """

    exit_code: int
    result: dict[str, Any]
    folder: Path
    carried: Carried = NOTHING
    signal: int = 0


def order_here(run: Run) -> Mapping[str, str]:
    """Return the order to simulated clients, which have the settings: empty, unless arms train with different values.

    It names no run: each has a new name, and encrypted sums rotate vectors by a hash of the instruction.
    """
    return order_of(replace(run, name="simulation")) if run.tuning.values else {}


@dataclass(frozen=True)
class Environment:
    """Surroundings of a run's rounds.

    Attributes:
      grid: context manager that opens the grid to the clients.
      order: the training order of every round; simulated clients need none.
      pace: when rounds begin, and how long they wait for replies.
      callbacks: in addition to those of the settings; an error of one of these ends the run.
      objects: the user's own callbacks; their errors do not end the run.
      renew: called before each round; returns the federation with its current clients, or raises a Refusal, which ends
        the run.
      tally: counts the bytes exchanged with the clients.
    """

    grid: Callable[[Run], AbstractContextManager[Grid]]
    order: Callable[[Run], Mapping[str, str]] = order_here
    pace: Pace = field(default_factory=Pace)
    callbacks: Sequence[Callback] = ()
    objects: Sequence[Callback] = ()
    renew: Callable[[Federation], Federation] = lambda federation: federation
    tally: Tally = field(default_factory=Tally)


def run_federation(
    federation: Federation, folder: Path, environment: Environment, quiet: bool = False
) -> RunResult:
    """Run the federation's rounds, simulated or real, and write the results into its folder.

    Args:
      federation: the federation to run.
      folder: the run folder; ignored if the settings name a run to resume.
      environment: surroundings of the rounds.
      quiet: whether to show nothing.

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
    users_callbacks = guarded(environment.objects, federation.settings.callbacks)
    prepared = prepare(federation, folder, saved)
    display: tuple[Display, ...] = ()
    if not quiet:
        from .display import Display
        from .unit_plan import promised

        display = (Display(partial(promised, federation)),)
    callbacks = (Lines(folder), *display, *environment.callbacks, *users_callbacks)
    with (
        lock_records(federation),
        opened(prepared, partial(_ask_first, environment)) as (run, observer),
        _client_log(federation, folder),
        closing(display[0]) if display else nullcontext(),
    ):
        strategies = [make_strategy_of(federation) for _ in range(run.tuning.arms)]
        meter = run.client_ledgers.meter()
        with refusing(federation.population.words.folder, folder, "cannot be read or written"):
            progress = read_progress(run, strategies, observer, meter, environment.tally)
        give_back()  # memory of planning
        with environment.grid(run) as grid:
            ending = _run_rounds(progress, strategies, environment, grid, callbacks)
        stop_keeping()
        state = ending.state
        final = final_model(run.federation.task, state)
        is_new = final is not state.arrays or not run.federation.settings.measures(state.round)
        measured = evaluator(run.federation)(final, state.round) if is_new else {}
        title = title_of(progress.run.federation)
        counts, fields = confusion(run.federation, final), _after_release(progress.run, ending)
        with refusing(federation.population.words.folder, folder, "cannot be read or written"):
            result = finish(progress, ending, time_since(begin), title, measured, counts, fields)
        model = read_only_model(final)
        run_end = RunEnd(result["status"], result["reason"], folder, frozen(result), model)
        for each in callbacks:
            each.end(run_end)
    return RunResult(exit_code_of(result), result, folder, progress.reported_bytes, ending.signal)


def _after_release(run: Run, ending: Ending) -> dict[str, Any]:
    """Return the fields that queries and figures of extensions add to the result of a run whose released model is fixed."""
    if ending.status not in (Status.COMPLETED, Status.EXHAUSTED):
        return {}
    model = final_model(run.federation.task, ending.state)
    fields = [query.released(run, model) for query in queries_of(run.federation.settings)]
    names = getattr(run.federation.task, "released_figures", ())
    fields += [
        extension(FIGURES, name, "task", name)(run, ending.state)
        for name in names
        if installed(FIGURES, name)
    ]
    return {name: value for each in fields for name, value in each.items()}


def _ask_first(environment: Environment, run: Run) -> Run:
    """Ask the queries due before the first round, once clients are connected; return the run as the answers change it."""
    first = [query for query in queries_of(run.federation.settings) if query.first]
    if run.resumed or not first:
        return run
    reason = environment.pace.ready(threading.Event())
    if reason is not None:
        raise Refusal("link.clients", None, reason)
    for query in first:
        run = query.before(run, environment.grid, _reach_of_all(run.federation, environment.pace.deadline))
    return run


def _reach_of_all(federation: Federation, timeout: float) -> Reach:
    """Return the terms on which all clients answer a query within these seconds, whoever is drawn for the round."""
    return Reach(answers_of(with_everybody(federation)), timeout, federation.randomness)


def exit_code_of(result: Mapping[str, Any]) -> int:
    """Return the exit code for a result; not 0 if its audit raised an alarm that no second test confirmed."""
    audit = result.get("audit")
    levels = set[str]()
    if audit is not None and audit["on_alarm"] != "note":
        levels = {each["level"] for each in audit["alarms"]}
    is_unconfirmed = Level.ORANGE in levels and Level.RED not in levels
    return EXIT_CODES[Status(result["status"])] or is_unconfirmed * _UNCONFIRMED


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


def _run_rounds(
    progress: Progress,
    strategies: Sequence[Strategy],
    environment: Environment,
    grid: Grid,
    callbacks: Sequence[Callback],
) -> Ending:
    """Run the remaining rounds, with one strategy for each arm, and return how the run ended."""
    run, federation = progress.run, progress.run.federation
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
    rounds = _Rounds(progress, private, environment, callbacks)
    if progress.meter.counts and federation.seed is not None:
        rounds.count_earlier()
    if run.ledger is not None:
        run.ledger.origin = origin_of(federation, progress.state.arrays)
    order, down = environment.order(run), federation.settings.compress.down
    loop = Loop(
        strategies=strategies,
        num_rounds=progress.state.round if run.spent else federation.settings.steps,
        evaluate=evaluator(federation),
        after_round=rounds.after_round,
        train_config=partial(order_of_round, run, order),
        pace=replace(environment.pace, ready=rounds.ready),
        average_after=average_after(run),
        tuning=run.tuning,
        score=rounds.score if federation.settings.scored_at_clients else None,
        difference_bits=down if isinstance(down, int) else None,
        buffers=frozenset(name for name, _ in federation.task.model().named_buffers()),
    )
    ending = _with_final_status(progress, rounds.run(loop))
    progress.meter.add_unfinished(progress.meter.clients(private.participants, private.current_cohort))
    if ending.status is Status.INTERRUPTED:
        return replace(ending, reason=f"{federation.population.resumption(run.folder)} goes on from here")
    return ending


def _participants(run: Run, grid: Grid) -> Participants:
    """Return the clients of a run's rounds, with its canaries: nodes of a simulation's grid, or added by a server."""
    federation, canaries = run.federation, run.client.canary_clients
    add_canaries = None
    if canaries.count and not federation.population.reads_data:
        add_canaries = partial(extra_clients().add_canaries, canaries)
    return Participants(
        grid,
        federation.cohort,
        federation.num_clients,
        answers_of(federation),
        federation.extra_clients,
        add_canaries,
        federation.settings.population,
        names=federation.population.names,
    )


def _with_final_status(progress: Progress, ending: Ending) -> Ending:
    """Return the ending of a run, some of whose rounds the budget may not have paid, with its status and reason.

    A resumed run with a spent budget counts as complete if it lacks no more rounds than a crash can lose: these were
    charged before.
    """
    run, settings, rounds = progress.run, progress.run.federation.settings, ending.state.round
    if run.spent and ending.status is Status.COMPLETED:
        ending = replace(ending, status=Status.EXHAUSTED, reason=run.spent)
    lost_in_crash = run.checkpoint.run and settings.steps - rounds <= settings.checkpoint_every
    if ending.status is not Status.EXHAUSTED or not lost_in_crash:
        return ending
    reason = f"{rounds} of {settings.steps} rounds; the budget is spent, in part on rounds that were lost when the run was stopped"
    return replace(ending, status=Status.COMPLETED, reason=reason)


@dataclass(frozen=True)
class _Rounds:
    """Steps of the rounds of one process, and what they have in common.

    Attributes:
      progress: changed after each round.
      grid: draws the cohorts and returns the noised means.
      environment: surroundings of the rounds.
      callbacks: callbacks of the run; the first one writes METRICS.
    """

    progress: Progress
    grid: PrivateGrid
    environment: Environment
    callbacks: Sequence[Callback]

    def run(self, loop: Loop) -> Ending:
        """Run the rounds; an error of the disk or the ledger ends the run after the last recorded round."""
        progress = self.progress
        try:
            ending = self._obey(progress.observer.resume(progress.state))
            if progress.run.spent and not ending:
                self._evaluate_last(loop.pace)
            self._start()
            return ending or run_rounds(self.grid, loop, progress.state)
        except LedgerUnavailable as problem:
            last = progress.state
            return Ending(Status.FAILED, f"stopped after round {last.round}: {problem}", last)
        except Mixing as problem:
            return Ending(Status.FAILED, f"{MIXED}; {problem}", progress.state)
        except OSError as problem:
            return Ending(Status.FAILED, cannot_write(progress, problem), progress.state)

    def _start(self) -> None:
        """Call the callbacks with the run's start, which has the lines of all rounds and is not kept."""
        start = _start_of(self.progress)
        for each in self.callbacks:
            each.start(start)

    def count_earlier(self) -> None:
        """Draw the cohorts of the finished rounds of a seeded run again, to count how often each client took part."""
        progress, state = self.progress, self.progress.state
        self.grid.skip_to(state.round, state.choices)
        for number, row in enumerate(progress.history, 1):
            cohort = progress.meter.clients(self.grid.participants, self.grid.draw(number))
            progress.meter.add(self._charged(number, cohort, row["replies"]))

    def ready(self, stop: threading.Event) -> str | None:
        """Wait until the next round may begin, with the clients of that time; return why it may not, or None."""
        return self.environment.pace.ready(stop) or self._renew()

    def _renew(self) -> str | None:
        """Use the current clients for the next round; return why that is impossible, or None."""
        progress, before = self.progress, self.progress.run.federation
        try:
            federation = self.environment.renew(before)
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
            self.grid.renew(list(names), federation.masking, answers_of(federation), names)
        return None

    def score(self, models: Sequence[Arrays], number: int) -> tuple[float, ...]:
        """Return each arm's score by its clients; minus infinity if it cannot be estimated.

        The models are those of the arms after round `number`. The line of the next recorded round tells the answers.

        Raises:
          Unscored: no arm's score can be estimated.
        """
        run, participants = self.progress.run, self.grid.participants
        reach = _reach_of_all(run.federation, self.environment.pace.deadline)
        queries = queries_of(run.federation.settings)
        records = [r for query in queries for r in query.scores(run, participants, reach, models, number)]
        scores = [score_of(each).get("value") for each in records]
        if all(value is None for value in scores):
            reasons = sorted({str(each.get("reason", "it cannot be said")) for each in records})
            raise Unscored(f"no arm could be scored by its clients: {'; '.join(reasons)}")
        self.progress.scores = records
        return tuple(-math.inf if value is None else value for value in scores)

    def after_round(
        self, state: State, round_: Round, measure: Callable[[], dict[str, float]]
    ) -> Ending | None:
        """Record a round, write its checkpoint and call the callbacks; return the run's ending, if it is to end.

        `measure` returns the new model's metrics on held-out examples, for the rounds after which the settings ask for them.
        """
        progress, federation = self.progress, self.progress.run.federation
        progress.observer.observe(state, self.grid.released)
        self.grid.released = None  # it takes as much room as two models
        metrics = measure() if federation.settings.measures(state.round) else {}
        cohort = progress.meter.clients(self.grid.participants, self.grid.current_cohort)
        charged = self._charged(round_.number, cohort, round_.replies)
        round_end = record_round(progress, state, round_, metrics, charged, self._answer_after(state))
        lines, *others = self.callbacks
        lines.round(round_end)
        keep(progress, state)  # before callbacks, which may be slow: a charged round must not be lost
        for each in others:
            each.round(round_end)
        if federation.population.reads_data and DROP_REASONS[MIXES] in round_.dropped:
            return Ending(Status.FAILED, f"{MIXED}; see {CLIENTS_LOG}", state)
        return self._obey(progress.observer.demand(state))

    def _charged(self, number: int, cohort: list[int], replies: int | None) -> list[int]:
        """Return the clients of a round that were charged for it: by their ledgers if none of them answered, else all."""
        run = self.progress.run
        return run.client_ledgers.charged(run.name, number, cohort) if replies == 0 else cohort

    def _answer_after(self, state: State, is_last: bool = False) -> dict[str, Any] | None:
        """Ask the query due after a round, and return the record of the answer; None if none is due."""
        run, participants = self.progress.run, self.grid.participants
        reach = _reach_of_all(run.federation, self.environment.pace.deadline)
        queries = queries_of(run.federation.settings)
        answers = (query.after(run, participants, reach, state, is_last) for query in queries)
        return next((answer for answer in answers if answer is not None), None)

    def _evaluate_last(self, pace: Pace) -> None:
        """Evaluate the last model of a run whose remaining rounds cannot be paid: this was planned, and is paid for."""
        history, federation = self.progress.history, self.progress.run.federation
        is_due = history and "evaluation" not in history.last and federation.settings.query_fields
        if not is_due or pace.ready(threading.Event()) is not None:
            return
        if (answer := self._answer_after(self.progress.state, is_last=True)) is not None:
            history.last.update({**metric_means(answer), "evaluation": answer})

    def _obey(self, demand: Demand) -> Ending | None:
        """Scale the noise of later rounds as an observer demands; return the run's ending, if it is to end."""
        if demand.noise != 1:
            self.grid.account.noise_factor = demand.noise
        return demand.ending


def _start_of(progress: Progress) -> RunStart:
    run, federation = progress.run, progress.run.federation
    targets = {str(each.unit): each.target_epsilon for each in federation.mode.promises}
    return RunStart(
        name=federation.population.run_name(run.folder),
        title=title_of(federation),
        folder=run.folder,
        num_rounds=federation.settings.steps,  # with those of the arms
        budgets=frozen({"client": None, "record": None, **targets}),
        config=frozen(publishable_keys(federation.settings.source)),
        rows=frozen([*progress.history]),
        audit=progress.observer.line,
    )


def answers_of(federation: Federation) -> Answers:
    """Return how many clients must answer in a round, as the population sets it for the expected cohort."""
    return federation.population.answers(federation.cohort.expected_size(federation.num_clients))


def title_of(federation: Federation) -> str:
    """Return a description of the run in one line."""
    s = federation.settings
    clients = f"{federation.declared_clients} clients"
    if federation.extra_clients:
        clients += f" and {federation.extra_clients} canaries"
    strategy = s.strategy.name if s.strategy.target is None else s.strategy.target.partition(":")[2]
    kind = federation.population.words.title
    return f"{federation.task_name} ({kind}): {clients}, {strategy}, privacy={federation.mode.name}"
