"""Descent of a run on tables, from its plan and its public settings, for intervals of its model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..run.files import METRICS
from .descent import Descent

if TYPE_CHECKING:
    from ..run.prepared_run import Run
    from ..server.checkpoint import State

MIN_ROWS = 50  # public rows that stand for the distribution of the inputs


class NoInterval(Exception):
    """Reason why a run has no intervals, as a clause with the remedy."""


def steps_of(run: Run, state: State) -> Descent:
    """Return the steps that led to a run's released model.

    Args:
      run: ended, with the plan of its sums.
      state: after its last round.

    Raises:
      NoInterval: the run's steps are not those of descent on the records of all clients together, or not public.
    """
    federation, settings = run.federation, run.federation.settings
    mode, training, strategy = federation.mode, settings.local_training, settings.strategy
    _require_plain(run)
    require_replies(run.folder)
    if run.privacy is None:
        noise, clip, share = 0.0, math.inf, 1.0
    else:
        plan, expected = run.privacy.plan, mode.expected_units
        clip = plan.clipping_norm / training.learning_rate
        noise = plan.noise_std / training.learning_rate / expected
        share = expected / mode.num_units
    if not mode.records:
        raise NoInterval("nobody here counts the records; declare privacy.records, a public number")
    return Descent(
        rate=training.learning_rate * getattr(strategy, "server_learning_rate", 1.0),
        momentum=getattr(strategy, "server_momentum", 0.0),
        rounds=state.round,
        averaged=max(1, state.average.models),
        clip=clip,
        noise=noise,
        share=share,
        records=float(mode.records),
    )


def _require_plain(run: Run) -> None:
    """Raise NoInterval for a run whose steps `Descent` does not describe."""
    federation, settings = run.federation, run.federation.settings
    mode, training = federation.mode, settings.local_training
    steps_alone = (
        "each client takes steps of its own; use privacy=record_distributed, or none with whole batches"
    )
    whole = run.privacy is None and not mode.spends and training.batch_size >= max(mode.sizes, default=0)
    for applies, reason in (
        (not (mode.sums_records or whole), steps_alone),
        (mode.adapts_noise or mode.adapts_clip, "noise or clip change during the run; fix them"),
        (run.tuning.arms > 1, "arms of tuning trained parts of the model; give learning_rate a value"),
        (federation.compression is not None, "updates were compressed; use compress=none"),
        (bool(run.client.canaries_of_step.count), "canary records of an audit were among the records"),
        (mode.per_person is not None, "rows of one person depend on each other; keep one row of each"),
        (training.local_epochs > 1, "a round took several steps; use local_epochs=1"),
        (training.schedule.changes, "the learning rate changed; use a constant schedule"),
        (not training.optimizer.plain, f"no law is known for optimizer={training.optimizer.name}; use sgd"),
        (
            settings.strategy.name not in ("fedavg", "fedavgm"),
            "no law is known for this strategy; use fedavgm",
        ),
    ):
        if applies:
            raise NoInterval(reason)


def require_replies(folder: Path) -> None:
    """Raise NoInterval if a round of the run in a folder was abandoned, or a client that was invited did not reply."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        if row.get("abandoned") or row.get("replies", 0) < row.get("invited", 0):
            reason = (
                f"a client was missing in round {row['round']}, so that its records counted as zeros there"
            )
            raise NoInterval(f"{reason}; run again with all of them")
