"""Plan of a run before anything is trained: what its budget affords, the predicted accuracy, and the cost of a sweep."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_accounting.dp_event import DpEvent
from rich.console import Console
from rich.table import Table

from ..base.bounded_decoding import json_number
from ..base.refusal import Refusal
from ..configs.compose import Job
from ..configs.privacy_settings import NoPrivacy, PrivacyLevel, record_level
from ..configs.schema import SimulationSettings
from ..configs.settings import settings_from_overrides
from ..configs.task_settings import AUTO, CsvTask, CustomTask, FolderTask
from ..messages.training_order import ModeName
from ..modes.federation import Federation
from ..modes.mode import EVERYBODY
from ..privacy.accounting.epsilon import GATE_INTERVAL, epsilon
from ..privacy.budget import UNLIMITED_EPSILON, Budget
from ..privacy.plan import Plan
from ..run.build import build
from ..run.display import console_for
from ..run.queries import queries_of, query_events_of_unit
from ..run.table_model import model_choice
from ..run.unit_plan import (
    NO_GUARANTEE,
    curve,
    meaning_of,
    plans_of,
    record_epsilon,
    tries_of,
    unit_plans,
    warnings_for,
)

if TYPE_CHECKING:
    from ..simulations.prediction import Prediction

ACCEPTED = "--accept-sweep"
# Predicted points: epsilons, of which USUAL stands for a missing target; multiples of the settings' rounds and of the clients.
EPSILONS, USUAL = (1.0, 3.0, 8.0), 3.0
ROUNDS, CLIENTS = (0.25, 0.5, 1.0, 2.0), (0.5, 1.0, 2.0)
KNEE_MARGIN = 0.01  # accuracy below the best: the knee is the first point within it
BETTER = 0.03  # accuracy by which another mode must be better to be recommended
BEST = ModeName.RECORD_DISTRIBUTED  # the mode that other modes are compared with: its noise is the least


def show_plan(settings: SimulationSettings, *, as_json: bool = False, plot: Path | None = None) -> int:
    """Print the plan of a run, as JSON in one line or as text, and return the exit code.

    Args:
      settings: settings of the run.
      as_json: print JSON.
      plot: file for a picture of the guarantees; None for no picture.
    """
    federation = build(settings, announced=True)  # reads no client's data
    if plot:
        _draw(federation, plot)
    if as_json:
        print(json.dumps(plain(federation), allow_nan=False))
        return 0
    for query in queries_of(federation.settings):
        query.plans(federation, "plan")  # refuses a query before anything is printed
    console = console_for(100)
    plans = list(plans_of(federation))
    if not plans:
        console.print(NO_GUARANTEE, style="red")
    for number, (plan, budget) in enumerate(plans):
        if number:
            console.print()
        _show(console, federation, plan, budget)
    if isinstance(settings.task, CsvTask):
        from ..tasks.tables import tables_of  # torch

        if settings.task.model == AUTO:
            choice = model_choice(settings)
            console.print(f"Model: {choice.model}, since {choice.reason}.")
        chosen = federation.settings  # with the rate and the strategy that suit the tables
        rate, strategy = chosen.local_training.learning_rate, chosen.strategy.target or chosen.strategy.name
        parts = [f"learning_rate {rate:g}", f"batch_size {chosen.training.batch_size}", str(strategy)]
        if level := record_level(chosen.privacy):
            parts.insert(1, f"max_grad_norm {level.clip:g}")
        console.print(f"Training: {', '.join(parts)}.")
        for column in tables_of(federation.task).schema.constrained:
            console.print(f"Released model: {column.name} {column.constraint}, at no epsilon.")
    return 0


def _draw(federation: Federation, plot: Path) -> None:
    """Draw epsilon against delta of each unit to a file."""
    from ..run.plots import draw_guarantees

    curves = {str(plan.unit): plan.curve(budget) for plan, budget in plans_of(federation)}
    if not curves:
        raise Refusal("--plot", str(plot), "privacy=none gives no guarantee to plot; choose another mode")
    try:
        draw_guarantees(curves, plot)
    except (OSError, ValueError) as problem:
        raise Refusal("--plot", str(plot), f"cannot be written: {problem}") from None


def _show(console: Console, federation: Federation, plan: Plan, budget: Budget) -> None:
    """Print the plan of one unit: noise, accountant, epsilon by rounds, what the budget affords, and warnings."""
    unlimited = budget.target_epsilon >= UNLIMITED_EPSILON
    target = "no target" if unlimited else f"epsilon {budget.target_epsilon:g}"
    unit = plan.unit.replace("_", " ")
    console.print(
        f"[bold]Unit: one {unit}[/bold]   {target} at delta {budget.target_delta:g}, {plan.adjacency}"
    )
    if words := meaning_of(federation, plan, budget):
        console.print(words)
    over = "sensitivity" if federation.mode.records_of_unit == 1 else "clip of one example"
    console.print(
        f"noise_multiplier {plan.noise_multiplier:.4f} (noise / {over}), clip {plan.clipping_norm:g}, "
        f"sampling: {plan.sampling.name}"
    )
    console.print(_accounting(federation, plan, budget))
    if plan.mechanism.described:
        console.print(plan.mechanism.described)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rounds", justify="right")
    for adversary in EVERYBODY:
        table.add_column(f"epsilon to {adversary}", justify="right")
    for num_rounds, value in curve(plan, budget.target_delta):
        cells = [f"{value:.3f}" if adversary in plan.adversaries else "infinite" for adversary in EVERYBODY]
        table.add_row(str(num_rounds), *cells)
    console.print(table)
    for line in _consequences(federation, plan, budget):
        console.print(line)
    for sentence in warnings_for(federation, plan, budget):
        console.print(sentence, style="yellow")


def _consequences(federation: Federation, plan: Plan, budget: Budget) -> Iterator[str]:
    """Yield lines on what the plan of one unit means for rounds, repeated runs, arms, queries and records."""
    settings, rounds, delta = federation.settings, plan.num_rounds, budget.target_delta
    if federation.mode.client_budget and plan.unit == federation.mode.client_budget.unit:
        yield (
            f"Rounds are those in which one client takes part, likely at most {rounds} of the run's "
            f"{settings.num_rounds}."
        )
    query_events = query_events_of_unit(federation, plan)
    if budget.target_epsilon < UNLIMITED_EPSILON:
        affordable = plan.affordable_rounds(budget, query_events)
        ends = "; the run ends there" if affordable < rounds else ""
        yield f"At this noise the budget affords {affordable} rounds{ends}."
    if (runs := settings.budget.runs) > 1:
        one, together = (plan.epsilon(delta, rounds * n, query_events * n) for n in (1, runs))
        yield f"Each of {runs} runs costs epsilon {one:.3f}, and all together {together:.3f}."
    if settings.tried:
        tries, whole_runs = tries_of(federation, plan, budget)
        each = "round" if settings.tuning_rounds == 1 else f"{settings.tuning_rounds} rounds"
        yield (
            f"Tuning: {tries} arms of the clients try {settings.tune.name} for {each} each, and the best continues "
            f"with all. One client is in one arm: epsilon {plan.epsilon(delta, rounds):.3f}. As many whole runs would "
            f"cost {whole_runs:.3f}."
        )
    queries = queries_of(settings)
    for query in (each for each in queries if each.first):  # asked before the first round
        yield from query.lines(federation, plan, budget)
    if (lost := record_epsilon(federation, plan, delta)) is not None:
        yield f"Each record of a client loses up to epsilon {lost:.3f} by these sums: it may turn the vector around."
    if plan.unit == "client":
        yield _metrics(federation, plan)
    for query in (each for each in queries if not each.first):
        yield from query.lines(federation, plan, budget)


def _accounting(federation: Federation, plan: Plan, budget: Budget) -> str:
    """Return a sentence on the accountant, and on whether the noise is fixed in advance."""
    accountant = plan.accountant(budget.target_delta)
    if plan.filter_order is not None:
        return f"Noise is chosen adaptively: {accountant}. The guarantee is the whole budget."
    adapts = plan.unit == "client" and federation.mode.adapts_clip
    clip = "; the clip adapts, and the noise with it" if adapts else ""
    return f"Fixed in advance{clip}: {accountant}."


def _metrics(federation: Federation, plan: Plan) -> str:
    """Return a sentence on what loss and count in the sum cost the update."""
    share = federation.mode.metrics_share(plan)
    if share == 0:
        return "No metrics leave a client."
    cost = f"they cost the update {1 - math.sqrt(1 - share):.1%} of its norm; metrics_share=0 leaves them out"
    return f"Loss and count are part of the sum, under the same noise: {cost}."


def plain(federation: Federation) -> list[dict[str, Any]]:
    """Return the plan of each unit as values of JSON, which has a word for infinity."""
    return [
        asdict(each)
        | {
            "epsilon": [(num_rounds, json_number(value)) for num_rounds, value in each.epsilon],
            "runs_epsilon": json_number(each.runs_epsilon),
            "tries_epsilon": json_number(each.tries_epsilon),
            "record_epsilon": each.record_epsilon and json_number(each.record_epsilon),
            "curve": each.curve.to_json(),
            "learning_rate": federation.settings.local_training.learning_rate,
        }
        for each in unit_plans(federation)
    ]


def require_accepted(jobs: Sequence[SimulationSettings]) -> None:
    """Refuse a sweep of private runs on real data, which are all charged to the same people.

    Raises:
      Refusal: at least two such runs; the sentence says what they cost together, and what a run with arms would.
    """
    own_data = [each for each in jobs if isinstance(each.task, FolderTask | CustomTask)]
    private = [each for each in own_data if not isinstance(each.privacy, NoPrivacy)]
    if len(private) < 2:
        return
    real = [each for each in (build(each, announced=True) for each in private) if not each.simulated]
    if len(real) < 2:
        return
    events: dict[Budget, Counter[DpEvent]] = {}
    for federation in real:
        for plan, budget in plans_of(federation):
            # With correlated noise the whole run is one release.
            num_releases = 1 if plan.mechanism.rounds else plan.num_rounds
            events.setdefault(budget, Counter())[plan.event()] += num_releases
    costs: list[str] = []
    for budget, counts in events.items():
        together = epsilon(dict(counts), budget.target_delta, budget.adjacency, GATE_INTERVAL)
        unit = budget.unit.replace("_", " ")
        costs.append(f"epsilon {together:.3g} for one {unit} at delta {budget.target_delta:g}")
    remedy = (
        f"on real data each run is charged to the same people: as planned they cost {' and '.join(costs)}, and the ledger "
        f"stops them at its budget; tune=learning_rate tune.values=[...] tries values on arms of the clients at the cost "
        f"of one run; budget.runs={len(real)} plans all of them within one budget; {ACCEPTED} runs them"
    )
    raise Refusal("-m", f"{len(real)} runs", remedy)


@dataclass(frozen=True)
class Point:
    """Prediction for the settings with one value changed."""

    axis: str  # what is changed: epsilon, rounds, clients or mode
    value: float | str  # the number on that axis, or the name of the mode
    prediction: Prediction


def show_accuracy(job: Job, settings: SimulationSettings, *, as_json: bool = False) -> int:
    """Print the predicted accuracy of runs with a job's settings, as JSON each point when it is known; return the exit code."""
    from ..simulations.prediction import SEEDS

    if not isinstance(settings.privacy, PrivacyLevel):
        raise Refusal("privacy", settings.privacy.name, "has no epsilon to vary; choose another mode")
    mode, usual_epsilon = settings.privacy.name, settings.privacy.target_epsilon or USUAL
    points: list[Point] = []
    for point in _points(job, settings, usual_epsilon):
        points.append(point)
        if as_json:
            fields = {"axis": point.axis, "value": point.value, "values": point.prediction.values}
            print(json.dumps(fields), flush=True)
    if as_json:
        return 0
    console = console_for(100)
    task = settings.task.option
    console.print(
        f"Predicted on the public data of {task} by {len(SEEDS)} simulations of each point, with smaller cohorts and "
        "proportionally less noise. Nothing is charged, and your own data are not read."
    )
    for axis in ("epsilon", "rounds", "clients"):
        console.print(_table([point for point in points if point.axis == axis]))
    means = {(point.axis, point.value): point.prediction.mean for point in points}
    accuracy, best = means["rounds", settings.num_rounds], means.get(("mode", BEST), 0.0)
    if best > accuracy + BETTER:
        sentence = f"{BEST}: {best:.0%}, {mode}: {accuracy:.0%}. Use privacy={BEST}."
        console.print(sentence, style="yellow")
    return 0


def _points(job: Job, settings: SimulationSettings, usual_epsilon: float) -> Iterator[Point]:
    """Yield the points of the three axes, and one of `BEST` at its defaults and the same budget, if it is another mode."""
    from ..simulations.prediction import predict, public_federation

    data = [each for each in job.overrides if each.startswith(("task", "partition", "seed", "allow_modules"))]
    best = [*data, f"privacy={BEST}", f"privacy.target_epsilon={usual_epsilon}"]
    # Read before the predictions, which take long, so that a mistake is refused at once.
    others = [] if settings.privacy.name == BEST else [settings_from_overrides(best)]
    for target in sorted({*EPSILONS, usual_epsilon}):
        privacy = settings.privacy.model_copy(update={"target_epsilon": target, "noise_multiplier": None})
        federation = public_federation(settings.model_copy(update={"privacy": privacy}))
        yield Point("epsilon", target, predict(federation))
    for factor in ROUNDS:
        num_rounds = max(1, round(settings.num_rounds * factor))
        federation = public_federation(settings.model_copy(update={"num_rounds": num_rounds}))
        yield Point("rounds", num_rounds, predict(federation))
    federation = public_federation(settings)
    for factor in CLIENTS:
        yield Point("clients", round(federation.num_clients * factor), predict(federation, clients=factor))
    for other in others:
        yield Point("mode", other.privacy.name, predict(public_federation(other)))


def _table(rows: Sequence[Point]) -> Table:
    """Return the table of one axis, in which the knee is marked."""
    axis, metric = rows[0].axis, rows[0].prediction.metric
    best = max(row.prediction.mean for row in rows)
    knee = next(row for row in rows if row.prediction.mean >= best - KNEE_MARGIN)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (axis, metric, "lowest to highest", ""):
        table.add_column(column, justify="right" if column else "left", min_width=9)
    for row in rows:
        spread = f"{min(row.prediction.values):.3f} to {max(row.prediction.values):.3f}"
        more = "knee: more gains less than one point" if row is knee and row is not rows[-1] else ""
        table.add_row(f"{row.value:g}", f"{row.prediction.mean:.3f}", spread, more)
    return table
