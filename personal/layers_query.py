"""Query of a run with layers that stay: its clients hold rows out, on which their whole models are measured.

In a declared simulation each client's whole model lies in RUN/personal/ at the end, as other personal models do, and the
columns of figures join the result; that of the shared model is empty, since it lacks the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..base.refusal import Refusal
from ..modes.federation import Federation
from ..privacy.budget import Budget
from ..privacy.plan import Plan
from ..run.files import PERSONAL
from ..run.prepared_run import Run
from ..run.queries import Query
from .choice import Arrays, Choice
from .settings import After, layers_of
from .simulation import COSTS, REAL, evaluation_of, fields_of

if TYPE_CHECKING:
    from .own_model import Rows

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
    from ..run.held_out_metrics import device_here  # torch, which a plan does without
    from .own_layers import layers_folder, whole_model, without_own_layers
    from .own_model import whole_model_figures
    from .training import own_training_of

    federation = run.federation
    marked, task = federation.task.model(), without_own_layers(federation.task)
    own = own_training_of(federation.settings.model_copy(update={"personal": After()}), task)
    model, evaluation = task.model().to(device_here(federation)), evaluation_of(federation)

    def make(client: int, rows: Rows, key: int) -> tuple[Arrays, Choice]:
        """Return a client's whole model and its figures; arguments as of `fields_of`."""
        whole = whole_model(marked, released, layers_folder(run.folder / PERSONAL, client))
        return whole, whole_model_figures(task, model, rows, whole, own, key, evaluation)

    keys = {**asdict(own), "layers": layers_of(federation.settings).layers}
    return fields_of(run, released, keys, make)


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
