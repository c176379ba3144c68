"""Protection of whole clients for somebody else's Flower app, in one call."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from flwr.serverapp import Grid

from ..privacy.budget import Adversary, Budget
from ..privacy.ledger.ledger import Ledger
from ..privacy.plan import Plan
from ..strategies.cohorts import Cohort
from .participants import Participants
from .private_grid import PrivateGrid
from .round_terms import SumPrivacy

ADVERSARIES = (Adversary.CLIENTS, Adversary.MODEL)  # the server is trusted: it sees single updates


@contextmanager
def protect(
    grid: Grid,
    *,
    population: int,
    cohort: Cohort,
    budget: Budget,
    clipping_norm: float,
    num_rounds: int,
    ledger: Path | str,
) -> Generator[PrivateGrid]:
    """Wrap a Flower grid so that what a strategy does on it stays within the budget; use it in a `with` block.

    The noise is the least that lets `num_rounds` more rounds fit what the ledger has left. The clients' apps need
    the mod `fedveil.client.private_update.private_update`. Noise and draws come from the operating system.

    Args:
      grid: reaches the clients.
      population: how many clients there are, a public number.
      cohort: draws the clients of each round; the strategy's own sampling has no effect.
      budget: at the client level, for everything this ledger ever holds.
      clipping_norm: L2 norm of the largest update, all parameters together.
      num_rounds: rounds to plan for; a round beyond them is refused once the budget is spent.
      ledger: the file that records what left; a later run with the same file goes on with the same budget.

    Returns:
      A context manager of the protected grid.

    Raises:
      Refusal: naming the argument; also if the budget is spent before the first round.
      LedgerUnavailable: another process has the ledger open, or it cannot be written.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> import fedveil as fv
      >>> from fedveil.simulations.in_process import InProcessGrid
      >>> from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
      >>> from flwr.clientapp import ClientApp
      >>> from flwr.serverapp.strategy import FedAvg
      >>> app = ClientApp()
      >>> @app.train(mods=[fv.private_update])
      ... def train(message, context):
      ...     weights = message.content["arrays"]["w"].numpy() + 0.1
      ...     metrics = MetricRecord({"num-examples": 1})
      ...     arrays = ArrayRecord({"w": Array(weights)})
      ...     return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
      >>> grid = InProcessGrid(app, num_clients=20, run_config={})
      >>> private = fv.protect(
      ...     grid,
      ...     population=20,
      ...     cohort=fv.Poisson(0.5),
      ...     budget=fv.Budget("client", target_epsilon=8.0, target_delta=1e-2),
      ...     clipping_norm=1.0,
      ...     num_rounds=3,
      ...     ledger=tempfile.mkdtemp() + "/population.ledger",
      ... )
      >>> start = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
      >>> with private as protected:
      ...     result = FedAvg().start(grid=protected, initial_arrays=start, num_rounds=3)
      >>> result.arrays["w"].numpy().shape
      (2,)
    """
    owner = f"population of {population} clients"
    with Ledger.open(ledger, budget, owner=owner, simulated=False) as opened:
        plan = Plan(budget.unit, budget.adjacency, cohort, clipping_norm, num_rounds, adversaries=ADVERSARIES)
        plan = plan.calibrate(budget, tuple(opened.events(Adversary.MODEL)))
        yield PrivateGrid(Participants(grid, cohort, population), privacy=SumPrivacy(plan, opened))
