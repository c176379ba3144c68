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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.refusal import Refusal, refusing
from ..base.tensor_file import safetensors_parts
from ..modes.federation import Federation
from ..privacy.budget import Budget
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.plan import Plan
from ..run.files import PERSONAL
from ..run.prepared_run import Run
from ..run.queries import Query, charges_queries
from .choice import COLUMNS, LOSS, SHARED, Arrays, Choice
from .settings import personal_of
from .state import OwnModel, read_own, write_own

if TYPE_CHECKING:
    from .own_model import Evaluation, Rows

STREAM = "personal"  # of a client's draws
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
    return folder / PERSONAL / f"client-{client:03d}.safetensors"


def own_models(run: Run, released: Arrays) -> dict[str, Any]:
    """Train, choose and store each client's own model, for `Query.released`; return the part of the result.

    Args:
      run: of a declared simulation.
      released: arrays of the released model, by name.
    """
    if not run.federation.population.reads_data:  # devices have theirs
        return {}
    from ..run.held_out_metrics import device_here  # torch, which a plan does without
    from .own_model import own_model
    from .training import own_training_of

    federation, task = run.federation, run.federation.task
    own = own_training_of(federation.settings, task)
    model, evaluation = task.model().to(device_here(federation)), evaluation_of(federation)

    def make(client: int, rows: Rows, key: int) -> tuple[Arrays, Choice]:
        """Return a client's own model and its choice; arguments as of `fields_of`."""
        return own_model(task, model, rows, released, own, key, evaluation)

    return fields_of(run, released, asdict(own), make)


def evaluation_of(federation: Federation) -> Evaluation:
    """Return how own models are evaluated in this process."""
    from ..run.held_out_metrics import device_here
    from ..tasks.hardware import precision
    from .own_model import Evaluation

    engine = federation.settings.engine
    return Evaluation(partial(precision, device_here(federation), engine.dtype), engine.examples_at_once)


def fields_of(
    run: Run,
    released: Arrays,
    keys: Mapping[str, Any],
    make: Callable[[int, Rows, int], tuple[Arrays, Choice]],
) -> dict[str, Any]:
    """Store each client's own model, of which only the missing ones are made, and return the fields of the run's result.

    Args:
      run: of a declared simulation.
      released: arrays of the released model, by name.
      keys: all on which an own model depends beside the released model, the rows and the seed.
      make: returns a client's own model and its choice, from the client's number, its rows and a key of its draws.

    Raises:
      Refusal: the folder cannot be written.
    """
    from ..tasks.data import data_of
    from ..tasks.held_back import held_back_of
    from .own_model import Rows

    federation, digest, choices = run.federation, hash_of_released(released), list[Choice]()
    plain: dict[str, Any] = json.loads(json.dumps({"seed": federation.seed, **keys}))
    folder = run.folder / PERSONAL
    with refusing(federation.population.words.folder, folder, "cannot be written"):
        folder.mkdir(mode=0o700, exist_ok=True)
        for client in range(federation.task.num_clients):
            own = read_own(path := own_path(run.folder, client))
            if own is None or (own.run, own.shared, own.keys) != (run.name, digest, plain):
                held_out = held_back_of(federation.task, client)
                assert held_out is not None  # by `Query.held_out`
                key = int(Randomness(federation.seed).stream(STREAM, client).uint64(1)[0])
                arrays, choice = make(client, Rows(data_of(federation.task, client), held_out), key)
                own = OwnModel(run.name, digest, choice, plain, arrays)
                write_own(path, own)
            choices.append(own.choice)
    return result_of(run, choices)


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
