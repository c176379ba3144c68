"""Modes with noise on a sum of all clients, and among them those that hide whole clients."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.privacy_settings import ClientLevel, PrivacySettings, SumLevel, sum_level
from ..messages.training_order import ClientClaim
from ..privacy.budget import Adversary, Budget
from ..privacy.mechanisms.mechanism import Mechanism, mechanism_of
from ..privacy.mechanisms.sizing import Attendance, size_shares
from ..privacy.mechanisms.sum_spec import WEIGHT, Segment, SumSpec, metrics_share
from ..privacy.plan import Plan
from ..privacy.preconditions import VACUOUS_CLIENTS, vacuity
from ..strategies.cohorts import All
from .mode import COUNT_BOUND_BATCHES, EVERYBODY, Mode, Promise

if TYPE_CHECKING:
    from ..privacy.plan import Sampling
    from ..server.masking import Masking


class SumMode(Mode):
    """A mode with noise on its sums: one budget on one ledger of all clients, and one plan of all rounds.

    Attributes:
      clear_sums: sentence on what the server sees where sums are not encrypted.
    """

    clear_sums = (
        "The server is trusted in this mode: it sees single updates, so against it epsilon is infinite."
    )

    @property
    def level(self) -> SumLevel:
        """The settings of noise and budget of the sums; in `record_and_client` the part `client`."""
        level = sum_level(self.parts.settings.privacy)
        assert level is not None
        return level

    @property
    def adversaries(self) -> tuple[Adversary, ...]:
        """From whom the sums hide a unit."""
        return EVERYBODY

    @property
    def sampling_words(self) -> str:
        """How units are sampled, in a result."""
        return self.parts.cohort.name

    @property
    def promises(self) -> tuple[Promise, ...]:
        """The promise of the sums."""
        level = self.level
        return (
            Promise(
                unit=level.unit,
                target_epsilon=level.target_epsilon,
                target_delta=level.target_delta,
                adjacency=level.adjacency,
                noise_multiplier=level.noise_multiplier,
                adversaries=self.adversaries,
                sampling=self.sampling_words,
            ),
        )

    @property
    def budget(self) -> Budget:
        """The budget of the ledger of all clients, within its owner's caps."""
        return self.parts.population.within_caps(self.ledger_path(Path()), self.promises[0].budget)

    @cached_property
    def mechanism(self) -> Mechanism:
        """The law of the noise on the sums; where clients take part by turns, the whole run is one release."""
        parts, level = self.parts, self.level
        return mechanism_of(level.noise, parts.cohort.turns, parts.settings.num_rounds, level.bands)

    @property
    def longest_norm(self) -> float:
        """The unit's norm under the value, of those that are tried, that makes it longest."""
        if self.tuned_norm is None:
            return self.unit_norm
        return self.unit_norm * max(self.parts.settings.tried) / self.tuned_norm

    @property
    def round_sampling(self) -> Sampling:
        """How a round samples the units."""
        return self.parts.cohort

    def round_plan(self, num_rounds: int, filter_order: float | None = None) -> Plan:
        """Return the plan of `num_rounds` rounds, with the noise of the settings; without it, noise is to be calibrated."""
        level = self.level
        return Plan(
            unit=level.unit,
            adjacency=level.adjacency,
            sampling=self.round_sampling,
            clipping_norm=self.unit_norm,
            num_rounds=num_rounds,
            noise_multiplier=level.noise_multiplier,
            adversaries=self.adversaries,
            filter_order=filter_order,
            mechanism=self.mechanism,
        )

    def with_noise(self, noise_multiplier: float) -> PrivacySettings:
        """Return the privacy settings with this noise on the sums, in place of noise planned from a budget."""
        return self.level.model_copy(update={"noise_multiplier": noise_multiplier})

    def metrics_share(self, plan: Plan) -> float:
        """Return the metrics' share of the squared norm of a unit, in [0, 1): as configured, or to suit the noise."""
        share = self.level.metrics_share
        if share is not None:
            return share
        parts = self.parts
        expected = parts.cohort.expected_size(parts.declared_clients)
        return metrics_share(plan.noise_std / plan.clipping_norm, expected, len(self.metrics))

    def question_ledgers(self) -> list[Path]:
        """Return the ledger of all clients."""
        return [self.ledger_path(Path())]

    def evaluation(self, noise_multiplier: float) -> Plan:
        """Return the plan of one evaluation at all clients."""
        level = self.level
        return Plan(
            unit=level.unit,
            adjacency=level.adjacency,
            sampling=self.evaluation_sampling,
            clipping_norm=self.unit_norm,
            num_rounds=1,
            noise_multiplier=noise_multiplier,
            adversaries=self.adversaries,
        )

    @property
    def evaluation_sampling(self) -> Sampling:
        """How an evaluation samples the units: all clients."""
        return All()

    def limits(self, plan: Plan, masking: Masking | None) -> list[str]:
        """Return sentences on what the plan does not protect from: a server that is trusted, or clients that collude."""
        assumption = self.parts.turns.assumption
        sums = self.clear_sums if masking is None else self._of_encrypted(plan, masking)
        return [*filter(None, [assumption]), sums]

    def _of_encrypted(self, plan: Plan, masking: Masking) -> str:
        """Return the sentences on what is assumed of the clients of encrypted sums, and what noise that costs."""
        parts = self.parts
        expected = round(parts.cohort.expected_size(parts.declared_clients))
        attendance = masking.attendance(expected)
        return (
            f"The server sees only sums: of {expected} clients at least {attendance.least} must answer, or nothing is "
            f"released. The noise of {attendance.colluders} of them is not counted: they may collude with the server. So "
            f"a sum of all {expected} has {self._uncounted(plan, attendance, masking.bits):.0%} more noise than epsilon counts."
        )

    def _uncounted(self, plan: Plan, attendance: Attendance, bits: int | None) -> float:
        """Return the further noise in a sum of all clients, over that of the fewest honest ones, which epsilon counts."""
        from ..tasks.arrays import dimension_of  # torch

        noise = plan.noise_over_clip
        dimension = dimension_of(self.parts.task)
        shares = size_shares(self.sum_spec(plan), dimension, attendance, noise, bits, layered=True)
        return shares.noise_multiplier(attendance.most, attendance.most) / noise - 1

    def sum_spec(self, plan: Plan) -> SumSpec:
        """Return the grid on which updates are added, as if without metrics."""
        return SumSpec(plan.clipping_norm)


class ClientMode(SumMode):
    """A mode that hides whole clients in its sums."""

    hides_clients = True
    sums_cost_records = True

    @property
    def metrics(self) -> tuple[Segment, ...]:
        """What clients send without noise on the sums, and the number of their examples."""
        bound = float(COUNT_BOUND_BATCHES * self.parts.settings.training.batch_size)
        return (*super().metrics, Segment(WEIGHT, bound))

    @property
    def clients(self) -> ClientLevel:
        """The settings of the sums."""
        assert isinstance(self.level, ClientLevel)
        return self.level

    @property
    def unit_norm(self) -> float:
        """Clipping norm of a client's update."""
        return self.clients.clipping_norm

    @property
    def tuned_norm(self) -> float | None:
        """The clipping norm, if it is tuned."""
        return self.unit_norm if self.parts.settings.tune.name == "clipping_norm" else None

    def claim(self, plan: Plan) -> ClientClaim | None:
        """Return what an order claims of the sums of whole clients.

        With clients in turns, the plan's own figure is the cost of all of a client's rounds, and the claim's that of one.
        """
        assert plan.noise_multiplier is not None
        return ClientClaim(plan.noise_multiplier * plan.mechanism.sensitivity, plan.adjacency)

    def count_disclosure(self, promise: Promise) -> str | None:
        """Return which public value reveals the number of clients, with the remedy; None if none does."""
        settings, population = self.parts.settings, self.parts.population
        if population.count_disclosure:
            return population.count_disclosure
        if self.parts.cohort.replaces:
            return "such a cohort replaces a client that leaves; use cohort=poisson, or zero-out"
        if settings.task.own and settings.task.num_clients is not None:
            return "task.num_clients reveals the number of clients; leave it null, or use zero-out"
        if settings.population is None:
            remedy = "declare a public number instead, population=..., or use zero-out"
            return f"the mean is divided by the number of clients; {remedy}"
        return None

    def vacuity(self, plan: Plan) -> str | None:
        """Return why the noise of the sums hides whatever could be learned; None where it does not."""
        clients = self.parts.declared_clients
        expected = self.parts.cohort.expected_size(clients)
        reason = vacuity(plan, expected, clients)
        if reason is None or clients >= VACUOUS_CLIENTS:
            return reason
        from ..tasks.arrays import dimension_of  # torch, which a plan of many clients does without

        return vacuity(plan, expected, clients, dimension_of(self.parts.task))

    def limits(self, plan: Plan, masking: Masking | None) -> list[str]:
        """Return sentences on what the plan does not protect from, and on a vacuous guarantee."""
        sentences = super().limits(plan, masking)
        if (wrong := self.vacuity(plan)) is not None:
            vacuous = f"This guarantee {wrong}, which hides whatever could be learned."
            sentences.append(f"{vacuous} Use privacy=record_distributed.")
        return sentences
