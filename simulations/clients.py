"""Clients of a simulation, as a recipe from which each process of an engine makes its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from flwr.clientapp.typing import Mod

from ..base.extensions import extension
from ..client.app import SETTINGS_KEY, import_parts, make_client_app
from ..client.workbench import Workbench
from ..configs.schema import FaultSettings
from ..messages.client_settings import ClientSettings
from ..privacy.mechanisms.randomness import Randomness
from ..tasks.hardware import units
from ..tasks.protocol import Task
from .in_process import InProcessGrid

PAYS = 400_000  # parameters of all clients that are trained at once, below which another process costs more than it takes


def fault_mods(faults: FaultSettings, randomness: Randomness, deadline: float) -> tuple[Mod, ...]:
    """Return the mods that inject faults, none without faults; arguments as of `inject`."""
    if not faults.any:
        return ()
    from .faults import inject

    return (inject(faults, randomness, deadline),)


@dataclass(frozen=True)
class Clients:
    """Recipe of a federation's simulated clients.

    Attributes:
      settings: to the clients.
      count: of them; canary clients among them.
      invited: how many a round is expected to ask.
      deadline: seconds that one may take.
      faults: that befall them.
      randomness: of the run.
      at_once: whether a process may train many of them without a message to each; nothing may ask for single replies.
    """

    settings: ClientSettings
    count: int
    invited: int
    deadline: float
    faults: FaultSettings
    randomness: Randomness
    at_once: bool

    def grid(self, task: Task | None = None, workers: int | None = 1) -> InProcessGrid:
        """Return the grid whose nodes are these clients, each called in this process or in its workers.

        Args:
          task: where this process has it already; None loads it by the clients' settings.
          workers: processes; None takes as many as pay.
        """
        from ..client.training.cohort_training import can_vectorise, sum_cohort
        from ..client.training.in_place import begin

        import_parts(self.settings)  # before workers are forked, too
        client, text, bench = self.settings, self.settings.to_json(), Workbench(self.settings, task)
        undisturbed = self.at_once and not self.faults.any
        plain = undisturbed and not (client.record or client.step or client.loss_traces)
        # On the processor, whatever the device: a process that has touched a GPU cannot be forked for its workers.
        probed = bench if client.accelerator == "cpu" else Workbench(replace(client, accelerator="cpu"), task)
        cohort_function = None
        if plain and can_vectorise(probed):
            cohort_function = partial(sum_cohort, bench)
        elif client.step is not None and undisturbed:
            from ..client.dp_sgd.rounds import sum_of_union, union_of

            cohort_function = partial(sum_of_union, bench, union_of(bench))
        mods = fault_mods(self.faults, self.randomness, self.deadline)
        together = 0
        if cohort_function is not None:
            together = math.ceil(PAYS / max(1, sum(p.numel() for p in probed.model.parameters())))
        return InProcessGrid(
            client_app=make_client_app(lambda _: text, mods, bench),
            num_clients=self.count,
            run_config={SETTINGS_KEY: text},
            workers=workers or self.workers(together),
            deadline=self.deadline,
            cohort_function=cohort_function,
            together=together,
            in_place=partial(begin, bench) if plain else None,
            counter=None
            if self.faults.any or client.encryption
            else lambda content: extension("query", "counts", "question", "")(bench.task, content),
        )

    def workers(self, together: int) -> int:
        """Return the number of processes that train a cohort: one per core or GPU, if each has enough work."""
        return max(1, min(units(self.settings.accelerator), self.invited // max(1, together)))
