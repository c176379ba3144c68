"""Model of tables that suits a run, from public numbers alone: columns, records, clients, epsilon and mode.

Of five tables with `RECORDS_OF_COLUMN` records a column and more an additive model of smooth bins was better than a linear
one on two at every epsilon, alike on one, and lost at most .03 of r2 on two whose truth is nearly a line; on two with fewer
they were alike, and a linear one is smaller (docs/evidence/accuracy.md, "Linear or additive").
Below epsilon 1 as many more records are needed as the noise is larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configs.privacy_settings import ClientLevel, NoPrivacy, Record, RecordAndClient, sum_level
from ..configs.schema import SimulationSettings
from ..configs.task_settings import AUTO, CsvTask

RECORDS_OF_COLUMN = 20  # docs/evidence/accuracy.md, "Linear or additive"


@dataclass(frozen=True)
class ModelChoice:
    """Model that suits a run on tables: `linear` or `gam`, and why, as a clause."""

    model: str
    reason: str


def with_suitable_model(settings: SimulationSettings, on_devices: bool) -> SimulationSettings:
    """Return the settings with the model that suits the tables, where it is left to the run.

    Args:
      settings: validated.
      on_devices: whether real clients have the tables; they have the model by their own options, and linear without.
    """
    if not isinstance(settings.task, CsvTask) or settings.task.model != AUTO:
        return settings
    model = "linear" if on_devices else model_choice(settings).model
    return settings.model_copy(update={"task": settings.task.model_copy(update={"model": model})})


def with_model_of_run(settings: SimulationSettings, run: Path | None) -> SimulationSettings:
    """Return the settings with the model of a run that a question is about, where it is left to the run.

    Args:
      settings: validated.
      run: folder of the run; None if the question is about no model.
    """
    task = settings.task
    if run is None or not isinstance(task, CsvTask) or task.model != AUTO:
        return settings
    from ..configs.bundle_files import SCHEMA
    from ..tasks.table_schema import model_of_stored

    if not (run / SCHEMA).is_file():
        return settings
    model = model_of_stored(run / SCHEMA)
    return settings.model_copy(update={"task": task.model_copy(update={"model": model})})


def model_choice(settings: SimulationSettings) -> ModelChoice:
    """Return the model that suits the run's tables; of these only their columns and the number of their rows count."""
    from ..tasks.tables import TableKeys  # torch, and plans of other tasks do without

    options: dict[str, Any] = {**settings.task.options, "model": "gam"}
    if options.get("scaling") is not None:
        return ModelChoice("linear", "task.scaling scales its numbers")
    keys = TableKeys(**options)
    size = keys.public_size()
    if size.pairs:
        return ModelChoice("gam", "the schema has pairs")
    units, word = _units(settings, size.rows, size.clients)
    count = units * min(_epsilon(settings), 1.0) / size.columns
    model = "gam" if count >= RECORDS_OF_COLUMN else "linear"
    needed = math.ceil(RECORDS_OF_COLUMN / min(_epsilon(settings), 1.0))
    reason = f"{word} for {size.columns} columns are {'at least' if model == 'gam' else 'fewer than'} {needed} a column"
    return ModelChoice(model, reason)


def _units(settings: SimulationSettings, rows: int, clients: int) -> tuple[float, str]:
    """Return the number of units in a sum over the noise of one, and in words."""
    if isinstance(sum_level(settings.privacy), ClientLevel):
        return float(clients), f"{clients} clients"
    if isinstance(settings.privacy, Record | RecordAndClient):
        worth = rows / math.sqrt(clients)
        return (
            worth,
            f"{rows} records, worth {worth:.0f} since each of {clients} clients adds noise of its own,",
        )
    return float(rows), f"{rows} records"


def _epsilon(settings: SimulationSettings) -> float:
    """Return the target epsilon; infinity without one."""
    level = settings.privacy.record if isinstance(settings.privacy, RecordAndClient) else settings.privacy
    return math.inf if isinstance(level, NoPrivacy) else level.target_epsilon or math.inf
