"""Engine that a simulation's clients run on: in this process and its workers, or in Ray's actors."""

from __future__ import annotations

from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import Context
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid

from ..client.app import SETTINGS_KEY, Workbench, make_client_app
from ..configs.schema import FaultSettings, Ray
from ..privacy.mechanisms.randomness import Randomness
from ..server.run.federation import Federation, Run
from ..strategies.client_settings import ClientSettings
from ..strategies.cohorts import invited_size
from ..tasks.hardware import units
from ..tasks.protocol import Task
from .deadline import within
from .faults import inject
from .in_process import InProcessGrid


@dataclass(frozen=True)
class Clients:
    """Recipe of a simulation's clients, from which each process of an engine makes its own.

    Attributes:
      told: to the clients.
      count: of them; canary clients among them.
      invited: how many a round is expected to ask.
      deadline: seconds that one may take.
      faults: that befall them.
      randomness: of the run.
      at_once: whether a process may train many of them without a message to each; nothing may ask for single replies.
    """

    told: ClientSettings
    count: int
    invited: int
    deadline: float
    faults: FaultSettings
    randomness: Randomness
    at_once: bool

    def grid(self, task: Task | None = None, workers: int | None = 1) -> InProcessGrid:
        """Return the grid whose nodes are these clients, each called in this process or in its workers.

        Args:
          task: where this process has it already; None loads it as the clients are told.
          workers: processes; None takes as many as pay.
        """
        from ..client.training.cohort_training import can_vectorise, sum_cohort
        from ..client.training.in_place import begin

        told, text, bench = self.told, self.told.to_json(), Workbench(self.told, task)
        undisturbed = self.at_once and not self.faults.any
        plain = undisturbed and not (told.record or told.step or told.loss_traces)
        # On the processor, whatever the device: a process that has touched a GPU cannot be forked for its workers.
        probed = bench if told.accelerator == "cpu" else Workbench(replace(told, accelerator="cpu"), task)
        cohort_function = None
        if plain and can_vectorise(probed):
            cohort_function = partial(sum_cohort, bench)
        elif told.step is not None and undisturbed:
            from ..client.dp_sgd.union import sum_of_union, union_of

            cohort_function = partial(sum_of_union, bench, union_of(bench))
        return InProcessGrid(
            client_app=make_client_app(partial(_settings_text, text), self._mods(), bench),
            num_clients=self.count,
            run_config={SETTINGS_KEY: text},
            workers=workers or self.workers(stacked=cohort_function is not None),
            deadline=self.deadline,
            cohort_function=cohort_function,
            in_place=partial(begin, bench) if plain else None,
        )

    def workers(self, stacked: bool) -> int:
        """Return how many processes train a cohort: one for each core or GPU, and one in all where clients are stacked.

        Args:
          stacked: small steps, of which one process's are mostly Python's.
        """
        return 1 if stacked else max(1, min(units(self.told.accelerator), self.invited))

    def _mods(self) -> tuple[Mod, ...]:
        return (inject(self.faults, self.randomness, self.deadline),) if self.faults.any else ()


def on_engine(run: Run, grid: Grid | None = None) -> AbstractContextManager[Grid]:
    """Open what reaches the clients: the grid that is given, or the engine that the settings name.

    Args:
      run: about to begin its rounds.
      grid: to be used instead of an engine; it is not closed.
    """
    if grid is not None:
        return nullcontext(grid)
    federation = run.federation
    clients = clients_of(federation, run.client, federation.num_nodes, federation.masking is None)
    return _opened(federation, clients, federation.settings.engine.workers)


def asking_engine(federation: Federation, told: ClientSettings) -> AbstractContextManager[Grid]:
    """Open the engine that the settings name for a question: every client is called by itself, and none trains.

    Args:
      federation: whose clients this machine has.
      told: to the clients.
    """
    clients = clients_of(federation, told, federation.num_clients, at_once=False)
    return _opened(federation, clients, federation.settings.engine.workers or 1)


def clients_of(federation: Federation, told: ClientSettings, count: int, at_once: bool) -> Clients:
    """Return the recipe of a federation's clients.

    Args:
      federation: whose settings say what befalls them.
      told: to the clients.
      count: of them.
      at_once: as in `Clients`.
    """
    s, invited = federation.settings, invited_size(federation.cohort, federation.num_clients)
    return Clients(told, count, round(invited), s.engine.deadline, s.faults, federation.randomness, at_once)


def _opened(federation: Federation, clients: Clients, workers: int | None) -> AbstractContextManager[Grid]:
    engine = federation.settings.engine
    if isinstance(engine, Ray):
        from .ray import ray_grid

        return ray_grid(clients, engine)
    return closing(clients.grid(federation.task, workers))


def _settings_text(text: str, context: Context) -> str:
    del context
    return text


def client_mods(federation: Federation) -> tuple[Mod, ...]:
    """Return what surrounds a client where Flower's runtime calls it: its deadline, and the faults to inject."""
    s = federation.settings
    faults = (inject(s.faults, federation.randomness, s.engine.deadline),) if s.faults.any else ()
    return (within(s.engine.deadline), *faults)
