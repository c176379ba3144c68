"""Audit of record-level privacy in a simulation: what is planted at the clients, and who weighs it against the claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...configs.schema import Record, RecordAndClient, SimulationSettings, SumLevel
from ...privacy.audit.kept_rows import SUFFIX, gathered
from ...privacy.audit.membership import auc
from ...privacy.audit.memorisation import MemorisationProbe, Memorised
from ...privacy.audit.one_run import Scores
from ...privacy.audit.record_claim import weighed
from ...privacy.audit.run_audit import Measured
from ...privacy.audit.verdict import by_one_run, judge
from ...privacy.budget import Budget
from ...strategies.client_settings import ClientSettings
from ...tasks.protocol import ProbedTask, Task
from .federation import Federation

if TYPE_CHECKING:
    from ...tasks.mislabelled import Mislabelled

MOST = 1000  # canaries of all clients together; more cost time and say little more
SHARE = 0.25  # of the smallest client's records, at most: what trains beside them is not to drown
ODD = "odd_examples"
ALPHA = 0.05  # of the bound and of the interval that are shown


def canaries_of_each(settings: SimulationSettings, task: Task, smallest: int) -> int:
    """Return how many canaries each client has among its records; 0 on real data, where only the client may see what they show.

    Args:
      settings: of the federation.
      task: whose clients they stand at.
      smallest: the fewest records that a client has.
    """
    audit = settings.audit
    at_records = isinstance(settings.privacy, Record | RecordAndClient)
    if audit is None or not audit.full or not at_records or not task.simulated:
        return 0
    return max(1, min(-(-MOST // task.num_clients), int(SHARE * smallest)))


def plants_examples(settings: SimulationSettings) -> bool:
    """Return whether odd examples are planted: where records are audited, or nothing is hidden."""
    audit = settings.audit
    return audit is not None and audit.full and not isinstance(settings.privacy, SumLevel)


@dataclass(frozen=True)
class RecordProbe:
    """Reads what clients keep of their canary records beside their ledgers in `folder`, against their budget.

    In a simulation alone: on real data these files stay with the clients.
    """

    folder: Path
    budget: Budget

    def __call__(self, number: int) -> Measured | None:
        """Return what canary records show after round `number`; None while too few took part."""
        members, others = gathered(sorted(self.folder.glob(f"*{SUFFIX}")))
        return weighed(members, others, self.budget, number)


@dataclass(frozen=True)
class OddProbe:
    """A `MemorisationProbe` of odd examples, by how far their loss fell; against a budget, or against no leak at all."""

    task: Mislabelled
    budget: Budget | None

    @cached_property
    def before(self) -> Scores:
        """The losses under the first model."""
        from ...tasks.mislabelled import losses_of

        return losses_of(self.task, self.task.model(), self.task.odd)

    def look(self, arrays: Mapping[str, NDArray[np.generic]], number: int) -> list[Memorised]:
        """Return one test: how rare such guesses are under the budget, for any mechanism and any attack."""
        from ...tasks.arrays import load_arrays
        from ...tasks.mislabelled import losses_of

        del number
        model = self.task.model()
        load_arrays(model, arrays)
        fell = np.nan_to_num(self.before - losses_of(self.task, model, self.task.odd))
        members, others = fell[self.task.coins], fell[~self.task.coins]
        epsilon, delta = (self.budget.target_epsilon, self.budget.target_delta) if self.budget else (0.0, 0.0)
        found = judge(by_one_run(members, others, delta), epsilon, ALPHA).findings[0]
        area = auc(members, others)
        shown = {"at_least": found.lower, "auc": area.value, "auc_low": area.low, "auc_high": area.high}
        return [Memorised(ODD, found.p_value, shown, refutes=self.budget is not None)]


@dataclass(frozen=True)
class Planted:
    """All that was planted in a run, as one `MemorisationProbe`, and who reads the canary records.

    ``own``: the task's probe; ``odd``: that of odd examples; ``records``: of canary records.
    """

    own: MemorisationProbe | None = None
    odd: OddProbe | None = None
    records: RecordProbe | None = None

    @property
    def budget(self) -> Budget | None:
        """What clients claim of their records."""
        return self.records.budget if self.records else self.odd.budget if self.odd else None

    @property
    def losses(self) -> bool:
        """Whether odd examples are weighed against a claim."""
        return self.odd is not None and self.odd.budget is not None

    @property
    def probed(self) -> bool:
        """Whether anything is looked for that only memory can know."""
        return self.own is not None or (self.odd is not None and not self.losses)

    def look(self, arrays: Mapping[str, NDArray[np.generic]], number: int) -> list[Memorised]:
        """Return what each of the probes found in a model's arrays after round `number`."""
        return [found for probe in (self.own, self.odd) if probe for found in probe.look(arrays, number)]


def planted(federation: Federation, client: ClientSettings) -> Planted:
    """Return whatever looks for what was planted in this run; in real data nothing is.

    Args:
      federation: its parts.
      client: what clients are told.
    """
    audit, task = federation.settings.audit, federation.task
    if audit is None or not audit.full or federation.deployed is not None:
        return Planted()
    from ...tasks.mislabelled import Mislabelled

    record, budget = client.record, federation.record_budget
    found = Planted(
        task.memorisation_probe() if isinstance(task, ProbedTask) else None,
        OddProbe(task, budget) if isinstance(task, Mislabelled) else None,
    )
    if record is None or budget is None or not record.canaries:
        return found
    return replace(found, records=RecordProbe(Path(record.ledger_dir), budget))
