"""``fedveil plan``: what a budget affords, before anything is trained."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..base.refusal import Refusal
from ..configs.schema import CsvTask, SimulationSettings
from ..modes.federation import Federation
from ..modes.mode import EVERYBODY
from ..privacy.budget import UNLIMITED_EPSILON, Budget
from ..privacy.plan import Plan
from ..run.build import build
from ..run.display import console_for
from ..run.queries import queries_of
from ..run.unit_plan import (
    curve,
    plans_of,
    questions_of,
    record_epsilon,
    tries_of,
    unit_plans,
    warnings_for,
)


def show_plan(settings: SimulationSettings, *, as_json: bool = False, plot: Path | None = None) -> int:
    """Print the plan, as JSON in one line if asked for, and return the exit code.

    Args:
      settings: of the run.
      as_json: print JSON.
      plot: picture of the guarantees to write; None for none.
    """
    federation = build(settings, announced=True)
    if plot is not None:
        _draw(federation, plot)
    if as_json:
        print(json.dumps(plain(federation), allow_nan=False))
        return 0
    for query in queries_of(federation.settings):
        query.plans(federation, "plan")  # refuses before anything is shown
    console = console_for(100)
    plans = list(plans_of(federation))
    if not plans:
        console.print("privacy=none: no guarantee; epsilon is infinite.", style="red")
    for number, (plan, budget, rounds) in enumerate(plans):
        if number:
            console.print()
        _show(console, federation, plan, budget, rounds)
    if isinstance(settings.task, CsvTask):
        console.print(_training(federation.settings))
    return 0


def _training(settings: SimulationSettings) -> str:
    rate, strategy = settings.local_training.learning_rate, settings.strategy.target or settings.strategy.name
    return f"Training: learning_rate {rate:g}, batch_size {settings.training.batch_size}, {strategy}."


def _draw(federation: Federation, plot: Path) -> None:
    from ..run.plots import draw_guarantees

    curves = {str(plan.unit): plan.curve(budget, rounds) for plan, budget, rounds in plans_of(federation)}
    if not curves:
        raise Refusal("--plot", str(plot), "privacy=none gives no guarantee to plot; choose another mode")
    try:
        draw_guarantees(curves, plot)
    except (OSError, ValueError) as problem:
        raise Refusal("--plot", str(plot), f"cannot be written: {problem}") from None


def _show(console: Console, federation: Federation, plan: Plan, budget: Budget, rounds: int) -> None:
    unlimited = budget.target_epsilon >= UNLIMITED_EPSILON
    target = "no target" if unlimited else f"epsilon {budget.target_epsilon:g}"
    console.print(
        f"[bold]Unit: one {plan.unit.replace('_', ' ')}[/bold]   {target} at delta {budget.target_delta:g}, {plan.adjacency}"
    )
    over = "sensitivity" if federation.mode.records_of_unit == 1 else "clip of one example"
    console.print(
        f"noise_multiplier {plan.noise_multiplier:.4f} (noise / {over}), clip {plan.clipping_norm:g}, "
        f"sampling: {plan.sampling.name}"
    )
    console.print(_how_counted(federation, plan, budget))
    if plan.mechanism.described:
        console.print(plan.mechanism.described)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rounds", justify="right")
    for adversary in EVERYBODY:
        table.add_column(f"epsilon to {adversary}", justify="right")
    for mark, value in curve(plan, budget.target_delta, rounds):
        told = [f"{value:.3f}" if adversary in plan.adversaries else "infinite" for adversary in EVERYBODY]
        table.add_row(str(mark), *told)
    console.print(table)
    if federation.mode.own_budget and plan.unit == federation.mode.own_budget.unit:
        console.print(
            f"Rounds are those in which one client takes part, likely at most {rounds} of the run's "
            f"{federation.settings.num_rounds}."
        )
    if not unlimited:
        affordable = plan.affordable_rounds(budget, questions_of(federation, plan))
        ends = "; the run ends there" if affordable < rounds else ""
        console.print(f"At this noise the budget affords {affordable} rounds{ends}.")
    if (runs := federation.settings.budget.runs) > 1:
        beside = questions_of(federation, plan)
        once, all_of_them = (
            plan.epsilon(budget.target_delta, rounds * each, beside * each) for each in (1, runs)
        )
        console.print(f"Each of {runs} runs costs epsilon {once:.3f}, and all together {all_of_them:.3f}.")
    if (asked := federation.settings.tuned) is not None:
        tries, whole = tries_of(federation, plan, budget, rounds)
        once, arms = plan.epsilon(budget.target_delta, rounds), federation.settings.tuning_rounds
        each = "round" if arms == 1 else f"{arms} rounds"
        console.print(
            f"Tuning: {tries} arms of the clients try {asked.name} for {each} each, and the best continues with all. One client is "
            f"in one arm: epsilon {once:.3f}. As many whole runs would cost {whole:.3f}."
        )
    queries = queries_of(federation.settings)
    for line in (line for query in queries if query.first for line in query.lines(federation, plan, budget)):
        console.print(line)
    if (lost := record_epsilon(federation, plan, budget.target_delta, rounds)) is not None:
        console.print(
            f"Each record of a client loses up to epsilon {lost:.3f} by these sums: it may turn the vector around."
        )
    if plan.unit == "client":
        console.print(_metrics(federation, plan))
    for line in (
        line for query in queries if not query.first for line in query.lines(federation, plan, budget)
    ):
        console.print(line)
    for sentence in warnings_for(federation, plan, budget):
        console.print(sentence, style="yellow")


def _how_counted(federation: Federation, plan: Plan, budget: Budget) -> str:
    accountant = plan.accountant(budget.target_delta)
    if plan.filter_order is not None:
        return f"Noise is chosen adaptively: {accountant}. The guarantee is the whole budget."
    adapts = plan.unit == "client" and federation.mode.adapts_clip
    clip = "; the clip adapts, and the noise with it" if adapts else ""
    return f"Fixed in advance{clip}: {accountant}."


def _metrics(federation: Federation, plan: Plan) -> str:
    share = federation.mode.metrics_share(plan)
    if share == 0:
        return "No metrics leave a client."
    cost = f"they cost the update {1 - math.sqrt(1 - share):.1%} of its norm; metrics_share=0 leaves them out"
    return f"Loss and count are part of the sum, under the same noise: {cost}."


def _spelled(value: float) -> float | str:
    return value if math.isfinite(value) else "infinity"


def plain(federation: Federation) -> list[dict[str, Any]]:
    """Return the plan of each unit as plain data, with a word for the number that JSON does not have."""
    return [
        asdict(each)
        | {
            "epsilon": [(mark, _spelled(value)) for mark, value in each.epsilon],
            "runs_epsilon": _spelled(each.runs_epsilon),
            "tries_epsilon": _spelled(each.tries_epsilon),
            "record_epsilon": each.record_epsilon and _spelled(each.record_epsilon),
            "curve": each.curve.to_json(),
            "learning_rate": federation.settings.local_training.learning_rate,
        }
        for each in unit_plans(federation)
    ]
