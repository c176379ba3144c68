"""The audit of record-level privacy in a simulation: what the clients' own canaries show, weighed against the claim.

The p-value is that of the guesses at the median (`accuracy_p`), for canaries whose noise is independent, as that of weights
is. It takes the Gaussian curve through (epsilon, delta); batches drawn in secret have a heavier tail, and so lie below
that curve where guesses are made at the median, which a test holds on a grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..client.record_canaries import SUFFIX, gathered
from ..client.settings import ClientSettings
from ..client.tasks.mislabelled import Mislabelled, losses_of
from ..client.tasks.protocol import ProbedTask, Task
from ..client.training import load_arrays
from ..configs.schema import NoPrivacy, Record, SimulationSettings
from ..privacy.audit.curves import gaussian_mu
from ..privacy.audit.gaussian_test import accuracy_p, estimate, right_of_median, separation
from ..privacy.audit.membership import auc
from ..privacy.audit.one_run import Scores
from ..privacy.audit.probe import MemorisationProbe, Memorised
from ..privacy.audit.verdict import by_one_run, judge
from ..privacy.budget import Budget
from ..privacy.refusal import Refusal
from .federation import Federation

MOST = 1000  # canaries of all clients together; more cost time and say little more
SHARE = 0.25  # of the smallest client's records, at most: what trains beside them is not to drown
NAME, ODD = "record_canaries", "odd_examples"
ALPHA = 0.05  # of the bound and of the interval that are shown


def canaries_of_each(settings: SimulationSettings, task: Task, smallest: int) -> int:
    """How many canaries each client has among its records; `smallest` is the fewest records that a client has.

    None on real data, where nobody but the client may see what they show.
    """
    audit = settings.audit
    if audit is None or not audit.full or not isinstance(settings.privacy, Record) or not task.simulated:
        return 0
    return max(1, min(-(-MOST // task.num_clients), int(SHARE * smallest)))


def plants_examples(settings: SimulationSettings) -> bool:
    """Whether odd examples are planted: where records are audited, or nothing is hidden."""
    audit = settings.audit
    return audit is not None and audit.full and isinstance(settings.privacy, Record | NoPrivacy)


@dataclass(frozen=True)
class RecordProbe:
    """A `MemorisationProbe` of what clients keep beside their ledgers in `folder`, against their budget.

    In a simulation alone: on real data these files stay with the clients.
    """

    folder: Path
    budget: Budget

    def look(self, arrays: Mapping[str, NDArray[np.generic]], number: int) -> list[Memorised]:
        """One test: how rare such guesses are if every client keeps its budget."""
        del arrays, number
        members, others = gathered(sorted(self.folder.glob(f"*{SUFFIX}")))
        return [Memorised(NAME, *weighed(members, others, self.budget))]


@dataclass(frozen=True)
class OddProbe:
    """A `MemorisationProbe` of odd examples, by how far their loss fell; against a budget, or against no leak at all."""

    task: Mislabelled
    budget: Budget | None

    @cached_property
    def before(self) -> Scores:
        """The losses under the first model."""
        return losses_of(self.task, self.task.model(), self.task.odd)

    def look(self, arrays: Mapping[str, NDArray[np.generic]], number: int) -> list[Memorised]:
        """One test: how rare such guesses are under the budget, for any mechanism and any attack."""
        del number
        model = self.task.model()
        load_arrays(model, arrays)
        fell = np.nan_to_num(self.before - losses_of(self.task, model, self.task.odd))
        members, others = fell[self.task.coins], fell[~self.task.coins]
        epsilon, delta = (self.budget.target_epsilon, self.budget.target_delta) if self.budget else (0.0, 0.0)
        found = judge(by_one_run(members, others, delta), epsilon, ALPHA).findings[0]
        area = auc(members, others)
        shown = {"at_least": found.lower, "auc": area.value, "auc_low": area.low, "auc_high": area.high}
        return [Memorised(ODD, found.p_value, shown)]


@dataclass(frozen=True)
class Together:
    """Several probes as one."""

    probes: Sequence[MemorisationProbe]

    def look(self, arrays: Mapping[str, NDArray[np.generic]], number: int) -> list[Memorised]:
        """What each of them found."""
        return [found for probe in self.probes for found in probe.look(arrays, number)]


def probe_of(federation: Federation, client: ClientSettings) -> MemorisationProbe | None:
    """Return whatever looks for memorisation in this run, as one probe; None if nothing was planted."""
    audit, task = federation.settings.audit, federation.task
    if audit is None or not audit.full:
        return None
    probes: list[MemorisationProbe] = []
    own = task.memorisation_probe() if isinstance(task, ProbedTask) else None
    if own is not None:
        probes.append(own)
    record, budget = client.record, federation.record_budget
    if record is not None and record.canaries and budget is not None:
        probes.append(RecordProbe(Path(record.ledger_dir), budget))
    if isinstance(task, Mislabelled):
        probes.append(OddProbe(task, budget))
    return Together(probes) if probes else None


def weighed(members: Scores, others: Scores, budget: Budget) -> tuple[float, Mapping[str, float]]:
    """The p-value of the claim, and what is shown beside it: the bound by Steinke et al. assumes nothing."""
    canaries = float(len(members) + len(others))
    try:
        methods = by_one_run(members, others, budget.target_delta)
    except Refusal:  # too few clients took part so far
        return 1.0, {"canaries": canaries}
    found = judge(methods, budget.target_epsilon, ALPHA).findings[0]
    looks = estimate(separation(members, others), budget.target_delta, ALPHA)
    shown = {
        "canaries": canaries,
        "claimed": budget.target_epsilon,
        "at_least": found.lower,
        "ceiling": found.ceiling,
        "estimate": looks.epsilon,
        "auc": auc(members, others).value,
    }
    mu = gaussian_mu(budget.target_epsilon, budget.target_delta)
    return accuracy_p(right_of_median(members, others), len(members) + len(others), mu), shown
