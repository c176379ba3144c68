"""Clients of a simulation, as a recipe from which each process of an engine makes its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from flwr.clientapp.typing import Mod

from ..base.extensions import extension
from ..client.app import SETTINGS_KEY, import_parts, make_client_app
from ..client.workbench import Workbench
from ..configs.schema import FaultSettings
from ..messages.client_settings import ClientSettings
from ..privacy.mechanisms.randomness import Randomness
from ..tasks.hardware import cores, gpus
from ..tasks.protocol import Task
from .in_process import CohortFunction, InProcessGrid, Stacks
from .warmup import Warmup, can_fork

if TYPE_CHECKING:
    from ..client.secure_update import NodeMemory

PARAMETERS_PER_WORKER = 400_000  # of all its clients' models; a process for fewer costs more than it saves
FEWEST_STACKED = 48  # clients of a stack, below which Python dominates a step


def fault_mods(faults: FaultSettings, randomness: Randomness, deadline: float) -> tuple[Mod, ...]:
    """Return the mods that inject faults; none without faults. A straggler exceeds the `deadline`, in seconds."""
    if not faults.any:
        return ()
    from .faults import inject

    return (inject(faults, randomness, deadline),)


@dataclass(frozen=True)
class Clients:
    """Recipe of a federation's simulated clients.

    Attributes:
      settings: of each client.
      count: number of clients, canary clients included.
      invited: expected number of clients in a round.
      deadline: seconds that one client may take for one message.
      faults: probabilities of the faults to inject.
      randomness: source of the faults' draws.
      at_once: whether a process may train many of them without a message to each, since nothing reads single replies.
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
          task: the clients' task, if this process has loaded it; None loads it by their settings.
          workers: processes; None takes one for each GPU, or as many as pay.
        """
        from ..client.training.in_place import begin

        import_parts(self.settings)  # before workers are forked, too
        client, text, bench = self.settings, self.settings.to_json(), Workbench(self.settings, task)
        # On the processor, whatever the device: a process that has touched a GPU cannot be forked for its workers.
        probe = bench if client.accelerator == "cpu" else Workbench(replace(client, accelerator="cpu"), task)
        stacks, cohort_function = None, self._cohort_function(bench, probe)
        if cohort_function is not None:
            parameters = sum(each.numel() for each in probe.model.parameters())
            fewest = math.ceil(PARAMETERS_PER_WORKER / max(1, parameters))
            stacks = Stacks(fewest, self.count)  # of records in one step, however many
            if self._trains_plainly:
                from ..client.training.cohort_training import MAX_IMAGES, MAX_STACK, image_layers

                stacks = Stacks(max(FEWEST_STACKED, fewest), MAX_STACK)
                if client.accelerator == "cpu" and image_layers(probe):
                    stacks = Stacks(MAX_IMAGES // 2, MAX_IMAGES)
        mods, training = fault_mods(self.faults, self.randomness, self.deadline), None
        if client.encryption:
            from .encrypted_stacks import StackedReply

            stacked_reply = StackedReply()
            mods, training = (stacked_reply.take, *mods), stacked_reply.train_round
        return InProcessGrid(
            client_app=make_client_app(lambda _: text, mods, bench, self._memory, training),
            num_clients=self.count,
            run_config={SETTINGS_KEY: text},
            workers=workers or max(1, min(gpus(client.accelerator), self._shares(stacks))),
            warmup=Warmup(workers or self.most_workers(stacks)),
            deadline=self.deadline,
            cohort_function=cohort_function,
            stacks=stacks,
            forks_first=client.accelerator != "cpu",
            in_place=partial(begin, bench) if self._trains_plainly else None,
            release=bench.close,
            counter=None
            if self.faults.any or client.encryption
            else lambda content: extension("query", "counts", "question", "")(bench.task, content),
        )

    @property
    def _memory(self) -> NodeMemory | None:
        """Memory of the nodes that a process simulates; None where nothing is encrypted."""
        if not self.settings.encryption:
            return None
        from ..client.secure_update import SharedMemory

        return SharedMemory()

    @property
    def trains_by_sgd(self) -> bool:
        """Whether clients train by SGD alone, and none of them fails on purpose."""
        client = self.settings
        return not (self.faults.any or client.record or client.step or client.loss_traces)

    @property
    def _trains_plainly(self) -> bool:
        """Whether clients train by SGD alone, and a process may train many of them without messages."""
        return self.at_once and self.trains_by_sgd

    def _cohort_function(self, bench: Workbench, probe: Workbench) -> CohortFunction | None:
        """Return the function that trains many clients at once on the bench; None if the model or the training forbid it.

        The model is examined on the probe, the same bench on the processor, since no GPU may be used before a fork.
        """
        from ..client.training.cohort_training import can_vectorise, sum_cohort

        if self._trains_plainly and can_vectorise(probe, self.settings.accelerator):
            return partial(sum_cohort, bench)
        if self.settings.record and self.at_once and not self.faults.any:
            from ..client.dp_sgd import stacked

            if stacked.can_stack(probe):
                return partial(stacked.sum_cohort, bench)
        if self.settings.step is not None and self.at_once and not self.faults.any:
            from ..client.dp_sgd.rounds import sum_of_union, union_of

            return partial(sum_of_union, bench, union_of(bench))
        return None

    def most_workers(self, stacks: Stacks | None) -> int:
        """Return how many processes a simulation may fork on cores, once it has trained in one; 1 if it must not."""
        if not can_fork():
            return 1
        return max(1, min(cores(), self._shares(stacks)))

    def _shares(self, stacks: Stacks | None) -> int:
        """Return how many processes can have a share of a cohort: a stack each, or a client."""
        if not stacks:
            return self.invited
        return math.ceil(self.invited / stacks.size(self.invited))
