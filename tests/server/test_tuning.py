"""Arms take turns, the best one wins, and its averaged model is compared."""

import math
from dataclasses import replace

import pytest

from fedveil.base.refusal import Refusal
from fedveil.privacy.arms import ArmDeal
from fedveil.server.tuning import Tuning

DEAL = ArmDeal("5e" * 16, 3)
TUNING = Tuning("learning_rate", (0.1, 1.0, 5.0), 2, 5, DEAL)


def test_arms_take_turns_and_then_all_clients_go_on() -> None:
    arms = [TUNING.arm_of(number) for number in range(1, 10)]
    assert [arm and arm.number for arm in arms] == [1, 2, 3, 1, 2, 3, None, None, None]
    assert [TUNING.round_of(number) for number in range(1, 10)] == [1, 1, 1, 2, 2, 2, 3, 4, 5]
    assert [TUNING.value_in(number, 2) for number in (1, 2, 3, 7)] == [0.1, 1.0, 5.0, 1.0]


def test_the_best_model_wins_and_one_that_diverged_does_not() -> None:
    found = [{"accuracy": value, "loss": 1 - value} for value in (0.5, 0.6, math.nan, 0.6)]
    scores = [TUNING.score(each) for each in found]
    assert scores == [0.5, 0.6, -math.inf, 0.6] and TUNING.winner(scores) == 2
    by_loss = replace(TUNING, metric="loss")
    assert by_loss.score({"accuracy": 0.9, "loss": 0.4}) == -0.4
    assert TUNING.metric_in({"perplexity": 3.0, "loss": 1.1}) == "loss"
    with pytest.raises(Refusal, match="the task reports accuracy, loss"):
        replace(TUNING, metric="auc").score(found[0])


def test_the_models_of_the_last_half_of_an_arms_rounds_are_averaged() -> None:
    longer = replace(TUNING, rounds=4, num_rounds=9)
    assert [number for number in range(1, 13) if longer.counts(number)] == [7, 8, 9, 10, 11, 12]
    assert [number for number in range(1, 7) if TUNING.counts(number)] == [4, 5, 6]
