"""Query of a run with layers that stay: its clients hold rows out, on which their whole models are measured.

In a declared simulation each client's whole model lies in RUN/personal/ at the end, as other personal models do, and the
columns of figures join the result; that of the shared model is empty, since it lacks the layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from ..base.refusal import Refusal, refusing
from ..modes.federation import Federation
from ..privacy.budget import Budget
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.plan import Plan
from ..run.prepared_run import Run
from ..run.queries import Query
from ..server.checkpoint import Arrays
from .choice import Choice
from .settings import After, layers_of
from .simulation import COSTS, FOLDER, REAL, hash_of_released, own_path, result_of
from .state import OwnModel, read_own, write_own

NO_FIGURES = (
    "The released model lacks {}, which stay at their clients: it is neither evaluated nor used alone."
)


def whole_models(run: Run, released: Arrays) -> dict[str, Any]:
    """Store each client's whole model and measure it, for `Query.released`; return the part of the result.

    Args:
      run: of a declared simulation.
      released: arrays of the released model, by name.
    """
    if not run.federation.population.reads_data:  # devices have theirs
        return {}
    with refusing(run.federation.population.words.folder, run.folder / FOLDER, "cannot be written"):
        (run.folder / FOLDER).mkdir(mode=0o700, exist_ok=True)
        return result_of(run, list(_choices(run, released)))


def _choices(run: Run, released: Arrays) -> Iterator[Choice]:
    """Yield each client's figures, whose whole model is on disk then; only what is missing is measured."""
    from ..run.held_out_metrics import device_here  # torch, which a plan does without
    from ..tasks.data import data_of
    from ..tasks.hardware import precision
    from ..tasks.held_back import held_back_of
    from .own_layers import layers_folder, whole_model, without_own_layers
    from .own_model import Evaluation, Rows, whole_model_figures
    from .training import own_training_of

    federation, device = run.federation, device_here(run.federation)
    engine = federation.settings.engine
    marked, task = federation.task.model(), without_own_layers(federation.task)
    own = own_training_of(federation.settings.model_copy(update={"personal": After()}), task)
    evaluation = Evaluation(partial(precision, device, engine.dtype), engine.examples_at_once)
    layers = list(layers_of(federation.settings).layers)
    keys: dict[str, Any] = json.loads(json.dumps({"seed": federation.seed, **asdict(own), "layers": layers}))
    digest, model = hash_of_released(released), task.model().to(device)
    for client in range(task.num_clients):
        path = own_path(run.folder, client)
        before = read_own(path)
        if before is None or (before.run, before.shared, before.keys) != (run.name, digest, keys):
            whole = whole_model(marked, released, layers_folder(run.folder / FOLDER, client))
            held_out = held_back_of(task, client)
            assert held_out is not None  # by `Query.held_out`
            key = int(Randomness(federation.seed).stream(FOLDER, client).uint64(1)[0])
            rows = Rows(data_of(task, client), held_out)
            choice = whole_model_figures(task, model, rows, whole, own, key, evaluation)
            before = OwnModel(run.name, digest, choice, keys, whole)
            write_own(path, before)
        yield before.choice


def _check(federation: Federation) -> None:
    """Refuse real clients on this machine, whose layers would not lie with them, and batches that cannot be normalised."""
    from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

    from ..tasks.data import data_of

    task, size = federation.task, federation.settings.training.batch_size
    if not federation.population.reads_data:
        return
    if not federation.simulated:
        raise Refusal("personal", layers_of(federation.settings).option, REAL)
    layers = task.model().train().modules()
    if any(isinstance(each, _BatchNorm) and each.training for each in layers):
        for client in range(task.num_clients):
            if len(data_of(task, client)) % size == 1:
                remedy = f"leaves client {client} a batch of one record, which batch normalisation cannot train; take another"
                raise Refusal("batch_size", size, remedy)


def _lines(federation: Federation, plan: Plan, budget: Budget) -> Iterator[str]:
    """Yield lines on what stays, and on what personal models cost."""
    del plan, budget
    yield NO_FIGURES.format(", ".join(layers_of(federation.settings).layers))
    yield COSTS


LAYERS = Query(
    held_out=lambda settings: layers_of(settings).share,
    lines=_lines,
    check=_check,
    released=whole_models,
)
