"""Question to the clients on this machine: simulated ones, or owners' real data."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from ..base.refusal import Refusal
from ..messages.client_settings import ClientSettings
from ..messages.flower_adapter import quiet_flower
from ..messages.traffic import Tally
from ..modes.federation import Federation
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.statistics.inquiry import Inquiry
from ..run.client_instructions import question_settings
from ..run.opening import claim_records
from ..run.queries import Reach
from ..run.record_ledgers import client_ledgers_of
from ..run.released import released_file
from ..simulations.engines import asking_engine, require_one_machine
from ..simulations.simulate import restoring_state
from ..tasks import Task
from ..tasks.columns import columns_of
from ..tasks.model_columns import columns_with, read_released
from .ask import ask, record_path
from .question_plan import Spend, require_budget


def ask_here(
    federation: Federation, inquiry: Inquiry, spend: Spend, folder: Path, run: Path | None = None
) -> dict[str, Any]:
    """Ask clients on this machine, and return the record of the answer.

    Arguments as of `ask`; `run` is the folder of the run whose model the question is about, or None.

    Raises:
      Refusal: the question cannot be asked so; nothing was charged.
      BudgetExhausted: it does not fit; nothing was charged.
    """
    released = released_file(run, inquiry.model, federation.task)
    require_one_machine(federation)
    if federation.extra_clients:
        raise Refusal("audit", "full", "a question has no canaries; leave it out")
    if not record_path(folder, inquiry).exists():
        require_budget(federation, inquiry)
        require_columns(federation.task, inquiry, released)
    quiet_flower()
    # The question has its own seed for draws and noise; the task and the rows of each client are those of the run.
    seed = None if federation.seed is None else seed_of(federation.seed, inquiry.name)
    open_grid = partial(_grid, federation, replace(question_settings(federation, folder), seed=seed))
    reach = Reach(randomness=Randomness(seed), released=released)
    with restoring_state():
        return ask(federation, inquiry, spend, folder, open_grid, reach)


def require_columns(task: Task, inquiry: Inquiry, released: bytes | None) -> None:
    """Refuse a question about a column that the first client lacks, by counting none of its rows."""
    with suppress(OSError):  # a client that cannot be read is missing in the sum, and refuses nothing
        if released is None:
            columns = columns_of(task, 0)
        else:
            model = task.model()
            read_released(model, released)
            columns = columns_with(task, 0, model.eval(), inquiry.attributed)
        for each in inquiry.questions:
            each.statistic.count({name: values[:0] for name, values in columns.items()})


@contextmanager
def _grid(federation: Federation, settings: ClientSettings) -> Generator[tuple[Grid, Tally]]:
    """Settle the clients' ledgers, claim real records for this mode, and open the engine of this machine's clients."""
    client_ledgers_of(federation, settings).settle()
    claim_records(federation)
    with asking_engine(federation, settings) as opened:
        yield opened


def seed_of(seed: int, name: str) -> int:
    """Return the seed of an inquiry's draws, independent of those of other names and of the simulation's own."""
    return int.from_bytes(hashlib.sha256(f"fedveil question {seed} {name}".encode()).digest()[:4], "big")
