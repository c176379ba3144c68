"""``fedveil simulate``: one federation on one machine, from settings to a run folder."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from ...privacy.adaptation import Choices
from ...privacy.audit.alarms import Level
from ...privacy.ledger.ledger import LedgerUnavailable
from ...privacy.refusal import Refusal
from ...strategies.canaries import add_canaries
from ...strategies.flower_adapter import quiet_flower
from ...tasks.arrays import load_arrays, read_arrays
from ..checkpoint import Checkpoint, restore_strategy
from ..participants import Participants
from ..private_grid import PrivateGrid
from ..round_terms import ALL_ANSWERS, Answers, Round
from ..rounds import Ending, Loop, Pace, State, Status, run_rounds
from . import audit as auditing
from . import run_folder as recording
from .display import Display, Line
from .federation import Federation
from .prepare import make_strategy_of, opened, prepare
from .run_folder import Run

Arrays = dict[str, NDArray[np.generic]]

EXIT_CODES = {
    Status.COMPLETED: 0,
    Status.FAILED: 1,
    Status.EXHAUSTED: 3,
    Status.ALARMED: 5,
    Status.PAUSED: 5,
    Status.INTERRUPTED: 130,
}
_UNCONFIRMED = 4  # too weak to tell, as fedveil audit has it


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    exit_code: int
    result: dict[str, Any]
    folder: Path


def _nothing(run: Run) -> None:
    del run


def _as_it_is(federation: Federation) -> Federation:
    return federation


def _no_order(run: Run) -> Mapping[str, str]:
    del run
    return {}


@dataclass(frozen=True)
class Surroundings:
    """What a run's rounds meet with.

    Attributes:
      on_grid: finds the grid that reaches the clients, and calls its second argument with it.
      order: what every round tells the clients beside the model; one machine's clients know it all.
      pace: of the rounds.
      watch: called before the first round and after each.
      renew: called before each round; returns the federation with the clients that it has by now, or a Refusal ends the
        run there.
    """

    on_grid: Callable[[Run, Callable[[Grid], None]], None]
    order: Callable[[Run], Mapping[str, str]] = _no_order
    pace: Pace = field(default_factory=Pace)
    watch: Callable[[Run], None] = _nothing
    renew: Callable[[Federation], Federation] = _as_it_is


def run_federation(
    federation: Federation, folder: Path, around: Surroundings, quiet: bool = False
) -> Outcome:
    """Run the federation's rounds, simulated or real, and leave the results in `folder`, or where it goes on.

    Raises:
      Refusal: before anything is spent.
    """
    quiet_flower()
    begin = time.monotonic()
    resumed = federation.settings.resume
    folder = Path(resumed) if resumed else folder
    saved = recording.read_saved(folder) if resumed else None
    run = prepare(federation, folder, saved)
    with opened(run, saved), _client_log(folder):
        around.on_grid(run, partial(_run_on, run, around, quiet))
        assert run.ending is not None
        result = recording.finish(run, run.ending, time.monotonic() - begin, title_of(run.federation))
    status = Status(result["status"])
    if not quiet:
        stream = sys.stderr if status is Status.FAILED else sys.stdout
        lost = result["rounds_abandoned"]
        in_vain = (
            f", {lost} of them abandoned and paid for in vain" if lost and status is not Status.FAILED else ""
        )
        print(f"{status}: {result['reason']}{in_vain}; results: {folder}", file=stream, flush=True)
    return Outcome(exit_code_of(result), result, folder)


def exit_code_of(result: Mapping[str, Any]) -> int:
    """The exit code of a run that left this result: of one that ended well not 0 where an alarm stands unconfirmed."""
    audit = result.get("audit")
    levels = set[str]()
    if audit is not None and audit["on_alarm"] != "note":
        levels = {each["level"] for each in audit["alarms"]}
    doubt = Level.ORANGE in levels and Level.RED not in levels
    return EXIT_CODES[Status(result["status"])] or (_UNCONFIRMED if doubt else 0)


@contextmanager
def _client_log(folder: Path) -> Generator[None]:
    """Let simulated clients write what failed, which a real client keeps to itself, into the run folder."""
    handler = logging.FileHandler(folder / "clients.log", delay=True)
    logger = logging.getLogger("fedveil.client")
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)
        handler.close()


def _run_on(run: Run, around: Surroundings, quiet: bool, grid: Grid) -> None:
    federation = run.federation
    private = PrivateGrid(
        _participants(run, grid),
        privacy=run.privacy,
        scalars=federation.scalars,
        randomness=federation.randomness,
        run=run.name,
        masking=federation.masking,
    )
    strategy = make_strategy_of(federation)
    run.state = state = _first_state(run, strategy)
    run.history = recording.read_history(run.folder, state.round)
    if run.meter is not None and federation.seed is not None:
        private.skip_to(state.round, state.choices)
        for number in range(1, state.round + 1):
            run.meter.add(private.participants.real(private.draw(number)))
    ended = auditing.go_on(run, private, state)
    display = Display(title_of(federation), federation.settings.num_rounds, budgets_of(federation), quiet)

    def ready(stop: threading.Event) -> str | None:
        return around.pace.ready(stop) or _renewed(run, private, around)

    loop = Loop(
        strategy=strategy,
        num_rounds=federation.settings.num_rounds,
        evaluate=evaluator(federation),
        after_round=partial(_after_round, run, private, display, around.watch),
        train_config=around.order(run),
        pace=replace(around.pace, ready=ready),
    )
    around.watch(run)
    with display:
        try:
            run.ending = ended or run_rounds(private, loop, state)
        except LedgerUnavailable as problem:
            run.ending = Ending(Status.FAILED, f"stopped after round {run.state.round}: {problem}", run.state)
        except OSError as problem:
            run.ending = Ending(Status.FAILED, recording.cannot_write(run, problem), run.state)
    if run.ending.status is Status.INTERRUPTED:
        run.ending = replace(run.ending, reason=f"{recording.again(run)} goes on from here")


def _participants(run: Run, grid: Grid) -> Participants:
    federation, canaries = run.federation, run.client.canaries
    return Participants(
        grid,
        federation.cohort,
        federation.num_clients,
        answers_of(federation),
        federation.num_canaries,
        None if canaries is None or federation.deployed is None else partial(add_canaries, canaries),
    )


def _renewed(run: Run, grid: PrivateGrid, around: Surroundings) -> str | None:
    """Let the next round be of the clients that there are by now; return why there can be none."""
    try:
        federation = around.renew(run.federation)
    except Refusal as refusal:
        return str(refusal)
    if federation is not run.federation and federation.deployed is not None:
        run.federation = federation
        nodes = [member.node for member in federation.deployed.roster.members]
        grid.renew(nodes, federation.masking, answers_of(federation))
    return None


def _first_state(run: Run, strategy: Strategy) -> State:
    arrays, checkpoint = read_arrays(run.federation.task.model()), run.checkpoint
    if checkpoint is None:
        return State(0, arrays, {})
    found = {name: (value.shape, value.dtype) for name, value in checkpoint.model.items()}
    if found != {name: (value.shape, value.dtype) for name, value in arrays.items()}:
        raise Refusal("resume", str(run.folder), "its checkpoint holds another model; start a new run")
    restore_strategy(strategy, checkpoint.strategy)
    return State(
        checkpoint.round,
        {name: checkpoint.model[name] for name in arrays},
        dict(checkpoint.strategy),
        _choices_after(run, checkpoint),
    )


def _choices_after(run: Run, checkpoint: Checkpoint) -> Choices | None:
    """Return what the checkpoint's round led to; under another name the run has planned its noise anew."""
    if checkpoint.choices is None or run.privacy is None or checkpoint.run == run.name:
        return checkpoint.choices
    fresh = run.privacy.adaptation.first(run.privacy.plan)
    return replace(fresh, clipping_norm=checkpoint.choices.clipping_norm)


def _after_round(
    run: Run,
    grid: PrivateGrid,
    display: Display,
    watch: Callable[[Run], None],
    state: State,
    done: Round,
    metrics: dict[str, float],
) -> Ending | None:
    alarms = auditing.watch_round(run, grid, state)
    spent = recording.record_round(run, state, done, metrics, grid.participants.real(grid.drawn))
    dropped, audit = sum(done.dropped.values()), auditing.shown(run)
    clients = (done.replies, done.invited, dropped)
    display.show(Line(done.number, metrics, spent.client, spent.record, *clients, audit, done.abandoned))
    watch(run)
    return auditing.act(run, grid, state, alarms)


def answers_of(federation: Federation) -> Answers:
    """Return by how many answers a round goes: on one machine by all there are."""
    if federation.deployed is None:
        return ALL_ANSWERS
    link, planned = federation.deployed.link, federation.cohort.expected_size(federation.num_clients)
    enough = None if link.enough is None else max(1, math.ceil(link.enough * planned))
    return Answers(math.ceil(link.quorum * planned), enough)


def title_of(federation: Federation) -> str:
    """Return one line that says what runs."""
    s = federation.settings
    kind = "simulation" if federation.simulated else "real data"
    names = {
        "ClientCentral": "client_central",
        "ClientDistributed": "client_distributed",
        "Record": "record",
        "RecordAndClient": "record_and_client",
    }
    privacy = names.get(type(s.privacy).__name__, "none")
    clients = f"{federation.num_clients} clients"
    if federation.num_canaries:
        clients += f" and {federation.num_canaries} canaries"
    return f"{s.task.name} ({kind}): {clients}, {s.strategy.name}, privacy={privacy}"


def budgets_of(federation: Federation) -> dict[str, float | None]:
    """Return the target epsilon of each unit."""
    pairs = {"client": federation.client, "record": federation.record}
    return {unit: level.target_epsilon if level else None for unit, level in pairs.items()}


def evaluator(federation: Federation) -> Callable[[Arrays, int], dict[str, float]]:
    """Return the function that measures arrays on the held-out examples."""
    model, held_out = federation.task.model(), federation.task.held_out()

    def evaluate(arrays: Arrays, number: int) -> dict[str, float]:
        del number
        load_arrays(model, arrays)
        model.eval()
        with torch.no_grad():
            outputs = model(held_out.inputs)
            loss = float(federation.task.loss(outputs, held_out.targets))
            return {**federation.task.metrics(outputs, held_out.targets), "loss": loss}

    return evaluate
