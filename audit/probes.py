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
    """Probe of the canary records' scores, which clients store beside their ledgers in `folder`, against their budget.

    Used only in a simulation: on real data these files stay with the clients.
    """

    folder: Path
    budget: Budget

    def __call__(self, number: int) -> Measured | None:
        """Return what canary records show after round `number`; None while too few took part."""
        members, others = read_scores(sorted(self.folder.glob(f"*{SUFFIX}")))
        return measure_records(members, others, self.budget, number)


@dataclass(frozen=True)
class OddProbe:
    """A `MemorisationProbe` of odd examples by the fall of their loss; against a budget, or against no leakage."""

    task: Mislabelled
    budget: Budget | None

    @cached_property
    def before(self) -> Scores:
        """The losses under the first model."""
        from ..tasks.mislabelled import losses_of

        return losses_of(self.task, self.task.model(), self.task.odd)

    def look(self, arrays: Mapping[str, NDArray[np.generic]], number: int) -> list[MemorisationResult]:
        """Return one test: the p-value of the guesses under the budget, valid for any mechanism and attack."""
        from ..tasks.arrays import load_arrays
        from ..tasks.mislabelled import losses_of

        del number
        model = self.task.model()
        load_arrays(model, arrays)
        fell = np.nan_to_num(self.before - losses_of(self.task, model, self.task.odd))
        members, others = fell[self.task.coins], fell[~self.task.coins]
        epsilon, delta = (self.budget.target_epsilon, self.budget.target_delta) if self.budget else (0.0, 0.0)
        finding = judge(by_one_run(members, others, delta), epsilon, ALPHA).findings[0]
        area = auc(members, others)
        figures = {"at_least": finding.lower, "auc": area.value, "auc_low": area.low, "auc_high": area.high}
        return [MemorisationResult(ODD, finding.p_value, figures, refutes=self.budget is not None)]


@dataclass(frozen=True)
class PlantedProbes:
    """All data planted in a run, by their probes.

    ``own``: the task's probe; ``odd``: that of odd examples; ``records``: of canary records.
    """

    task_probe: MemorisationProbe | None = None
    odd: OddProbe | None = None
    records: RecordProbe | None = None

    @property
    def budget(self) -> Budget | None:
        """Budget that clients claim for their records."""
        return self.records.budget if self.records else self.odd.budget if self.odd else None

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
    """Scores of the canary records of a step on all clients' records, computed from released sums.

    Attributes:
      path: of their file, as `client_rows.read_scores` reads it.
      canaries: their settings at the clients.
    """

    path: Path
    canaries: CanaryRecords

    def begin(self) -> None:
        """Rewrite the file with the coins."""
        self.path.unlink(missing_ok=True)
        client_rows.begin(self.path, coins_of_step(self.canaries))

    def keep(self, released: ReleasedSum) -> None:
        """Add a round's log likelihood ratio to each score; a client's update points against its gradient."""
        ratio = step_ratio(-released.records, released.noise, released.rate, self.canaries.replaced)
        client_rows.append(self.path, released.number, ratio)


def step_scores(run: Run) -> StepScores | None:
    """Return the scores of the canary records of this run's steps; None without them."""
    canaries = run.client.canaries_of_step
    return StepScores(run.folder / f"records{client_rows.SUFFIX}", canaries) if canaries.count else None


def planted_probes(run: Run) -> PlantedProbes:
    """Return the probes of this run's planted data; real data have none."""
    federation, client = run.federation, run.client
    task = federation.task
    if not is_full(federation.settings) or not federation.population.reads_data:
        return PlantedProbes()
    from ..tasks.mislabelled import Mislabelled

    task_probe = task.memorisation_probe() if isinstance(task, ProbedTask) else None
    if client.canaries_of_step.count:
        return PlantedProbes(task_probe, records=RecordProbe(run.folder, _claim(run)))
    record, budget = client.record, federation.mode.client_budget
    plants = PlantedProbes(task_probe, OddProbe(task, budget) if isinstance(task, Mislabelled) else None)
    if record is None or budget is None or not record.canaries:
        return plants
    return replace(plants, records=RecordProbe(Path(record.ledger_dir), budget))


def _claim(run: Run) -> Budget:
    """Return the plan's claim for the records in all of a run's sums; its target if it has one."""
    budget, privacy = run.federation.mode.budget, run.privacy
    assert budget is not None and privacy is not None
    return replace(budget, target_epsilon=privacy.plan.epsilon(budget.target_delta))
