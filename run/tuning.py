"""Tuning of a federation's run: its arms, their values in each round's order, and the choice in the result."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..base.refusal import Refusal
from ..messages.local_training import Schedule
from ..messages.training_order import ORDER_KEY, TrainingOrder
from ..modes.federation import Federation
from ..privacy.arms import ArmDeal
from ..server.checkpoint import State
from ..server.tuning import LOSS, NO_TUNING, Tuning
from ..strategies.cohorts import in_arm, invited_size
from ..tasks.batch_memory import answers
from ..tasks.data import derived, figures_of, held_out_of
from ..tasks.protocol import Task
from .prepared_run import Run
from .queries import queries_of
from .round_lines import History

KEY_BYTES = 16
CHARGED = ("epsilon", "noise_multiplier", "confidence")  # fields of an evaluation in a result


def tuning_of(federation: Federation, deal: str | None = None) -> Tuning:
    """Return the tuning in the settings.

    Args:
      federation: the federation that runs.
      deal: key of the deal of clients into arms by an earlier process; None makes a new deal.

    Raises:
      Refusal: there are no public data to compare values on.
    """
    settings = federation.settings
    if not settings.tried:
        return NO_TUNING
    has_public_data = federation.held_out_public and len(held_out_of(federation.task))
    if not settings.scored_at_clients and not has_public_data:
        remedy = "values are compared on public held-out data, and there are none, or they count as private: set task.held_out=public if they are public, or tune.score=clients"
        raise Refusal("tune", settings.tune.name, remedy)
    key = deal or federation.randomness.stream("deal").bytes(KEY_BYTES).hex()
    metrics = (query.metric(settings) for query in queries_of(settings))
    tuning = Tuning(
        setting=settings.tune.name,
        values=settings.tried,
        rounds=settings.tuning_rounds,
        num_rounds=settings.num_rounds,
        deal=ArmDeal(key, len(settings.tried)),
        metric=next(filter(None, metrics), settings.tune.metric),
        norm_of=federation.mode.tuned_norm,
    )
    if not settings.scored_at_clients:
        tuning.score(
            _reported(federation.task, settings.engine.examples_at_once)
        )  # refuses a metric that the task does not report
    return tuning


def _reported(task: Task, limit: str) -> dict[str, float]:
    """Return the metrics of the initial model on the first held-out examples, of which `limit` are in memory at a time."""
    with torch.no_grad():
        outputs, targets = next(answers(task.model().eval(), held_out_of(task), limit))
    return derived(task, figures_of(task, outputs, targets) | {LOSS: float(task.loss(outputs, targets))})


def require_arms(federation: Federation, tuning: Tuning) -> None:
    """Refuse arms without clients, or with too few for an encrypted sum to hide each; the sentence names the arm."""
    if not tuning.values:
        return
    names = federation.population.names
    clients = map(str, range(federation.num_clients)) if names is None else names.values()
    sizes = Counter(tuning.deal.arm_of(name) for name in clients)
    cohort = in_arm(federation.cohort, tuning.deal.arms)
    for number in range(1, len(tuning.values) + 1):
        try:
            if not sizes[number]:
                raise Refusal("tune.values", list(tuning.values), "an arm has no client; try fewer values")
            federation.check_sum(round(invited_size(cohort, sizes[number])))
            if federation.settings.scored_at_clients:  # by all clients of the arm
                federation.check_sum(sizes[number])
        except Refusal as refusal:
            remedy = f"arm {number} has {sizes[number]} clients ({refusal.remedy}); try fewer values"
            raise Refusal("tune.values", list(tuning.values), remedy) from refusal


def order_of_round(run: Run, order: Mapping[str, str], state: State) -> Mapping[str, str]:
    """Return the training order of the round after a state.

    Args:
      run: gives the tuning and the training.
      order: order as of `order_of`, which a run without tuning sends in every round.
      state: state after the round before.
    """
    settings, tuning = run.federation.settings, run.tuning
    if not tuning.values:
        return order
    number = state.round + 1
    trained = settings.tune.in_training(settings.local_training, tuning.value_in(number, state.winner))
    # Clients would apply the schedule by the sum's number, which counts the rounds of all arms: it is applied here.
    training = replace(trained.in_round(tuning.round_of(number)), schedule=Schedule())
    usual = TrainingOrder.from_json(order[ORDER_KEY])
    return {**order, ORDER_KEY: replace(usual, training=training, arm=tuning.arm_of(number)).to_json()}


def tuning_result(run: Run, state: State, history: History) -> dict[str, Any] | None:
    """Return the tried values and the winner; None without tuning."""
    tuning = run.tuning
    if not tuning.values:
        return None
    scores = state.scores or (None,) * len(tuning.values)
    records = next((row["scores"] for row in history if "scores" in row), None)
    return {
        "key": tuning.setting,
        "rounds": tuning.rounds,
        "metric": tuning.metric_in(history.last) if history else tuning.metric,
        "deal": tuning.deal.key,
        "arms": [
            {"arm": number, "value": value, "score": None if score is None or math.isinf(score) else score}
            | ({} if records is None else _interval(records[number - 1]))
            for number, (value, score) in enumerate(zip(tuning.values, scores, strict=True), 1)
        ],
        "winner": state.winner,
        "value": None if state.winner is None else tuning.values[state.winner - 1],
        **({} if records is None else charged_scores(records, state.winner)),
    }


def charged_scores(records: Sequence[Mapping[str, Any]], winner: int | None) -> dict[str, Any]:
    """Return a client's cost of the arms' evaluations, and whether the winner's lead over the others exceeds the noise.

    Args:
      records: records of the arms' evaluations, in the arms' order.
      winner: number of the winning arm; None if no arm has won.
    """
    figures = {each["arm"]: score_of(each) for each in records if each["answers"]}
    best = figures.pop(winner, {"value": None})
    scored = best["value"] is not None and len(figures) == len(records) - 1
    apart = scored and all(_above(best, other) for other in figures.values())
    return {"scored_by": "clients", "apart": apart} | {key: records[0].get(key) for key in CHARGED}


def _above(best: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether a figure exceeds another estimated one by more than the 95 % interval of their difference."""
    if other["value"] is None:
        return False
    halves = [max(each["value"] - each["low"], each["high"] - each["value"]) for each in (best, other)]
    return best["value"] - other["value"] > math.hypot(*halves)


def score_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the score in the record of an arm's evaluation, with its interval; empty if its clients did not answer."""
    return record["answers"][0]["figures"][0] if record["answers"] else {}


def _interval(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ends of the interval of an arm's score, None without an estimate, and the number of its clients."""
    score = score_of(record)
    return {"low": score.get("low"), "high": score.get("high"), "clients": record.get("clients")}
