"""Federation: task, cohort, population, privacy mode, and secure aggregation of its sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

from ..base.refusal import Refusal
from ..configs.schema import SimulationSettings
from ..configs.training_settings import NoCompression
from ..messages.client_settings import Encryption
from ..populations.population import extra_of
from ..privacy.mechanisms.compression import CompressionPlan
from ..privacy.plan import MIN_PLAN_NOISE, Plan
from ..strategies.cohorts import invited_size
from .mode import COUNT_BOUND_BATCHES, Mode, Parts

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent
    from flwr.serverapp.strategy import Strategy

    from ..server.masking import Masking


def mode_of(settings: SimulationSettings) -> type[Mode]:
    """Return the class of the settings' privacy mode, from the module with its name in this package."""
    return import_module(f".{settings.privacy.name}", __package__).MODE


@dataclass(frozen=True)
class Federation(Parts):
    """Federation of clients, with its privacy mode and the secure aggregation of its sums.

    Attributes:
      settings, task, cohort, seed, population: as in `Parts`.
      strategy: Flower strategy; None creates one from the settings.
      reported: whether a run's result states what was spent, and the run draws its curve; a prediction needs neither.
      moments: mean and standard deviation of each column by name, from the clients' answers, to scale inputs; None
        without that question.
      simulated_cost: privacy events of that question in a simulation; () if the plan's ledgers contain them.
      identities: secret from which simulated identities are derived, 32 bytes in hexadecimal; random on real data. A
        federation that is derived from another has the same secret, because the run's clients depend on it.
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
        """Whether metrics on held-out data may be shown: set by `task.held_out`, else by the task, else if simulated."""
        setting, task = self.settings.task.held_out, self.task
        return getattr(task, "held_out_public", task.simulated) if setting is None else setting == "public"

    @cached_property
    def extra_clients(self) -> int:
        """Number of clients that an observer adds to the real ones."""
        return extra_of(self.settings).extra_clients(self.settings, self.task)

    @property
    def num_nodes(self) -> int:
        """Number of nodes of a simulation: the real clients and the observer's."""
        return self.num_clients + self.extra_clients

    @cached_property
    def mode(self) -> Mode:
        """Privacy mode: the guarantee against each adversary, and its mechanism."""
        return mode_of(self.settings)(self)

    @cached_property
    def masking(self) -> Masking | None:
        """Secure aggregation of the sums; None if they are not encrypted."""
        secagg = self.settings.secagg
        if secagg is None:
            return None
        from ..privacy.secagg.transcript import Profile  # sums in the clear need no protocol
        from ..server.masking import Masking

        roster, signed = self.population.sign(self.identities, self.num_nodes, self.doubly_signed)
        count_bound = COUNT_BOUND_BATCHES * self.settings.training.batch_size
        return Masking(
            roster,
            dropout=secagg.dropout,
            collusion=secagg.collusion,
            profile=Profile(secagg.profile),
            bits=secagg.bits,
            clipping_norm=secagg.clipping_norm,
            max_examples=self.population.max_examples(count_bound, lambda: self.mode.sizes[-1]),
            suite=secagg.suite,
            signed_roster=signed,
        )

    @property
    def encryption(self) -> Encryption | None:
        """Secure aggregation as simulated clients require it; None if sums are not encrypted, or clients are real."""
        secagg = self.settings.secagg
        if secagg is None or not self.population.reads_data:
            return None
        return Encryption(
            identities=self.identities,
            clients=self.num_nodes,
            minimum_cohort=2,
            collusion=secagg.collusion,
            dropout=secagg.dropout,
            maximum_clipping_norm=self.mode.longest_norm,
            minimum_noise_multiplier=MIN_PLAN_NOISE if self.mode.distributed else 0.0,
            profile=secagg.profile,
            doubly=self.doubly_signed,
        )

    def limits(self, plan: Plan) -> list[str]:
        """Return sentences on what the calibrated plan of a promise does not protect from."""
        return self.mode.limits(plan, self.masking)

    def check_cohort(self) -> None:
        """Refuse a cohort whose expected size, extra clients included, is too small for an encrypted sum."""
        invited = invited_size(self.cohort, self.num_clients)
        self.check_sum(round(invited * self.num_nodes / self.num_clients))
        if self.masking is not None and self.turns.by_arrival:
            size = self.cohort.expected_size(self.num_clients)
            if (least := self.masking.attendance(round(invited)).least) > size:
                remedy = f"an encrypted sum of {invited:g} needs {least}, and a round ends with {size:g}; invite fewer"
                raise Refusal("cohort.over_selection", invited / size, remedy)

    def check_sum(self, clients: int) -> None:
        """Refuse an encrypted sum of too few clients to tolerate the configured dropout and collusion."""
        if self.masking is not None:
            self.masking.shape(clients)

    @property
    def doubly_signed(self) -> bool:
        """Whether messages of encrypted sums are signed with ML-DSA in addition to Ed25519."""
        from ..privacy.secagg.suite import SUITES

        secagg = self.settings.secagg
        return secagg is not None and SUITES[secagg.suite].doubly_signed

    @property
    def needs_all_clients(self) -> bool:
        """Whether every client needs valid data, because none can drop out of an encrypted sum or a step on all records."""
        return self.settings.secagg is not None or self.mode.sums_records

    @property
    def compression(self) -> CompressionPlan | None:
        """Compression of updates before clipping; None without compression."""
        settings = self.settings.compress
        if isinstance(settings, NoCompression):
            return None
        return CompressionPlan(settings.name, settings.ratio, settings.cells)

    @property
    def sends_differences(self) -> bool:
        """Whether clients that have an earlier model are sent only the difference to it."""
        return self.settings.compress.down is not None
