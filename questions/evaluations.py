"""Evaluations at the clients, of a run and of `protect()`: their default noise, their cost, and their resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..base.refusal import Refusal, real
from ..privacy.accounting.epsilon import PUBLISH_INTERVAL
from ..privacy.accounting.renyi_filter import spent_epsilon
from ..privacy.plan import Plan
from ..privacy.statistics.evaluation import CLIENTS, FIGURES, RECORDS, Evaluation
from ..privacy.statistics.figure import Figure

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

USUAL_NOISE = 5.0  # adds epsilon 0.10 to 3 at delta 1e-4, and gives the mean of 400 clients to 1.2 points


@dataclass(frozen=True)
class ClientEvaluation:
    """Evaluation at the clients of a user's Flower app, for `protect`.

    Attributes:
      metric: that the app's evaluation function reports, in [0, bound].
      every: rounds between evaluations, with one after the last round; None evaluates only after the last round.
      bound: of the metric; values outside are clipped.
      figures: to measure, with equal parts of the norm.
      noise_multiplier: of one evaluation; None takes 5 times the square root of their number.
      resolution: largest half-width of the mean metric's interval; None sets no limit.

    Example:
      >>> import fedveil as fv
      >>> fv.ClientEvaluation("eval_acc", every=5).rounds(12)
      (5, 10, 12)
    """

    metric: str
    every: int | None = None
    bound: float = 1.0
    figures: tuple[str, ...] = FIGURES
    noise_multiplier: float | None = None
    resolution: float | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise Refusal("evaluate.every", self.every, "give at least 1, or None")
        for name in ("noise_multiplier", "resolution"):
            value: float | None = getattr(self, name)
            if value is not None and real(f"evaluate.{name}", value) <= 0:
                raise Refusal(f"evaluate.{name}", value, "give a number above 0, or None")
        _ = self.asked("evaluation")  # refuses the rest

    def rounds(self, num_rounds: int) -> tuple[int, ...]:
        """Return the rounds after which clients evaluate, in a run of so many."""
        return multiples_and_last(self.every or num_rounds, num_rounds)

    def asked(self, name: str) -> Evaluation:
        """Return the evaluation, in a release of this name; the clients' app chooses the records."""
        return Evaluation(name, None, self.metric, self.bound, self.figures)


def multiples_and_last(interval: int, last: int) -> tuple[int, ...]:
    """Return the multiples of `interval` up to the last round, and the last round."""
    return tuple(sorted({*range(interval, last + 1, interval), last}))


def noise_of(noise_multiplier: float | None, evaluations: int) -> float:
    """Return the noise multiplier of each evaluation; by default all together cost as much as one at `USUAL_NOISE`.

    Args:
      noise_multiplier: by the user; None for the default.
      evaluations: number of evaluations in a run.
    """
    if noise_multiplier is not None:
        return noise_multiplier
    return USUAL_NOISE * math.sqrt(max(evaluations, 1))


def events_of(plan: Plan, evaluations: int) -> list[DpEvent]:
    """Return the events of so many evaluations, each with this plan."""
    from dp_accounting.dp_event import SelfComposedDpEvent

    return [SelfComposedDpEvent(plan.event(), evaluations)] if evaluations else []


def epsilon_of(plan: Plan, delta: float) -> float:
    """Return the epsilon of one release of this plan alone."""
    return spent_epsilon([plan.event()], delta, plan.adjacency, None, PUBLISH_INTERVAL)


def planned_half_width(
    evaluation: Evaluation, plan: Plan, clients: int, resolution: float | None, delta: float
) -> float | None:
    """Return the largest half-width of the mean metric's interval; None if the metric is not among the figures.

    Args:
      evaluation: the question.
      plan: of one evaluation.
      clients: number of clients or, at the record level, of held-out records.
      resolution: largest allowed half-width; None allows any.
      delta: of the epsilon that the remedy names, in (0, 1).

    Raises:
      Refusal: the half-width is larger; the remedy names sufficient clients, or a sufficient noise and its epsilon.
    """
    half_width = evaluation.half_width(plan.noise_over_clip, clients)
    if resolution is None:
        return half_width
    if half_width is None:
        remedy = "needs the mean metric; add metric to evaluate.figures"
        raise Refusal("evaluate.resolution", resolution, remedy)
    if half_width > resolution:
        noise = plan.noise * resolution / half_width
        enough = epsilon_of(replace(plan, noise_multiplier=noise), delta)
        remedy = (
            f"is planned to +-{half_width:.3g}; {math.ceil(clients * half_width / resolution)} {evaluation.unit_name} would suffice, or "
            f"evaluate.noise_multiplier={noise:.3g}, with which an evaluation costs epsilon {enough:.3g} by itself"
        )
        raise Refusal("evaluate.resolution", resolution, remedy)
    return half_width


def means_of(answers: Mapping[str, list[Figure]]) -> dict[str, Figure]:
    """Return an evaluation's means by name, without those lost in the noise; a mean is its answer's first figure."""
    first_figures = {name: figures[0] for name, figures in answers.items() if name not in (CLIENTS, RECORDS)}
    return {name: each for name, each in first_figures.items() if each.name == name and each.has_value}
