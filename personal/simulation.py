"""Personal models of a declared simulation: made after the release, in the run's process, one client after the other.

Each client's own model lies in RUN/personal/, as it would lie with a device. Models of the same run and released model are
read and not trained again, so a run that was killed among them goes on there. The three columns are means over the held-out
rows of all clients.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..base.refusal import Refusal, refusing
from ..base.tensor_file import safetensors_parts
from ..modes.federation import Federation
from ..privacy.budget import Budget
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.plan import Plan
from ..run.prepared_run import Run
from ..run.queries import Query, charges_queries
from ..server.checkpoint import Arrays
from .choice import COLUMNS, LOSS, SHARED, Choice
from .settings import personal_of
from .state import OwnModel, read_own, write_own

FOLDER = "personal"  # in the run's folder, for its owner alone
REAL = (
    "personal models of real clients lie with the clients: deploy them (fedveil server, fedveil client), or declare "
    "task.simulated=true"
)
COSTS = (
    "Personal models cost nothing at server, clients and model: they never leave their clients. Whoever gets a personal model "
    "is a new adversary, to whom epsilon is infinite for that client's data."
)


def own_path(folder: Path, client: int) -> Path:
    """Return the file of a simulated client's own model in a run's folder."""
    return folder / FOLDER / f"client-{client:03d}.safetensors"


def own_models(run: Run, released: Arrays) -> dict[str, Any]:
    """Train, choose and store each client's own model, for `Query.released`; return the part of the result.

    Args:
      run: of a declared simulation.
      released: arrays of the released model, by name.
    """
    if not run.federation.population.reads_data:  # devices have theirs
        return {}
    folder = run.folder / FOLDER
    with refusing(run.federation.population.words.folder, folder, "cannot be written"):
        folder.mkdir(mode=0o700, exist_ok=True)
        choices = list(_choices(run, released))
    return result_of(run, choices)


def _choices(run: Run, released: Arrays) -> Iterator[Choice]:
    """Yield each client's choice, whose model is on disk then; only what is missing is trained."""
    from ..run.held_out_metrics import device_here  # torch, which a plan does without
    from ..tasks.data import data_of
    from ..tasks.hardware import precision
    from ..tasks.held_back import held_back_of
    from .own_model import Evaluation, Rows, own_model
    from .training import own_training_of

    federation, task = run.federation, run.federation.task
    engine, device = federation.settings.engine, device_here(federation)
    own = own_training_of(federation.settings, task)
    evaluation = Evaluation(partial(precision, device, engine.dtype), engine.examples_at_once)
    keys: dict[str, Any] = json.loads(json.dumps({"seed": federation.seed, **asdict(own)}))
    digest, model = hash_of_released(released), task.model().to(device)
    for client in range(task.num_clients):
        path = own_path(run.folder, client)
        before = read_own(path)
        if before is None or (before.run, before.shared, before.keys) != (run.name, digest, keys):
            held_out = held_back_of(task, client)
            assert held_out is not None  # by `Query.held_out`
            key = int(Randomness(federation.seed).stream(FOLDER, client).uint64(1)[0])
            rows = Rows(data_of(task, client), held_out)
            arrays, choice = own_model(task, model, rows, released, own, key, evaluation)
            before = OwnModel(run.name, digest, choice, keys, arrays)
            write_own(path, before)
        yield before.choice


def hash_of_released(arrays: Arrays) -> str:
    """Return the SHA-256 of the file of a released model, in hexadecimal."""
    digest = hashlib.sha256()
    for part in safetensors_parts(arrays):
        digest.update(part)
    return digest.hexdigest()


def result_of(run: Run, choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the fields of the run's result: metrics by column, and what the clients chose."""
    from ..tasks.data import derived, mean_figures

    task, columns = run.federation.task, dict[str, dict[str, float]]()
    for column in COLUMNS:
        figures = ((each.rows, each.columns[column]) for each in choices if each.columns)
        columns[column] = derived(task, mean_figures(figures))
    finite = {
        column: {name: value if math.isfinite(value) else None for name, value in means.items()}
        for column, means in columns.items()
    }
    part = {
        "clients": dict(Counter(each.name for each in choices)),
        "rows": sum(each.rows for each in choices),
        "columns": finite,
        "worst": _worst(choices, next((n for n in columns[SHARED] if n != LOSS), LOSS)),
    }
    metrics = {f"{column}/{name}": value for column in COLUMNS for name, value in columns[column].items()}
    return {"personal": part, "metrics": metrics}


def _worst(choices: Sequence[Choice], metric: str) -> dict[str, Any] | None:
    """Return the client whose personal model loses most against the better of the other two; None without a figure."""
    sign = -1.0 if metric == LOSS else 1.0
    differences: list[tuple[float, int]] = []
    for client, choice in enumerate(choices):
        figures = [choice.columns[column].get(metric) for column in COLUMNS if choice.columns]
        if figures and None not in figures:
            shared, personal, local = (sign * (each or 0.0) for each in figures)
            differences.append((personal - max(shared, local), client))
    if not differences:
        return None
    difference, client = min(differences)
    return {"client": client, "metric": metric, "difference": difference, "rows": choices[client].rows}


def _check(federation: Federation) -> None:
    """Refuse real clients on this machine, and training that the model or the task does not allow."""
    from .training import check_own, own_training_of

    personal = personal_of(federation.settings)
    if federation.population.reads_data and not federation.simulated:
        raise Refusal("personal", personal.option, REAL)
    check_own(federation.task, federation.task.model(), own_training_of(federation.settings, federation.task))


def _lines(federation: Federation, plan: Plan, budget: Budget) -> Iterator[str]:
    """Yield a line on what personal models cost."""
    del budget
    if charges_queries(federation, plan):  # once where two units are promised
        yield COSTS


PERSONAL_MODELS = Query(
    held_out=lambda settings: personal_of(settings).share,
    lines=_lines,
    check=_check,
    released=own_models,
)
