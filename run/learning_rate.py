"""Learning rate, clip and strategy of a task that states a bound on the curvature of its loss, from public numbers alone.

Plain descent converges below 2 / L, and with momentum b at the server below 2 (1 + b) / L (Polyak 1964); half of that is
taken. Noise needs less: R rounds whose noise follows from a target (epsilon, delta) on N records leave a walk of about
rate R k C sqrt(p) / N in p directions, where k = sqrt(2 ln(1.25 / delta)) / epsilon and C is the clip (Dong et al. 2022
for many rounds). That walk is kept to the size of the model, which is of the order of 1 / curvature. A clip cuts gradients of
rows that are far from their answer, a bias that remains however many records there are: so the clip grows up to where its noise
would hold the rate back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..base.refusal import Refusal
from ..configs.privacy_settings import (
    ClientLevel,
    NoPrivacy,
    Record,
    RecordAndClient,
    RecordDistributed,
    record_level,
    sum_level,
)
from ..configs.schema import SimulationSettings
from ..configs.training_settings import AutoStrategy, FedAvg, FedAvgM
from ..tasks.data import size_of
from ..tasks.protocol import Task

TRAIN_LOSS = "train/train_loss"
WHOLE = 100_000  # a batch of at least this many rows is all that a client of tables has
RISE = 0.1  # share of the lowest loss; a converged run with noise stays within it
MEMORIES = 10  # spans of momentum in a run: with fewer it ends while it swings, worse than it began
SMALLEST_CLIP = 1.0  # of tables: docs/evidence/accuracy.md, "Real tables beside other libraries"
CLIPPED_FACTOR = 4.0  # clipped steps are short where the loss is steep: docs/evidence/accuracy.md, "Tables"


def suited(settings: SimulationSettings, task: Task, num_clients: int) -> SimulationSettings:
    """Return the settings with the rate, the clip of records and the strategy that follow from the task, where left to it.

    Args:
      settings: validated.
      task: loaded; one of tables states its loss's `curvature` and a row's `squared_length`, which bound the rate.
      num_clients: number of clients of the run.

    Raises:
      Refusal: the rate is left to a task that states no bound.
    """
    if isinstance(settings.strategy, AutoStrategy):
        together = _steps_of_a_round(settings) is not None
        suits = FedAvgM(server_momentum=_momentum(settings.num_rounds)) if together else FedAvg()
        settings = settings.model_copy(update={"strategy": suits})
    if not settings.rate_of_task:
        return settings
    curvature, length = getattr(task, "curvature", None), getattr(task, "squared_length", None)
    if curvature is None or length is None:
        raise Refusal("learning_rate", None, "this task does not say what suits it; give a number above 0")
    momentum = settings.strategy.server_momentum if isinstance(settings.strategy, FedAvgM) else 0.0
    steps = _steps_of_a_round(settings)
    # Half of the rate at which descent diverges, times the curvature; L is the curvature times the squared length of a row.
    limit = (1 - momentum if steps is None else (1 + momentum) / steps) / length
    if _is_clipped(settings, task):
        limit *= CLIPPED_FACTOR
    within_noise = (1 - momentum) * _within_noise(settings, task, num_clients)
    settings = _with_clip(settings, within_noise / limit, math.sqrt(length))
    if level := record_level(settings.privacy):
        limit = min(limit, within_noise / level.clip)
    rate = limit / curvature
    rate = float(f"{rate:.3g}")
    values = {"training": replace(settings.training, learning_rate=rate), "rate_of_task": False}
    return settings.model_copy(update=values)


def _with_clip(settings: SimulationSettings, largest: float, whole: float) -> SimulationSettings:
    """Return the settings with the norm of a record's gradient, where it is left to the task and the noise is public.

    Args:
      settings: validated.
      largest: clip up to which its noise does not hold the rate back; a larger one costs more than the bias it avoids.
      whole: length of the gradient of a row that is missed by 1; hardly any is longer.
    """
    level = settings.privacy
    if not isinstance(level, RecordDistributed) or level.max_grad_norm is not None or math.isinf(largest):
        return settings
    clip = float(f"{min(max(SMALLEST_CLIP, largest), whole):.3g}")
    return settings.model_copy(update={"privacy": level.model_copy(update={"max_grad_norm": clip})})


def _momentum(num_rounds: int) -> float:
    """Return the server's momentum, whose span of 1 / (1 - momentum) rounds a run needs `MEMORIES` times to settle."""
    return float(f"{min(FedAvgM().server_momentum, max(1 - MEMORIES / num_rounds, 0.0)):.3g}")


def _steps_of_a_round(settings: SimulationSettings) -> int | None:
    """Return the steps on the rows of all clients between two steps of the server; None if each client takes its own."""
    if isinstance(settings.privacy, RecordDistributed):
        return 1
    whole = isinstance(settings.privacy, NoPrivacy) and settings.training.batch_size >= WHOLE
    return settings.training.local_epochs if whole else None


def _is_clipped(settings: SimulationSettings, task: Task) -> bool:
    """Return whether steps are clipped: those on records, or an update of a model of classes."""
    if isinstance(settings.privacy, Record | RecordAndClient):
        return True
    return isinstance(settings.privacy, ClientLevel) and bool(getattr(task, "classes", 0))


def _within_noise(settings: SimulationSettings, task: Task, num_clients: int) -> float:
    """Return the rate, times the curvature and the clip, at which the noise of all rounds moves a model by its own size.

    Infinite where records are not protected by noise of a target, or nobody may count them.
    """
    from ..tasks.arrays import dimension_of  # torch

    level = record_level(settings.privacy)
    if level is None or level.target_epsilon is None:
        return math.inf
    if isinstance(level, Record):  # the noise of one batch, averaged over the clients
        records = settings.training.batch_size * math.sqrt(num_clients)
    else:
        records = float(level.records or sum(size_of(task, each) for each in range(task.num_clients)))
    if not records:  # of real clients, which count their own
        return math.inf
    noise = math.sqrt(2 * math.log(1.25 / level.target_delta)) / level.target_epsilon
    directions = getattr(task, "directions", None) or dimension_of(task)
    return records / (settings.num_rounds * noise * math.sqrt(directions))  # N / (R k sqrt(p))


def rise_of(rows: Iterable[Mapping[str, Any]], settings: SimulationSettings) -> str | None:
    """Return a sentence on a loss that was above its lowest in at least half of the rounds, with the remedy; else None.

    Args:
      rows: rounds that led to the model; the loss on public held-out data counts, else that of training in the clear.
      settings: settings of the run.
    """
    clear = isinstance(settings.privacy, NoPrivacy)
    name = next((each for each in ("loss", TRAIN_LOSS) if any(each in row for row in rows)), None)
    if name is None or (name == TRAIN_LOSS and not clear):
        return None
    losses = [math.nan if row[name] is None else row[name] for row in rows if name in row]
    lowest, above = math.inf, 0
    for loss in losses:  # `not <=` counts the NaN of a diverged model as above
        above += math.isfinite(lowest) and not loss <= lowest + RISE * abs(lowest)
        lowest = min(lowest, loss) if math.isfinite(loss) else lowest
    if not above or 2 * above < len(losses):
        return None
    rate = settings.local_training.learning_rate
    remedy, level = f"a learning_rate below {rate:g}", settings.privacy
    if isinstance(level, Record | RecordDistributed):  # of directions alone a model learns to be too sure
        remedy = f"a privacy.max_grad_norm above {level.clip:g}"
    elif isinstance(sum_level(level), ClientLevel):  # the noise is that of the clip, whatever the rate
        remedy = "a smaller clipping_norm or more clients"
    finding = f"the loss was at least a tenth above its lowest in {above} of {len(losses)} rounds"
    return f"{finding}: try {remedy}, or fewer rounds"
