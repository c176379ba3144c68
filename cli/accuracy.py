"""``fedveil plan --accuracy``: the predicted accuracy of a run, over epsilon, rounds and clients."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from ..base.refusal import Refusal
from ..configs.compose import Job
from ..configs.schema import PrivacyLevel, SimulationSettings
from ..configs.settings import settings_from_overrides
from ..run.display import console_for
from ..simulations.prediction import SEEDS, Prediction, predict, public_federation

EPSILONS, USUAL = (1.0, 3.0, 8.0), 3.0
ROUNDS, CLIENTS = (0.25, 0.5, 1.0, 2.0), (0.5, 1.0, 2.0)  # times what was asked for
NEAR = 0.01  # of the best: more epsilon, rounds or clients than at the knee gain no more than that
BETTER = 0.03  # a mode that is predicted to be this much better is named
BESIDE = {  # a mode, and one that promises at least the same kind of thing to fewer or closer clients
    "record": "record_distributed",
    "client_central": "record_distributed",
    "client_distributed": "record_distributed",
}


@dataclass(frozen=True)
class Point:
    """Predicted point of one axis."""

    axis: str
    value: float
    prediction: Prediction


def show_accuracy(job: Job, settings: SimulationSettings, *, as_json: bool = False) -> int:
    """Print the predicted accuracy of runs with these settings, and return the exit code."""
    if not isinstance(settings.privacy, PrivacyLevel):
        raise Refusal("privacy", settings.privacy.name, "has no epsilon to vary; choose another mode")
    rows: list[Point] = []
    mode, beside = settings.privacy.name, _beside(job, settings)
    for row in _rows(settings):
        rows.append(row)
        if as_json:
            print(
                json.dumps({"axis": row.axis, "value": row.value, "values": row.prediction.values}),
                flush=True,
            )
    other = None if beside is None else predict(public_federation(beside))
    if as_json:
        if other is not None and beside is not None:
            print(json.dumps({"axis": "mode", "value": beside.privacy.name, "values": other.values}))
        return 0
    console = console_for(100)
    task = settings.task.name
    console.print(
        f"Predicted on the public data of {task} by {len(SEEDS)} simulations of each point, with smaller cohorts and "
        "proportionally less noise. Nothing is charged, and your own data are not read."
    )
    for axis in ("epsilon", "rounds", "clients"):
        console.print(_table([row for row in rows if row.axis == axis]))
    asked = next(
        row.prediction.mean for row in rows if row.axis == "rounds" and row.value == settings.num_rounds
    )
    if other is not None and beside is not None and other.mean > asked + BETTER:
        console.print(
            f"{beside.privacy.name}: {other.mean:.0%}, {mode}: {asked:.0%}. Use privacy={beside.privacy.name}.",
            style="yellow",
        )
    return 0


def _rows(settings: SimulationSettings) -> Iterator[Point]:
    for epsilon in sorted({*EPSILONS, _epsilon(settings)}):
        level = settings.privacy.model_copy(update={"target_epsilon": epsilon, "noise_multiplier": None})
        yield Point("epsilon", epsilon, predict(public_federation(_changed(settings, privacy=level))))
    for factor in ROUNDS:
        rounds = max(1, round(settings.num_rounds * factor))
        yield Point("rounds", rounds, predict(public_federation(_changed(settings, num_rounds=rounds))))
    federation = public_federation(settings)
    for factor in CLIENTS:
        yield Point("clients", round(federation.num_clients * factor), predict(federation, clients=factor))


def _epsilon(settings: SimulationSettings) -> float:
    asked = settings.privacy.target_epsilon if isinstance(settings.privacy, PrivacyLevel) else None
    return USUAL if asked is None else asked


def _changed(settings: SimulationSettings, **update: object) -> SimulationSettings:
    return settings.model_copy(update=update)


def _table(rows: Sequence[Point]) -> Table:
    axis, metric = rows[0].axis, rows[0].prediction.metric
    best = max(row.prediction.mean for row in rows)
    knee = next(row for row in rows if row.prediction.mean >= best - NEAR)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (axis, metric, "lowest to highest", ""):
        table.add_column(column, justify="right" if column else "left", min_width=9)
    for row in rows:
        spread = f"{min(row.prediction.values):.3f} to {max(row.prediction.values):.3f}"
        more = "knee: more gains less than one point" if row is knee and row is not rows[-1] else ""
        table.add_row(f"{row.value:g}", f"{row.prediction.mean:.3f}", spread, more)
    return table


def _beside(job: Job, settings: SimulationSettings) -> SimulationSettings | None:
    """Return the settings of the mode that may do better, at its defaults and the same budget; None where there is none."""
    other = BESIDE.get(settings.privacy.name)
    if other is None:
        return None
    kept = [each for each in job.overrides if each.startswith(("task", "partition", "seed", "allow_modules"))]
    return settings_from_overrides(
        [*kept, f"privacy={other}", f"privacy.target_epsilon={_epsilon(settings)}"]
    )
