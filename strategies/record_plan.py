"""Plan of a client's record-level privacy: its Poisson batches, their event, and the noise for a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..messages.client_settings import ClientSettings
from ..messages.record_settings import RecordPrivacy
from ..privacy.budget import Adversary
from ..privacy.mechanisms.randomness import Stream
from ..privacy.plan import Plan

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent


@dataclass(frozen=True)
class PoissonBatches:
    """Poisson batches of one round: each holds every record independently with probability `sample_rate`.

    Attributes:
      sample_rate: in (0, 1].
      steps: number of batches, at least 1.
      name: of this sampling.
      of_unit: largest number of records of one unit, each drawn by its own coin.
    """

    sample_rate: float
    steps: int
    name: str = "poisson batches"
    of_unit: int = 1

    def draw(self, records: int, stream: Stream) -> Iterator[NDArray[np.intp]]:
        """Yield the indices of each batch, ascending; an empty batch is a step too.

        Args:
          records: number of records.
          stream: from which the coins are drawn.
        """
        for _ in range(self.steps):
            if self.sample_rate == 1:
                yield np.arange(records)
            else:
                yield np.flatnonzero(stream.uint64(records) < np.uint64(int(self.sample_rate * 2**64)))

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return the event of all steps of one round, given that of one step's mechanism, which adds Gaussian noise."""
        from dp_accounting.dp_event import GaussianDpEvent, SelfComposedDpEvent

        from ..privacy.accounting.gaussian_mixture import group_event

        assert isinstance(mechanism, GaussianDpEvent)
        step = group_event(mechanism.noise_multiplier, self.sample_rate, self.of_unit)
        return step if self.steps == 1 else SelfComposedDpEvent(step, self.steps)


def poisson_batches(records: int, batch_size: int, local_epochs: int) -> PoissonBatches:
    """Return the batches of one round at a client.

    Args:
      records: number of the client's records, at least 1.
      batch_size: expected number of records of a batch; at most all records.
      local_epochs: expected number of passes over the data.
    """
    expected = min(batch_size, records)
    return PoissonBatches(expected / records, max(1, -(-records * local_epochs // expected)))


def record_plan(record: RecordPrivacy, records: int, settings: ClientSettings) -> Plan:
    """Return the plan of one round at a client; its noise is None as long as `record` has none.

    Args:
      record: the client's record-level privacy.
      records: number of its records, at least 1.
      settings: give batch size and epochs.
    """
    return Plan(
        unit=record.terms.budget.unit,
        adjacency=record.terms.adjacency,
        sampling=replace(
            poisson_batches(records, settings.training.batch_size, settings.training.local_epochs),
            of_unit=record.terms.per_person or 1,
        ),
        clipping_norm=record.terms.max_grad_norm,
        num_rounds=1,
        noise_multiplier=record.noise_multiplier(records) if record.noise_by_records else None,
        adversaries=(Adversary.SERVER, Adversary.CLIENTS, Adversary.MODEL),
    )


def steps_of(plan: Plan) -> int:
    """Return the number of batches of one round."""
    assert isinstance(plan.sampling, PoissonBatches)
    return plan.sampling.steps


def plans_of_sizes(sizes: Sequence[int], record: RecordPrivacy, settings: ClientSettings) -> list[Plan]:
    """Return the plans of one round that cost most, one for each number of steps and noise.

    With equally many steps of equal noise, fewer records are sampled at a higher rate, so the smallest size is kept.

    Args:
      sizes: numbers of the clients' records, ascending, without canary records.
      record: their record-level privacy, with the number of canary records of each.
      settings: give batch size and epochs.
    """
    plans = [record_plan(record, each + record.canaries, settings) for each in reversed(sizes)]
    return list({(steps_of(plan), plan.noise_multiplier): plan for plan in plans}.values())


def calibrated_noise(
    record: RecordPrivacy,
    records: int,
    settings: ClientSettings,
    participations: int,
    prior: Sequence[DpEvent] = (),
    whole: int | None = None,
    other_events: Sequence[DpEvent] = (),
) -> float:
    """Return the least noise multiplier with which a client stays within its remaining budget.

    Args:
      record: gives the budget.
      records: number of the client's records, at least 1.
      settings: give batch size and epochs.
      participations: number of rounds in which the client takes part.
      prior: events that its ledger already holds, or still owes.
      whole: number of rounds in which it takes part in the whole run, if some are finished; None otherwise.
      other_events: events of the run outside its rounds.

    Raises:
      Refusal: no noise fits, or less than a hundredth of the budget is left.
    """
    plan = replace(record_plan(record, records, settings), num_rounds=participations)
    fitted = plan.calibrate_as_one_of(record.terms.runs, record.terms.budget, prior, whole, other_events)
    return float(fitted.noise_multiplier or 0)
