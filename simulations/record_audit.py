"""The audit of record-level privacy in a simulation: what the clients' own canaries show, weighed against the claim.

The p-value is that of the guesses at the median (`accuracy_p`), for canaries whose noise is independent, as that of weights
is. It takes the Gaussian curve through (epsilon, delta); batches drawn in secret have a heavier tail, and so lie below
that curve where guesses are made at the median, which a test holds on a grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..client.record_canaries import SUFFIX, gathered
from ..privacy.audit.curves import gaussian_mu
from ..privacy.audit.gaussian_test import accuracy_p, estimate, right_of_median, separation
from ..privacy.audit.membership import auc
from ..privacy.audit.one_run import Scores
from ..privacy.audit.probe import Memorised
from ..privacy.audit.verdict import by_one_run, judge
from ..privacy.budget import Budget
from ..privacy.refusal import Refusal

MOST = 1000  # canaries of all clients together; more cost time and say little more
SHARE = 0.25  # of the smallest client's records, at most: what trains beside them is not to drown
NAME = "record_canaries"
ALPHA = 0.05  # of the bound and of the interval that are shown


def canaries_of_each(num_clients: int, smallest: int) -> int:
    """How many canaries each client gets, at least one; `smallest` is the fewest records that a client has."""
    return max(1, min(-(-MOST // num_clients), int(SHARE * smallest)))


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
