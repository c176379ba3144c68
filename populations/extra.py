"""Extra participants of a run, which its observer adds: clients beside the real ones, and records among each one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..base.extensions import part
from ..configs.schema import SimulationSettings
from ..tasks.protocol import Task


class ExtraParticipants(Protocol):
    """Extra participants that settings ask for; `plants_examples` says whether odd examples are planted at clients."""

    def extra_clients(self, settings: SimulationSettings, task: Task, /) -> int: ...
    def extra_records(
        self, settings: SimulationSettings, clients: int, fewest: Callable[[], int], /
    ) -> int: ...
    def plants_examples(self, settings: SimulationSettings, /) -> bool: ...


class Nobody:
    """No extra participants."""

    def extra_clients(self, *_: object) -> int:
        """Return 0."""
        return 0

    extra_records = extra_clients

    def plants_examples(self, *_: object) -> bool:
        """Return False."""
        return False


def extra_of(settings: SimulationSettings) -> ExtraParticipants:
    """Return the extra participants that the observer of these settings adds.

    Raises:
      Refusal: the observer is not installed.
    """
    audit = settings.audit
    return Nobody() if audit is None else part("audit", "ExtraParticipants", audit.name)
