"""Prediction of a run's accuracy: the same simulation with smaller cohorts and proportionally less noise.

A round's noise on the mean is z C / (q N). A draw of a quarter of the clients with a quarter of the noise multiplier
has the same noise on its mean, and trains a quarter of the clients. It draws from all data and simulates every round.
The sampling variance of the drawn clients differs; it is below the privacy noise unless the cohort is small (Granqvist
et al. 2024, pfl-research, arXiv:2404.06430, section 4). The prediction is not private and not charged: it is refused on
data that are not declared public or synthetic.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..base.refusal import Refusal
from ..configs.privacy_settings import (
    ClientCentral,
    ClientLevel,
    Record,
    RecordAndClient,
    RecordDistributed,
    SecaggSettings,
)
from ..configs.schema import FaultSettings, Off, SimulationSettings
from ..configs.task_settings import AllCohort, PoissonCohort
from ..configs.tuning_settings import NoTuning
from ..modes.federation import Federation
from ..run.build import build
from ..run.client_instructions import client_settings
from ..run.held_out_metrics import evaluator
from ..run.sum_plan import sum_plan
from ..strategies.cohorts import Poisson
from ..tasks.data import held_out_of
from .simulate import run_simulation

MAX_SHRINKING = 8.0  # largest factor by which a draw is made smaller
MIN_CLIENTS, MIN_RECORDS = 12, 64  # expected in a draw, which is shrunk no further
SEEDS = (0, 1)
DRAWS = ("poisson", "fixed", "all")


@dataclass(frozen=True)
class Prediction:
    """Main metric of the final model that a run is predicted to reach, one value for each seed."""

    metric: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)


def public_federation(settings: SimulationSettings) -> Federation:
    """Return the federation of these settings, whose data are public or made up.

    Raises:
      Refusal: they are not, or there is nothing that predicts the mode.
    """
    federation = build(settings)
    if not (federation.simulated and federation.held_out_public):
        remedy = "a prediction looks at data that are public or made up alone; give a task whose data are declared so"
        raise Refusal("task", federation.task_name, remedy)
    if isinstance(settings.privacy, RecordAndClient) or settings.cohort.name not in DRAWS:
        remedy = "is predicted by fedveil simulate alone, since a part of its cohort has another noise"
        raise Refusal("privacy", f"{settings.privacy.name} with cohort={settings.cohort.name}", remedy)
    return federation


def predict(federation: Federation, seeds: Sequence[int] = SEEDS, clients: float = 1.0) -> Prediction:
    """Return the predicted main metric of a run of this federation; nothing is charged.

    Args:
      federation: as `public_federation` returns it.
      seeds: of the draws and of the noise, one simulation each.
      clients: factor on the number of clients, for a larger federation whose clients have data like these.
    """
    small = _shrunk(federation, clients)
    metrics = [_simulated(federation, replace(small, seed=seed)) for seed in seeds]
    metric = next(iter(metrics[0]))
    return Prediction(metric, tuple(each[metric] for each in metrics))


def _shrunk(federation: Federation, clients: float) -> Federation:
    """Return the federation with smaller draws and proportionally less noise, for `clients` times as many clients."""
    privacy = federation.settings.privacy
    expected = federation.cohort.expected_size(federation.num_clients)
    shrinking = min(MAX_SHRINKING, max(1.0, expected / MIN_CLIENTS))
    fields: dict[str, Any] = {"target_epsilon": None}
    if isinstance(privacy, RecordDistributed):
        shrinking = min(MAX_SHRINKING, max(1.0, federation.mode.expected_units / MIN_RECORDS))
        noise = _noise(federation) / (clients * shrinking)
        fields |= {"noise_multiplier": noise, "sample_rate": privacy.sample_rate / shrinking}
        return _with(federation, privacy.model_copy(update=fields), 1.0)
    rate = expected / federation.num_clients / shrinking
    if isinstance(privacy, ClientLevel):
        noise = _noise(federation) / (clients * shrinking)
        # Epsilon does not count the noise of clients that may collude; in the predicted run they add it all the same.
        if federation.masking is not None:
            noise /= (1 - federation.masking.collusion) ** 0.5
        fields |= {
            "noise_schedule": "fixed",
            "clipping_norm": privacy.clipping_norm,
            "adjacency": privacy.adjacency,
        }
        central = privacy if isinstance(privacy, ClientCentral) else ClientCentral()
        privacy = central.model_copy(update={**fields, "noise_multiplier": noise})
    if isinstance(privacy, Record) and (clients, shrinking) != (1.0, 1.0):
        noise = _clients_noise(federation) / (clients * shrinking) ** 0.5
        privacy = privacy.model_copy(update={**fields, "noise_multiplier": noise})
    return _with(federation, privacy, rate)


def _noise(federation: Federation) -> float:
    """Return the noise multiplier of the sums."""
    plan = sum_plan(federation)
    assert plan is not None
    return float(plan.noise_multiplier or 0)


def _clients_noise(federation: Federation) -> float:
    """Return the noise multiplier of a client with the median number of records."""
    privacy, sizes = client_settings(federation, Path()).record, federation.mode.sizes
    assert privacy is not None
    return privacy.noise_multiplier(sizes[len(sizes) // 2])


def _with(federation: Federation, privacy: Any, rate: float) -> Federation:
    """Return the federation with these settings of privacy and this rate of the draw, and nothing slow but training."""
    changed = {
        "privacy": privacy,
        "cohort": AllCohort() if rate == 1 else PoissonCohort(rate=rate),
        "audit_group": Off(),
        "tune": NoTuning(),
        "secagg_group": SecaggSettings(name="auto"),
        "faults": FaultSettings(),
        "callbacks": (),
        "checkpoint_every": federation.settings.num_rounds,
        "accept_vacuous": True,
        "population": None,
        "resume": None,
    }
    settings = federation.settings.model_copy(update=changed)
    cohort = federation.cohort if rate == 1 else Poisson(rate)
    task = _Unmeasured(federation.task)
    return replace(federation, settings=settings, cohort=cohort, task=task, reported=False)


def _simulated(federation: Federation, small: Federation) -> dict[str, float]:
    """Simulate the small federation, and return the metrics of its model on all held-out examples."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_simulation(small, Path(folder) / "run", quiet=True)
        arrays = load_file(outcome.folder / "model.safetensors")
    return evaluator(federation)({name: value.numpy() for name, value in arrays.items()}, 0)


class _Unmeasured:
    """Task with one held-out example, so that evaluations after each round of a prediction take no time."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def held_out(self) -> Any:
        """Return the first example."""
        return held_out_of(self._task).batch(torch.arange(1))
