"""Parts of a federation, of which its mode of privacy is a view: settings, task, cohort and population."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..configs.schema import SimulationSettings
from ..configs.task_settings import CustomTask
from ..populations.population import Population
from ..privacy.mechanisms.randomness import Randomness
from ..strategies.cohorts import Cohort
from ..tasks.protocol import Task


@dataclass(frozen=True)
class Parts:
    """The parts of a federation.

    Attributes:
      settings: of the user.
      task: loaded.
      cohort: draws the clients.
      seed: of a declared simulation; None on real data.
      population: its clients.
    """

    settings: SimulationSettings
    task: Task
    cohort: Cohort
    seed: int | None
    population: Population

    @property
    def simulated(self) -> bool:
        """Whether the data are public or synthetic."""
        return self.population.simulated

    @property
    def task_name(self) -> str:
        """Display name of the task: a shipped one's name, the user's label, its attribute `name`, or its class."""
        task = self.settings.task
        if not isinstance(task, CustomTask):
            return task.option
        name = getattr(self.task, "name", None)
        return task.label or (name if isinstance(name, str) and name else task.target.partition(":")[2])

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return self.population.num_clients

    @property
    def declared_clients(self) -> int:
        """Declared number of clients: the denominator of the mean, and the only number that is printed."""
        return self.settings.population or self.num_clients

    @cached_property
    def randomness(self) -> Randomness:
        """Source of draws and noise."""
        return Randomness(self.seed)
