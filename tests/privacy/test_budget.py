"""Budgets and releases refuse what would make a guarantee meaningless."""

import math
import subprocess
import sys

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent

from fedveil import privacy
from fedveil.privacy import Adjacency, Adversary, Budget, Refusal, Release, Unit


@pytest.mark.parametrize("target", [0, -1.0, math.nan, math.inf, 10**400, True, "3", None])
def test_a_target_epsilon_is_finite_and_positive(target) -> None:
    with pytest.raises(Refusal, match="target_epsilon"):
        Budget(Unit.CLIENT, target, 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-9, 2, math.nan, "1e-5"])
def test_a_target_delta_is_a_probability(delta) -> None:
    with pytest.raises(Refusal, match="target_delta"):
        Budget(Unit.CLIENT, 1.0, delta)


def test_words_are_read_and_unknown_ones_refused() -> None:
    budget = Budget("record", np.float32(2), 1e-5, "replace-one")  # type: ignore[arg-type]
    assert budget == Budget(Unit.RECORD, 2.0, 1e-5, Adjacency.REPLACE_ONE)
    assert type(budget.target_epsilon) is float
    with pytest.raises(Refusal, match="record, person, person_everywhere, client"):
        Budget("user", 1.0, 1e-5)  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="zero-out"):
        Budget(Unit.RECORD, 1.0, 1e-5, "swap")  # type: ignore[arg-type]


def test_zero_out_is_the_default_adjacency() -> None:
    assert Budget(Unit.CLIENT, 1.0, 1e-5).adjacency is Adjacency.ZERO_OUT


def test_release_is_identified_by_run_round_and_mechanism() -> None:
    events = {Adversary.MODEL: GaussianDpEvent(1.0)}
    release = Release(Unit.CLIENT, "run", 3, "private-sum", events, "system")
    assert release.key == ("run", 3, "private-sum")
    events.clear()
    assert release.events == {Adversary.MODEL: GaussianDpEvent(1.0)}


def test_a_release_without_cost_or_with_unknown_randomness_is_refused() -> None:
    with pytest.raises(Refusal, match="events"):
        Release(Unit.CLIENT, "run", 1, "sum", {}, "system")
    with pytest.raises(Refusal, match="rng"):
        Release(Unit.CLIENT, "run", 1, "sum", {Adversary.MODEL: GaussianDpEvent(1.0)}, "numpy")
    with pytest.raises(Refusal, match="adversary"):
        Release(Unit.CLIENT, "run", 1, "sum", {"neighbour": GaussianDpEvent(1.0)}, "system")  # type: ignore[dict-item]


def test_the_face_is_sorted_and_complete() -> None:
    assert privacy.__all__ == sorted(privacy.__all__)
    assert all(hasattr(privacy, name) for name in privacy.__all__)


def test_the_face_loads_neither_torch_nor_the_accountant() -> None:
    code = (
        "import sys, fedveil.privacy; sys.exit(bool({'torch', 'dp_accounting', 'flwr'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
