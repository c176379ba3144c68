"""``fedveil simulate``: one federation on one machine, from settings to a run folder."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid
from numpy.typing import NDArray

from ..client.app import SETTINGS_KEY, make_client_app, record_plan, workbench
from ..client.settings import ClientSettings
from ..client.training import load_arrays, read_arrays
from ..configs.schema import SimulationSettings
from ..privacy.accounting import GATE_INTERVAL, epsilon
from ..privacy.budget import Adversary
from ..privacy.ledger import Ledger
from ..privacy.refusal import Refusal
from ..server.checkpoint import Checkpoint, read, restore_strategy, write, write_durably
from ..server.private_grid import ClientPrivacy, PrivateGrid, Round
from ..server.rounds import Ending, Loop, State, Status, run_rounds
from ..strategies.registry import make_strategy
from .deadline import within
from .display import Display, Line
from .engine import InProcessGrid
from .faults import inject
from .federation import Federation, build
from .flower_adapter import quiet_flower
from .report import spent, versions

Arrays = dict[str, NDArray[np.generic]]

EXIT_CODES = {Status.COMPLETED: 0, Status.FAILED: 1, Status.EXHAUSTED: 3, Status.INTERRUPTED: 130}
COHORT_TIMEOUT_SECONDS = 3600.0  # for a whole round; single clients have their own deadline


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    exit_code: int
    result: dict[str, Any]
    folder: Path


@dataclass
class Run:
    """A run in progress: its parts, its folder, and what it has recorded so far."""

    federation: Federation
    folder: Path
    name: str
    client: ClientSettings
    ledger: Ledger | None = None
    privacy: ClientPrivacy | None = None
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    participations: dict[int, int] = field(default_factory=dict[int, int])
    ending: Ending | None = None


def simulate(settings: SimulationSettings, folder: Path, quiet: bool = False) -> Outcome:
    """Run the federation that the settings describe and leave its results in `folder`.

    Args:
      settings: validated.
      folder: the run folder; with `settings.resume` the run goes on in the resumed one.
      quiet: show nothing.
    Raises:
      Refusal: before anything is written or spent.
    """
    quiet_flower()
    torch.set_num_threads(1)  # a thread pool would not survive the fork of the workers
    begin = time.monotonic()
    folder = Path(settings.resume) if settings.resume else folder
    federation = build(settings)
    run = _prepare(federation, folder, read_name(folder) if settings.resume else None)
    handler = _log_clients(run.folder)
    with closing(handler), _open_ledger(run) as checkpoint:
        grid_run = partial(_run_on, run, checkpoint, quiet)
        if settings.engine.name == "ray":
            _on_ray(run, grid_run)
        else:
            _in_process(run, grid_run)
        assert run.ending is not None
        result = _finish(run, run.ending, time.monotonic() - begin)
    return Outcome(EXIT_CODES[run.ending.status], result, folder)


# --- before the first round -------------------------------------------------------------------------------------


def read_name(folder: Path) -> str:
    """Return the name under which an earlier run stands on its ledgers."""
    try:
        return str(json.loads((folder / "run.json").read_text())["run"])
    except (OSError, ValueError, KeyError) as problem:
        raise Refusal(
            "resume", str(folder), f"its run.json cannot be read ({problem}); start a new run"
        ) from problem


def _prepare(federation: Federation, folder: Path, name: str | None) -> Run:
    client = federation.client_settings(folder)
    if federation.record is not None:
        _ = workbench(client.to_json()).model  # refuses a model that DP-SGD cannot train
    make_strategy_of(federation)
    run = Run(federation, folder, name or uuid.uuid4().hex, client)
    if name is not None and federation.seed is None:
        # Noise of the system's generator cannot be repeated: the resumed part is charged as a run of its own.
        run.name = uuid.uuid4().hex
    _make_folder(run, new=name is None)
    return run


def _log_clients(folder: Path) -> logging.Handler:
    """Let simulated clients write what failed, which a real client keeps to itself, into the run folder."""
    handler = logging.FileHandler(folder / "clients.log", delay=True)
    logger = logging.getLogger("fedveil.client")
    logger.addHandler(handler)
    logger.propagate = False
    return handler


def make_strategy_of(federation: Federation) -> Any:
    """Return the strategy of the settings."""
    s = federation.settings
    return make_strategy(s.strategy.target or s.strategy.name, s.strategy.parameters, s.allow_modules)


def _make_folder(run: Run, new: bool) -> None:
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        if new and (run.folder / "run.json").exists():
            raise Refusal(
                "hydra.run.dir", str(run.folder), "a run lives there; choose another or use resume="
            )
        write_durably(run.folder / "run.json", json.dumps({"run": run.name}).encode())
        if new:
            write_durably(run.folder / "config.yaml", run.federation.settings.source.encode())
    except OSError as problem:
        raise Refusal(
            "hydra.run.dir", str(run.folder), f"it cannot be written ({problem.strerror})"
        ) from problem


@contextmanager
def _open_ledger(run: Run) -> Generator[Checkpoint | None]:
    """Open the population's ledger, if clients are protected, and calibrate what it still affords."""
    federation = run.federation
    checkpoint = read(run.folder)
    if federation.client is None:
        yield checkpoint
        return
    budget = federation.client_budget
    assert budget is not None
    path = federation.ledger_path(run.folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    expect = checkpoint.head if checkpoint else None
    with Ledger.open(
        path, budget, owner=federation.owner, simulated=federation.task.simulated, expect=expect
    ) as ledger:
        saved = _saved_noise(run.folder)
        prior = () if saved else tuple(ledger.events(Adversary.MODEL))
        plan = federation.client_plan(prior) if saved is None else federation.client_plan_with(saved)
        assert plan is not None and plan.noise_multiplier is not None
        write_durably(
            run.folder / "run.json", json.dumps({"run": run.name, "noise": plan.noise_multiplier}).encode()
        )
        run.ledger = ledger
        run.privacy = ClientPrivacy(plan, ledger, federation.client.metrics_share)
        yield checkpoint


def _saved_noise(folder: Path) -> float | None:
    return json.loads((folder / "run.json").read_text()).get("noise")


# --- on an engine -----------------------------------------------------------------------------------------------


def _client_app(run: Run) -> Any:
    federation, text = run.federation, run.client.to_json()
    deadline = federation.settings.engine.deadline
    mods = (inject(federation.faults, federation.randomness, deadline),) if federation.faults.any else ()
    return make_client_app(partial(_settings_text, text), mods)


def _settings_text(text: str, context: Context) -> str:
    del context
    return text


def _in_process(run: Run, on_grid: Callable[[Grid], None]) -> None:
    from ..client.cohort_training import can_vectorise, sum_cohort

    engine = run.federation.settings.engine
    text = run.client.to_json()
    bench = workbench(text)
    vectorised = not run.federation.faults.any and can_vectorise(bench)
    grid = InProcessGrid(
        client_app=_client_app(run),
        num_clients=run.federation.task.num_clients,
        run_config={SETTINGS_KEY: text},
        workers=engine.workers,
        deadline=engine.deadline,
        cohort_function=partial(sum_cohort, bench) if vectorised else None,
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


def _run_on(run: Run, checkpoint: Checkpoint | None, quiet: bool, grid: Grid) -> None:
    federation = run.federation
    private = PrivateGrid(
        grid,
        federation.cohort,
        federation.task.num_clients,
        privacy=run.privacy,
        scalars=federation.scalars,
        randomness=federation.randomness,
        run=run.name,
    )
    strategy = make_strategy_of(federation)
    state = State(0, read_arrays(federation.task.model()), {})
    if checkpoint is not None:
        state = State(checkpoint.round, _same_shapes(checkpoint, state.arrays), dict(checkpoint.strategy))
        restore_strategy(strategy, state.strategy)
    run.history = _read_history(run.folder, state.round)
    display = Display(title_of(federation), federation.settings.num_rounds, budgets_of(federation), quiet)
    with display:
        loop = Loop(
            strategy=strategy,
            num_rounds=federation.settings.num_rounds,
            evaluate=evaluator(federation),
            after_round=partial(_after_round, run, private, display),
            train_config={},
            timeout=COHORT_TIMEOUT_SECONDS,
        )
        run.ending = run_rounds(private, loop, state)


def _same_shapes(checkpoint: Checkpoint, arrays: Arrays) -> Arrays:
    found = {name: value.shape for name, value in checkpoint.model.items()}
    if found != {name: value.shape for name, value in arrays.items()}:
        raise Refusal("resume", "checkpoint", "its model has other shapes than the task's; start a new run")
    return checkpoint.model


def title_of(federation: Federation) -> str:
    """Return one line that says what runs."""
    s = federation.settings
    kind = "simulation" if federation.task.simulated else "real data"
    names = {"ClientCentral": "client_central", "Record": "record", "RecordAndClient": "record_and_client"}
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


# --- after each round -------------------------------------------------------------------------------------------


def _after_round(
    run: Run, grid: PrivateGrid, display: Display, state: State, done: Round, metrics: dict[str, float]
) -> None:
    client = epsilon_so_far(run) if run.ledger is not None else None
    record = _record_epsilon_so_far(run, grid) if run.federation.record is not None else None
    nothing = math.inf if client is None and record is None else client
    row = {
        "round": done.number,
        **metrics,
        **{f"train/{name}": value for name, value in done.scalars.items()},
        "invited": done.invited,
        "replies": done.replies,
        "dropped": done.dropped,
        "clipped_again": done.clipped_again,
        "epsilon_client": _spelled(nothing),
        "epsilon_record": _spelled(record),
    }
    run.history.append(row)
    with open(run.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    every = run.federation.settings.checkpoint_every
    if state.round % every == 0 or state.round == run.federation.settings.num_rounds:
        save(run, state)
    display.show(
        Line(done.number, metrics, nothing, record, done.replies, done.invited, sum(done.dropped.values()))
    )


def save(run: Run, state: State) -> None:
    """Write a checkpoint of this state."""
    head = run.ledger.head if run.ledger is not None else None
    write(run.folder, Checkpoint(run.name, state.round, state.arrays, state.strategy, head))


def epsilon_so_far(run: Run) -> float:
    """Return what clients have revealed to whoever gets the model, with the gate's discretisation."""
    client = run.federation.client
    assert client is not None and run.ledger is not None
    return epsilon(run.ledger.events(Adversary.MODEL), client.target_delta, client.adjacency, GATE_INTERVAL)


def _record_epsilon_so_far(run: Run, grid: PrivateGrid) -> float:
    """Return the epsilon of whoever took part most often, had it the fewest records."""
    record = run.federation.record
    assert record is not None and run.client.record is not None
    for node in grid.drawn:
        run.participations[node] = run.participations.get(node, 0) + 1
    most = max(run.participations.values(), default=0)
    plan = record_plan(run.client.record, run.federation.sizes[0], run.client)
    return epsilon([plan.event()] * most, record.target_delta, record.adjacency, GATE_INTERVAL)


def _spelled(value: float | None) -> float | str | None:
    return "infinity" if value is not None and math.isinf(value) else value


def _read_history(folder: Path, last: int) -> list[dict[str, Any]]:
    """Return the recorded rounds up to `last`, and cut what a crash left behind them."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["round"] <= last:
            rows.append(row)
    write_durably(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


# --- after the last round ---------------------------------------------------------------------------------------


def _finish(run: Run, ending: Ending, seconds: float) -> dict[str, Any]:
    from safetensors.numpy import save as to_safetensors

    federation = run.federation
    save(run, ending.state)
    model = {name: np.ascontiguousarray(value) for name, value in ending.state.arrays.items()}
    write_durably(run.folder / "model.safetensors", to_safetensors(model))
    record = run.client.record
    rows = spent(federation, run.ledger, Path(record.ledger_dir) if record else None)
    final = run.history[-1] if run.history else {}
    metrics = {k: v for k, v in final.items() if isinstance(v, float) and not k.startswith("epsilon")}
    result = {
        "status": str(ending.status),
        "reason": ending.reason,
        "rounds_completed": ending.state.round,
        "data": "simulation" if federation.task.simulated else "real",
        "rng": federation.randomness.kind,
        "privacy": [row.to_json() for row in rows],
        "metrics": metrics,
        "dropped": _summed_drops(run),
        "seed": federation.seed,
        "noise_multiplier": run.privacy.plan.noise_multiplier if run.privacy else None,
        "ledger": str(federation.ledger_path(run.folder))
        if run.ledger
        else record.ledger_dir
        if record
        else None,
        "folder": str(run.folder),
        "versions": versions(),
        "seconds": round(seconds, 3),
    }
    write_durably(run.folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    if run.history:
        from .curve import draw

        draw(run.history, run.folder / "curve.png", title_of(federation))
    return result


def _summed_drops(run: Run) -> dict[str, int]:
    total: dict[str, int] = {}
    for row in run.history:
        for reason, count in row["dropped"].items():
            total[reason] = total.get(reason, 0) + count
    return total
