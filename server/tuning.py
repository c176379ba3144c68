"""Tuning of a run: the arm and the value of each sum, and the value that all clients continue with.

The arms take turns, one sum each, until every arm has had its rounds. Their releases are public, so the choice among
them is post-processing; it is made once, and all clients take part in the later rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.refusal import Refusal
from ..privacy.arms import Arm, ArmDeal

LOSS, ACCURACY = "loss", "accuracy"
# Share of an arm's rounds, the last ones, whose averaged models are compared: docs/evidence/accuracy.md.
AVERAGED = 1 / 2


@dataclass(frozen=True)
class Tuning:
    """Schedule and choice of a tuning run.

    Attributes:
      setting: the tuned key.
      values: to try, one in each arm, at least 2; none without tuning.
      rounds: of each arm, at least 1; 0 without tuning.
      num_rounds: of one client: those of its arm, and the later ones of all clients.
      deal: of the clients into arms.
      metric: by which arms are compared; None takes the accuracy if the task has one, else the loss.
      norm_of: the value at which a contribution has the norm of the plan; None if the norm does not depend on the
        value.
    """

    setting: str
    values: tuple[float, ...]
    rounds: int
    num_rounds: int
    deal: ArmDeal
    metric: str | None = None
    norm_of: float | None = None

    @property
    def arms(self) -> int:
        """Number of arms; 1 without tuning."""
        return max(1, len(self.values))

    @property
    def key(self) -> str | None:
        """Key of the deal; None without tuning."""
        return self.deal.key if self.values else None

    @property
    def last(self) -> int:
        """Number of the last sum of an arm; later sums are of all clients."""
        return len(self.values) * self.rounds

    def arm_of(self, number: int) -> Arm | None:
        """Return the arm of a sum, counted from 1; None for a sum of all clients."""
        return None if number > self.last else self.deal.arm((number - 1) % len(self.values) + 1)

    def round_of(self, number: int) -> int:
        """Return the round of a sum, counted from 1, as its participants count: an arm's clients skip other arms' sums."""
        arms = len(self.values)
        return (number - 1) // arms + 1 if number <= self.last else number - (arms - 1) * self.rounds

    def value_in(self, number: int, winner: int | None) -> float:
        """Return the value with which a sum is trained.

        Args:
          number: of the sum, from 1.
          winner: number of the winning arm; None before the last arm's last sum.
        """
        arm = self.arm_of(number)
        number_of_arm = winner if arm is None else arm.number
        assert number_of_arm is not None  # chosen with the last arm's last sum
        return self.values[number_of_arm - 1]

    def norm_factor(self, number: int, winner: int | None) -> float:
        """Return the ratio of a contribution's norm in a sum to the plan's norm. Arguments as of `value_in`."""
        return 1.0 if self.norm_of is None else self.value_in(number, winner) / self.norm_of

    def counts(self, number: int) -> bool:
        """Return whether the model after a sum, counted from 1, is averaged for its arm's score."""
        return self.round_of(number) > self.rounds - max(1, round(self.rounds * AVERAGED))

    def score(self, metrics: Mapping[str, float]) -> float:
        """Return the score of a model, higher is better; minus infinity for a diverged one."""
        name = self.metric_in(metrics)
        if name not in metrics:
            raise Refusal("tune.metric", name, f"the task reports {', '.join(metrics)}")
        value = metrics[name]
        if not math.isfinite(value):
            return -math.inf
        return -value if name == LOSS else value

    def metric_in(self, metrics: Mapping[str, Any]) -> str:
        """Return the name of the deciding metric among those that the task reports."""
        return self.metric or (ACCURACY if ACCURACY in metrics else LOSS)

    def winner(self, scores: Sequence[float]) -> int:
        """Return the number of the arm with the highest score; ties go to the first."""
        return max(range(len(scores)), key=scores.__getitem__) + 1


# All clients train with one value, in every round.
NO_TUNING = Tuning("", (), 0, 0, ArmDeal("0" * 32, 2))
