"""Audit of record-level privacy in a simulation: the planted data, and the probes that test the claim with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..messages.record_settings import CanaryRecords
from ..privacy.audit import client_rows
from ..privacy.audit.client_rows import SUFFIX, read_scores, step_ratio
from ..privacy.audit.membership import auc
from ..privacy.audit.memorisation import MemorisationProbe, MemorisationResult
from ..privacy.audit.one_run import Scores
from ..privacy.audit.record_claim import measure_records
from ..privacy.audit.run_audit import Measured
from ..privacy.audit.verdict import by_one_run, judge
from ..privacy.budget import Budget
from ..privacy.mechanisms.released_sum import ReleasedSum
from ..run.prepared_run import Run
from ..tasks.protocol import ProbedTask
from .participants import is_full
from .record_canaries import coins_of_step

if TYPE_CHECKING:
    from ..tasks.mislabelled import Mislabelled

ODD = "odd_examples"
ALPHA = 0.05  # of the displayed bound and interval


@dataclass(frozen=True)
class RecordProbe:
    """Probe of the canary records' scores, which simulated clients store in `folder`, against the budget that they claim.

    On real data the files of scores stay with the clients.
    """

    folder: Path
    budget: Budget

    def __call__(self, number: int) -> Measured | None:
        """Return what canary records show after round `number`; None while too few took part."""
        members, others = read_scores(sorted(self.folder.glob(f"*{SUFFIX}")))
        return measure_records(members, others, self.budget, number)


@dataclass(frozen=True)
class OddProbe:
    """Probe of planted, mislabelled examples by the fall of their loss (a `MemorisationProbe`).

    Attributes:
      task: with the planted examples, of which a coin decides whether they are trained on.
      budget: claim to refute; None tests against no leakage at all.
    """

    task: Mislabelled
    budget: Budget | None

    @cached_property
    def before(self) -> Scores:
        """The planted examples' losses under the first model, from which each look measures the fall."""
        from ..tasks.mislabelled import losses_of

        return losses_of(self.task, self.task.model(), self.task.odd)

    def look(self, arrays: Mapping[str, NDArray[np.generic]], number: int) -> list[MemorisationResult]:
        """Return one test: did losses fall more on examples that were trained on? It is valid for any mechanism."""
        from ..tasks.arrays import load_arrays
        from ..tasks.mislabelled import losses_of

        del number
        model = self.task.model()
        load_arrays(model, arrays)
        falls = np.nan_to_num(self.before - losses_of(self.task, model, self.task.odd))
        members, others = falls[self.task.coins], falls[~self.task.coins]
        epsilon = self.budget.target_epsilon if self.budget else 0.0
        delta = self.budget.target_delta if self.budget else 0.0
        finding = judge(by_one_run(members, others, delta), epsilon, ALPHA).findings[0]
        area = auc(members, others)
        figures = {"at_least": finding.lower, "auc": area.value, "auc_low": area.low, "auc_high": area.high}
        return [MemorisationResult(ODD, finding.p_value, figures, refutes=self.budget is not None)]


@dataclass(frozen=True)
class PlantedProbes:
    """Probes of the data that are planted in a run."""

    task_probe: MemorisationProbe | None = None  # the task's own
    odd: OddProbe | None = None  # of mislabelled examples
    records: RecordProbe | None = None  # of canary records

    @property
    def budget(self) -> Budget | None:
        """Budget that clients claim for their records; None without a claim."""
        probe = self.records or self.odd
        return probe.budget if probe else None

    @property
    def losses(self) -> bool:
        """Whether odd examples are tested against a claim."""
        return self.odd is not None and self.odd.budget is not None

    @property
    def probed(self) -> bool:
        """Whether a probe looks for data that only memorisation reveals."""
        return self.task_probe is not None or (self.odd is not None and not self.losses)

    @property
    def probes(self) -> list[MemorisationProbe]:
        """The probes that look for memorised data."""
        return [probe for probe in (self.task_probe, self.odd) if probe]


@dataclass(frozen=True)
class StepScores:
    """Scores of the canary records of a step on all clients' records, computed from released sums."""

    path: Path  # of their file, as `client_rows.read_scores` reads it
    canaries: CanaryRecords  # their settings at the clients

    def begin(self) -> None:
        """Replace the file by one that holds only the coins."""
        self.path.unlink(missing_ok=True)
        client_rows.begin(self.path, coins_of_step(self.canaries))

    def keep(self, released: ReleasedSum) -> None:
        """Append a round's log likelihood ratios to the file; negated, since an update points against its gradient."""
        ratio = step_ratio(-released.records, released.noise, released.rate, self.canaries.replaced)
        client_rows.append(self.path, released.number, ratio)


def step_scores(run: Run) -> StepScores | None:
    """Return the scores of the canary records of this run's steps; None without them."""
    canaries = run.client.canaries_of_step
    return StepScores(run.folder / f"records{client_rows.SUFFIX}", canaries) if canaries.count else None


def planted_probes(run: Run) -> PlantedProbes:
    """Return the probes of this run's planted data; none without a full audit, or if the clients are not simulated."""
    federation, client, task = run.federation, run.client, run.federation.task
    if not is_full(federation.settings) or not federation.population.reads_data:
        return PlantedProbes()
    from ..tasks.mislabelled import Mislabelled

    task_probe = task.memorisation_probe() if isinstance(task, ProbedTask) else None
    if client.canaries_of_step.count:
        return PlantedProbes(task_probe, records=RecordProbe(run.folder, _claim(run)))
    record, budget = client.record, federation.mode.client_budget
    odd = OddProbe(task, budget) if isinstance(task, Mislabelled) else None
    if record is None or budget is None or not record.canaries:
        return PlantedProbes(task_probe, odd)
    return PlantedProbes(task_probe, odd, RecordProbe(Path(record.ledger_dir), budget))


def _claim(run: Run) -> Budget:
    """Return the budget of a run's sums with the epsilon that its plan claims for a record in all of them."""
    budget, privacy = run.federation.mode.budget, run.privacy
    assert budget is not None and privacy is not None
    return replace(budget, target_epsilon=privacy.plan.epsilon(budget.target_delta))
