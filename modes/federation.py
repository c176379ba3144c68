"""Federation: its task, cohort and population, its mode of privacy, and the masks on its sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

from ..configs.schema import SimulationSettings
from ..configs.training_settings import NoCompression
from ..populations.population import extra_of
from ..privacy.mechanisms.compression import CompressionPlan
from ..strategies.cohorts import invited_size
from .mode import COUNT_BOUND_BATCHES, Mode
from .parts import Parts

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent
    from flwr.serverapp.strategy import Strategy

    from ..server.masking import Masking


def mode_of(settings: SimulationSettings) -> type[Mode]:
    """Return the mode of privacy of the settings: it has the file of its name in this room."""
    return import_module(f".{settings.privacy.name}", __package__).MODE


@dataclass(frozen=True)
class Federation(Parts):
    """A federation: its parts, its mode of privacy, and the masks on its sums.

    Attributes:
      settings, task, cohort, seed, population: as of `Parts`.
      strategy: given as an object; None makes one from the settings.
      reported: whether a run draws its rounds, and states the spending in its result.
      moments: mean and deviation of the columns that scale the run's inputs, from its clients' answer; None without the
        question.
      simulated_cost: cost of that question in a simulation; empty if the plan's ledgers hold it.
      identities: what simulated identities are made from, 32 bytes in hexadecimal; of the system's generator on real data.
        A federation that is made from another has its identities, which the clients of the run know.
    """

    strategy: Strategy | None = None
    reported: bool = True
    moments: Mapping[str, tuple[float, float]] | None = None
    simulated_cost: tuple[DpEvent, ...] = ()
    identities: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not self.identities:
            identities = self.randomness.stream("identities").bytes(32).hex()
            object.__setattr__(self, "identities", identities)

    @property
    def held_out_public(self) -> bool:
        """Whether what is measured on the held-out data may be shown: the settings say it, else the task, else its data."""
        setting, task = self.settings.task.held_out, self.task
        return getattr(task, "held_out_public", task.simulated) if setting is None else setting == "public"

    @cached_property
    def extra_clients(self) -> int:
        """Number of an observer's clients, in addition to the real ones."""
        return extra_of(self.settings).extra_clients(self.settings, self.task)

    @property
    def num_nodes(self) -> int:
        """Number of nodes of a simulation: real clients and extra ones."""
        return self.num_clients + self.extra_clients

    @cached_property
    def mode(self) -> Mode:
        """What is promised to whom."""
        return mode_of(self.settings)(self)

    @cached_property
    def masking(self) -> Masking | None:
        """Encryption of the sums, if any."""
        secagg = self.settings.secagg
        if secagg is None:
            return None
        from ..privacy.secagg.transcript import Profile  # sums in the clear need no protocol
        from ..server.masking import Masking

        roster, signed = self.population.sign(self.identities, self.num_nodes, self.doubly_signed)
        return Masking(
            roster,
            secagg.dropout,
            secagg.collusion,
            Profile(secagg.profile),
            secagg.bits,
            secagg.clipping_norm,
            self.population.max_examples(
                COUNT_BOUND_BATCHES * self.settings.training.batch_size, lambda: self.mode.sizes[-1]
            ),
            secagg.suite,
            signed_roster=signed,
        )

    def check_cohort(self) -> None:
        """Refuse a cohort that is too small for an encrypted sum.

        Raises:
          Refusal: one of the expected size cannot stand the stated dropout and the stated collusion together.
        """
        real = invited_size(self.cohort, self.num_clients)
        self.check_sum(round(real * self.num_nodes / self.num_clients))

    def check_sum(self, clients: int) -> None:
        """Refuse an encrypted sum of too few clients.

        Raises:
          Refusal: they cannot stand the stated dropout and the stated collusion together.
        """
        if self.masking is not None:
            self.masking.shape(clients)

    @property
    def doubly_signed(self) -> bool:
        """Whether the suite of the encrypted sums has ML-DSA in addition to Ed25519."""
        from ..privacy.secagg.suite import SUITES

        secagg = self.settings.secagg
        return secagg is not None and SUITES[secagg.suite].doubly_signed

    @property
    def needs_all_clients(self) -> bool:
        """Whether a client whose data are refused cannot drop out: of an encrypted sum, or of a step on all records."""
        return self.settings.secagg is not None or self.mode.sums_records

    @property
    def compression(self) -> CompressionPlan | None:
        """Compression of updates before clipping, if any."""
        settings = self.settings.compress
        if isinstance(settings, NoCompression):
            return None
        return CompressionPlan(settings.name, settings.ratio, settings.cells)

    @property
    def sends_differences(self) -> bool:
        """Whether a client that holds an earlier model gets only the difference."""
        return self.settings.compress.down is not None
