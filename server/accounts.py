"""Accounts of a run's sums: the clients' message format, the charge of each round, its noise, and its view for an audit.

Every grid has an account: sums without a promise to clients have `Unprotected`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from dp_accounting.dp_event import GaussianDpEvent

from ..base.refusal import Refusal
from ..messages.model_difference import hash_of
from ..messages.wire import CANARY_RECORDS, WEIGHT, Layout
from ..privacy.accounting.events import gaussian_scale
from ..privacy.adaptation import Choices
from ..privacy.arms import Arm
from ..privacy.budget import Release, Unit
from ..privacy.ledger.ledger import Key
from ..privacy.mechanisms.private_sum import Vector
from ..privacy.mechanisms.released_sum import ReleasedSum, RoundCohort
from ..privacy.mechanisms.sum_spec import TRAINING, UPDATE, Segment, SumSpec, cells_for
from ..privacy.plan import Plan
from ..strategies.cohorts import Cohort
from ..strategies.record_plan import PoissonBatches
from .checkpoint import Arrays
from .noise_rows import Rows
from .round_terms import Mean, SumPrivacy

MECHANISM = "private_sum"
MAX_EXAMPLES = 1e9  # a client that claims more examples than this is dropped


class SumAccount(Protocol):
    """Interface of the account of any sums: those of a training run, and those of a question, which is an extension."""

    def arrive(self, row: int, nodes: Sequence[int]) -> None:
        """Record whose vectors are in the row's sum, durably and before anything of it is released, if later draws need that."""
        ...

    def noised(self, total: Vector, row: int, spec: SumSpec) -> Vector:
        """Return a sum in the clear with the row's noise."""
        ...

    def check(self, event: GaussianDpEvent) -> None:
        """Fail where the noise that clients added is less than what was reserved."""
        ...

    def units(self, clients: float) -> float:
        """Return the expected number of units in the vectors of this many clients."""
        ...


class Unnoised:
    """Account of sums that get no noise here; methods as of `Protected`."""

    def arrive(self, row: int, nodes: Sequence[int]) -> None:
        """Record nothing: no later draw depends on it."""

    def noised(self, total: Vector, row: int, spec: SumSpec) -> Vector:
        """Return the sum as it is."""
        return total

    def check(self, event: GaussianDpEvent) -> None:
        """Accept any event."""

    def units(self, clients: float) -> float:
        """Return the number of clients."""
        return clients


class Unprotected(Unnoised):
    """Account of sums without client-level privacy, weighted by examples; methods as of `Protected`."""

    choices: Choices | None = None
    round_choices: Choices | None = None
    noise = noise_of_sum = 0.0
    noise_factor = norm_factor = 1.0

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self._spec = SumSpec(None, (*segments, Segment(WEIGHT, MAX_EXAMPLES)))

    def spec(self, layout: Layout, expected: float) -> SumSpec:
        """Return a spec without a clipping norm."""
        return self._spec

    def reserve(self, row: int, cohort: Sequence[int], arm: Arm | None = None) -> None:
        """Reserve nothing: no ledger is charged here."""

    def audit_view(self, number: int, row: int, mean: Mean, cohort: RoundCohort) -> None:
        """Return None: no noise is claimed."""

    def settle(self, number: int, row: int, mean: Mean) -> None:
        """Commit nothing."""

    def record_model(self, arrays: Arrays) -> None:
        """Record nothing."""


@dataclass
class Protected:
    """Account of sums that hide whole clients, or records.

    Attributes:
      privacy: plan, ledger, and adaptation.
      segments: metrics that may be part of the sum.
      rows: of the run.
      run: its name on the ledger.
      rng: source of its noise, as the ledger records it.
      noise_factor: noise added over the planned noise. The charge is for the planned noise: a factor that depends on
        releases must lower no charge, except under a filter.
      norm_factor: norm of a contribution over the planned norm, public and chosen only from releases; the noise is a
        multiple of the norm, so the charge is unchanged.
      choices: adaptive choices for the next round.
    """

    privacy: SumPrivacy
    segments: tuple[Segment, ...]
    rows: Rows
    run: str
    rng: str
    noise_factor: float = 1.0
    norm_factor: float = 1.0

    def __post_init__(self) -> None:
        self.choices = self.privacy.adaptation.first(self.privacy.plan)
        self._noise = self.privacy.plan.mechanism.noise(self.rows.stream_of)
        self._last: Key = ("", 0, "")  # of the last settled release

    @property
    def round_choices(self) -> Choices:
        """Choices for the next round, at its norm."""
        return replace(self.choices, clipping_norm=self.choices.clipping_norm * self.norm_factor)

    @property
    def plan(self) -> Plan:
        """Plan with the choices for the next round: the noise follows the clients' clipping norm."""
        choices = self.round_choices
        return replace(
            self.privacy.plan, clipping_norm=choices.clipping_norm, noise_multiplier=choices.noise_multiplier
        )

    @property
    def noise(self) -> float:
        """Planned noise, times the factor by which it was raised."""
        return self.plan.noise_over_clip * self.noise_factor

    @property
    def noise_of_sum(self) -> float:
        """Standard deviation of the noise of one round's sum over the clipping norm, if it is independent of other rounds'."""
        return self.noise * self.plan.mechanism.sensitivity

    def spec(self, layout: Layout, expected: float) -> SumSpec:
        """Return the public parameters of the next round's sum.

        Args:
          layout: shapes of the update's arrays by name.
          expected: clients of a round, the fixed denominator.
        """
        coordinates, units = sum(int(np.prod(shape)) for shape in layout.values()), self.privacy.units.maximum
        cells, plan = cells_for(coordinates, units), self.plan
        if plan.unit is not Unit.CLIENT:
            return SumSpec(plan.clipping_norm * units, cells=cells, unit_norm=plan.clipping_norm)
        return SumSpec(plan.clipping_norm, self._segments(expected), self.privacy.metrics_share, cells)

    def _segments(self, expected: float) -> tuple[Segment, ...]:
        """Return the segments after the update: metrics, and what the next choice needs; none in sums of records."""
        if self.privacy.plan.unit is not Unit.CLIENT:
            return ()
        return (*self.segments, *self.privacy.adaptation.segments(self.plan, expected))

    def reserve(self, row: int, cohort: Sequence[int], arm: Arm | None = None) -> None:
        """Reserve the row's release; arguments as of `Participants.draw`, and the cohort that was drawn.

        Raises:
          BudgetExhausted: it does not fit; nothing was written.
          Refusal: another run of this name has released the row with noise that cannot be repeated.
        """
        self.privacy.ledger.reserve_new(self._release(row, cohort, arm))

    def arrive(self, row: int, nodes: Sequence[int]) -> None:
        """Record whose vectors are in the row's sum, as `RunRows.arrive` does."""
        self.rows.arrive(row, nodes)

    def noised(self, total: Vector, row: int, spec: SumSpec) -> Vector:
        """Return a sum in the clear with the row's noise; arguments as of `mechanism.Noise.add`."""
        noised, event = self._noise.add(total, row, self.noise, spec)
        if event != self.privacy.plan.mechanism.event(self.noise):
            raise AssertionError("the mechanism's event is not the one that was reserved")
        return noised

    def check(self, event: GaussianDpEvent) -> None:
        """Fail if the noise that clients added is less than the reserved noise.

        Raises:
          AssertionError: they added less.
        """
        if event.noise_multiplier < self.plan.noise_over_clip * self.plan.mechanism.sensitivity:
            raise AssertionError("the sum has less noise than was reserved")

    def units(self, clients: float) -> float:
        """Return the expected number of units in this many clients' vectors: the divisor of their sum."""
        return clients * self.privacy.units.expected

    def audit_view(self, number: int, row: int, mean: Mean, cohort: RoundCohort) -> ReleasedSum:
        """Return the sum for an audit: in clipping norms, with the claimed noise.

        Args:
          number: of the round.
          row: of its release.
          mean: of the round; its `audited` arrays are overwritten and returned.
          cohort: the cohort.
        """
        plan = self.plan
        to_clips = mean.denominator / plan.clipping_norm  # factor from a mean to a sum in clipping norms
        layers = [
            np.multiply(value, to_clips, out=value)
            for name, value in mean.audited.items()
            if name != CANARY_RECORDS
        ]
        records = mean.audited.get(CANARY_RECORDS, np.zeros(0)) * to_clips
        noise = plan.noise_std / plan.clipping_norm * self.noise_factor
        if isinstance(
            plan.sampling, PoissonBatches
        ):  # of records, whose event is no sampled Gaussian of clients
            rate, charged = plan.sampling.sample_rate, plan.noise_over_clip
        else:
            rate, charged = gaussian_scale(plan.event_of(row)) or (1.0, 0.0)
        step = mean.step / plan.clipping_norm
        return ReleasedSum(number, layers, noise, rate, charged, cohort, records, mean.sketch, step)

    def settle(self, number: int, row: int, mean: Mean) -> None:
        """Commit the row's charge, and make the next choices. The commit may be written with the next reservation."""
        self._last = (self.run, row, MECHANISM)
        self.privacy.ledger.commit(self._last, durable=False)
        self.choices = self.privacy.adaptation.next(self.choices, number, mean.scalars)

    def record_model(self, arrays: Arrays) -> None:
        """Add the hash of the model after the last settled row to its commit; it is post-processing of what was charged."""
        self.privacy.ledger.describe(self._last, {"model": hash_of(arrays)})

    def _release(self, row: int, cohort: Sequence[int], arm: Arm | None) -> Release:
        """Return the row's release, whose key `settle` names again for the commit."""
        plan = self.plan
        events = dict.fromkeys(plan.adversaries, plan.event_of(row))
        order = plan.filter_order if self.privacy.adaptation.noise else None
        segments = self._segments(1.0)  # names and purposes do not depend on the expected cohort
        return Release(
            plan.unit,
            self.run,
            row,
            MECHANISM,
            events,
            self.rng,
            cohort=self.rows.ledger_cohort(cohort),
            filter_order=order,
            segments={UPDATE: TRAINING} | {each.name: each.purpose for each in segments},
            source=self.privacy.source,
            arm=arm,
        )


Account = Protected | Unprotected  # of a training run's sums


def account_of(
    privacy: SumPrivacy | None, cohort: Cohort, segments: tuple[Segment, ...], rows: Rows, run: str, rng: str
) -> Account:
    """Return the account of a run's sums.

    Args:
      privacy: None makes no privacy promise.
      cohort: draws the clients.
      segments: metrics that may travel in the sum; without a share of the norm none does.
      rows: of the run.
      run: its name on the ledger.
      rng: where its noise comes from, as the ledger records it.

    Raises:
      Refusal: the plan is not calibrated, or was calibrated for another draw.
    """
    if privacy is None:
        return Unprotected(segments)
    if privacy.plan.unit is Unit.CLIENT and privacy.plan.sampling != cohort:
        remedy = "the plan was calibrated for another draw; calibrate it for this one"
        raise Refusal("cohort", cohort.name, remedy)
    if privacy.plan.noise_multiplier is None:
        raise Refusal("noise_multiplier", None, "calibrate the plan before it is used")
    return Protected(privacy, segments if privacy.metrics_share > 0 else (), rows, run, rng)
