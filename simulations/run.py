"""``fedveil simulate``: one federation on one machine, from settings to a run folder."""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from ..client.app import SETTINGS_KEY, make_client_app, workbench
from ..client.settings import ClientSettings
from ..client.training import load_arrays, read_arrays
from ..configs.schema import SimulationSettings
from ..privacy.adaptation import Choices
from ..privacy.budget import Adversary
from ..privacy.ledger import Ledger, LedgerUnavailable
from ..privacy.planning import Plan
from ..privacy.refusal import Refusal
from ..server import noise_key
from ..server.checkpoint import Checkpoint, read, restore_strategy
from ..server.private_grid import ClientPrivacy, PrivateGrid, Round
from ..server.rounds import Ending, Loop, State, Status, run_rounds
from ..strategies.flower_adapter import quiet_flower
from ..strategies.registry import make_strategy
from . import recording
from .build import build
from .deadline import within
from .display import Display, Line
from .engine import InProcessGrid
from .faults import inject
from .federation import Federation, require_one_round
from .record_ledgers import KnownHeads, require_heads
from .recording import Run, Saved
from .report import record_meter

Arrays = dict[str, NDArray[np.generic]]

EXIT_CODES = {Status.COMPLETED: 0, Status.FAILED: 1, Status.EXHAUSTED: 3, Status.INTERRUPTED: 130}
COHORT_TIMEOUT_SECONDS = 3600.0  # for a whole round; single clients have their own deadline


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    exit_code: int
    result: dict[str, Any]
    folder: Path


def simulate(
    settings: SimulationSettings, folder: Path, quiet: bool = False, grid: Grid | None = None
) -> Outcome:
    """Run the federation that the settings describe and leave its results in `folder`.

    Args:
      settings: validated.
      folder: the run folder; with `settings.resume` the run goes on in the resumed one.
      quiet: show nothing.
      grid: reaches the clients; None starts the engine that the settings name.
    Raises:
      Refusal: before anything is spent.
    """
    quiet_flower()
    torch.set_num_threads(1)  # a thread pool would not survive the fork of the workers
    begin = time.monotonic()
    folder = Path(settings.resume) if settings.resume else folder
    saved = recording.read_saved(folder) if settings.resume else None
    run = _prepare(build(settings), folder, saved)
    with _opened(run, saved), _client_log(folder):
        _on_engine(run, partial(_run_on, run, quiet), grid)
        assert run.ending is not None
        result = recording.finish(run, run.ending, time.monotonic() - begin, title_of(run.federation))
    status = Status(result["status"])
    if not quiet:
        stream = sys.stderr if status is Status.FAILED else sys.stdout
        print(f"{status}: {result['reason']}; results: {folder}", file=stream, flush=True)
    return Outcome(EXIT_CODES[status], result, folder)


# --- before the first round -------------------------------------------------------------------------------------


def _prepare(federation: Federation, folder: Path, saved: Saved | None) -> Run:
    if saved is None:
        recording.require_free(folder)
    client = federation.client_settings(folder)
    if federation.record is not None:
        _ = workbench(client.to_json()).private_model  # refuses a model that DP-SGD cannot train
    make_strategy_of(federation)
    _ = federation.masking  # refuses a cohort that no sum can hide
    # Noise of the system's generator cannot be repeated: on real data the rest is charged as a run of its own, unless
    # the whole run was charged at once and each row of its noise is used once.
    goes_on = federation.seed is not None or federation.correlation is not None
    name = saved.name if saved and goes_on else uuid.uuid4().hex
    checkpoint = read(folder) if saved else None
    if checkpoint is not None and client.record is not None:
        require_heads(Path(client.record.ledger_dir), checkpoint.client_heads)
    meter, heads = record_meter(federation, client), KnownHeads(federation, client)
    return Run(federation, folder, name, client, checkpoint, meter=meter, heads=heads)


def make_strategy_of(federation: Federation) -> Any:
    """Return the strategy of the settings."""
    s = federation.settings
    return make_strategy(s.strategy.target or s.strategy.name, s.strategy.parameters, s.allow_modules)


@contextmanager
def _opened(run: Run, saved: Saved | None) -> Generator[None]:
    """Open the population's ledger, if clients are protected, and the run folder; refuse before either is written."""
    federation, checkpoint = run.federation, run.checkpoint
    if run.client.record is not None:
        key = "ledger.dir" if not federation.task.simulated else "hydra.run.dir"
        recording.make_folder(key, Path(run.client.record.ledger_dir))
    budget = federation.client_budget
    if budget is None:
        recording.make_folder("hydra.run.dir", run.folder)
        recording.write_start(run)
        yield
        return
    simulated = federation.task.simulated
    plan = _planned(run, saved, None) if simulated else None
    path = federation.ledger_path(run.folder)
    recording.make_folder("hydra.run.dir" if simulated else "ledger.dir", path.parent)
    expect = checkpoint.head if checkpoint else None
    ledger = Ledger.open(path, budget, owner=federation.owner, simulated=simulated, expect=expect)
    try:
        plan = plan or _planned(run, saved, ledger)
        run.ledger = ledger
        prior = () if simulated else tuple(ledger.events(Adversary.MODEL))
        begun = checkpoint.round if checkpoint and not simulated else 0
        adaptation = federation.adaptation(plan, prior, begun)
        recording.make_folder("hydra.run.dir", run.folder)
        key = _noise_key(run, fresh=saved is None)
        run.privacy = ClientPrivacy(plan, ledger, federation.metrics_share, adaptation, key)
        run.client = asking_for(run.client, plan)
        recording.write_start(run)
        yield
    finally:
        with suppress(LedgerUnavailable):  # of notes only: what was reserved stays spent
            ledger.close()


def _planned(run: Run, saved: Saved | None, ledger: Ledger | None) -> Plan:
    """Return the client level's plan: the noise this run began with, or the least that what is left affords."""
    federation, num_rounds = run.federation, run.federation.settings.num_rounds
    left = num_rounds - (run.checkpoint.round if run.checkpoint else 0)
    if (
        saved is not None
        and saved.noise is not None
        and (ledger is None or left <= 0 or federation.correlation)
    ):
        plan = federation.client_plan_with(saved.noise, saved.filter_order)
    else:
        prior = tuple(ledger.events(Adversary.MODEL)) if ledger else ()
        plan = federation.client_plan(prior, left, ledger.filter_order if ledger else None)
        if saved is None and plan is not None and federation.client_budget is not None:
            require_one_round(plan, federation.client_budget, prior)
    assert plan is not None and plan.noise_multiplier is not None
    return plan


def asking_for(client: ClientSettings, plan: Plan) -> ClientSettings:
    """Return the clients' settings with what simulated owners would ask for: the noise that was planned."""
    asked = client.encryption
    if asked is None:
        return client
    return replace(client, encryption=replace(asked, minimum_noise_multiplier=plan.noise_over_clip))


def _noise_key(run: Run, fresh: bool) -> bytes | None:
    """Return the key of correlated noise on real data, on disk before the run's first round."""
    federation = run.federation
    if federation.correlation is None or federation.seed is not None:
        return None
    if fresh:
        try:
            return noise_key.make(run.folder)
        except OSError as problem:
            remedy = f"no key can be kept there ({problem.strerror}); choose another"
            raise Refusal("hydra.run.dir", str(run.folder), remedy) from problem
    finished = run.checkpoint is not None and run.checkpoint.round >= federation.settings.num_rounds
    return b"" if finished else noise_key.read(run.folder)


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


# --- on an engine -----------------------------------------------------------------------------------------------


def _client_app(run: Run) -> Any:
    federation, text = run.federation, run.client.to_json()
    deadline = federation.settings.engine.deadline
    mods = (inject(federation.faults, federation.randomness, deadline),) if federation.faults.any else ()
    return make_client_app(partial(_settings_text, text), mods)


def _settings_text(text: str, context: Context) -> str:
    del context
    return text


def _on_engine(run: Run, on_grid: Callable[[Grid], None], grid: Grid | None) -> None:
    if grid is not None:
        on_grid(grid)
    elif run.federation.settings.engine.name == "ray":
        _on_ray(run, on_grid)
    else:
        _in_process(run, on_grid)


def _in_process(run: Run, on_grid: Callable[[Grid], None]) -> None:
    from ..client.cohort_training import can_vectorise, sum_cohort
    from ..client.in_place import begin

    engine = run.federation.settings.engine
    text = run.client.to_json()
    bench = workbench(text)
    plain = run.client.record is None and run.federation.masking is None and not run.federation.faults.any
    vectorised = plain and can_vectorise(bench)
    grid = InProcessGrid(
        client_app=_client_app(run),
        num_clients=run.federation.task.num_clients,
        run_config={SETTINGS_KEY: text},
        workers=engine.workers,
        deadline=engine.deadline,
        cohort_function=partial(sum_cohort, bench) if vectorised else None,
        in_place=partial(begin, bench) if plain else None,
    )
    try:
        on_grid(grid)
    finally:
        grid.close()


def _on_ray(run: Run, on_grid: Callable[[Grid], None]) -> None:
    from .ray_engine import ray_grid

    federation, text = run.federation, run.client.to_json()
    app = make_client_app(partial(_settings_text, text), client_mods(federation))
    with ray_grid(app, federation.task.num_clients, federation.settings.engine) as grid:
        on_grid(grid)


def client_mods(federation: Federation) -> tuple[Mod, ...]:
    """Return what surrounds a client where Flower's runtime calls it: its deadline, and the faults to inject."""
    deadline = federation.settings.engine.deadline
    faults = (inject(federation.faults, federation.randomness, deadline),) if federation.faults.any else ()
    return (within(deadline), *faults)


def _run_on(run: Run, quiet: bool, grid: Grid) -> None:
    federation = run.federation
    private = PrivateGrid(
        grid,
        federation.cohort,
        federation.task.num_clients,
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
            run.meter.add(private.draw(number))
    display = Display(title_of(federation), federation.settings.num_rounds, budgets_of(federation), quiet)
    loop = Loop(
        strategy=strategy,
        num_rounds=federation.settings.num_rounds,
        evaluate=evaluator(federation),
        after_round=partial(_after_round, run, private, display),
        train_config={},
        timeout=COHORT_TIMEOUT_SECONDS,
    )
    with display:
        try:
            run.ending = run_rounds(private, loop, state)
        except LedgerUnavailable as problem:
            run.ending = Ending(Status.FAILED, f"stopped after round {run.state.round}: {problem}", run.state)
        except OSError as problem:
            run.ending = Ending(Status.FAILED, recording.cannot_write(run, problem), run.state)


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
    run: Run, grid: PrivateGrid, display: Display, state: State, done: Round, metrics: dict[str, float]
) -> None:
    spent = recording.record_round(run, state, done, metrics, grid.drawn)
    dropped = sum(done.dropped.values())
    display.show(Line(done.number, metrics, spent.client, spent.record, done.replies, done.invited, dropped))


def title_of(federation: Federation) -> str:
    """Return one line that says what runs."""
    s = federation.settings
    kind = "simulation" if federation.task.simulated else "real data"
    names = {
        "ClientCentral": "client_central",
        "ClientDistributed": "client_distributed",
        "Record": "record",
        "RecordAndClient": "record_and_client",
    }
    privacy = names.get(type(s.privacy).__name__, "none")
    return (
        f"{s.task.name} ({kind}): {federation.task.num_clients} clients, {s.strategy.name}, privacy={privacy}"
    )


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
