"""Who is drawn for a round and who is asked: canaries change nothing for the real clients."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.server.participants import Participants
from fedveil.server.round import ALL_ANSWERS
from fedveil.strategies.cohorts import All, Cohort, Fixed, MinSeparation, OverSelected, Poisson, beside

REAL = list(range(2, 42))


class Reached:
    """A grid that reaches these nodes."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self.nodes = nodes

    def get_node_ids(self) -> Sequence[int]:
        return self.nodes


def participants(cohort: Cohort, canaries: int, here: bool) -> Participants:
    nodes: Any = Reached(REAL if here else [*REAL, *range(42, 42 + canaries)])
    answering = (lambda *_: None) if here else None
    return Participants(nodes, cohort, len(REAL), canaries=canaries, add_canaries=answering)


def draws(cohort: Cohort, canaries: int, here: bool = True) -> tuple[Participants, list[list[int]]]:
    made = participants(cohort, canaries, here)
    return made, [made.draw(Randomness(3).stream("cohort", number)) for number in range(200)]


@pytest.mark.parametrize("here", [True, False], ids=["in this process", "on the grid"])
@pytest.mark.parametrize(
    "cohort", [Poisson(0.3), Fixed(8), All(), OverSelected(Fixed(12), Fixed(8))], ids=lambda each: each.name
)
def test_real_clients_are_drawn_as_without_canaries_who_are_drawn_as_often(
    cohort: Cohort, here: bool
) -> None:
    _, plain = draws(cohort, 0)
    made, drawn = draws(cohort, 80, here)
    assert [made.real(each) for each in drawn] == plain
    dummies = [made.dummies(each) for each in drawn]
    assert all(each == sorted(set(each)) and set(each) <= set(range(80)) for each in dummies)
    rates = [np.mean([len(each) / of for each in cohorts]) for cohorts, of in ((plain, 40), (dummies, 80))]
    assert rates[1] == pytest.approx(rates[0], abs=0.02)
    assert made.expected == cohort.expected_size(40)
    asked = [made.asked(each) for each in drawn]
    assert asked == (plain if here else drawn)


def test_canaries_stay_who_they_are_when_clients_come_and_go() -> None:
    made = participants(Fixed(8), 80, here=True)
    before = made.draw(Randomness(1).stream("cohort", 1))
    made.renew([*REAL, 10**9], ALL_ANSWERS)
    made.renew(REAL[:16], ALL_ANSWERS)
    after = made.draw(Randomness(1).stream("cohort", 1))
    assert len(made.dummies(before)) == 16 and len(made.dummies(after)) == 40  # one of five, then one of two
    assert set(made.real(after)) <= set(REAL[:16]) and made.some(3) == REAL[:3]


def test_a_rule_with_a_size_is_scaled_and_always_draws_one() -> None:
    assert beside(Fixed(10), 100, 30) == Fixed(3) == beside(OverSelected(Fixed(10), Fixed(5)), 100, 30)
    assert beside(Fixed(1), 100, 30) == Fixed(1)
    assert beside(MinSeparation(10, 4, 2), 100, 50) == MinSeparation(5, 4, 2)
    assert beside(OverSelected(Poisson(0.5), Poisson(0.2)), 100, 30) == Poisson(0.5)
