"""Engine of a simulation's clients: this process and its workers, or Ray's actors."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext

from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid

from ..base.extensions import extension
from ..base.refusal import Refusal
from ..configs.schema import Ray
from ..messages.client_settings import ClientSettings
from ..messages.traffic import Tally
from ..modes.federation import Federation
from ..run.prepared_run import Run
from ..strategies.cohorts import invited_size
from .clients import Clients
from .counted_grid import counted
from .deadline import within
from .faults import inject


@contextmanager
def counted_engine(run: Run, tally: Tally, grid: Grid | None = None) -> Generator[Grid]:
    """Open the grid to the clients, as `on_engine` does, and count the bytes of a link.

    Args:
      run: about to begin its rounds.
      tally: takes the bytes.
      grid: to be used instead of an engine; it is not closed.
    """
    with on_engine(run, grid) as opened:
        yield counted(opened, tally, run.federation.sends_differences)


def on_engine(run: Run, grid: Grid | None = None) -> AbstractContextManager[Grid]:
    """Open the grid to the clients: the given one, or the engine of the settings.

    Arguments as of `counted_engine`.
    """
    if grid is not None:
        return nullcontext(grid)
    federation = run.federation
    clients = clients_of(federation, run.client, federation.num_nodes, federation.masking is None)
    return _opened(federation, clients, federation.settings.engine.workers)


@contextmanager
def asking_engine(federation: Federation, settings: ClientSettings) -> Generator[tuple[Grid, Tally]]:
    """Open the engine of the settings and the tally of a link's bytes, for a question without training."""
    clients = clients_of(federation, settings, federation.num_clients, at_once=False)
    with _opened(federation, clients, federation.settings.engine.workers or 1) as opened:
        yield counted(opened, tally := Tally()), tally


def require_one_machine(federation: Federation) -> None:
    """Refuse real records on a cluster: a client's ledger is on the machine where it trains, which changes.

    Raises:
      Refusal: each machine would keep a budget of its own for the same records.
    """
    engine = federation.settings.engine
    if isinstance(engine, Ray) and engine.address and federation.mode.own_budget and not federation.simulated:
        remedy = (
            "each machine would keep ledgers of its own for the same records; train real ones on one machine"
        )
        raise Refusal("engine.address", engine.address, remedy)


def clients_of(federation: Federation, settings: ClientSettings, count: int, at_once: bool) -> Clients:
    """Return the recipe of a federation's clients.

    Args:
      federation: whose settings say what befalls them.
      settings: to the clients.
      count: of them.
      at_once: as in `Clients`.
    """
    s, invited = federation.settings, round(invited_size(federation.cohort, federation.num_clients))
    return Clients(settings, count, invited, s.engine.deadline, s.faults, federation.randomness, at_once)


def _opened(federation: Federation, clients: Clients, workers: int | None) -> AbstractContextManager[Grid]:
    engine = federation.settings.engine
    if isinstance(engine, Ray):
        return extension("engine", "ray", "engine", "ray")(clients, engine)
    return closing(clients.grid(federation.task, workers))


def client_mods(federation: Federation) -> tuple[Mod, ...]:
    """Return the mods of a client in Flower's runtime: its deadline, and the faults to inject."""
    s = federation.settings
    faults = (inject(s.faults, federation.randomness, s.engine.deadline),) if s.faults.any else ()
    return (within(s.engine.deadline), *faults)
