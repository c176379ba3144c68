"""Number of last models that a run averages, by the planned noise on each of them.

The average of released models is post-processing: it costs no privacy. The last model contains the full noise of the
last rounds; a mean of k models contains less and lags by k / 2 rounds. More noise justifies more models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..tasks.arrays import dimension_of
from .learning_rate import RISE
from .prepared_run import Run

# Shares of the rounds. Both were found on digits and mnist5k: docs/evidence/accuracy.md.
SHARE_PER_RATIO, MAX_SHARE = 1 / 8, 1 / 2


def average_after(run: Run) -> int | None:
    """Return the round after which models are averaged; None if the run's result is its last model."""
    settings = run.federation.settings
    models = 1 if settings.model == "last" else round(settings.num_rounds * _share(run))
    if models < 2:
        return None
    # Models of arms are left out, since only a part of the clients trains each.
    return max(run.tuning.last, settings.steps - models)


def _share(run: Run) -> float:
    """Return the last share of the rounds, in [0, 1], whose models are averaged: the more noise, the larger."""
    federation, privacy = run.federation, run.privacy
    if privacy is None:
        return federation.mode.share_of_models
    # The expected norm of a round's noise over the largest norm of its clipped sum.
    over_clip, expected = privacy.plan.noise_std / privacy.plan.clipping_norm, federation.mode.expected_units
    ratio = over_clip * math.sqrt(dimension_of(federation.task)) / expected
    return min(MAX_SHARE, SHARE_PER_RATIO * ratio)


def early_of(last: Mapping[str, Any], mean: Mapping[str, float], models: int) -> str | None:
    """Return a sentence if the loss of the mean of the last models is a tenth above that of the last one; else None.

    Args:
      last: line of the last round.
      mean: metrics of the mean; empty without one.
      models: number of models in the mean.
    """
    before, after = last.get("loss"), mean.get("loss")
    if before is None or after is None or not after > before * (1 + RISE):
        return None
    return (
        f"the mean of the last {models} models has loss {after:.4g} and the last model {before:.4g}: the run had not converged; "
        "use more rounds, or model=last"
    )
