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
from ..configs.privacy_settings import NoPrivacy, PrivacyLevel
from ..configs.schema import SimulationSettings
from ..configs.settings import settings_from_overrides
from ..configs.task_settings import CsvTask, CustomTask
from ..messages.training_order import ModeName
from ..modes.federation import Federation
from ..modes.mode import EVERYBODY
from ..privacy.accounting.epsilon import GATE_INTERVAL, epsilon
from ..privacy.budget import UNLIMITED_EPSILON, Budget
from ..privacy.plan import Plan
from ..run.build import build
from ..run.display import console_for
from ..run.queries import queries_of, query_events_of_unit
from ..run.unit_plan import curve, plans_of, record_epsilon, tries_of, unit_plans, warnings_for

if TYPE_CHECKING:
    from ..simulations.prediction import Prediction

ACCEPTED = "--accept-sweep"
EPSILONS, USUAL = (1.0, 3.0, 8.0), 3.0
ROUNDS, CLIENTS = (0.25, 0.5, 1.0, 2.0), (0.5, 1.0, 2.0)  # times what was asked for
KNEE_MARGIN = 0.01  # of the best: more epsilon, rounds or clients than at the knee gain no more than that
BETTER = 0.03  # a mode that is predicted to be this much better is named
BEST = ModeName.RECORD_DISTRIBUTED  # the mode that other modes are compared with: its noise is the least


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
    for number, (plan, budget) in enumerate(plans):
        if number:
            console.print()
        _show(console, federation, plan, budget)
    if isinstance(settings.task, CsvTask):
        console.print(_training(federation.settings))
    return 0


def _training(settings: SimulationSettings) -> str:
    rate, strategy = settings.local_training.learning_rate, settings.strategy.target or settings.strategy.name
    return f"Training: learning_rate {rate:g}, batch_size {settings.training.batch_size}, {strategy}."


def _draw(federation: Federation, plot: Path) -> None:
    from ..run.plots import draw_guarantees

    curves = {str(plan.unit): plan.curve(budget) for plan, budget in plans_of(federation)}
    if not curves:
        raise Refusal("--plot", str(plot), "privacy=none gives no guarantee to plot; choose another mode")
    try:
        draw_guarantees(curves, plot)
    except (OSError, ValueError) as problem:
        raise Refusal("--plot", str(plot), f"cannot be written: {problem}") from None


def _show(console: Console, federation: Federation, plan: Plan, budget: Budget) -> None:
    unlimited, rounds = budget.target_epsilon >= UNLIMITED_EPSILON, plan.num_rounds
    target = "no target" if unlimited else f"epsilon {budget.target_epsilon:g}"
    console.print(
        f"[bold]Unit: one {plan.unit.replace('_', ' ')}[/bold]   {target} at delta {budget.target_delta:g}, {plan.adjacency}"
    )
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
    for mark, value in curve(plan, budget.target_delta):
        cells = [f"{value:.3f}" if adversary in plan.adversaries else "infinite" for adversary in EVERYBODY]
        table.add_row(str(mark), *cells)
    console.print(table)
    if federation.mode.client_budget and plan.unit == federation.mode.client_budget.unit:
        console.print(
            f"Rounds are those in which one client takes part, likely at most {rounds} of the run's "
            f"{federation.settings.num_rounds}."
        )
    if not unlimited:
        affordable = plan.affordable_rounds(budget, query_events_of_unit(federation, plan))
        ends = "; the run ends there" if affordable < rounds else ""
        console.print(f"At this noise the budget affords {affordable} rounds{ends}.")
    if (runs := federation.settings.budget.runs) > 1:
        query_events = query_events_of_unit(federation, plan)
        once, all_of_them = (
            plan.epsilon(budget.target_delta, rounds * each, query_events * each) for each in (1, runs)
        )
        console.print(f"Each of {runs} runs costs epsilon {once:.3f}, and all together {all_of_them:.3f}.")
    if federation.settings.tried:
        tries, whole = tries_of(federation, plan, budget)
        once, arms = plan.epsilon(budget.target_delta, rounds), federation.settings.tuning_rounds
        each = "round" if arms == 1 else f"{arms} rounds"
        console.print(
            f"Tuning: {tries} arms of the clients try {federation.settings.tune.name} for {each} each, and the best continues with all. One client is "
            f"in one arm: epsilon {once:.3f}. As many whole runs would cost {whole:.3f}."
        )
    queries = queries_of(federation.settings)
    for line in (line for query in queries if query.first for line in query.lines(federation, plan, budget)):
        console.print(line)
    if (lost := record_epsilon(federation, plan, budget.target_delta)) is not None:
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


def _accounting(federation: Federation, plan: Plan, budget: Budget) -> str:
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


def plain(federation: Federation) -> list[dict[str, Any]]:
    """Return the plan of each unit as plain data, with a word for the number that JSON does not have."""
    return [
        asdict(each)
        | {
            "epsilon": [(mark, json_number(value)) for mark, value in each.epsilon],
            "runs_epsilon": json_number(each.runs_epsilon),
            "tries_epsilon": json_number(each.tries_epsilon),
            "record_epsilon": each.record_epsilon and json_number(each.record_epsilon),
            "curve": each.curve.to_json(),
            "learning_rate": federation.settings.local_training.learning_rate,
        }
        for each in unit_plans(federation)
    ]


def require_accepted(jobs: Sequence[SimulationSettings]) -> None:
    """Refuse a sweep of private runs on real data, which all are charged to the same people.

    Raises:
      Refusal: saying what the runs cost together and what arms would; nothing was trained.
    """
    several = [each for each in jobs if isinstance(each.task, CsvTask | CustomTask)]
    several = [each for each in several if not isinstance(each.privacy, NoPrivacy)]
    if len(several) < 2:
        return
    federations = [build(each, announced=True) for each in several]
    real = [each for each in federations if not each.simulated]
    if len(real) < 2:
        return
    events: dict[Budget, Counter[DpEvent]] = {}
    for federation in real:
        for plan, budget in plans_of(federation):
            releases = 1 if plan.mechanism.rounds else plan.num_rounds
            events.setdefault(budget, Counter())[plan.event()] += releases
    costs: list[str] = []
    for budget, counts in events.items():
        together = epsilon(dict(counts), budget.target_delta, budget.adjacency, GATE_INTERVAL)
        costs.append(
            f"epsilon {together:.3g} for one {budget.unit.replace('_', ' ')} at delta {budget.target_delta:g}"
        )
    remedy = (
        f"on real data each run is charged to the same people: as planned they cost {' and '.join(costs)}, and the ledger "
        f"stops them at its budget; tune=learning_rate tune.values=[...] tries values on arms of the clients at the cost "
        f"of one run; budget.runs={len(real)} plans all of them within one budget; {ACCEPTED} runs them"
    )
    raise Refusal("-m", f"{len(real)} runs", remedy)


@dataclass(frozen=True)
class Point:
    """Predicted point of one axis."""

    axis: str
    value: float
    prediction: Prediction


def show_accuracy(job: Job, settings: SimulationSettings, *, as_json: bool = False) -> int:
    """Print the predicted accuracy of runs with these settings, and return the exit code."""
    from ..simulations.prediction import SEEDS, predict, public_federation

    if not isinstance(settings.privacy, PrivacyLevel):
        raise Refusal("privacy", settings.privacy.name, "has no epsilon to vary; choose another mode")
    rows: list[Point] = []
    mode, alternative = settings.privacy.name, _alternative(job, settings)
    for row in _rows(settings):
        rows.append(row)
        if as_json:
            print(
                json.dumps({"axis": row.axis, "value": row.value, "values": row.prediction.values}),
                flush=True,
            )
    other = None if alternative is None else predict(public_federation(alternative))
    if as_json:
        if other is not None and alternative is not None:
            print(json.dumps({"axis": "mode", "value": alternative.privacy.name, "values": other.values}))
        return 0
    console = console_for(100)
    task = settings.task.option
    console.print(
        f"Predicted on the public data of {task} by {len(SEEDS)} simulations of each point, with smaller cohorts and "
        "proportionally less noise. Nothing is charged, and your own data are not read."
    )
    for axis in ("epsilon", "rounds", "clients"):
        console.print(_table([row for row in rows if row.axis == axis]))
    accuracy = next(
        row.prediction.mean for row in rows if row.axis == "rounds" and row.value == settings.num_rounds
    )
    if other is not None and alternative is not None and other.mean > accuracy + BETTER:
        console.print(
            f"{alternative.privacy.name}: {other.mean:.0%}, {mode}: {accuracy:.0%}. Use privacy={alternative.privacy.name}.",
            style="yellow",
        )
    return 0


def _rows(settings: SimulationSettings) -> Iterator[Point]:
    from ..simulations.prediction import predict, public_federation

    for target in sorted({*EPSILONS, _epsilon(settings)}):
        level = settings.privacy.model_copy(update={"target_epsilon": target, "noise_multiplier": None})
        yield Point("epsilon", target, predict(public_federation(_update(settings, privacy=level))))
    for factor in ROUNDS:
        rounds = max(1, round(settings.num_rounds * factor))
        yield Point("rounds", rounds, predict(public_federation(_update(settings, num_rounds=rounds))))
    federation = public_federation(settings)
    for factor in CLIENTS:
        yield Point("clients", round(federation.num_clients * factor), predict(federation, clients=factor))


def _epsilon(settings: SimulationSettings) -> float:
    target = settings.privacy.target_epsilon if isinstance(settings.privacy, PrivacyLevel) else None
    return USUAL if target is None else target


def _update(settings: SimulationSettings, **update: object) -> SimulationSettings:
    return settings.model_copy(update=update)


def _table(rows: Sequence[Point]) -> Table:
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


def _alternative(job: Job, settings: SimulationSettings) -> SimulationSettings | None:
    """Return the settings of the mode that may do better, at its defaults and the same budget; None where there is none."""
    if settings.privacy.name == BEST:
        return None
    data = [each for each in job.overrides if each.startswith(("task", "partition", "seed", "allow_modules"))]
    return settings_from_overrides([*data, f"privacy={BEST}", f"privacy.target_epsilon={_epsilon(settings)}"])
