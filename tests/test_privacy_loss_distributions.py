"""Composed loss distributions are those of dp_accounting, whose own code would load half of SciPy for them."""

import itertools
from typing import Any

import numpy as np
from dp_accounting.dp_event import DpEvent, GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent

from fedveil.privacy.accounting.loss_distributions import distribution
from fedveil.privacy.accounting.renyi import relation_of
from fedveil.privacy.budget import Adjacency

INTERVAL = 1e-3
LEAVES: tuple[DpEvent, ...] = (
    GaussianDpEvent(0.9),
    PoissonSampledDpEvent(0.2, GaussianDpEvent(1.1)),
    PoissonSampledDpEvent(0.01, GaussianDpEvent(3.0)),
    PoissonSampledDpEvent(0.5, LaplaceDpEvent(2.0)),
)


def losses_of(*leaves: Any) -> Any:
    counts: Any = tuple((leaf, 1) for leaf in leaves)
    return distribution(counts, relation_of(Adjacency.ADD_OR_REMOVE_ONE), INTERVAL)


def test_what_is_composed_is_dp_accountings_own_bit_for_bit() -> None:
    for first, second in itertools.permutations(LEAVES, 2):
        theirs, ours = losses_of(first).compose(losses_of(second)), losses_of(first, second)
        for side in ("_pmf_remove", "_pmf_add"):
            one, other = vars(theirs)[side], vars(ours)[side]
            assert (one._lower_loss, one._infinity_mass) == (other._lower_loss, other._infinity_mass)
            assert np.array_equal(one._probs, other._probs)
