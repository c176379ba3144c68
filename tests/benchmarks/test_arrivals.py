"""Figures of cohorts by arrival: the time to an accuracy, and what is said of runs that never have it."""

import pytest

from fedveil.benchmarks.arrivals import ARMS, COMMON, summary, time_to
from fedveil.configs.settings import settings_from_overrides

RUN = {"times": [2.0, 3.0, 5.0], "accuracies": [0.5, 0.9, 0.8]}


def test_time_to_an_accuracy_is_that_of_all_rounds_so_far() -> None:
    assert (time_to(RUN, 0.5), time_to(RUN, 0.9), time_to(RUN, 0.95)) == (2.0, 5.0, None)


def test_run_without_the_accuracy_is_never_there() -> None:
    assert summary([RUN], 0.9) == ("5", "73.3%", "10")
    assert summary([RUN, {**RUN, "accuracies": [0.1, 0.2, 0.3]}], 0.9)[0] == "never"


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_can_be_run(arm: str) -> None:
    assert settings_from_overrides([*COMMON, *ARMS[arm]]).speed.any
