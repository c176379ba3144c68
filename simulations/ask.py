"""Question to the clients that this machine has: simulated ones, or owners' real data that lie here."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from ..privacy.mechanisms.randomness import Randomness
from ..privacy.refusal import Refusal
from ..privacy.statistics.inquiry import Inquiry
from ..server.run.ask import Reach, Spend, ask
from ..server.run.client_instructions import question_settings
from ..server.run.federation import Federation
from ..server.run.prepare import claim_records, settle_records
from ..strategies.client_settings import ClientSettings
from ..strategies.flower_adapter import quiet_flower
from .engines import asking_engine
from .simulate import state_kept


def ask_here(federation: Federation, inquiry: Inquiry, spend: Spend, folder: Path) -> dict[str, Any]:
    """Ask clients on this machine, and return the record of the answer.

    Args:
      federation: whose clients this machine has.
      inquiry: what is asked.
      spend: what it may cost.
      folder: of records; in a simulation its ledger lies there too.

    Raises:
      Refusal: nothing was charged.
      BudgetExhausted: it does not fit; nothing was charged.
    """
    if federation.num_canaries:
        raise Refusal("audit", "full", "a question has no canaries; leave it out")
    quiet_flower()
    # Of the draws and the noise alone: the task, and who has which rows, are those of the run.
    seed = None if federation.seed is None else seed_of(federation.seed, inquiry.name)
    told = replace(question_settings(federation, folder), seed=seed)
    reach = Reach(partial(_engine, federation, told), randomness=Randomness(seed))
    with state_kept():
        return ask(federation, inquiry, spend, folder, reach)


@contextmanager
def _engine(federation: Federation, told: ClientSettings) -> Generator[Grid]:
    settle_records(federation, told)
    claim_records(federation)
    with asking_engine(federation, told) as grid:
        yield grid


def seed_of(seed: int, name: str) -> int:
    """Return the seed of a question's draws: those of two names, or of a run beside it, have nothing in common.

    Args:
      seed: of the simulation.
      name: of the inquiry.
    """
    return int.from_bytes(hashlib.sha256(f"fedveil question {seed} {name}".encode()).digest()[:4], "big")
