"""Cost of a sweep on real data: the joint cost of its runs on one ledger, and the cost of arms instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dp_accounting.dp_event import DpEvent

from ..base.refusal import Refusal
from ..configs.schema import CsvTask, CustomTask, NoPrivacy, SimulationSettings
from ..privacy.accounting.epsilon import GATE_INTERVAL, epsilon
from ..privacy.budget import Budget
from ..run.build import build
from ..run.unit_plan import plans_of

ACCEPTED = "--accept-sweep"


def require_accepted(jobs: Sequence[SimulationSettings]) -> None:
    """Refuse a sweep of private runs on real data, which all are charged to the same people.

    Raises:
      Refusal: saying what the runs cost together and what arms would; nothing was trained.
    """
    several = [each for each in jobs if isinstance(each.task, CsvTask | CustomTask)]
    several = [each for each in several if not isinstance(each.privacy, NoPrivacy)]
    if len(several) < 2:
        return
    federations = [build(each, announced=True) for each in several]
    real = [each for each in federations if not each.simulated]
    if len(real) < 2:
        return
    events: dict[Budget, Counter[DpEvent]] = {}
    for federation in real:
        for plan, budget, rounds in plans_of(federation):
            releases = 1 if plan.mechanism.rounds else rounds
            events.setdefault(budget, Counter())[plan.event()] += releases
    told: list[str] = []
    for budget, counts in events.items():
        together = epsilon(dict(counts), budget.target_delta, budget.adjacency, GATE_INTERVAL)
        told.append(
            f"epsilon {together:.3g} for one {budget.unit.replace('_', ' ')} at delta {budget.target_delta:g}"
        )
    remedy = (
        f"on real data each run is charged to the same people: as planned they cost {' and '.join(told)}, and the ledger "
        f"stops them at its budget; tune=learning_rate tune.values=[...] tries values on arms of the clients at the cost "
        f"of one run; budget.runs={len(real)} plans all of them within one budget; {ACCEPTED} runs them"
    )
    raise Refusal("-m", f"{len(real)} runs", remedy)
