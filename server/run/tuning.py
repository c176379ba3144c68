"""Tuning of a federation's run: its arms, what each round's order says of them, and what the result tells of the choice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...configs.local_training import Schedule
from ...privacy.arms import ArmDeal
from ...privacy.refusal import Refusal
from ...strategies.cohorts import in_arm, invited_size
from ...strategies.training_order import ORDER_KEY, TrainingOrder
from ...tasks.data import batches_of, figures_of, held_out_of, run_on
from ...tasks.protocol import Task
from ..checkpoint import State
from ..tuning import LOSS, Tuning
from .evaluation_plan import scored_metric
from .federation import Federation, Run

KEY_BYTES = 16
CHARGED = ("epsilon", "noise_multiplier", "confidence")  # of an evaluation, as a result tells it


def tuning_of(federation: Federation, deal: str | None = None) -> Tuning | None:
    """Return the tuning that the settings ask for; None where they ask for none.

    Args:
      federation: its parts.
      deal: key of the arms, as an earlier process of the run dealt the clients; None deals anew.

    Raises:
      Refusal: there is nothing public by which values could be compared.
    """
    settings = federation.settings
    asked = settings.tuned
    if asked is None:
        return None
    if not settings.scored_at_clients and not (
        federation.held_out_public and len(held_out_of(federation.task))
    ):
        remedy = "values are compared on public held-out data, and there are none, or they count as private: task.held_out=public if they are not, or tune.score=clients"
        raise Refusal("tune", asked.name, remedy)
    tuning = Tuning(
        asked.name,
        settings.tried,
        settings.tuning_rounds,
        settings.num_rounds,
        ArmDeal(deal or federation.randomness.stream("deal").bytes(KEY_BYTES).hex(), len(settings.tried)),
        scored_metric(settings) if settings.scored_at_clients else asked.metric,
        federation.tuned_norm,
    )
    if not settings.scored_at_clients:
        tuning.score(_reported(federation.task))  # refuses a metric that the task does not report
    return tuning


def _reported(task: Task) -> dict[str, float]:
    """Return what is measured of a model, of the first one on a batch of held-out examples."""
    for inputs, targets in batches_of(held_out_of(task)):
        with torch.no_grad():
            outputs = run_on(task.model().eval(), inputs)
        return {**figures_of(task, outputs, targets), LOSS: float(task.loss(outputs, targets))}
    return {}


def require_arms(federation: Federation, tuning: Tuning) -> None:
    """Refuse arms of which one has no client, or too few for an encrypted sum to hide one behind the others.

    Raises:
      Refusal: naming the arm.
    """
    names = names_of(federation)
    every = map(str, range(federation.num_clients)) if names is None else names.values()
    sizes = Counter(tuning.deal.arm_of(name) for name in every)
    cohort = in_arm(federation.cohort, tuning.deal.arms)
    for number in range(1, tuning.deal.arms + 1):
        invited = round(invited_size(cohort, sizes[number])) if sizes[number] else 0
        try:
            if not sizes[number]:
                raise Refusal("tune.values", list(tuning.values), "nobody is in one of so many arms")
            if federation.masking is not None:
                federation.masking.shape(invited)
            if federation.masking is not None and federation.settings.scored_at_clients:
                federation.masking.shape(sizes[number])
        except Refusal as refusal:
            remedy = f"arm {number} has {sizes[number]} clients ({refusal.remedy}); try fewer values"
            raise Refusal("tune.values", list(tuning.values), remedy) from refusal


def names_of(federation: Federation) -> dict[int, str] | None:
    """Return the clients' names by node, as the roster has them; a simulation's clients go by their places."""
    if federation.deployed is None:
        return None
    return {member.node: member.name for member in federation.deployed.roster.members}


def tuned_order(run: Run, order: Mapping[str, str], state: State) -> Mapping[str, str]:
    """Return what travels to the clients in the round after a state.

    Args:
      run: its tuning and training.
      order: as it is in every round of a run that tunes nothing.
      state: after the round before.
    """
    tuning, asked = run.tuning, run.federation.settings.tuned
    if tuning is None or asked is None:
        return order
    number = state.round + 1
    trained = asked.in_training(run.federation.settings.local_training, tuning.value_in(number, state.winner))
    # The schedule goes by the rounds that a client has, and a sum's number by those of all arms.
    training = replace(trained.in_round(tuning.round_of(number)), schedule=Schedule())
    told = replace(TrainingOrder.from_json(order[ORDER_KEY]), training=training, arm=tuning.arm_of(number))
    return {**order, ORDER_KEY: told.to_json()}


def tuned(run: Run, state: State, history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what was tried and which value went on; None where nothing is tuned."""
    tuning = run.tuning
    if tuning is None:
        return None
    scores = state.scores or (None,) * len(tuning.values)
    asked = next((row["scores"] for row in history if "scores" in row), None)
    return {
        "key": tuning.setting,
        "rounds": tuning.rounds,
        "metric": tuning.metric_in(history[-1]) if history else tuning.metric,
        "deal": tuning.deal.key,
        "arms": [
            {"arm": number, "value": value, "score": None if score is None or math.isinf(score) else score}
            | ({} if asked is None else _interval(asked[number - 1]))
            for number, (value, score) in enumerate(zip(tuning.values, scores, strict=True), 1)
        ],
        "winner": state.winner,
        "value": None if state.winner is None else tuning.values[state.winner - 1],
        **({} if asked is None else charged_scores(asked, state.winner)),
    }


def charged_scores(records: Sequence[Mapping[str, Any]], winner: int | None) -> dict[str, Any]:
    """Return what evaluations of arms cost a client, and whether the winner leads all others, scored too, by more than noise.

    Args:
      records: of each arm, what its clients said.
      winner: number of the arm that has won; None before.
    """
    figures = {each["arm"]: each["answers"][0]["figures"][0] for each in records if each["answers"]}
    best = figures.pop(winner, {"value": None})
    scored = best["value"] is not None and len(figures) == len(records) - 1
    apart = scored and all(_above(best, other) for other in figures.values())
    return {"scored_by": "clients", "apart": apart} | {key: records[0].get(key) for key in CHARGED}


def _above(best: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether a figure is above another, which can be said, by more than the 95 % interval of their difference."""
    if other["value"] is None:
        return False
    halves = [max(each["value"] - each["low"], each["high"] - each["value"]) for each in (best, other)]
    return best["value"] - other["value"] > math.hypot(*halves)


def _interval(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ends of the interval of an arm's score, None where it cannot be said, and how many clients said it."""
    figure = record["answers"][0]["figures"][0] if record["answers"] else {}
    return {"low": figure.get("low"), "high": figure.get("high"), "clients": record.get("clients")}
