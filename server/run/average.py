"""Number of last models that a run averages, by the noise that its plan puts on each of them.

The average of released models is post-processing: it costs no privacy. The last model holds the noise of the last rounds
in full; a mean of k holds less, and lags behind by k / 2 rounds. The more noise there is, the more models are worth it.
"""

from __future__ import annotations

import math

from ...tasks.arrays import dimension_of
from .federation import Run

# Shares of the rounds. Both were found on digits and mnist5k: docs/evidence/accuracy.md.
SHARE_PER_RATIO, MOST = 1 / 8, 1 / 2
OF_CLIENTS_NOISE = 1 / 4  # where each client adds noise of its own, of which a server knows nothing


def average_after(run: Run) -> int | None:
    """Return the round after which models are averaged; None where the last is what the run leaves."""
    federation = run.federation
    rounds = federation.settings.num_rounds
    models = 1 if federation.settings.model == "last" else round(rounds * _share(run))
    if models < 2:
        return None
    settings = federation.settings
    arms = 0 if run.tuning is None else run.tuning.last  # their models are of a part of the clients
    return max(arms, settings.steps - models)


def _share(run: Run) -> float:
    if run.privacy is None:
        return 0.0 if run.federation.record is None else OF_CLIENTS_NOISE
    return min(MOST, SHARE_PER_RATIO * noise_ratio(run))


def noise_ratio(run: Run) -> float:
    """Return the expected length of a round's noise over the most that its clipped sum can move the model."""
    federation, privacy = run.federation, run.privacy
    assert privacy is not None
    together = federation.together
    expected = (
        federation.cohort.expected_size(federation.population)
        if together is None
        else together.sample_rate * federation.records
    )
    plan = privacy.plan
    return plan.noise_std / plan.clipping_norm * math.sqrt(dimension_of(federation.task)) / expected
